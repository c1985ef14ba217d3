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
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import make_wsgi_app

from mbcap_watch.cli import views
from mbcap_watch.doctor.health import judge
from mbcap_watch.errors import printable
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

    Args:
        address: to listen at.
        sample: makes the stats; called in the loop.

    """

    def __init__(self, address: Address, sample: Callable[[], Stats]) -> None:
        self._address, self._sample = address, sample
        self._metrics: Any = make_wsgi_app(registry_of(sample, _verdict))
        self._clients: dict[asyncio.Task[None], None] = {}  # the oldest first

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._task, *self._clients):
            task.cancel()

    async def _serve(self) -> None:
        host, port = self._address
        server, problem = None, None
        while server is None:
            try:
                server = await asyncio.start_server(self._client, host, port, limit=_HEAD_BYTES)
            except OSError as exc:  # gaierror is one
                if problem != (problem := exc.strerror or str(exc)):
                    text = "http: cannot listen at %s: %s; the bridge works on, and this is retried"
                    logger.warning(text, self._address, printable(problem))
                await asyncio.sleep(_RETRY_SECONDS)
        shown = type(self._address)(host, server.sockets[0].getsockname()[1])
        logger.info("http: listening at http://%s", shown)
        try:
            await asyncio.get_running_loop().create_future()  # until it is cancelled
        finally:
            server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = None
        if len(self._clients) > _MOST_CLIENTS:
            next(iter(self._clients)).cancel()
        writer.transport.set_write_buffer_limits(0)  # `drain` waits until the kernel has it all
        try:
            with contextlib.suppress(OSError, EOFError):  # it has gone, or is slow (TimeoutError)
                async with asyncio.timeout(_CLIENT_SECONDS):
                    try:
                        head = await reader.readuntil(b"\r\n\r\n")
                    except asyncio.LimitOverrunError:
                        head = b""
                    writer.write(self._answer(head))
                    await writer.drain()
                writer.close()
        finally:
            del self._clients[task]
            if not writer.is_closing():
                writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """Return the answer to a request."""
        environ = _environ(head)
        if environ is None:
            return _response(HTTPStatus.BAD_REQUEST)
        if not self._is_host(environ.get("HTTP_HOST", "localhost")):
            return _response(HTTPStatus.MISDIRECTED_REQUEST)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, (("Allow", "GET, HEAD"),))
        application = {"/metrics": self._metrics, "/healthz": self._healthz}
        if environ["PATH_INFO"] not in application:
            return _response(HTTPStatus.NOT_FOUND)
        run = application[environ["PATH_INFO"]]
        try:
            return _call(run, environ)
        except Exception:  # noqa: BLE001 - prometheus-client stumbles over some headers
            environ = environ | {
                "HTTP_ACCEPT": "*/*",
                "HTTP_ACCEPT_ENCODING": "",
                "QUERY_STRING": "",
            }
            return _call(run, environ)

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


def _call(application: Any, environ: dict[str, str]) -> bytes:
    """Run a WSGI application; return its response."""
    started: list[Any] = []
    asked = environ | {"REQUEST_METHOD": "GET"}  # prometheus-client knows no HEAD
    body = b"".join(application(asked, lambda *arguments: started.append(arguments)))
    line, headers = started[0][:2]
    return _bytes(line, headers, body, with_body=environ["REQUEST_METHOD"] != "HEAD")


def _response(code: HTTPStatus, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    body = f"{code.value} {code.phrase}\n".encode()
    headers = [("Content-Type", "text/plain"), *headers]
    return _bytes(f"{code.value} {code.phrase}", headers, body)


def _bytes(
    line: str, headers: Iterable[tuple[str, str]], body: bytes, *, with_body: bool = True
) -> bytes:
    headers = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "\r\n".join([f"HTTP/1.1 {line}", *(f"{name}: {value}" for name, value in headers)])
    return head.encode("latin-1") + b"\r\n\r\n" + (body if with_body else b"")
