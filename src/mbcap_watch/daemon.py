"""The daemon: the bridge, with all who are told how it goes, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Final

import anyio

from mbcap_watch import __version__, config, logs, output
from mbcap_watch.ack import Ack
from mbcap_watch.errors import SettingsError
from mbcap_watch.heartbeat import Heartbeat
from mbcap_watch.metrics import Metrics
from mbcap_watch.notify import Notifier
from mbcap_watch.service import run
from mbcap_watch.snapshot import SNAPSHOT_NAME
from mbcap_watch.statsfile import StatsFile
from mbcap_watch.writer import LineWriter

if TYPE_CHECKING:
    from mbcap_watch.heartbeat import Keeper
    from mbcap_watch.result import PersistResult, WatchState
    from mbcap_watch.signals import Stop

logger = logging.getLogger("mbcap_watch")

# For how long the end waits for whoever reads the results.
_FLUSH_SECONDS: Final = 0.5


def serve(loaded: config.Config, stop: Stop, *, as_json: bool) -> None:
    """Bridge until `stop` says so.

    Args:
        loaded: the configuration.
        stop: what ends it.
        as_json: whether each result is printed.

    Raises:
        SettingsError: there is no port to listen at, or no library for what was asked for.
        OutputError: a result cannot be printed.

    """
    logs.configure(loaded.log_level, loaded.log_format, logs.UnblockedHandler())
    settings = loaded.settings
    printer = _Printer(stop) if as_json else None
    notifier = Notifier(os.environ, settings)  # says nothing where nobody listens
    stop.on_stop(notifier.stopping)
    answers = Ack(settings) if loaded.ack else None
    log, state_log = logs.ResultLog(), logs.StateLog()
    metrics = Metrics(settings, version=__version__, pid=os.getpid())
    heartbeat = Heartbeat(keepers_of(loaded), lambda: metrics.snapshot(time.time()))

    def on_state(state: WatchState) -> None:
        state_log(state)
        metrics.on_state(state)
        notifier.on_state(state)  # last: nothing that hangs may be taken for progress

    def on_result(result: PersistResult) -> None:
        log(result)
        metrics.on_result(result)
        notifier.on_result(result)
        if answers is not None:
            answers.on_result(result)  # returns at once
        if printer is not None:
            printer.print(result)

    logger.info(
        "mbcap-watch %s: %s into %s",
        __version__,
        settings.snapshot_dir / SNAPSHOT_NAME,
        settings.database,
    )

    async def main() -> None:
        with anyio.CancelScope() as scope, heartbeat, answers or contextlib.nullcontext():
            stop.cancel_on_signal(scope)
            await run(
                settings,
                on_result=on_result,
                on_state=on_state,
                on_timings=metrics.on_timings,
            )

    anyio.run(main)
    log.end()
    state_log.end()
    if printer is not None:
        printer.end()
    logger.info("stopped")
    stop.ignore_more()


class _Printer:
    """Prints results on standard output without waiting for whoever reads them.

    Args:
        stop: what ends the daemon once standard output is gone.

    """

    def __init__(self, stop: Stop) -> None:
        if sys.stdout is None:
            raise output.OutputError("standard output cannot be written: it is closed")
        self._stop = stop
        self._error: OSError | None = None
        self._writer = LineWriter(sys.stdout.fileno(), self._lost, self._fail)

    def print(self, result: PersistResult) -> None:
        self._writer.write(result.to_json())

    def end(self) -> None:
        """Give the reader a moment, and say what went wrong."""
        unread = self._writer.flush(_FLUSH_SECONDS)
        if self._error is not None:
            raise output.OutputError(f"standard output cannot be written: {self._error}")
        if unread:
            self._lost(unread)

    def _lost(self, count: int) -> None:
        data = {"data": {"lost": count}}
        logger.warning("%d results are lost: nobody read standard output", count, extra=data)

    def _fail(self, exc: OSError) -> None:
        self._error = exc
        self._stop.cancel()


def keepers_of(loaded: config.Config) -> list[Keeper]:
    """Return who keeps what the bridge tells of itself; prometheus-client only if it is needed."""
    keepers: list[Keeper] = [StatsFile(loaded.settings, os.environ)]
    wanted = next((name for name in ("openmetrics_file", "http") if getattr(loaded, name)), None)
    if wanted is None:
        return keepers
    try:
        from mbcap_watch import endpoint, exposition  # noqa: PLC0415 - they take 10 MB

        if loaded.openmetrics_file:
            keepers.append(exposition.PrometheusFile(loaded.openmetrics_file))
        if loaded.http:
            keepers.append(endpoint.Endpoint(*loaded.http))
    except ModuleNotFoundError as exc:
        problem = f"needs {exc.name}: pip install 'mbcap-watch[metrics]'"
        raise config.in_users_words(SettingsError(wanted, problem), loaded.origins) from exc
    except SettingsError as exc:
        raise config.in_users_words(exc, loaded.origins) from exc
    return keepers
