"""`Finding`: one line of what `check` has to say."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Final, Literal

Level = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing.

    Attributes:
        level: `problem` (it does not work), `warning` (it works, but not well, or not for long),
            or `ok`.
        subject: what was looked at, in a word or two.
        text: what was found.
        remedy: what to do; empty when there is nothing to be done.

    """

    level: Level
    subject: str
    text: str
    remedy: str = ""


ok: Final = partial(Finding, "ok")
warning: Final = partial(Finding, "warning")
problem: Final = partial(Finding, "problem")


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:  # noqa: PLR2004 - that is what the units mean
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Return a duration for people: `0.3 s`, `3 s`, `2 min 5 s`, `4 h 10 min`, `3 d 2 h`."""
    if seconds < 1:
        return f"{round(max(0.0, seconds), 2):g} s"
    whole = round(seconds)
    for length, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= length:
            rest = whole % length // smaller
            return f"{whole // length} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"


def ago(seconds: float) -> str:
    """Return how long ago something was, for people."""
    return f"{duration(seconds)} ago"
