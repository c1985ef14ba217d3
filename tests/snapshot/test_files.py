"""Reading the hand-off, whatever lies there, and publishing it, whoever else does."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch.errors import (
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotNotPublished,
    SnapshotRefused,
    SnapshotUnreadable,
)
from mbcap_watch.snapshot import timestamp
from mbcap_watch.snapshot.files import (
    Entry,
    Snapshot,
    ensure_snapshot_dir,
    read_file,
    read_snapshot,
    snapshot_dir,
    snapshot_path,
    write_snapshot,
)
from support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD = Snapshot((Entry("a", "confirmed", "advert"),), "2026-07-18T08:47:37Z")
NEW = Snapshot((Entry("b", "suspected", "path"),), "2026-07-18T08:52:37Z")
BYTES = b'{"writtenAt":"2026-07-18T08:47:37Z","entries":[]}'


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A path only: nothing here opens the database, so that there never is one."""
    return tmp_path / "meshcore.db"


@pytest.fixture
def path(database: Path) -> Path:
    """Where the snapshot of `database` goes; the directory is there."""
    return ensure_snapshot_dir(database) / "snapshot.json"


def read_without_blocking(database: Path, max_bytes: int = 1 << 20) -> Snapshot:
    """Read in a thread that the test can leave behind, should the read hang."""
    outcome: list[Snapshot | SnapshotError] = []

    def read() -> None:
        try:
            outcome.append(read_snapshot(database, max_bytes=max_bytes))
        except SnapshotError as exc:
            outcome.append(exc)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the read blocks"
    (result,) = outcome
    if isinstance(result, SnapshotError):
        raise result
    return result


def names(directory: Path) -> list[str]:
    """List a directory."""
    return sorted(os.listdir(directory))


def python(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own; it has to succeed."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        timeout=DEADLINE,
        check=True,
        text=True,
        capture_output=True,
    )


# ------------------------------------------------------------------------------ paths


def test_paths_are_beside_the_database(tmp_path: Path) -> None:
    database = tmp_path / "data" / "meshcore.db"
    assert snapshot_dir(database) == tmp_path / "data" / "mbcap-snapshot"
    assert snapshot_path(str(database)) == tmp_path / "data" / "mbcap-snapshot" / "snapshot.json"
    assert names(tmp_path) == []


def test_ensure_snapshot_dir_creates_it_once(tmp_path: Path) -> None:
    database = tmp_path / "not" / "yet" / "meshcore.db"
    assert ensure_snapshot_dir(database) == snapshot_dir(database)
    assert snapshot_dir(database).is_dir()
    assert ensure_snapshot_dir(database) == snapshot_dir(database)
    assert not database.exists()


# ------------------------------------------------------------------------------ reading


def test_reads_what_another_process_renamed_into_place(database: Path, path: Path) -> None:
    code = """
import os, sys
path = sys.argv[1]
with open(path + ".tmp", "w") as file:
    file.write('{"writtenAt": "2026-07-18T08:47:37Z", "entries": [{"public_key": "a"}]}')
os.rename(path + ".tmp", path)
"""
    python(code, path)
    assert read_snapshot(database) == Snapshot((Entry("a"),), "2026-07-18T08:47:37Z")


def test_reads_from_a_directory_of_its_own(database: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "nfs"
    write_snapshot(database, OLD, snapshot_dir=elsewhere)
    assert read_snapshot(database, snapshot_dir=str(elsewhere)) == OLD
    with pytest.raises(SnapshotNotFound):
        read_snapshot(database)


@pytest.mark.parametrize(
    "script, words, named, unusual",
    [
        ("true", "does not exist", "snapshot.json", False),
        ("mkdir mbcap-snapshot", "does not exist", "snapshot.json", False),
        ("touch mbcap-snapshot", "is not a directory", "mbcap-snapshot", True),
        ("mkfifo mbcap-snapshot", "is not a directory", "mbcap-snapshot", True),
        ("ln -s gone mbcap-snapshot", "symbolic link to nothing", "mbcap-snapshot", True),
        (
            "mkdir mbcap-snapshot; ln -s gone.json mbcap-snapshot/snapshot.json",
            "symbolic link to nothing",
            "snapshot.json",
            True,
        ),
    ],
)
def test_what_is_not_there_is_named(
    database: Path, script: str, words: str, named: str, unusual: bool
) -> None:
    subprocess.run(["sh", "-ec", script], cwd=database.parent, check=True)
    with pytest.raises(SnapshotNotFound, match=words) as caught:
        read_snapshot(database)
    assert (Path(caught.value.path).name, caught.value.unusual) == (named, unusual)


@pytest.mark.parametrize("circle", ["snapshot.json", ""], ids=["file", "directory"])
def test_a_link_in_a_circle(database: Path, circle: str) -> None:
    link = snapshot_dir(database) / circle
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("other")
    link.with_name("other").symlink_to(link)
    with pytest.raises(SnapshotRefused, match="leads in a circle"):
        read_snapshot(database)


def test_a_file_where_a_parent_should_be(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(SnapshotNotFound, match="is not a directory") as caught:
        read_snapshot(tmp_path / "data" / "meshcore.db")
    assert caught.value.path == str(tmp_path / "data")
    assert caught.value.unusual


def test_a_link_to_a_file_is_followed(database: Path, path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_bytes(BYTES)
    path.symlink_to(tmp_path / "elsewhere.json")
    assert read_snapshot(database).written_at == "2026-07-18T08:47:37Z"


def test_links_as_kubernetes_makes_them_are_followed_at_every_swap(
    database: Path, path: Path
) -> None:
    directory = path.parent
    for number in (1, 2):
        (directory / f"..{number}").mkdir()
        stamp = f"2026-07-18T00:00:0{number}Z"
        (directory / f"..{number}" / path.name).write_text(f'{{"writtenAt": "{stamp}"}}')
    path.symlink_to(Path("..data") / path.name)
    for number in (1, 2):
        (directory / "..data_tmp").symlink_to(f"..{number}")
        (directory / "..data_tmp").rename(directory / "..data")
        assert read_snapshot(database).written_at == f"2026-07-18T00:00:0{number}Z"


def test_a_directory(database: Path, path: Path) -> None:
    path.mkdir()
    with pytest.raises(SnapshotRefused, match="is a directory, not a regular file"):
        read_without_blocking(database)


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_does_not_block(database: Path, path: Path, linked: bool) -> None:
    fifo = path.parent / "fifo" if linked else path
    os.mkfifo(fifo)
    if linked:
        path.symlink_to(fifo)
    with pytest.raises(SnapshotRefused, match="is a FIFO"):
        read_without_blocking(database)


SWAPPER = """
import itertools, os, sys
path, stop = sys.argv[1:]
for count in itertools.count():
    if os.path.exists(stop):
        break
    if count % 2:
        os.mkfifo(path + ".new")
    else:
        with open(path + ".new", "w") as file:
            file.write("{}")
    os.rename(path + ".new", path)
"""


def test_a_fifo_that_takes_the_place_of_the_file_just_now_does_not_block(
    database: Path, path: Path, tmp_path: Path
) -> None:
    path.write_bytes(b"{}")
    outcomes: set[str] = set()
    deadline = time.monotonic() + DEADLINE

    def read_many() -> None:
        # Whenever the swap falls between two steps of a read, it is a FIFO, or it is the file.
        for count in itertools.count():
            if (count >= 10_000 and len(outcomes) > 1) or time.monotonic() > deadline:
                break
            try:
                read_snapshot(database)
                outcomes.add("read")
            except SnapshotError as exc:
                outcomes.add(f"{type(exc).__name__}: {exc.problem}")

    with subprocess.Popen([sys.executable, "-c", SWAPPER, path, tmp_path / "stop"]):
        thread = threading.Thread(target=read_many, daemon=True)
        try:
            while path.is_file():
                assert time.monotonic() < deadline
            thread.start()
            thread.join(2 * DEADLINE)
            assert not thread.is_alive(), "a read blocks"
        finally:
            (tmp_path / "stop").touch()
    assert outcomes == {"read", "SnapshotRefused: is a FIFO, not a regular file"}


def test_a_socket(database: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)  # the address of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
        with pytest.raises(SnapshotRefused, match="is a socket"):
            read_without_blocking(database)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device(database: Path, path: Path, device: str) -> None:
    path.symlink_to(device)
    with pytest.raises(SnapshotRefused, match="is a device"):
        read_without_blocking(database)


def bytes_read_so_far() -> int:
    """Ask the kernel how much this process has read (proc(5), `rchar`)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        key, _, value = line.partition(": ")
        if key == "rchar":
            return int(value)
    raise AssertionError


def test_a_huge_file_is_refused_without_being_read(database: Path, path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 10 << 30)  # sparse: it takes no space
    before = bytes_read_so_far()
    with pytest.raises(SnapshotRefused, match=r"larger than max_bytes \(12,582,912 bytes\)"):
        read_snapshot(database)
    assert bytes_read_so_far() - before < 1 << 20


def test_max_bytes_is_a_limit_to_the_byte(database: Path, path: Path) -> None:
    path.write_bytes(BYTES)
    assert read_snapshot(database, max_bytes=len(BYTES)).entries == ()
    with pytest.raises(SnapshotRefused, match="larger than max_bytes"):
        read_snapshot(database, max_bytes=len(BYTES) - 1)


def test_a_file_that_hides_its_size_is_read_to_its_end_and_no_further() -> None:
    # Files in /proc say that they are empty, as files on some network filesystems do.
    path = Path("/proc/cpuinfo")
    assert path.stat().st_size == 0
    assert len(read_file(path, 1 << 20).data) > 100
    with pytest.raises(SnapshotRefused, match="larger than max_bytes"):
        read_file(path, 100)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("locked", ["file", "directory"])
def test_no_permission(database: Path, path: Path, locked: str) -> None:
    path.write_bytes(BYTES)
    place = path if locked == "file" else path.parent
    place.chmod(0)
    try:
        with pytest.raises(SnapshotUnreadable, match="Permission denied"):
            read_snapshot(database)
    finally:
        place.chmod(0o755)


def test_a_name_that_no_filesystem_takes(tmp_path: Path) -> None:
    with pytest.raises(SnapshotUnreadable, match="File name too long") as caught:
        read_snapshot(tmp_path / "db", snapshot_dir=tmp_path / ("x" * 300))
    assert caught.value.cause != "limit"


def test_malformed_names_the_file(database: Path, path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(SnapshotMalformed) as caught:
        read_snapshot(database)
    assert caught.value.path == str(path)


def test_no_read_leaves_a_descriptor_behind(database: Path, path: Path) -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_descriptors()
    for data, max_bytes in ((BYTES, 1000), (BYTES, 3), (b"torn", 1000)):
        path.write_bytes(data)
        with contextlib.suppress(SnapshotError):
            read_snapshot(database, max_bytes=max_bytes)
    with pytest.raises(SnapshotRefused):
        read_file(Path("/proc/cpuinfo"), 100)  # refused after it was opened
    assert open_descriptors() == before


# ------------------------------------------------------------------------------ publishing


def test_publishes_what_is_read_back(database: Path) -> None:
    assert write_snapshot(database, OLD) == OLD
    assert read_snapshot(database) == OLD
    assert write_snapshot(str(database), NEW) == NEW
    assert read_snapshot(database) == NEW
    assert names(snapshot_dir(database)) == ["snapshot.json"]
    assert not database.exists()


@pytest.mark.parametrize("written_at", [None, timestamp.ZERO])
def test_stamps_the_time(database: Path, written_at: str | None) -> None:
    before = timestamp.now()
    published = write_snapshot(database, Snapshot(OLD.entries, written_at))
    assert published.entries == OLD.entries
    assert published.written_at is not None
    # To the second: trailing zeros are dropped, so that the full texts do not sort as times.
    assert before[:19] <= published.written_at[:19] <= timestamp.now()[:19]
    assert read_snapshot(database) == published


def test_the_name_is_replaced_not_the_file(database: Path, path: Path) -> None:
    write_snapshot(database, OLD)
    with path.open("rb") as reader:
        write_snapshot(database, NEW)
        assert b'"2026-07-18T08:47:37Z"' in reader.read()
    assert read_snapshot(database) == NEW


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077], indirect=True)
def test_modes_follow_the_umask(database: Path, umask: int) -> None:
    write_snapshot(database, OLD)
    directory, path = snapshot_dir(database), snapshot_path(database)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755 & ~umask
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~umask


def test_an_existing_directory_keeps_its_mode(database: Path) -> None:
    snapshot_dir(database).mkdir(mode=0o700)
    write_snapshot(database, OLD)
    assert stat.S_IMODE(snapshot_dir(database).stat().st_mode) == 0o700


def test_leftovers_of_killed_publishers_are_removed_after_an_hour(
    database: Path, path: Path
) -> None:
    now = time.time()
    for name, age in {
        "snapshot.json.0123456789abcdef.tmp": 3700,
        "snapshot.json.fedcba9876543210.tmp": 3500,  # its owner may be at it still
        "snapshot.json.tmp": 90_000,  # belongs to the Go server
        "notes.tmp": 90_000,
        "snapshot.json.bak": 90_000,
    }.items():
        (path.parent / name).write_bytes(b"x")
        os.utime(path.parent / name, (now - age, now - age))
    (path.parent / "snapshot.json.directory.tmp").mkdir()
    os.utime(path.parent / "snapshot.json.directory.tmp", (0, 0))  # not ours: left, and no error
    write_snapshot(database, OLD)
    assert names(path.parent) == [
        "notes.tmp",
        "snapshot.json",
        "snapshot.json.bak",
        "snapshot.json.directory.tmp",
        "snapshot.json.fedcba9876543210.tmp",
        "snapshot.json.tmp",
    ]


def test_what_no_reader_would_take_is_not_published(database: Path) -> None:
    write_snapshot(database, OLD)
    for bad in (
        Snapshot((Entry("\ud800"),)),
        Snapshot((), "yesterday"),
        Snapshot((Entry("k" * 1025, "confirmed"),)),
        Snapshot(None),  # type: ignore[arg-type]
        None,
    ):
        with pytest.raises(SnapshotMalformed):
            write_snapshot(database, bad)  # type: ignore[arg-type]
    assert read_snapshot(database) == OLD
    assert names(snapshot_dir(database)) == ["snapshot.json"]


def test_what_is_larger_than_a_reader_accepts_is_not_published(database: Path) -> None:
    write_snapshot(database, OLD)
    size = snapshot_path(database).stat().st_size
    assert write_snapshot(database, OLD, max_bytes=size) == OLD
    assert read_snapshot(database, max_bytes=size) == OLD
    with pytest.raises(SnapshotMalformed, match=rf"takes {size} bytes, more than max_bytes"):
        write_snapshot(database, OLD, max_bytes=size - 1)
    large = tuple(Entry(f"{number:064x}", "confirmed", "x" * 4000) for number in range(3_200))
    with pytest.raises(SnapshotMalformed, match=r"more than max_bytes \(12,582,912\)"):
        write_snapshot(database, Snapshot(large))
    assert read_snapshot(database) == OLD


def test_an_entry_without_a_key_is_not_published_as_one_with_an_empty_key(database: Path) -> None:
    entries = (Entry(None, "confirmed", "advert"), Entry("", "suspected"), Entry("a"))
    write_snapshot(database, Snapshot(entries))
    assert read_snapshot(database).entries == entries


def test_a_full_disk_keeps_the_old_snapshot(database: Path) -> None:
    # RLIMIT_FSIZE makes the kernel cut the write off in the middle, even for root.
    write_snapshot(database, OLD)
    code = """
import resource, sys
from mbcap_watch.errors import SnapshotNotPublished
from mbcap_watch.snapshot.files import Entry, Snapshot, write_snapshot
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_snapshot(sys.argv[1], Snapshot((Entry("k", "confirmed", "x" * 4_096),)))
except SnapshotNotPublished as exc:
    print(exc)
"""
    assert "File too large" in python(code, database).stdout
    assert read_snapshot(database) == OLD
    assert names(snapshot_dir(database)) == ["snapshot.json"]


def test_a_rename_that_fails_leaves_nothing_behind(database: Path, path: Path) -> None:
    path.mkdir()
    with pytest.raises(SnapshotNotPublished, match="Is a directory"):
        write_snapshot(database, OLD)
    assert names(path.parent) == ["snapshot.json"]


def test_a_directory_that_cannot_be_made(database: Path) -> None:
    snapshot_dir(database).write_bytes(b"")
    with pytest.raises(SnapshotNotPublished, match="cannot be created"):
        write_snapshot(database, OLD)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_ours(database: Path) -> None:
    write_snapshot(database, OLD)
    snapshot_dir(database).chmod(0o555)
    try:
        with pytest.raises(SnapshotNotPublished, match="Permission denied"):
            write_snapshot(database, NEW)
    finally:
        snapshot_dir(database).chmod(0o755)
    assert read_snapshot(database) == OLD


PUBLISHER = """
import itertools, os, sys
from mbcap_watch.snapshot.files import Entry, Snapshot, write_snapshot
database, name, stop = sys.argv[1:]
for count in itertools.count():
    if os.path.exists(stop):
        break
    # Of another length each time, from 1 to 1500 entries, all with the same evidence.
    length = 1 + count * 377 % 1500
    evidence = f"{name} {count} {length}"
    entries = tuple(Entry(f"{number:064x}", "confirmed", evidence) for number in range(length))
    write_snapshot(database, Snapshot(entries))
"""


def test_publishers_at_the_same_time_never_tear_the_file(database: Path, tmp_path: Path) -> None:
    write_snapshot(database, Snapshot((Entry("0", "confirmed", "first 0 1"),)))
    stop = tmp_path / "stop"
    publishers = [
        subprocess.Popen([sys.executable, "-c", PUBLISHER, database, name, stop])
        for name in ("ann", "bob", "cyd")
    ]
    seen: dict[str, set[str]] = {"first": set(), "ann": set(), "bob": set(), "cyd": set()}
    deadline = time.monotonic() + DEADLINE
    try:
        while min(len(seen[name]) for name in ("ann", "bob", "cyd")) < 30:
            assert time.monotonic() < deadline, seen
            entries = read_snapshot(database).entries  # raises if torn
            (evidence,) = {entry.evidence for entry in entries}
            assert evidence is not None
            name, count, length = evidence.split()
            assert len(entries) == int(length)
            seen[name].add(count)
        stop.touch()
        assert [publisher.wait(DEADLINE) for publisher in publishers] == [0, 0, 0]
    finally:
        for publisher in publishers:
            publisher.kill()
            publisher.wait()
    assert names(snapshot_dir(database)) == ["snapshot.json"]


def test_a_publisher_killed_at_any_moment_leaves_a_whole_snapshot(
    database: Path, tmp_path: Path
) -> None:
    write_snapshot(database, Snapshot((Entry("0", "confirmed", "first 0 1"),)))
    command: list[str | Path] = [
        sys.executable,
        "-c",
        PUBLISHER,
        database,
        "ann",
        tmp_path / "stop",
    ]
    with subprocess.Popen(command) as publisher:
        deadline = time.monotonic() + DEADLINE
        while (read_snapshot(database).entries[0].evidence or "").startswith("first"):
            assert time.monotonic() < deadline
        publisher.kill()
    entries = read_snapshot(database).entries
    assert {entry.evidence for entry in entries} == {entries[0].evidence}
    write_snapshot(database, OLD)  # and is not in the way of the next
    assert read_snapshot(database) == OLD


def test_the_hand_off_needs_neither_aiosqlite_nor_watchdog(database: Path) -> None:
    code = """
import sys
for name in ("aiosqlite", "anyio", "rich", "sqlite3", "_sqlite3", "click", "watchdog"):
    sys.modules[name] = None  # makes an import of it fail
import mbcap_watch
from mbcap_watch.snapshot.files import read_snapshot, write_snapshot
mbcap_watch.write_snapshot(sys.argv[1], mbcap_watch.Snapshot((mbcap_watch.Entry("a"),)))
print(read_snapshot(sys.argv[1]).entries[0].public_key)
"""
    assert python(code, database).stdout == "a\n"


def test_a_file_is_not_blamed_for_a_limit(database: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/", os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
        with pytest.raises(SnapshotUnreadable) as caught:
            read_snapshot(database)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(lowest)
    assert caught.value.cause == "limit"


@pytest.mark.parametrize("number, harmless", [("EINVAL", True), ("ENOTSUP", True), ("EIO", False)])
def test_a_directory_that_cannot_be_flushed(
    database: Path, number: str, harmless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some filesystems do not know how; on others the snapshot may be lost in a power cut."""
    flush = os.fsync

    def fsync(file: Any) -> None:
        if isinstance(file, int):  # and no file object
            raise OSError(getattr(errno, number), number)
        flush(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if harmless else pytest.raises(SnapshotNotPublished, match="EIO"):
        write_snapshot(database, NEW)
    assert read_snapshot(database) == NEW


def test_a_file_that_comes_in_pieces_is_read_to_its_end_and_no_further(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a filesystem that gives little at a time, and tells no size."""
    read, stat_of = os.read, os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = stat_of(descriptor)
        return os.stat_result((*status[:6], 0, *status[7:]))

    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 1000)))
    monkeypatch.setattr(os, "fstat", fstat)
    path.write_bytes(BYTES + b" " * 5000)
    size = path.stat().st_size
    assert read_file(path, size).data == path.read_bytes()
    with pytest.raises(SnapshotRefused, match="larger than max_bytes"):
        read_file(path, size - 1)
