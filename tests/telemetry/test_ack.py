"""`result.json`: what the publisher gets to read, and that it disturbs nobody."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import support
from mbcap_watch import PersistResult, Settings, run
from mbcap_watch.snapshot import timestamp
from mbcap_watch.telemetry import ack
from mbcap_watch.telemetry.ack import Ack
from support import (
    QUIET,
    Results,
    connect,
    document,
    other_process,
    put,
    read_line,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

T1, T2 = "2026-07-18T08:47:37.123456789Z", "2026-07-18T08:52:37Z"


@pytest.fixture
def directory(database: Path) -> Path:
    return database.parent / "mbcap-snapshot"


@pytest.fixture
def answers(database: Path) -> Ack:
    return Ack(Settings.from_mapping({"database": database}))


result = partial(support.result, written_at=T1)


def settle(answers: Ack) -> None:
    wait_until(lambda: answers._thread is None, "the end of writing")


def read(answers: Ack) -> dict[str, Any]:
    settle(answers)
    answer: dict[str, Any] = json.loads(answers.path.read_bytes())
    return answer


def written(answers: Ack, result: PersistResult) -> bool:
    """Whether `result` leads to another file."""
    settle(answers)
    before = answers.path.stat().st_ino if answers.path.exists() else None
    keep = None if before is None else os.open(answers.path, os.O_RDONLY)  # keeps the inode taken
    try:
        answers.on_result(result)
        settle(answers)
        return answers.path.exists() and answers.path.stat().st_ino != before
    finally:
        if keep is not None:
            os.close(keep)


def test_what_the_publisher_reads(answers: Ack, directory: Path) -> None:
    before = timestamp.now()
    answers.on_result(result(entries=3, changed_active=2, unmatched=1))
    answer = read(answers)

    assert list(answer)[:5] == ["writtenAt", "resultAt", "persisted", "outcome", "error"]
    assert answer["writtenAt"] == T1
    assert answer["persisted"] is True
    assert (answer["outcome"], answer["error"]) == ("applied", None)
    assert (answer["entries"], answer["changed_active"], answer["unmatched"]) == (3, 2, 1)
    assert timestamp.is_valid(answer["resultAt"])
    assert before[:19] <= answer["resultAt"][:19] <= timestamp.now()[:19]
    assert "written_at" not in answer
    assert os.listdir(directory) == ["result.json"]


@pytest.mark.parametrize(
    "told,persisted",
    [
        (result("unchanged"), True),
        (result("applied", held=1), False),
        (result("applied", failed_rows=1, error="nodes: the row 'aa' could not be written"), False),
        (result("unchanged", error="nodes has no columns yet"), False),
        (result("malformed", written_at=None, error="no JSON"), False),
        (result("busy", error="locked"), False),
        (result("no_snapshot", written_at=None), False),
    ],
)
def test_persisted_means_all_of_it(answers: Ack, told: PersistResult, *, persisted: bool) -> None:
    answers.on_result(told)
    assert read(answers)["persisted"] is persisted


def test_only_news_is_written(answers: Ack) -> None:
    bad = result("malformed", written_at=None, error="no JSON")
    for told, expected in (
        (result(changed_active=1), True),
        (result("unchanged", reason="resync"), False),  # in the database, as before
        (result("unchanged", reason="resync", seconds=9.0), False),
        (result(reason="resync", changed_inactive=1), True),  # a node came back
        (result("unchanged", written_at=T2), True),
        (bad, True),
        (result("malformed", written_at=None, error="no JSON", reason="retry"), False),
        (result("malformed", written_at=None, error="truncated"), True),
        (result("unchanged", written_at=T2, reason="retry"), True),
        (result("busy", written_at=T2, error="locked"), True),
        (result("busy", written_at=T2, error="locked"), False),
        (result("applied", written_at=T2, changed_active=5), True),
        (result("applied", written_at=T2, failed_rows=1, error="refused"), True),
    ):
        assert written(answers, told) is expected, told
    assert read(answers)["error"] == "refused"


def test_others_may_read_it_whatever_the_umask(answers: Ack) -> None:
    before = os.umask(0o077)
    try:
        answers.on_result(result())
        settle(answers)
    finally:
        os.umask(before)
    assert stat.S_IMODE(answers.path.stat().st_mode) == 0o644


def test_a_link_is_replaced_and_never_followed(
    answers: Ack, directory: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (directory / "result.json").symlink_to(victim)
    answers.on_result(result())
    assert read(answers)["writtenAt"] == T1
    assert victim.read_text() == "mine"
    assert not answers.path.is_symlink()


def test_a_link_at_the_temporary_name_is_not_followed(
    answers: Ack, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbcap_watch.telemetry.ack.secrets.token_hex", lambda _: "guessed")
    victim = tmp_path / "victim"
    (directory / "result.json.guessed.tmp").symlink_to(victim)
    answers.on_result(result())
    settle(answers)
    assert not victim.exists()
    assert not answers.path.exists()


def test_old_leftovers_go_and_nothing_else(answers: Ack, directory: Path) -> None:
    names = ["result.json.1.tmp", "result.json.2.tmp", "snapshot.json.1.tmp", "snapshot.json"]
    for name in names:
        (directory / name).write_text("x")
        if name != "result.json.2.tmp":
            os.utime(directory / name, (0, 0))
    answers.on_result(result())
    settle(answers)
    assert set(os.listdir(directory)) == {*names[1:], "result.json"}


# ------------------------------------------------------------------------------ trouble


def test_a_failure_is_logged_once_and_tried_again(
    answers: Ack, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (directory / "result.json").mkdir()
    for _ in range(3):
        answers.on_result(result())
        settle(answers)
    assert os.listdir(directory) == ["result.json"]  # and no temporary file
    shutil.rmtree(directory)
    for _ in range(3):
        answers.on_result(result())
        settle(answers)
    directory.mkdir()
    answers.on_result(result("unchanged", reason="resync"))  # no news, but not told yet
    assert read(answers)["writtenAt"] == T1
    path = directory / "result.json"
    again = "the publisher is not answered until it can"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"{path}: cannot be written: Is a directory; {again}"),
        ("WARNING", f"{path}: cannot be written: No such file or directory; {again}"),
        ("INFO", f"{path}: written again"),
    ]


def test_without_a_directory_there_is_nobody_to_answer(
    answers: Ack, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.rmdir()
    answers.on_result(result("no_snapshot", written_at=None))
    settle(answers)
    assert not directory.exists()
    assert not caplog.records
    directory.mkdir()
    answers.on_result(result("no_snapshot", written_at=None))
    assert read(answers)["outcome"] == "no_snapshot"


def test_without_a_thread_it_is_logged(
    answers: Ack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        answers.on_result(result())
        answers.on_result(result())
    assert caplog.text.count("can't start new thread") == 1
    answers.on_result(result())
    assert read(answers)["writtenAt"] == T1


def test_a_write_that_hangs_holds_nobody_up(answers: Ack, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, begun = threading.Event(), threading.Event()
    replace = ack._replace

    def slow(directory: int, data: bytes) -> None:
        begun.set()
        hangs.wait(60)
        replace(directory, data)

    monkeypatch.setattr(ack, "_replace", slow)
    started = time.monotonic()
    answers.on_result(result("busy", error="0"))
    assert begun.wait(10)
    threads = threading.active_count()
    for n in range(1000):
        answers.on_result(result("busy", error=str(n)))
    assert time.monotonic() - started < 5
    assert threading.active_count() == threads
    started = time.monotonic()
    with answers:
        pass
    assert 0.9 < time.monotonic() - started < 5  # the end does not wait for ever
    hangs.set()
    assert read(answers)["error"] == "999"


def test_the_end_waits_for_the_last_answer(answers: Ack, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = ack._replace

    def slow(directory: int, data: bytes) -> None:
        time.sleep(0.2)
        replace(directory, data)

    monkeypatch.setattr(ack, "_replace", slow)
    with answers:
        answers.on_result(result())
    assert json.loads(answers.path.read_bytes())["writtenAt"] == T1


def test_no_reader_ever_sees_half_of_it(answers: Ack) -> None:
    answers.on_result(result())
    settle(answers)
    script = """
        import json, sys
        count = 0
        print("reading", flush=True)
        while True:
            answer = json.loads(open(sys.argv[1], "rb").read())
            count += 1
            if answer["outcome"] == "failed":
                break
        print(count, flush=True)
    """
    with other_process(script, str(answers.path)) as reader:
        assert read_line(reader) == "reading"
        for n in range(100):
            answers.on_result(result("busy", error=f"{n}" * (1 + n * 10)))
            settle(answers)
        answers.on_result(result("failed"))
        assert int(read_line(reader)) > 0


# ------------------------------------------------------------------------------ a real bridge


@contextlib.asynccontextmanager
async def answering(database: Path, **settings: Any) -> AsyncIterator[tuple[Results, Ack]]:
    made = Settings.from_mapping({"database": database, **QUIET, **settings})
    results = Results()
    with Ack(made) as answers:

        def on_result(result: PersistResult) -> None:
            results(result)
            answers.on_result(result)

        async with anyio.create_task_group() as group:
            hooks = partial(run, made, on_result=on_result, on_state=results.states.append)
            await group.start(hooks)
            yield results, answers
            group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_an_answer_is_no_reason_to_look(database: Path, directory: Path) -> None:
    async with answering(database, mode="inotify", debounce=0, max_wait=0) as (results, answers):
        assert results.state.mode == "inotify"
        for n in range(20):  # every snapshot is one look, and its answer none
            stamp = f"2026-07-18T08:00:{n:02d}Z"
            status = "confirmed" if n % 2 else "suspected"
            put(document(("aa11", status), written_at=stamp), directory / "snapshot.json")
            await results.count("applied", n + 1)
            assert read(answers)["writtenAt"] == stamp
        assert results.outcomes == ["no_snapshot"] + ["applied"] * 20
        assert [r.reason for r in results.all] == ["start"] + ["rename"] * 20
        assert len(results.states) == 21  # a state per look
        assert read(answers)["changed_active"] == 1


@pytest.mark.anyio
async def test_an_answer_is_no_reason_to_look_when_polling(database: Path, directory: Path) -> None:
    async with answering(database, mode="poll", poll_interval="10ms") as (results, answers):
        put(document(("aa11", "confirmed"), written_at=T1), directory / "snapshot.json")
        await results.count("applied", 1)
        await until(lambda: read(answers)["writtenAt"] == T1, "the answer")
        await results.syncs(20)
        assert results.outcomes == ["no_snapshot", "applied"]


@pytest.mark.anyio
async def test_ticks_write_nothing_and_a_row_that_returns_does(
    database: Path, directory: Path
) -> None:
    put(document(("aa11", "confirmed"), written_at=T1), directory / "snapshot.json")
    async with answering(database, resync="0.1s") as (results, answers):
        await until(lambda: read(answers)["outcome"] == "applied", "the answer")
        before = answers.path.stat()
        await results.count("unchanged", 3)
        settle(answers)
        after = answers.path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        with connect(database, timeout=10) as connection:
            connection.execute("UPDATE nodes SET multibyte_sup = 0 WHERE public_key = 'aa11'")
        await until(lambda: read(answers)["reason"] == "resync", "the next answer")
        assert read(answers)["changed_active"] == 1
