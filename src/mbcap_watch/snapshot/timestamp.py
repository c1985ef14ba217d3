"""`writtenAt`: RFC 3339 with nanoseconds, kept as text because `datetime` would round it."""

from __future__ import annotations

import calendar
import re
import time

# Go's zero time, which a Go publisher leaves behind when it set no time at all.
ZERO = "0001-01-01T00:00:00Z"

_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII
)


def is_valid(text: str) -> bool:
    """Whether `text` is an RFC 3339 time as Go's `time.Time` reads it.

    Upper-case `T` and `Z`, seconds 0 to 59, any number of fraction digits, a real calendar date.
    Source: RFC 3339 section 5.6, less what Go's parser leaves out (lower case, leap seconds).
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        return False
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    return (
        1 <= month <= 12
        and 1 <= day <= calendar.monthrange(year, month)[1]
        and hour < 24
        and minute < 60
        and second < 60
        and int(match[9] or 0) < 24
        and int(match[10] or 0) < 60
    )


def canonical(text: str) -> str:
    """Return a valid time as Go prints it: no trailing zeros, nanoseconds at most, `Z` for +00:00.

    Source: Go's `time.RFC3339Nano` layout ("removes trailing zeros from the seconds field").
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    fraction = (match[7] or "")[:9].rstrip("0")
    offset = f"{match[8]}{match[9]}:{match[10]}" if match[8] else "Z"
    if offset[1:] == "00:00":
        offset = "Z"
    return text[:19] + ("." + fraction if fraction else "") + offset


def now() -> str:
    """Return the current UTC time with nanoseconds, as Go prints it."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return canonical(f"{stamp}.{nanoseconds:09d}Z")
