"""What the bytes of a snapshot mean: `Entry`, `Snapshot`, `parse` and `encode`. Pure."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from mbcap_watch import timestamp
from mbcap_watch.errors import SnapshotMalformed

T = TypeVar("T")

SNAPSHOT_NAME = "snapshot.json"


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What the server found out about one node. A field that was null or missing is None."""

    public_key: str | None = None
    status: str | None = None
    evidence: str | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """The whole state at one moment, not a delta.

    Attributes:
        entries: in the order of the file.
        written_at: RFC 3339 text exactly as in the file; None where the file has none. A publisher
            that leaves it None stamps the current time.

    """

    entries: tuple[Entry, ...] = ()
    written_at: str | None = None


class _Document(msgspec.Struct, rename={"written_at": "writtenAt"}):
    """`snapshot.json` as it may be read: anything may be missing or null."""

    written_at: str | None = None
    entries: tuple[Entry | None, ...] | None = None


class _WireEntry(msgspec.Struct, omit_defaults=True, gc=False):
    """An entry as Go writes it: `evidence` is left out when empty (`omitempty`)."""

    public_key: str
    status: str
    evidence: str = ""


class _WireDocument(msgspec.Struct, rename={"written_at": "writtenAt"}):
    """`snapshot.json` as Go writes it: the order of the fields is the order of the bytes."""

    written_at: str
    entries: list[_WireEntry]


_decoder = msgspec.json.Decoder(_Document | None)
_entries_decoder = msgspec.json.Decoder(tuple[Entry | None, ...])
_NO_ENTRY = Entry()


def parse(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot from the bytes of its file.

    Args:
        data: the whole file.
        source: what an error calls it; usually the path.

    Raises:
        SnapshotMalformed: whatever is wrong with the bytes; nothing else is ever raised.

    """
    document = _decode(_decoder, data, source) or _Document()
    if document.written_at is not None and not timestamp.is_valid(document.written_at):
        raise SnapshotMalformed(source, f"writtenAt {document.written_at!r} is not RFC 3339")
    return Snapshot(_no_nulls(document.entries or ()), document.written_at)


def parse_entries(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot, or a bare JSON list of entries (which has no `writtenAt`).

    Raises:
        SnapshotMalformed: the bytes are neither.

    """
    if data.lstrip(b" \t\r\n")[:1] != b"[":
        return parse(data, source=source)
    return Snapshot(_no_nulls(_decode(_entries_decoder, data, source)))


def _decode(decoder: msgspec.json.Decoder[T], data: bytes, source: str) -> T:
    try:
        # msgspec does not look into strings that it skips; as text, the whole file is UTF-8.
        return decoder.decode(str(data, "utf-8"))
    except UnicodeDecodeError as exc:
        raise SnapshotMalformed(source, f"not UTF-8 at byte {exc.start}") from exc
    except msgspec.MsgspecError as exc:
        what = "is empty" if not data.strip() else str(exc)
        raise SnapshotMalformed(source, what) from exc
    except RecursionError as exc:
        raise SnapshotMalformed(source, "nested too deep") from exc


def _no_nulls(entries: tuple[Entry | None, ...]) -> tuple[Entry, ...]:
    return tuple([entry or _NO_ENTRY for entry in entries])


def stamped(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with the current UTC time where it has none, or Go's zero time."""
    if snapshot.written_at in (None, timestamp.ZERO):
        return Snapshot(snapshot.entries, timestamp.now())
    return snapshot


def encode(snapshot: Snapshot) -> bytes:
    """Return the bytes that Go's `encoding/json` writes for the same snapshot.

    `<`, `>`, `&`, U+2028 and U+2029 are escaped, as `json.Marshal` does by default ("HTMLEscape"
    in its documentation). In JSON they stand only inside strings, so replacing them in the
    finished text is safe.

    Raises:
        SnapshotMalformed: a reader would refuse the result (lone surrogates, a wrong type, a
            `written_at` that is not RFC 3339).

    """
    written_at = snapshot.written_at or timestamp.ZERO
    if timestamp.is_valid(written_at):
        written_at = timestamp.canonical(written_at)
    entries = [
        _WireEntry(entry.public_key or "", entry.status or "", entry.evidence or "")
        for entry in snapshot.entries
    ]
    try:
        data = msgspec.json.encode(_WireDocument(written_at, entries))
    except (UnicodeEncodeError, TypeError) as exc:
        raise SnapshotMalformed(SNAPSHOT_NAME, f"cannot be written as JSON: {exc}") from exc
    for char in "<>&\u2028\u2029":
        data = data.replace(char.encode(), b"\\u%04x" % ord(char))
    parse(data)  # what we would refuse to read, we do not publish
    return data
