"""What files and databases say reaches people bounded and safe, whichever way it takes."""

from __future__ import annotations

import json
import signal
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbcap_watch import PersistResult, Settings, snapshot_path
from mbcap_watch.errors import QUOTED, printable, quoted
from mbcap_watch.watcher.supervisor import Watch
from processes import call, daemon
from support import connect, document, make_database, put, wait_until

if TYPE_CHECKING:
    from pathlib import Path

# ESC, newline, the one-character CSI, right-to-left override, zero width, BOM, line separator.
EVIL = (
    "\x1b[2J\n2026 INFO forged\r\x9b1m\u202egnp\u2066\u200b\u200f\u061c\ufeff\u2028\u2029\U000e0041"
)
LONG = "x" * 10_000


def is_safe(text: str) -> bool:
    return text.isprintable()


# ------------------------------------------------------------------------------ the function


def test_what_is_invisible_or_obeyed_is_escaped() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    unsafe = [char for char in every if unicodedata.category(char)[0] in "CZ" and char != " "]
    assert printable("".join(unsafe)) == "".join(ascii(char)[1:-1] for char in unsafe)
    shown = printable("".join(every))
    assert shown.isprintable()
    shown.encode()
    assert printable("\u3164\ufe0f\u034f") == r"\u3164\ufe0f\u034f"
    plain = r"Grüße, 東京, עברית, 🙂, C:\dir 'x' \"y\" e" + "\u0301"
    assert printable(plain) == plain
    assert printable("a\udcff\n") == r"a\udcff\n"


@given(st.text(st.characters(exclude_categories=())), st.none() | st.integers(1, 200))
def test_of_any_text(text: str, limit: int | None) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    assert printable(shown, limit) == shown
    assert limit is None or len(shown) <= limit
    if limit is not None and len(text) > limit:
        assert shown.endswith("…")


@pytest.mark.parametrize("value", [None, 1, 2.5, "a'b", "", b"\xff", float("inf")])
def test_quoting_writes_as_python_does(value: object) -> None:
    assert quoted(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [LONG, LONG.encode(), EVIL * 100, "\\" * 100, 10**200],
    ids=["text", "bytes", "evil", "backslashes", "number"],
)
def test_quoting_is_bounded(value: object) -> None:
    assert len(quoted(value)) == QUOTED
    assert quoted(value).endswith("…")
    assert is_safe(quoted(value))


# ------------------------------------------------------------------------------ the commands


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def require_safe(output: str) -> None:
    for line in output.split("\n"):
        assert is_safe(line), line


@pytest.fixture
def hostile(database: Path) -> Path:
    """A database whose rows and a snapshot whose entries say what a terminal obeys."""
    keys = [EVIL, LONG]
    with connect(database) as connection:
        for key in keys:
            connection.execute(
                "INSERT INTO nodes (public_key, multibyte_sup, multibyte_evidence)"
                " VALUES (?, ?, ?)",
                (key, EVIL + LONG, LONG.encode() if key == LONG else EVIL + LONG),
            )
    put(document(*((key[:1024], "confirmed", EVIL + "y" * 4000) for key in keys)),
        snapshot_path(database))  # fmt: skip
    with connect(database) as connection:
        connection.execute(
            "UPDATE nodes SET public_key = ? WHERE public_key = ?", (LONG[:1024], LONG)
        )
    return database


def test_a_dry_run_shows_keys_and_evidence_safely(hostile: Path) -> None:
    shown = call("apply", "--dry-run", "--database", hostile)
    assert shown.returncode == 0
    require_safe(shown.stdout)
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(r"nodes \x1b[2J\n2026 INFO forged\r")
    assert max(map(len, lines)) < 5 * QUOTED + 50


def test_a_dry_run_in_json_says_the_same(hostile: Path) -> None:
    shown = call("apply", "--dry-run", "--json", "--database", hostile)
    require_safe(shown.stdout)
    (line,) = shown.stdout.splitlines()
    changes = msgspec.json.decode(line)["changes"]
    assert len(changes) == 2
    for change in changes:
        for text in (change["public_key"], *change["from"], change["to"][1]):
            assert is_safe(text)
            assert len(text) <= QUOTED
    assert changes[0]["to"][0] == 2


def test_the_message_of_a_trigger_forges_nothing(database: Path) -> None:
    text = EVIL + LONG
    with connect(database) as connection:
        connection.execute(
            f"CREATE TRIGGER t BEFORE UPDATE ON nodes BEGIN SELECT RAISE(ABORT, '{text}'); END"
        )
    put(document(("aa11", "confirmed")), snapshot_path(database))
    done = call("apply", "--database", database, "--log-format", "text")
    require_safe(done.stderr)
    (line,) = done.stderr.splitlines()
    assert "nodes: the row 'aa11' could not be written: " in line
    assert len(line) < 400
    as_json = call("apply", "--json", "--database", database, "--log-format", "json")
    for output in (as_json.stdout, as_json.stderr):
        require_safe(output)
        (line,) = output.splitlines()
        assert len(msgspec.json.decode(line).get("error", "")) < 200


def test_an_error_of_sqlite_forges_nothing(database: Path) -> None:
    name = EVIL + LONG * 30
    with connect(database) as connection:
        # The trigger names a table that is not there, and SQLite says which.
        connection.execute(
            f'CREATE TRIGGER t BEFORE UPDATE ON nodes BEGIN DELETE FROM "{name}"; END'
        )
    put(document(("aa11", "confirmed")), snapshot_path(database))
    done = call("apply", "--database", database)
    require_safe(done.stderr)
    (line,) = done.stderr.splitlines()
    assert "no such table" in line
    assert len(line) < 500


def test_a_schema_that_is_damaged_is_quoted_in_part(database: Path) -> None:
    text = EVIL + LONG
    with connect(database) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'nodes'", (text,))
        connection.execute("UPDATE sqlite_master SET name = ?, tbl_name = 'x'", (text,))
    put(document(("aa11", "confirmed")), snapshot_path(database))
    done = call("apply", "--database", database)
    assert done.returncode == 1
    require_safe(done.stderr)
    (line,) = done.stderr.splitlines()
    assert "malformed database schema" in line
    assert len(line) < 1000


def test_a_written_at_that_is_none_is_quoted_in_part(database: Path) -> None:
    put(document(written_at=EVIL + LONG * 100), snapshot_path(database))
    done = call("apply", "--json", "--database", database)
    assert done.returncode == 3
    require_safe(done.stdout + done.stderr)
    assert len(done.stdout) < 1000
    assert len(done.stderr) < 1000


def test_check_shows_what_a_database_says_safely(database: Path) -> None:
    with connect(database) as connection:
        for number, text in enumerate((EVIL, LONG)):
            connection.execute(
                f'CREATE TRIGGER "{text}{number}" BEFORE UPDATE ON nodes BEGIN SELECT 1; END'
            )
    put(document(("aa11", "confirmed")), snapshot_path(database))
    for arguments in (("check",), ("check", "--json")):
        shown = call(*arguments, "--database", database)
        require_safe(shown.stdout)
        assert "the trigger \\" in shown.stdout
        assert LONG[:QUOTED] not in shown.stdout
    other = make_database(database.with_name("other.db"))
    with connect(other) as connection:
        connection.execute("DROP TABLE nodes")
        connection.execute("DROP TABLE inactive_nodes")
        for number, text in enumerate((EVIL, LONG)):
            connection.execute(f'CREATE TABLE "{text}{number}" (x)')
    shown = call("check", "--database", other)
    require_safe(shown.stdout)
    assert LONG[:QUOTED] not in shown.stdout


# ------------------------------------------------------------------------------ the daemon


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A database in a directory whose name is no text, and would end a line."""
    directory = tmp_path / "a\udcff\n\x1b[31m\u202eb"
    directory.mkdir()
    return make_database(directory / "meshcore.db", [("nodes", "aa11", 0, None)])


def run_until(database: Path, outcome: str, *arguments: str) -> tuple[str, str, dict[str, Any]]:
    """Run the daemon until it has answered; return its outputs, and the answer."""
    answer = snapshot_path(database).parent / "result.json"
    told: dict[str, Any] = {}

    def answered() -> bool:
        if answer.exists():
            told.update(json.loads(answer.read_bytes()))
        return told.get("outcome") == outcome

    with daemon(database, "--ack", *arguments) as process:
        wait_until(answered, f"the answer {outcome}")
        assert process.end(signal.SIGTERM) == 0
    return "".join(f"{line}\n" for line in process.lines), process.said, told


def test_a_path_that_is_no_text_loses_no_line(odd: Path) -> None:
    put(b"{", snapshot_path(odd))
    out, log, told = run_until(odd, "malformed", "--log-format", "json")
    require_safe(out + log)
    assert "Traceback" not in log
    for line in (out + log).splitlines():
        msgspec.json.decode(line)
    assert r"a\udcff\n\x1b[31m\u202eb" in told["error"]
    assert any("watching by" in json.loads(line)["message"] for line in log.splitlines())


def test_an_answer_and_a_log_are_short_whatever_the_file_says(database: Path) -> None:
    put(document(written_at=(EVIL + LONG) * 100), snapshot_path(database))
    out, log, told = run_until(database, "malformed")
    require_safe(out + log)
    assert len(told["error"]) < 500
    assert is_safe(told["error"])
    assert max(map(len, (out + log).splitlines())) < 1500


def test_a_state_can_be_written_as_json(odd: Path) -> None:
    watch = Watch(Settings(odd), lambda: None)
    watch.refresh()
    assert "does not exist" in watch.state.why
    msgspec.json.encode(watch.state)
    assert is_safe(watch.state.why)


def test_a_result_of_a_host_with_odd_text_can_be_written_as_json() -> None:
    text = PersistResult(outcome="failed", reason="once", error=printable("\udcff")).to_json()
    assert json.loads(text)["error"] == r"\udcff"


@pytest.mark.parametrize("arguments", [("config",), ("config", "--json"), ("status",)])
def test_settings_are_shown_safely(odd: Path, arguments: tuple[str, ...]) -> None:
    shown = call(*arguments, "--database", odd)
    require_safe(shown.stdout + shown.stderr)
    assert "Traceback" not in shown.stderr
    assert r"a\udcff\n\x1b[31m\u202eb" in shown.stdout.replace("\\\\", "\\")


def test_publishing_tells_the_path_safely(odd: Path) -> None:
    snapshot = odd.with_name("new.json")
    snapshot.write_bytes(document(("aa11", "confirmed")))
    require_safe(call("publish", snapshot, "--database", odd).stdout)
    shown = call("publish", snapshot, "--database", odd, "--json")
    require_safe(shown.stdout)
    assert msgspec.json.decode(shown.stdout)["entries"] == 1
