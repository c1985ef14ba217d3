"""The contract, in plain json: what a document means. It shares nothing with the product."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any, Final, NamedTuple

FIELDS: Final = ("public_key", "status", "evidence")
TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T([01]\d|2[0-3])(:[0-5]\d){2}(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
DEEP: Final = 64  # what is nested deeper may be refused, and may be read


class Wrong(Exception):
    """The contract calls it malformed."""


class Judged(NamedTuple):
    """What a document means: each entry's fields, and what is wanted of which key."""

    written_at: str | None
    entries: tuple[tuple[str | None, ...], ...]
    wanted: dict[str, tuple[int, str | None]]
    read: int
    unknown: int
    unrecognized: int


class Pairs(list[tuple[str, Any]]):
    """A JSON object, with every key as often as it is there."""


def refuse(constant: str) -> None:
    raise Wrong(constant)  # NaN, Infinity


decoder = json.JSONDecoder(
    object_pairs_hook=Pairs, parse_constant=refuse, parse_int=len, parse_float=len
)


def field(pairs: Pairs, name: str) -> str | None:
    """Return the last value of a field that holds text or null."""
    found = [value for key, value in pairs if key == name]
    if not all(isinstance(value, str | None) for value in found):
        raise Wrong(name)
    return found[-1] if found else None


def judge(data: bytes) -> Judged:
    """Return what the contract makes of a document, or raise Wrong; RecursionError if deep."""
    try:
        document = decoder.decode(data.decode())
        if b"\\u" in data:  # an escape may be half a surrogate
            json.dumps(document, ensure_ascii=False).encode()
    except ValueError as exc:
        raise Wrong from exc
    document = Pairs() if document is None else document
    if not isinstance(document, Pairs):
        raise Wrong(document)
    written_at = field(document, "writtenAt")
    if written_at is not None and not is_time(written_at):
        raise Wrong(written_at)
    items = next((value for key, value in reversed(document) if key == "entries"), None)
    items = [] if items is None else items
    if isinstance(items, Pairs) or not isinstance(items, list):
        raise Wrong(items)
    return meaning(written_at, tuple(map(fields, items)))


def fields(item: Any) -> tuple[str | None, ...]:
    if not isinstance(item, Pairs | None):
        raise Wrong(item)
    return tuple([field(item or Pairs(), name) for name in FIELDS])


def meaning(written_at: str | None, entries: tuple[tuple[str | None, ...], ...]) -> Judged:
    wanted: dict[str, tuple[int, str | None]] = {}
    unknown = unrecognized = 0
    for key, status, evidence in entries:
        if len(key or "") > 1024 or len(evidence or "") > 4096:
            unrecognized += 1
        elif key is not None and status in ("confirmed", "suspected"):
            wanted[key] = (2 if status == "confirmed" else 1, evidence or "")
        elif status == "unknown":
            unknown += 1
        else:
            unrecognized += 1
    return Judged(written_at, entries, wanted, len(entries), unknown, unrecognized)


def is_time(text: str) -> bool:
    if len(text) > 64 or not (match := TIME.fullmatch(text)):
        return False
    year, month, day = map(int, match.groups()[:3])
    try:
        dt.date(year or 2000, month, day)  # the year 0 is a leap year, too
    except ValueError:
        return False
    return True


def depth(data: bytes) -> int:
    """Return how deep brackets are nested, those within strings included."""
    deepest = now = 0
    for byte in data:
        now += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, now)
    return deepest


def verdict(data: bytes) -> Judged | None:
    try:
        return judge(data)
    except Wrong:
        return None
