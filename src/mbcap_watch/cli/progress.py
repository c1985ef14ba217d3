"""A progress bar on standard error, for people who wait for a large snapshot."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.bridge.sync import OnProgress

# Less work is done before a person could read the bar.
_LARGE: Final = 50_000
_LONG_SECONDS: Final = 1.0


@contextlib.contextmanager
def shown(*, wanted: bool) -> Iterator[OnProgress | None]:
    """Yield a hook for `persist_once` that shows a bar; None where nobody would see it.

    The bar appears once the work turns out to be long, and is removed at the end of the block.
    """
    stderr: TextIO | None = sys.stderr  # None if it was closed before we started
    if not wanted or stderr is None or not stderr.isatty():
        yield None
        return
    # Not at the top: it takes 20 ms, and memory that `run` can do without.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn  # noqa: PLC0415

    bar = Progress(
        *Progress.get_default_columns()[:3],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("applying", total=None)
    started = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        if total > _LARGE or time.monotonic() - started > _LONG_SECONDS:
            with contextlib.suppress(OSError):  # the terminal is gone: nobody sees it
                bar.start()  # has no effect the second time
                bar.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
