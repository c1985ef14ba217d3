"""What `status` and `top` show: the verdict first, then why, then the figures; or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from mbcap_watch.doctor.findings import ago, duration
from mbcap_watch.errors import counted, printable
from mbcap_watch.snapshot.files import SNAPSHOT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.text import Text

    from mbcap_watch.doctor.health import Health
    from mbcap_watch.telemetry.stats import Stats, Summary


LABEL_WIDTH: Final = 15


def as_json(stats: Stats | None, health: Health) -> dict[str, Any]:
    """Return everything as JSON can hold it; ages are in seconds."""
    return {
        "healthy": health.healthy,
        "state": health.state,
        "problems": msgspec.to_builtins(health.problems),
        "warnings": msgspec.to_builtins(health.warnings),
        "ages": {} if stats is None else _ages(stats),
        "stats": msgspec.to_builtins(stats),
    }


def _ages(stats: Stats) -> dict[str, float | None]:
    moments = {
        "start": stats.started_at,
        "last_sync": stats.watch.last_sync,
        "last_apply": stats.last_apply,
        "last_result": stats.last_result_at,
        "snapshot": stats.snapshot_time,
        "last_error": stats.last_error.at if stats.last_error else None,
    }
    now = stats.sampled
    return {name: None if at is None else round(now - at, 3) for name, at in moments.items()}


def render(stats: Stats | None, health: Health, console: Console) -> None:
    """Print it for people. Long lines are left to the terminal."""
    from rich.text import Text  # noqa: PLC0415 - `run` can do without

    marks = ("✗", "→") if "utf" in console.encoding.lower() else ("x", "->")
    style = "green" if health.healthy else "red"
    console.print(plain(health.verdict, console), style=f"bold {style}", soft_wrap=True)
    for text, style in marked(health, *marks):
        console.print(plain(text, console), style=style, soft_wrap=True)
    if stats is None:
        return
    for name, value in rows(stats):
        line = Text.assemble((f"{name:<{LABEL_WIDTH}}", "dim"), plain(value, console))
        console.print(line, soft_wrap=True)


def marked(health: Health, cross: str = "✗", arrow: str = "→") -> Iterator[tuple[str, str]]:
    """Yield each finding, and below it what to do, with their styles."""
    for mark, style, findings in (
        (cross, "red", health.problems),
        ("!", "yellow", health.warnings),
    ):
        for finding in findings:
            yield f"{mark} {finding.text}", style
            yield f"  {arrow} {finding.remedy}", "default"


def rows(stats: Stats) -> Iterator[tuple[str, str]]:
    """Yield the figures, each with its name."""
    watch, lock, error, now = stats.watch, stats.mbcap_persist, stats.last_error, stats.sampled

    def since(moment: float | None) -> str:
        return "never" if moment is None else ago(now - moment)

    up = duration(now - stats.started_at)
    yield "process", f"{stats.process}, mbcap-watch {stats.version}, up {up}"
    yield "database", stats.database
    yield "snapshot", f"{stats.snapshot_dir}/{SNAPSHOT_NAME}"
    when = since(stats.snapshot_time) if stats.snapshot_time else "not set by the publisher"
    written = stats.snapshot_written_at
    yield "written at", f"{written} ({when})" if written else "unknown"
    yield "mode", f"{watch.mode}: {watch.why}"
    yield "last sync", since(watch.last_sync)
    outcome = f" ({stats.last_apply_outcome})" if stats.last_apply_outcome else ""
    yield "last compared", since(stats.last_apply) + outcome
    yield "results", _counts(stats.outcomes)
    yield "because of", _counts(stats.reasons)
    changed = f"{stats.changed_active} active, {stats.changed_inactive} inactive"
    yield "rows changed", f"{changed}, {stats.failed_rows} refused, {stats.set_back} set back"
    if stats.held:
        yield "held", counted(stats.held, "downgrade waits", "downgrades wait")
    yield "lag", _summary(stats.lag_ms)
    yield "write lock", f"count {lock.count}, contention_total {lock.contention_total}"
    yield "lock waits", _summary(lock.waits)
    yield "lock holds", f"{_summary(lock.holds)}; slow {lock.slow_hold_total}"
    lost = f"; last lost: {watch.last_problem}" if watch.last_problem else ""
    hits = f"sweep hits {watch.sweep_hits}, read errors {watch.read_errors}"
    yield "watch", f"re-arms {watch.rearms}, {hits}{lost}"
    for name, output in stats.outputs.items():
        last = f"last worked {since(output.last_good)}" if output.last_good else "has never worked"
        is_used = output.problem or output.last_good
        yield name, f"{output.problem or 'works'} ({last})" if is_used else "not used yet"
    if error is not None:
        over = "persists" if error.persists else "over"
        yield "last error", f"{error.outcome} ({since(error.at)}, {over}): {error.error}"


def _counts(counts: dict[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _summary(summary: Summary) -> str:
    if summary.max is None:
        return "none yet"
    named = ((name, getattr(summary, name)) for name in ("p50", "p95", "p99", "max"))
    return ", ".join(f"{name} {value:.1f}" for name, value in named if value is not None) + " ms"


def plain(text: str, console: Console) -> Text:
    """Return `text` as it is safe to print, and can be in the console's encoding."""
    from rich.text import Text  # noqa: PLC0415 - as above

    shown = printable(text).encode(console.encoding, "backslashreplace")
    return Text(shown.decode(console.encoding))
