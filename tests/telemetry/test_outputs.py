"""How the log, the publisher's answer and the metrics port do: the daemon tells it when asked."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from mbcap_watch import Settings
from mbcap_watch.telemetry.ask import ask
from mbcap_watch.telemetry.outputs import OutputState
from processes import daemon
from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from mbcap_watch.telemetry.stats import Output


def outputs(database: Path) -> dict[str, Output]:
    [peer] = [each for each in ask(Settings(database), os.environ) if each.named]
    assert peer.stats is not None
    return peer.stats.outputs


def test_outputs_that_fail_are_told_until_they_work(database: Path) -> None:
    answer = database.parent / "mbcap-snapshot" / "result.json"
    answer.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http = f"127.0.0.1:{taken.getsockname()[1]}"
        with daemon(database, "--ack", f"--http={http}", "--sweep-interval=100ms") as process:
            wait_until(lambda: len({*filter(problem_of(database), ("ack", "http"))}) == 2)
            told = outputs(database)
            assert told["ack"].problem == "Is a directory"
            assert told["http"].problem == "Address already in use"
            assert (told["ack"].last_good, told["http"].last_good) == (None, None)
            assert told["log"].problem is None
            assert told["log"].last_good is not None
            answer.rmdir()
            wait_until(lambda: problem_of(database)("ack") is None)
            assert outputs(database)["ack"].last_good is not None
            assert process.said.count("http: cannot listen") == 1


def problem_of(database: Path) -> Callable[[str], str | None]:
    return lambda name: outputs(database)[name].problem


def test_only_outputs_in_use_are_told(database: Path) -> None:
    with daemon(database):
        assert outputs(database).keys() == {"log"}


def test_a_problem_is_bounded_and_safe_to_print(caplog: pytest.LogCaptureFixture) -> None:
    state = OutputState(lambda problem: f"x: {problem}", "x: works")
    caplog.set_level("INFO", "mbcap_watch")
    for problem in (
        "\x1b[2J" + "y" * 10_000,
        OSError(28, "No space"),
        OSError(28, "No space"),
        None,
    ):
        state.update(problem)
        said = state.output().problem
        assert said is None or (len(said) <= 500 and "\x1b" not in said)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1:] == ["x: No space", "x: works"]
