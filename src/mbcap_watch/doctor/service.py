"""`check`, the running bridge: what `status` says of it, as far as no other line does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from mbcap_watch.doctor.findings import Finding, Installation, ok
from mbcap_watch.doctor.health import judge_search
from mbcap_watch.errors import printable
from mbcap_watch.telemetry.discover import find

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.settings import Settings

# What an examination of the files cannot see.
_UNSEEN: Final = {"gone", "limit", "no_sync", "no_apply", "rows_refused", "stale"}


def examine(settings: Settings, environ: Mapping[str, str], *, explained: bool) -> list[Finding]:
    """Ask the bridge with these settings how it is. Blocks.

    Args:
        settings: of the bridge.
        environ: the environment, for `RUNTIME_DIRECTORY`.
        explained: whether a problem was found that may be why it is not well.

    """
    return list(_examine(settings, environ, explained=explained))


def _examine(
    settings: Settings, environ: Mapping[str, str], *, explained: bool
) -> Iterator[Finding]:
    search = find(settings, environ)
    health = judge_search(search, settings)
    if search.found and not health.healthy and health.state != "starting":
        for each in health.problems:
            # As another user, or a moment later, all may look well from here.
            if each.code in _UNSEEN or not explained:
                text = f"{health.state}: {each.text}"
                yield msgspec.structs.replace(each, subject="service", text=text)
    elif search.found:
        yield ok("service", health.verdict)
    elif search.hidden:
        yield ok("service", f"not known: {search.hidden[0].what}")
    else:
        yield ok("service", "no mbcap-watch runs with these settings")
        for other in search.others:
            if other.stats.fresh and other.stats.database == printable(str(settings.database)):
                yield Installation.of(settings).finding(
                    "other_settings",
                    pid=other.stats.pid,
                    uid=other.uid,
                    its_database=other.stats.database,
                    its_snapshot_dir=other.stats.snapshot_dir,
                )
