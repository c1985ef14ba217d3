"""A host cancels what it has called, at every turn of its loop: nothing is left, all goes on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import sys
import time
import warnings
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiosqlite
import anyio
import uvloop

from campaigns.campaign import Campaign
from campaigns.hosts import CALLS, LENDING, Call, Enough, Host
from campaigns.published import Published
from campaigns.strikes import LOOPS, SEEN, WAYS, Aim, Way, everything
from mbcap_watch import Settings
from support import (
    DEADLINE,
    at_rest,
    connect,
    open_descriptors,
    other_process,
    read_line,
    threads_beside,
    wait_until,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

TURNS: Final = 500
SEEDS: Final = 10
NODES: Final = 30

# ------------------------------------------------------------------------------ the judge

# A neighbour who wants the lock at once, and looks at what is there.
NEIGHBOUR = """
    import json, sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    for patience in sys.stdin:
        try:
            connection.execute(f"PRAGMA busy_timeout = {patience}")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            # A cursor that somebody has left open keeps the WAL from being emptied.
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            [check] = connection.execute("PRAGMA quick_check").fetchone()
            print(json.dumps({"busy": busy, "check": check}), flush=True)
        except sqlite3.Error as exc:
            print(json.dumps({"error": repr(exc)}), flush=True)
"""


def ask(neighbour: subprocess.Popen[str], patience: int) -> None:
    """Let the neighbour try for so many milliseconds; it must find everything in order."""
    assert neighbour.stdin is not None
    neighbour.stdin.write(f"{patience}\n")
    neighbour.stdin.flush()
    said = json.loads(read_line(neighbour))
    assert said == {"busy": 0, "check": "ok"}, said


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No thread, descriptor, warning or unheard error is left at the end."""
    threads, descriptors, unheard = at_rest(), len(open_descriptors()), list[object]()
    hook, sys.unraisablehook = sys.unraisablehook, unheard.append
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        sys.unraisablehook = hook
    assert unheard == []
    wait_until(lambda: not threads_beside(threads), f"an end of all threads but {threads}")
    wait_until(lambda: len(open_descriptors()) <= descriptors, "closing of all descriptors")


# ------------------------------------------------------------------------------ one cancellation


class Trial(NamedTuple):
    """What is cancelled, how, on which loop, and when."""

    way: Way
    call: Call
    loop: str
    turn: int

    def __str__(self) -> str:
        return f"{self.way.__name__} {self.call.__name__} {self.loop}, turn {self.turn}"


class Stage(NamedTuple):
    """What the trials of a round have in common."""

    settings: Settings
    published: Published
    neighbour: subprocess.Popen[str]
    options: dict[str, Any]  # of the host's connection
    pace: float  # of the host's other task, in seconds


def cancel(trial: Trial, stage: Stage) -> float:
    """Cancel, look at what is left, and call again; return how long the end took, in seconds."""
    complaints = list[dict[str, Any]]()
    with (
        nothing_left(),
        asyncio.Runner(loop_factory=LOOPS[trial.loop]) as runner,
        contextlib.ExitStack() as stack,
    ):
        loop: Any = runner.get_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        host = Host(stage.settings, stage.published)
        if trial.call in LENDING:
            host.connection = runner.run(opened(stage))
            stack.callback(lambda: runner.run(host.lent.close()))
        stage.published.publish()
        blow, raised = Blow(trial, host, loop), None
        try:
            runner.run(blow.main(stage.pace))
        except (Exception, asyncio.CancelledError, KeyboardInterrupt) as exc:  # noqa: BLE001 - judged below
            raised = exc
        # Who cancels all tasks takes from ours the wait for a statement, which ends all the same.
        is_lent = trial.call in LENDING
        ask(stage.neighbour, 5000 if trial.way is everything and is_lent else 0)
        assert blow.struck_at, "the loop has not taken so many turns"
        assert blow.seconds < DEADLINE, "the cancellation was lost"
        assert type(raised) in SEEN.get(trial.way, {asyncio.CancelledError}), repr(raised)
        assert blow.left == set(), "tasks are left"
        with connect(stage.settings.database) as connection:
            stage.published.judge(connection)
        runner.run(go_on(trial.call, host))
        with connect(stage.settings.database) as connection:
            stage.published.require_latest(connection)
        assert complaints == []
    return blow.seconds


async def opened(stage: Stage) -> aiosqlite.Connection:
    return await aiosqlite.connect(stage.settings.database, **stage.options)


class Blow:
    """Calls until the cancellation comes, at a turn of the loop."""

    def __init__(self, trial: Trial, host: Host, loop: Any) -> None:
        self._trial, self._host, self._loop = trial, host, loop
        self.struck_at = self.seconds = 0.0
        self.left = set[asyncio.Task[Any]]()

    async def main(self, pace: float) -> None:
        main = asyncio.current_task()
        assert main is not None
        beat = self._loop.create_task(beats(pace))
        try:
            with anyio.CancelScope() as scope:
                async with asyncio.timeout(None) as timeout:
                    self._loop.strike = partial(self._strike, Aim(main, scope, timeout))
                    self._loop.count, self._loop.strike_at = 0, self._trial.turn
                    while not self._host.is_over:
                        await self._trial.call(self._host)
        finally:
            self._loop.strike_at = -1
            self.seconds = time.monotonic() - self.struck_at
            self.left = asyncio.all_tasks() - {main, beat}
            beat.cancel()

    def _strike(self, aim: Aim) -> None:
        if not aim.main.done():
            self.struck_at = time.monotonic()
            self._loop.call_later(DEADLINE, self._give_up, aim)
            self._trial.way(aim)

    def _give_up(self, aim: Aim) -> None:
        self._host.is_over = True
        aim.main.cancel()


async def beats(pace: float) -> None:
    """Be another task of the host, which keeps its loop turning."""
    for beat in itertools.count():
        if beat % 10 == 0:
            time.sleep(pace)
        await asyncio.sleep(0)


async def go_on(call: Call, host: Host) -> None:
    """Use the connection and call again, as if nothing had been cancelled."""
    assert not host.lock.locked()
    if host.connection is not None:
        assert not host.connection.in_transaction
        await host.connection.execute("UPDATE nodes SET last_seen = last_seen || '!'")
        await host.connection.commit()
    host.is_over = True
    with contextlib.suppress(Enough):
        await call(host)
    assert host.last is not None
    assert host.last.outcome in ("applied", "unchanged"), host.last


# ------------------------------------------------------------------------------ a round

COMBINATIONS: Final = [*itertools.product(range(SEEDS), WAYS, CALLS, LOOPS)]


def trials(number: int, wanted: int) -> Iterator[Trial]:
    """Return every turn of one combination; or, of few that are wanted, some of each."""
    if wanted >= TURNS:
        seed, way, call, loop = COMBINATIONS[number % len(COMBINATIONS)]
        variant = WAYS[way][seed % len(WAYS[way])]
        for turn in range(1, TURNS + 1):
            yield Trial(variant, call, loop, turn)
    else:
        dice = random.Random(number)
        each = [*itertools.product(itertools.chain(*WAYS.values()), CALLS, LOOPS)]
        dice.shuffle(each)
        for variant, call, loop in itertools.islice(itertools.cycle(each), wanted):
            yield Trial(variant, call, loop, dice.randint(1, TURNS))


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    dice, tally = random.Random(number), Counter[str]()
    published = Published(base / "m.db", NODES, dice)
    settings = Settings.from_mapping(
        {
            "database": published.database,
            "mode": dice.choice(["inotify", "poll"]),
            "poll_interval": 0.01,
            "debounce": dice.choice([0, 0.01]),
            "batch_rows": dice.choice([3, 10, 500]),
        }
    )
    kinds: list[dict[str, Any]] = [{}, {"isolation_level": None}, {"isolation_level": "IMMEDIATE"}]
    options = dice.choice(kinds)
    pace = dice.choice([0, 0.00005, 0.0002])
    uvloop.run(asyncio.sleep(0))  # libuv opens descriptors at its first use; they are no leak
    with other_process(NEIGHBOUR, str(published.database)) as neighbour:
        stage = Stage(settings, published, neighbour, options, pace)
        for trial in trials(number, wanted):
            try:
                seconds = cancel(trial, stage)
            except BaseException as exc:
                exc.add_note(f"{trial}; {settings}; {options}; {pace}")
                raise
            tally.update(["cancellations", trial.call.__name__, trial.way.__name__])
            tally["took longer than 2 s"] += seconds > 2
    return tally


CAMPAIGN = Campaign(
    about="a host cancels a call at any turn of its loop: nothing is left behind, each row holds a"
    " published value, and the next call works",
    unit="cancellations",
    full=TURNS * len(COMBINATIONS),
    short=70,
    play=play,
)
