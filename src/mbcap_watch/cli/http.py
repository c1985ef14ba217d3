"""`/metrics` and `/healthz` over HTTP, only when asked for; each answer is made at that moment.

A small server in the daemon's own loop around WSGI applications: that of prometheus-client, and one
for the verdict. Each connection is for one request. Slow ones hold up no other: when there are too
many, the oldest is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import make_wsgi_app

from mbcap_watch.cli import views
from mbcap_watch.doctor.health import judge
from mbcap_watch.telemetry.outputs import OutputState
from mbcap_watch.telemetry.prometheus import registry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from mbcap_watch.cli.config import Address
    from mbcap_watch.telemetry.stats import Stats

logger = logging.getLogger("mbcap_watch")

# A request comes within milliseconds, and an answer is taken as quickly.
_CLIENT_SECONDS: Final = 5.0
_MOST_CLIENTS: Final = 32
_HEAD_BYTES: Final = 8192

# Between two tries to listen.
_RETRY_SECONDS: Final = 5.0


class Endpoint:
    """A context within which an asyncio loop serves; until it can listen, it tries again.

    `sample` makes the stats, in the loop, for each answer. `state` tells whether it listens.
    """

    def __init__(self, address: Address, sample: Callable[[], Stats]) -> None:
        self._address, self._sample = address, sample
        cannot, on = f"http: cannot listen at {address}", "the bridge works on, and this is retried"
        self.state = OutputState(lambda problem: f"{cannot}: {problem}; {on}", "http: works now")
        self._applications: dict[str, Any] = {
            "/metrics": make_wsgi_app(registry_of(sample, _verdict)),
            "/healthz": self._healthz,
        }
        self._clients: dict[asyncio.Task[None], None] = {}  # the oldest first

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._handler = loop.get_exception_handler()
        loop.set_exception_handler(self._on_error)
        self._task = loop.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().set_exception_handler(self._handler)
        for task in (self._task, *self._clients):
            task.cancel()

    async def _serve(self) -> None:
        host, port = self._address
        server = None
        while server is None:
            try:
                server = await asyncio.start_server(self._client, host, port, limit=_HEAD_BYTES)
            except (OSError, UnicodeError) as exc:  # no address, or no name of a host
                number = getattr(exc, "errno", None) or 0  # below zero: of getaddrinfo
                self.state.update(os.strerror(number) if number > 0 else exc)  # no address again
                await asyncio.sleep(_RETRY_SECONDS)
        self.state.update()
        shown = type(self._address)(host, server.sockets[0].getsockname()[1])
        logger.info("http: listening at http://%s", shown)
        try:
            await asyncio.get_running_loop().create_future()  # until it is cancelled
        finally:
            server.close()

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and "socket" in context:  # no descriptor for a client is left
            self.state.update(error)
        elif self._handler is not None:
            self._handler(loop, context)
        else:
            loop.default_exception_handler(context)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = None
        if len(self._clients) > _MOST_CLIENTS:
            next(iter(self._clients)).cancel()
        writer.transport.set_write_buffer_limits(0)  # `drain` waits until the kernel has it all
        try:
            # It has gone, is slow (TimeoutError), or is sent away: Python 3.11 logs a task that
            # ends as cancelled.
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                async with asyncio.timeout(_CLIENT_SECONDS):
                    try:
                        head = await reader.readuntil(b"\r\n\r\n")
                    except asyncio.LimitOverrunError:
                        head = b""
                    writer.write(self._answer(head))
                    await writer.drain()
                writer.close()
                self.state.update()
        finally:
            del self._clients[task]
            if not writer.is_closing():
                writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """Return the answer to a request."""
        environ = _environ(head)
        if environ is None:
            return _answer_of(_refusal(HTTPStatus.BAD_REQUEST), {})
        application = self._applications.get(environ["PATH_INFO"], _refusal(HTTPStatus.NOT_FOUND))
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            application = _refusal(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        if not self._is_host(environ.get("HTTP_HOST", "localhost")):
            application = _refusal(HTTPStatus.MISDIRECTED_REQUEST)
        try:
            return _answer_of(application, environ)
        except Exception:  # noqa: BLE001 - prometheus-client stumbles over some headers
            plain = {key: environ[key] for key in ("REQUEST_METHOD", "PATH_INFO")}
            return _answer_of(application, plain)

    def _is_host(self, host: str) -> bool:
        """Whether a `Host` is ours: a name that somebody else's DNS points here is not."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() in ("localhost", self._address.host.lower()):
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return False

    def _healthz(self, _: dict[str, str], start: Callable[..., object]) -> Iterable[bytes]:
        stats = self._sample()
        health = judge(stats)
        code = HTTPStatus.OK if health.healthy else HTTPStatus.SERVICE_UNAVAILABLE
        start(f"{code.value} {code.phrase}", [("Content-Type", "application/json")])
        return [json.dumps(views.as_json(stats, health)).encode()]


def _verdict(stats: Stats) -> tuple[bool, list[str]]:
    health = judge(stats)
    return health.healthy, [each.code for each in health.problems]


def _refusal(code: HTTPStatus, *headers: tuple[str, str]) -> Any:
    """Return the application that answers with this code."""

    def application(_: dict[str, str], start: Callable[..., object]) -> Iterable[bytes]:
        start(f"{code.value} {code.phrase}", [("Content-Type", "text/plain"), *headers])
        return [f"{code.value} {code.phrase}\n".encode()]

    return application


def _environ(head: bytes) -> dict[str, str] | None:
    """Return what WSGI wants to know of a request; None if it is none."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    target, _, version = rest.partition(" ")
    if not method.isalpha() or not target.startswith("/") or not version.startswith("HTTP/1."):
        return None
    path, _, query = target.partition("?")
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    for line in lines:
        name, _, value = line.partition(":")
        environ["HTTP_" + name.strip().upper().replace("-", "_")] = value.strip()
    return environ


def _answer_of(application: Any, environ: dict[str, str]) -> bytes:
    """Run a WSGI application; return its response."""
    started: list[Any] = []
    asked = environ | {"REQUEST_METHOD": "GET"}  # prometheus-client knows no HEAD
    body = b"".join(application(asked, lambda *arguments: started.append(arguments)))
    line, headers = started[0][:2]
    headers = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "\r\n".join([f"HTTP/1.1 {line}", *(f"{name}: {value}" for name, value in headers)])
    return head.encode("latin-1") + b"\r\n\r\n" + body * (environ.get("REQUEST_METHOD") != "HEAD")
