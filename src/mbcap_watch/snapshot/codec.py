"""What the bytes of a snapshot mean: `Entry`, `Snapshot` and `parse`. Pure."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mbcap_watch.errors import SnapshotMalformed, SnapshotRefused, quoted
from mbcap_watch.snapshot import timestamp

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

SNAPSHOT_NAME: Final = "snapshot.json"

# In characters. A real time takes 35 at most, a key is 64, evidence a word.
MAX_WRITTEN_AT: Final = 64
MAX_KEY: Final = 1024
MAX_EVIDENCE: Final = 4096

_PIECE: Final = 1 << 20

# From 1 MiB (8,000 entries) on, a stall could be felt, and ten times the size is a lot of memory.
_LARGE: Final = 1 << 20

# What entries of a large document take at least, on average: 32 bytes each, 4 to be counted. In
# memory an entry takes 65, each of its texts up to 76 more than its letters, one that is only
# counted up to 28. The shortest entry that is written has 40 bytes.
LEAST_ENTRY: Final = 32
_LEAST_COUNTED: Final = 4

_BATCH: Final = 1000  # entries between two times that memory is given back


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
    """`snapshot.json` as it may be read: anything may be missing or null.

    The entries are not decoded, and take no memory.
    """

    written_at: str | None = None
    entries: msgspec.Raw = msgspec.Raw(b"null")


class _Counted(msgspec.Struct, gc=False):
    """An entry that is only counted, at 16 bytes."""


_document_decoder = msgspec.json.Decoder(_Document | None)
_entries_decoder = msgspec.json.Decoder(tuple[Entry | None, ...] | None)
_counting_decoder = msgspec.json.Decoder(list[_Counted | None] | None)
_raw_entries_decoder = msgspec.json.Decoder(list[msgspec.Raw] | None)
_entry_decoder = msgspec.json.Decoder(Entry | None)
_NO_ENTRY = Entry()


def parse(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot from the bytes of its file.

    Takes at most ten times the size of `data` in memory, unless that is less than 1 MiB.

    Args:
        data: the whole file.
        source: what an error calls it; usually the path.

    Raises:
        SnapshotRefused: the entries would take more memory than that.
        SnapshotMalformed: whatever else is wrong with the bytes; nothing else is ever raised.

    """
    if not data or data.isspace():
        raise SnapshotMalformed(source, "is empty")
    _require_utf8(data, source)
    document = _decode(_document_decoder, data, source) or _Document()
    if document.written_at is not None:
        require_time(document.written_at, source)
    return Snapshot(_decode_entries(document.entries, data, source), document.written_at)


def parse_entries(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot, or a bare JSON list of entries (which has no `writtenAt`).

    Raises:
        SnapshotRefused: as `parse`.
        SnapshotMalformed: the bytes are neither.

    """
    if data.lstrip(b" \t\r\n")[:1] != b"[":
        return parse(data, source=source)
    _require_utf8(data, source)
    return Snapshot(_decode_entries(data, data, source))


def _decode(
    decoder: msgspec.json.Decoder[T], data: bytes | msgspec.Raw, source: str, where: str = ""
) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise _malformed(source, where, exc) from exc


def _malformed(source: str, where: str, exc: Exception) -> SnapshotMalformed:
    what = "nested too deep" if isinstance(exc, RecursionError) else str(exc)
    return SnapshotMalformed(source, where + what)


def _decode_entries(data: bytes | msgspec.Raw, document: bytes, source: str) -> tuple[Entry, ...]:
    """Decode a list of entries; each entry of a large one by itself.

    msgspec holds the GIL while one call lasts: 16 ms for 100,000 entries, which a host's event loop
    would feel. One by one, the longest hold is 6 ms; all of them together take 20 ms longer.
    """
    if (size := memoryview(data).nbytes) < _LARGE:
        return _no_nulls(_decode(_entries_decoder, data, source, "entries: ") or ())
    _require_memory(data, size, document, source)
    waiting = _decode(_raw_entries_decoder, data, source, "entries: ") or []
    waiting.reverse()
    decode = _entry_decoder.decode
    done: list[Entry | None] = []
    try:
        while waiting:
            done.extend(map(decode, reversed(waiting[-_BATCH:])))
            del waiting[-_BATCH:]  # 48 bytes each
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise _malformed(source, f"entries[{len(done)}]: ", exc) from exc
    return _no_nulls(done)


def _no_nulls(entries: Sequence[Entry | None]) -> tuple[Entry, ...]:
    return tuple([entry or _NO_ENTRY for entry in entries])


def _require_memory(data: bytes | msgspec.Raw, size: int, document: bytes, source: str) -> None:
    """Raise SnapshotRefused if decoding would take more than ten times the size in memory.

    Only very many very small entries do that. Commas are counted first, which costs next to
    nothing; there are fewer entries than commas.
    """
    if not swells(document.count(b","), size):
        return
    entries = document.count(b"{")
    if entries * _LEAST_COUNTED <= size:  # else nearly all are entries: `{},{},{},`
        entries = len(_decode(_counting_decoder, data, source, "entries: ") or ())
    if swells(entries, size):
        problem = f"has {entries:,} entries in {size:,} bytes, which is fewer than {LEAST_ENTRY}"
        problem += " for each: decoded, they would take more than ten times as much memory"
        raise SnapshotRefused(source, problem)


def swells(entries: int, size: int) -> bool:
    """Whether so many entries in so many bytes would take too much memory when decoded."""
    return size >= _LARGE and entries * LEAST_ENTRY > size


def _require_utf8(data: bytes, source: str) -> None:
    """Raise SnapshotMalformed; msgspec does not check strings that it skips.

    In pieces, because as one text a single emoji would make it four times as large.
    """
    if data.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _PIECE):
            decoder.decode(data[start : start + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as exc:
        raise SnapshotMalformed(source, f"is not UTF-8: {exc.reason}") from exc


def require_time(text: str, source: str) -> None:
    """Raise SnapshotMalformed unless `text` is RFC 3339 and short enough."""
    if len(text) > MAX_WRITTEN_AT:
        problem = f"has {len(text):,} characters, more than {MAX_WRITTEN_AT}"
    elif not timestamp.is_valid(text):
        problem = f"{quoted(text)} is not RFC 3339"
    else:
        return
    raise SnapshotMalformed(source, f"writtenAt {problem}")
