"""A watch that never goes blind: what can happen to the directory, and how it heals.

The mechanism under test is alone: the other clocks are switched off for a day.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from machine import ROOT, mounted, unshared, without_rights
from mbcap_watch import Settings, snapshot_path
from mbcap_watch.bridge import loading, service, sync
from mbcap_watch.results import WatchState
from mbcap_watch.telemetry.ask import ask
from mbcap_watch.watcher import inotify
from mbcap_watch.watcher.inotify import InotifyWatch
from mbcap_watch.watcher.supervisor import Watch
from processes import daemon
from support import (
    DEADLINE,
    Results,
    bridge,
    document,
    has_landed,
    landed,
    open_descriptors,
    other_process,
    put,
    read_line,
    read_rows,
    rename_from_another_process,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from processes import Process

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


SWEEP = {"sweep_interval": "20ms", "poll_interval": "20ms"}


def entry(evidence: str) -> bytes:
    return document(("aa11", "confirmed", evidence))


async def armed(results: Results, *, rearms: int = 0) -> None:
    await until(
        lambda: results.state.mode == "inotify" and results.state.rearms >= rearms, "the watch"
    )


# ------------------------------------------------------------------------------ one contract

ALONE = [
    pytest.param({"mode": "inotify"}, id="inotify"),
    pytest.param({"mode": "poll", "poll_interval": "20ms"}, id="poll"),
]


@pytest.mark.parametrize("alone", ALONE)
async def test_a_rename_from_another_directory(database: Path, alone: dict[str, str]) -> None:
    outside = database.with_name("outside.json")
    outside.write_bytes(entry("new"))
    async with bridge(database, **alone):
        os.replace(outside, snapshot_path(database))
        await landed(database, "new")


@pytest.mark.parametrize("alone", ALONE)
async def test_a_directory_that_is_a_link(database: Path, alone: dict[str, str]) -> None:
    real = snapshot_path(database).parent
    real.rename(database.with_name("real"))
    real.symlink_to(database.with_name("real"))
    async with bridge(database, **alone):
        rename_from_another_process(entry("new"), database.with_name("real") / "snapshot.json")
        await landed(database, "new")


@pytest.mark.parametrize("alone", ALONE)
async def test_files_that_kubernetes_swaps_by_a_link(database: Path, alone: dict[str, str]) -> None:
    """snapshot.json -> ..data/snapshot.json, and ..data is replaced by rename."""
    directory = snapshot_path(database).parent
    for name in ("v1", "v2"):
        (directory / name).mkdir()
        (directory / name / "snapshot.json").write_bytes(entry(name))
    (directory / "..data").symlink_to("v1")
    snapshot_path(database).symlink_to("..data/snapshot.json")
    async with bridge(database, **alone):
        await landed(database, "v1")
        (directory / "..tmp").symlink_to("v2")
        os.replace(directory / "..tmp", directory / "..data")
        await landed(database, "v2")


@pytest.mark.parametrize("alone", ALONE)
async def test_same_size_same_time_same_name(database: Path, alone: dict[str, str]) -> None:
    """No stamp tells the two files apart, only their content."""
    put(entry("one"), snapshot_path(database))
    os.utime(snapshot_path(database), ns=(10**18, 10**18))
    async with bridge(database, **alone):
        new = snapshot_path(database).with_name("new")
        new.write_bytes(entry("two"))
        os.utime(new, ns=(10**18, 10**18))
        os.replace(new, snapshot_path(database))
        await landed(database, "two")


# ------------------------------------------------------------------------------ speed


async def test_unrelated_files_that_leave_do_not_hold_us_up(database: Path) -> None:
    """watchdog's own mask makes an IN_MOVED_FROM wait for half a second, and all behind it."""
    directory = snapshot_path(database).parent
    async with bridge(database, mode="inotify") as results:
        waited, number = 1.0, 0
        while waited > 0.4:  # never less with that mask; a slow machine may take its time
            (directory / "unrelated").write_bytes(b"")
            os.replace(directory / "unrelated", database.with_name("gone"))
            started = time.monotonic()
            put(entry(str(number)), snapshot_path(database))
            number += 1
            await results.count("applied", number)
            waited = time.monotonic() - started
            assert number < 50


@pytest.mark.parametrize("mode, count", [("inotify", 10_000), ("poll", 1_000)])
async def test_a_burst_is_few_syncs_and_its_last_state_lands(
    database: Path, mode: str, count: int
) -> None:
    script = """
        import os, sys
        path = sys.argv[1]
        for number in range(int(sys.argv[2])):
            with open(path + ".t", "w") as file:
                entry = '{"public_key":"aa11","status":"confirmed","evidence":"%d"}' % number
                file.write('{"entries":[' + entry + ']}')
            os.replace(path + ".t", path)
        print("done", flush=True)
    """
    async with bridge(database, mode=mode, poll_interval="200ms") as results:
        with other_process(script, str(snapshot_path(database)), str(count)) as process:
            assert await anyio.to_thread.run_sync(read_line, process) == "done"
        await landed(database, f"{count - 1}")
        assert len(results.all) < count / 10, "at most one per max_wait, or per poll"


def test_only_what_matters_is_asked_of_the_kernel(tmp_path: Path) -> None:
    armed = inotify.InotifyWatch(tmp_path, lambda: None)
    try:
        (line,) = armed._read_kernel_watches()
        mask = int(dict(part.split(":") for part in line.split()[1:])["mask"], 16)
        assert mask & 0xFFF == 0x80 | 0x400 | 0x800  # IN_MOVED_TO, IN_DELETE_SELF, IN_MOVE_SELF
    finally:
        armed.close()


# ------------------------------------------------------------------------------ polling


async def test_polling_holds_nothing_open(database: Path) -> None:
    put(entry("x"), snapshot_path(database))
    async with bridge(database, mode="poll", poll_interval="10ms") as results:
        before = len(open_descriptors())
        seen: list[int] = []
        for _ in range(20):
            await until(lambda: len(results.states) > len(seen))
            seen.append(len(open_descriptors()))
        assert min(seen) <= before
        assert not any("snapshot" in path for path in open_descriptors().values())


@pytest.mark.system
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_poll_costs_a_few_calls_whatever_lies_in_the_directory(database: Path) -> None:
    put(entry("x"), snapshot_path(database))
    for number in range(3000):
        (snapshot_path(database).parent / f"other-{number}").write_bytes(b"")
    script = f"""if True:
        import os
        from mbcap_watch import Settings
        from mbcap_watch.bridge.loading import load
        settings = Settings({str(database)!r})
        known = load(settings, None).fingerprint
        os.access("/marker", os.F_OK)
        load(settings, known)
        os.access("/marker", os.F_OK)
    """
    trace = subprocess.run(
        ["strace", "-f", sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stderr
    _, look, _ = trace.split('access("/marker"')
    calls = [line for line in look.splitlines()[1:] if "(" in line]
    on_the_way = 2 * len(database.parts)  # each directory is opened and closed: see `links`
    assert 5 <= len(calls) - on_the_way <= 25, look


def test_a_file_whose_stamp_is_known_is_not_read(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, path = Settings(database), snapshot_path(database)
    put(entry("aa"), path)
    young = loading.load(settings)
    assert young.stamp is None  # another one may come within the same tick of the clock
    wait_until(lambda: loading.load(settings).stamp is not None)
    first = loading.load(settings)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "read_file", None)
        assert (
            loading.load(settings, first.fingerprint, stamp=first.stamp).fingerprint
            == first.fingerprint
        )
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"aa", b"bb", 1))  # of the same length, in place
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (
        loading.load(settings, first.fingerprint, stamp=first.stamp).fingerprint
        != first.fingerprint
    )


def test_a_file_elsewhere_than_its_directory_is_always_read(database: Path) -> None:
    """`stat` may be late by 20 seconds where its link leads (sshfs); the watch does not know."""
    path = snapshot_path(database)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(path.parent).st_dev:
            pytest.skip("needs a second filesystem")
        far, near = Path(elsewhere, "far.json"), path.with_name("near.json")
        put(entry("aa"), far)
        put(entry("aa"), near)

        def stamp_of(target: Path) -> object:
            path.unlink(missing_ok=True)
            path.symlink_to(target)
            return loading.load(Settings(database)).stamp

        wait_until(lambda: stamp_of(near) is not None)
        assert stamp_of(far) is None  # although it is older


def test_a_sweep_relies_on_stat_where_inotify_does_and_nowhere_else(database: Path) -> None:
    relied = []
    for mode in ("auto", "poll"):
        watch = Watch(Settings(database, mode=mode), lambda: None)
        watch.refresh()
        relied.append(watch.sees_every_change)
        watch.close()
        assert not watch.sees_every_change
    assert relied == [True, False]


# ------------------------------------------------------------------------------ healing


async def test_the_directory_is_deleted_and_made_again(database: Path) -> None:
    directory = snapshot_path(database).parent
    async with bridge(database, **SWEEP) as results:
        shutil.rmtree(directory)
        await until(lambda: results.state.mode == "poll")
        put(entry("new"), snapshot_path(database))
        await landed(database, "new")
        await armed(results, rearms=1)


async def test_the_directory_is_deleted_while_open_elsewhere(database: Path) -> None:
    """Then the kernel does not tell: the inode lives on."""
    directory = snapshot_path(database).parent
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        async with bridge(database, **SWEEP) as results:
            shutil.rmtree(directory)
            put(entry("new"), snapshot_path(database))
            await landed(database, "new")
            await armed(results, rearms=1)
    finally:
        os.close(descriptor)


async def test_the_directory_is_moved_away_and_back(database: Path) -> None:
    directory = snapshot_path(database).parent
    async with bridge(database, **SWEEP) as results:
        directory.rename(database.with_name("away"))
        await until(lambda: results.state.mode == "poll")
        put(entry("away"), database.with_name("away") / "snapshot.json")
        database.with_name("away").rename(directory)
        await landed(database, "away")
        await armed(results, rearms=1)


async def test_another_directory_takes_its_place(database: Path) -> None:
    directory = snapshot_path(database).parent
    other = database.with_name("other")
    other.mkdir()
    (other / "snapshot.json").write_bytes(entry("other"))
    async with bridge(database, **SWEEP) as results:
        directory.rename(database.with_name("away"))
        other.rename(directory)
        await landed(database, "other")
        await armed(results, rearms=1)
        rename_from_another_process(entry("then"), snapshot_path(database))
        await landed(database, "then")


async def test_a_link_takes_its_place_and_is_turned(database: Path) -> None:
    directory = snapshot_path(database).parent
    for name in ("one", "two"):
        database.with_name(name).mkdir()
        (database.with_name(name) / "snapshot.json").write_bytes(entry(name))
    async with bridge(database, **SWEEP) as results:
        for name in ("one", "two"):
            if directory.is_symlink():
                directory.unlink()
            else:
                directory.rename(database.with_name("away"))
            directory.symlink_to(database.with_name(name))
            await landed(database, name)
        await armed(results, rearms=2)
        assert results.state.sweep_hits == 0, "the watch was repaired, and missed nothing"


@pytest.mark.system
async def test_mounted_over_and_unmounted(database: Path) -> None:
    directory = snapshot_path(database).parent
    put(entry("below"), snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await landed(database, "below")
        with mounted(directory, "-t", "tmpfs", "none"):
            put(entry("above"), snapshot_path(database))
            await landed(database, "above")
            await armed(results, rearms=1)
            rename_from_another_process(entry("above 2"), snapshot_path(database))
            await landed(database, "above 2")
        await landed(database, "below")
        await armed(results, rearms=2)


async def test_a_file_is_in_place_of_the_directory(database: Path) -> None:
    directory = snapshot_path(database).parent
    async with bridge(database, **SWEEP) as results:
        directory.rmdir()
        directory.write_bytes(b"")
        result = await results.next("no_snapshot", after=1)
        assert "is not a directory" in str(result.error)
        directory.unlink()
        put(entry("new"), snapshot_path(database))
        await landed(database, "new")
        await armed(results)


# ------------------------------------------------------------------------------ limits


@pytest.mark.system
@pytest.mark.parametrize("spare", range(6))
def test_no_descriptor_is_left_for_the_observer(tmp_path: Path, spare: int) -> None:
    """Each attempt fails cleanly; watchdog's constructor alone would leak one at every attempt."""
    script = f"""if True:
        import os, resource
        from pathlib import Path
        from mbcap_watch.watcher.inotify import InotifyWatch
        InotifyWatch(Path({str(tmp_path)!r}), lambda: None).close()
        held = [os.open("/dev/null", os.O_RDONLY)]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1 + {spare}, hard))
        outcomes = []
        for _ in range(10):
            try:
                InotifyWatch(Path({str(tmp_path)!r}), lambda: None).close()
                outcomes.append("armed")
            except OSError as exc:
                outcomes.append(exc.strerror)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        last = os.open("/dev/null", os.O_RDONLY)
        print(last - held[0] - 1, set(outcomes))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # noqa: PLW1510
    leaked, _, outcomes = done.stdout.partition(" ")
    assert leaked == "0", done
    assert outcomes.strip() == ("{'armed'}" if spare >= 4 else "{'Too many open files'}"), done


def test_no_descriptor_is_inherited_over_exec(tmp_path: Path) -> None:
    script = "import os; print(*(os.readlink(f.path) for f in os.scandir('/proc/self/fd')))"
    command = [sys.executable, "-c", script]
    before = set(open_descriptors().values())
    watch = InotifyWatch(tmp_path, lambda: None)
    try:
        opened = set(open_descriptors().values()) - before
        done = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True)
    finally:
        watch.close()
    assert "anon_inode:inotify" in opened
    assert not opened & set(done.stdout.split())


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_descriptors_that_somebody_else_takes_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """Another thread opens files after we have looked whether there are enough descriptors."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)

    def limit(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count - taken, usual[1]))

    monkeypatch.setattr("mbcap_watch.watcher.inotify.require_descriptors", limit)
    try:
        with pytest.raises(OSError, match=r"limit|Too many"):
            InotifyWatch(tmp_path, lambda: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.parametrize("spare", range(4))
def test_without_threads_nothing_is_left_behind(
    tmp_path: Path, few_threads: Callable[[int], None], spare: int
) -> None:
    few_threads(spare)
    if spare < 3:
        with pytest.raises(BlockingIOError):
            InotifyWatch(tmp_path, lambda: None)
    else:
        InotifyWatch(tmp_path, lambda: None).close()


async def test_a_thread_of_watchdog_dies(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bridge(database, **SWEEP) as results:
        (reader,) = [t for t in threading.enumerate() if type(t).__name__ == "_Reader"]
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(reader, "handle_event", None)  # not callable: the thread dies
        put(entry("lost"), snapshot_path(database))
        await landed(database, "lost")  # by the sweep
        await armed(results, rearms=1)
        assert "thread" in str(results.state.last_problem)
        monkeypatch.undo()
        rename_from_another_process(entry("seen"), snapshot_path(database))
        await landed(database, "seen")


# ------------------------------------------------------------------------------ in its place


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (Path.mkdir, "refused"),
    "fifo": (os.mkfifo, "refused"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no_snapshot"),
    "loop": (lambda path: path.symlink_to("snapshot.json"), "refused"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "refused"),
    "sparse file": (
        lambda path: subprocess.run(["truncate", "-s10G", path], check=True),
        "refused",
    ),
}


@pytest.mark.parametrize("mode, kind", [("poll", "fifo"), *(("inotify", kind) for kind in HOSTILE)])
async def test_whatever_takes_the_place_of_the_file(database: Path, mode: str, kind: str) -> None:
    """It never blocks the loop, is told once, and heals when it is gone."""
    path, (make, outcome) = snapshot_path(database), HOSTILE[kind]
    put(entry("good"), path)
    async with bridge(database, mode=mode, **SWEEP) as results:
        make(path.with_name("hostile"))
        if kind == "directory":
            path.unlink()
        os.replace(path.with_name("hostile"), path)
        result = await results.next(outcome, after=1)
        assert result.error is not None
        await results.syncs(10)
        assert results.outcomes.count(outcome) <= 2, "told once by the event, once by a look"
        assert ("nodes", "aa11", 2, "good") in read_rows(database)
        if kind == "directory":
            path.rmdir()
        put(entry("healed"), path)
        await landed(database, "healed")


async def test_a_file_that_grows_while_it_is_read_is_bounded(database: Path) -> None:
    """An endless writer: reading stops at max_bytes."""
    script = """
        import sys
        with open(sys.argv[1], "wb") as file:
            file.write(b'{"entries": [')
            file.flush()
            print("started", flush=True)
            while True:
                file.write(b" " * 65536)
    """
    big = str(4 << 20)
    async with bridge(database, mode="poll", max_bytes=big, **SWEEP) as results:
        with other_process(script, str(snapshot_path(database))) as process:
            read_line(process)
            await results.next("refused")
        put(entry("healed"), snapshot_path(database))
        await landed(database, "healed")


# ------------------------------------------------------------------------------ the daemon


CLOCKS = ("--sweep-interval=100ms", "--poll-interval=50ms")


def told(database: Path) -> WatchState:
    """Return what the daemon tells `status` of its watch."""
    answers = [peer.stats for peer in ask(Settings(database), os.environ) if peer.named]
    return answers[0].watch if answers and answers[0] else WatchState()


def wait_for_line(process: Process, text: str) -> None:
    wait_until(lambda: text in process.said, f"{text!r} in the log")


def wait_for_rows(database: Path, evidence: str) -> None:
    wait_until(partial(has_landed, database, evidence), evidence)


@pytest.mark.slow
@pytest.mark.system
def test_an_overflow_of_the_queue(database: Path) -> None:
    """The daemon is stopped while more happens than the kernel keeps; the last events are lost."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 50_000:
        pytest.skip("the kernel's queue is too long to overflow it here")
    with daemon(database, *CLOCKS) as process:
        wait_for_line(process, "watching by inotify")
        process.popen.send_signal(signal.SIGSTOP)
        one, other = (snapshot_path(database).with_name(name) for name in ("one", "other"))
        one.touch()
        for _ in range(limit // 2 + 100):  # a rename to and fro is two events
            one.rename(other)
            other.rename(one)
        put(entry("last"), snapshot_path(database))
        process.popen.send_signal(signal.SIGCONT)
        wait_for_rows(database, "last")
        put(entry("then"), snapshot_path(database))
        wait_for_rows(database, "then")
        wait_for_line(process, "queue overflowed")
        assert process.said.count("watching by") == 1


@pytest.mark.system
def test_permission_lost_and_regained(database: Path) -> None:
    directory = snapshot_path(database).parent
    with daemon(database, *CLOCKS, prefix=without_rights()) as process:
        put(entry("one"), snapshot_path(database))
        wait_for_rows(database, "one")

        directory.chmod(0)
        wait_for_line(process, "Permission denied")
        if ROOT:
            put(entry("two"), snapshot_path(database))
        then = time.time()
        wait_until(lambda: (told(database).last_sync or 0.0) > then, "a look after that")
        lines = process.said.splitlines()
        assert len([line for line in lines if "Permission denied" in line]) <= 2, lines

        directory.chmod(0o755)
        if not ROOT:
            put(entry("two"), snapshot_path(database))
        wait_for_rows(database, "two")
        put(entry("three"), snapshot_path(database))
        wait_for_rows(database, "three")
        assert not process.ended


def instances_are_left() -> bool:
    """Whether the machine has an inotify instance left: other processes may use up all."""
    try:
        InotifyWatch(Path("/"), lambda: None).close()
    except OSError:
        return False
    return True


@pytest.mark.system
@pytest.mark.parametrize("kind, word", [("watches", "watch"), ("instances", "instance")])
def test_the_kernels_limit_is_reached_and_then_lifted(database: Path, kind: str, word: str) -> None:
    """ENOSPC and EMFILE: the limit of a user namespace of its own is set to none, and later lifted.

    Not that of this user: whatever else runs here would lose its watches.
    """
    limit = f"/proc/sys/user/max_inotify_{kind}"
    limited = unshared(f"echo 0 > {limit}", "-U", "-r")
    with daemon(database, *CLOCKS, prefix=limited) as process:

        def held() -> int:
            """Count its descriptors, but for those with which it asks for locks."""
            paths = open_descriptors(process.popen.pid).values()
            return sum(not path.startswith(str(database)) for path in paths)

        wait_for_line(process, "watching by poll")
        put(entry("polled"), snapshot_path(database))
        wait_for_rows(database, "polled")
        before = held()
        put(entry("polled again"), snapshot_path(database))
        wait_for_rows(database, "polled again")
        wait_until(lambda: held() <= before, "no more of them")
        assert process.said.count(f"inotify {word} limit") == 1, process.said
        wait_until(lambda: told(database).degraded, "what status is told")

        inside = ["nsenter", "-t", str(process.popen.pid), "-U", "sh", "-c", f"echo 100 > {limit}"]
        subprocess.run(inside, check=True)
        # The limits around the namespace hold as well, and count what others use.
        wait_until(
            lambda: "watching by inotify" in process.said or not instances_are_left(), "inotify"
        )
        if "watching by inotify" not in process.said:
            pytest.skip("other processes use all inotify instances of this machine")
        put(entry("seen"), snapshot_path(database))
        wait_for_rows(database, "seen")
        assert process.said.count("watching by") == 2
        wait_until(lambda: told(database).armed_since is not None, "what status is told")


# ------------------------------------------------------------------------------ a hung mount


async def test_a_mount_that_does_not_answer(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop lives, the state says so, there is one stuck reader, and the host can leave.

    A mount cannot be hung here; the call that would hang is held by an event instead.
    """
    monkeypatch.setattr(service, "STUCK_SECONDS", 0.1)
    answers, calls = threading.Event(), []
    original = loading.load

    def load(*args: Any) -> Any:
        calls.append(1)
        assert answers.wait(DEADLINE)
        return original(*args)

    async with bridge(database, mode="poll", poll_interval="10ms") as results:
        monkeypatch.setattr(sync, "load", load)
        await until(lambda: results.state.stuck_since is not None)
        assert len(calls) == 1
        answers.set()
        await until(lambda: results.state.stuck_since is None)
        answers.clear()
        await until(lambda: results.state.stuck_since is not None)
        last = len(calls)
    assert not answers.is_set()
    assert len(calls) == last, "it hangs still"
    answers.set()
