"""Corrupted and hostile snapshots are read as the contract says, and cost little memory."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from typing import TYPE_CHECKING

import anyio

from benchmarks import documents
from campaigns.campaign import Campaign
from campaigns.contract import DEEP, Judged, depth, verdict
from mbcap_watch import Settings, Snapshot, persist_once, snapshot_path
from mbcap_watch.errors import SnapshotError, SnapshotRefused
from mbcap_watch.snapshot.codec import parse
from mbcap_watch.store.plan import desired_state
from support import DEADLINE, NOISE, TESTS, cost_of_reading, make_database, put, read_rows

if TYPE_CHECKING:
    from pathlib import Path

    from mbcap_watch import PersistResult
    from support import Row

# ------------------------------------------------------------------------------ documents

KEYS = ["aa11", "bb22", "5f3a" * 16, "", "é", "😀" * 3, "a\\u0000b", "a'b\\\"; --"]
STATUSES = ["confirmed", "suspected", "unknown", "\\u0063onfirmed"]
EVIDENCES = ["advert", "path", "", "\\ud83d\\ude00", "é😀", "\\u2028\\n", "a\\/b"]
TIMES = ["2026-07-18T08:47:37.123456789Z", "2026-02-28T23:59:59+05:30", "0001-01-01T00:00:00Z"]
ODD_TIMES = [
    *("2016-12-31T23:59:60Z", "2025-02-29T00:00:00Z", "2024-02-29T00:00:00.Z", "today", ""),
    *("2026-01-01t00:00:00z", "0000-02-29T00:00:00Z", "1900-02-29T00:00:00Z"),
    *("2026-01-01T00:00:00+24:00", "2026-01-01T24:00:00Z", "2026-04-31T00:00:00-23:59"),
    *(f"2026-07-18T08:47:37.{'1' * digits}Z" for digits in (43, 44)),
]
RARE = [  # each is a value; some are none
    *("null", "true", "false", "0", "-1", "1.5e3", "1e999", "-0.0", "01", "1.", "-", "+1", "nul"),
    *("NaN", "Infinity", "-Infinity", "[]", "{}", "[null]", '{"a":1}', "[[[1]],{}]", '""', "''"),
    *('"Confirmed"', '" confirmed"', '"unknown "', '"\\ud800"', '"\\udc00x"', '"\\ud83d\\u0041"'),
    *('"\\ud83d\\ud83d\\ude00"', '"\\q"', '"\\u12g4"', '"\t"', '"\x7f"', '"\ufeff"', '"\u2028"'),
    f'"{"k" * 1024}"',
    f'"{"😀" * 1025}"',
    f'"{"x" * 4096}"',
    f'"{"x" * 4097}"',
    f"{'9' * 5000}",
    f"{'[' * 60}{']' * 60}",
    f"{'[' * 300}{']' * 300}",
    '{"x":' * 2000 + "0" + "}" * 2000,
]
NAMES = [
    "Entries",
    "STATUS",
    "public_Key",
    "\\u0073tatus",
    "evidence ",
    "writtenAt",
    "x",
    "\\ud800",
]
TOKENS = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"{}", b"\\", b"\\u", b"\\ud800", b"e9"),
    *(b"\0", b"\n", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc0\xaf", b" ", b"0"),
    *(b'"entries":', b'"status":"confirmed"', b',"entries":null', b',"status":1', b"NaN", b"//"),
    *(b'{"public_key":"aa11","status":"suspected"},', b'"writtenAt":null,', b"\xc2\xa0", b"\x0c"),
]


def grown(dice: random.Random) -> bytes:
    """Make a document by the grammar: mostly as a publisher does, with now and then oddities."""

    def value(usual: list[str]) -> str:
        return dice.choice(RARE) if dice.random() < 0.03 else f'"{dice.choice(usual)}"'

    def of(fields: list[tuple[str, str]]) -> str:
        """Return an object; a field may be missing, be there twice, or have another name."""
        found = [(name, text) for name, text in fields if dice.random() > 0.06]
        if dice.random() < 0.1:
            name = dice.choice([*NAMES, *(name for name, _ in fields)])
            found.insert(dice.randrange(len(found) + 1), (name, dice.choice(RARE)))
        if dice.random() < 0.1:
            dice.shuffle(found)
        colon = dice.choice([":", ": ", "\n:\t"])
        return "{" + dice.choice([",", ", "]).join(f'"{k}"{colon}{v}' for k, v in found) + "}"

    entries = [
        of(
            [
                ("public_key", value(KEYS)),
                ("status", value(STATUSES)),
                ("evidence", value(EVIDENCES)),
            ]
        )
        for _ in range(dice.choice([0, 1, 1, 2, 3]))
    ]
    if dice.random() < 0.05:
        entries.insert(0, dice.choice(RARE))
    times = ODD_TIMES if dice.random() < 0.1 else TIMES
    fields = [("writtenAt", value(times)), ("entries", f"[{','.join(entries)}]")]
    if dice.random() < 0.05:
        fields.insert(dice.randrange(3), ("entries", dice.choice(RARE)))
    return of(fields).encode()


def mutated(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return a document as a torn write, a bad disk or a bad program may leave it."""
    while True:
        number, at, of_other = dice.random(), dice.random(), dice.random()
        at, of_other = int(at * len(data)), int(of_other * len(other))
        match int(number * 8):
            case 0:
                data = data[:at]
            case 1:
                flipped = data[at : at + 1].translate(FLIPPED[int(number * 64) & 7])
                data = data[:at] + flipped + data[at + 1 :]
            case 2:
                data = data[:at] + other[of_other:]
            case 3:
                data = data[:at] + dice.choice(TOKENS) + data[at:]
            case 4:
                token = dice.choice(TOKENS)
                data = data[:at] + token + data[at + len(token) :]
            case 5:
                data = data[:at] + data[at + 1 + of_other % 40 :]
            case 6:
                data = data[:at] + other[of_other : of_other + 40] + data[at:]
            case _:
                data = data[: at + 40] + data[at:]
        if dice.random() < 0.7:
            return data


FLIPPED = [bytes(byte ^ 1 << bit for byte in range(256)) for bit in range(8)]


def large(dice: random.Random) -> bytes:
    """Make a document of up to 4 MiB that takes as much memory as can be."""
    size = int(2 ** dice.uniform(18, 22))
    if dice.random() < 0.6:
        data = documents.ALL[dice.choice(list(documents.ALL))](size)
    else:  # one piece of a document again and again, in a place of its own
        unit = dice.choice(
            [*RARE[:26], *(grown(dice).decode() for _ in range(9)), '"x":{}', '"\\n']
        )
        head, tail = dice.choice([("", ""), ('{"entries":[', "]}"), ('{"x":[', "]}"), ("[", "]")])
        data = (head + ",".join([unit] * (size // (len(unit) + 1))) + tail).encode()
    return mutated(data, data[:100], dice) if dice.random() < 0.3 else data


# ------------------------------------------------------------------------------ a round


def read(data: bytes) -> Snapshot | SnapshotError:
    try:
        return parse(data)
    except SnapshotError as exc:
        return exc


def check(data: bytes) -> Judged | None:
    """Read a document, and compare with what the judge says; return that."""
    deep, expected, found = False, None, read(data)
    try:
        expected = verdict(data)
    except RecursionError:
        deep = True
    about = data[:5000], found, expected
    if isinstance(found, SnapshotError):
        assert str(found).isprintable(), about
        assert len(str(found)) < 300, about
        if isinstance(found, SnapshotRefused):
            assert len(data) > 1 << 16, about
            assert expected is None or len(expected.entries) * 40 > len(data), about
        else:
            assert expected is None or depth(data) > DEEP, about
        return None
    if not deep:
        entries = tuple([(each.public_key, each.status, each.evidence) for each in found.entries])
        assert Judged(found.written_at, entries, *desired_state(found.entries)) == expected, about
    return expected


ROWS: list[Row] = [
    (table, json.loads(f'"{key}"'), sup, evidence)
    for table, sup, evidence in [("nodes", 0, None), ("inactive_nodes", 2, "advert")]
    for key in KEYS
]


async def apply(database: Path, made: bytes, data: bytes) -> PersistResult:
    """Have the bridge apply a document to the database as it was made."""
    database.write_bytes(made)
    put(data, snapshot_path(database))
    with anyio.fail_after(DEADLINE):
        return await persist_once(Settings(database))


def check_rows(database: Path, made: bytes, data: bytes) -> str:
    """Apply a document, and compare the database with what the judge says; return the outcome."""
    result = anyio.run(apply, database, made, data)
    about = data[:5000], result
    if result.outcome != "applied":
        assert database.read_bytes() == made, about
        assert not database.with_name(f"{database.name}-wal").exists(), about
    try:
        expected = verdict(data)
    except RecursionError:
        expected = None
    if not result.compared:
        assert result.outcome == "malformed", about
        assert expected is None or depth(data) > DEEP, about
        return result.outcome
    assert expected is not None, about
    rows = {(table, key, *expected.wanted.get(key, values)) for table, key, *values in ROWS}
    assert read_rows(database) == rows, about
    assert (result.outcome == "applied") == (rows != set(ROWS)), about
    counted = result.entries, result.skipped_unknown, result.skipped_unrecognized
    assert counted == (len(expected.entries), expected.unknown, expected.unrecognized), about
    return result.outcome


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    dice, tally = random.Random(number), Counter[str]()
    count = min(wanted, 200_000)
    for _ in range(1 + count // 50_000):
        (base / "snapshot.json").write_bytes(data := large(dice))
        growth, result = cost_of_reading(base)
        outcome = result["outcome"]
        about = growth / len(data), len(data), outcome, data[:500]
        assert growth <= 10 * len(data) + NOISE, about
        accepted = check(data) is not None
        assert accepted == (outcome == "database_missing") or depth(data) > DEEP, about
        tally["documents"] += 1
        tally[f"large: {outcome}"] += 1

    lines = (TESTS / "cases.jsonl").read_text().splitlines()
    cases = [base64.b64decode(json.loads(line)["snapshot_b64"] or "") for line in lines]
    pool = [case for case in cases if len(case) < 2000] + [grown(dice) for _ in range(1000)]
    sample = []
    for index in range(count):
        data = pool[int(dice.random() * len(pool))]
        if index % 100 == 0:
            data = pool[index // 100 % len(pool)] = grown(dice)
        elif index % 10:
            data = mutated(data, pool[int(dice.random() * len(pool))], dice)
        expected = check(data)
        tally["documents"] += 1
        tally["malformed" if expected is None else "accepted"] += 1
        tally["with something to write"] += bool(expected and expected.wanted)
        # Those that are written are rarer, and tell more.
        if dice.random() < (0.003 if expected and expected.wanted else 0.0006):
            sample.append(data)

    database = make_database(base / "m.db", ROWS)
    made = database.read_bytes()
    for data in sample:
        tally[f"with a database: {check_rows(database, made, data)}"] += 1
    return tally


CAMPAIGN = Campaign(
    about="corrupted and hostile snapshots: read as the contract says, nothing is written of a bad"
    " one, memory stays within ten times the size",
    unit="documents",
    full=10_000_000,
    short=5_000,
    play=play,
)
