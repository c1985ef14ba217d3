"""The stats as Prometheus has them. prometheus-client is an extra, imported only when asked for."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import HistogramMetricFamily, InfoMetricFamily, Metric

from mbcap_watch.telemetry.stats import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mbcap_watch.telemetry.stats import Stats, Summary

_PREFIX: Final = "mbcap_watch_"


def registry_of(
    sample: Callable[[], Stats], judge: Callable[[Stats], tuple[bool, list[str]]]
) -> CollectorRegistry:
    """Return the registry that prometheus-client writes out.

    `sample` makes the stats whenever somebody asks; `judge` tells whether they are healthy, and the
    code of each problem.
    """

    class Collector:
        def collect(self) -> Iterator[Metric]:
            stats = sample()
            return _metrics(stats, *judge(stats))

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    ProcessCollector(registry=registry)
    return registry


def _metrics(stats: Stats, healthy: bool, codes: list[str]) -> Iterator[Metric]:  # noqa: FBT001
    watch, lock, result = stats.watch, stats.mbcap_persist, stats.last_result
    about = {"version": stats.version, "database": stats.database}
    yield InfoMetricFamily(f"{_PREFIX}build", "The version and the database.", about)
    yield _gauge("mode", "Always 1: how changes are noticed.", {watch.mode: 1}, "mode")
    yield _gauge("problem", "Always 1: each problem.", dict.fromkeys(codes, 1), "code")
    yield _gauge("healthy", "1 if there is no problem, as status judges.", healthy)
    yield _gauge("stuck", "1 while the filesystem is silent.", watch.stuck_since is not None)
    yield _gauge("last_sync_timestamp_seconds", "When the last sync ended.", watch.last_sync)
    text = "When the database was last compared with a snapshot."
    yield _gauge("last_apply_timestamp_seconds", text, stats.last_apply)
    yield _gauge("snapshot_timestamp_seconds", "writtenAt of the snapshot.", stats.snapshot_time)
    if result is not None and result.compared:
        yield _gauge("snapshot_entries", "Entries of the snapshot.", result.entries)
        yield _gauge("snapshot_unmatched", "Keys that are in neither table.", result.unmatched)
        text = "Entries without a known status or a usable key."
        yield _gauge("snapshot_unrecognized", text, result.skipped_unrecognized)
    rows = {"nodes": stats.changed_active, "inactive_nodes": stats.changed_inactive}
    yield _counter("results", "Results by outcome.", stats.outcomes, "outcome")
    yield _counter("syncs", "Syncs with a result, by reason.", stats.reasons, "reason")
    yield _counter("rows_changed", "Rows written, by table.", rows, "table")
    yield _counter("rows_refused", "Rows refused, at every try.", stats.failed_rows)
    yield _counter("rows_set_back", "Rows that others had set back.", stats.set_back)
    yield _gauge("held", "Keys with a downgrade that waits.", stats.held)
    yield _counter("rearms", "Inotify watches armed anew.", watch.rearms)
    yield _counter("sweep_hits", "Changes found without an event.", watch.sweep_hits)
    yield _counter("read_errors", "Syncs that were refused the file.", watch.read_errors)
    yield _histogram("lag", "From the rename to the last commit.", stats.lag_ms)
    yield _histogram("lock_wait", "Waits for the write lock.", lock.waits)
    yield _histogram("lock_hold", "Holds of the write lock.", lock.holds)


def _metric(kind: str, name: str, text: str, values: Any, label: str = "") -> Metric:
    """Make a metric of one value, or of one for each value of a label; None is not known."""
    metric = Metric(_PREFIX + name, text, kind)
    sample = metric.name + ("_total" if kind == "counter" else "")
    for key, value in (values if label else {"": values}).items():
        if value is not None:
            metric.add_sample(sample, {label: key} if label else {}, value)
    return metric


_gauge, _counter = partial(_metric, "gauge"), partial(_metric, "counter")


def _histogram(name: str, text: str, summary: Summary) -> Metric:
    bounds = [*map(str, map(float, BUCKETS)), "+Inf"]
    counts = summary.buckets or [0] * len(bounds)
    buckets = [*zip(bounds, accumulate(counts), strict=True)]
    name = f"{_PREFIX}{name}_seconds"
    return HistogramMetricFamily(name, text, buckets, summary.total / 1000)
