"""`find`: the stats files of running bridges, wherever and by whomever they were started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from mbcap_watch.telemetry import runtime, statsfile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.settings import Settings

# In a directory of ours there is one for each process.
_MOST_FILES = 100


class Found(NamedTuple):
    """A stats file that could be read.

    Attributes:
        path: where it is.
        uid: whose it is.
        stats: what is in it.
        fate: what became of the process, if that is to be seen.

    """

    path: Path
    uid: int
    stats: statsfile.Record
    fate: Literal["gone", "paused"] | None = None


class Search(NamedTuple):
    """What `find` found.

    Attributes:
        found: files for the same settings, the freshest first.
        others: files for other settings, likewise.
        hidden: files for the same settings that are not for us, or no such files.
        obstacles: whatever else kept us from looking somewhere.

    """

    found: tuple[Found, ...]
    others: tuple[Found, ...]
    hidden: tuple[runtime.Unfit, ...]
    obstacles: tuple[runtime.Unfit, ...]


def find(settings: Settings, environ: Mapping[str, str], root: Path = runtime.ROOT) -> Search:
    """Look for the stats files wherever a `run` may keep one.

    Args:
        settings: of the `run` that is looked for.
        environ: the environment, for `RUNTIME_DIRECTORY`.
        root: for tests.

    """
    stem = statsfile.stem(settings)
    ours: list[Found] = []
    others: list[Found] = []
    hidden: list[runtime.Unfit] = []
    obstacles: list[runtime.Unfit] = []
    for path in runtime.places(environ, root):
        try:
            directory = runtime.open_place(path)
        except FileNotFoundError:
            continue
        except (runtime.Unfit, OSError) as exc:
            obstacles.append(_unfit(path, exc))
            continue
        try:
            for name in _names(directory):
                same = name.startswith(stem)
                try:
                    stats, uid = statsfile.read(path, directory, name)
                    each = Found(path / name, uid, stats, _fate(stats.pid))
                    (ours if same else others).append(each)
                except FileNotFoundError:
                    continue  # it ended just now
                except (runtime.Unfit, OSError) as exc:
                    (hidden if same else obstacles).append(_unfit(path / name, exc))
        finally:
            os.close(directory)
    for files in (ours, others):
        files.sort(key=lambda each: (each.stats.age < 0, each.stats.age))
    return Search(tuple(ours), tuple(others), tuple(hidden), tuple(obstacles))


def is_paused(pid: int) -> bool:
    """Whether a process is stopped or traced (the letter behind its name: proc_pid_stat(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


def _fate(pid: int) -> Literal["gone", "paused"] | None:
    if not os.path.exists(f"/proc/{pid}"):
        return "gone"
    return "paused" if is_paused(pid) else None


def _names(directory: int) -> Iterator[str]:
    names = (name for name in os.listdir(directory) if statsfile.NAME.fullmatch(name))
    yield from sorted(names)[:_MOST_FILES]


def _unfit(path: Path, error: runtime.Unfit | OSError) -> runtime.Unfit:
    if isinstance(error, runtime.Unfit):
        return error
    return runtime.Unfit(path, str(error.strerror), "look at it (ls -la)")
