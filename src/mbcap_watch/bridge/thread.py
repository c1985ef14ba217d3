"""A daemon thread with an event loop of its own, and how a host waits for it and leaves it.

A read on a mount whose server is gone blocks in the kernel for as long as that lasts. The threads
of anyio and of `concurrent.futures` are joined when the interpreter exits, so one of them would
keep the process from ending (measured: a FIFO opened in one). A daemon thread can be left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from mbcap_watch.errors import EventLoopError
from mbcap_watch.limits import no_thread, require_descriptors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Self

# Stopping an observer takes up to half a second, a batch of rows milliseconds. What takes longer
# hangs in the kernel.
LEAVE_SECONDS: Final = 2.0

# How often to see whether another loop was closed with our task in it.
_CLOSED_SECONDS: Final = 0.5

# A loop has an epoll instance and a pair of sockets.
_DESCRIPTORS: Final = 3

P = ParamSpec("P")
T = TypeVar("T")
CallHost: TypeAlias = "Callable[[Callable[[], object]], object]"


def host_caller() -> CallHost:
    """Return what has a function called in the running loop, from any thread, without waiting.

    It raises RuntimeError once that loop is closed. Without a loop, EventLoopError is raised here.
    """
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop().call_soon_threadsafe
    trio: Any = sys.modules.get("trio")
    with contextlib.suppress(AttributeError, RuntimeError):
        return trio.lowlevel.current_trio_token().run_sync_soon  # type: ignore[no-any-return]  # trio is optional
    raise EventLoopError("mbcap_watch must be called from async code, on asyncio or trio")


class DaemonThread(Generic[T]):
    """A function that runs in a daemon thread, and whose end the present loop can wait for."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.call_host = host_caller()
        self.ended = anyio.Event()
        self._function = function
        self._outcome: Future[T] = Future()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread; OSError (EAGAIN) is raised if there can be no more threads."""
        # One that could not be started cannot be tried again (Python 3.13).
        thread = threading.Thread(target=self._run, name="mbcap-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise no_thread() from exc
        self._thread = thread

    async def outcome(self) -> T:
        """Wait for the end; return what the function has returned, or raise what it has raised."""
        await self.ended.wait()
        self._join()
        return self._outcome.result()

    def _join(self) -> None:
        """Wait for the last moments of a thread that has told of its end."""
        if self._thread is not None and self.ended.is_set():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._outcome.set_result(self._function())
        except BaseException as exc:  # noqa: BLE001 - `outcome` raises it
            self._outcome.set_exception(exc)
        del self._function  # it may be our own method, and hold us until the collector comes
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.call_host(self._end)

    def _end(self) -> None:
        self.ended.set()


async def in_daemon_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that may block; return what it returns, or raise what it raises.

    A cancelled caller leaves at once; the function goes on, and its outcome is dropped.
    """
    thread = DaemonThread(partial(function, *args, **kwargs))
    thread.start()
    return await thread.outcome()


class BridgeThread(DaemonThread[T]):
    """Runs `main` in an event loop and a daemon thread of its own.

    As a context, it ends `main` when it is left, and waits for that for no longer than `patience`
    seconds, whatever cancels the caller meanwhile. `main` sees one cancellation, and ends between
    two of its steps.
    """

    def __init__(
        self, main: Callable[[], Awaitable[T]], *, patience: float = LEAVE_SECONDS
    ) -> None:
        super().__init__(self._run_loop)
        self._patience = patience
        self.stopped = False  # whether the context was left
        self._main = main
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: anyio.CancelScope | None = None

    def start(self) -> None:
        """Make the loop and start the thread; raise OSError without descriptors or threads left."""
        require_descriptors(_DESCRIPTORS)
        # A plain one, whatever the host's policy: nothing here needs more.
        self._loop = asyncio.SelectorEventLoop()
        # It is to be held up by files that are read, for as long as that takes.
        self._loop.slow_callback_duration = math.inf
        try:
            super().start()
        except OSError:
            self._loop.close()
            raise

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called in the loop of the thread, from any thread, without waiting."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: `main` has ended
                self._loop.call_soon_threadsafe(function)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self.stopped = True
        if self._thread is None or not self._thread.is_alive():
            return  # also in a child that was forked: the thread is the parent's, and so its loop
        self.call(self._cancel)
        if exc_type is GeneratorExit:
            return  # a coroutine that is being closed may not wait
        await wait_shielded(self.ended, self._patience)
        self._join()

    def _run_loop(self) -> T:
        options = {"loop_factory": lambda: self._loop}
        return anyio.run(self._run_main, backend="asyncio", backend_options=options)

    async def _run_main(self) -> T:
        with anyio.CancelScope() as self._scope:
            if not self.stopped:
                return await self._main()
        raise asyncio.CancelledError  # nobody asks for the outcome: the host leaves

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()


async def wait_shielded(event: anyio.Event, seconds: float = math.inf) -> None:
    """Wait for `event`, for `seconds` at most; a caller that is cancelled meanwhile goes down then.

    A shield alone keeps the cancellation of anyio's scopes away, and not a native one
    (`task.cancel()`, `asyncio.timeout`, Ctrl-C under `asyncio.run`).
    """
    cancelled: BaseException | None = None
    with anyio.move_on_after(seconds, shield=True) as scope:
        while not event.is_set():
            try:
                await event.wait()
            except anyio.get_cancelled_exc_class() as exc:
                if scope.cancel_called:
                    raise
                cancelled = exc
    if cancelled is not None:
        # What goes on must be the native one: an anyio scope would swallow its own.
        raise cancelled


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` as a task of its own, to its end, whatever happens to the caller. asyncio only.

    A cancelled caller waits until the work has ended, and only then goes down.
    """
    task = asyncio.get_running_loop().create_task(work)
    ended = anyio.Event()
    task.add_done_callback(lambda _: ended.set())
    try:
        await wait_shielded(ended)
        await checkpoint_if_cancelled()  # by a scope, which the shield has kept away
    except asyncio.CancelledError:
        if task.done() and not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it; the caller is leaving
        raise
    return task.result()


async def in_other_loop(
    loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, T]]
) -> asyncio.Task[T]:
    """Run `work()` as a task of a loop in another thread; return the task once it has ended.

    A caller that is cancelled has the task cancelled, and goes down once that has ended. A task
    that is cancelled over there does not cancel the caller.

    Raises:
        EventLoopError: the other loop is closed.

    """
    here, ended = asyncio.get_running_loop(), anyio.Event()
    tasks: list[asyncio.Task[T]] = []

    def tell(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved: asyncio would log it for a caller that is leaving
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            here.call_soon_threadsafe(ended.set)

    def start() -> None:
        tasks.append(loop.create_task(work()))
        tasks[0].add_done_callback(tell)

    async def call_and_wait(function: Callable[[], object]) -> None:
        while not ended.is_set():
            try:
                loop.call_soon_threadsafe(function)
            except RuntimeError as exc:
                raise EventLoopError("the event loop of the host's connection is closed") from exc
            function = int  # of no effect
            with anyio.move_on_after(_CLOSED_SECONDS):
                await ended.wait()

    try:
        await call_and_wait(start)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await call_and_wait(lambda: tasks[0].cancel())  # noqa: PLW0108 - `start` comes first
        raise
    return tasks[0]
