"""Documents that take as much memory as can be, for their size: what a hostile publisher may try.

Only the standard library is imported: tests make them as well.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_HEAD: Final = '{"entries":['
_TAIL: Final = "]}"
_EMOJI: Final = "😀"  # one makes a text of ASCII four times as large in memory
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def _key(number: int) -> str:
    """Return four characters, different for each of 16 million numbers."""
    return "".join(_LETTERS[number >> shift & 63] for shift in (0, 6, 12, 18))


def _wide(number: int) -> str:
    """Return one character of four bytes, different for each of a million numbers."""
    return chr(0x10000 + number)


def _entries(make: Callable[[int], str]) -> Callable[[int], bytes]:
    return _between(make, _HEAD, _TAIL)


def _between(make: Callable[[int], str], head: str, tail: str) -> Callable[[int], bytes]:
    """Return what makes a document of at most so many bytes: numbered pieces, and commas."""

    def document(size: int) -> bytes:
        left = size - len((head + tail).encode())
        pieces: list[bytes] = []
        for number in itertools.count():
            piece = make(number).encode()
            left -= len(piece) + 1
            if left < 0:
                return head.encode() + b",".join(pieces) + tail.encode()
            pieces.append(piece)
        raise AssertionError

    return document


def _filled(head: str, unit: str, tail: str) -> Callable[[int], bytes]:
    """Return what makes a document of at most so many bytes: one unit again and again."""
    around, piece = head + tail, unit.encode()
    return lambda size: (
        head.encode() + piece * ((size - len(around.encode())) // len(piece)) + tail.encode()
    )


def _confirmed(key: str, more: str = "") -> str:
    return f'{{"public_key":"{key}","status":"confirmed"{more}}}'


def _with_evidence(key: str, evidence: str) -> str:
    return _confirmed(key, f',"evidence":"{evidence}"')


def _twice(size: int) -> bytes:
    """Return a document that has its entries twice; the last ones count."""
    half = _between(lambda _: "{}", '"entries":[', "]")(size // 2 - 2)
    return b"{" + half + b"," + half + b"}"


APPLIED: Final[dict[str, Callable[[int], bytes]]] = {
    "real entries": _entries(lambda n: _with_evidence(f"{n:064x}", "advert")),
    "short keys": _entries(lambda n: _confirmed(_key(n))),
    "short wide keys": _entries(lambda n: _confirmed(_wide(n))),
    "short keys, each with evidence": _entries(lambda n: _with_evidence(_key(n), _key(n * 7))),
    "short wide keys, each with evidence": _entries(lambda n: _with_evidence(_wide(n), _wide(n))),
    "keys and evidence of five characters, one wide": _entries(
        lambda n: _with_evidence(_key(n) + _EMOJI, _key(n) + _EMOJI)
    ),
    "keys of 33 characters, one wide": _entries(
        lambda n: _with_evidence(_key(n) * 8 + _EMOJI, _key(n) * 15 + _EMOJI)
    ),
    "one key, ever other evidence": _entries(lambda n: _with_evidence("a", _key(n))),
    "evidence of 4,001 characters, one wide": _entries(
        lambda n: _with_evidence(_key(n), _key(n) * 1000 + _EMOJI)
    ),
    "one evidence as large as the file": _filled(
        '{"entries":[{"public_key":"a","status":"confirmed","evidence":"', "x", _EMOJI + '"}]}'
    ),
    "two wide fields, nothing to write": _entries(
        lambda n: f'{{"status":"{_key(n)}{_EMOJI}","evidence":"a{_EMOJI}"}}'
    ),
    "a large unknown field": _filled('{"x":"', "y", '","entries":[]}'),
    "an unknown list of numbers": _between(lambda _: "1", '{"x":[', _TAIL),
    "one field again and again": _between(lambda _: '"status":"ab"', _HEAD + "{", "}" + _TAIL),
}
"""Those that are snapshots, and cost little enough."""

REFUSED: Final[dict[str, Callable[[int], bytes]]] = {
    "empty entries": _entries(lambda _: "{}"),
    "entries of null": _entries(lambda _: "null"),
    "entries with an unknown field": _entries(lambda _: '{"x":0}'),
    "entries of two letters": _entries(lambda _: '{"status":"ab"}'),
    "entries of one emoji": _entries(lambda _: f'{{"status":"{_EMOJI}"}}'),
    "empty entries, twice": _twice,
}
"""Those that are snapshots, and would cost too much."""

MALFORMED: Final[dict[str, Callable[[int], bytes]]] = {
    "entries of 1": _entries(lambda _: "1"),
    "the last entry is wrong": _between(lambda n: _confirmed(_key(n)), _HEAD, ',{"status":1}]}'),
    "a time as large as the file": _filled('{"writtenAt":"', "x", '"}'),
    "the same with an emoji": _filled('{"writtenAt":"', "x", _EMOJI + '"}'),
    "the same, escaped": _filled('{"writtenAt":"', r"\n", r'\ud83d\ude00"}'),
    "a wrong time beside many entries": _between(
        lambda n: _confirmed(_key(n)), _HEAD, '],"writtenAt":"yesterday"}'
    ),
    "lists in lists": _filled('{"x":', "[", ""),
    "objects in objects": _filled('{"entries":[', '{"x":', ""),
    "NULs": _filled("", "\0", ""),
    "no UTF-8 at the end": lambda size: b'{"x":"' + b"y" * (size - 10) + b'\xff"}',
    "a number as large as the file": _filled('{"entries":[{"status":', "1", "}]}"),
}
"""Those that are none."""

ALL: Final = {**APPLIED, **REFUSED, **MALFORMED}
