"""Random sequences of what can happen to the directory, with a running bridge: none is missed.

A hundred by default would take a quarter of a minute on each Python; `make campaign` runs
thousands.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbcap_watch import snapshot_path
from support import (
    at_rest,
    bridge,
    document,
    make_database,
    open_descriptors,
    put,
    read_rows,
    threads_beside,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SWEEP = 0.05
numbers = itertools.count()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def content() -> bytes:
    return document(("aa11", "confirmed", f"e{next(numbers)}"))


class Place:
    """The directory, and what is done to it."""

    def __init__(self, base: Path) -> None:
        self.directory = base / "mbcap-snapshot"
        self.file = self.directory / "snapshot.json"
        self.away = base / "away"
        self.other = base / "other"

    def publish(self) -> None:
        if self.directory.is_dir() and not self.file.is_dir():
            put(content(), self.file)

    def write_in_place(self) -> None:
        if self.directory.is_dir() and not self.file.exists():
            self.file.unlink(missing_ok=True)
            self.file.write_bytes(content())

    def tear(self) -> None:
        if self.directory.is_dir() and not self.file.is_dir():
            put(content()[:30], self.file)

    def delete_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)

    def delete_directory(self) -> None:
        remove(self.directory)

    def make_directory(self) -> None:
        if not self.directory.is_dir():
            remove(self.directory)
            self.directory.mkdir()

    def move_away(self) -> None:
        if os.path.lexists(self.directory):
            remove(self.away)
            self.directory.rename(self.away)

    def move_back(self) -> None:
        if os.path.lexists(self.away):
            remove(self.directory)
            self.away.rename(self.directory)

    def turn_link(self) -> None:
        remove(self.directory)
        self.other.mkdir(exist_ok=True)
        self.directory.symlink_to(self.other)

    def file_for_directory(self) -> None:
        remove(self.directory)
        self.directory.write_bytes(b"")

    def fifo_for_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)
            os.mkfifo(self.file)

    def directory_for_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)
            self.file.mkdir()

    def dangling_link_for_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)
            self.file.symlink_to("nowhere")


MISHAPS: list[Callable[[Place], None]] = [
    Place.publish,
    Place.write_in_place,
    Place.tear,
    Place.delete_file,
    Place.delete_directory,
    Place.make_directory,
    Place.move_away,
    Place.move_back,
    Place.turn_link,
    Place.file_for_directory,
    Place.fifo_for_file,
    Place.directory_for_file,
    Place.dangling_link_for_file,
]

steps = st.tuples(st.sampled_from(MISHAPS), st.sampled_from([0, 0, 0.001, 0.02, SWEEP]))


@pytest.mark.slow
@given(st.lists(steps, min_size=10, max_size=10), st.sampled_from(["auto", "poll"]))
@settings(max_examples=max(20, settings().max_examples // 5))
def test_no_sequence_of_mishaps_hides_the_next_snapshot(
    sequence: list[tuple[Callable[[Place], None], float]], mode: str
) -> None:
    async def go(base: Path) -> None:
        database = make_database(base / "m.db", [("nodes", "aa11", 0, None)])
        place = Place(base)
        place.make_directory()
        clocks = {"sweep_interval": f"{SWEEP}s", "poll_interval": "20ms"}
        async with bridge(database, mode=mode, **clocks) as results:
            for mishap, pause in sequence:
                mishap(place)
                await anyio.sleep(pause)
            place.make_directory()
            if place.file.is_dir():
                place.file.rmdir()
            put(last := content(), snapshot_path(database))
            evidence = last.split(b'"evidence": "')[1].split(b'"')[0].decode()
            await until(lambda: ("nodes", "aa11", 2, evidence) in read_rows(database))
            if mode == "auto":
                await until(lambda: results.state.mode == "inotify", "the watch")

    threads, descriptors = at_rest(), len(open_descriptors())
    with tempfile.TemporaryDirectory() as base, contextlib.chdir("/"):
        anyio.run(go, Path(base))
    wait_until(lambda: not threads_beside(threads), "an end of all threads")
    wait_until(lambda: len(open_descriptors()) <= descriptors, "closing of all descriptors")
