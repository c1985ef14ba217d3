"""The units: what systemd's own tools say of them, and that they fit the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mbcap_watch import Settings, WatchState
from mbcap_watch.cli import output, signals
from mbcap_watch.settings import DEFAULT_MAX_BYTES
from mbcap_watch.telemetry.ask import places
from mbcap_watch.telemetry.systemd import Notifier
from processes import MBCAP_WATCH
from support import DEADLINE, TESTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.system

CONFIG = TESTS.parent / "config"
PLAIN, TEMPLATE = "mbcap-watch.service", "mbcap-watch@.service"
UNITS = pytest.mark.parametrize("name", [PLAIN, TEMPLATE])
DROPPED = "/opt/mbcap-watch/bin/mbcap-watch"

# Of 10; 0.5 with systemd 252. What remains: it sees the host's files, users and AF_UNIX.
MOST_EXPOSURE = 1.0

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def directives(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (CONFIG / name).read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def only(name: str, directive: str) -> str:
    (value,) = directives(name)[directive]
    return value


def seconds(value: str) -> float:
    match = re.fullmatch(r"(\d+)(s|min)", value)
    assert match
    return int(match[1]) * {"s": 1, "min": 60}[match[2]]


def mebibytes(value: str) -> int:
    assert value.endswith("M")
    return int(value.removesuffix("M"))


@pytest.fixture
def unit(name: str, tmp_path: Path) -> Path:
    """The unit as if its program were installed; of the template, an instance."""
    text = (CONFIG / name).read_text()
    assert text.count(DROPPED) >= 1
    path = tmp_path / name.replace("@.", "@north.")
    path.write_text(text.replace(DROPPED, sys.executable))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, check=False
    )


@needs_analyze
@UNITS
def test_systemd_finds_nothing_wrong(unit: Path) -> None:
    verified = analyze("verify", "--man=no", str(unit))
    complaints = [line for line in verified.stderr.splitlines() if "mbcap-watch" in line]
    assert (complaints, verified.returncode) == ([], 0), verified.stderr


@needs_analyze
def test_systemd_would_find_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / PLAIN
    path.write_text((CONFIG / PLAIN).read_text().replace("UMask=", "UMaks="))
    assert "UMaks" in analyze("verify", "--man=no", str(path)).stderr


@needs_analyze
@UNITS
def test_little_is_exposed(unit: Path) -> None:
    answer = analyze("security", "--offline=true", str(unit))
    if "unrecognized option" in answer.stderr:
        pytest.skip("this systemd-analyze has no --offline")
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", answer.stdout)
    assert match, answer.stderr
    assert float(match[1]) <= MOST_EXPOSURE, answer.stdout


def test_the_template_differs_by_its_instance_alone() -> None:
    plain, template = directives(PLAIN), directives(TEMPLATE)
    differ = {name for name in {*plain, *template} if plain.get(name) != template.get(name)}
    assert differ == {
        *("Description", "ExecStart", "RuntimeDirectory", "SyslogIdentifier", "ReadWritePaths")
    }
    assert template["ExecStart"] == [f"{DROPPED} run --config /etc/mbcap-watch/%i.toml"]
    assert all("%i" in template[name][0] for name in differ)


@UNITS
def test_the_units_fit_the_code(name: str) -> None:
    assert only(name, "Type") == "notify"
    assert only(name, "NotifyAccess") == "main"
    assert seconds(only(name, "TimeoutStopSec")) > signals._STOP_SECONDS
    assert only(name, "Restart") == "on-failure"
    assert only(name, "RestartPreventExitStatus") == str(output.EXIT_USAGE)
    # Faster and "systemctl start" would refuse after five failures in ten seconds, for good.
    assert seconds(only(name, "RestartSec")) * 5 > 10
    # A directory that is missing must fail the start: with "-" it would stay read-only for ever.
    assert not only(name, "ReadWritePaths").startswith("-")


def test_a_service_without_a_database_ends_and_says_so(tmp_path: Path) -> None:
    """A service starts in /, where no path is meant."""
    toml = tmp_path / "mbcap-watch.toml"
    toml.write_text("")
    environ = {key: value for key, value in os.environ.items() if key != "DB_PATH"}
    done = subprocess.run(
        [*MBCAP_WATCH, "run", "--config", toml],
        cwd="/",
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    assert done.returncode == output.EXIT_USAGE
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"database: is not set; set it in {toml}")


@UNITS
def test_the_default_sweep_leaves_the_watchdog_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(Notifier, "_send", lambda _, messages: sent.extend(messages))
    environ = {
        "NOTIFY_SOCKET": "/nowhere",
        "WATCHDOG_USEC": str(int(seconds(only(name, "WatchdogSec")) * 1_000_000)),
    }
    told = Notifier(environ, Settings("x"))
    told.on_state(WatchState(last_sync=1.0))
    assert [line.partition("=")[0] for line in sent] == ["READY", "STATUS"]


@UNITS
def test_status_finds_the_control_socket_of_the_service(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "run" / only(name, "RuntimeDirectory").replace("%i", "north")
    directory.mkdir(parents=True)
    assert directory in places({}, tmp_path)


@UNITS
def test_memory_is_for_small_hosts(name: str) -> None:
    most = mebibytes(only(name, "MemoryMax"))
    assert most <= 224  # of 256 MB
    # Whatever is in a snapshot, reading it ends before the kernel ends us. A limit that slows the
    # process down (MemoryHigh=) would have the watchdog abort it.
    assert most << 20 >= 10 * DEFAULT_MAX_BYTES + (80 << 20)
    assert "MemoryHigh" not in directives(name)
    assert f'"{DEFAULT_MAX_BYTES >> 20}MiB"' in (CONFIG / "mbcap-watch.toml").read_text()
    assert f"mem_limit: {most}m" in (CONFIG / "compose.yaml").read_text()
