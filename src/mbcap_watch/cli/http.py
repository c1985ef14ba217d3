"""`/metrics` and `/healthz` over HTTP, only when asked for; each answer is made at that moment.

A small server in the daemon's own loop. Each connection is for one request. Slow ones hold up no
other: when there are too many, the oldest is closed.
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

from prometheus_client.exposition import choose_encoder

from mbcap_watch.cli import views
from mbcap_watch.doctor.findings import Installation
from mbcap_watch.doctor.health import Health, judge
from mbcap_watch.telemetry.outputs import OutputState
from mbcap_watch.telemetry.prometheus import registry_of

if TYPE_CHECKING:
    from collections.abc import Callable
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

    `sample` makes the stats, in the loop, for each answer. `config` is the file that the settings
    are from, for the commands in remedies. `state` tells whether it listens.
    """

    def __init__(self, address: Address, sample: Callable[[], Stats], config: str = "") -> None:
        self._address, self._sample, self._config = address, sample, config
        cannot, on = f"http: cannot listen at {address}", "the bridge works on, and this is retried"
        self.state = OutputState(lambda problem: f"{cannot}: {problem}; {on}", "http: works now")
        self._registry = registry_of(sample, self._verdict)
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
        port = server.sockets[0].getsockname()[1]  # for 0 the kernel chooses one
        logger.info("http: listening at http://%s", self._address._replace(port=port))
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

    def _answer(self, request: bytes) -> bytes:
        """Return the answer to a request."""
        first, *lines = request.decode("latin-1").split("\r\n")
        method, _, rest = first.partition(" ")
        target, _, version = rest.partition(" ")
        fields = (line.partition(":") for line in lines)
        asked = {name.strip().lower(): value.strip() for name, _, value in fields}
        path = target.partition("?")[0]
        code, kind, body, more = HTTPStatus.OK, "text/plain", b"", ""
        if not method.isalpha() or not target.startswith("/") or not version.startswith("HTTP/1."):
            code = HTTPStatus.BAD_REQUEST
        elif not self._is_host(asked.get("host", "localhost")):
            code = HTTPStatus.MISDIRECTED_REQUEST
        elif method not in ("GET", "HEAD"):
            code, more = HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD\r\n"
        elif path == "/metrics":
            kind, body = self._metrics(asked.get("accept", ""))
        elif path == "/healthz":
            stats = self._sample()
            health = self._judge(stats)
            code = HTTPStatus.OK if health.healthy else HTTPStatus.SERVICE_UNAVAILABLE
            kind, body = "application/json", json.dumps(views.as_json(stats, health)).encode()
        else:
            code = HTTPStatus.NOT_FOUND
        status = f"{code.value} {code.phrase}"
        body = body or f"{status}\n".encode()
        more += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close"
        head = f"HTTP/1.1 {status}\r\n{more}\r\n\r\n".encode("latin-1")
        return head if method == "HEAD" else head + body

    def _is_host(self, host: str) -> bool:
        """Whether a `Host` is ours: a name that somebody else's DNS points here is not."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() in ("localhost", self._address.host.lower()):
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return False

    def _metrics(self, accept: str) -> tuple[str, bytes]:
        """Return the metrics in a format that the client accepts, and its name."""
        try:
            encode, kind = choose_encoder(accept)
        except Exception:  # noqa: BLE001 - prometheus-client stumbles over some headers
            encode, kind = choose_encoder("")
        return kind, encode(self._registry)

    def _judge(self, stats: Stats) -> Health:
        here = Installation(stats.database, stats.snapshot_dir, self._config)
        return judge(stats, here=here)

    def _verdict(self, stats: Stats) -> tuple[bool, list[str]]:
        health = self._judge(stats)
        return health.healthy, [each.code for each in health.problems]
