"""What the bytes of a snapshot mean: `Entry`, `Snapshot`, `parse` and `encode`. Pure."""

from __future__ import annotations

import codecs
from typing import TypeVar

import msgspec

from mbcap_watch import timestamp
from mbcap_watch.errors import SnapshotMalformed, quoted

T = TypeVar("T")

SNAPSHOT_NAME = "snapshot.json"

_PIECE = 1 << 20

# From 1 MiB (8,000 entries) on, a stall could be felt. Beyond 64 MiB the memory for the raw
# entries counts for more.
_ONE_BY_ONE_FROM = 1 << 20
_ONE_BY_ONE_TO = 64 << 20


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


class _Skeleton(msgspec.Struct, rename={"written_at": "writtenAt"}):
    """The same, with the entries not looked into."""

    written_at: str | None = None
    entries: list[msgspec.Raw] | None = None


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
_skeleton_decoder = msgspec.json.Decoder(_Skeleton | None)
_entries_decoder = msgspec.json.Decoder(tuple[Entry | None, ...])
_entry_decoder = msgspec.json.Decoder(Entry | None)
_NO_ENTRY = Entry()


def parse(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot from the bytes of its file.

    Args:
        data: the whole file.
        source: what an error calls it; usually the path.

    Raises:
        SnapshotMalformed: whatever is wrong with the bytes; nothing else is ever raised.

    """
    if _ONE_BY_ONE_FROM <= len(data) < _ONE_BY_ONE_TO:
        document = _decode_one_by_one(data, source)
    else:
        document = _decode(_decoder, data, source) or _Document()
    if document.written_at is not None and not timestamp.is_valid(document.written_at):
        raise SnapshotMalformed(source, f"writtenAt {quoted(document.written_at)} is not RFC 3339")
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
        _require_utf8(data)
        return decoder.decode(data)
    except UnicodeDecodeError as exc:
        raise SnapshotMalformed(source, f"is not UTF-8: {exc.reason}") from exc
    except msgspec.MsgspecError as exc:
        what = "is empty" if not data.strip() else str(exc)
        raise SnapshotMalformed(source, what) from exc
    except RecursionError as exc:
        raise SnapshotMalformed(source, "nested too deep") from exc


def _decode_one_by_one(data: bytes, source: str) -> _Document:
    """Decode each entry by itself, letting other threads in between.

    msgspec holds the GIL for as long as one call takes: 16 ms for 100,000 entries, which a host's
    event loop would feel. Like this the longest hold is 6 ms, at the price of 10 ms in total.
    """
    skeleton = _decode(_skeleton_decoder, data, source) or _Skeleton()
    try:
        entries = tuple(map(_entry_decoder.decode, skeleton.entries or ()))
    except (msgspec.MsgspecError, RecursionError):
        return _decode(_decoder, data, source) or _Document()  # raises, and says where in the file
    return _Document(skeleton.written_at, entries)


def _require_utf8(data: bytes) -> None:
    """Raise UnicodeDecodeError; msgspec does not look into strings that it skips.

    In pieces, because as one text a single emoji would make it four times as large.
    """
    if not data.isascii():
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(data), _PIECE):
            decoder.decode(data[start : start + _PIECE])
        decoder.decode(b"", final=True)


def _no_nulls(entries: tuple[Entry | None, ...]) -> tuple[Entry, ...]:
    return tuple([entry or _NO_ENTRY for entry in entries])


def stamped(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with its time as Go prints it.

    That is the current UTC time where there is none, or Go's zero time.

    Raises:
        SnapshotMalformed: `written_at` is not RFC 3339.

    """
    written_at = _written_at(snapshot)
    return Snapshot(
        snapshot.entries, timestamp.now() if written_at == timestamp.ZERO else written_at
    )


def _written_at(snapshot: Snapshot) -> str:
    """Return the snapshot's time as Go prints it; none is Go's zero time."""
    given: object = snapshot.written_at
    if given is None:
        return timestamp.ZERO
    if not isinstance(given, str) or not timestamp.is_valid(given):
        raise SnapshotMalformed(SNAPSHOT_NAME, f"writtenAt {quoted(given)} is not RFC 3339")
    return timestamp.canonical(given)


def encode(snapshot: Snapshot) -> bytes:
    r"""Return the bytes that Go's `encoding/json` writes for the same snapshot.

    `<`, `>`, `&`, U+2028 and U+2029 are escaped, as `json.Marshal` does by default ("HTMLEscape"
    in its documentation). In JSON they stand only inside strings, so replacing them in the
    finished text is safe. A backspace and a form feed are written `\b` and `\f`, as Go 1.22
    and later do; earlier versions wrote `\u0008` and `\u000c`.

    Raises:
        SnapshotMalformed: a reader would refuse the result (lone surrogates, a wrong type, a
            `written_at` that is not RFC 3339).

    """
    document = _WireDocument(_written_at(snapshot), list(map(_wire_entry, snapshot.entries)))
    try:
        data = msgspec.json.encode(document)
    except UnicodeEncodeError as exc:
        raise SnapshotMalformed(SNAPSHOT_NAME, f"cannot be written as JSON: {exc}") from exc
    for char in "<>&\u2028\u2029":
        data = data.replace(char.encode(), b"\\u%04x" % ord(char))
    return data


def _wire_entry(entry: object) -> _WireEntry:
    if not isinstance(entry, Entry):
        raise SnapshotMalformed(SNAPSHOT_NAME, f"not an Entry: {quoted(entry)}")
    texts = (entry.public_key, entry.status, entry.evidence)
    for text in texts:
        if not isinstance(text, str | None):
            raise SnapshotMalformed(SNAPSHOT_NAME, f"not text: {quoted(text)}")
    public_key, status, evidence = (text or "" for text in texts)
    return _WireEntry(public_key, status, evidence)
