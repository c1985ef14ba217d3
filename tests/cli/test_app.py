"""The command line, as a process of its own: output, exit codes, signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import Settings, __version__, read_snapshot, snapshot_path
from mbcap_watch.cli import demo
from mbcap_watch.cli.config import CLI_ONLY
from processes import MBCAP_WATCH, call, call_json, daemon
from support import (
    DEADLINE,
    connect,
    document,
    has_open,
    locked,
    make_database,
    open_descriptors,
    put,
    read_rows,
    rename_from_another_process,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from processes import Call

FIELDS = [
    *("outcome", "reason", "entries", "skipped_unknown", "skipped_unrecognized", "unmatched"),
    *("matched_active", "matched_inactive", "changed_active", "changed_inactive", "failed_rows"),
    *("set_back", "held", "written_at", "error", "seconds", "lock_seconds"),
]
PLAIN = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def apply_json(database: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    code, result = call_json("apply", "--database", database, *arguments)
    assert list(result) == FIELDS
    return code, result


# ------------------------------------------------------------------------------ apply


def test_apply_prints_one_object_and_its_exit_code_tells(
    database: Path, tmp_path: Path, call_here: Call
) -> None:
    def apply_json(database: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
        done = call_here("apply", "--json", "--database", database, *arguments)
        (line,) = done.stdout.splitlines()
        result = json.loads(line)
        assert list(result) == FIELDS
        return done.returncode, result

    code, result = apply_json(database)
    assert (code, result["outcome"]) == (0, "no_snapshot")

    put(document(("aa11", "confirmed"), written_at="2026-01-02T03:04:05.000000010Z"),
        snapshot_path(database))  # fmt: skip
    code, result = apply_json(database)
    assert (code, result["outcome"], result["changed_active"]) == (0, "applied", 1)
    assert result["written_at"] == "2026-01-02T03:04:05.000000010Z"
    assert apply_json(database)[1]["outcome"] == "unchanged"

    put(document(("aa11", "suspected")), snapshot_path(database))
    with locked(database):
        code, result = apply_json(database, "--busy-deadline", "100ms")
        assert (code, result["outcome"]) == (5, "busy")

    code, result = apply_json(
        tmp_path / "none.db", "--snapshot-dir", database.parent / "mbcap-snapshot"
    )
    assert (code, result["outcome"]) == (4, "database_missing")

    with connect(database) as connection:
        connection.execute("DROP TABLE nodes")
        connection.execute("DROP TABLE inactive_nodes")
    code, result = apply_json(database)
    assert (code, result["outcome"]) == (4, "schema_missing")

    database.unlink()
    database.write_bytes(b"no database at all" * 100)
    code, result = apply_json(database)
    assert (code, result["outcome"]) == (1, "failed")

    put(b"{", snapshot_path(database))
    code, result = apply_json(database)
    assert (code, result["outcome"]) == (3, "malformed")
    assert str(snapshot_path(database)) in result["error"]

    snapshot_path(database).unlink()
    snapshot_path(database).mkdir()
    code, result = apply_json(database)
    assert (code, result["outcome"]) == (3, "refused")


def test_one_row_is_no_rows(database: Path) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    assert "would change 1 row;" in call("apply", "--dry-run", "--database", database).stdout
    said = call("apply", "--database", database).stdout
    assert said.startswith("applied: 1 row changed (1 active, 0 inactive) of 1 entry,")
    assert call("apply", "--database", database).stdout.startswith("unchanged: 0 rows changed (")


def test_a_dry_run_shows_each_change_and_touches_nothing(database: Path) -> None:
    put(document(("aa11", "confirmed", "advert"), ("bb22", "suspected")), snapshot_path(database))
    before = database.read_bytes()

    shown = call("apply", "--dry-run", "--database", database)
    assert shown.returncode == 0
    assert "nodes aa11 0/None -> 2/'advert'" in shown.stdout
    assert "inactive_nodes bb22 0/None -> 1/''" in shown.stdout

    as_json = json.loads(call("apply", "--dry-run", "--json", "--database", database).stdout)
    assert as_json["dry_run"] is True
    assert as_json["changes"] == [
        {"table": "nodes", "public_key": "aa11", "from": [0, None], "to": [2, "advert"]},
        {"table": "inactive_nodes", "public_key": "bb22", "from": [0, None], "to": [1, ""]},
    ]
    assert database.read_bytes() == before


def test_a_dry_run_shows_what_should_not_be_in_a_column(database: Path) -> None:
    put(document(("aa11", "confirmed"), ("bb22", "suspected")), snapshot_path(database))
    with connect(database) as other:
        other.execute("UPDATE nodes SET multibyte_evidence = x'ff00'")
        other.execute("UPDATE inactive_nodes SET multibyte_sup = 9e999")
    done = call("apply", "--dry-run", "--json", "--database", database)
    changes = json.loads(done.stdout, parse_constant=pytest.fail)["changes"]
    assert [change["from"] for change in changes] == [[0, "b'\\xff\\x00'"], ["inf", None]]


# ------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("bad", [["--busy-deadline", "soon"], ["--no-such-option"]])
def test_a_bad_setting_ends_with_2_and_with_an_object(database: Path, bad: list[str]) -> None:
    assert apply_json(database, *bad)[0] == 2


def test_the_daemon_outlives_a_lack_of_descriptors(database: Path) -> None:
    """It explains what is wrong without opening a file for that."""
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with daemon(database, "--sweep-interval=24h") as process:
        pid, kind = process.popen.pid, resource.RLIMIT_NOFILE
        wal = database.with_name(f"{database.name}-wal")
        limits = resource.prlimit(pid, kind)
        wait_until(lambda: not has_open(wal, pid), "the end of the sync")
        free = next(number for number in range(1000) if str(number) not in open_descriptors(pid))
        resource.prlimit(pid, kind, (free, limits[1]))
        put(document(("aa11", "suspected")), snapshot_path(database))
        wait_until(lambda: "WARNING limit: " in process.said or process.ended, "a result")
        assert not process.ended, process.said
        resource.prlimit(pid, kind, limits)
        put(document(("aa11", "suspected")), snapshot_path(database))
        wait_until(lambda: ("nodes", "aa11", 1, "") in read_rows(database), "the snapshot")
        assert process.end(signal.SIGTERM) == 0


# ------------------------------------------------------------------------------ publish


def test_publish_reads_a_file_or_standard_input(database: Path, tmp_path: Path) -> None:
    source = tmp_path / "new.json"
    source.write_bytes(document(("aa11", "confirmed"), written_at="2026-01-01T00:00:00Z"))
    done = call("publish", source, "--database", database)
    assert (done.returncode, "published 1 entry to" in done.stdout) == (0, True), done.stderr
    assert read_snapshot(database).written_at == "2026-01-01T00:00:00Z"

    entries = json.dumps([{"public_key": "aa11", "status": "unknown"}] * 2).encode()
    done = call("publish", "-", "--json", "--database", database, stdin=entries)
    assert (done.returncode, json.loads(done.stdout)["entries"]) == (0, 2), done.stderr
    assert read_snapshot(database).written_at is not None


def test_publish_refuses_what_nobody_could_read(database: Path) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    before = snapshot_path(database).read_bytes()
    done = call("publish", "-", "--database", database, stdin=b"[1]")

    assert done.returncode == 3
    assert "standard input" in done.stderr
    assert snapshot_path(database).read_bytes() == before


def test_publish_reads_no_more_than_may_be_published(database: Path) -> None:
    """An input without an end ends the reading, not the memory."""
    with open("/dev/zero", "rb") as endless:
        command = [*MBCAP_WATCH, "publish", "-", "--database", str(database)]
        done = subprocess.run(
            command, stdin=endless, capture_output=True, text=True, timeout=DEADLINE, check=False
        )
    assert done.returncode == 3
    assert "standard input: larger than max_bytes" in done.stderr
    assert not snapshot_path(database).exists()


# ------------------------------------------------------------------------------ run


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_run_until_a_signal(database: Path, signum: signal.Signals) -> None:
    with daemon(database) as process:
        rename_from_another_process(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: "applied" in process.said)
        assert ("nodes", "aa11", 2, "") in read_rows(database)
        started = time.monotonic()
        assert process.end(signum) == 0
        assert time.monotonic() - started < 5

    assert "Traceback" not in process.said
    assert process.said.count("applied") == 1
    assert sorted(path.name for path in database.parent.glob("meshcore.db*")) == ["meshcore.db"]


def test_a_signal_while_the_database_is_locked(database: Path) -> None:
    with locked(database), daemon(database) as process:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: has_open(database, process.popen.pid), "a wait for the lock")
        assert process.end(signal.SIGTERM) == 0
    assert "Traceback" not in process.said


def test_the_log_tells_changes_of_state_not_ticks(database: Path) -> None:
    clocks = ("--sweep-interval=20ms", "--resync=100ms", "--log-format=json")
    with daemon(database, *clocks) as process:
        put(b"{", snapshot_path(database))
        wait_until(lambda: [r["outcome"] for r in process.results].count("malformed") > 2)
        put(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: [r["reason"] for r in process.results].count("resync") > 3)
        process.end(signal.SIGTERM)

    messages = [json.loads(line)["message"] for line in process.said.splitlines()]
    assert sum("malformed" in message for message in messages) == 1
    assert sum(message.startswith("applied") for message in messages) == 1
    assert len(messages) < 10, messages


# ------------------------------------------------------------------------------ demo and help


def test_the_demo_checks_every_row() -> None:
    arguments = ("--nodes", 300, "--snapshots", 3, "--mode", "poll", "--poll-interval", "50ms")
    done = call("demo", *arguments)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every row is right") == 3
    assert "3 of 3 snapshots arrived" in done.stdout


def test_the_demo_fails_when_a_row_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(database: Path) -> dict[str, tuple[int, str | None]]:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("UPDATE nodes SET multibyte_sup = 7 WHERE rowid = 1")
            connection.commit()
        return original(database)

    original = demo._rows
    monkeypatch.setattr(demo, "_rows", rows)

    assert demo.main(nodes=50, snapshots=1, mode="poll", poll_interval="50ms") is False
    assert "wrong" in capsys.readouterr().out


def test_version() -> None:
    assert call("--version").stdout.strip() == f"mbcap-watch {__version__}"


# ------------------------------------------------------------------------------ rough handling


def test_signals_at_any_moment_and_again_end_it_cleanly(database: Path) -> None:
    for delay in (0.0, 0.001, 0.01, 0.05):
        with daemon(database) as process:
            for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                process.popen.send_signal(signum)
                time.sleep(delay)
            assert process.end() == 0
        assert "Traceback" not in process.said


def shell(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(script, shell=True, text=True, timeout=DEADLINE, check=False, **options)


RUN = f"{sys.executable} -m mbcap_watch"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["apply --json", "status", "check"])
def test_a_full_disk_behind_standard_output(database: Path, command: str) -> None:
    with open("/dev/full", "w") as full:
        done = shell(f"{RUN} {command} --database {database}", stdout=full)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "standard output" in done.stderr


def test_no_standard_input_to_publish_from(database: Path) -> None:
    done = shell(f"{RUN} publish - --database {database} <&-")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "standard input" in done.stderr


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    """Every message and every JSON can be printed, whatever bytes a path has."""
    base = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(base)
    database = os.fsdecode(base + b"/m.db")
    assert call("publish", "-", "--json", "--database", database, stdin=b"[]").returncode == 0
    done = call("apply", "--json", "--database", database)
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (4, "database_missing")
    assert "\\udcff" in json.loads(done.stdout)["error"]
    done = call("apply", "--log-format", "json", "--database", database)
    assert "\\udcff" in json.loads(done.stderr)["message"]


def test_two_slashes_in_front(database: Path) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    assert apply_json(f"/{database}")[1]["outcome"] == "applied"  # type: ignore[arg-type]


def test_a_dry_run_waits_for_a_lock_as_the_real_one_does(tmp_path: Path) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)], journal_mode="delete")
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with connect(database) as other:
        other.execute("BEGIN EXCLUSIVE")
        done = call("apply", "--dry-run", "--database", database, "--busy-deadline", "200ms")
    assert done.returncode == 5
    assert "would change" not in done.stdout


def test_config_shows_where_each_value_came_from(database: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("resync = '1m'\nmode = 'poll'\n")
    arguments = ("--config", config, "--database", database, "--mode", "inotify")
    done = call("config", "--json", *arguments, env={"MBCAP_WATCH_DEBOUNCE": "20ms"})
    shown = json.loads(done.stdout)

    assert set(shown) == {*Settings.__dataclass_fields__, *CLI_ONLY}
    assert shown["resync"] == {"value": 60.0, "origin": f"{config}: resync"}
    assert shown["mode"] == {"value": "inotify", "origin": "--mode"}
    assert shown["debounce"] == {"value": 0.02, "origin": "MBCAP_WATCH_DEBOUNCE"}
    assert shown["batch_rows"] == {"value": 500, "origin": "default"}
    table = call("config", *arguments, env=PLAIN).stdout
    assert "--mode" in table
    assert str(database) in table


def test_the_publisher_is_answered_on_request(database: Path) -> None:
    answer = snapshot_path(database).with_name("result.json")
    put(document(("aa11", "confirmed"), written_at="2026-01-02T03:04:05Z"), snapshot_path(database))
    with daemon(database, "--ack") as process:
        wait_until(answer.exists)
        assert process.end(signal.SIGTERM) == 0
    told = json.loads(answer.read_text())
    assert (told["writtenAt"], told["persisted"]) == ("2026-01-02T03:04:05Z", True)
    assert "rename" not in [result["reason"] for result in process.results]


def test_nobody_is_answered_unasked(database: Path) -> None:
    with daemon(database) as process:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: "applied" in process.said)
        process.end(signal.SIGTERM)
    assert [p.name for p in snapshot_path(database).parent.iterdir()] == ["snapshot.json"]


def test_the_help_tells_the_defaults_as_they_are(database: Path) -> None:
    """Each `Default:` of `run --help`, given as an option, changes nothing."""
    options = " ".join(call("run", "--help", env=PLAIN).stdout.split())
    told = re.findall(r"--([a-z-]+) [A-Za-z|.:-]+(?:(?! --).)*? Default: ([0-9a-zA-Z]+)\.", options)
    given = [part for name, default in told for part in (f"--{name}", default)]
    assert len(told) >= 13
    rows = [call("config", "--json", "--database", database, *more).stdout for more in ([], given)]
    default, as_told = ({k: v["value"] for k, v in json.loads(row).items()} for row in rows)
    assert as_told == default
