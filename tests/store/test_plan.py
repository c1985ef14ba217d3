"""What a snapshot wants written, and which rows differ from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbcap_watch.snapshot.codec import Entry
from mbcap_watch.store.plan import (
    Change,
    Comparison,
    Page,
    Value,
    compare,
    delta,
    desired_state,
    lowers,
)

if TYPE_CHECKING:
    from mbcap_watch.settings import Downgrade

# ------------------------------------------------------------------------------ desired state


@pytest.mark.parametrize(
    "entry, values, unknown, unrecognized",
    [
        (Entry("k", "confirmed", "advert"), {"k": (2, "advert")}, 0, 0),
        (Entry("k", "suspected", "path"), {"k": (1, "path")}, 0, 0),
        (Entry("k", "confirmed", None), {"k": (2, "")}, 0, 0),
        (Entry("k", "confirmed", ""), {"k": (2, "")}, 0, 0),
        (Entry("", "confirmed", "x"), {"": (2, "x")}, 0, 0),  # a key like any other
        (Entry("k", "unknown", "x"), {}, 1, 0),
        (Entry(None, "unknown"), {}, 1, 0),
        (Entry("k", "Confirmed"), {}, 0, 1),
        (Entry("k", "UNKNOWN"), {}, 0, 1),
        (Entry("k", " confirmed"), {}, 0, 1),
        (Entry("k", "suspected "), {}, 0, 1),
        (Entry("k", ""), {}, 0, 1),
        (Entry("k", None), {}, 0, 1),
        (Entry("k", "2"), {}, 0, 1),
        (Entry(None, "confirmed"), {}, 0, 1),
        (Entry("k" * 1024, "confirmed", "x" * 4096), {"k" * 1024: (2, "x" * 4096)}, 0, 0),
        (Entry("é" * 1024, "suspected", "😀" * 4096), {"é" * 1024: (1, "😀" * 4096)}, 0, 0),
        (Entry("k" * 1025, "confirmed"), {}, 0, 1),
        (Entry("k", "confirmed", "x" * 4097), {}, 0, 1),
        (Entry("k" * 1025, "unknown"), {}, 0, 1),
        (Entry(None, "unknown", "x" * 4097), {}, 0, 1),
        (Entry(), {}, 0, 1),
    ],
)
def test_what_an_entry_means(
    entry: Entry, values: dict[str, Value], unknown: int, unrecognized: int
) -> None:
    assert desired_state([entry]) == (values, 1, unknown, unrecognized)


@pytest.mark.parametrize(
    "statuses, value",
    [
        (["confirmed", "suspected"], (1, "1")),
        (["suspected", "confirmed"], (2, "1")),
        (["confirmed", "unknown"], (2, "0")),
        (["confirmed", "suspected", "unknown", "CONFIRMED", None], (1, "1")),
        (["confirmed", "confirmed"], (2, "1")),
    ],
)
def test_of_several_entries_of_a_key_the_last_written_one_wins(
    statuses: list[str | None], value: Value
) -> None:
    entries = [Entry("k", status, str(number)) for number, status in enumerate(statuses)]
    assert desired_state(entries).values == {"k": value}


def test_no_entries() -> None:
    assert desired_state([]) == ({}, 0, 0, 0)


# ------------------------------------------------------------------------------ compare


def page_of(rows: list[tuple[Any, ...]]) -> Page:
    return Page(*zip(*rows, strict=True))


@pytest.mark.parametrize(
    "before, after, written",
    [
        ((0, None), (2, "advert"), True),
        ((0, ""), (1, "path"), True),
        ((1, "path"), (2, "advert"), True),
        ((2, "advert"), (1, "path"), True),  # a real downgrade
        ((2, "advert"), (2, "path"), True),
        ((2, None), (2, ""), True),
        ((2, ""), (2, ""), False),
        ((2, "advert"), (2, "advert"), False),
        ((1, "path"), (1, "path"), False),
    ],
)
def test_a_row_is_written_where_it_differs(before: Value, after: Value, written: bool) -> None:
    changes = [Change(1, "k", before, after)] if written else []
    assert compare({"k": after}, page_of([(1, "k", *before)]), "allow") == Comparison(
        ["k"], changes
    )


@pytest.mark.parametrize(
    "before, after, written",
    [
        ((2, "advert"), (1, "path"), False),
        ((3, "later"), (2, "advert"), False),
        ((2, "advert"), (2, "path"), True),
        ((1, "path"), (1, "other"), True),
        ((1, "path"), (2, "advert"), True),
        ((0, None), (1, "path"), True),
    ],
)
def test_downgrade_never_writes_only_what_does_not_lower(
    before: Value, after: Value, written: bool
) -> None:
    comparison = compare({"k": after}, page_of([(7, "k", *before)]), "never")
    assert comparison.matched == ["k"]  # the snapshot knows the row, even if it may not lower it
    assert comparison.changes == ([Change(7, "k", before, after)] if written else [])


@pytest.mark.parametrize(
    "stored, word, written",
    [
        (5, "5", False),
        (5, "05", False),
        (5.0, "5", False),
        (1000, "1e3", False),
        (9007199254740993, "9007199254740993", False),
        ("05", "5", True),
        (5, "6", True),
        (5, "five", True),
        (float("inf"), "1e999", False),
        # Numbers to Python alone.
        (1000, "1_000", True),
        (5, "\u0665", True),
        (float("inf"), "infinity", True),
        (b"5", "5", True),
        # Of the letters of a number, and none.
        (5, "e5", True),
        (0, "", True),
        (float("inf"), "inf", True),
    ],
)
def test_a_column_of_numbers_holds_what_looks_like_one_as_one(
    stored: Any, word: str, written: bool
) -> None:
    changes = compare({"k": (2, word)}, page_of([(1, "k", 2, stored)]), "allow").changes
    assert bool(changes) is written


# ------------------------------------------------------------------------------ properties

keys = st.sampled_from(["a", "b", "c", "d", "A", ""])
evidences = st.sampled_from([None, "", "advert", "path"])
statuses = st.sampled_from(["confirmed", "suspected", "unknown", "Unknown", "", None])
entries = st.lists(st.builds(Entry, st.none() | keys, statuses, evidences), max_size=8)
tables = st.dictionaries(keys, st.tuples(st.integers(0, 3), evidences), max_size=6)
downgrades: st.SearchStrategy[Downgrade] = st.sampled_from(["allow", "never"])

Table = dict[str, Value]


def rows_of(table: Table) -> Page:
    """Return the rows as a database would, numbered."""
    return page_of([(number, key, *value) for number, (key, value) in enumerate(table.items())])


def changes_of(listed: list[Entry], table: Table, downgrade: Downgrade) -> list[Change]:
    """Plan."""
    return compare(desired_state(listed).values, rows_of(table), downgrade).changes


def applied(listed: list[Entry], table: Table, downgrade: Downgrade) -> Table:
    """Plan, and do it; every change has to fit the row that it names."""
    result = dict(table)
    for change in changes_of(listed, table, downgrade):
        assert rows_of(table).keys[int(change.row)] == change.public_key
        assert result[change.public_key] == change.before
        result[change.public_key] = change.after
    return result


@given(entries, tables)
def test_every_row_ends_as_the_last_entry_that_counts_says(
    listed: list[Entry], table: Table
) -> None:
    expected = dict(table)
    for entry in listed:  # one by one, as the contract puts it
        sup = {"confirmed": 2, "suspected": 1}.get(entry.status or "")
        if sup is not None and entry.public_key in expected:
            expected[entry.public_key] = (sup, entry.evidence or "")
    assert applied(listed, table, "allow") == expected


@given(entries, tables, downgrades)
def test_a_plan_that_was_applied_leaves_nothing_to_do(
    listed: list[Entry], table: Table, downgrade: Downgrade
) -> None:
    once = applied(listed, table, downgrade)
    assert changes_of(listed, once, downgrade) == []


@given(entries, tables)
def test_downgrade_never_never_lowers(listed: list[Entry], table: Table) -> None:
    after = applied(listed, table, "never")
    assert all(after[key][0] >= value[0] for key, value in table.items())
    # and otherwise does what `allow` does
    allowed = applied(listed, table, "allow")
    assert all(
        after[key] == (value if allowed[key][0] < value[0] else allowed[key])
        for key, value in table.items()
    )


@given(entries)
def test_every_entry_is_counted_once(listed: list[Entry]) -> None:
    wanted = desired_state(listed)
    countable = [
        entry
        for entry in listed
        if entry.status in ("confirmed", "suspected") and entry.public_key is not None
    ]
    assert wanted.entries == len(listed)
    assert wanted.skipped_unknown == sum(entry.status == "unknown" for entry in listed)
    skipped = wanted.skipped_unknown + wanted.skipped_unrecognized
    assert skipped + len(countable) == len(listed)
    assert set(wanted.values) == {entry.public_key for entry in countable}


@given(entries, tables, downgrades)
def test_matched_are_the_rows_that_the_snapshot_has_a_value_for(
    listed: list[Entry], table: Table, downgrade: Downgrade
) -> None:
    values = desired_state(listed).values
    matched = compare(values, rows_of(table), downgrade).matched
    assert matched == [key for key in table if key in values]


# ------------------------------------------------------------------------------ one by one


def test_every_entry_that_is_too_long_is_counted() -> None:
    assert desired_state([Entry("k" * 1025, "confirmed")] * 3) == ({}, 3, 0, 3)


def test_the_delta_is_what_is_new_or_differs() -> None:
    before: Table = {"same": (2, "x"), "gone": (2, "x"), "sup": (2, "x"), "evidence": (2, "x")}
    news: Table = {"sup": (1, "x"), "evidence": (2, "y"), "new": (1, "")}
    assert delta(before, {"same": (2, "x")} | news) == news


@pytest.mark.parametrize(
    "before, after, is_lower",
    [
        (2, 1, True),
        (1, 1, False),
        (1.5, 1, True),
        ("2", 1, True),
        (b"2", 1, True),
        ("10", 9, True),
        ("1", 1, False),
        ("1", 2, False),
        ("x", 1, False),
        ("", 1, False),
        ("\u00b2", 1, False),  # a digit, and no number
        (b"\xff", 1, False),
        (None, 1, False),
    ],
)
def test_what_is_lowered(before: Any, after: int, is_lower: bool) -> None:
    assert lowers(before, after) is is_lower
