"""Real FUSE filesystems, with changes made on the far side, where inotify sees nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fuse import fuse
from mbcap_watch.watcher.mounts import mount_of
from support import bridge, document, make_database, put, read_rows, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.system, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=["bindfs", "sshfs"])
def far_and_near(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    with fuse(request.param, far, near):
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
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    clocks = {"poll_interval": "50ms", "sweep_interval": "100ms"}
    async with bridge(database, snapshot_dir=near, **clocks) as results:
        assert results.state.mode == "inotify"
        for number in range(2):
            with fuse("bindfs", far, near):
                put(document(("aa11", "confirmed", f"far {number}")), far / "snapshot.json")
                await results.count("applied", number + 1)
                await until(lambda: results.state.mode == "poll")
            await until(lambda: results.state.mode == "inotify")


async def test_a_filesystem_whose_server_has_died(tmp_path: Path) -> None:
    """As a stale handle on NFS: the mount is there, and each call gives an error."""
    far, near = tmp_path / "far", tmp_path / "near"
    (far / "inner").mkdir(parents=True)
    near.mkdir()
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    clocks = {"poll_interval": "50ms", "sweep_interval": "100ms"}
    async with bridge(database, snapshot_dir=near / "inner", **clocks) as results:
        with fuse("bindfs", far, near) as server:
            put(document(("aa11", "confirmed", "far")), far / "inner" / "snapshot.json")
            await results.next("applied")
            server.kill()
            assert (await results.next("failed")).cause == "filesystem_failed"
            await until(lambda: "not connected" in results.state.why)
        await until(lambda: "does not exist" in results.state.why)
