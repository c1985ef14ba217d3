"""The bytes of a snapshot: what they mean, and that ours are those of Go."""

from __future__ import annotations

import contextlib
import enum
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mbcap_watch.errors import SnapshotMalformed, SnapshotRefused
from mbcap_watch.snapshot import timestamp
from mbcap_watch.snapshot.codec import (
    MAX_EVIDENCE,
    MAX_KEY,
    MAX_WRITTEN_AT,
    Entry,
    Snapshot,
    encode,
    parse,
    parse_entries,
    stamped,
)
from mbcap_watch.store.plan import desired_state

KEY = "5f3a" * 16
EXAMPLE = (
    '{"writtenAt": "2026-07-18T08:47:37.123456789Z",\n'
    f' "entries": [{{"public_key": "{KEY}", "status": "confirmed", "evidence": "advert"}},\n'
    '             {"public_key": "b", "status": "suspected", "evidence": "path"},\n'
    '             {"public_key": "c", "status": "unknown"}]}\n'
).encode()


def entry_of(text: str) -> Entry:
    """Parse one entry in a snapshot of its own."""
    (entry,) = parse(f'{{"entries": [{text}]}}'.encode()).entries
    return entry


def test_the_example_of_the_contract() -> None:
    assert parse(EXAMPLE) == Snapshot(
        (
            Entry(KEY, "confirmed", "advert"),
            Entry("b", "suspected", "path"),
            Entry("c", "unknown", None),
        ),
        "2026-07-18T08:47:37.123456789Z",
    )


# ------------------------------------------------------------------------------ malformed

MALFORMED = {
    "empty": b"",
    "blank": b" \n",
    "truncated": EXAMPLE[:60],
    "all but the last brace": EXAMPLE.rstrip()[:-1],
    "not JSON": b"hello",
    "single quotes": b"{'entries': []}",
    "comment": b"{} // fine",
    "trailing comma": b'{"entries": [],}',
    "NaN": b'{"x": NaN}',
    "leading zero": b'{"x": 01}',
    "trailing byte": b"{}x",
    "trailing document": b"{}{}",
    "trailing NUL": b"{}\0",
    "a NUL-filled tail": EXAMPLE[:60] + bytes(100),  # what a power cut leaves on some filesystems
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "no-break space around": b"\xc2\xa0{}",
    "top level list": b"[]",
    "top level string": b'"x"',
    "top level number": b"0",
    "top level true": b"true",
    "top level false": b"false",
    "entries an object": b'{"entries": {}}',
    "entries a string": b'{"entries": ""}',
    "entries false": b'{"entries": false}',
    "entry a list": b'{"entries": [[]]}',
    "entry a string": b'{"entries": ["x"]}',
    "entry a number": b'{"entries": [0]}',
    "one bad entry among good ones": b'{"entries": [{"status": "confirmed"}, 1, {}]}',
    "public_key a number": b'{"entries": [{"public_key": 1}]}',
    "status true": b'{"entries": [{"status": true}]}',
    "status a list": b'{"entries": [{"status": []}]}',
    "evidence an object": b'{"entries": [{"evidence": {}}]}',
    "evidence zero": b'{"entries": [{"evidence": 0}]}',
    "writtenAt empty": b'{"writtenAt": ""}',
    "writtenAt a number": b'{"writtenAt": 1752828457}',
    "writtenAt no date": b'{"writtenAt": "2026-02-30T00:00:00Z"}',
    "writtenAt of 65 characters": b'{"writtenAt": "2026-07-18T08:47:37.' + b"1" * 44 + b'Z"}',
    "writtenAt huge": b'{"writtenAt": "' + b"9" * 300_000 + b'"}',
    "writtenAt in lower case": b'{"writtenAt": "2026-02-20t00:00:00z"}',
    "raw control character": b'{"entries": [{"status": "a\nb"}]}',
    "raw control character, skipped": b'{"x": "a\nb"}',
    "unknown escape, skipped": b'{"x": "\\q"}',
    "invalid UTF-8": b'{"entries": [{"status": "\xff"}]}',
    "invalid UTF-8, skipped value": b'{"x": "\xff"}',
    "invalid UTF-8, skipped deep": b'{"x": [{"y": "\xc3"}]}',
    "invalid UTF-8, unknown key": b'{"\xff": 1}',
    "invalid UTF-8, unknown key of an entry": b'{"entries": [{"\xff": 1}]}',
    "overlong UTF-8": b'{"x": "\xc0\xaf"}',
    "surrogate in UTF-8": b'{"x": "\xed\xa0\x80"}',
    "lone high surrogate": b'{"entries": [{"public_key": "\\ud800"}]}',
    "lone low surrogate": b'{"entries": [{"public_key": "\\udc00"}]}',
    "high surrogate and a letter": b'{"entries": [{"public_key": "\\ud800\\u0041"}]}',
    "lone surrogate, skipped value": b'{"x": "\\ud800"}',
    "lone surrogate, unknown key": b'{"\\udfff": 1}',
    "nested too deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested too deep in an entry": b'{"entries": [{"x": ' + b'{"y":' * 100_000,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_as_a_whole(data: bytes) -> None:
    with pytest.raises(SnapshotMalformed, match=r"^/a/snapshot\.json: ."):
        parse(data, source="/a/snapshot.json")


@pytest.mark.parametrize("text", ["\x1b[31m\u202e", "9" * 64, "9" * 65, "😀" * 100_000])
def test_an_error_quotes_little_of_a_time_and_makes_it_safe(text: str) -> None:
    with pytest.raises(SnapshotMalformed, match="writtenAt") as caught:
        parse(json.dumps({"writtenAt": text}).encode())
    assert str(caught.value).isprintable()
    assert len(caught.value.problem) < 100


# ------------------------------------------------------------------------------ lenient

EMPTY = {
    "null": b"null",
    "no fields": b"{}",
    "entries null": b'{"entries": null}',
    "entries empty": b'{"entries": []}',
    "writtenAt null": b'{"writtenAt": null, "entries": []}',
    "white space around": b" \t\r\n{} \t\r\n",
    "unknown field": b'{"version": 2, "entries": []}',
    "unknown field, nested": b'{"x": [{"entries": [1, {"public_key": 5}]}, 1e999, null]}',
    "unknown field, 64 deep": b'{"x": ' + b"[" * 64 + b"]" * 64 + b"}",
    "unknown field, a number of 9,999 digits": b'{"x": ' + b"9" * 9999 + b"}",
    "another letter case": b'{"Entries": [{"public_key": "a"}], "WRITTENAT": 5}',
    "the last duplicate wins": b'{"entries": [{}], "entries": []}',
    "the last duplicate wins, whatever the first is": b'{"entries": 5, "entries": []}',
    "the last duplicate wins, whatever is in the first": b'{"entries": [5], "entries": null}',
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_snapshot(data: bytes) -> None:
    assert parse(data) == Snapshot()


@pytest.mark.parametrize(
    "text, entry",
    [
        ("null", Entry()),
        ("{}", Entry()),
        ('{"public_key": null, "status": null, "evidence": null}', Entry()),
        ('{"public_key": "a"}', Entry("a", None, None)),
        ('{"status": "confirmed"}', Entry(None, "confirmed", None)),
        ('{"public_key": "", "status": "", "evidence": ""}', Entry("", "", "")),
        ('{"public_key": "a", "rssi": -3.5, "x": [{"status": 1}]}', Entry("a", None, None)),
        ('{"Public_Key": "a", "STATUS": 1}', Entry()),
        ('{"public_key": "a", "public_key": "b"}', Entry("b", None, None)),
        ('{"evidence": "x", "evidence": null}', Entry()),
        ('{"evidence": "\\ud83d\\ude00\\u00e9"}', Entry(None, None, "😀é")),
        ('{"evidence": "\\u0000"}', Entry(None, None, "\0")),
        ('{"\\u0073tatus": "a"}', Entry(None, "a", None)),  # an escaped key is the same key
        ('{"status": " confirmed"}', Entry(None, " confirmed", None)),
    ],
)
def test_an_entry(text: str, entry: Entry) -> None:
    assert entry_of(text) == entry


def test_an_unusable_entry_leaves_the_others_alone() -> None:
    document = b'{"entries": [null, {"public_key": "a", "status": "confirmed"}, {}]}'
    assert parse(document).entries == (Entry(), Entry("a", "confirmed"), Entry())


def test_a_duplicate_of_the_wrong_type_is_malformed_even_where_it_loses() -> None:
    with pytest.raises(SnapshotMalformed):
        entry_of('{"status": 1, "status": "confirmed"}')


def test_written_at_is_kept_as_it_is_in_the_file() -> None:
    text = f"2026-07-18T08:47:37.1{'0' * 37}+00:00"
    assert len(text) == MAX_WRITTEN_AT
    assert parse(f'{{"writtenAt": "{text}"}}'.encode()).written_at == text


# ------------------------------------------------------------------------------ a bare list


@pytest.mark.parametrize(
    "data, entries",
    [
        (b"[]", ()),
        (b" \r\n\t[ null, {} ]\n", (Entry(), Entry())),
        (b'[{"public_key": "a", "status": "confirmed"}]', (Entry("a", "confirmed"),)),
        (b'{"entries": [{"public_key": "a"}]}', (Entry("a"),)),
        (b"null", ()),
    ],
)
def test_a_bare_list_of_entries(data: bytes, entries: tuple[Entry, ...]) -> None:
    assert parse_entries(data) == Snapshot(entries)


@pytest.mark.parametrize(
    "data", [b"", b"[", b"[1]", b"[]x", b"[[]]", b'["\xff"]', b"\xef\xbb\xbf[]"]
)
def test_a_bare_list_that_is_malformed(data: bytes) -> None:
    with pytest.raises(SnapshotMalformed, match=r"^stdin: "):
        parse_entries(data, source="stdin")


# ------------------------------------------------------------------------------ any bytes

stamps = st.datetimes().map(lambda moment: moment.isoformat() + "Z")


def survives(data: bytes) -> None:
    """Parse; any other exception than the one that is promised fails the test."""
    for reader in (parse, parse_entries):
        with contextlib.suppress(SnapshotMalformed):
            assert isinstance(reader(data), Snapshot)


@given(st.binary(max_size=8), st.integers(0, len(EXAMPLE)), st.integers(0, 8))
@example(b"", 0, 0)
def test_parse_survives_a_mutated_document(patch: bytes, at: int, removed: int) -> None:
    survives(EXAMPLE[:at] + patch + EXAMPLE[at + removed :])


def test_no_torn_document_is_a_snapshot() -> None:
    for length in range(len(EXAMPLE.rstrip())):
        with pytest.raises(SnapshotMalformed):
            parse(EXAMPLE[:length])


# ------------------------------------------------------------------------------ encode

GO_ESCAPES = dict(zip('"\\\b\f\n\r\t', '"\\bfnrt', strict=True))


def go_string(text: str) -> str:
    """Write a JSON string as Go's `encoding/json` (1.22 and later) does: `appendString`."""

    def char(value: str) -> str:
        if value in GO_ESCAPES:
            return f"\\{GO_ESCAPES[value]}"
        if value < " " or value in "<>&\u2028\u2029":
            return f"\\u{ord(value):04x}"
        return value

    return '"' + "".join(map(char, text)) + '"'


def go_bytes(snapshot: Snapshot) -> bytes:
    """Write a snapshot as Go does, field by field, apart from the code under test."""
    entries = []
    for entry in snapshot.entries:
        fields = {"public_key": entry.public_key, "status": entry.status}
        if entry.evidence:
            fields["evidence"] = entry.evidence
        # Go has no None: what is None here is left out.
        present = [f'"{k}":{go_string(v)}' for k, v in fields.items() if v is not None]
        entries.append(f"{{{','.join(present)}}}")
    written_at = timestamp.canonical(snapshot.written_at or timestamp.ZERO)
    return f'{{"writtenAt":"{written_at}","entries":[{",".join(entries)}]}}'.encode()


@pytest.mark.parametrize(
    "snapshot, data",
    [
        (Snapshot(), '{"writtenAt":"0001-01-01T00:00:00Z","entries":[]}'),
        (
            Snapshot(
                (
                    Entry("a", "confirmed", "advert"),
                    Entry("b", "suspected", ""),
                    Entry("c", "unknown", None),
                    Entry(),
                ),
                "2026-07-18T08:47:37.1200+00:00",
            ),
            (
                '{"writtenAt":"2026-07-18T08:47:37.12Z","entries":['
                '{"public_key":"a","status":"confirmed","evidence":"advert"},'
                '{"public_key":"b","status":"suspected"},'
                '{"public_key":"c","status":"unknown"},'
                "{}]}"
            ),
        ),
    ],
)
def test_encode(snapshot: Snapshot, data: str) -> None:
    assert encode(snapshot) == data.encode()


@pytest.mark.parametrize(
    "text, written",
    [
        ("<>&", r"\u003c\u003e\u0026"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\b\f\n\r\t", r"\b\f\n\r\t"),
        ("\0\x01\x0b\x1b\x1f", r"\u0000\u0001\u000b\u001b\u001f"),
        ('"\\/', r"\"\\/"),
        ("\x7f\x80é😀", "\x7f\x80é😀"),
        ("\\u003c", r"\\u003c"),  # text that looks like an escape stays text
        ("\\<", r"\\\u003c"),
        ("\ufeff\ufffd", "\ufeff\ufffd"),
    ],
)
def test_encode_escapes_as_go_does(text: str, written: str) -> None:
    assert f'"evidence":"{written}"'.encode() in encode(Snapshot((Entry("k", "x", text),)))


chars = st.sampled_from('"\\/<>&\u2028\u2029\x7f\b\f\n\r\t\0\x1f😀') | st.characters(
    exclude_categories=["Cs"]
)
texts = st.none() | st.text(chars, max_size=12)
snapshots = st.builds(
    Snapshot,
    st.lists(st.builds(Entry, texts, texts, texts), max_size=4).map(tuple),
    st.none() | stamps,
)


def around(most: int) -> st.SearchStrategy[str | None]:
    """Return texts that are about as long as a reader takes."""
    return texts | st.builds(str.__mul__, chars, st.integers(most - 1, most + 1))


# Whatever a host may hand over, and what it should not.
any_text = texts | st.text() | st.integers() | st.binary(max_size=4)
any_snapshots = st.builds(
    Snapshot,
    st.lists(
        st.builds(
            Entry, around(MAX_KEY) | any_text, around(MAX_EVIDENCE) | any_text, around(MAX_EVIDENCE)
        )
        | st.none(),
        max_size=4,
    ).map(tuple)
    | st.none(),
    st.none() | stamps | around(MAX_WRITTEN_AT) | st.integers(),
)


@given(snapshots)
def test_encode_writes_the_bytes_of_go(snapshot: Snapshot) -> None:
    assert encode(snapshot) == go_bytes(snapshot)


@given(snapshots)
def test_encode_then_parse_is_the_same_snapshot(snapshot: Snapshot) -> None:
    data = encode(snapshot)
    assert parse(data) == as_in_go(snapshot)
    assert encode(parse(data)) == data


def as_in_go(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with what Go writes in one way only: its time, and no evidence."""
    return Snapshot(
        tuple(Entry(e.public_key, e.status, e.evidence or None) for e in snapshot.entries),
        timestamp.canonical(snapshot.written_at or timestamp.ZERO),
    )


@given(any_snapshots)
def test_what_encode_accepts_is_read_as_it_was(snapshot: Snapshot) -> None:
    try:
        data = encode(snapshot)
    except SnapshotMalformed:
        return
    assert parse(data) == as_in_go(snapshot)
    # and nothing of it is left out
    assert desired_state(parse(data).entries) == desired_state(snapshot.entries)
    assert all(
        len(entry.public_key or "") <= MAX_KEY and len(entry.evidence or "") <= MAX_EVIDENCE
        for entry in snapshot.entries
    )


def test_encode_refuses_swelling_exactly_where_parse_does() -> None:
    count = 40_000
    verdicts = set()
    for more in range(-2, 3):  # of the bytes that so many entries have to take
        fill = 32 * count - 2 - len('{"evidence":""},') * count + 1 + more
        sizes = [fill // count + (number < fill % count) for number in range(count)]
        entries = tuple(Entry(None, None, "x" * size) for size in sizes)
        data = go_bytes(Snapshot(entries))
        try:
            assert encode(Snapshot(entries)) == data
        except SnapshotMalformed:
            verdicts.add("refused")
            with pytest.raises(SnapshotRefused):
                parse(data)
        else:
            verdicts.add("written")
            assert parse(data).entries == entries
    assert verdicts == {"refused", "written"}


class Status(enum.Enum):
    CONFIRMED = "confirmed"


class TextStatus(str, enum.Enum):  # noqa: UP042 - as hosts write it
    CONFIRMED = "confirmed"


class Text(str):
    __slots__ = ()


def test_text_of_a_subclass_is_text() -> None:
    data = encode(Snapshot((Entry(Text("a"), TextStatus.CONFIRMED),)))
    assert parse(data).entries == (Entry("a", "confirmed"),)


BAD: dict[str, Snapshot] = {
    "lone surrogate as key": Snapshot((Entry("\ud800", "confirmed"),)),
    "lone surrogate as status": Snapshot((Entry("a", "\udfff"),)),
    "lone surrogate as evidence": Snapshot((Entry("a", "confirmed", "x\udcff"),)),
    "lone surrogate as time": Snapshot((), "\ud800"),
    "no time": Snapshot((), "yesterday"),
    "a time of 65 characters": Snapshot((), f"2026-07-18T08:47:37.{'1' * 44}Z"),
    "key of 1,025 characters": Snapshot((Entry("k" * 1025, "unknown"),)),
    "evidence of 4,097 characters": Snapshot((Entry("k", "confirmed", "x" * 4097),)),
    "many small entries": Snapshot((Entry("k"),) * 100_000),
    "no entries": Snapshot(None),  # type: ignore[arg-type]
    "entries a text": Snapshot("ab"),  # type: ignore[arg-type]
    "entry null": Snapshot((None,)),  # type: ignore[arg-type]
    "entry a dict": Snapshot(({"public_key": "a"},)),  # type: ignore[arg-type]
    "time a number": Snapshot((), 1752828457),  # type: ignore[arg-type]
    "not a snapshot": None,  # type: ignore[dict-item]
    "status an enum": Snapshot((Entry("a", Status.CONFIRMED),)),  # type: ignore[arg-type]
    "no date": Snapshot((), "2026-02-30T00:00:00Z"),
    "key a number": Snapshot((Entry(5, "confirmed"),)),  # type: ignore[arg-type]
    "status a list": Snapshot((Entry("a", ["confirmed"]),)),  # type: ignore[arg-type]
    "evidence an object": Snapshot((Entry("a", "confirmed", object()),)),  # type: ignore[arg-type]
    "evidence true": Snapshot((Entry("a", "confirmed", True),)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("snapshot", BAD.values(), ids=BAD.keys())
def test_encode_refuses_what_no_reader_would_take(snapshot: Snapshot) -> None:
    with pytest.raises(SnapshotMalformed) as caught:
        encode(snapshot)
    assert len(str(caught.value)) < 300
    with pytest.raises(SnapshotMalformed):
        encode(stamped(snapshot))


# ------------------------------------------------------------------------------ to the byte


def test_the_longest_that_a_reader_takes_is_written() -> None:
    entries = (Entry("k" * MAX_KEY, "confirmed", "x" * MAX_EVIDENCE),)
    assert parse(encode(Snapshot(entries))).entries == entries


@pytest.mark.parametrize(
    "size, entries, refused",
    [
        (1 << 16, 4_000, True),
        ((1 << 16) - 1, 4_000, False),  # small documents may swell
        (32 * 40_000, 40_000, False),
        (32 * 40_000 - 1, 40_000, True),
        (4 * 400_000, 400_000, True),
    ],
)
def test_what_would_swell_is_refused_to_the_byte(size: int, entries: int, refused: bool) -> None:
    """Of a bare list, every byte is of the entries."""
    data = b"[" + b",".join([b"{}"] * entries)
    data += b" " * (size - 1 - len(data)) + b"]"
    if refused:
        with pytest.raises(SnapshotRefused, match=f"has {entries:,} entries in {size:,} bytes"):
            parse_entries(data)
    else:
        assert len(parse_entries(data).entries) == entries


@pytest.mark.parametrize("known", ["", '"entries":null,', '"entries":[],'])
def test_a_large_snapshot_may_be_empty(known: str) -> None:
    text = f'{{{known}"writtenAt":"2026-07-18T08:47:37Z","more":"{"x" * (1 << 20)}"}}'
    assert parse(text.encode()) == Snapshot((), "2026-07-18T08:47:37Z")
