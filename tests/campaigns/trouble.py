"""What makes life hard for all bridges of a round of `mishaps.py`, beside its sequences."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import anyio
import pytest

from fuse import fuse

if TYPE_CHECKING:
    import random
    from collections import Counter
    from collections.abc import Callable

    from campaigns.mishaps import Place
    from processes import Process

MAX_QUEUED: Final = Path("/proc/sys/fs/inotify/max_queued_events")


class Trouble:
    """No trouble; the others are made of it.

    Attributes:
        far: where things happen; `near` where the bridges see them.
        prefix: of the command that runs the bridges.

    """

    def __init__(self, base: Path, dice: random.Random, tally: Counter[str]) -> None:
        self.far = self.near = base / "far"
        self.far.mkdir()
        self.dice, self.tally = dice, tally
        # Root may read every directory, unless it gives up these capabilities.
        without = "-dac_override,-dac_read_search"
        self.prefix = ["setpriv", f"--bounding-set={without}", "--inh-caps=-all", "--"]
        if os.geteuid() or subprocess.run([*self.prefix, "true"], check=False).returncode:
            self.prefix = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def go_on(self, host: Process) -> None:
        """Make trouble again and again beside the sequences, until this is cancelled."""

    async def then(self, host: Process, places: list[Place]) -> bool:
        """Make trouble between the sequences, and publish; return whether anything was done."""
        return False


class Mounted(Trouble):
    """The directories are behind a FUSE filesystem, which may go and come back."""

    def __init__(
        self, base: Path, dice: random.Random, tally: Counter[str], *, kind: str, anew: bool
    ) -> None:
        super().__init__(base, dice, tally)
        self.near = base / "near"
        self.near.mkdir()
        self.prefix = []
        self._kind, self._anew, self._stack = kind, anew, ExitStack()

    def _mount(self) -> None:
        self._process = self._stack.enter_context(fuse(self._kind, self.far, self.near))

    def __enter__(self) -> Self:
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def go_on(self, host: Process) -> None:
        while self._anew:
            await anyio.sleep(self.dice.uniform(0, 1))
            if self.dice.random() < 0.5:  # every call fails, until it is unmounted
                self._process.kill()
                await anyio.sleep(self.dice.uniform(0, 0.2))
            self._stack.close()
            await anyio.sleep(self.dice.choice((0, 0, 0.2)))
            self._mount()
            self.tally["times mounted anew"] += 1


class Overflow(Trouble):
    """The process is stopped while more happens than the kernel keeps: the last event is lost."""

    async def then(self, host: Process, places: list[Place]) -> bool:
        most = int(MAX_QUEUED.read_text())
        if most > 50_000:
            pytest.skip("the kernel's queue is too long to overflow it here")
        known, few = overflows(host), self.dice.sample(places, min(len(places), 2))
        await anyio.sleep(0.5)  # until the sweep has put the watch on the present directory
        host.popen.send_signal(signal.SIGSTOP)
        try:
            for place in few:
                one, other = place.directory / "one", place.directory / "other"
                one.touch()
                for _ in range(most // 2 + 10):  # a rename to and fro is two events
                    os.rename(one, other)
                    os.rename(other, one)
            for place in places:
                place.publish_at_last()
        finally:
            host.popen.send_signal(signal.SIGCONT)
        # A busy machine takes long to read that many.
        with anyio.move_on_after(30):
            while overflows(host) < known + len(few):
                await anyio.sleep(0.1)
        self.tally["queues overflowed"] += overflows(host) - known
        return True


def overflows(host: Process) -> int:
    """Return how often watchdog has logged one."""
    return host.said.count("queue overflowed")


class Limit(Trouble):
    """The limit of a user namespace of its own is reached, and lifted. The machine's stays."""

    def __init__(self, base: Path, dice: random.Random, tally: Counter[str], *, kind: str) -> None:
        super().__init__(base, dice, tally)
        self._file = f"/proc/sys/user/max_inotify_{kind}"
        script = f'echo 0 > {self._file} && exec "$@"'
        self.prefix = ["unshare", "-U", "-r", "sh", "-c", script, "sh"]
        tried = subprocess.run([*self.prefix, "true"], check=False, capture_output=True)
        if tried.returncode:
            pytest.skip("cannot make a user namespace with a limit here")

    async def go_on(self, host: Process) -> None:
        try:
            while True:
                await anyio.sleep(self.dice.uniform(0.05, 0.5))
                self._limit(host, self.dice.choice((0, 1, 5, 1000)))
                self.tally["times a limit was set"] += 1
        finally:
            self._limit(host, 1000)

    def _limit(self, host: Process, most: int) -> None:
        inside = ["nsenter", "-t", f"{host.popen.pid}", "-U", "sh", "-c"]
        subprocess.run([*inside, f"echo {most} > {self._file}"], check=True)


class Descriptors(Trouble):
    """Few descriptors are left, or none, and then there are enough."""

    async def go_on(self, host: Process) -> None:
        limit = partial(resource.prlimit, host.popen.pid, resource.RLIMIT_NOFILE)
        usual = limit()
        try:
            while True:
                await anyio.sleep(self.dice.uniform(0.1, 0.4))
                # A limit forbids numbers, and leaves alone what is open.
                highest = max(map(int, os.listdir(f"/proc/{host.popen.pid}/fd")))
                limit((highest + self.dice.randrange(10), usual[1]))
                self.tally["times a limit was set"] += 1
                await anyio.sleep(self.dice.uniform(0.05, 0.3))
                limit(usual)
        finally:
            limit(usual)


def mode_of(host: Process, number: int) -> str | None:
    """Return how a bridge notices changes now, as it has said."""
    said = [line for line in list(host.lines) if line.startswith(f"{number} ")]
    return said[-1].split()[1] if said else None


TROUBLES: Final[dict[str, Callable[[Path, random.Random, Counter[str]], Trouble]]] = {
    "inotify": Trouble,
    "poll": Trouble,
    "bindfs": partial(Mounted, kind="bindfs", anew=False),
    "sshfs": partial(Mounted, kind="sshfs", anew=False),
    "bindfs mounted anew": partial(Mounted, kind="bindfs", anew=True),
    "sshfs mounted anew": partial(Mounted, kind="sshfs", anew=True),
    "overflow": Overflow,
    "watches": partial(Limit, kind="watches"),
    "instances": partial(Limit, kind="instances"),
    "descriptors": Descriptors,
}
