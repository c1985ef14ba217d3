"""The daemon: the bridge, and whatever reports on it, until a signal ends it."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import anyio

from mbcap_watch import __version__
from mbcap_watch.bridge.run import run
from mbcap_watch.cli import config, output
from mbcap_watch.errors import SettingsError
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.telemetry import logs
from mbcap_watch.telemetry.ack import Ack
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.socket import ControlSocket
from mbcap_watch.telemetry.systemd import Notifier
from mbcap_watch.telemetry.writer import LineWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.cli.signals import Stop
    from mbcap_watch.results import PersistResult, WatchState
    from mbcap_watch.telemetry.stats import Stats

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
        SettingsError: there is no library for what was asked for, or no database in /.
        OutputError: a result cannot be printed.

    """
    logs.configure(loaded.log_level, loaded.log_format, logs.UnblockedHandler())
    settings = loaded.settings
    if loaded.origins["database"] == "default" and os.getcwd() == "/":  # as a service starts
        where = loaded.file or "a TOML file, DB_PATH or --database"
        raise SettingsError("database", f"is not set; set it in {where}")
    printer = _Printer(stop) if as_json else None
    notifier = Notifier(os.environ, settings)  # says nothing where nobody listens
    stop.on_stop(notifier.stopping)
    answers = Ack(settings) if loaded.ack else None
    log, state_log = logs.ResultLog(), logs.StateLog()
    metrics = Metrics(settings, version=__version__, pid=os.getpid())

    def sample() -> Stats:
        return metrics.snapshot(time.time())

    control = ControlSocket(settings, os.environ, sample)
    endpoint = endpoint_of(loaded, sample)

    def on_state(state: WatchState) -> None:
        state_log(state)
        metrics.on_state(state)
        control.keep()
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
        with anyio.CancelScope() as scope, control, answers or nullcontext():
            stop.cancel_on_signal(scope)
            async with endpoint:
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


def endpoint_of(
    loaded: config.Config, sample: Callable[[], Stats]
) -> AbstractAsyncContextManager[object]:
    """Return what serves the stats over HTTP, if that is asked for."""
    if loaded.http is None:
        return nullcontext()
    try:
        from mbcap_watch.cli.http import Endpoint  # noqa: PLC0415 - it takes 10 MB
    except ModuleNotFoundError as exc:
        problem = f"needs {exc.name}: pip install 'mbcap-watch[metrics]'"
        raise config.in_users_words(SettingsError("http", problem), loaded.origins) from exc
    return Endpoint(loaded.http, sample)
