"""Real FUSE filesystems: what changes on the far side raises no event on the near one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SFTP_SERVER = "/usr/lib/openssh/sftp-server"


@contextlib.contextmanager
def fuse(kind: str, far: Path, near: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Mount `far` on `near` by bindfs or sshfs; yield the process that serves it."""
    if shutil.which(kind) is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip(f"needs {kind} and /dev/fuse")
    with {"bindfs": bindfs, "sshfs": sshfs}[kind](far, near, *options) as process:
        try:
            wait_until(lambda: os.path.ismount(near) or process.poll() is not None, "the mount")
            if not os.path.ismount(near):
                pytest.skip(f"cannot mount FUSE filesystems here: {process.args!r}")
            yield process
        finally:
            subprocess.run(["umount", "-l", near], check=False)
            process.kill()  # it may not hear a mere wish while files are open


@contextlib.contextmanager
def bindfs(far: Path, near: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        ["bindfs", "-f", *(f"-o{each}" for each in options), str(far), str(near)]
    ) as process:
        yield process


@contextlib.contextmanager
def sshfs(far: Path, near: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Without a network: sshfs and the sftp server talk through two pipes."""
    if not os.path.exists(SFTP_SERVER):
        pytest.skip("needs an sftp server")
    down, up = os.pipe(), os.pipe()
    command = ["sshfs", "-f", "-o", "passive", f":{far}", str(near)]
    with (
        subprocess.Popen([SFTP_SERVER], stdin=up[0], stdout=down[1]) as server,
        subprocess.Popen(command, stdin=down[0], stdout=up[1]) as process,
    ):
        for descriptor in (*down, *up):
            os.close(descriptor)
        try:
            yield process
        finally:
            server.kill()  # it may wait for a file
