"""`status` of a real daemon, and `check`, about one installation: they agree, and are right."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import processes
from mbcap_watch import snapshot_path
from mbcap_watch.snapshot import timestamp
from support import connect, document, put, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def daemon(database: Path, *options: str) -> Iterator[None]:
    """Run a bridge, and wait for its first sync."""
    with processes.daemon(database, "--sweep-interval=100ms", *options):
        wait_until(lambda: ask(database, "status")["ages"].get("last_sync") is not None)
        yield


def ask(database: Path, command: str) -> dict[str, Any]:
    done = subprocess.run(
        [*processes.MBCAP_WATCH, command, "--json", "--database", str(database)],
        stdout=subprocess.PIPE,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if answer.get("healthy", answer.get("ok")) else 1)
    return answer


def by_status(database: Path) -> tuple[set[str], set[str]]:
    """Return the codes of the problems and of the warnings of `status`."""
    told = ask(database, "status")
    return {each["code"] for each in told["problems"]}, {each["code"] for each in told["warnings"]}


def by_check(database: Path) -> tuple[set[str], set[str]]:
    found = ask(database, "check")["findings"]
    problems, warnings = (
        {each["code"] for each in found if each["severity"] == severity}
        for severity in ("problem", "warning")
    )
    return problems, warnings - {"wal_reset_bug"}  # that is about this machine


def sql(*statements: str) -> Callable[[Path], None]:
    def run(database: Path) -> None:
        with connect(database) as connection:
            for statement in statements:
                connection.execute(statement)

    return run


def published(*entries: Any, written_at: str | None = None) -> Callable[[Path], None]:
    def publish(database: Path) -> None:
        stamp = timestamp.now() if written_at is None else written_at
        put(document(*entries, written_at=stamp), snapshot_path(database))

    return publish


def shell(script: str) -> Callable[[Path], None]:
    def run(database: Path) -> None:
        subprocess.run(["sh", "-ec", script], cwd=database.parent, check=True)

    return run


VIEW = ("ALTER TABLE nodes RENAME TO other", "CREATE VIEW nodes AS SELECT * FROM other")


@pytest.mark.parametrize(
    "breaks, problems, warnings",
    [
        (sql(), set(), set()),
        (sql("ALTER TABLE nodes DROP COLUMN multibyte_evidence"), {"nodes_not_served"}, set()),
        (sql(*VIEW), {"nodes_not_served"}, set()),
        (sql("DROP TABLE inactive_nodes"), set(), {"table_waits"}),
        (published(("aa11", "Confirmed"), ("bb22", "SUSPECTED")), {"no_usable_entry"}, set()),
        (published(("AA11", "confirmed"), ("BB22", "suspected")), {"no_match"}, set()),
        (published(("aa11", "unknown")), set(), {"nothing_to_write"}),
        (shell("cd mbcap-snapshot; ln -sf gone snapshot.json"), {"snapshot_misplaced"}, set()),
        (shell("rm -r mbcap-snapshot; ln -s gone mbcap-snapshot"), {"snapshot_misplaced"}, set()),
        (shell("rm -r mbcap-snapshot; touch mbcap-snapshot"), {"snapshot_misplaced"}, set()),
        (shell("cd mbcap-snapshot; echo torn > snapshot.json"), {"malformed"}, set()),
        (shell("cd mbcap-snapshot; rm *; mkfifo snapshot.json"), {"refused"}, set()),
        (shell("seq 1000 > meshcore.db"), {"not_a_database"}, set()),
        (shell("rm meshcore.db"), {"database_missing"}, set()),
        (published(("aa11", "confirmed"), written_at="2024-01-01T00:00:00Z"), set(), {"age"}),
    ],
)
def test_status_and_check_agree(
    database: Path, breaks: Callable[[Path], None], problems: set[str], warnings: set[str]
) -> None:
    with connect(database) as connection:
        connection.execute("DELETE FROM inactive_nodes")
    published(("aa11", "confirmed"))(database)
    breaks(database)
    with daemon(database):
        status, check = by_status(database), by_check(database)
    if warnings == {"age"}:  # check knows when it was put in place, too
        assert (status[1], check[1]) == ({"old_snapshot"}, {"old_snapshot_again"})
    else:
        assert (status, check) == ((problems, warnings), (problems, warnings))


def test_a_snapshot_that_vanishes(database: Path) -> None:
    with daemon(database):
        assert by_status(database) == (set(), {"no_snapshot"})
        published(("aa11", "confirmed"))(database)
        wait_until(lambda: not by_status(database)[1])
        snapshot_path(database).unlink()
        wait_until(lambda: by_status(database)[0] == {"snapshot_vanished"})
        assert by_check(database) == ({"snapshot_vanished"}, set())  # and not `no_snapshot` again


def told(database: Path, code: str) -> str:
    """Wait until `status` warns of something, and return what it says; the rest is well."""
    wait_until(lambda: code in by_status(database)[1])
    answer = ask(database, "status")
    assert answer["healthy"]
    return " ".join(each["text"] for each in answer["warnings"] if each["code"] == code)


def test_a_port_that_is_taken(database: Path) -> None:
    published(("aa11", "confirmed"))(database)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        daemon(database, "--http", f"127.0.0.1:{taken.getsockname()[1]}"),
    ):
        assert told(database, "http_down").endswith("; it has never worked")
        taken.close()
        wait_until(lambda: "http_down" not in by_status(database)[1])


def test_an_answer_that_cannot_be_written(database: Path) -> None:
    published(("aa11", "confirmed"))(database)
    (snapshot_path(database).parent / "result.json").mkdir()
    with daemon(database, "--ack"):
        assert "cannot be written" in told(database, "ack_failed")


def test_rows_that_somebody_sets_back(database: Path) -> None:
    published(("aa11", "confirmed", "advert"))(database)
    with daemon(database, "--resync", "1s"):
        sql("UPDATE nodes SET multibyte_sup = 1 WHERE public_key = 'aa11'")(database)
        assert told(database, "set_back").startswith("1 row was set back between two syncs")


def test_a_change_without_an_event(database: Path) -> None:
    published(("aa11", "confirmed"))(database)
    with daemon(database, "--mode", "inotify"):
        snapshot_path(database).write_bytes(document(("aa11", "suspected")))  # without a rename
        assert told(database, "sweep_hits").startswith("1 change was found by the sweep")
