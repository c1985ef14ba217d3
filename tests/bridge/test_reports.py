"""What reports tell beyond the outcome: rows that were set back, the lag, changes without event."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from mbcap_watch import Settings, persist_once, snapshot_path
from mbcap_watch.snapshot import files
from mbcap_watch.watcher.inotify import InotifyWatch
from support import (
    bridge,
    connect,
    document,
    landed,
    locked,
    other_process,
    put,
    read_line,
    read_rows,
    rename_from_another_process,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


# ------------------------------------------------------------------------------ set back

SNAPSHOT = document(
    ("aa11", "confirmed", "advert"), ("bb22", "suspected", "path"), ("cc33", "confirmed", "advert")
)


def write_from_another_process(database: Path, sql: str) -> None:
    script = """
        import sqlite3, sys
        connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
        connection.executescript(sys.argv[2])
        connection.close()
        print("written", flush=True)
    """
    with other_process(script, str(database), sql) as process:
        assert read_line(process) == "written"


async def test_rows_that_another_writer_sets_back_are_counted(database: Path) -> None:
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, debounce=0) as results:
        write_from_another_process(
            database,
            "UPDATE nodes SET multibyte_sup = 1, multibyte_evidence = 'path'"
            " WHERE public_key IN ('aa11', 'cc33');"
            "UPDATE inactive_nodes SET multibyte_evidence = 'old' WHERE public_key = 'bb22'",
        )
        result = await results.sync()
        assert (result.outcome, result.changed, result.set_back) == ("applied", 3, 3)
        assert result.to_dict()["set_back"] == 3
        assert ((await results.sync()).outcome, results.all[-1].set_back) == ("unchanged", 0)


async def test_a_trigger_that_sets_rows_back_is_counted_at_every_resync(database: Path) -> None:
    with connect(database) as connection:
        connection.execute(
            "CREATE TRIGGER back AFTER UPDATE ON nodes WHEN NEW.multibyte_sup = 2"
            " BEGIN UPDATE nodes SET multibyte_sup = 1 WHERE public_key = NEW.public_key; END"
        )
    put(document(("aa11", "confirmed", "advert")), snapshot_path(database))
    async with bridge(database, resync="100ms") as results:
        await results.count("applied", 3)
        assert [result.set_back for result in results.all[:3]] == [0, 1, 1]


async def test_a_new_snapshot_sets_nothing_back(database: Path) -> None:
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database) as results:
        put(document(("aa11", "suspected", "path"), ("bb22", "confirmed")), snapshot_path(database))
        result = await results.next("applied", after=1)
        assert (result.changed, result.set_back) == (2, 0)


async def test_what_was_half_applied_is_not_taken_for_set_back(database: Path) -> None:
    """A, then B of which a part lands, then A again: it is the bridge that wrote B's rows."""
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database) as results:
        with connect(database) as connection:
            connection.execute(
                "CREATE TRIGGER no BEFORE UPDATE ON inactive_nodes BEGIN SELECT RAISE(ABORT, 'no');"
                " END"
            )
            put(
                document(("aa11", "suspected", "x"), ("bb22", "confirmed")), snapshot_path(database)
            )
            await results.count("applied", 2)
            put(SNAPSHOT, snapshot_path(database))
            await results.count("applied", 3)
        assert [result.set_back for result in results.all] == [0, 0, 0]
        assert results.all[-1].changed == 1


async def test_a_row_that_is_written_at_last_was_not_set_back(database: Path) -> None:
    with connect(database) as connection:
        connection.execute("UPDATE nodes SET multibyte_sup = 1 WHERE public_key = 'aa11'")
        connection.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON nodes BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, debounce=0) as results:
        assert (results.all[0].failed_rows, results.all[0].changed_active) == (1, 0)
        write_from_another_process(database, "DROP TRIGGER no")
        result = await results.sync()
        assert (result.changed_active, result.set_back) == (1, 0)


async def test_a_node_that_returns_was_not_set_back(database: Path) -> None:
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, debounce=0) as results:
        write_from_another_process(
            database,
            "DELETE FROM nodes WHERE public_key = 'aa11';"
            "INSERT INTO nodes (public_key) VALUES ('aa11');"
            "INSERT INTO nodes (public_key, multibyte_evidence) VALUES ('bb22', '')",
        )
        result = await results.sync()
        assert (result.changed_active, result.set_back) == (2, 0)


async def test_another_file_at_the_path_was_not_set_back(database: Path) -> None:
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    put(document(("cc33", "suspected", "path")), snapshot_path(database))
    async with bridge(database, debounce=0) as results:
        os.replace(backup, database)
        result = await results.sync()
        assert (result.changed_active, result.set_back) == (1, 0)
        assert results.all[0].changed_active == 1


async def test_the_first_sync_after_a_start_sets_nothing_back(database: Path) -> None:
    put(SNAPSHOT, snapshot_path(database))
    assert (await persist_once(Settings(database))).outcome == "applied"
    write_from_another_process(database, "UPDATE nodes SET multibyte_sup = 1")
    async with bridge(database) as results:
        assert (results.all[0].outcome, results.all[0].set_back) == ("applied", 0)


# ------------------------------------------------------------------------------ lag


async def test_the_lag_of_a_snapshot_older_than_the_bridge_counts_from_the_start(
    database: Path,
) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    put_at = snapshot_path(database).stat().st_ctime
    await until(lambda: time.time() > put_at + 0.3)
    before = time.time()
    async with bridge(database) as results:
        (first,) = results.timings
        assert first.lag is not None
        assert 0 < first.lag <= time.time() - before


@pytest.mark.parametrize("ahead", [3600.0, -3600.0], ids=["server ahead", "this machine ahead"])
async def test_the_lag_is_not_what_a_clock_ahead_makes_of_it(
    database: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """The filesystem's clock is another machine's; only the fake can set it apart."""
    read_file = files.read_file

    def read_with_their_clock(*args: Any) -> files.SnapshotFile:
        file = read_file(*args)
        return file._replace(changed_at=file.changed_at + ahead)

    monkeypatch.setattr("mbcap_watch.bridge.loading.read_file", read_with_their_clock)
    put(document(("aa11", "suspected")), snapshot_path(database))
    before = time.monotonic()
    async with bridge(database) as results:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        await until(lambda: len(results.timings) > 1)
        elapsed = time.monotonic() - before
        lags = [timing.lag for timing in results.timings]
        assert all(lag is None or 0 <= lag <= elapsed for lag in lags), lags
        assert ahead < 0 or lags == [None, None]


async def test_the_lag_counts_through_a_busy_database(database: Path) -> None:
    async with bridge(database, busy_deadline=0) as results:
        with locked(database) as release:
            put_at = time.time()
            put(document(("aa11", "confirmed")), snapshot_path(database))
            await until(lambda: time.time() > put_at + 0.5)
            release()
            released = time.time()
        await until(lambda: results.timings)
        assert results.timings[0].lag is not None
        assert released - put_at - 0.1 <= results.timings[0].lag


# ------------------------------------------------------------------------------ the sweep


async def test_the_sweep_tells_when_it_last_found_a_change(database: Path) -> None:
    put(document(("aa11", "suspected")), snapshot_path(database))
    async with bridge(database, mode="inotify", sweep_interval="50ms") as results:
        assert [state.last_sweep_hit for state in results.states] == [None] * len(results.states)
        before = time.time()
        snapshot_path(database).write_bytes(document(("aa11", "confirmed")))  # no event
        result = await results.next("applied", after=1)
        assert result.reason in ("sweep", "retry")
        assert ("nodes", "aa11", 2, "") in read_rows(database)
        await until(lambda: results.state.sweep_hits)
        hit = results.state.last_sweep_hit
        assert hit is not None
        assert before <= hit <= time.time()
        await results.syncs(5)
        assert (results.state.sweep_hits, results.state.last_sweep_hit) == (1, hit)


async def test_a_snapshot_that_vanishes_is_no_change_without_an_event(database: Path) -> None:
    put(document(("aa11", "suspected")), snapshot_path(database))
    async with bridge(database, mode="inotify", sweep_interval="50ms") as results:
        await results.next("applied")
        snapshot_path(database).unlink()
        await results.next("no_snapshot")
        await until(lambda: len(results.states) > 5, "sweeps")
        assert results.state.sweep_hits == 0


async def test_a_change_whose_event_waits_is_no_hit_of_the_sweep(database: Path) -> None:
    """A long debounce keeps the event queued, and every sweep is sooner."""
    put(document(("aa11", "suspected")), snapshot_path(database))
    clocks = {"debounce": "60s", "max_wait": "60s", "sweep_interval": "50ms"}
    async with bridge(database, mode="inotify", **clocks) as results:
        for evidence in ("a", "b", "c"):
            rename_from_another_process(
                document(("aa11", "confirmed", evidence)), snapshot_path(database)
            )
            await landed(database, evidence)
        await until(lambda: results.outcomes.count("applied") == 4)
        assert results.all[-1].reason == "sweep"
        assert (results.state.sweep_hits, results.state.last_sweep_hit) == (0, None)


async def test_a_change_whose_event_is_on_its_way_is_no_hit_of_the_sweep(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has it, or a thread of watchdog has, when the sweep reads the file."""
    arm, told = InotifyWatch.__init__, list[float]()

    def arm_with_slow_events(
        watch: InotifyWatch, directory: Path, on_change: Callable[[], None]
    ) -> None:
        def tell_later() -> None:
            time.sleep(0.2)
            on_change()
            told.append(time.monotonic())

        arm(watch, directory, tell_later)

    monkeypatch.setattr(InotifyWatch, "__init__", arm_with_slow_events)
    async with bridge(database, mode="inotify", sweep_interval="20ms", debounce=0) as results:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        await results.next("applied")
        await until(lambda: told, "the event")
        await results.syncs(5)
        assert results.all[1].reason == "sweep"
        assert (results.state.sweep_hits, results.state.last_sweep_hit) == (0, None)
