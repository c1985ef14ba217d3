"""Real FUSE filesystems, with changes made on the far side, where inotify sees nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from mbcap_watch.watcher.mounts import mount_of
from support import bridge, document, make_database, put, read_rows, until, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.system, pytest.mark.usefixtures("no_leaks")]


SFTP_SERVER = "/usr/lib/openssh/sftp-server"


@contextlib.contextmanager
def bindfs(far: Path, near: Path) -> Iterator[None]:
    with (
        subprocess.Popen(["bindfs", "-f", str(far), str(near)]) as process,
        until_unmounted(near, process),
    ):
        yield


@contextlib.contextmanager
def sshfs(far: Path, near: Path) -> Iterator[None]:
    """Without a network: sshfs and the sftp server talk through two pipes."""
    down, up = os.pipe(), os.pipe()
    command = ["sshfs", "-f", "-o", "passive", f":{far}", str(near)]
    with (
        subprocess.Popen([SFTP_SERVER], stdin=up[0], stdout=down[1]),
        subprocess.Popen(command, stdin=down[0], stdout=up[1]) as process,
    ):
        for descriptor in (*down, *up):
            os.close(descriptor)
        with until_unmounted(near, process):
            yield


@contextlib.contextmanager
def until_unmounted(near: Path, process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        wait_until(lambda: os.path.ismount(near) or process.poll() is not None, "the mount")
        if not os.path.ismount(near):
            pytest.skip(f"cannot mount FUSE filesystems here: {process.args!r}")
        yield
    finally:
        subprocess.run(["umount", "-l", near], check=False)
        process.terminate()


@pytest.fixture(params=["bindfs", "sshfs"])
def far_and_near(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    if shutil.which(request.param) is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip(f"needs {request.param} and /dev/fuse")
    if request.param == "sshfs" and not os.path.exists(SFTP_SERVER):
        pytest.skip("needs an sftp server")
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    mount = {"bindfs": bindfs, "sshfs": sshfs}[request.param]
    with mount(far, near):
        yield far, near


async def test_what_happens_on_the_far_side(
    far_and_near: tuple[Path, Path], tmp_path: Path
) -> None:
    far, near = far_and_near
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    async with bridge(database, snapshot_dir=near, poll_interval="50ms") as results:
        assert results.state.mode == "poll"
        assert mount_of(near).type.startswith("fuse")
        assert "fuse" in results.state.why
        for number in range(5):
            # Same size each time: no stamp of such a filesystem can be trusted.
            put(document(("aa11", "confirmed", f"{number}")), far / "snapshot.json")
            await results.count("applied", number + 1)
            assert ("nodes", "aa11", 2, f"{number}") in read_rows(database)
        (far / "snapshot.json").unlink()
        await results.next("no_snapshot", after=1)
        put(document(("aa11", "suspected", "again")), far / "snapshot.json")
        await until(lambda: ("nodes", "aa11", 1, "again") in read_rows(database))


async def test_the_filesystem_goes_and_comes_back(tmp_path: Path) -> None:
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs bindfs and /dev/fuse")
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    clocks = {"poll_interval": "50ms", "sweep_interval": "100ms"}
    async with bridge(database, snapshot_dir=near, **clocks) as results:
        assert results.state.mode == "inotify"
        for number in range(2):
            with bindfs(far, near):
                put(document(("aa11", "confirmed", f"far {number}")), far / "snapshot.json")
                await results.count("applied", number + 1)
                await until(lambda: results.state.mode == "poll")
            await until(lambda: results.state.mode == "inotify")
