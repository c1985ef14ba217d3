"""The daemon: the bridge, and whatever reports on it, until a signal ends it."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import anyio

from mbcap_watch import __version__
from mbcap_watch.bridge.run import run
from mbcap_watch.cli import config, output
from mbcap_watch.doctor.findings import Installation, catalogue
from mbcap_watch.doctor.health import explain
from mbcap_watch.errors import SettingsError, counted
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.telemetry import logs
from mbcap_watch.telemetry.ack import Ack
from mbcap_watch.telemetry.control import Control
from mbcap_watch.telemetry.outputs import LineWriter
from mbcap_watch.telemetry.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.cli.http import Endpoint
    from mbcap_watch.cli.signals import Stop
    from mbcap_watch.results import PersistResult, WatchState
    from mbcap_watch.telemetry.stats import Stats

logger = logging.getLogger("mbcap_watch")


def serve(loaded: config.Config, stop: Stop, *, as_json: bool) -> None:
    """Bridge until `stop` says so; `as_json`: print each result."""
    handler, settings = logs.UnblockedHandler(), loaded.settings
    logs.configure(loaded.log_level, loaded.log_format, handler)
    _require_database(loaded)
    control = Control(settings, embedded=False)
    control.outputs["log"] = handler.writer.output
    catalogue()  # read now: when the log needs it, there may be no descriptor left
    here = Installation.of(settings, loaded.file)
    result_log = logs.ResultLog(lambda result: explain(result, here))
    state_log = logs.StateLog(remedy=here.finding("stuck", last="").remedy)
    notifier = Notifier(os.environ, settings)  # says nothing where nobody listens
    stop.on_stop(notifier.stopping)
    printer = _Printer(stop) if as_json else None
    if (answers := Ack(settings) if loaded.ack else None) is not None:
        control.outputs["ack"] = answers.state.output
    if (endpoint := endpoint_of(loaded, control.sample)) is not None:
        control.outputs["http"] = endpoint.state.output

    def on_result(result: PersistResult) -> None:  # nothing here waits for anybody
        result_log(result)
        notifier.on_result(result)
        if printer is not None:
            printer.print(result)
        if answers is not None:
            answers.on_result(result)

    def on_state(state: WatchState) -> None:
        state_log(state)
        if answers is not None:
            answers.retry()
        notifier.on_state(state)  # last: nothing that hangs may be taken for progress

    snapshot = settings.snapshot_dir / SNAPSHOT_NAME
    logger.info("mbcap-watch %s: %s into %s", __version__, snapshot, settings.database)

    async def main() -> None:
        with anyio.CancelScope() as scope, answers or nullcontext():
            stop.cancel_on_signal(scope)
            async with endpoint or nullcontext():
                await run(settings, on_result=on_result, on_state=on_state, control=control)

    anyio.run(main)
    result_log.end()
    state_log.end()
    if printer is not None:
        printer.end()
    logger.info("stopped")
    stop.ignore_more()


def _require_database(loaded: config.Config) -> None:
    """Raise where the default path of the database leads to /data: a service starts in /."""
    if loaded.origins["database"] == "default" and os.getcwd() == "/":
        where = loaded.file or "a TOML file, DB_PATH or --database"
        raise SettingsError("database", f"is not set; set it in {where}")


class _Printer:
    """Prints results without waiting for whoever reads them; ends the daemon if nobody can."""

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
        unread = self._writer.flush()
        if self._error is not None:
            raise output.OutputError(f"standard output cannot be written: {self._error}")
        if unread:
            self._lost(unread)

    def _lost(self, count: int) -> None:
        data = {"data": {"lost": count}}
        results = counted(count, "result is", "results are")
        logger.warning("%s lost: nobody read standard output", results, extra=data)

    def _fail(self, exc: OSError) -> None:
        self._error = exc
        self._stop.cancel()


def endpoint_of(loaded: config.Config, sample: Callable[[], Stats]) -> Endpoint | None:
    """Return what serves the stats over HTTP; None if that is not asked for."""
    if loaded.http is None:
        return None
    try:
        from mbcap_watch.cli.http import Endpoint  # noqa: PLC0415 - it takes 10 MB
    except ModuleNotFoundError as exc:
        problem = f"needs {exc.name}: in the checkout, {sys.prefix}/bin/pip install '.[metrics]'"
        raise config.in_users_words(SettingsError("http", problem), loaded.origins) from exc
    return Endpoint(loaded.http, sample, str(loaded.file or ""))
