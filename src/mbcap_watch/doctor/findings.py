"""`Finding`: one thing that was found. `catalogue.toml` has every kind, with its remedy."""

from __future__ import annotations

import functools
import os.path
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from mbcap_watch.settings import Settings

Severity = Literal["ok", "warning", "problem"]


class Kind(NamedTuple):
    """A kind of finding, as `catalogue.toml` explains it."""

    severity: Severity
    subject: str
    sentence: str
    remedy: str


CATALOGUE: Final = Path(__file__).with_name("catalogue.toml")


@functools.cache
def catalogue() -> dict[str, Kind]:
    """Return the kinds of findings by code."""
    sections = tomllib.loads(CATALOGUE.read_text(encoding="utf-8")).values()
    return {code: Kind(*kind) for kinds in sections for code, kind in kinds.items()}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was found.

    Attributes:
        code: its name in the catalogue, for programs; `ok` if all is well.
        severity: `problem`: it does not work; `warning`: it does, but not well, or not for long.
        subject: the thing that was examined, in a word or two.

    """

    code: str
    severity: Severity
    subject: str
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Finding:
    """Return that all is well with a thing."""
    return Finding("ok", "ok", subject, text)


class Installation(NamedTuple):
    """A database, a snapshot directory, perhaps a file of settings: findings are about them."""

    database: str
    snapshot_dir: str
    config: str = ""

    @classmethod
    def of(cls, settings: Settings, config: str | Path | None = None) -> Installation:
        """Return the installation that these settings name."""
        return cls(str(settings.database), str(settings.snapshot_dir), str(config or ""))

    def finding(
        self, code: str, text: str = "", *, remedy: str = "", subject: str = "", **details: Any
    ) -> Finding:
        """Return a finding of the catalogue, with `details` for the names in braces.

        A text, remedy or subject that is given replaces that of the catalogue.
        """
        kind = catalogue()[code]
        paths = self._asdict()
        paths["directory"] = os.path.dirname(self.database)
        paths["snapshot_parent"] = os.path.dirname(self.snapshot_dir)
        names = paths | details
        commands = {name: quote(path) for name, path in paths.items()}
        commands |= {name: self._command(name) for name in ("check", "status")}
        return Finding(
            code,
            kind.severity,
            subject or kind.subject,
            text or kind.sentence.format_map(names),
            remedy or kind.remedy.format_map(names | commands),
        )

    def _command(self, name: str) -> str:
        words = ["mbcap-watch", name, "--database", quote(self.database)]
        words += ["--snapshot-dir", quote(self.snapshot_dir)]
        return " ".join(words + (["--config", quote(self.config)] if self.config else []))


def quote(path: str | Path) -> str:
    """Return a path as a shell takes it, in quotes only where it must be."""
    return shlex.quote(str(path))


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
    """Return how long ago something was, for people; of a moment to come, how far away it is."""
    return f"{duration(seconds)} ago" if seconds >= 0 else f"{duration(-seconds)} in the future"
