"""What to write: a pure function of the snapshot and the rows as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec

from mbcap_watch.wire import MAX_EVIDENCE, MAX_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.wire import Entry

# What a status means in `multibyte_sup`. A status that is not here is never written; "unknown" is
# known but would be a blank over a known value.
SUP: Final = {"confirmed": 2, "suspected": 1}
UNKNOWN: Final = "unknown"

Value: TypeAlias = tuple[int, str | None]
"""`(multibyte_sup, multibyte_evidence)`"""


class Row(NamedTuple):
    """A row of `nodes` or `inactive_nodes` as it is now; SQLite lets a column hold any type.

    Attributes:
        row: what tells it apart in its table: its rowid, or its key.
        public_key: as stored.
        sup: as stored.
        evidence: as stored.

    """

    row: int | str
    public_key: str
    sup: int
    evidence: str | None


class Change(msgspec.Struct, frozen=True, gc=False):
    """A row that differs from what the snapshot says."""

    row: int | str
    public_key: str
    before: Value
    after: Value


class Targets(NamedTuple):
    """What a snapshot wants the rows to be, wherever they are.

    Attributes:
        values: by public key; of several written entries with the same key the last one counts.
        entries: entries in the snapshot.
        skipped_unknown: entries with the status `unknown`.
        skipped_unrecognized: entries that are not written for any other reason: no known status,
            no key, a key or an evidence that is too long.

    """

    values: dict[str, Value]
    entries: int
    skipped_unknown: int
    skipped_unrecognized: int


def targets(entries: Iterable[Entry]) -> Targets:
    """Return what `entries` want written."""
    values: dict[str, Value] = {}
    shared: dict[Value, Value] = {}  # one tuple per distinct value, not one per node
    count = unknown = unrecognized = 0
    for entry in entries:
        count += 1
        key, evidence = entry.public_key, entry.evidence or ""
        sup = SUP.get(entry.status or "")
        if len(key or "") > MAX_KEY or len(evidence) > MAX_EVIDENCE:
            unrecognized += 1
        elif sup is not None and key is not None:
            value = (sup, evidence)
            values[key] = shared.setdefault(value, value)
        elif entry.status == UNKNOWN:
            unknown += 1
        else:
            unrecognized += 1
    return Targets(values, count, unknown, unrecognized)


def news(before: Mapping[str, Value], after: Mapping[str, Value]) -> dict[str, Value]:
    """Return what `after` wants and `before` did not: if few, what a new snapshot has changed."""
    return {key: value for key, value in after.items() if before.get(key) != value}


def _lowers(before: object, after: int) -> bool:
    """Whether a known value would be lowered; a column may hold anything, digits as text, too."""
    if isinstance(before, (str, bytes)) and before.isascii() and before.isdigit():
        before = float(before)
    return isinstance(before, (int, float)) and before > after


def _is_held(stored: object, wanted: object) -> bool:
    """Whether a column holds the value in the way of its type: a TEXT column holds 2 as '2'."""
    return isinstance(stored, (int, float, str)) and str(stored) == str(wanted)


class Comparison(NamedTuple):
    """Some rows, held against the targets."""

    matched: list[str]
    changes: list[Change]


def compare(values: Mapping[str, Value], rows: Iterable[Row], downgrade: Downgrade) -> Comparison:
    """Return which rows the snapshot knows, and which of them differ from it.

    Args:
        values: as in `Targets`.
        rows: plain tuples will do; they are read by position.
        downgrade: with `never`, a stored value is not lowered.

    """
    matched: list[str] = []
    changes: list[Change] = []
    for row, public_key, sup, evidence in rows:
        after = values.get(public_key)
        if after is None:
            continue
        matched.append(public_key)
        before = (sup, evidence)
        if (
            before != after
            and not (_is_held(sup, after[0]) and _is_held(evidence, after[1]))
            and not (downgrade == "never" and _lowers(sup, after[0]))
        ):
            changes.append(Change(row, public_key, before, after))
    return Comparison(matched, changes)
