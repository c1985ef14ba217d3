"""Makes the calls of another process to the kernel fail, through the library `failing_io.c`."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from campaigns.campaign import HERE

if TYPE_CHECKING:
    from pathlib import Path

# As failing_io.c numbers them, from 1 on.
CALLS: Final = (
    *("open", "list", "read", "write", "sync", "truncate", "stat", "lock", "map"),
    *("rename", "unlink", "watch", "poll", "accept", "close"),
)
_CONTROL: Final = struct.Struct("iiIIII232s")


class FailingIO:
    """Says which calls of the processes with `environ` fail, and counts them."""

    def __init__(self, base: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        library, control = base / "failing_io.so", base / "failing_io"
        source = HERE / "failing_io.c"
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", f"{library}", f"{source}", "-ldl"]
        subprocess.run(command, check=True)
        control.write_bytes(bytes(_CONTROL.size))
        self.environ = os.environ | {"LD_PRELOAD": f"{library}", "FAILING_IO": f"{control}"}
        with open(control, "r+b") as file:
            self._control = mmap.mmap(file.fileno(), _CONTROL.size)

    def start(self, call: str, paths: str, number: int, first: int, every: int) -> None:
        """Have a call fail with an errno: number `first`, and each `every` after it.

        `paths` is a pattern of fnmatch(3), which the path has to match.
        """
        self.stop()
        _CONTROL.pack_into(self._control, 0, 0, number, first, every, 0, 0, os.fsencode(paths))
        struct.pack_into("i", self._control, 0, 1 + CALLS.index(call))

    def stop(self) -> None:
        struct.pack_into("i", self._control, 0, 0)

    @property
    def failed(self) -> int:
        """How many calls have failed since the start."""
        failed: int = _CONTROL.unpack_from(self._control)[5]
        return failed
