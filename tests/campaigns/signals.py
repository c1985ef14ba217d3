"""SIGTERM and SIGINT at any moment of a daemon: it ends with exit code 0 within 5 seconds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from campaigns.campaign import Campaign
from campaigns.published import Published
from support import DEADLINE, connect, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(sys.executable).with_name("mbcap-watch")
COMMANDS = [[sys.executable, "-m", "mbcap_watch"], *([[str(SCRIPT)]] if SCRIPT.exists() else [])]
NODES = 300
SIGNALS = 25
PROMISE = 5.0

# How an interpreter ends that a signal meets before the first line of ours: by the signal itself,
# or, as it catches SIGINT itself, with KeyboardInterrupt, or with an error while it loads `site`.
ENDS_OF_AN_INTERPRETER = {0, -signal.SIGTERM, -signal.SIGINT, 130, 1}


class End(NamedTuple):
    """How a daemon ended, how long after the first signal, and which socket it has left."""

    caught: bool
    code: int
    seconds: float
    said: str
    left: list[Path]


def catches_sigterm(process: subprocess.Popen[bytes]) -> bool:
    """Return whether SIGTERM has a handler: the last thing that our first lines do (proc(5))."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """Make a pipe that nobody reads, and fill it."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    # Opened anew, so that it is not the daemon's end that does not block.
    filler = os.open(f"/proc/self/fd/{write_end}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(filler, b"\n"):
            pass
    try:
        yield write_end
    finally:
        for descriptor in (filler, read_end, write_end):
            os.close(descriptor)


def is_latest(published: Published) -> bool:
    with connect(published.database) as connection:
        return published.judge(connection) == 1


@contextlib.contextmanager
def daemon(
    published: Published, way: list[str], *options: str, stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon; its log goes to a file beside the database, or to a descriptor."""
    command = [*way, "run", f"--database={published.database}", "--log-level=debug", *options]
    runtime = published.database.with_name("runtime")
    runtime.mkdir(exist_ok=True)
    with (
        open(published.database.with_name("log.txt"), "wb") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL if stderr is None else stderr,
            stderr=log if stderr is None else stderr,
            env={**os.environ, "RUNTIME_DIRECTORY": str(runtime)},
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def end_one(published: Published, seed: str, start: float, tally: Counter[str]) -> End:
    """Start a daemon and end it by signals."""
    dice = random.Random(seed)
    moment = dice.choice(["at the start", "at the start", "in a sync", "while the lock was held"])
    is_full = dice.random() < 0.25
    options = [f"--batch-rows={dice.choice([1, 20])}", *(["--json"] if dice.random() < 0.3 else [])]
    signums = [
        dice.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(dice.choice([1, 1, 1, 2, 5]))
    ]
    published.publish()
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(full_pipe()) if is_full else None
        way = dice.choice(COMMANDS)
        process = stack.enter_context(daemon(published, way, *options, stderr=stderr))
        if moment == "at the start":
            if dice.random() < 0.3:
                wait_until(lambda: catches_sigterm(process), "our first line")
            time.sleep(dice.uniform(0, dice.choice([0.05, 0.2, 1.2, 1.2]) * start))
        else:
            wait_until(lambda: is_latest(published), "the first sync")
            if moment == "while the lock was held":
                neighbour = stack.enter_context(connect(published.database, timeout=DEADLINE))
                neighbour.execute("BEGIN IMMEDIATE")
            published.publish()
            time.sleep(dice.choice([0, dice.uniform(0, 0.05), dice.uniform(0, 0.5)]))
        caught, sent = catches_sigterm(process), time.monotonic()
        process.send_signal(signums[0])
        for signum in signums[1:]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.choice([0, 0.001, 0.02, 0.2]))
            process.send_signal(signum)
        try:
            code = process.wait(5 if is_full and not caught else DEADLINE)
        except subprocess.TimeoutExpired:
            if caught or not is_full:
                raise
            # The interpreter tells of SIGINT before our first line, and nobody reads it.
            tally["the interpreter told of it, and nobody read that"] += 1
            return End(caught, -signal.SIGINT, 0.0, "", [])
        seconds = time.monotonic() - sent
    tally.update([moment, "nobody read the log"] if is_full else [moment])
    said = published.database.with_name("log.txt").read_text()
    left = [*published.database.with_name("runtime").rglob(f"*-{process.pid}-*.sock")]
    return End(caught, code, seconds, said, left)


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    published = Published(base / "m.db", NODES, random.Random(number))
    tally = Counter[str]()
    published.publish()
    started = time.monotonic()
    with daemon(published, COMMANDS[0]):
        wait_until(lambda: is_latest(published), "the first sync")
    start = time.monotonic() - started
    for trial in range(min(wanted, SIGNALS)):
        seed = f"{number}.{trial}"
        end = end_one(published, seed, start, tally)
        if end.seconds > PROMISE:
            # Others may have kept the machine from running it: once more.
            tally["took longer than 5 s, once"] += 1
            end = end_one(published, seed, start, tally)
        require_good(end)
        with connect(published.database, timeout=0) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            published.judge(connection)
        tally["daemons"] += 1
        if end.caught:
            bound = next(limit for limit in (0.2, 1, 2, 4, PROMISE) if end.seconds <= limit)
            tally[f"ended within {bound:g} s"] += 1
        else:
            tally[f"met before our first line: exit {end.code}"] += 1
    return tally


def require_good(end: End) -> None:
    if end.caught:
        assert (end.code, "Traceback" in end.said) == (0, False), end
        # After four seconds it ends at once, and tidies nothing.
        assert end.left == [] or end.seconds > 2, end
    assert end.code in ENDS_OF_AN_INTERPRETER, end
    assert end.seconds <= PROMISE, end


CAMPAIGN = Campaign(
    about="SIGTERM and SIGINT at any moment from the first instruction on: exit 0 within 5 s",
    unit="daemons",
    full=2_000,
    short=4,
    play=play,
)
