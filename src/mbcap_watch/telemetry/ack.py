"""`result.json` beside the snapshot: tells the read-only publisher what became of its snapshot.

Its rename causes no sync: `inotify` goes by name, polling reads the snapshot alone. It is
not flushed to disk, which would wear out SD cards and hold up others; the file is news, and is
written anew at the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import printable
from mbcap_watch.snapshot import files, links, timestamp
from mbcap_watch.telemetry.outputs import OutputState

if TYPE_CHECKING:
    from typing import Self

    from mbcap_watch.results import PersistResult
    from mbcap_watch.settings import Settings

RESULT_NAME: Final = "result.json"
_MODE: Final = 0o644  # the publisher reads it, whatever our umask

# For how long an end waits for the last answer to be written.
_END_SECONDS: Final = 1.0


class Ack:
    """A hook for results that answers the publisher; a context that lets the last answer out.

    Only news is written: another outcome, another `writtenAt`, another error, or rows that
    changed. Writing happens in a thread that lives for as long as there is something to write; one
    that hangs on a mount keeps neither the bridge nor the process, and meanwhile only the latest
    answer is kept. What cannot be written is tried again by `retry`; `state` tells.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.snapshot_dir / RESULT_NAME
        path, until = printable(str(self.path)), "the publisher is not answered until it can"
        self.state = OutputState(
            lambda problem: f"{path}: cannot be written: {problem}; {until}",
            f"{path}: written again",
        )
        self._lock = threading.Lock()
        self._told: object = None
        self._next: tuple[PersistResult, bytes] | None = None
        self._failed: tuple[PersistResult, bytes] | None = None
        self._thread: threading.Thread | None = None
        self._tidied = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if (thread := self._thread) is not None:
            thread.join(_END_SECONDS)

    def on_result(self, result: PersistResult) -> None:
        """Have the answer written if `result` is news."""
        with self._lock:
            if _news(result) == self._told and not result.changed:
                return
            self._put(result, encode(result))

    def retry(self) -> None:
        """Have written what could not be."""
        with self._lock:
            if self._failed is not None:
                self._put(*self._failed)

    def _put(self, result: PersistResult, data: bytes) -> None:
        self._told, self._next, self._failed = _news(result), (result, data), None
        if self._thread is not None:
            return  # it takes this one next
        thread = threading.Thread(target=self._run, name="mbcap-watch ack", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError as exc:  # the limit on threads is reached
            self._thread, self._told, self._failed = None, None, self._next
            self.state.update(exc)

    # In the thread from here on.

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._next is None:
                    self._thread = None
                    return
                (result, data), self._next = self._next, None
            try:
                self._write(data)
            except OSError as exc:
                # Without a directory there is no snapshot, and nobody to answer.
                matters = not isinstance(exc, FileNotFoundError) or result.outcome != "no_snapshot"
                if matters:
                    self.state.update(exc)
                with self._lock:
                    if self._next is None:  # else that is newer
                        self._told, self._failed = None, (result, data) if matters else None
            else:
                self.state.update()

    def _write(self, data: bytes) -> None:
        # By descriptor: the directory cannot be exchanged between the two steps.
        with links.opened(os.fspath(self.path.parent)) as directory:
            if not self._tidied:
                files.remove_leftovers(Path(f"/proc/self/fd/{directory}"), RESULT_NAME)
                self._tidied = True
            _replace(directory, data)


def _news(result: PersistResult) -> object:
    """Return what makes one result differ from another for a publisher."""
    in_database = result.compared or result.outcome
    return in_database, result.written_at, result.error, result.held > 0


def encode(result: PersistResult) -> bytes:
    """Return the answer as JSON, one line; `writtenAt` is named as the publisher names it."""
    fields = result.to_dict()
    answer = {
        "writtenAt": fields.pop("written_at"),
        "resultAt": timestamp.now(),
        "persisted": result.compared and result.error is None and not result.held,
        "outcome": fields.pop("outcome"),
        "error": fields.pop("error"),
        **fields,
    }
    return json.dumps(answer, ensure_ascii=True).encode("ascii") + b"\n"


def _replace(directory: int, data: bytes) -> None:
    """Put `data` in place of the answer in the open `directory`; if that fails, change nothing.

    A link at that name is replaced, never followed: rename(2) does not, and O_EXCL refuses one at
    the temporary name (open(2)).
    """
    temporary = f"{RESULT_NAME}.{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, _MODE, dir_fd=directory)
    try:
        with open(descriptor, "wb") as file:  # closing it tells what an NFS server refused
            if os.fstat(descriptor).st_mode & 0o777 != _MODE:
                os.fchmod(descriptor, _MODE)
            file.write(data)
        os.replace(temporary, RESULT_NAME, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
