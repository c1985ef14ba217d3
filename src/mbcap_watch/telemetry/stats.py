"""The stats of a bridge, as frozen data: what it answers when it is asked.

Times are seconds since the epoch, intervals seconds, names with `_ms` milliseconds.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, get_args

import msgspec
from msgspec import field

from mbcap_watch.errors import QUOTED, Cause, printable
from mbcap_watch.results import Outcome, PersistResult, Reason, WatchState
from mbcap_watch.snapshot import timestamp

# Seconds beyond which a wait for the write lock counts as contended, and a hold of it as slow.
# Source: CoreScope's performance page.
CONTENDED_SECONDS: Final = 0.1
SLOW_HOLD_SECONDS: Final = 0.5

# Percentiles are of so many of the latest values; 8 bytes each.
WINDOW: Final = 1_000

# Upper bounds of a histogram's buckets, in seconds; one more bucket holds what is above.
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)

# Results kept for `top` and for a plot: of one snapshot a minute, four hours.
HISTORY: Final = 240

PARTS_OF_SUMMARY: Final = ("total", "p50", "p95", "p99", "max")


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A summary of durations, in milliseconds.

    `count`, `total` and `buckets` are of all values since the start; the rest is of the last
    `WINDOW`, and None without any. `buckets` counts the values up to each bound of `BUCKETS` and
    above the one before.
    """

    count: int = 0
    total: float = 0.0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None
    buckets: tuple[int, ...] = ()


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """The write lock, in the words of CoreScope's performance page, component `mbcap_persist`.

    `count` is how often the lock was asked for, `contention_total` how often for longer than
    `CONTENDED_SECONDS`; `slow_hold_total` how often it was held for longer than
    `SLOW_HOLD_SECONDS`. The rest is as in `Summary`.
    """

    count: int
    contention_total: int
    slow_hold_total: int
    hold_count: int
    wait_ms_total: float
    wait_ms_p50: float | None
    wait_ms_p95: float | None
    wait_ms_p99: float | None
    wait_ms_max: float | None
    hold_ms_total: float
    hold_ms_p50: float | None
    hold_ms_p95: float | None
    hold_ms_p99: float | None
    hold_ms_max: float | None
    wait_buckets: tuple[int, ...] = ()
    hold_buckets: tuple[int, ...] = ()

    @property
    def waits(self) -> Summary:
        """The waits by themselves."""
        return self._summary("wait", self.count)

    @property
    def holds(self) -> Summary:
        """The holds by themselves."""
        return self._summary("hold", self.hold_count)

    def _summary(self, what: str, count: int) -> Summary:
        fields = {name: getattr(self, f"{what}_ms_{name}") for name in PARTS_OF_SUMMARY}
        return Summary(count=count, buckets=getattr(self, f"{what}_buckets"), **fields)


class HistoryEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A result, or several alike in a row that changed nothing.

    `at` is when the last of them was; `changed` how many rows were written; `lag_ms` from the
    rename to the last committed row, None as in `Timings`; `hold_ms` the longest hold of the write
    lock, None if it was not taken; `times` how many results.
    """

    at: float
    reason: Reason
    outcome: Outcome
    changed: int = 0
    lag_ms: float | None = None
    hold_ms: float | None = None
    times: int = 1


class LastError(msgspec.Struct, frozen=True, kw_only=True):
    """The error of the latest sync that had one, which ended `at`.

    `since` is when the first of those syncs ended that have had this outcome, one after the other;
    `persists` whether no sync has gone well since.
    """

    outcome: Outcome
    error: str
    since: float
    at: float
    persists: bool
    cause: Cause | None = None


class Output(msgspec.Struct, frozen=True):
    """How something that the daemon writes to, or listens at, does.

    `problem` is what is wrong with it now, `last_good` when it last worked; None if it never has.
    """

    problem: str | None = None
    last_good: float | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `status` shows.

    Attributes:
        pid: of the process; for a client, as the kernel tells it.
        uid: whose process it is, as the kernel tells a client; else None.
        embedded_in: the program that embeds the bridge, as it was started; None for a daemon.
        sampled_at: when this was made; in JSON `sampledAt`, RFC 3339, as CoreScope writes it.
        last_apply: when a sync last compared the database, and so left it as the snapshot says.
        snapshot_written_at: `writtenAt` of the snapshot that was read last; `snapshot_time` the
            same in seconds. None if there is none, or if it has none but Go's zero time.
        failed_rows: rows refused, counted at every try.
        set_back: rows that somebody had set back between two syncs of one snapshot, counted at
            every sync; `last_set_back` how many the last such sync found, `last_set_back_at` when.
        contended_at: when the write lock was last waited for, for longer than `CONTENDED_SECONDS`.
        held: keys with a lowering that waited when the database was last compared.
        last_error: None if no sync has had an error.
        history: the last `HISTORY` results, the oldest first.
        outputs: of `log`, `ack` and `http`, those that are in use.

    """

    version: str
    pid: int
    uid: int | None = None
    embedded_in: str | None = None
    sampled_at: Annotated[datetime, msgspec.Meta(tz=True)] = field(name="sampledAt")
    started_at: float
    database: str
    snapshot_dir: str
    poll_interval: float
    sweep_interval: float
    resync: float
    watch: WatchState
    last_apply: float | None = None
    last_apply_outcome: Outcome | None = None
    snapshot_written_at: str | None = None
    snapshot_time: float | None = None
    outcomes: dict[Outcome, int] = field(
        default_factory=lambda: dict.fromkeys(get_args(Outcome), 0)
    )
    reasons: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(get_args(Reason), 0))
    changed_active: int = 0
    changed_inactive: int = 0
    failed_rows: int = 0
    set_back: int = 0
    last_set_back: int = 0
    last_set_back_at: float | None = None
    contended_at: float | None = None
    held: int = 0
    last_result: PersistResult | None = None
    last_result_at: float | None = None
    last_error: LastError | None = None
    lag_ms: Summary = Summary()
    mbcap_persist: Lock
    history: tuple[HistoryEntry, ...] = ()
    outputs: dict[str, Output] = {}

    @property
    def process(self) -> str:
        """The process for people: its number, whose it is, and which program embeds the bridge."""
        whose = "" if self.uid is None else f" (user {self.uid})"
        if self.embedded_in is None:
            return f"{self.pid}{whose}"
        return f"{self.pid}{whose}, embedded in {printable(self.embedded_in, QUOTED)}"

    @property
    def sampled(self) -> float:
        """`sampled_at` in seconds since the epoch."""
        return self.sampled_at.timestamp()


def seconds_of(written_at: str | None) -> float | None:
    """Return a canonical `writtenAt` in seconds since the epoch; None for Go's zero time.

    None, too, for the year 0, which RFC 3339 and Go have and Python has not.
    """
    if written_at is None or written_at == timestamp.ZERO or written_at.startswith("0000"):
        return None
    return datetime.fromisoformat(written_at).timestamp()
