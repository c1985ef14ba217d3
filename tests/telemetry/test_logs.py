"""What is logged: news, not ticks."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest

from mbcap_watch.errors import printable
from mbcap_watch.results import WatchState
from mbcap_watch.telemetry.logs import ResultLog, StateLog, _JsonFormatter, _TextFormatter, summary
from support import DEADLINE, TIMES, blocks_kept, result, result_log

if TYPE_CHECKING:
    from mbcap_watch.results import PersistResult

Lines = list[tuple[str, str]]


def logged(caplog: pytest.LogCaptureFixture, *results: PersistResult) -> Lines:
    """Return level and text, without a remedy, of the lines that these results log at `info`."""
    caplog.clear()
    log = result_log()
    with caplog.at_level(logging.INFO, logger="mbcap_watch"):
        for each in results:
            log(each)
    return [(each.levelname, each.getMessage().partition("; ")[0]) for each in caplog.records]


def starts(lines: Lines) -> Lines:
    """Keep the level and what stands before the first colon."""
    return [(level, text.partition(":")[0]) for level, text in lines]


APPLIED = result("applied", changed_active=1, matched_active=1, entries=1)
UNCHANGED = result("unchanged", matched_active=1, entries=1)
WAITING = result("no_snapshot")
LOST = result("no_snapshot", cause="no_database")
STRANGE = result("unchanged", unmatched=3, entries=3)
MISPLACED = result("no_snapshot", "/x: is not a directory")
TORN = result("malformed", "/x: truncated")
BUSY = result("busy", "/db: locked")
UNSERVED = result("unchanged", "nodes: no column", cause="nodes_not_served", unmatched=3, entries=3)
SET_BACK = result("applied", changed_active=2, matched_active=2, set_back=2, entries=2)
REFUSED_ROW = result(
    "failed", "nodes: the row 'a' could not be written: no", failed_rows=1, entries=1
)
PARTLY = result(
    "applied",
    "nodes: the row 'a' could not be written: no",
    failed_rows=1,
    matched_active=1,
    entries=1,
)

CASES: dict[str, tuple[list[PersistResult], Lines]] = {
    "one line per applied snapshot": ([APPLIED, APPLIED, APPLIED], [("INFO", "applied")] * 3),
    "one line, the first, where nothing changes": ([UNCHANGED] * 5, [("INFO", "unchanged")]),
    "waiting is said once, and is no warning": (
        [WAITING] * 3,
        [("INFO", "waiting for a snapshot")],
    ),
    "trouble is said once": ([TORN] * 3, [("WARNING", "malformed")]),
    "trouble of another kind is news": (
        [TORN, TORN, BUSY, BUSY, TORN],
        [("WARNING", "malformed"), ("WARNING", "busy"), ("WARNING", "malformed")],
    ),
    "the same outcome for another reason is news": (
        [result("failed", "/db: disk I/O error"), result("failed", "/db: not a database")],
        [("WARNING", "failed")] * 2,
    ),
    "waiting for another reason is news": (
        [WAITING, MISPLACED, MISPLACED, WAITING],
        [("INFO", "waiting for a snapshot")] * 3,
    ),
    "no database either is news": (
        [WAITING, LOST, LOST],
        [("INFO", "waiting for a snapshot"), ("INFO", "waiting for a snapshot")],
    ),
    "a snapshot of another mesh is said once": (
        [STRANGE, STRANGE, UNCHANGED],
        [("WARNING", "no_match"), ("INFO", "recovered")],
    ),
    "what went wrong comes before keys that are in no table that could be asked": (
        [UNSERVED, STRANGE],
        [("WARNING", "nodes_not_served"), ("WARNING", "no_match")],
    ),
    "rows that others set back are said, besides what was applied": (
        [SET_BACK, SET_BACK, UNCHANGED],
        [("INFO", "applied"), ("WARNING", "set_back"), ("INFO", "applied"), ("INFO", "recovered")],
    ),
    "recovery is said": (
        [TORN, UNCHANGED, UNCHANGED],
        [("WARNING", "malformed"), ("INFO", "recovered")],
    ),
    "recovery by applying takes no line of its own": (
        [WAITING, APPLIED, UNCHANGED],
        [("INFO", "waiting for a snapshot"), ("INFO", "applied")],
    ),
    "trouble that comes back is said again": (
        [BUSY, UNCHANGED, BUSY],
        [("WARNING", "busy"), ("INFO", "recovered"), ("WARNING", "busy")],
    ),
    "a row that is refused is trouble, said once": (
        [REFUSED_ROW, REFUSED_ROW],
        [("WARNING", "rows_refused")],
    ),
    "applied with trouble is both": ([PARTLY], [("INFO", "applied"), ("WARNING", "rows_refused")]),
}


@pytest.mark.parametrize("results, lines", CASES.values(), ids=CASES.keys())
def test_changes_of_state(
    caplog: pytest.LogCaptureFixture, results: list[PersistResult], lines: Lines
) -> None:
    assert starts(logged(caplog, *results)) == lines


def test_a_warning_tells_the_error(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, TORN) == [("WARNING", "malformed: /x: truncated")]
    lost = "there is neither a database at /data/meshcore.db nor a snapshot beside it"
    assert logged(caplog, LOST) == [("INFO", f"waiting for a snapshot: {lost}")]
    assert logged(caplog, MISPLACED) == [("INFO", "waiting for a snapshot: /x: is not a directory")]


def test_recovery_does_not_hide_what_waits(caplog: pytest.LogCaptureFixture) -> None:
    held = result("unchanged", matched_active=2, entries=2, held=2)
    _, (_, line) = logged(caplog, TORN, held)
    assert line.endswith("as the snapshot says, but for 2 downgrades that wait")


class Explanation(NamedTuple):
    code: str
    text: str
    remedy: str = ""


def test_trouble_is_told_in_the_words_of_the_catalogue(caplog: pytest.LogCaptureFixture) -> None:
    words = {
        TORN: Explanation("torn", "/x: is torn", "repair it"),
        UNCHANGED: Explanation("no_usable_entry", "no entry can be used"),
        WAITING: Explanation("no_snapshot", "nobody has published yet"),
    }
    log = ResultLog(explain=words.get)
    with caplog.at_level(logging.INFO, logger="mbcap_watch"):
        for each in (TORN, TORN, WAITING, UNCHANGED, APPLIED):
            log(each)
    assert [record.getMessage() for record in caplog.records] == [
        "torn: /x: is torn; repair it",
        "waiting for a snapshot: nobody has published yet",
        "no_usable_entry: no entry can be used",
        summary(APPLIED),
    ]
    fields = [json.loads(_JsonFormatter().format(record)) for record in caplog.records]
    assert [each.get("code") for each in fields] == ["torn", "no_snapshot", "no_usable_entry", None]


def test_every_look_is_logged_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    log = result_log()
    with caplog.at_level(logging.DEBUG, logger="mbcap_watch"):
        log(UNCHANGED)
        log(UNCHANGED)
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG"]


def test_two_logs_know_nothing_of_each_other(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, TORN) == logged(caplog, TORN)


def test_the_line_of_an_applied_snapshot_has_all_the_counts() -> None:
    line = summary(
        result(
            "applied",
            entries=100,
            skipped_unknown=11,
            skipped_unrecognized=12,
            unmatched=13,
            held=17,
            changed_active=14,
            changed_inactive=15,
            failed_rows=16,
            written_at="2026-07-18T08:47:37Z",
            seconds=0.0171,
            lock_seconds=0.0182,
        )
    )
    assert line == (
        "applied: 29 rows changed (14 active, 15 inactive, 16 refused) of 100 entries,"
        " 11 unknown, 12 unrecognized, 13 unmatched, 17 held; 17.1 ms, lock held for at most"
        " 18.2 ms; rename, written at 2026-07-18T08:47:37Z"
    )
    assert "refused" not in summary(APPLIED)
    assert "held," not in summary(APPLIED)


POLLING = WatchState(mode="poll", why="asked for")
WATCHING = WatchState(mode="inotify", why="ext4", armed_since=1.0)
BY_POLL = ("INFO", "watching by poll: asked for")
BY_INOTIFY = ("INFO", "watching by inotify: ext4")
STATES: dict[str, tuple[list[WatchState], Lines]] = {
    "one line per change": ([POLLING, POLLING, WATCHING], [BY_POLL, BY_INOTIFY]),
    "none per look": (
        [replace(POLLING, last_sync=float(second), read_errors=second) for second in range(3)],
        [BY_POLL],
    ),
    "a lost watch": (
        [WATCHING, replace(WATCHING, rearms=1, armed_since=2.0, last_problem="moved")],
        [BY_INOTIFY, ("INFO", "watching by inotify: ext4 (armed anew: moved)")],
    ),
    "a change that the watch missed": (
        [WATCHING, replace(WATCHING, sweep_hits=1), replace(WATCHING, sweep_hits=1)],
        [BY_INOTIFY, ("INFO", "the sweep found a change that no event told of")],
    ),
    "a filesystem that does not answer for a while": (
        [POLLING, *[replace(POLLING, stuck_since=5.0)] * 2, POLLING, POLLING],
        [
            BY_POLL,
            ("WARNING", "the filesystem does not answer; waiting for it"),
            ("INFO", "the filesystem answers again"),
        ],
    ),
    "a read that hangs until the kernel gives up": (
        [
            replace(POLLING, read_errors=1),
            replace(POLLING, read_errors=1, stuck_since=5.0),
            replace(POLLING, read_errors=2),
        ],
        [
            BY_POLL,
            ("WARNING", "the filesystem does not answer; waiting for it"),
            ("INFO", "the call that hung has ended, with an error"),
        ],
    ),
}


@pytest.mark.parametrize("states, lines", STATES.values(), ids=STATES.keys())
def test_the_way_of_watching(
    caplog: pytest.LogCaptureFixture, states: list[WatchState], lines: Lines
) -> None:
    log = StateLog()
    with caplog.at_level(logging.DEBUG, logger="mbcap_watch"):
        for state in states:
            log(state)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == lines


def test_what_is_told_leaves_no_memory_behind() -> None:
    log = StateLog()
    log(POLLING)
    for tell in (APPLIED.to_dict, partial(log, POLLING)):
        assert blocks_kept(tell) < TIMES / 10


# ------------------------------------------------------------------------------ formats


def test_what_to_do_is_told_where_a_filesystem_does_not_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    StateLog(remedy="do it")(replace(POLLING, stuck_since=5.0))
    assert caplog.messages[-1] == "the filesystem does not answer; waiting for it; do it"


def record_of(caplog: pytest.LogCaptureFixture, each: PersistResult) -> logging.LogRecord:
    """Return the record that a result is logged with."""
    logged(caplog, each)
    return caplog.records[0]


def test_json_has_the_fields_of_the_result(caplog: pytest.LogCaptureFixture) -> None:
    each = result("malformed", 'line one\n"line two" \u2028 é\0', seconds=0.5)
    line = _JsonFormatter().format(record_of(caplog, each))
    assert "\n" not in line
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields.pop("level") == "warning"
    assert fields.pop("logger") == "mbcap_watch"
    assert fields.pop("message").startswith(printable(f"malformed: {each.error}; "))
    assert fields.pop("code") == "malformed"
    assert fields.pop("error") == printable(str(each.error))
    others = json.loads(each.to_json())
    del others["error"]
    assert fields == others  # and nothing else


def test_json_has_the_fields_of_the_state(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mbcap_watch"):
        StateLog()(WatchState(mode="inotify", why="ext4", armed_since=1.5, rearms=2))
    fields = json.loads(_JsonFormatter().format(caplog.records[0]))
    assert fields.items() >= {"mode": "inotify", "armed_since": 1.5, "rearms": 2}.items()


@pytest.mark.usefixtures("far_from_greenwich")
@pytest.mark.parametrize("formatter", [_JsonFormatter(), _TextFormatter()])
def test_times_are_utc_with_milliseconds(
    caplog: pytest.LogCaptureFixture, formatter: logging.Formatter
) -> None:
    record = record_of(caplog, TORN)
    record.created, record.msecs = 1_752_828_457.0625, 62.5
    assert "2025-07-18T08:47:37.062Z" in formatter.format(record)


SCRIPT = """
import logging, sys
from mbcap_watch.telemetry.logs import configure
configure("info", sys.argv[1])
logger = logging.getLogger("mbcap_watch")
logger.debug("too quiet")
logger.info("%s rows", 5, extra={"data": {"rows": 5}})
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("oh")
logging.getLogger("other").info("too quiet for a guest")
logging.getLogger("other").warning("a guest")
"""


def run(script: str, style: str) -> list[str]:
    """Run a script in a process of its own: `configure` changes the whole process."""
    command = [sys.executable, "-c", script, style]
    done = subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)
    assert done.stdout == b""  # standard output is for results
    return done.stderr.decode().split("\n")[:-1]


def test_json_is_one_object_a_line() -> None:
    lines = [json.loads(line) for line in run(SCRIPT, "json")]
    assert [(line["level"], line["logger"], line["message"]) for line in lines] == [
        ("info", "mbcap_watch", "5 rows"),
        ("error", "mbcap_watch", "oh"),
        ("warning", "other", "a guest"),
    ]
    assert lines[0]["rows"] == 5
    assert lines[1]["traceback"].endswith("ZeroDivisionError: division by zero")
    assert "traceback" not in lines[2]


def test_text_is_for_people() -> None:
    lines = run(SCRIPT, "text")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO 5 rows", lines[0])
    assert lines[1].endswith(" ERROR oh")
    assert lines[2] == "  Traceback (most recent call last):"
    assert lines[-1].endswith(" WARNING a guest")


# ------------------------------------------------------------------------------ unsafe text


UNSAFE = """
import logging, sys
from mbcap_watch.telemetry.logs import configure
configure("info", sys.argv[1])
logger = logging.getLogger("mbcap_watch")
path = b"/\\xff".decode("utf-8", "surrogateescape")
logger.info("path %s", path, extra={"data": {path: path, "path": path, "n": 1.5, "none": None}})
logger.info("one\\n2026-01-01T00:00:00.000Z INFO forged \\x1b[2J")
try:
    raise ValueError("two\\n2026-01-01T00:00:00.000Z INFO forged \\x1b[2J " + path)
except ValueError:
    logger.exception("oh")
logger.info("object", extra={"data": {"o": object, "t": (path,)}})
logger.info("no dict", extra={"data": 5})
"""


def test_every_line_arrives_as_json_whatever_text_is_in_it() -> None:
    lines = [json.loads(line) for line in run(UNSAFE, "json")]
    messages = [line["message"] for line in lines]
    assert len(messages) == 5
    assert messages[0] == "path /\\udcff"
    assert lines[0]["path"] == lines[0]["/\\udcff"] == "/\\udcff"
    assert (lines[0]["n"], lines[0]["none"]) == (1.5, None)
    assert "\\udcff" in lines[2]["traceback"]
    assert "\\udcff" in lines[3]["t"]


def test_no_text_can_look_like_a_line_of_its_own() -> None:
    lines = run(UNSAFE, "text")
    starts = [line for line in lines if not line.startswith("  ")]
    assert [line.split(" ", 2)[2].split()[0] for line in starts] == [
        *("path", "one\\n2026-01-01T00:00:00.000Z", "oh", "object", "no")
    ]
    assert "  2026-01-01T00:00:00.000Z INFO forged" in "\n".join(lines), "in the traceback"
    assert not any("\x1b" in line for line in lines)
