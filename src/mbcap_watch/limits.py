"""Limits: how long a sync may be silent, and whether the machine has descriptors and threads left.

What a library will need is asked for before it fails half-way and leaks what it had by then.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

# A sync, or a step of one, takes milliseconds, on a slow network perhaps a second. A bridge that
# shows no sign of life for so long in the middle of one is stuck.
STUCK_SECONDS: Final = 5.0


# The file that was to be opened is not at fault (open(2)).
LIMIT_ERRORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


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
            close_reader(descriptor)


def close_reader(descriptor: int) -> None:
    """Close a descriptor through which nothing was written.

    A FUSE or network filesystem may tell of an error. The descriptor is closed all the same
    (close(2)), and what was read is whole.
    """
    with contextlib.suppress(OSError):
        os.close(descriptor)


def no_thread() -> OSError:
    """Return the error for a thread that could not be started; Python's says only RuntimeError."""
    return OSError(errno.EAGAIN, "no thread can be started")
