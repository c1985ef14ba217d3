"""Asking for what a library will need, before it fails half-way and leaks what it had by then."""

from __future__ import annotations

import errno
import os
import threading


def require_descriptors(count: int) -> None:
    """Raise now if so many descriptors cannot be opened.

    Raises:
        OSError: EMFILE or ENFILE.

    """
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(count))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def require_thread() -> None:
    """Raise now if no thread can be started.

    Raises:
        OSError: EAGAIN, as the kernel says it (clone(2)).

    """
    thread = threading.Thread(target=lambda: None)
    try:
        thread.start()
    except RuntimeError as exc:
        raise OSError(errno.EAGAIN, "no thread can be started") from exc
    thread.join()
