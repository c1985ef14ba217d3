"""`downgrade = "hold"`: a lowering waits until every snapshot has asked for it for long enough."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbcap_watch.store.plan import Holds, Page, Value, compare
from mbcap_watch.store.reconcile import Tally, reconcile
from mbcap_watch.store.steps import CHANGES, Query, Written, preview_steps
from support import connect, make_database, read_rows

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection
    from pathlib import Path

HOLD = 10
KEYS = ("a", "b", "c")
Table = dict[str, Value]
ONE: Table = {"a": (1, "path")}
HIGH: Table = {"a": (2, "advert")}


def page_of(table: Table) -> Page:
    rows = [(number, key, *value) for number, (key, value) in enumerate(table.items())]
    return Page(*zip(*rows, strict=True))


def may_lower(
    holds: Holds, values: Table, stored: Table, now: float, refused: Collection[str] = ()
) -> set[str]:
    """Read a snapshot and compare everything; return the keys that would be written."""
    holds.read(values, now)
    holds.begin()
    changes = compare(values, page_of(stored), "hold", holds).changes
    holds.end(refused)
    return {change.public_key for change in changes}


# ------------------------------------------------------------------------------ one by one


def test_a_lowering_is_due_when_every_snapshot_has_asked_for_it_for_long_enough() -> None:
    holds, stored = Holds(HOLD), HIGH
    assert may_lower(holds, ONE, stored, 100) == set()
    assert holds.waiting == [110]
    assert may_lower(holds, {"a": (1, "other")}, stored, 109.5) == set()  # evidence may differ
    assert may_lower(holds, ONE, stored, 110) == {"a"}
    assert holds.waiting == []
    assert may_lower(holds, ONE, stored, 111) == set()  # written, and raised again by others


def test_a_lowering_that_is_refused_stays_due() -> None:
    holds = Holds(HOLD)
    may_lower(holds, ONE, HIGH, 100)
    for now in (110, 111):
        assert may_lower(holds, ONE, HIGH, now, refused={"a"}) == {"a"}


@pytest.mark.parametrize(
    "between, stored",
    [
        ({"a": (2, "advert")}, {"a": (2, "advert")}),
        ({"b": (2, "")}, {"a": (2, "advert")}),  # dropped, or unknown
        ({}, {"a": (2, "advert")}),
        (ONE, {"a": (1, "path")}),  # somebody else has lowered the row
        (ONE, {}),  # or removed it
    ],
)
def test_what_takes_it_back_starts_the_wait_anew(between: Table, stored: Table) -> None:
    holds = Holds(HOLD)
    assert may_lower(holds, ONE, HIGH, 100) == set()
    may_lower(holds, between, stored, 105)
    assert may_lower(holds, ONE, HIGH, 112) == set()
    assert may_lower(holds, ONE, HIGH, 121.9) == set()
    assert may_lower(holds, ONE, HIGH, 122) == {"a"}


def test_a_snapshot_that_was_read_counts_although_the_database_was_busy() -> None:
    holds = Holds(HOLD)
    may_lower(holds, ONE, HIGH, 100)
    holds.read({"a": (2, "advert")}, 105)
    assert may_lower(holds, ONE, HIGH, 112) == set()


def test_what_never_lowers_is_not_held() -> None:
    holds = Holds(HOLD)
    stored: Table = {"a": (0, None), "b": (1, "path"), "c": (2, "x")}
    values: Table = {"a": (1, "p"), "b": (2, "q"), "c": (2, "r")}
    assert may_lower(holds, values, stored, 0) == {"a", "b", "c"}
    assert holds.waiting == []


def test_without_a_memory_nothing_is_lowered() -> None:
    assert compare(ONE, page_of({"a": (2, "")}), "hold").changes == []
    holds = Holds()
    assert may_lower(holds, ONE, {"a": (2, "")}, 1e12) == set()
    assert len(holds.waiting) == 1


# ------------------------------------------------------------------------------ a model


class Sync(NamedTuple):
    """What happens at one sync: others write, a snapshot is read, and is compared, or in part."""

    gap: int
    outside: tuple[Table, Table]
    values: Table
    extent: str


class Past(NamedTuple):
    at: int
    values: Table
    lowered: set[str]
    complete: bool


sups = st.integers(0, 3)
rows = st.dictionaries(st.sampled_from(KEYS), st.tuples(sups, st.sampled_from([None, "x", "y"])))
wishes = st.dictionaries(
    st.sampled_from(KEYS), st.tuples(st.sampled_from([1, 1, 2]), st.sampled_from(["x", "y"]))
)
extents = st.sampled_from(["all", "all", "all", "delta first", "half", "none"])
syncs = st.builds(Sync, st.integers(1, 6), st.tuples(rows, rows), wishes, extents)
steady = st.builds(Sync, st.integers(1, 6), st.just(({}, {})), wishes, extents)


def expected(history: list[Past], key: str) -> bool:
    """Whether a lowering may be written now, by all that was ever read and found."""
    now, since = history[-1].at, history[-1].at
    for past in reversed(history):
        if past.values.get(key, (0,))[0] != history[-1].values[key][0]:
            break
        if key in past.lowered:
            since = past.at
        elif past.complete:
            break
    return now - since >= HOLD


def as_history_says(history: list[Past], table: Table) -> Table:
    values = history[-1].values
    return {
        key: values[key]
        if key in values and (values[key][0] >= stored[0] or expected(history, key))
        else stored
        for key, stored in table.items()
    }


def compare_and_write(holds: Holds, sync: Sync, compared: list[Table]) -> None:
    """Do as `reconcile` does with one table after the other."""
    some = dict(itertools.islice(sync.values.items(), sync.extent == "delta first"))
    for values in (some, sync.values):
        if values is sync.values and compared:
            holds.begin()
        for table in compared:
            for change in compare(values, page_of(table), "hold", holds).changes:
                table[change.public_key] = change.after
    if len(compared) == 2:
        holds.end()


@given(rows, rows, st.lists(syncs | steady, max_size=12))
def test_it_does_what_the_history_of_all_snapshots_says(
    nodes: Table, inactive: Table, future: list[Sync]
) -> None:
    holds, history, now = Holds(HOLD), list[Past](), 0
    tables = [dict(nodes), dict(inactive)]
    for sync in future:
        now, values = now + sync.gap, sync.values
        for table, changes in zip(tables, sync.outside, strict=True):
            table.update(changes)
        compared = tables[: {"half": 1, "none": 0}.get(sync.extent, 2)]
        found = {
            key
            for table in compared
            for key, (sup, _) in table.items()
            if key in values and values[key][0] < sup
        }
        history.append(Past(now, values, found, len(compared) == 2))
        wanted = [as_history_says(history, table) for table in compared]
        if len(compared) == 2:
            found.difference_update([key for key in found if expected(history, key)])  # written
        holds.read(values, now)
        compare_and_write(holds, sync, compared)
        assert compared == wanted


# ------------------------------------------------------------------------------ in SQL


def run_through(
    connection: sqlite3.Connection, holds: Holds, values: Table, meanwhile: str = ""
) -> Tally:
    """Reconcile; `meanwhile` is what somebody else does between reading and writing."""
    tally = Tally()
    steps = reconcile(
        database=None,  # type: ignore[arg-type]
        values=values,
        tally=tally,
        batch_rows=500,
        downgrade="hold",
        holds=holds,
    )
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return tally
        if isinstance(step, Query):
            answer = connection.execute(step.sql, step.parameters).fetchall()
            answer = Page(*zip(*answer, strict=True)) if step.is_page else answer
        else:
            connection.executescript(meanwhile)
            meanwhile = ""
            connection.execute(*step.statement())
            answer = Written(*connection.execute(CHANGES).fetchone())


def test_a_row_that_is_raised_before_it_is_written_is_not_lowered(tmp_path: Path) -> None:
    """The batch also holds a lowering that is due; that guard must not open the other row."""
    database = make_database(
        tmp_path / "m.db",
        [("nodes", "low", 0, None), ("nodes", "due", 2, "x"), ("inactive_nodes", "due", 2, "x")],
    )
    values: Table = {"low": (1, "path"), "due": (1, "path")}
    holds = Holds(HOLD)
    with connect(database) as connection:
        holds.read({"due": (1, "path")}, 0)
        assert run_through(connection, holds, {"due": (1, "path")}).held == 1
        holds.read(values, HOLD)
        raised = "UPDATE nodes SET multibyte_sup = 2 WHERE public_key = 'low'"
        tally = run_through(connection, holds, values, raised)
    assert (tally.changed.total(), tally.held, tally.failed) == (2, 1, {})
    assert read_rows(database) == {
        ("nodes", "low", 2, None),
        ("nodes", "due", 1, "path"),
        ("inactive_nodes", "due", 1, "path"),
    }


def test_a_dry_run_shows_no_downgrade_that_waits(tmp_path: Path) -> None:
    database = make_database(
        tmp_path / "m.db", [("nodes", "a", 2, "x"), ("inactive_nodes", "a", 0, None)]
    )
    tally = Tally()
    steps = reconcile(database, ONE, tally, batch_rows=500, downgrade="hold")
    with connect(database) as connection:
        changes = preview_steps(steps, connection)
    assert [(table, change.after) for table, change in changes] == [("inactive_nodes", ONE["a"])]
    assert tally.held == 1


def test_there_are_never_more_than_keys_in_a_snapshot() -> None:
    holds = Holds(HOLD)
    for now, first in enumerate(range(0, 5_000, 100)):
        values: Table = {f"k{n}": (1, "") for n in range(first, first + 100)}
        may_lower(holds, values, dict.fromkeys(values, (2, "")), now)
        assert len(list(itertools.chain(holds._since, holds._found))) <= 200
