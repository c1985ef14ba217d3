"""Links that somebody else has put in place of the snapshot, or of its directory."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from watchdog.events import FileOpenedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from machine import as_root
from mbcap_watch import read_snapshot, snapshot_path
from mbcap_watch.errors import SnapshotNotFound, SnapshotRefused
from mbcap_watch.snapshot import links
from processes import daemon
from support import close_as_a_server_that_is_gone, document, other_process, read_rows, wait_until

PUBLISHER, OTHER = 12345, 12346
GOOD = document(("aa11", "confirmed", "advert"), written_at="2026-07-18T08:47:37Z")


@pytest.fixture
def path(database: Path) -> Path:
    return snapshot_path(database)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A directory that only root may enter, with a snapshot in it that only root may read."""
    directory = tmp_path / "secret"
    directory.mkdir(mode=0o700)
    (directory / "snapshot.json").write_bytes(GOOD)
    (directory / "snapshot.json").chmod(0o600)
    return directory


def link(path: Path, target: str | Path, owner: int) -> None:
    path.symlink_to(target)
    os.lchown(path, owner, owner)


def give(path: Path, owner: int, data: bytes = GOOD) -> Path:
    path.write_bytes(data)
    os.chown(path, owner, owner)
    return path


def let_others_in(path: Path) -> None:
    """Open the directories that pytest, and xdist, made for their user alone."""
    path.chmod(0o755)
    for each in path.parents:
        if each.name.startswith(("pytest-", "popen-")):
            each.chmod(0o755)


def refusal(database: Path) -> str:
    with pytest.raises(SnapshotRefused) as caught:
        read_snapshot(database)
    return str(caught.value)


# ------------------------------------------------------------------------------ the file


@as_root
def test_a_foreign_link_says_nothing_about_what_it_leads_to(
    database: Path, path: Path, secret: Path, tmp_path: Path
) -> None:
    os.mkfifo(secret / "fifo")
    (secret / "circle").symlink_to("circle")
    (secret / "file").write_bytes(b"")
    said = set()
    for target in (
        secret / "snapshot.json",
        secret / "none",
        secret / "none" / "none",
        secret / "file" / "none",
        secret / "fifo",
        secret / "circle",
        secret,
        *(Path("/proc/kmsg"), Path("/proc/kcore"), Path("/dev/null"), Path("/proc/self/exe")),
        "x" * 255,
        "x" * 300,
        "..",
        path,
        give(tmp_path / "another user's", OTHER),
    ):
        link(path, target, PUBLISHER)
        said.add(refusal(database))
        path.unlink()
    (text,) = said
    assert text.startswith(f"{path}: a symbolic link of user {PUBLISHER} on the way leads to ")
    assert "secret" not in text


@as_root
def test_what_a_foreign_link_leads_to_is_not_even_opened(
    database: Path, path: Path, secret: Path
) -> None:
    opened: list[str] = []

    class Handler(FileSystemEventHandler):
        def on_opened(self, event: FileSystemEvent) -> None:
            opened.append(os.fsdecode(event.src_path))

    observer = Observer()
    observer.schedule(Handler(), str(secret), event_filter=[FileOpenedEvent])
    observer.start()
    try:
        link(path, secret / "snapshot.json", PUBLISHER)
        refusal(database)
        marker = secret / "marker"
        marker.write_bytes(b"")  # events come in order
        wait_until(lambda: str(marker) in opened, "the event of another file")
        assert str(secret / "snapshot.json") not in opened
        assert read_snapshot(database, snapshot_dir=secret).entries
        wait_until(lambda: str(secret / "snapshot.json") in opened, "an event of reading")
    finally:
        observer.stop()
        observer.join()


@as_root
@pytest.mark.parametrize("owner", [0, PUBLISHER])
def test_links_of_root_and_links_to_ones_own_are_followed(
    database: Path, path: Path, tmp_path: Path, owner: int
) -> None:
    link(path, give(tmp_path / "elsewhere.json", PUBLISHER), owner)
    assert read_snapshot(database).entries


@as_root
def test_a_link_to_ones_own_fifo_is_named(database: Path, path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.chown(tmp_path / "fifo", PUBLISHER, PUBLISHER)
    link(path, tmp_path / "fifo", PUBLISHER)
    assert "is a FIFO" in refusal(database)


@as_root
@pytest.mark.parametrize("owner", [0, PUBLISHER])
def test_links_as_kubernetes_makes_them(database: Path, path: Path, owner: int) -> None:
    volume = path.parent / "..2026"
    volume.mkdir()
    os.chown(volume, owner, owner)
    give(volume / path.name, owner)
    link(path.parent / "..data", volume.name, owner)
    link(path, f"..data/{path.name}", owner)
    assert read_snapshot(database).entries


@as_root
def test_a_foreign_link_on_the_way_of_a_trusted_one(
    database: Path, path: Path, secret: Path
) -> None:
    link(path, f"..data/{path.name}", 0)
    link(path.parent / "..data", secret, PUBLISHER)
    assert "not followed" in refusal(database)


@as_root
def test_two_owners_of_links_cannot_both_be_right(
    database: Path, path: Path, tmp_path: Path
) -> None:
    link(tmp_path / "second", give(tmp_path / "elsewhere.json", PUBLISHER), PUBLISHER)
    link(path, tmp_path / "second", OTHER)
    assert "not followed" in refusal(database)


@as_root
def test_a_user_who_is_not_root_follows_as_much(database: Path, path: Path, tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from mbcap_watch import read_snapshot  # the interpreter may be for root alone
        from mbcap_watch.errors import SnapshotError
        os.setgid(12346); os.setuid(12346)
        try:
            read_snapshot(sys.argv[1])
            print("read")
        except SnapshotError as exc:
            print(type(exc).__name__)
    """
    let_others_in(tmp_path)

    def read() -> str:
        command = [sys.executable, "-c", script, str(database)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    target = give(tmp_path / "elsewhere.json", PUBLISHER)
    for owner, expected in (
        (0, "read"),
        (OTHER, "read"),
        (PUBLISHER, "read"),
        (PUBLISHER + 9, "SnapshotRefused"),
    ):
        link(path, target, owner)
        assert read() == expected, owner
        path.unlink()


# ------------------------------------------------------------------------------ the directory


@as_root
def test_a_directory_behind_a_foreign_link(database: Path, path: Path, secret: Path) -> None:
    path.parent.rmdir()
    said = set()
    for target in (secret, secret / "none", secret / "snapshot.json", "/dev/null"):
        link(path.parent, target, PUBLISHER)
        said.add(refusal(database))
        path.parent.unlink()
    assert len(said) == 1
    link(path.parent, secret, PUBLISHER)
    os.chown(secret, PUBLISHER, PUBLISHER)
    assert read_snapshot(database).entries


@as_root
def test_a_foreign_link_among_the_parents(tmp_path: Path, secret: Path) -> None:
    link(tmp_path / "data", secret, PUBLISHER)
    said = refusal(tmp_path / "data" / "meshcore.db")
    os.unlink(tmp_path / "data")
    link(tmp_path / "data", secret / "none", PUBLISHER)
    assert refusal(tmp_path / "data" / "meshcore.db") == said


def test_links_of_ones_own_among_the_parents(database: Path, path: Path, tmp_path: Path) -> None:
    path.write_bytes(GOOD)
    (tmp_path / "first").symlink_to("second/..")
    (tmp_path / "second").symlink_to(path.parent)
    assert read_snapshot(tmp_path / "first" / database.name).entries


def test_links_of_the_kernel_lead_where_they_lead(database: Path, path: Path) -> None:
    path.write_bytes(GOOD)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        assert read_snapshot(database, snapshot_dir=f"/proc/self/fd/{descriptor}").entries
        moved = path.parent.rename(path.parent.with_name("moved"))
        (moved / "deeper").mkdir()
        (moved / "snapshot.json").rename(moved / "deeper" / "snapshot.json")
        where = f"/proc/self/fd/{descriptor}/deeper"
        assert read_snapshot(database, snapshot_dir=where).entries
    finally:
        os.close(descriptor)


def test_a_long_chain_is_refused_as_the_kernel_does(database: Path, path: Path) -> None:
    for number in range(41):
        target = f"link{number - 1}" if number else "file"
        (path.parent / f"link{number}").symlink_to(target)
    (path.parent / "file").write_bytes(GOOD)
    path.symlink_to("link38")  # with itself, 40
    assert read_snapshot(database).entries
    path.unlink()
    path.symlink_to("link39")
    with pytest.raises(SnapshotRefused, match="in a circle"):
        read_snapshot(database)
    with pytest.raises(OSError, match="Too many levels"):
        path.read_bytes()


def test_nothing_stays_open(database: Path, path: Path) -> None:
    path.symlink_to("none")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(SnapshotNotFound):
            read_snapshot(database)
    (path.parent / "none").write_bytes(GOOD)
    with links.opened(str(path)) as descriptor:
        assert os.read(descriptor, 1000) == GOOD
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_stays_open_where_closing_fails(
    database: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(GOOD)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close_as_a_server_that_is_gone)
        assert read_snapshot(database).entries
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------ racing

SWAPPER = """
import os, sys
path, target = sys.argv[1:]
os.chdir(os.path.dirname(path))
os.setgid(12345); os.setuid(12345)
while True:
    for each in (target, "own"):
        os.symlink(each, "new")
        os.rename("new", "snapshot.json")
    with open("new", "w") as file:
        file.write("{}")
    os.rename("new", "snapshot.json")
"""


@as_root
def test_whatever_is_exchanged_meanwhile_the_secret_is_not_read(
    database: Path, path: Path, secret: Path, tmp_path: Path
) -> None:
    let_others_in(tmp_path)
    os.chown(path.parent, PUBLISHER, PUBLISHER)
    give(path.parent / "own", PUBLISHER, b"{}")
    said: set[str] = set()

    def read() -> bool:
        """Return whether the file and the link were both met by now."""
        try:
            assert read_snapshot(database).entries == ()
            said.add("read")
        except (SnapshotRefused, SnapshotNotFound) as exc:
            said.add(exc.problem)
        return "read" in said and any("not followed" in each for each in said)

    with other_process(SWAPPER, str(path), str(secret / "snapshot.json")):
        wait_until(path.is_symlink, "the first link")
        wait_until(read, "both outcomes")
        for _ in range(300):
            read()
    assert not said & {"is a FIFO, not a regular file", "does not exist"}


# ------------------------------------------------------------------------------ the daemon


@as_root
def test_a_daemon_of_root_answers_nothing_about_a_secret(
    database: Path, path: Path, secret: Path
) -> None:
    """A link to a secret, to nothing, to a device: the answers are equal."""
    before = read_rows(database)
    answers = []
    for target in (secret / "snapshot.json", secret / "none", "/proc/kmsg"):
        link(path, target, PUBLISHER)
        answer = path.parent / "result.json"
        with daemon(database, "--ack") as process:
            wait_until(answer.exists, "the answer")
            assert process.end(signal.SIGTERM) == 0
        told = json.loads(answer.read_bytes())
        answers.append({k: v for k, v in told.items() if k not in ("resultAt", "seconds")})
        answer.unlink()
        path.unlink()
    assert answers[0]["outcome"] == "refused"
    assert answers[0] == answers[1] == answers[2]
    assert read_rows(database) == before


@as_root
def test_no_answer_is_written_where_a_foreign_link_leads(
    database: Path, path: Path, secret: Path
) -> None:
    path.parent.rmdir()
    link(path.parent, secret, PUBLISHER)
    with daemon(database, "--ack") as process:
        what = "result.json: cannot be written: a symbolic link"
        wait_until(lambda: what in process.said, what)
        assert process.end(signal.SIGTERM) == 0
    assert os.listdir(secret) == ["snapshot.json"]


def test_a_link_that_names_thousands_of_directories(tmp_path: Path) -> None:
    """It takes no descriptor for each, of which a host would have none left."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("./" * 2000 + "file")
    before = len(os.listdir("/proc/self/fd"))
    with links.opened(str(tmp_path / "link")):
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------ other paths


@pytest.mark.parametrize(
    "name",
    ["/", "//", "", ".", "..", "sub", "sub/", "./sub/..", "root", "to root", "/proc/self/cwd"],
)
def test_every_way_to_write_a_path_leads_where_the_kernel_goes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("root").symlink_to("/")
    Path("to root").symlink_to("./root/")
    with links.opened(name) as descriptor:
        assert os.path.samestat(os.fstat(descriptor), Path(name).stat())
        assert sorted(os.listdir(descriptor)) == sorted(os.listdir(name or "."))


@as_root
@pytest.mark.parametrize("owner", [1, PUBLISHER])
def test_a_foreign_link_is_a_permission_that_is_missing(
    tmp_path: Path, secret: Path, owner: int
) -> None:
    link(tmp_path / "link", secret, owner)
    with pytest.raises(PermissionError) as caught, links.opened(str(tmp_path / "link")):
        pass
    assert caught.value.errno == errno.EACCES


@as_root
def test_a_foreign_link_within_the_target_of_a_trusted_one(
    database: Path, path: Path, tmp_path: Path, secret: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    link(tmp_path / "theirs" / "link", secret, PUBLISHER)
    link(path, tmp_path / "theirs" / "link" / "snapshot.json", 0)
    assert "not followed" in refusal(database)


@pytest.mark.parametrize("name", ["data", "data/"])
def test_a_parent_that_is_a_link_to_nothing_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").symlink_to("gone")
    with pytest.raises(SnapshotNotFound) as caught:
        read_snapshot(tmp_path / name / "deeper" / "meshcore.db")
    assert caught.value.path == str(tmp_path / "data")
