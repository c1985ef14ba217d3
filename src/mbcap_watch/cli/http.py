"""`/metrics` and `/healthz` over HTTP, only when asked for; what they tell is the latest sample.

Each request has a thread, so that a client that is slow or silent holds up no other; there are
never more than a few, and none keeps the process from ending.
"""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.exposition import choose_encoder

from mbcap_watch.doctor import status
from mbcap_watch.doctor.health import judge
from mbcap_watch.errors import SettingsError
from mbcap_watch.limits import no_thread
from mbcap_watch.telemetry.prometheus import registry_of

if TYPE_CHECKING:
    from mbcap_watch.telemetry.stats import Stats

# A request comes within milliseconds. For longer than this (seconds) no client is waited for.
_CLIENT_SECONDS: Final = 5.0
_MOST_CLIENTS: Final = 8


class Endpoint:
    """A `heartbeat.Keeper` that serves.

    Args:
        host: to listen at: a name, an IPv4 or an IPv6 address.
        port: likewise; 0 takes a free one, which `path` then names.

    Raises:
        SettingsError: it cannot be listened at; names `http`.

    """

    blocks: Final = False
    every: Final = 0.0

    def __init__(self, host: str, port: int) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, address)
        except OSError as exc:  # gaierror is one
            problem = f"cannot listen at {host} port {port}: {exc.strerror or exc}"
            raise SettingsError("http", problem) from exc
        shown = f"[{host}]" if ":" in host else host
        self.path = f"http://{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="mbcap-watch http", daemon=True
        )

    def write(self, stats: Stats) -> None:
        """Serve `stats` from now on.

        Raises:
            OSError: there is no thread for it.

        """
        self._server.latest = stats, time.monotonic()
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as exc:
                raise no_thread() from exc

    def remove(self) -> None:
        """Serve no more."""
        if self._thread.ident is not None:
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, family: int, address: Any) -> None:
        self.address_family = family
        self.latest: tuple[Stats, float] | None = None
        self._free = threading.BoundedSemaphore(_MOST_CLIENTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the DNS for our name, too

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the limit on threads is reached
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_SECONDS
    server_version = "mbcap-watch"
    sys_version = ""

    def do_GET(self) -> None:
        latest = self.server.latest
        path = self.path.partition("?")[0]
        if latest is None or path not in ("/metrics", "/healthz"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        stats, moment = latest
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, kind, encode(registry_of(stats)))
            return
        health = judge(stats, time.monotonic() - moment)
        code = HTTPStatus.OK if health.healthy else HTTPStatus.SERVICE_UNAVAILABLE
        body = json.dumps(status.as_json(stats, health)).encode()
        self._answer(code, "application/json", body)

    do_HEAD = do_GET  # noqa: N815 - http.server names it

    def _answer(self, code: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """The log is for changes of state."""
