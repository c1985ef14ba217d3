"""The stats as Prometheus has them. prometheus-client is an extra, imported only when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from mbcap_watch.telemetry.stats import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mbcap_watch.telemetry.stats import Stats, Summary

_PREFIX: Final = "mbcap_watch_"


def registry_of(
    sample: Callable[[], Stats], judge: Callable[[Stats], tuple[bool, list[str]]]
) -> CollectorRegistry:
    """Return the registry that prometheus-client writes out.

    Args:
        sample: makes the stats; called whenever somebody asks.
        judge: tells whether they are healthy, and the code of each problem.

    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(sample, judge))
    ProcessCollector(registry=registry)
    return registry


class _Collector:
    def __init__(
        self, sample: Callable[[], Stats], judge: Callable[[Stats], tuple[bool, list[str]]]
    ) -> None:
        self._sample, self._judge = sample, judge

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; what is not known is left out."""
        stats = self._sample()
        watch, lock, result = stats.watch, stats.mbcap_persist, stats.last_result
        healthy, codes = self._judge(stats)
        about = {"version": stats.version, "database": stats.database}
        yield _labelled("build_info", "Always 1: the version and the database.", [about])
        yield _labelled("mode", "Always 1: how changes are noticed.", [{"mode": watch.mode}])
        problems = [{"code": code} for code in dict.fromkeys(codes)]
        yield _labelled("problem", "Always 1: each problem, by its code.", problems)
        gauges = {
            "healthy": ("1 if there is no problem, as status judges.", healthy),
            "stuck": ("1 while the filesystem does not answer.", watch.stuck_since is not None),
            "last_sync_timestamp_seconds": ("When the last sync ended.", watch.last_sync),
            "last_apply_timestamp_seconds": (
                "When the database was last compared with a snapshot.",
                stats.last_apply,
            ),
            "snapshot_timestamp_seconds": ("writtenAt of the snapshot.", stats.snapshot_time),
        }
        if result is not None and result.outcome in ("applied", "unchanged"):
            gauges |= {
                "snapshot_entries": ("Entries of the snapshot.", result.entries),
                "snapshot_unmatched": ("Keys that are in neither table.", result.unmatched),
                "snapshot_unrecognized": (
                    "Entries without a known status or a usable key.",
                    result.skipped_unrecognized,
                ),
            }
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(_PREFIX + name, text, value)
        rows = {"nodes": stats.changed_active, "inactive_nodes": stats.changed_inactive}
        yield _counter("results", "Results by outcome.", stats.outcomes, "outcome")
        yield _counter("syncs", "Syncs with a result, by reason.", stats.reasons, "reason")
        yield _counter("rows_changed", "Rows written, by table.", rows, "table")
        yield _counter("rows_refused", "Rows refused, at every try.", stats.failed_rows)
        yield _counter("rows_set_back", "Rows that others had set back.", stats.set_back)
        yield _counter("rearms", "Inotify watches armed anew.", watch.rearms)
        yield _counter("sweep_hits", "Changes found without an event.", watch.sweep_hits)
        yield _counter("read_errors", "Syncs that were refused the file.", watch.read_errors)
        yield _histogram("lag", "From the rename to the last commit.", stats.lag_ms)
        yield _histogram("lock_wait", "Waits for the write lock.", lock.waits)
        yield _histogram("lock_hold", "Holds of the write lock.", lock.holds)


def _labelled(name: str, text: str, series: list[dict[str, str]]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=list(series[0]) if series else None)
    for labels in series:
        family.add_metric(list(labels.values()), 1)
    return family


def _counter(
    name: str, text: str, counts: Mapping[Any, int] | int, label: str | None = None
) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=[label] if label else None)
    if isinstance(counts, int):
        counts = {"": counts}
    for key, count in counts.items():
        family.add_metric([key] if label else [], count)
    return family


def _histogram(name: str, text: str, summary: Summary) -> Metric:
    family = HistogramMetricFamily(f"{_PREFIX}{name}_seconds", text)
    counts, total, buckets = summary.buckets or (0,) * (len(BUCKETS) + 1), 0, []
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric([], buckets, summary.total / 1000)
    return family
