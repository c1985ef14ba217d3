"""What the bytes of a snapshot mean, and the bytes that Go writes for one. Pure."""

from __future__ import annotations

import codecs
import contextlib
from collections import deque
from typing import Final, TypeVar

import msgspec

from mbcap_watch.errors import SnapshotMalformed, SnapshotRefused, printable, quoted
from mbcap_watch.snapshot import timestamp

T = TypeVar("T")

SNAPSHOT_NAME: Final = "snapshot.json"

# In characters. A real time takes 35 at most, a key is 64, evidence a word.
MAX_WRITTEN_AT: Final = 64
MAX_KEY: Final = 1024
MAX_EVIDENCE: Final = 4096

_PIECE: Final = 1 << 20

# A document has at least 32 bytes for each entry, on average; one with fewer than 4 is refused
# without counting its entries. In memory an entry takes 65 bytes, and each of its texts up to 76
# more than its letters. One that is only counted takes up to 28. The shortest that is written has
# 40. Below 64 KiB, whatever an entry takes is little.
LEAST_ENTRY: Final = 32
_LITTLE: Final = 1 << 16
_LEAST_COUNTED: Final = 4

# Below 1 MiB (8,000 entries) nobody feels that a call of msgspec holds the GIL, for 1.5 ms at most.
_LARGE: Final = 1 << 20
_BATCH: Final = 1000  # entries; after each batch, memory is given back


class Entry(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
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

    Its entries are not decoded, and take no memory. Of several `entries` only the last one counts.
    """

    written_at: str | None = None
    entries: msgspec.Raw = msgspec.Raw(b"null")


class _Counted(msgspec.Struct, gc=False):
    """An entry that is only counted, at 16 bytes."""


_document_decoder = msgspec.json.Decoder(_Document | None)
_counting_decoder = msgspec.json.Decoder(list[_Counted | None] | None)
_raw_entries_decoder = msgspec.json.Decoder(list[msgspec.Raw] | None)
_entries_decoder = msgspec.json.Decoder(list[Entry | None] | None)
_entry_decoder = msgspec.json.Decoder(Entry | None)
_NO_ENTRY = Entry()


def parse(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot from the bytes of its file.

    Takes at most ten times the size of `data` in memory, unless that is less than 64 KiB.

    Args:
        data: the whole file.
        source: what an error calls it; usually the path.

    Raises:
        SnapshotRefused: the entries would take more memory than that.
        SnapshotMalformed: whatever else is wrong; nothing else is ever raised.

    """
    if not data or data.isspace():
        raise SnapshotMalformed(source, "is empty")
    _require_utf8(data, source)
    document = _decode(_document_decoder, data, source) or _Document()
    entries = _entries_of(document.entries, data, source)
    if document.written_at is not None:
        _require_time(document.written_at, source)
    return Snapshot(entries, document.written_at)


def parse_entries(data: bytes, *, source: str = SNAPSHOT_NAME) -> Snapshot:
    """Read a snapshot as `parse` does, or a bare JSON list of entries (without `writtenAt`)."""
    if data.lstrip()[:1] != b"[":
        return parse(data, source=source)
    _require_utf8(data, source)
    return Snapshot(_entries_of(data, data, source))


def _decode(
    decoder: msgspec.json.Decoder[T], data: bytes | msgspec.Raw, source: str, where: str = ""
) -> T:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as exc:
        raise SnapshotMalformed(source, f"{where}{exc}") from exc
    except RecursionError as exc:
        raise SnapshotMalformed(source, f"{where}nested too deep") from exc


def _entries_of(data: bytes | msgspec.Raw, document: bytes, source: str) -> tuple[Entry, ...]:
    """Decode a list of entries: all at once if the document is small and right, else one by one.

    msgspec holds the GIL while one call lasts: 16 ms for 100,000 entries, which a host's event loop
    would feel. One by one, the longest hold is 6 ms; all of them together take 20 ms longer.
    """
    _require_memory(data, document, source)
    if len(document) < _LARGE:
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            return _no_nulls(_entries_decoder.decode(data) or [])
    waiting = _decode(_raw_entries_decoder, data, source, "entries: ") or []
    waiting.reverse()
    done: list[Entry | None] = []
    while waiting:
        batch = waiting[: -_BATCH - 1 : -1]
        del waiting[-_BATCH:]  # 48 bytes each
        try:
            done.extend(map(_entry_decoder.decode, batch))
        except (msgspec.MsgspecError, RecursionError):
            wrong = batch[len(done) % _BATCH]
            _decode(_entry_decoder, wrong, source, f"entries[{len(done)}]: ")
    return _no_nulls(done)


def _no_nulls(entries: list[Entry | None]) -> tuple[Entry, ...]:
    return tuple([entry or _NO_ENTRY for entry in entries])


def _require_memory(data: bytes | msgspec.Raw, document: bytes, source: str) -> None:
    """Raise SnapshotRefused if decoding would take more than ten times the size in memory.

    Only very many very small entries do that. Commas are counted first, which costs next to
    nothing; there is at most one entry more than commas.
    """

    def swells(entries: int) -> bool:
        return size >= _LITTLE and entries * LEAST_ENTRY > size

    size = memoryview(data).nbytes
    if not swells(document.count(b",") + 1):
        return
    entries = document.count(b"{")
    if entries * _LEAST_COUNTED <= size:  # else nearly all are entries: `{},{},{},`
        entries = len(_decode(_counting_decoder, data, source, "entries: ") or ())
    if swells(entries):
        problem = f"has {entries:,} entries in {size:,} bytes, which is fewer than {LEAST_ENTRY}"
        problem += " for each: decoded, they would take more than ten times as much memory"
        raise SnapshotRefused(source, problem)


def _require_utf8(data: bytes, source: str) -> None:
    """Raise SnapshotMalformed; msgspec does not check strings that it skips.

    In pieces, because as one text a single emoji would make it four times as large.
    """
    if data.isascii():
        return
    pieces = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
    try:
        deque(codecs.iterdecode(pieces, "utf-8"), maxlen=0)
    except UnicodeDecodeError as exc:
        raise SnapshotMalformed(source, f"is not UTF-8: {exc.reason}") from exc


def _require_time(text: str, source: str) -> None:
    if len(text) > MAX_WRITTEN_AT:
        problem = f"has {len(text):,} characters, more than {MAX_WRITTEN_AT}"
    elif not timestamp.is_valid(text):
        problem = f"{quoted(text)} is not RFC 3339"
    else:
        return
    raise SnapshotMalformed(source, f"writtenAt {problem}")


def stamped(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with its time as Go prints it; the current UTC time for none or zero."""
    time = _written_at(snapshot)
    return Snapshot(snapshot.entries, timestamp.now() if time == timestamp.ZERO else time)


def _written_at(snapshot: object) -> str:
    """Return the snapshot's time as Go prints it; none is Go's zero time."""
    given: object = snapshot.written_at if isinstance(snapshot, Snapshot) else snapshot
    if not isinstance(snapshot, Snapshot) or not isinstance(given, str | None):
        problem = f"expected a Snapshot with written_at as text, got {type(given).__name__}"
        raise SnapshotMalformed(SNAPSHOT_NAME, problem)
    if given is None:
        return timestamp.ZERO
    _require_time(given, SNAPSHOT_NAME)
    return timestamp.canonical(given)


def encode(snapshot: Snapshot) -> bytes:
    r"""Return the bytes that Go's `encoding/json` writes for the same snapshot.

    `parse` makes the same snapshot of them, with its time as Go prints it and None for an empty
    evidence. A key or a status that is None, which Go cannot have, is left out.

    `<`, `>`, `&`, U+2028 and U+2029 are escaped, as `json.Marshal` does by default ("HTMLEscape"
    in its documentation); in JSON they stand only inside strings. A backspace and a form feed are
    `\b` and `\f`, as from Go 1.22 on.

    Raises:
        SnapshotMalformed: a reader would refuse the result, or leave an entry out.

    """
    written_at = _written_at(snapshot)
    try:
        entries = [Entry(e.public_key, e.status, e.evidence or None) for e in snapshot.entries]
        text = msgspec.json.encode(entries, enc_hook=str.__str__)  # of a subclass of str
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as exc:
        problem = f"its entries cannot be written as JSON: {printable(str(exc))}"
        raise SnapshotMalformed(SNAPSHOT_NAME, problem) from exc
    for char in "<>&\u2028\u2029":
        text = text.replace(char.encode(), b"\\u%04x" % ord(char))
    data = b'{"writtenAt":"%b","entries":%b}' % (written_at.encode(), text)
    try:
        same = parse(data).entries == tuple(entries)
    except SnapshotRefused as exc:
        raise SnapshotMalformed(SNAPSHOT_NAME, exc.problem) from exc
    if not same:  # of bytes, say, msgspec makes text
        raise SnapshotMalformed(SNAPSHOT_NAME, "a key, a status or an evidence is no text")
    for entry in entries:
        if len(entry.public_key or "") > MAX_KEY or len(entry.evidence or "") > MAX_EVIDENCE:
            problem = "a reader leaves out a key of more than {:,} characters, or evidence of {:,}"
            raise SnapshotMalformed(SNAPSHOT_NAME, problem.format(MAX_KEY, MAX_EVIDENCE))
    return data
