"""The figures for Prometheus: a file, and HTTP; read by Prometheus' own parsers."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from mbcap_watch import Settings
from mbcap_watch.cli import config, run
from mbcap_watch.cli.http import _MOST_CLIENTS, Endpoint
from mbcap_watch.errors import SettingsError, printable
from mbcap_watch.results import PersistResult, Timings, WatchState
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.prometheus import PrometheusFile, registry_of
from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from mbcap_watch.telemetry.stats import Stats

DATABASE = '/da"ta\\\n/meshcore.db'


def stats(*, error: str | None = None) -> Stats:
    metrics = Metrics(Settings(Path(DATABASE)), version="1.2.3", pid=42)
    outcome = "failed" if error else "applied"
    metrics.on_result(
        PersistResult(outcome=outcome, reason="rename", changed_active=3, error=error)  # type: ignore[arg-type]
    )
    metrics.on_state(WatchState(last_sync=1.0, rearms=2))
    metrics.on_timings(Timings(lag=0.02, waits=(0.2,), holds=(0.004, 0.6)))
    return metrics.snapshot(time.time())


def values(families: Iterable[Metric]) -> dict[tuple[str, ...], float]:
    """Return by name and labels, but the database, which all of them have."""
    found = {}
    for family in families:
        assert family.type in ("gauge", "counter", "summary")  # node_exporter refuses others
        for sample in family.samples:
            assert sample.labels.pop("database") == printable(DATABASE)
            assert sample.timestamp is None
            found[(sample.name.removeprefix("mbcap_watch_"), *sample.labels.values())] = (
                sample.value
            )
    return found


EXPECTED = {
    ("build_info", "1.2.3"): 1,
    ("results_total", "applied"): 1,
    ("results_total", "busy"): 0,
    ("looks_total", "rename"): 1,
    ("rows_changed_total", "nodes"): 3,
    ("rearms_total",): 2,
    ("lag_seconds", "0.95"): 0.02,
    ("lock_hold_seconds_count",): 2,
    ("lock_hold_seconds_sum",): 0.604,
    ("lock_hold_max_seconds",): 0.6,
    ("lock_contended_total",): 1,
    ("lock_slow_holds_total",): 1,
    ("in_trouble",): 0,
    ("stuck",): 0,
}


def test_the_figures() -> None:
    found = values(parse(generate_latest(registry_of(stats())).decode()))
    assert EXPECTED.items() <= found.items()


def test_what_is_not_known_is_left_out() -> None:
    young = Metrics(Settings(Path(DATABASE)), version="1", pid=1).snapshot(time.time())
    found = values(parse(generate_latest(registry_of(young)).decode()))
    assert not {"last_sync_time_seconds", "lag_max_seconds"} & {name for name, *_ in found}
    assert found[("lag_seconds_count",)] == 0


def test_the_file_is_for_all_and_whole_and_goes_at_the_end(tmp_path: Path) -> None:
    file = PrometheusFile(tmp_path / "mbcap.prom")
    file.remove()
    file.write(stats())
    file.write(stats())
    assert os.listdir(tmp_path) == ["mbcap.prom"]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o644
    assert EXPECTED.items() <= values(parse(file.path.read_text())).items()
    file.remove()
    assert os.listdir(tmp_path) == []


@pytest.fixture(params=["127.0.0.1", "::1"])
def endpoint(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Endpoint]:  # noqa: ARG001
    try:
        served = Endpoint(request.param, 0)
    except SettingsError:
        pytest.skip(f"this machine has no {request.param}")
    served.write(stats())
    yield served
    served.remove()


def get(endpoint: Endpoint, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(endpoint.path.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_metrics_in_both_formats(endpoint: Endpoint) -> None:
    for parser, accept in ((parse, "*/*"), (parse_openmetrics, "application/openmetrics-text")):
        code, body = get(endpoint, "/metrics", Accept=accept)
        assert code == 200
        assert EXPECTED.items() <= values(parser(body)).items()
    assert get(endpoint, "/")[0] == 404


def test_health_is_that_of_the_latest_sample(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, body = get(endpoint, "/healthz")
    assert (code, json.loads(body)["state"]) == (200, "running")
    endpoint.write(stats(error="/db: is full"))
    code, body = get(endpoint, "/healthz?verbose")
    assert (code, json.loads(body)["problems"][0]["code"]) == (503, "failed")

    endpoint.write(stats())
    latest = endpoint._server.latest
    assert latest is not None
    monkeypatch.setattr(endpoint._server, "latest", (latest[0], latest[1] - 6))
    code, body = get(endpoint, "/healthz")
    assert (code, json.loads(body)["state"]) == (503, "stale")


def test_silent_clients_hold_up_no_other_and_not_the_end(endpoint: Endpoint) -> None:
    address: Any = endpoint._server.server_address[:2]
    silent = [socket.create_connection(address) for _ in range(_MOST_CLIENTS - 1)]
    assert get(endpoint, "/metrics")[0] == 200
    # One too many is sent away, and the places are free again when they have gone.
    silent += [socket.create_connection(address) for _ in range(3)]
    wait_until(lambda: endpoint._server._free._value == 0)
    started = time.monotonic()
    for client in silent[:5]:
        client.close()
    wait_until(lambda: endpoint._server._free._value > 0)
    assert get(endpoint, "/healthz")[0] == 200
    endpoint.remove()
    assert time.monotonic() - started < 4
    for client in silent:
        client.close()


@pytest.mark.usefixtures("no_leaks")
def test_without_a_thread_it_serves_later(few_threads: Callable[[int], None]) -> None:
    endpoint = Endpoint("127.0.0.1", 0)
    few_threads(0)
    with pytest.raises(BlockingIOError):  # which the heartbeat logs; the bridge goes on
        endpoint.write(stats())
    few_threads(9)
    endpoint.write(stats())
    assert get(endpoint, "/healthz")[0] == 200
    endpoint.remove()


def load(**options: Any) -> config.Config:
    return config.load(options, {})


def test_a_port_in_use_is_blamed_on_the_option(endpoint: Endpoint) -> None:
    address = endpoint.path.removeprefix("http://")
    with pytest.raises(SettingsError, match=r"--http: cannot listen at .*: Address already in use"):
        run.keepers_of(load(http=address))


@pytest.mark.parametrize("option", [{"http": "127.0.0.1:0"}, {"openmetrics_file": "/x.prom"}])
def test_without_the_extra_it_says_what_to_install(
    option: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules]:
        if name.startswith(
            ("mbcap_watch.telemetry.prometheus", "mbcap_watch.cli.http", "prometheus_client")
        ):
            monkeypatch.delitem(sys.modules, name)
    for room, name in (("telemetry", "prometheus"), ("cli", "http")):
        monkeypatch.delattr(sys.modules[f"mbcap_watch.{room}"], name, raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SettingsError, match=r"^--.*pip install 'mbcap-watch\[metrics\]'"):
        run.keepers_of(load(**option))


@pytest.mark.parametrize(
    "value", ["9464", ":9464", "::1:9464", "[]:1", "a:b", "a:65536", "a:-1", "a b:1", 9464]
)
def test_what_is_no_address_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match="--http: expected ADDRESS:PORT"):
        load(http=value)
