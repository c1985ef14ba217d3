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


def span(seconds: float) -> str:
    """Return a duration for people."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if abs(seconds) < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
