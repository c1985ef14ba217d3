"""Which filesystem a directory is on: asked of the kernel, checked against other sources."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from machine import unshared
from mbcap_watch.watcher.mounts import INOTIFY_FILESYSTEMS, UNKNOWN, Mount, _parse_mount, mount_of


def test_agrees_with_df(tmp_path: Path) -> None:
    df = shutil.which("df")
    if df is None:
        pytest.skip("no df here")
    command = [df, "--output=fstype,target", str(tmp_path)]
    output = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    filesystem, target = output.splitlines()[-1].split(maxsplit=1)
    mount = mount_of(tmp_path)
    assert (mount.type, mount.mount_point) == (filesystem, target)
    assert mount.delivers_inotify is (filesystem in INOTIFY_FILESYSTEMS)


def test_tells_the_options(tmp_path: Path) -> None:
    read_only = bool(os.statvfs(tmp_path).f_flag & os.ST_RDONLY)
    assert ("ro" in mount_of(tmp_path).options) is read_only
    assert ("rw" in mount_of(tmp_path).options) is not read_only


def test_proc_is_not_watched() -> None:
    mount = mount_of(Path("/proc"))
    assert (mount.type, mount.mount_point) == ("proc", "/proc")
    assert not mount.delivers_inotify


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self")
    assert mount_of(tmp_path / "link").type == "proc"
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to("real")
    assert mount_of(tmp_path / "home") == mount_of(tmp_path)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mount_of(tmp_path / "gone")
    (tmp_path / "dangling").symlink_to("gone")
    with pytest.raises(FileNotFoundError):
        mount_of(tmp_path / "dangling")


def test_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        mount_of(tmp_path / "file")


def test_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    mount_of(tmp_path)
    with pytest.raises(OSError, match="gone"):
        mount_of(tmp_path / "gone")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "line, mount",
    [
        (  # the example of proc(5)
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
            Mount("ext3", "/mnt2", ("rw", "noatime", "rw", "errors=continue")),
        ),
        ("1 0 0:1 / / ro - ext4 /dev/vda ro", Mount("ext4", "/", ("ro", "ro"))),
        (
            "9 1 0:5 / /mnt rw shared:1 master:2 propagate_from:3 - nfs4 host:/x rw,vers=4.2",
            Mount("nfs4", "/mnt", ("rw", "rw", "vers=4.2")),
        ),
        (
            r"9 1 0:5 / /a\040b\011c\012d\134e rw - xfs none rw",
            Mount("xfs", "/a b\tc\nd\\e", ("rw", "rw")),
        ),
        (r"9 1 0:5 / /\134040 rw - xfs none rw", Mount("xfs", r"/\040", ("rw", "rw"))),
        ("9 1 0:5 / /mnt/- rw - xfs - rw", Mount("xfs", "/mnt/-", ("rw", "rw"))),
        ("9 1 0:5 / /mnt/é rw - fuse.sshfs é: rw", Mount("fuse.sshfs", "/mnt/é", ("rw", "rw"))),
    ],
)
def test_a_line_of_mountinfo(line: str, mount: Mount) -> None:
    assert _parse_mount(line.split(" ")) == mount


@pytest.mark.parametrize(
    "filesystem, delivers",
    [
        *((kind, True) for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay")),
        *((kind, False) for kind in ("nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "fuse")),
        *((kind, False) for kind in ("EXT4", "", UNKNOWN.type)),
    ],
)
def test_inotify_only_where_it_is_known_to_see_everything(filesystem: str, delivers: bool) -> None:
    assert Mount(filesystem, "/", ()).delivers_inotify is delivers


SHOW = """
import sys
from pathlib import Path
from mbcap_watch.watcher.mounts import mount_of
mount = mount_of(Path(sys.argv[1]))
print(mount.type, mount.mount_point, mount.delivers_inotify, sep="|")
"""


def show_in_private_mounts(directory: Path, *kinds: str) -> str:
    """Mount one over the other in a namespace that ends with the process, and ask there."""
    where = shlex.quote(f"{directory}")
    script = "; ".join(f"mount -t {kind} none {where}" for kind in kinds)
    command = [*unshared(script), sys.executable, "-c", SHOW, f"{directory}"]
    done = subprocess.run(command, check=True, text=True, capture_output=True, timeout=20)
    return done.stdout.rstrip("\n")


def test_the_uppermost_of_two_mounts_counts(tmp_path: Path) -> None:
    assert show_in_private_mounts(tmp_path, "ramfs", "tmpfs") == f"tmpfs|{tmp_path}|True"
    assert show_in_private_mounts(tmp_path, "tmpfs", "ramfs") == f"ramfs|{tmp_path}|False"


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    directory = tmp_path / "my data"
    directory.mkdir()
    assert show_in_private_mounts(directory, "tmpfs") == f"tmpfs|{directory}|True"
