"""`run` and `status` as processes of their own, as an operator meets them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import snapshot_path
from support import DEADLINE, document, put, wait_until

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-m", "mbcap_watch"]


def status(database: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, "status", "--json", "--database", str(database), *arguments],
        stdout=subprocess.PIPE,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def test_from_the_start_to_the_end(database: Path, tmp_path: Path) -> None:
    assert status(database)[0] == 1
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    figures = tmp_path / "figures.prom"
    extras = ["--http", address, "--openmetrics-file", str(figures)]
    with subprocess.Popen([*COMMAND, "run", "--database", str(database), *extras]) as process:
        try:
            wait_until(lambda: status(database)[1]["ages"].get("last_sync") is not None)
            code, told = status(database, "--max-age", "15m")
            assert (code, told["state"], told["problems"]) == (0, "running", [])
            assert told["stats"]["pid"] == process.pid
            assert told["stats"]["outcomes"]["applied"] == 1
            assert told["stats"]["mbcap_persist"]["count"] == 1
            assert status(database, "--max-age", "100ms")[0] == 1
            with urllib.request.urlopen(f"http://{address}/healthz") as answer:
                assert json.load(answer)["stats"]["pid"] == process.pid
            wait_until(figures.exists)
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
    code, told = status(database)
    assert (code, told["state"], told["stats"]) == (1, "not running", None)
    assert not figures.exists()


def test_for_people(database: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "status", "--database", str(database)], capture_output=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.decode().startswith("not running\n")


def test_an_age_that_is_none(database: Path) -> None:
    arguments = ["status", "--max-age", "old", "--database", str(database)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"--max-age: expected seconds or text" in done.stderr


def test_a_terminal_that_knows_no_unicode(database: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "status", "--database", str(database.with_name("größe.db"))],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "x no mbcap-watch runs with" in done.stdout
    assert "  -> start it" in done.stdout
    assert "gr\\xf6\\xdfe.db" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_cannot_be_written(database: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "status", "--database", str(database)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "standard output" in done.stderr
