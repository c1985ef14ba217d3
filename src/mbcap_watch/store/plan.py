"""What to write: a pure function of the snapshot and the rows as they are."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from mbcap_watch.snapshot.codec import MAX_EVIDENCE, MAX_KEY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.snapshot.codec import Entry

# What a status means in `multibyte_sup`. A status that is not here is never written; "unknown" is
# known but would be a blank over a known value.
SUP: Final = {"confirmed": 2, "suspected": 1}
UNKNOWN: Final = "unknown"

# Of what SQLite takes for a number; Python knows more of them, "1_000" and "infinity" among others.
_NUMBER: Final = frozenset("0123456789.eE+- \t\n\v\f\r")

Value: TypeAlias = tuple[int, str | None]
"""`(multibyte_sup, multibyte_evidence)`"""


class Page(NamedTuple):
    """Rows of a table as they are now, by column; any column may hold any type.

    `ids` tell the rows apart: rowids, or keys where there are none.
    """

    ids: Sequence[Any] = ()
    keys: Sequence[Any] = ()
    sups: Sequence[Any] = ()
    evidences: Sequence[Any] = ()


class Change(msgspec.Struct, frozen=True, gc=False):
    """A row that differs from what the snapshot says."""

    row: int | str
    public_key: str
    before: Value
    after: Value


class DesiredState(NamedTuple):
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


def desired_state(entries: Iterable[Entry]) -> DesiredState:
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
    return DesiredState(values, count, unknown, unrecognized)


def delta(before: Mapping[str, Value], after: Mapping[str, Value]) -> dict[str, Value]:
    """Return the values of `after` that `before` did not have."""
    return {key: value for key, value in after.items() if before.get(key) != value}


def lowers(before: object, after: int) -> bool:
    """Whether a known value would be lowered; a column may hold anything, digits as text, too."""
    if isinstance(before, (str, bytes)) and before.isascii() and before.isdigit():
        before = float(before)
    return isinstance(before, (int, float)) and before > after


def _is_stored(stored: object, wanted: float | str | None) -> bool:
    """Whether a column holds the value in the way of its type: 2 as '2', or '05' as 5."""
    if type(stored) is type(wanted):  # nearly always: quicker
        return stored == wanted
    text = str(wanted)
    if not (isinstance(stored, (int, float)) and _NUMBER.issuperset(text)):
        return stored in (wanted, text)
    with contextlib.suppress(ValueError):
        return str(stored) == text or stored == float(text)
    return False


class Holds:
    """Lowerings that wait until every snapshot has asked for them for so many seconds.

    Kept by key, for as long as a snapshot asks for the same and the comparison finds the row
    higher. So there are never more of them than keys in a snapshot. A restart starts the wait anew.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._seconds = seconds
        self._since: dict[str, tuple[int, float]] = {}  # what is asked for, and since when
        self._found: set[str] = set()
        self._now = 0.0

    def read(self, values: Mapping[str, Value], now: float) -> None:
        """Note a snapshot that was read: whatever it does not ask for again is forgotten."""
        self._now = now
        self._since = {
            key: (sup, since)
            for key, (sup, since) in self._since.items()
            if key in values and values[key][0] == sup
        }

    def is_due(self, key: str, sup: int) -> bool:
        """Note that a row would be lowered to `sup`; return whether it may be now."""
        self._found.add(key)
        _, since = self._since.setdefault(key, (sup, self._now))
        return since + self._seconds <= self._now

    def begin(self) -> None:
        """Note that a comparison of all rows begins."""
        self._found.clear()

    def end(self, refused: Collection[str] = ()) -> None:
        """Note that it has ended, and what was due is written, but for what was refused.

        What is written, or was not found to be lowered, is forgotten.
        """
        self._since = {
            key: (sup, since)
            for key, (sup, since) in self._since.items()
            if key in self._found and (since + self._seconds > self._now or key in refused)
        }

    @property
    def waiting(self) -> list[float]:
        """When each lowering that is not due yet will be."""
        dues = (since + self._seconds for _, since in self._since.values())
        return [due for due in dues if due > self._now]


class Comparison(NamedTuple):
    """Some rows, compared with the desired state."""

    matched: list[str]
    changes: list[Change]


def compare(
    values: Mapping[str, Value], page: Page, downgrade: Downgrade, holds: Holds | None = None
) -> Comparison:
    """Return which rows the snapshot knows, and which of them differ from it and may be written.

    Whole columns are compared at once, and only rows that differ one by one. `holds` is for
    `hold`, which is `never` without.
    """
    wanted = list(map(values.get, page.keys))
    differ = map(operator.ne, zip(page.sups, page.evidences, strict=True), wanted)
    changes: list[Change] = []
    for row, key, sup, evidence, after in itertools.compress(
        zip(*page, wanted, strict=True), differ
    ):
        if after is None or (_is_stored(sup, after[0]) and _is_stored(evidence, after[1])):
            continue
        if (
            downgrade == "allow"
            or not lowers(sup, after[0])
            or (downgrade == "hold" and holds is not None and holds.is_due(key, after[0]))
        ):
            changes.append(Change(row, key, (sup, evidence), after))
    return Comparison(list(itertools.compress(page.keys, wanted)), changes)
