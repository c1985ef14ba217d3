"""What `status` says: the cause by its name, and what to do about it."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import pytest
from rich.console import Console

from mbcap_watch import Settings
from mbcap_watch.cli.views import as_json, render
from mbcap_watch.doctor.findings import Finding, Installation, duration
from mbcap_watch.doctor.health import STATES, Health, State, explain, judge
from mbcap_watch.errors import Cause
from mbcap_watch.results import Outcome, PersistResult, Timings, WatchState
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.stats import HistoryEntry, Output

if TYPE_CHECKING:
    from mbcap_watch.telemetry.stats import Stats

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
SETTINGS = Settings(Path("/data/meshcore.db"))
INOTIFY = WatchState(mode="inotify", why="the filesystem delivers it", armed_since=1.0)


class Bridge:
    """A bridge that lives by a clock of the test's."""

    def __init__(self, settings: Settings = SETTINGS, pid: int = 42) -> None:
        self.clock = 0.0
        self.metrics = Metrics(settings, version="1.2.3", pid=pid, clock=lambda: self.clock)

    def result(self, outcome: Outcome, error: str | None = None, **fields: Any) -> Bridge:
        values = {"outcome": outcome, "reason": "rename", "error": error, "entries": 1} | fields
        self.metrics.on_result(PersistResult(**values))
        return self.sync(INOTIFY)

    def sync(self, state: WatchState) -> Bridge:
        self.metrics.on_state(replace(state, last_sync=self.clock + 1))
        return self

    def later(self, seconds: float, *, syncs: bool = True) -> Bridge:
        self.clock += seconds
        return self.sync(self.stats.watch) if syncs else self

    @property
    def stats(self) -> Stats:
        return self.metrics.snapshot(NOW)

    def health(self, max_age: float | None = None) -> Health:
        return judge(self.stats, max_age)


def codes(health: Health) -> tuple[list[str], list[str]]:
    return [each.code for each in health.problems], [each.code for each in health.warnings]


def text(health: Health) -> str:
    return " ".join(f"{each.text}; {each.remedy}" for each in health.problems + health.warnings)


def well(settings: Settings = SETTINGS, pid: int = 42) -> Bridge:
    return Bridge(settings, pid).result("applied", written_at="2027-01-15T07:59:00Z")


def test_all_is_well() -> None:
    health = well().health()
    assert (health.healthy, health.state) == (True, "running")
    assert codes(health) == ([], [])


def test_healthy_is_said_of_what_runs_alone() -> None:
    for code, state in STATES.items():
        assert Health((Finding(code, "problem", "service", "it"),)).verdict == state
    assert {*STATES.values(), "running"} == {*get_args(State)}
    assert Health().verdict == "running, healthy"


def test_long_work_is_not_stuck() -> None:
    assert well().later(100, syncs=False).health().healthy


def test_alive_but_not_syncing() -> None:
    health = well().later(316, syncs=False).health()
    assert (health.state, codes(health)[0]) == ("stuck", ["no_sync"])
    assert "the last sync ended 5 min 16 s ago, and one is due every 5 s" in text(health)
    never = Bridge().later(316, syncs=False).health()
    assert "no sync has ended yet" in text(never)


def test_a_call_that_does_not_come_back() -> None:
    bridge = well()
    bridge.metrics.on_state(replace(bridge.stats.watch, stuck_since=5.0))
    health = bridge.later(65, syncs=False).health()
    assert (health.state, codes(health)[0]) == ("stuck", ["stuck"])
    assert "does not come back; the last sync ended 1 min" in text(health)
    # `ls` would hang as well; the doctor does not.
    assert "mbcap-watch check --database /data/meshcore.db" in text(health)


@pytest.mark.parametrize(
    "outcome, code, remedy",
    [
        ("database_missing", "database_missing", "DB_PATH"),
        ("schema_missing", "schema_missing", "ingestor"),
        ("busy", "busy", "mbcap-watch check --database /data/meshcore.db"),
        ("failed", "failed", "mbcap-watch check --database /data/meshcore.db"),
        ("malformed", "malformed", "rename it over"),
        ("refused", "refused", "--max-bytes"),
        ("no_snapshot", "snapshot_misplaced", "what is in the way"),
    ],
)
def test_trouble_that_persists(outcome: Outcome, code: str, remedy: str) -> None:
    bridge = well().result(outcome, "/some/path: the cause").later(65)
    health = bridge.health(30)  # that it is not applied is not told twice
    assert codes(health) == ([code], [])
    assert "for 1 min 5 s: /some/path: the cause" in text(health)
    assert remedy in text(health)
    assert bridge.result("unchanged").health().healthy


def test_every_kind_of_trouble_has_a_remedy() -> None:
    for outcome in well().stats.outcomes:
        for fields in ({}, {"failed_rows": 1}):
            assert "the cause" in text(well().result(outcome, "the cause", **fields).health())


@pytest.mark.parametrize(
    "cause, remedy",
    [
        ("disk_full", "df -h /data"),
        ("read_only", "findmnt -T /data"),
        ("not_permitted", "stat /data/meshcore.db"),
        ("not_a_file", "rmdir"),
        ("not_a_database", "--database"),
        ("corrupt", "restore a backup"),
        ("disk_error", "dmesg"),
        ("limit", "LimitNOFILE"),
        ("snapshot_unreadable", "namei"),
        ("filesystem_failed", "umount"),
    ],
)
def test_each_cause_of_a_failure_has_its_own_remedy(cause: Cause, remedy: str) -> None:
    health = well().result("failed", "the cause", cause=cause).health()
    assert codes(health)[0] == [cause]
    assert remedy in health.problems[0].remedy


def test_paths_in_remedies_are_quoted() -> None:
    settings = Settings(Path("/my data/{x}.db"))
    health = Bridge(settings).result("failed", "full", cause="disk_full").health()
    assert "df -h '/my data'" in health.problems[0].remedy


def test_a_snapshot_of_another_mesh() -> None:
    bridge = well().result("unchanged", entries=3, unmatched=3)
    assert codes(bridge.health()) == (["no_match"], [])
    bridge = well().result("unchanged", entries=3, unmatched=2, matched_inactive=1)
    assert codes(bridge.health()) == ([], [])


def test_neither_a_snapshot_nor_a_database() -> None:
    """A wrong path of the database moves the directory of the snapshot along."""
    bridge = Bridge().result("no_snapshot", cause="no_database")
    assert codes(bridge.health()) == (["no_database"], ["no_snapshot"])
    assert codes(bridge.result("no_snapshot").health()) == ([], ["no_snapshot"])


@pytest.mark.parametrize("before", ["applied", "malformed", None])
def test_a_snapshot_that_was_there_and_is_gone(before: Outcome | None) -> None:
    bridge = Bridge() if before is None else Bridge().result(before)
    health = bridge.result("no_snapshot").health()
    if before is None:
        assert codes(health) == ([], ["no_snapshot"])
    else:
        assert codes(health)[0] == ["snapshot_vanished"]
        assert "that was at /data/mbcap-snapshot/snapshot.json is gone" in text(health)


def test_a_snapshot_directory_that_is_set_to_the_file() -> None:
    settings = Settings(Path("/data/meshcore.db"), Path("/data/mbcap-snapshot/snapshot.json"))
    health = Bridge(settings).result("no_snapshot", "is not a directory").health()
    assert codes(health)[0] == ["snapshot_dir_is_file"]
    assert health.problems[0].remedy.endswith(": /data/mbcap-snapshot")


@pytest.mark.parametrize(
    "fields, problems, warnings, words",
    [
        ({"skipped_unrecognized": 1}, ["no_usable_entry"], [], "1 entry, of which none"),
        (
            {"entries": 9, "skipped_unrecognized": 5, "skipped_unknown": 4},
            ["no_usable_entry"],
            [],
            "9 entries, of which none can be used: 5 have",
        ),
        (
            {"entries": 9, "skipped_unrecognized": 5, "matched_active": 4},
            [],
            ["unrecognized"],
            "9 entries, of which 5 have",
        ),
        ({"entries": 9, "skipped_unrecognized": 4, "matched_active": 5}, [], [], ""),
        ({"entries": 9, "skipped_unknown": 9}, [], ["nothing_to_write"], "9 entries"),
        ({"entries": 0}, [], ["nothing_to_write"], "0 entries"),
    ],
)
def test_entries_that_cannot_be_used(
    fields: dict[str, Any], problems: list[str], warnings: list[str], words: str
) -> None:
    health = Bridge().result("unchanged", **fields).health()
    assert codes(health) == (problems, warnings)
    assert words in text(health)


def test_before_the_first_sync_it_is_starting() -> None:
    health = Bridge().later(3, syncs=False).health()
    assert (health.state, health.verdict, codes(health)) == (
        "starting",
        "starting",
        (["starting"], []),
    )
    assert not health.healthy
    assert "started 3 s ago" in text(health)
    assert well().health().verdict == "running, healthy"


def test_polling_only_because_inotify_cannot_be_had() -> None:
    state = WatchState(why="no inotify watch on /x for now: limit reached", degraded=True)
    assert codes(well().sync(state).health()) == ([], ["no_inotify"])
    assert codes(well().sync(replace(state, degraded=False)).health()) == ([], [])


def test_a_sync_of_many_minutes_that_gets_on() -> None:
    bridge = well().later(1000, syncs=False)
    assert bridge.health().state == "stuck"
    bridge.metrics.on_state(replace(bridge.stats.watch, last_progress=bridge.clock))
    assert codes(bridge.later(100, syncs=False).health()) == ([], [])


@pytest.mark.parametrize("outcome", ["applied", "unchanged", "failed"])
def test_rows_that_are_refused(outcome: Outcome) -> None:
    bridge = Bridge().result(outcome, "nodes: the row 'a' could not be written", failed_rows=1)
    assert codes(bridge.health()) == (["rows_refused"], [])


def test_a_locked_database_is_not_blamed_on_rows() -> None:
    assert codes(well().result("busy", "locked", failed_rows=1).health())[0] == ["busy"]


def test_a_table_that_waits_for_its_columns_is_no_failure() -> None:
    health = Bridge().result("unchanged", "no table inactive_nodes").health()
    assert codes(health) == ([], ["table_waits"])


def test_the_last_apply_is_too_old() -> None:
    bridge = well().later(599)
    assert bridge.health(600).healthy
    health = bridge.later(2).health(600)
    assert codes(health)[0] == ["no_apply"]
    assert "10 min 1 s ago" in text(health)
    assert bridge.health().healthy  # 3 times 5 min of the resync, and 5 min
    assert not bridge.later(600).health().healthy


def test_waiting_for_the_first_snapshot_is_healthy_unless_an_age_is_demanded() -> None:
    bridge = Bridge().result("no_snapshot").later(7200)
    assert codes(bridge.health()) == ([], ["no_snapshot"])
    health = bridge.health(600)
    assert codes(health) == (["no_apply"], ["no_snapshot"])
    assert "the database has never been compared with a snapshot" in text(health)
    assert "there is no snapshot at /data/mbcap-snapshot/snapshot.json" in text(health)


@pytest.mark.parametrize(
    "written_at, warnings",
    [
        ("2027-01-15T07:46:00Z", []),
        ("2027-01-15T07:44:00Z", ["old_snapshot"]),
        ("2027-01-15T08:00:30Z", []),
        ("2027-01-15T09:00:00+01:00", []),
        ("2027-01-15T08:02:00Z", ["clocks"]),
        ("0001-01-01T00:00:00Z", []),
        (None, []),
    ],
)
def test_a_publisher_that_is_stale_is_no_error_of_ours(
    written_at: str | None, warnings: list[str]
) -> None:
    health = Bridge().result("applied", written_at=written_at).health()
    assert codes(health) == ([], warnings)
    assert "put in place" not in text(health)  # only `check` knows when that was


def test_locks_are_warnings() -> None:
    bridge = well()
    bridge.metrics.on_timings(Timings(lag=None, waits=(0.3,), holds=(0.6,)))
    health = bridge.health()
    assert codes(health) == ([], ["slow_holds", "contention"])
    assert "for over 0.5 s (1 time)" in text(health)
    assert "take over 0.3 s" in text(health)


HOUR = 3600.0


@pytest.mark.parametrize(
    "fields, code, words",
    [
        (
            {"watch": replace(INOTIFY, last_sync=NOW, sweep_hits=2, last_sweep_hit=NOW - 60)},
            "sweep_hits",
            "2 changes were found by the sweep, without an event, the last 1 min ago",
        ),
        (
            {"last_set_back": 3, "last_set_back_at": NOW - 60},
            "set_back",
            "3 rows were set back between two syncs of one snapshot, 1 min ago",
        ),
        (
            {
                "history": [
                    HistoryEntry(at=NOW - 60, reason="rename", outcome="applied", hold_ms=501)
                ]
            },
            "slow_holds",
            "for over 0.5 s (1 time)",
        ),
        (
            {
                "contended_at": NOW - 60,
                "mbcap_persist": msgspec.structs.replace(
                    well().stats.mbcap_persist, wait_ms_p95=300.0
                ),
            },
            "contention",
            "5 % of the waits for the write lock take over 0.3 s",
        ),
    ],
)
def test_what_is_over_is_told_for_an_hour(fields: dict[str, Any], code: str, words: str) -> None:
    stats = msgspec.structs.replace(well().stats, **fields)
    health = judge(stats)
    assert codes(health) == ([], [code])
    assert words in text(health)
    later = stats.sampled_at + timedelta(seconds=HOUR)
    watch = replace(stats.watch, last_sync=later.timestamp())
    health = judge(msgspec.structs.replace(stats, sampled_at=later, watch=watch), HOUR + 1)
    assert codes(health) == ([], ["old_snapshot"])


@pytest.mark.parametrize(
    "name, code", [("log", "log_unread"), ("ack", "ack_failed"), ("http", "http_down")]
)
def test_outputs_that_do_not_work(name: str, code: str) -> None:
    stats = well().stats
    for output, words in (
        (Output(problem="it is full", last_good=NOW - 60), "it is full; it last worked 1 min ago"),
        (Output(problem="it is full"), "it is full; it has never worked"),
    ):
        health = judge(msgspec.structs.replace(stats, outputs={name: output}))
        assert codes(health) == ([], [code])
        assert words in text(health)
    works = Output(last_good=NOW - 60)
    assert codes(judge(msgspec.structs.replace(stats, outputs={name: works}))) == ([], [])


HERE = Installation.of(SETTINGS)


@pytest.mark.parametrize(
    "outcome, fields, code",
    [
        ("applied", {"matched_active": 1}, None),
        ("unchanged", {"matched_active": 1}, None),
        ("busy", {"error": "locked"}, "busy"),
        ("failed", {"error": "full", "cause": "disk_full"}, "disk_full"),
        ("failed", {"error": "no thanks", "failed_rows": 1}, "rows_refused"),
        ("no_snapshot", {}, "no_snapshot"),
        ("no_snapshot", {"cause": "no_database"}, "no_database"),
        ("unchanged", {"error": "no nodes", "cause": "nodes_not_served"}, "nodes_not_served"),
        ("unchanged", {"error": "no inactive_nodes"}, "table_waits"),
        ("unchanged", {"unmatched": 1}, "no_match"),
        ("unchanged", {"skipped_unrecognized": 1}, "no_usable_entry"),
        ("unchanged", {"skipped_unknown": 1}, "nothing_to_write"),
        ("applied", {"matched_active": 1, "set_back": 1}, "set_back"),
        ("applied", {"error": "refused", "failed_rows": 1, "set_back": 1}, "rows_refused"),
    ],
)
def test_a_result_by_itself(outcome: Outcome, fields: dict[str, Any], code: str | None) -> None:
    result = PersistResult(outcome=outcome, reason="rename", entries=1, **fields)
    finding = explain(result, HERE)
    assert (finding and finding.code) == code
    if finding and result.error:
        assert result.error in finding.text


def test_any_result_can_be_explained() -> None:
    numbers: tuple[dict[str, Any], ...] = (
        {},
        {"failed_rows": 1},
        {"unmatched": 1},
        {"set_back": 1},
    )
    each = itertools.product(get_args(Outcome), [None, *get_args(Cause)], [None, "{x}"], numbers)
    for outcome, cause, error, more in each:
        fields = {"outcome": outcome, "cause": cause, "error": error, **more}
        explain(PersistResult(reason="rename", **fields), HERE)


def shown(stats: Stats | None, health: Health) -> str:
    console = Console(file=io.StringIO(), width=120)
    render(stats, health, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table() -> None:
    bridge = well()
    bridge.metrics.on_timings(Timings(lag=0.0123, waits=(0.001, 0.2), holds=(0.004,)))
    out = shown(bridge.stats, bridge.health())
    for part in (
        "running, healthy",
        "42, mbcap-watch 1.2.3",
        "/data/mbcap-snapshot/snapshot.json",
        "2027-01-15T07:59:00Z (1 min ago)",
        "inotify: the filesystem delivers it",
        "0 s ago (applied)",
        "applied 1",
        "p50 12.3, p95 12.3, p99 12.3, max 12.3 ms",
        "count 2, contention_total 1",
    ):
        assert part in out, part


def test_the_table_has_the_outputs() -> None:
    outputs = {
        "log": Output(problem="nobody reads it", last_good=NOW - 60),
        "http": Output(last_good=NOW - 5),
    }
    stats = msgspec.structs.replace(well().stats, outputs=outputs, set_back=3, held=7)
    out = " ".join(shown(stats, judge(stats)).split())
    assert "log nobody reads it (last worked 1 min ago)" in out
    assert "http works (last worked 5 s ago)" in out
    assert "0 refused, 3 set back" in out
    assert "7 downgrades wait" in out


def test_a_remedy_stands_below_its_problem() -> None:
    bridge = well().result("busy", "/db: is locked")
    lines = shown(bridge.stats, bridge.health()).splitlines()
    assert lines[0] == "running, unhealthy"
    assert "/db: is locked" in lines[1]
    assert lines[2].startswith("  → ")


def test_what_is_in_an_error_commands_no_terminal_and_is_no_markup() -> None:
    bridge = well().result("failed", "\x1b[2J[red]/db[/red] \x07\udcff\x9b")
    out = shown(bridge.stats, bridge.health())
    assert "\x1b" not in out
    assert "\\x1b[2J[red]/db[/red] \\x07\\udcff\\x9b" in out


def test_json_has_everything() -> None:
    bridge = well().result("busy", "/db: is locked").later(3)
    made = json.loads(json.dumps(as_json(bridge.stats, bridge.health())))
    assert (made["healthy"], made["state"]) == (False, "running")
    assert made["problems"][0]["code"] == "busy"
    assert made["ages"]["last_apply"] == 3
    assert made["stats"]["sampledAt"] == "2027-01-15T08:00:00Z"
    assert made["stats"]["mbcap_persist"]["contention_total"] == 0
    assert as_json(None, Health())["stats"] is None


@pytest.mark.parametrize(
    "seconds, shown_as",
    [
        (-3, "0 s"),
        (0.00029, "0 s"),
        (0.25, "0.25 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (15_000, "4 h 10 min"),
        (180_000, "2 d 2 h"),
    ],
)
def test_durations(seconds: float, shown_as: str) -> None:
    assert duration(seconds) == shown_as
