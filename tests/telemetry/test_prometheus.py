"""`/metrics` and `/healthz`: read by Prometheus' own parsers, whatever clients do."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from mbcap_watch import Settings
from mbcap_watch.cli import config, run
from mbcap_watch.cli import http as endpoint_module
from mbcap_watch.cli.config import Address
from mbcap_watch.cli.http import Endpoint
from mbcap_watch.doctor.findings import catalogue
from mbcap_watch.doctor.health import OLD_SNAPSHOT_SECONDS
from mbcap_watch.errors import SettingsError, printable
from mbcap_watch.results import Timings, WatchState
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.prometheus import registry_of
from mbcap_watch.telemetry.stats import CONTENDED_SECONDS, SLOW_HOLD_SECONDS
from support import TESTS, open_descriptors, result, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample

    from mbcap_watch.telemetry.stats import Stats

DATABASE = '/da"ta\\\n/meshcore.db'
pytestmark = pytest.mark.anyio


def stats(*, error: str | None = None) -> Stats:
    metrics = Metrics(Settings(Path(DATABASE)), version="1.2.3", pid=42)
    metrics.on_result(
        result(
            "failed" if error else "applied",
            error,
            entries=5,
            unmatched=1,
            matched_active=3,
            changed_active=3,
            set_back=4,
            held=7,
            written_at="2026-07-18T08:47:37Z",
        )
    )
    metrics.on_state(WatchState(last_sync=1.0, rearms=2))
    metrics.on_timings(Timings(lag=0.02, waits=(0.2,), holds=(0.004, 0.6)))
    return metrics.snapshot(time.time())


def exposed(stats: Stats, *codes: str) -> str:
    return generate_latest(registry_of(lambda: stats, lambda _: (not codes, [*codes]))).decode()


def values(families: Iterable[Metric]) -> dict[tuple[str, ...], float]:
    """Return by name and labels."""
    return {
        (sample.name.removeprefix("mbcap_watch_"), *_labels(sample)): sample.value
        for family in families
        for sample in family.samples
    }


def _labels(sample: Sample) -> list[str]:
    return [value for _, value in sorted(sample.labels.items())]


EXPECTED = {
    ("build_info", printable(DATABASE), "1.2.3"): 1,
    ("mode", "poll"): 1,
    ("healthy",): 1,
    ("results_total", "applied"): 1,
    ("results_total", "busy"): 0,
    ("syncs_total", "rename"): 1,
    ("rows_changed_total", "nodes"): 3,
    ("rows_set_back_total",): 4,
    ("held",): 7,
    ("rearms_total",): 2,
    ("snapshot_entries",): 5,
    ("snapshot_unmatched",): 1,
    ("snapshot_unrecognized",): 0,
    ("lag_seconds_bucket", "0.01"): 0,
    ("lag_seconds_bucket", "0.025"): 1,
    ("lag_seconds_bucket", "+Inf"): 1,
    ("lock_hold_seconds_bucket", "0.5"): 1,
    ("lock_hold_seconds_count",): 2,
    ("lock_hold_seconds_sum",): 0.604,
    ("stuck",): 0,
}


def test_the_metrics() -> None:
    found = values(parse(exposed(stats())))
    assert EXPECTED.items() <= found.items()
    assert not {key for key in found if key[0] == "problem"}
    assert found[("process_resident_memory_bytes",)] > 0


def test_each_problem_is_named() -> None:
    found = values(parse(exposed(stats(), "busy", "busy", "two_snapshots")))
    assert (found[("healthy",)], found[("problem", "busy")]) == (0, 1)
    assert ("problem", "two_snapshots") in found


def test_what_is_not_known_is_left_out() -> None:
    young = Metrics(Settings(Path(DATABASE)), version="1", pid=1).snapshot(time.time())
    found = values(parse(exposed(young)))
    assert not {"last_sync_timestamp_seconds", "snapshot_entries"} & {name for name, *_ in found}
    assert found[("lag_seconds_count",)] == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_wrong() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=exposed(stats(), "busy"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------ pictures, alerts

CONFIG = TESTS.parent / "config"


def known() -> set[str]:
    """Return the names of all metrics there are."""
    families = parse(exposed(stats(), "busy"))
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "alerts.yml"])
def test_the_pictures_and_alerts_are_made_of_metrics_that_exist(name: str) -> None:
    text = (CONFIG / name).read_text()
    used = set(re.findall(r"\b(?:mbcap_watch|process)_[a-z_]+", text))
    assert len(used) > 4
    assert used <= known()


def test_the_dashboard_asks_one_data_source() -> None:
    text = (CONFIG / "grafana-dashboard.json").read_text()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 8
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert all(panel["targets"] for panel in panels)


def test_each_alert_names_its_finding_and_has_its_threshold() -> None:
    text = (CONFIG / "alerts.yml").read_text()
    findings = re.findall(r"finding: (\w+)", text)
    assert set(findings) <= catalogue().keys()
    assert text.count("- alert: ") == len(findings) + 1 <= 6  # one takes it from the metric
    assert f"timestamp_seconds > {OLD_SNAPSHOT_SECONDS:g}" in text
    assert f"[15m]))) > {CONTENDED_SECONDS:g}" in text
    assert f'le="{SLOW_HOLD_SECONDS:g}"' in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_wrong_with_the_alerts() -> None:
    command = ["promtool", "check", "rules", str(CONFIG / "alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ over HTTP


class Site:
    """An endpoint that serves, and what it serves."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port, self.stats = host, port, stats()
        self.endpoint: Endpoint

    async def send(self, data: bytes) -> bytes:
        stream = await anyio.connect_tcp(self.host, self.port)
        async with stream:
            await stream.send(data)
            return b"".join([part async for part in stream])

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, str]:
        def ask() -> tuple[int, Any, str]:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            try:
                return response.status, response.headers, response.read().decode()
            finally:
                connection.close()

        return await anyio.to_thread.run_sync(ask)


@pytest.fixture
async def site(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Site]:
    host = getattr(request, "param", "127.0.0.1")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip(f"this machine has no {host}")
    caplog.set_level("INFO", "mbcap_watch")
    site = Site(host, port)
    async with Endpoint(Address(host, port), lambda: site.stats) as site.endpoint:
        await until(lambda: "http: listening" in caplog.text)
        yield site
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("site", ["127.0.0.1", "::1"], indirect=True)
async def test_metrics_in_both_formats(site: Site) -> None:
    for parser, accept in ((parse, "*/*"), (parse_openmetrics, "application/openmetrics-text")):
        code, _, body = await site.get("/metrics?x", Accept=accept)
        assert code == 200
        assert EXPECTED.items() <= values(parser(body)).items()
    assert (await site.get("/"))[0] == 404


async def test_health_is_that_of_the_moment(site: Site) -> None:
    code, headers, body = await site.get("/healthz")
    assert (code, json.loads(body)["state"]) == (200, "running")
    assert headers["Content-Type"] == "application/json"
    site.stats = stats(error="/db: is full")
    code, _, body = await site.get("/healthz?verbose")
    assert (code, json.loads(body)["problems"][0]["code"]) == (503, "failed")
    assert 'problem{code="failed"} 1.0' in (await site.get("/metrics"))[2]


async def test_only_the_head_and_only_to_read(site: Site) -> None:
    code, headers, body = await site.get("/metrics", "HEAD")
    assert (code, body) == (200, "")
    assert int(headers["Content-Length"]) > 1000
    assert (await site.get("/metrics", "POST"))[0] == 405


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text;version=x;;q=", ";", "\xff", "a" * 4000, "text/plain;escaping="],
)
async def test_a_bad_accept_is_answered(site: Site, accept: str) -> None:
    request = f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode("latin-1")
    assert (await site.send(request)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x00\xff / HTTP/1.1\r\n\r\n",
        b"GET x HTTP/1.1\r\n\r\n",
        b"GET / HTTP/2\r\n\r\n",
        b"G" * 100_000 + b"\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused(site: Site, request_: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint_module, "_CLIENT_SECONDS", 30.0)
        try:
            answer = await site.send(request_)
        except anyio.BrokenResourceError:  # more than that was not read
            return
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "host, code",
    [
        ("localhost", 200),
        ("LOCALHOST:9464", 200),
        ("192.168.1.7:80", 200),
        ("[::1]:9464", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:9464", 421),
        ("", 421),
    ],
)
async def test_a_name_that_somebody_points_here_is_refused(
    site: Site, host: str, code: int
) -> None:
    """DNS rebinding: a page in a browser of this network would read what it may not."""
    assert (await site.get("/healthz", Host=host))[0] == code


async def test_eight_dribbling_clients_starve_nobody(site: Site) -> None:
    streams = [await anyio.connect_tcp(site.host, site.port) for _ in range(8)]
    for stream in streams:
        await stream.send(b"G")
    for _ in range(3):
        assert (await site.get("/metrics"))[0] == 200
        for stream in streams:
            await stream.send(b"E")
    for stream in streams:
        await stream.aclose()


async def test_of_too_many_clients_the_oldest_goes(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    streams = [
        await anyio.connect_tcp(site.host, site.port)
        for _ in range(endpoint_module._MOST_CLIENTS + 1)
    ]
    with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
        await streams[0].receive()
    assert (await site.get("/metrics"))[0] == 200
    for stream in streams:
        await stream.aclose()
    assert not caplog.records  # nor a traceback of the one that was sent away


async def test_a_slow_client_is_sent_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_CLIENT_SECONDS", 0.05)
    async with await anyio.connect_tcp(site.host, site.port) as stream:
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()


async def test_without_a_descriptor_it_says_so_and_answers_later(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_descriptors())) + 1, hard))
        taken: list[int] = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            await asyncio.get_running_loop().sock_connect(client, (site.host, site.port))
            await until(lambda: "Too many open files" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in taken:
                os.close(descriptor)
        assert site.endpoint.state.output().problem == "Too many open files"
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        client.setblocking(True)
        answer = await anyio.to_thread.run_sync(client.recv, 100)
    assert answer.startswith(b"HTTP/1.1 200 ")
    await until(lambda: site.endpoint.state.output().problem is None)


async def test_a_port_in_use_is_said_once_and_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "_RETRY_SECONDS", 0.01)
    caplog.set_level("INFO", "mbcap_watch")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with Endpoint(Address("127.0.0.1", port), stats) as endpoint:
            await until(lambda: "cannot listen at 127.0.0.1" in caplog.text)
            await anyio.sleep(0.1)
            assert endpoint.state.output().problem == "Address already in use"
            taken.close()
            await until(lambda: "http: listening" in caplog.text)
            assert endpoint.state.output().problem is None
            assert endpoint.state.output().last_good
    assert caplog.text.count("cannot listen") == 1
    assert "in use" in caplog.text


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "a" * 70])
async def test_a_host_that_cannot_be_looked_up_is_said(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Endpoint(Address(host, 9464), stats) as endpoint:
        await until(lambda: endpoint.state.output().problem)
    assert f"http: cannot listen at {host}:9464: " in caplog.text


def load(**options: Any) -> config.Config:
    return config.load(options, {})


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith(
            ("mbcap_watch.telemetry.prometheus", "mbcap_watch.cli.http", "prometheus_client")
        ):
            monkeypatch.delitem(sys.modules, name)
    for room, name in (("telemetry", "prometheus"), ("cli", "http")):
        monkeypatch.delattr(sys.modules[f"mbcap_watch.{room}"], name, raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SettingsError, match=r"^--http: .*/bin/pip install '\.\[metrics\]'"):
        run.endpoint_of(load(http="127.0.0.1:0"), stats)


@pytest.mark.parametrize(
    "value", ["9464", ":9464", "::1:9464", "[]:1", "a:b", "a:65536", "a:-1", "a b:1", 9464]
)
def test_what_is_no_address_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match="--http: expected ADDRESS:PORT"):
        load(http=value)
