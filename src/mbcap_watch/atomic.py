"""Replace a file as a whole: a reader sees the old one or the new one, and no link is followed."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Final

# A temporary file is there for milliseconds, on a disk that hangs for as long as that lasts.
_LEFTOVER_SECONDS: Final = 3600.0


def replace(directory: int, name: str, data: bytes, mode: int) -> None:
    """Put `data` in place of `name` in the open `directory`, whatever the umask.

    A link at that name is replaced, never followed: rename(2) does not, and O_EXCL refuses one at
    the temporary name (open(2)).

    Raises:
        OSError: what was there before is still there.

    """
    temporary = f"{name}.{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode, dir_fd=directory)
    try:
        with open(descriptor, "wb") as file:  # closing it tells what an NFS server refused
            if os.fstat(descriptor).st_mode & 0o777 != mode:
                os.fchmod(descriptor, mode)
            file.write(data)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise


def remove_leftovers(directory: int, name: str) -> None:
    """Remove temporary files that a killed process left an hour ago or more."""
    try:
        names = os.listdir(directory)
    except OSError:
        return  # a directory may be for writing only; this is for tidiness alone
    for each in names:
        if not (each.startswith(f"{name}.") and each.endswith(".tmp")):
            continue
        try:
            status = os.stat(each, dir_fd=directory, follow_symlinks=False)
            if time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                os.unlink(each, dir_fd=directory)
        except OSError:
            continue  # just renamed or removed by its owner, or not ours to remove
