"""The bytes of a snapshot as Go writes them: `encode`. Pure."""

from __future__ import annotations

import math

import msgspec

from mbcap_watch.errors import SnapshotMalformed
from mbcap_watch.snapshot import timestamp
from mbcap_watch.snapshot.codec import (
    LEAST_ENTRY,
    MAX_EVIDENCE,
    MAX_KEY,
    SNAPSHOT_NAME,
    Entry,
    Snapshot,
    require_time,
    swells,
)


class _WireEntry(msgspec.Struct, omit_defaults=True, gc=False):
    """As Go writes it, without an empty evidence. None is left out: an empty key is a key."""

    public_key: str | None = None
    status: str | None = None
    evidence: str = ""


class _WireDocument(msgspec.Struct, rename={"written_at": "writtenAt"}):
    """`snapshot.json` as Go writes it: the order of the fields is the order of the bytes."""

    written_at: str
    entries: list[_WireEntry]


def stamped(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with its time as Go prints it; the current UTC time for none or zero.

    Raises:
        SnapshotMalformed: it is no `Snapshot`, or `written_at` is not RFC 3339.

    """
    time = _written_at(snapshot)
    return Snapshot(snapshot.entries, timestamp.now() if time == timestamp.ZERO else time)


def _written_at(snapshot: object) -> str:
    """Return the snapshot's time as Go prints it; none is Go's zero time."""
    if not isinstance(snapshot, Snapshot):
        raise _wrong("a snapshot", "a Snapshot", snapshot)
    given: object = snapshot.written_at
    if given is None:
        return timestamp.ZERO
    if not isinstance(given, str):
        raise _wrong("written_at", "text or None", given)
    require_time(given, SNAPSHOT_NAME)
    return timestamp.canonical(given)


def encode(snapshot: Snapshot) -> bytes:
    r"""Return the bytes that Go's `encoding/json` writes for the same snapshot.

    `parse` makes the same snapshot of them, with its time as Go prints it and None for an empty
    evidence. A key or a status that is None, which Go cannot have, is left out.

    `<`, `>`, `&`, U+2028 and U+2029 are escaped, as `json.Marshal` does by default ("HTMLEscape"
    in its documentation). In JSON they stand only inside strings, so replacing them in the
    finished text is safe. A backspace and a form feed are written `\b` and `\f`, as Go 1.22
    and later do; earlier versions wrote `\u0008` and `\u000c`.

    Raises:
        SnapshotMalformed: a reader would refuse the result, or leave an entry out.

    """
    written_at, entries = _written_at(snapshot), snapshot.entries
    if not isinstance(entries, tuple | list):
        raise _wrong("entries", "a tuple", entries)
    document = _WireDocument(written_at, list(map(_wire_entry, entries)))
    try:
        data = msgspec.json.encode(document)
    except UnicodeEncodeError as exc:
        raise SnapshotMalformed(SNAPSHOT_NAME, f"cannot be written as JSON: {exc}") from exc
    for char in "<>&\u2028\u2029":
        data = data.replace(char.encode(), b"\\u%04x" % ord(char))
    if swells(len(entries), len(data) - data.index(b"[") - 1):
        problem = f"entries of fewer than {LEAST_ENTRY} bytes are refused by a reader"
        raise SnapshotMalformed(SNAPSHOT_NAME, problem)
    return data


def _wire_entry(entry: object) -> _WireEntry:
    if not isinstance(entry, Entry):
        raise _wrong("an entry", "an Entry", entry)
    return _WireEntry(
        _text("public_key", entry.public_key, MAX_KEY),
        _text("status", entry.status),
        _text("evidence", entry.evidence, MAX_EVIDENCE) or "",
    )


def _text(name: str, value: object, most: float = math.inf) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(name, "text or None", value)
    if len(value) > most:
        problem = f"{name} has {len(value):,} characters; a reader leaves out more than {most:,}"
        raise SnapshotMalformed(SNAPSHOT_NAME, problem)
    return str.__str__(value)  # msgspec takes no subclass


def _wrong(what: str, wanted: str, value: object) -> SnapshotMalformed:
    return SnapshotMalformed(
        SNAPSHOT_NAME, f"{what} is of type {type(value).__name__}, not {wanted}"
    )
