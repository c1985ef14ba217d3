"""The running bridge: each source of looks alone, with the others switched off."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import (
    Entry,
    EventLoopError,
    MbcapWatchError,
    Settings,
    persist_once,
    run,
    snapshot_path,
)
from mbcap_watch.store import plan
from support import (
    bridge,
    connect,
    document,
    has_open,
    locked,
    make_database,
    put,
    read_rows,
    rename_from_another_process,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

# ------------------------------------------------------------------------------ one source each


async def test_the_start_looks_at_what_is_there(database: Path) -> None:
    put(document(("aa11", "confirmed", "advert")), snapshot_path(database))
    async with bridge(database) as results:
        # `start` has returned: the first look is done, and so is its write.
        assert [(r.reason, r.outcome) for r in results.all] == [("start", "applied")]
        assert ("nodes", "aa11", 2, "advert") in read_rows(database)


async def test_inotify_alone(database: Path) -> None:
    async with bridge(database, mode="inotify") as results:
        for number, status in enumerate(["confirmed", "suspected", "confirmed"], 1):
            rename_from_another_process(
                document(("aa11", status, f"e{number}")), snapshot_path(database)
            )
            await results.count("applied", number)
            assert results.all[-1].reason == "rename"
            sup = 2 if status == "confirmed" else 1
            assert ("nodes", "aa11", sup, f"e{number}") in read_rows(database)


async def test_polling_alone(database: Path) -> None:
    async with bridge(database, mode="poll", poll_interval="20ms") as results:
        rename_from_another_process(document(("aa11", "confirmed")), snapshot_path(database))
        assert (await results.next("applied")).reason == "poll"
        rename_from_another_process(document(("aa11", "suspected")), snapshot_path(database))
        assert (await results.next("applied", after=2)).changed_active == 1


async def test_resync_alone(database: Path) -> None:
    """A node that appears after the snapshot was applied gets its value, too."""
    put(document(("new", "confirmed", "advert")), snapshot_path(database))
    async with bridge(database, resync="100ms") as results:
        assert results.all[0].unmatched == 1
        with connect(database) as connection:
            connection.execute("INSERT INTO nodes (public_key) VALUES ('new')")
        result = await results.next("applied")
        assert (result.reason, result.changed_active) == ("resync", 1)
        assert ("nodes", "new", 2, "advert") in read_rows(database)


async def test_a_torn_file_is_read_again_without_any_event(database: Path) -> None:
    """The late write of a second publisher repairs the file without a rename."""
    whole = document(("aa11", "confirmed", "advert"))
    async with bridge(database, mode="inotify") as results:
        put(whole[:40], snapshot_path(database))
        torn = await results.next("malformed")
        assert str(snapshot_path(database)) in str(torn.error)
        with open(snapshot_path(database), "r+b") as file:
            file.write(whole)
        assert (await results.next("applied")).reason == "retry"
        assert results.outcomes.count("malformed") == 1, "told once, however often it is read"


async def test_an_unchanged_file_is_neither_parsed_nor_compared(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    parsed: list[plan.DesiredState] = []
    original = plan.desired_state

    def desired_state(entries: Iterable[Entry]) -> plan.DesiredState:
        parsed.append(original(entries))
        return parsed[-1]

    monkeypatch.setattr(plan, "desired_state", desired_state)
    async with bridge(database, mode="poll", poll_interval="10ms") as results:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        await results.syncs(20)
        assert (len(parsed), len(results.all)) == (1, 1)


# ------------------------------------------------------------------------------ any order


async def test_everything_may_come_later_and_in_any_order(tmp_path: Path) -> None:
    database = tmp_path / "m.db"
    clocks = {"poll_interval": "20ms", "sweep_interval": "50ms"}
    async with bridge(database, **clocks) as results:
        assert results.outcomes == ["no_snapshot"]
        put(document(("aa11", "confirmed")), snapshot_path(database))
        await results.next("database_missing")
        with connect(database) as connection:
            connection.execute("PRAGMA journal_mode = wal")
            await results.next("schema_missing")
            connection.execute("CREATE TABLE nodes (public_key TEXT PRIMARY KEY)")
            connection.execute("INSERT INTO nodes VALUES ('aa11')")
            connection.execute(
                "ALTER TABLE nodes ADD COLUMN multibyte_sup INTEGER NOT NULL DEFAULT 0"
            )
            connection.execute("ALTER TABLE nodes ADD COLUMN multibyte_evidence TEXT")
        await results.next("applied")
        assert read_rows(database) == {("nodes", "aa11", 2, "")}


async def test_inotify_takes_over_once_the_directory_is_there(tmp_path: Path) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    async with bridge(database, poll_interval="20ms") as results:
        assert [state.mode for state in results.states] == ["poll"]
        assert "does not exist" in results.state.why
        snapshot_path(database).parent.mkdir()
        await until(lambda: results.state.mode == "inotify")


async def test_waiting_for_a_snapshot_keeps_nothing(database: Path) -> None:
    def errors() -> int:
        assert not gc.isenabled()
        return sum(isinstance(each, MbcapWatchError) for each in gc.get_objects())

    before = errors()
    assert (await persist_once(Settings(database))).outcome == "no_snapshot"
    assert errors() == before


# ------------------------------------------------------------------------------ a busy database


async def test_busy_is_no_news_and_the_newest_snapshot_wins(database: Path) -> None:
    async with bridge(database) as results:
        with locked(database) as release:
            for status, evidence in (("suspected", "old"), ("confirmed", "new")):
                put(document(("aa11", status, evidence)), snapshot_path(database))
                await until(lambda: has_open(database), "an attempt")
                await until(lambda: not has_open(database), "the end of it")
            assert results.outcomes == ["no_snapshot"]
            release()
        result = await results.next("applied")
        assert result.error is None
        assert ("nodes", "aa11", 2, "new") in read_rows(database)


async def test_busy_for_longer_than_the_deadline_is_told_and_tried_on(database: Path) -> None:
    async with bridge(database, busy_deadline="200ms") as results:
        with locked(database) as release:
            put(document(("aa11", "confirmed")), snapshot_path(database))
            busy = await results.next("busy")
            assert "locked" in str(busy.error)
            release()
        await results.next("applied", after=2)


async def test_timings_tell_lag_waits_and_holds(database: Path) -> None:
    async with bridge(database, batch_rows=1) as results:
        assert results.timings == [], "there was nothing to compare"
        put(document(("aa11", "confirmed"), ("dd44", "confirmed")), snapshot_path(database))
        await until(lambda: results.timings)
        (first,) = results.timings
        assert first.lag is not None
        assert first.lag >= 0
        assert (len(first.waits), len(first.holds)) == (2, 2)
        assert min(first.holds) > 0


async def test_the_lag_of_a_snapshot_that_had_to_wait_is_told(database: Path) -> None:
    async with bridge(database, resync="100ms") as results:
        timings = results.timings
        with locked(database) as release:
            before = time.time()
            put(document(("aa11", "confirmed")), snapshot_path(database))
            put_at = time.time()
            await until(lambda: has_open(database), "an attempt")
            released_at = time.time()  # before: the commit may come at once
            release()
        await until(lambda: timings)
        assert timings[0].lag is not None
        assert released_at - put_at <= timings[0].lag < time.time() - before + 0.1
        with connect(database) as other:
            other.execute("UPDATE nodes SET multibyte_sup = 0")
        await until(lambda: timings[-1].holds and timings[-1] is not timings[0])
        assert timings[-1].lag is None, "the snapshot is not new any more"


# ------------------------------------------------------------------------------ as a host sees it


async def test_the_working_directory_and_the_environment_do_not_matter(
    database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(database.parent)
    settings = Settings(database="meshcore.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DB_PATH", "/nowhere")
    monkeypatch.setenv("MBCAP_WATCH_DATABASE", "/nowhere")
    put(document(("aa11", "confirmed")), snapshot_path(database))

    assert (await persist_once(settings)).outcome == "applied"


@pytest.mark.parametrize("function", [run, persist_once])
def test_without_asyncio_there_is_one_clear_error(database: Path, function: Any) -> None:
    coroutine = function(Settings(database=database))
    with pytest.raises(EventLoopError, match="asyncio"):
        coroutine.send(None)
