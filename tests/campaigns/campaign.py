"""What a campaign is, and how one is played: round after round, until so many units are done."""

from __future__ import annotations

import json
import multiprocessing
import platform
import sqlite3
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from support import interrupted_as_usual

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = Path(__file__).parent

# A campaign that fails so often has made its point.
MOST_FAILURES: Final = 20


class Campaign(NamedTuple):
    """One kind of trial, repeated.

    Attributes:
        about: what is done, and what has to be true afterwards; one line.
        unit: what is counted. It is a key of the tally that a round returns.
        full: how many units are the full size.
        short: how many units `make test` does.
        play: plays one round. It gets an empty directory, the number of the round, from which all
            its dice come, and how many units are wanted; it may do fewer or more. It returns how
            often what happened, and raises if anything went wrong.

    """

    about: str
    unit: str
    full: int
    short: int
    play: Callable[[Path, int, int], Counter[str]]


def names() -> list[str]:
    """Return the names of all campaigns: they are the modules here that have a `CAMPAIGN`."""
    modules = {path.stem for path in HERE.glob("[a-z]*.py")} - {"campaign"}
    return sorted(name for name in modules if "\nCAMPAIGN" in (HERE / f"{name}.py").read_text())


def load(name: str) -> Campaign:
    found: Campaign = import_module(f"campaigns.{name}").CAMPAIGN
    return found


def play_round(name: str, number: int, wanted: int) -> Counter[str]:
    """Play one round in a directory of its own."""
    interrupted_as_usual()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as base:
        return load(name).play(Path(base), number, wanted)


class Failure(NamedTuple):
    """A round that went wrong: `python -m campaigns NAME --round NUMBER` plays it again."""

    round: int
    what: str


class Report:
    """What a campaign did so far: a JSON file, written after every few rounds.

    A campaign that is started again goes on where its report ends.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.campaign = path, name, load(name)
        self.tally: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.rounds, self.seconds, self.commits = 0, 0.0, list[str]()
        if path.exists():
            found = json.loads(path.read_text())
            self.tally.update(found["tally"])
            self.failures = [Failure(**each) for each in found["failures"]]
            self.rounds, self.seconds = found["rounds"], found["seconds"]
            self.commits = found["commits"]
        if (commit := _commit()) not in self.commits:
            self.commits.append(commit)

    @property
    def done(self) -> int:
        return self.tally[self.campaign.unit]

    def save(self) -> None:
        found: dict[str, Any] = {
            "campaign": self.name,
            "about": self.campaign.about,
            "unit": self.campaign.unit,
            "full": self.campaign.full,
            "done": self.done,
            "failures": [each._asdict() for each in self.failures],
            "tally": dict(sorted(self.tally.items())),
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "commits": self.commits,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "kernel": platform.release(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(self.path)

    def __str__(self) -> str:
        unit, minutes = self.campaign.unit, self.seconds / 60
        counted = f"{self.done:,} {unit}, {len(self.failures)} failures, {minutes:.1f} minutes"
        others = {key: count for key, count in sorted(self.tally.items()) if key != unit}
        return f"{self.name}: {counted}" + "".join(f"; {n:,} {key}" for key, n in others.items())


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def play(
    report: Report,
    wanted: int,
    jobs: int,
    tell: Callable[[object], None],
    one: Callable[[str, int, int], Counter[str]] = play_round,
) -> None:
    """Play rounds until `wanted` units are done in all, `jobs` of them at a time."""
    while report.done < wanted and len(report.failures) < MOST_FAILURES:
        started, known = time.monotonic(), len(report.failures)
        numbers = range(report.rounds, report.rounds + jobs)
        # A pool of its own for a few rounds: what a round leaves behind in its process is gone.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            rest = wanted - report.done
            played = [pool.submit(one, report.name, number, rest) for number in numbers]
            for number, future in zip(numbers, played, strict=True):
                try:
                    report.tally += future.result()
                except BrokenProcessPool:
                    report.failures.append(Failure(number, "the process of this round died"))
                except Exception:  # noqa: BLE001 - whatever it is, it is the finding
                    report.failures.append(Failure(number, traceback.format_exc()))
        report.rounds += jobs
        report.seconds += time.monotonic() - started
        report.save()
        tell(report)
        for failure in report.failures[known:]:
            tell(f"round {failure.round}: {failure.what}")
