"""The catalogue of findings: what the code reports is in it, and the documentation is made from it.

`python tests/doctor/test_catalogue.py` writes docs/troubleshooting.md.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import mbcap_watch
from mbcap_watch.doctor.findings import CATALOGUE, Installation, Severity, catalogue, quote
from mbcap_watch.doctor.health import explain
from mbcap_watch.errors import (
    Cause,
    DatabaseError,
    DatabaseMissing,
    ForeignWal,
    SchemaMissing,
    SnapshotMalformed,
)
from mbcap_watch.results import Outcome, PersistResult

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
DOCTOR = Path(mbcap_watch.__file__).parent / "doctor"

# What every finding knows, and what its remedy knows besides.
PATHS = {"database", "directory", "snapshot_dir", "snapshot_parent", "config"}
COMMANDS = {"check", "status"}

INTRODUCTION = """\
# Troubleshooting

`mbcap-watch check` examines an installation, `mbcap-watch status` a running daemon: each says what
is wrong and what to do. `mbcap-watch apply --dry-run` shows what a sync would do now. They need the
same settings as `run`: `--config`, or the same environment. `mbcap-watch config` shows all of them,
and where each came from.

Below is everything that they can report, by the code that `--json` and `/healthz` give it. A
**problem** keeps the database from being as the snapshot says, or will; a warning is worth knowing.
Nearly all is waited for, and heals without a restart of mbcap-watch. The exceptions: where nothing
runs, and where `run` ends with exit code 2 and one line that names the option, the variable or the
key that is wrong.
"""


def page() -> str:
    """Return the troubleshooting page."""
    lines = [INTRODUCTION]
    for title, kinds in tomllib.loads(CATALOGUE.read_text(encoding="utf-8")).items():
        lines += [f"## {title}", "", "| code | | what is wrong | what to do |", "|---|---|---|---|"]
        for code in kinds:
            kind = catalogue()[code]
            severity = f"**{kind.severity}**" if kind.severity == "problem" else kind.severity
            cells = (f"`{code}`", severity, shown(kind.sentence), shown(kind.remedy))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def shown(text: str) -> str:
    """Return a text with names for the paths, and … for other details."""

    def replace(match: re.Match[str]) -> str:
        if match[1] in COMMANDS:
            return f"mbcap-watch {match[1]}"
        return match[1].upper() if match[1] in PATHS else "…"

    return re.sub(r"{(\w+)}", replace, text).replace("|", r"\|")


def braces(text: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", text))


class Report:
    """A call of `Installation.finding` in the code."""

    def __init__(self, call: ast.Call, where: str) -> None:
        code = call.args[0] if call.args else None
        self.where = f"{where}:{call.lineno}"
        self.code = code.value if isinstance(code, ast.Constant) else None
        keywords = {keyword.arg for keyword in call.keywords}
        self.details = {name for name in keywords if name is not None}
        self.more = None in keywords  # with **, only a run tells
        self.has_text = len(call.args) > 1


def reports() -> list[Report]:
    return [
        Report(node, path.name)
        for path in DOCTOR.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "finding"
    ]


def test_the_code_knows_every_detail_of_what_it_reports() -> None:
    assert len(reports()) > 50
    for report in reports():
        if report.code is None:
            assert report.has_text or report.details, report.where
            continue
        kind = catalogue()[str(report.code)]
        sentence = set() if report.has_text else braces(kind.sentence)
        remedy = set() if "remedy" in report.details else braces(kind.remedy)
        missing = (sentence | remedy) - PATHS - COMMANDS - report.details
        assert not missing or report.more, (report.where, missing)


def test_nothing_in_the_catalogue_is_never_reported() -> None:
    source = "".join(path.read_text() for path in DOCTOR.glob("*.py"))
    named = set(re.findall(r'"(\w+)"', source))
    assert catalogue().keys() - named - {*get_args(Cause), *get_args(Outcome)} == set()


@pytest.mark.parametrize("code", [*get_args(Cause), *get_args(Outcome)])
def test_whatever_an_error_is_about_has_a_remedy(code: str) -> None:
    if code in ("applied", "unchanged"):
        return
    found = Installation("/d/m.db", "/d/mbcap-snapshot").finding(code, "the cause")
    assert found.severity in ("problem", "warning")
    assert found.remedy


@pytest.mark.parametrize("code", catalogue())
def test_each_kind_is_whole(code: str) -> None:
    kind = catalogue()[code]
    assert kind.severity in get_args(Severity)
    assert kind.severity != "ok"
    assert all(text and text == text.strip() for text in kind)
    assert not kind.sentence.endswith(".")


@pytest.mark.parametrize(
    "outcome, error, phrase",
    [
        ("malformed", SnapshotMalformed("s", "torn"), "database stays as it is"),
        ("database_missing", DatabaseMissing("d", "does not exist"), "never create"),
        ("schema_missing", SchemaMissing("d", "no table nodes"), "never"),
        ("foreign_wal", ForeignWal("d", "-wal", "wal_replaced"), "belong to the old file"),
        ("foreign_wal", ForeignWal("d", "-wal", "wal_left_behind"), "belong to the old file"),
    ],
)
def test_an_error_and_its_remedy_say_a_thing_once(
    outcome: Outcome, error: DatabaseError | SnapshotMalformed, phrase: str
) -> None:
    result = PersistResult(outcome=outcome, reason="once", error=str(error), cause=error.cause)
    found = explain(result, Installation("/d", "/s"))
    assert found is not None
    assert f"{found.text}; {found.remedy}".count(phrase) <= 1


def test_commands_name_the_settings_that_were_given() -> None:
    here = Installation("/my data/{x}.db", "/it's/mbcap-snapshot", "/etc/m.toml")
    remedy = here.finding("busy").remedy
    assert (
        "`mbcap-watch check --database '/my data/{x}.db' --snapshot-dir"
        " '/it'\"'\"'s/mbcap-snapshot' --config /etc/m.toml`" in remedy
    )
    assert "--config" not in here._replace(config="").finding("busy").remedy


@pytest.mark.parametrize(
    "path, quoted", [("/a/b", "/a/b"), ("/a b", "'/a b'"), ("/$it's", "'/$it'\"'\"'s'")]
)
def test_paths_are_quoted_only_where_they_must_be(path: str, quoted: str) -> None:
    assert quote(path) == quoted


def test_the_troubleshooting_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/doctor/test_catalogue.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
