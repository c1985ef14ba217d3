"""`status` of a real daemon, and `check`, about one installation: they agree, and are right."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import snapshot_path
from mbcap_watch.snapshot import timestamp
from processes import call_json, daemon
from support import document, put, run_sql, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def ask(database: Path, command: str) -> dict[str, Any]:
    answer: dict[str, Any]
    code, answer = call_json(command, "--database", database)
    assert code == (0 if answer.get("healthy", answer.get("ok")) else 1)
    return answer


def by_status(database: Path) -> tuple[set[str], set[str]]:
    """Return the codes of the problems and of the warnings of `status`, after the first sync."""
    told: dict[str, Any] = {}

    def has_synced() -> bool:
        told.update(ask(database, "status"))
        return told["ages"].get("last_sync") is not None

    wait_until(has_synced, "the first sync")
    return {each["code"] for each in told["problems"]}, {each["code"] for each in told["warnings"]}


def by_check(database: Path) -> tuple[set[str], set[str]]:
    found = ask(database, "check")["findings"]
    problems, warnings = (
        {each["code"] for each in found if each["severity"] == severity}
        for severity in ("problem", "warning")
    )
    return problems, warnings - {"wal_reset_bug"}  # that is about this machine


def sql(*statements: str) -> Callable[[Path], None]:
    return lambda database: run_sql(database, *statements)


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
    run_sql(database, "DELETE FROM inactive_nodes")
    published(("aa11", "confirmed"))(database)
    breaks(database)
    with daemon(database, "--sweep-interval=100ms"):
        status, check = by_status(database), by_check(database)
    if warnings == {"age"}:  # check knows when it was put in place, too
        assert (status[1], check[1]) == ({"old_snapshot"}, {"old_snapshot_again"})
    else:
        assert (status, check) == ((problems, warnings), (problems, warnings))


def test_a_snapshot_that_vanishes(database: Path) -> None:
    with daemon(database, "--sweep-interval=100ms"):
        assert by_status(database) == (set(), {"no_snapshot"})
        published(("aa11", "confirmed"))(database)
        wait_until(lambda: not by_status(database)[1])
        snapshot_path(database).unlink()
        wait_until(lambda: by_status(database)[0] == {"snapshot_vanished"})
        assert by_check(database) == ({"snapshot_vanished"}, set())  # and not `no_snapshot` again
