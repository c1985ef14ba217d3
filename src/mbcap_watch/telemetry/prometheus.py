"""The stats as Prometheus has them: a collector, and a file for node_exporter.

prometheus-client is an extra, and imported by `run` only when it is asked for. In a file
node_exporter refuses the types `info` and `stateset`, and time stamps: there are none. Every sample
is labelled with its database, because the files of two bridges are read as one.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from mbcap_watch.telemetry import atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mbcap_watch.telemetry.stats import Spread, Stats

_PREFIX: Final = "mbcap_watch_"

# Between two writes of the file: a usual interval of scraping. Its directory is on a disk, as a
# rule, that of a Raspberry Pi being an SD card.
_WRITE_SECONDS: Final = 15.0

_QUANTILES: Final = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


def registry_of(stats: Stats) -> CollectorRegistry:
    """Return what prometheus-client writes out. What is not known is left out."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(stats))
    return registry


class _Collector:
    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        watch, lock, trouble = stats.watch, stats.mbcap_persist, stats.trouble
        in_trouble = trouble is not None and trouble.persists
        yield from self._gauge("build_info", "Always 1; the version.", 1, version=stats.version)
        yield from self._gauge("start_time_seconds", "When it was started.", stats.started_at)
        yield from self._gauge("sampled_time_seconds", "When this was true.", stats.sampled)
        yield from self._gauge("watch_mode", "Always 1; how it watches.", 1, mode=watch.mode)
        yield from self._gauge("last_sync_time_seconds", "Its last sync.", watch.last_sync)
        yield from self._gauge(
            "last_apply_time_seconds", "When the database was last compared.", stats.last_apply
        )
        yield from self._gauge(
            "snapshot_written_time_seconds", "writtenAt of the snapshot.", stats.snapshot_time
        )
        yield from self._gauge(
            "stuck", "1 while the filesystem does not answer.", watch.stuck_since is not None
        )
        yield from self._gauge("in_trouble", "1 while the last sync met trouble.", in_trouble)
        yield self._counter("rearms", "Inotify watches armed anew.", {"": watch.rearms})
        yield self._counter("sweep_hits", "Changes without an event.", {"": watch.sweep_hits})
        yield self._counter("read_errors", "Looks refused the file.", {"": watch.read_errors})
        yield self._counter("results", "Results by outcome.", stats.outcomes, "outcome")
        yield self._counter("looks", "Results by reason.", stats.reasons, "reason")
        rows = {"nodes": stats.changed_active, "inactive_nodes": stats.changed_inactive}
        yield self._counter("rows_changed", "Rows written.", rows, "table")
        yield self._counter("rows_failed", "Rows refused, per try.", {"": stats.failed_rows})
        yield from self._summary("lag", "From the rename to the last commit.", stats.lag_ms)
        yield from self._summary("lock_wait", "Waits for the write lock.", lock.waits)
        yield from self._summary("lock_hold", "Holds of the write lock.", lock.holds)
        contended, slow = {"": lock.contention_total}, {"": lock.slow_hold_total}
        yield self._counter("lock_contended", "Waits over 100 ms.", contended)
        yield self._counter("lock_slow_holds", "Holds over 500 ms.", slow)

    def _gauge(self, name: str, text: str, value: float | None, **labels: str) -> Iterator[Metric]:
        if value is not None:
            family = GaugeMetricFamily(_PREFIX + name, text, labels=["database", *labels])
            family.add_metric([self._stats.database, *labels.values()], value)
            yield family

    def _counter(
        self, name: str, text: str, counts: Mapping[Any, int], label: str | None = None
    ) -> Metric:
        names = ["database", label] if label else ["database"]
        family = CounterMetricFamily(_PREFIX + name, text, labels=names)
        for key, count in counts.items():
            family.add_metric([self._stats.database, key][: len(names)], count)
        return family

    def _summary(self, name: str, text: str, spread: Spread) -> Iterator[Metric]:
        database = self._stats.database
        family = SummaryMetricFamily(f"{_PREFIX}{name}_seconds", text, labels=["database"])
        for quantile, field in _QUANTILES:
            if (value := getattr(spread, field)) is not None:
                labels = {"database": database, "quantile": quantile}
                family.add_sample(family.name, labels, value / 1000)
        family.add_metric([database], spread.count, spread.total / 1000)
        yield family
        longest = None if spread.max is None else spread.max / 1000
        yield from self._gauge(f"{name}_max_seconds", f"{text} The longest of late.", longest)


class PrometheusFile:
    """A `heartbeat.Keeper`: a file for node_exporter's textfile collector, for all to read.

    At the end it is removed, so that nobody takes old figures for new ones; `sampled_time_seconds`
    tells of one that was left behind.
    """

    blocks: Final = True
    every: Final = _WRITE_SECONDS

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = False

    def write(self, stats: Stats) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.

        """
        data = generate_latest(registry_of(stats))
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._written:
                atomic.remove_leftovers(directory, self.path.name)
            atomic.replace(directory, self.path.name, data, 0o644)
        finally:
            os.close(directory)
        self._written = True

    def remove(self) -> None:
        """Take it away, if it is ours."""
        if self._written:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
