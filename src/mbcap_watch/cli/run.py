"""The daemon: the bridge, with all who are told how it goes, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

import anyio

from mbcap_watch import __version__
from mbcap_watch.bridge.run import run
from mbcap_watch.cli import config, output
from mbcap_watch.errors import SettingsError
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.telemetry import logs
from mbcap_watch.telemetry.ack import Ack
from mbcap_watch.telemetry.heartbeat import Heartbeat
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.statsfile import StatsFile
from mbcap_watch.telemetry.systemd import Notifier

if TYPE_CHECKING:
    from mbcap_watch.cli.signals import Stop
    from mbcap_watch.results import PersistResult, WatchState
    from mbcap_watch.telemetry.heartbeat import Keeper

logger = logging.getLogger("mbcap_watch")


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
    settings = loaded.settings
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
        if as_json:
            output.print_line(result.to_json())

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
    logger.info("stopped")
    stop.ignore_more()


def keepers_of(loaded: config.Config) -> list[Keeper]:
    """Return who keeps what the bridge tells of itself; prometheus-client only if it is needed."""
    keepers: list[Keeper] = [StatsFile(loaded.settings, os.environ)]
    wanted = next((name for name in ("openmetrics_file", "http") if getattr(loaded, name)), None)
    if wanted is None:
        return keepers
    try:
        from mbcap_watch.cli import http  # noqa: PLC0415 - they take 10 MB
        from mbcap_watch.telemetry import prometheus  # noqa: PLC0415 - they take 10 MB

        if loaded.openmetrics_file:
            keepers.append(prometheus.PrometheusFile(loaded.openmetrics_file))
        if loaded.http:
            keepers.append(http.Endpoint(*loaded.http))
    except ModuleNotFoundError as exc:
        problem = f"needs {exc.name}: pip install 'mbcap-watch[metrics]'"
        raise config.in_users_words(SettingsError(wanted, problem), loaded.origins) from exc
    except SettingsError as exc:
        raise config.in_users_words(exc, loaded.origins) from exc
    return keepers
