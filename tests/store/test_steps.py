"""The steps of reconciling, played by hand: no database, no loop."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import Settings, persist_once
from mbcap_watch.settings import MAX_BATCH_ROWS
from mbcap_watch.snapshot.files import snapshot_path
from mbcap_watch.store import reconcile as algorithm
from mbcap_watch.store.plan import Change, Page
from mbcap_watch.store.reconcile import Tally, reconcile
from mbcap_watch.store.steps import (
    PROBE,
    Query,
    Table,
    Write,
    Written,
    preview_steps,
    read_page,
)
from support import TIMES, blocks_kept, connect, document, put

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.store.plan import Value
    from mbcap_watch.store.steps import Steps

DATABASE = Path("meshcore.db")
COLUMNS = [
    (table, "table", 0, "public_key,multibyte_sup,multibyte_evidence", None)
    for table in ("nodes", "inactive_nodes")
]
NODES, INACTIVE = Table("nodes", "rowid"), Table("inactive_nodes", "rowid")
WANTED: dict[str, Value] = {"a": (2, "x"), "b": (1, "y"), "c": (2, "z"), "gone": (2, "")}
ROWS: dict[str, list[Any]] = {
    "nodes": [(1, "a", 0, None), (2, "b", 1, "y"), (3, "c", 0, ""), (4, "other", 2, "q")],
    "inactive_nodes": [(7, "a", 1, "x")],
}


def start(tally: Tally, **options: Any) -> tuple[Steps, Query | Write]:
    options = {"batch_rows": 500, "downgrade": "allow", **options}
    steps = reconcile(DATABASE, WANTED, tally, **options)
    probe = next(steps)
    assert probe == Query(PROBE)
    return steps, steps.send(COLUMNS)


def answer(step: Query) -> list[Any] | Page:
    if "max(" in step.sql:
        return [(4, 7)]
    return Page(
        *zip(*ROWS["inactive_nodes" if "inactive_nodes" in step.sql else "nodes"], strict=True)
    )


def played(steps: Steps, step: Query | Write, written: dict[str, int] | None = None) -> list[Write]:
    """Answer every step; return the writes. `written` says how many rows a write changes."""
    writes = []
    try:
        while True:
            if isinstance(step, Query):
                step = steps.send(answer(step))
            else:
                writes.append(step)
                rows = (written or {}).get(step.table.name, len(step.changes))
                step = steps.send(Written(rows))
    except StopIteration:
        return writes


def keys(writes: list[Write]) -> list[tuple[str, list[str]]]:
    return [(write.table.name, [change.public_key for change in write.changes]) for write in writes]


@pytest.mark.parametrize(
    "before, written, revalued",
    [
        ([(0, None), (0, "")], 2, 0),
        ([(1, "x"), (0, None)], 2, 1),
        ([(0, "x"), (3, None)], 2, 2),
        ([("0", None), (2, "")], 2, 2),
        ([(1, "x"), (1, "y")], 0, 0),
        ([(1, "x"), (1, "y")], 1, 1),
        ([(1, "x"), (0, None)], 1, 0),  # which of the two was written is not known
    ],
)
def test_rows_that_had_another_value_are_counted_when_they_are_written(
    before: list[tuple[Any, Any]], written: int, revalued: int
) -> None:
    tally = Tally()
    steps, step = start(tally)
    rows = [(n, key, *value) for n, (key, value) in enumerate(zip("ab", before, strict=True))]
    pages, answers = iter([Page(*zip(*rows, strict=True)), Page()]), iter([written])
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(step, Write):
                step = steps.send(Written(next(answers, 0)))
            elif step.is_page:
                step = steps.send(next(pages, Page()))
            else:
                step = steps.send(answer(step))
    assert (tally.changed.total(), tally.revalued) == (written, revalued)


def test_the_delta_is_looked_up_and_written_before_anything_else_is_read() -> None:
    steps, step = start(Tally(), delta={"c": (2, "z")})
    assert isinstance(step, Query)
    assert (step.parameters, "IN (?)" in step.sql, step.is_page) == (("c",), True, True)
    step = steps.send(Page((3,), ("c",), (0,), ("",)))
    assert "inactive_nodes" in step.sql  # type: ignore[union-attr]
    step = steps.send(Page())
    assert step == Write(NODES, [Change(3, "c", (0, ""), (2, "z"))], "allow")
    step = steps.send(Written(1))
    assert "max(" in step.sql  # type: ignore[union-attr]


def test_a_row_that_changed_in_between_is_compared_again_but_not_for_ever() -> None:
    tally = Tally()
    writes = played(*start(tally), written={"nodes": 1})
    assert len(writes) == 2 * algorithm.MAX_PASSES
    assert tally.failed == {
        ("nodes", "a"): "an UPDATE leaves it as it is",
        ("nodes", "c"): "an UPDATE leaves it as it is",
        ("inactive_nodes", "a"): "an UPDATE leaves it as it is",
    }


def test_columns_that_are_dropped_between_reading_and_writing_are_no_refusal() -> None:
    gone = sqlite3.OperationalError("no such column: multibyte_sup")
    steps, step = start(Tally())
    while isinstance(step, Query):
        step = steps.send(answer(step))
    assert steps.send(Written(0, gone)) == Query(PROBE)
    with pytest.raises(sqlite3.OperationalError, match="no such column"):
        steps.send(COLUMNS[1:])


@pytest.mark.parametrize("rows", [1, 2, 3, 500, 4096, 4097, MAX_BATCH_ROWS])
@pytest.mark.parametrize("downgrade", ["allow", "never"])
def test_a_batch_is_one_statement_of_any_size(database: Path, rows: int, downgrade: Any) -> None:
    changes = [Change(number, f"k{number}", (0, None), (2, "e")) for number in range(rows)]
    sql, parameters = Write(NODES, changes, downgrade).statement()
    with connect(database) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO nodes (rowid, public_key) VALUES (?, ?)",
            [(100 + number, f"k{number}") for number in range(rows)],
        )
        connection.execute("COMMIT")
        connection.execute("UPDATE nodes SET rowid = rowid - 100 WHERE public_key = 'k0'")
        connection.execute(sql, parameters)
        assert connection.execute("SELECT changes()").fetchone() == (1,), "the keys are guarded"
        assert not connection.in_transaction


@pytest.mark.anyio
@pytest.mark.parametrize("looks_like", ["[]", "{}", "true"])
async def test_a_blob_that_sqlite_takes_for_json_is_read_as_it_is(looks_like: str) -> None:
    """From 3.45 on, SQLite does so with one that looks like its binary JSON, as x'0b' does."""
    as_text = ("[1,2]", f'["aa11",{looks_like}]', "[0,0]", "[null,null]")
    rest = (0, None, None, None)
    as_bytes = [(1, None, b"aa11", "UTF-8", *rest), (2, None, b"\x0b", None, *rest)]
    answers: Iterator[list[Any]] = iter([[as_text], as_bytes])

    async def fetch(*_: object) -> list[Any]:
        return next(answers)

    page = await read_page(fetch, Query("SELECT", is_page=True))

    assert page == Page((1, 2), ("aa11", b"\x0b"), (0, 0), (None, None))


def test_a_page_leaves_no_memory_behind() -> None:
    async def fetch(*_: object) -> list[Any]:
        return [("[1]", '["aa11"]', "[0]", "[null]")]

    def read() -> None:
        with contextlib.suppress(StopIteration):
            read_page(fetch, Query("SELECT", is_page=True)).send(None)

    assert blocks_kept(read) < TIMES / 10

    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (id, key, sup, evidence)")
        connection.execute("INSERT INTO t VALUES (1, 'aa11', 0, NULL)")

        def preview() -> None:
            steps = iter([Query("SELECT * FROM t", is_page=True)])
            assert preview_steps((step for step in steps), connection) == []

        assert blocks_kept(preview) < TIMES / 2  # the connection keeps some, too


@pytest.mark.anyio
async def test_sqlite_that_is_too_old_is_named(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 32, 3))
    put(document(("aa11", "confirmed")), snapshot_path(database))
    result = await persist_once(Settings(database))
    assert (result.outcome, "needs SQLite 3.33 or newer" in str(result.error)) == ("failed", True)
