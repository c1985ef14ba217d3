"""The stats file: kept and found, never torn, never written through a link, never on a disk."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from mbcap_watch import Settings
from mbcap_watch.doctor.health import judge_search
from mbcap_watch.telemetry import heartbeat
from mbcap_watch.telemetry.discover import Found, find
from mbcap_watch.telemetry.heartbeat import Heartbeat
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.runtime import Unfit
from mbcap_watch.telemetry.statsfile import MAX_BYTES, STALE_SECONDS, Record, StatsFile, stem
from support import other_process, read_line, thread_names, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mbcap_watch.telemetry.stats import Stats

NOBODY = 65534
SETTINGS = Settings(Path("/data/meshcore.db"))
ELSEWHERE = Settings(Path("/data/meshcore.db"), Path("/nfs/mbcap-snapshot"))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")


@pytest.fixture
def root() -> Iterator[Path]:
    """A root directory in memory."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    path.chmod(0o755)
    for name in ("run/user", "dev/shm"):
        (path / name).mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def sample(settings: Settings = SETTINGS, *, pid: int = 42) -> Stats:
    return Metrics(settings, version="1", pid=pid).snapshot(time.time())


def write(path: Path, pid: int, settings: Settings = SETTINGS, *, age: float = 0.0) -> Path:
    """Write a stats file as process `pid` would have `age` seconds ago."""
    path.mkdir(parents=True, exist_ok=True)
    fields = msgspec.structs.asdict(sample(settings, pid=pid))
    file = path / f"{stem(settings)}{pid}.json"
    file.write_bytes(msgspec.json.encode(Record(**fields, monotonic=time.monotonic() - age)))
    return file


def pids(found: tuple[Found, ...]) -> list[int]:
    return [each.stats.pid for each in found]


def test_it_is_for_its_owner_and_whole_and_goes_at_the_end(root: Path) -> None:
    file = StatsFile(SETTINGS, {}, root)
    before = os.umask(0)
    try:
        for _ in range(2):
            file.write(sample())
    finally:
        os.umask(before)
    assert file.path.parent == root / f"dev/shm/mbcap-watch-{os.geteuid()}"
    assert os.listdir(file.path.parent) == [file.path.name]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    [found] = find(SETTINGS, {}, root).found
    assert found.stats.pid == 42
    assert found.stats.fresh
    assert b'"sampledAt":"20' in file.path.read_bytes()
    file.remove()
    assert find(SETTINGS, {}, root) == ((), (), (), ())


def test_the_directory_of_the_service_manager_comes_first(root: Path, tmp_path: Path) -> None:
    environ = {"RUNTIME_DIRECTORY": f"{tmp_path}:/other"}  # on a disk: the operator says so
    file = StatsFile(SETTINGS, environ, root)
    file.write(sample())
    assert file.path.parent == tmp_path
    assert pids(find(SETTINGS, environ, root).found) == [42]


@pytest.mark.parametrize(
    "place",
    [
        "run/mbcap-watch",
        "run/mbcap-watch@north",
        "run/user/1000/mbcap-watch",
        "dev/shm/mbcap-watch-7",
    ],
)
def test_it_is_found_however_it_was_started(root: Path, place: str) -> None:
    write(root / place, 1)
    write(root / place, 2, ELSEWHERE)
    search = find(SETTINGS, {}, root)
    assert (pids(search.found), pids(search.others)) == ([1], [2])


def test_the_freshest_comes_first_and_one_from_before_the_boot_last(root: Path) -> None:
    for pid, age in ((1, 100.0), (2, -1e9), (3, 1.0)):
        write(root / "run/mbcap-watch", pid, age=age)
    assert pids(find(SETTINGS, {}, root).found) == [3, 1, 2]


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_makes_nothing_stale(root: Path, jump: float) -> None:
    metrics = Metrics(SETTINGS, version="1", pid=42)
    StatsFile(SETTINGS, {}, root).write(metrics.snapshot(time.time() - jump))
    health = judge_search(find(SETTINGS, {}, root), SETTINGS)
    assert health.state == "starting"  # not "stale"


def test_what_killed_processes_left_goes_at_the_next_start(root: Path) -> None:
    home = root / f"dev/shm/mbcap-watch-{os.geteuid()}"
    write(home, 1, age=STALE_SECONDS + 1)
    write(home, 2)
    write(home, 3, ELSEWHERE, age=STALE_SECONDS + 1)
    StatsFile(SETTINGS, {}, root).write(sample())
    search = find(SETTINGS, {}, root)
    assert sorted(pids(search.found)) == [2, 42]
    assert pids(search.others) == [3]


def test_a_directory_that_is_tidied_away_is_made_again(root: Path) -> None:
    file = StatsFile(SETTINGS, {}, root)
    file.write(sample())
    shutil.rmtree(file.path.parent)
    with pytest.raises(FileNotFoundError):
        file.write(sample())
    file.write(sample())
    assert pids(find(SETTINGS, {}, root).found) == [42]


def test_nothing_is_written_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    with pytest.raises(Unfit, match=r"is on a disk.*RUNTIME_DIRECTORY"):
        StatsFile(SETTINGS, {}, tmp_path).write(sample())


def test_no_link_is_followed(root: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    home = root / f"dev/shm/mbcap-watch-{os.geteuid()}"
    home.symlink_to(victim)
    with pytest.raises(OSError, match="Not a directory"):
        StatsFile(SETTINGS, {}, root).write(sample())
    assert not os.listdir(victim)
    assert len(find(SETTINGS, {}, root).obstacles) == 1
    home.unlink()

    file = StatsFile(SETTINGS, {}, root)
    home.mkdir()
    file.path.symlink_to(tmp_path / "other")
    file.write(sample())
    assert not file.path.is_symlink()
    assert not (tmp_path / "other").exists()


def test_a_directory_that_others_may_write_is_not_used(root: Path) -> None:
    home = root / f"dev/shm/mbcap-watch-{os.geteuid()}"
    write(home, 666)
    home.chmod(0o777)
    with pytest.raises(Unfit, match="others may write"):
        StatsFile(SETTINGS, {}, root).write(sample())
    search = find(SETTINGS, {}, root)
    assert not search.found
    assert "others may write" in str(search.obstacles[0])


@as_root
def test_a_directory_of_somebody_else_is_not_used(root: Path) -> None:
    home = root / "dev/shm/mbcap-watch-0"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    with pytest.raises(Unfit, match="belongs to uid 65534"):
        StatsFile(SETTINGS, {}, root).write(sample())


def _oversized(path: Path) -> None:
    path.write_bytes(b" " * (MAX_BYTES + 1))


@pytest.mark.parametrize(
    "make, problem",
    [
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("/etc/passwd"), "no regular file"),
        (_oversized, "larger than"),
        (lambda path: path.write_bytes(b"\xff{"), "not understood"),
        (lambda path: path.write_bytes(b'{"version":"0"}'), "an upgrade"),
        (lambda path: path.write_bytes(b"[" * 100_000), "not understood"),
    ],
)
def test_what_is_no_stats_file_is_told_and_no_hang(
    root: Path, make: Callable[[Path], object], problem: str
) -> None:
    directory = root / "run/mbcap-watch"
    directory.mkdir()
    make(directory / f"{stem(SETTINGS)}1.json")
    search = find(SETTINGS, {}, root)
    assert not search.found
    [hidden] = search.hidden
    assert problem in str(hidden)


@as_root
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_somebody_else_is_told_whom_to_be(root: Path, mode: int) -> None:
    """What an unprivileged user may not read, or could have been told by just anybody."""
    mine, forged = root / "dev/shm/mbcap-watch-0", root / "dev/shm/mbcap-watch-7"
    write(mine, 1).chmod(0o600)
    mine.chmod(mode)
    for path in (write(forged, 2), forged):
        path.chmod(path.stat().st_mode | 0o444)
        os.chown(path, 7, 7)
    script = f"""
        import os, sys
        from pathlib import Path
        from mbcap_watch import Settings
        from mbcap_watch.telemetry.discover import find
        os.setgid({NOBODY}), os.setgroups([]), os.setuid({NOBODY})
        search = find(Settings(Path("/data/meshcore.db")), {{}}, Path(sys.argv[1]))
        print(len(search.found), *search.hidden, *search.obstacles, sep="|")
    """
    with other_process(script, str(root)) as process:
        line = read_line(process)
    assert line.startswith("0|")
    assert "belongs to uid 0, and uid 65534 may not read it; ask as root (sudo)" in line
    assert "belongs to uid 7, and uid 65534 may not read it; ask as root, or as uid 7" in line
    assert sorted(pids(find(SETTINGS, {}, root).found)) == [1, 2]  # root reads all


def test_a_reader_never_sees_half_a_file(root: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from mbcap_watch import Settings
        from mbcap_watch.telemetry.metrics import Metrics
        from mbcap_watch.results import PersistResult
        from mbcap_watch.telemetry.statsfile import StatsFile
        settings = Settings(Path("/data/meshcore.db"))
        file = StatsFile(settings, {}, Path(sys.argv[1]))
        metrics = Metrics(settings, version="1", pid=1)
        for length in range(10**9):
            error = "x" * (length * 37 % 5000)
            metrics.on_result(PersistResult(outcome="failed", reason="once", error=error))
            file.write(metrics.snapshot(time.time()))
            if not length:
                print("written", flush=True)
    """
    with other_process(script, str(root)) as process:
        assert read_line(process) == "written"
        seen: set[float] = set()
        while len(seen) < 200:
            search = find(SETTINGS, {}, root)
            assert not search.hidden
            seen.update(each.stats.sampled for each in search.found)
        process.kill()  # in the middle of a write, as like as not
        process.wait()
    search = find(SETTINGS, {}, root)
    assert (len(search.found), search.hidden) == (1, ())


class Keeper:
    """Does with a sample what a test wants."""

    path = "/a/file"

    def __init__(
        self, write: Callable[[int], object], *, every: float = 0.0, blocks: bool = False
    ) -> None:
        self.blocks, self.every = blocks, every
        self.count, self.removed = 0, False
        self._write = write

    def write(self, _: Stats) -> None:
        self.count += 1
        self._write(self.count)

    def remove(self) -> None:
        self.removed = True


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "_FIRST_SECONDS", 0.01)


@pytest.mark.anyio
@pytest.mark.usefixtures("fast", "no_leaks")
async def test_the_heart_beats_and_takes_the_file_with_it(root: Path) -> None:
    file, seldom = StatsFile(SETTINGS, {}, root), Keeper(lambda _: None, every=60.0, blocks=True)
    ticks = iter(range(10**9))
    with Heartbeat([file, seldom], lambda: sample(pid=next(ticks))):
        await until(lambda: pids(find(SETTINGS, {}, root).found) > [5])
    assert not find(SETTINGS, {}, root).found
    assert (seldom.count, seldom.removed) == (1, True)
    assert "mbcap-watch keeper" not in thread_names()


@pytest.mark.anyio
@pytest.mark.usefixtures("fast", "no_leaks")
@pytest.mark.parametrize("blocks", [True, False])
async def test_what_cannot_be_written_is_logged_once(
    caplog: pytest.LogCaptureFixture, blocks: bool
) -> None:
    def write(count: int) -> None:
        if count < 5:
            raise OSError(28, "No space left on device")

    caplog.set_level("INFO", "mbcap_watch")
    keeper = Keeper(write, blocks=blocks)
    with Heartbeat([keeper], sample):
        await until(lambda: keeper.count > 6)
    assert [record.getMessage() for record in caplog.records] == [
        "/a/file: cannot be written: No space left on device; the bridge works on without it",
        "/a/file: written again",
    ]


@pytest.mark.anyio
@pytest.mark.usefixtures("fast", "no_leaks")
async def test_a_thread_that_cannot_be_started_is_started_later(
    caplog: pytest.LogCaptureFixture, few_threads: Callable[[int], None]
) -> None:
    keeper, well = Keeper(lambda _: None, blocks=True), Keeper(lambda _: None)
    caplog.set_level("INFO", "mbcap_watch")
    few_threads(0)
    with Heartbeat([keeper, well], sample):
        await until(lambda: well.count > 2)
        assert keeper.count == 0
        few_threads(9)
        await until(lambda: keeper.count > 2)
    assert keeper.removed
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.anyio
@pytest.mark.usefixtures("fast", "no_leaks")
async def test_a_disk_that_does_not_answer_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "_END_SECONDS", 0.1)
    answer = threading.Event()
    stuck, well = Keeper(lambda _: answer.wait(), blocks=True), Keeper(lambda _: None)
    with Heartbeat([stuck, well], sample):
        await until(lambda: well.count > 5)
    assert (stuck.count, stuck.removed, well.removed) == (1, False, True)
    answer.set()
