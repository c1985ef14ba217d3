"""A small disk that can be filled, and mounted read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, Self

from machine import mounted
from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Disk:
    """A filesystem that is mounted twice: `near` can be made read-only, `far` stays as it is."""

    def __init__(self, base: Path) -> None:
        self.near, self.far = base / "near", base / "far"

    @classmethod
    @contextlib.contextmanager
    def mounted(cls, base: Path) -> Iterator[Self]:
        disk = cls(base)
        with (
            mounted(disk.far, "-t", "tmpfs", "-o", "size=4m,mode=755", "none"),
            mounted(disk.near, "--bind", f"{disk.far}"),
        ):
            yield disk

    def fault(self, kind: str, left: int) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return what makes the disk full but for `left` bytes, or read-only, and what ends it."""
        if kind == "full":
            return lambda: self._fill(left), (self.far / "ballast").unlink
        return lambda: wait_until(lambda: self._remount("ro")), lambda: self._remount("rw")

    def _fill(self, left: int) -> None:
        with open(self.far / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        size = (self.far / "ballast").stat().st_size
        os.truncate(self.far / "ballast", max(size - left, 0))

    def _remount(self, how: str) -> bool:
        """Do it, unless somebody writes just now."""
        command = ["mount", "-o", f"remount,bind,{how}", f"{self.near}"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
