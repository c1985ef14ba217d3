"""What the command line logs: changes of state, not ticks; no flood, and nothing forgotten."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from mbcap_watch.errors import counted, printable
from mbcap_watch.results import WatchState
from mbcap_watch.telemetry.outputs import LineWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from mbcap_watch.results import PersistResult

logger = logging.getLogger("mbcap_watch")

# Of one kind of line, so many are logged in so many seconds. What flaps for a day then takes some
# 1,400 lines of a kind, not the 86,400 of a change a second.
MOST: Final = 5
WINDOW: Final = 300.0

# Trouble that lasts is said again: whoever reads the log of today is to see it.
REMINDER: Final = 3600.0

_counted: Final = partial(counted, separator="")  # programs read it as well


class _TextFormatter(logging.Formatter):
    """Makes all text safe for a terminal: no message can look like a line of its own."""

    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(super().formatStack(stack_info))


class _JsonFormatter(_TextFormatter):
    """One JSON object a line: the time, the level, the message, and the data behind it."""

    def format(self, record: logging.LogRecord) -> str:
        data = getattr(record, "data", None)  # ours is flat; a guest's may be anything
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(data if isinstance(data, dict) else {}),
        }
        fields = {printable(str(name)): _visible(value) for name, value in fields.items()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def _visible(value: object) -> object:
    """Return `value` as JSON can hold it: no encoding has room for the bytes of some paths."""
    return value if value is None or isinstance(value, int | float) else printable(str(value))


def _indented(lines: str) -> str:
    """Return `lines` so that none can be taken for the first line of another message."""
    return "\n".join("  " + printable(line) for line in lines.split("\n"))


class UnblockedHandler(logging.Handler):
    """Logs to standard error without waiting for whoever reads it; says how many lines were lost.

    `logging` flushes it when the process ends. Its `writer` tells whether somebody reads.
    """

    def __init__(self) -> None:
        super().__init__()
        # Python has no standard error if it was closed before the start. Its number is then that
        # of another file, the database perhaps.
        closed = sys.stderr is None
        descriptor = os.open(os.devnull, os.O_WRONLY) if closed else sys.stderr.fileno()
        self.writer = LineWriter(descriptor, self._lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Have the line written."""
        try:
            self.writer.write(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler of logging does
            self.handleError(record)

    def flush(self) -> None:
        """Give the reader a moment."""
        self.writer.flush()

    def _lost(self, count: int) -> str:
        lines = _counted(count, "line of the log is", "lines of the log are")
        data = {"data": {"lost": count}}
        at = logger.name, logging.WARNING, __file__, 0
        text = "%s lost: nobody read standard error"
        return self.format(logger.makeRecord(*at, text, (lines,), None, extra=data))


def configure(level: str, style: str, handler: logging.Handler | None = None) -> None:
    """Log to standard error, by a `handler` or by one that waits for its reader.

    Our own lines are logged from `level` on, those of others from `warning` on; `style` is `text`
    or `json`.
    """
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(level.upper())


class Throttle:
    """Follows one state, and decides when it is said. All times are seconds of any one clock.

    What counts is the difference between the state and what was logged last. So a change that was
    suppressed is logged once that is allowed again, unless the state has changed back by then.

    `calm` is the state at the start, and needs no line. Any other that lasts is said again after
    `remind_after` seconds.
    """

    def __init__(self, calm: Hashable, *, remind_after: float = math.inf) -> None:
        self._calm = self._seen = self._said = calm
        self._remind_after, self._said_at = remind_after, 0.0
        # Of each kind: since when lines are counted, how many were logged, how many suppressed.
        self._windows: dict[str, tuple[float, int, int]] = {}

    def is_news(self, state: Hashable, kind: str, now: float) -> bool:
        """Return whether to say `state` now, with a line of this kind; counts it if not."""
        self.count_suppressed(now)
        changed, self._seen = state != self._seen, state
        lasting = state != self._calm and now - self._said_at >= self._remind_after
        if state == self._said and not lasting:
            return False
        since, passed, suppressed = self._windows.get(kind, (now, 0, 0))
        is_allowed = passed < MOST
        self._windows[kind] = since, passed + is_allowed, suppressed + (changed and not is_allowed)
        if is_allowed:
            self._said, self._said_at = state, now
        return is_allowed

    def count_suppressed(self, now: float = math.inf) -> None:
        """Log how many changes were suppressed: nobody is to take quiet for health."""
        for kind, (since, _, count) in [*self._windows.items()]:
            if now - since >= WINDOW:
                del self._windows[kind]
                if count:
                    data = {"kind": kind, "suppressed": count, "seconds": WINDOW}
                    text = "%s: %d more in the last %d min"
                    logger.warning(text, kind, count, WINDOW / 60, extra={"data": data})


class Explained(Protocol):
    """A result in words, as the catalogue of findings has them."""

    @property
    def code(self) -> str: ...  # noqa: D102 - the finding's name
    @property
    def text(self) -> str: ...  # noqa: D102 - a sentence
    @property
    def remedy(self) -> str: ...  # noqa: D102 - what to do; empty if there is nothing


class ResultLog:
    """A hook for results: one line per applied snapshot, one per change of state.

    Lines on applied snapshots are the record, and are never suppressed. The first comparison has
    one even if nothing differed. All others are suppressed when they repeat. `explain` finds words
    for a result that is not well; None if it is.
    """

    def __init__(
        self,
        explain: Callable[[PersistResult], Explained | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._explain = clock, explain
        self._trouble = Throttle(calm=None, remind_after=REMINDER)
        self._has_compared = False

    def __call__(self, result: PersistResult) -> None:
        """Log it if it is news."""
        data = {"data": result.to_dict()}
        trouble, state = self._explain(result), None
        if trouble is not None:
            data["data"]["code"] = trouble.code
            # Rows are named once: which and how many they are may change each time.
            state = trouble.code, "rows" if result.failed_rows else result.error or result.cause
        news = self._trouble.is_news(state, trouble.code if trouble else "recovered", self._clock())
        is_first, self._has_compared = not self._has_compared, self._has_compared or result.compared
        if result.outcome == "applied" or (result.compared and is_first and not news):
            logger.info("%s", summary(result), extra=data)
        elif not news:
            logger.debug("%s: %s", result.reason, result.outcome, extra=data)
        if news and trouble is not None:
            waits = result.outcome == "no_snapshot"
            start = "waiting for a snapshot" if waits else trouble.code
            text = "; ".join(filter(None, (trouble.text, trouble.remedy)))
            level = logging.INFO if waits else logging.WARNING
            logger.log(level, "%s", f"{start}: {text}" if text else start, extra=data)
        elif news and result.outcome != "applied":  # that line says it already
            held = _counted(result.held, "downgrade that waits", "downgrades that wait")
            but = f", but for {held}" if result.held else ""
            logger.info("recovered: the database is as the snapshot says%s", but, extra=data)

    def end(self) -> None:
        """Say what is left to say of lines that were not logged."""
        self._trouble.count_suppressed()


def summary(result: PersistResult) -> str:
    """Return one line on an applied snapshot."""
    failed = f", {result.failed_rows} refused" if result.failed_rows else ""
    held = f", {result.held} held" if result.held else ""
    return (
        f"{result.outcome}: {_counted(result.changed, 'row', 'rows')} changed"
        f" ({result.changed_active} active, {result.changed_inactive} inactive{failed})"
        f" of {_counted(result.entries, 'entry', 'entries')},"
        f" {result.skipped_unknown} unknown, {result.skipped_unrecognized} unrecognized,"
        f" {result.unmatched} unmatched{held}; {result.seconds * 1000:.1f} ms, lock held for at"
        f" most {result.lock_seconds * 1000:.1f} ms; {result.reason}, written at"
        f" {result.written_at}"
    )


class StateLog:
    """A hook for the way of watching: one line per change of state, none per sync.

    `remedy` is what to do where a filesystem does not answer.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, remedy: str = "") -> None:
        self._clock, self._remedy = clock, remedy
        start, self._said_rearms, self._read_errors = WatchState(), 0, 0
        self._watching = Throttle((start.mode, start.why, start.rearms))
        self._sweeps = Throttle(start.sweep_hits)
        self._stuck = Throttle(calm=False, remind_after=REMINDER)

    def __call__(self, state: WatchState) -> None:
        """Log what of it is news."""
        now, data = self._clock(), {"data": msgspec.to_builtins(state)}
        if self._watching.is_news((state.mode, state.why, state.rearms), "watching", now):
            rearmed = state.rearms > self._said_rearms
            self._said_rearms = state.rearms
            again = f" (armed anew: {state.last_problem})" if rearmed else ""
            logger.info("watching by %s: %s%s", state.mode, state.why, again, extra=data)
        if self._sweeps.is_news(state.sweep_hits, "sweep", now):
            logger.info("the sweep found a change that no event told of", extra=data)
        if self._stuck.is_news(state.stuck_since is not None, "stuck", now):
            if state.stuck_since is not None:
                text = "the filesystem does not answer; waiting for it"
                logger.warning("%s", "; ".join(filter(None, (text, self._remedy))), extra=data)
            elif state.read_errors > self._read_errors:  # of a soft NFS mount
                logger.info("the call that hung has ended, with an error", extra=data)
            else:
                logger.info("the filesystem answers again", extra=data)
        self._read_errors = state.read_errors

    def end(self) -> None:
        """Say what is left to say of lines that were not logged."""
        for throttle in (self._watching, self._sweeps, self._stuck):
            throttle.count_suppressed()
