"""`writtenAt`: RFC 3339 with nanoseconds, kept as text because `datetime` would round it."""

from __future__ import annotations

import calendar
import re
import time

# Go's zero time, which a Go publisher leaves behind when it set no time at all.
ZERO = "0001-01-01T00:00:00Z"

_HOUR, _SIXTY = r"(?:[01]\d|2[0-3])", r"[0-5]\d"
_RFC3339 = re.compile(
    rf"(\d{{4}})-(0[1-9]|1[0-2])-(\d\d)T{_HOUR}:{_SIXTY}:{_SIXTY}"
    rf"(?:\.(\d+))?(?:Z|([+-]{_HOUR}:{_SIXTY}))",
    re.ASCII,
)


def is_valid(text: str) -> bool:
    """Whether `text` is an RFC 3339 time as Go's `time.Time` reads it.

    Upper-case `T` and `Z`, seconds 0 to 59, any number of fraction digits, a real calendar date.
    Source: RFC 3339 section 5.6, less what Go's parser leaves out (lower case, leap seconds).
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        return False
    year, month, day = map(int, match.groups()[:3])
    return 1 <= day <= calendar.monthrange(year, month)[1]


def canonical(text: str) -> str:
    """Return a valid time as Go prints it: no trailing zeros, nanoseconds at most, `Z` for +00:00.

    Source: Go's `time.RFC3339Nano` layout ("removes trailing zeros from the seconds field").
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    fraction, offset = (match[4] or "")[:9].rstrip("0"), match[5]
    zone = offset if offset and offset[1:] != "00:00" else "Z"
    return text[:19] + ("." + fraction if fraction else "") + zone


def now() -> str:
    """Return the current UTC time with nanoseconds, as Go prints it."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return canonical(f"{stamp}.{nanoseconds:09d}Z")
