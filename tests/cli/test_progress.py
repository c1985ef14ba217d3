"""The progress of one long look: the hook of the library, the bar of the command line."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import pytest

from mbcap_watch import Settings, persist_once, snapshot_path
from mbcap_watch.cli import output
from support import document, make_database, put, read_rows

if TYPE_CHECKING:
    from pathlib import Path

NODES = 12_000
BAR = re.compile(r"applying.*[━╸╺].* \d+%")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = [f"{number:064x}" for number in range(NODES)]
    database = tmp_path_factory.mktemp("large") / "meshcore.db"
    make_database(database, [("nodes", key, 0, None) for key in keys])
    put(document(*((key, "confirmed") for key in keys)), snapshot_path(database))
    return database


def test_the_hook_hears_of_every_page(large: Path) -> None:
    heard: list[tuple[int, int]] = []

    async def main() -> None:
        await persist_once(
            Settings(large), on_progress=lambda done, total: heard.append((done, total))
        )

    anyio.run(main)
    done = [each for each, _ in heard]
    assert {total for _, total in heard} == {NODES}
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert done[-1] == NODES


def test_an_error_of_the_hook_is_the_callers(tmp_path: Path) -> None:
    """The sync is not to blame, and comes to its end."""
    database = make_database(tmp_path / "meshcore.db", [("nodes", "aa11", 0, None)])
    put(document(("aa11", "confirmed")), snapshot_path(database))

    def fail(done: int, total: int) -> None:
        raise BrokenPipeError(done, total)

    async def main() -> None:
        with pytest.raises(BrokenPipeError):
            await persist_once(Settings(database), on_progress=fail)

    anyio.run(main)
    assert ("nodes", "aa11", 2, "") in read_rows(database)


def apply(database: Path, *arguments: str, least: int) -> tuple[str, str]:
    """Run `apply` with standard error on a terminal; return both outputs.

    Args:
        database: what to apply to.
        arguments: of `apply`.
        least: a snapshot is large from here on.

    """
    script = (
        f"import mbcap_watch.cli.output as p; p._LARGE = {least};"
        "from mbcap_watch.cli.app import main; main()"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script, "apply", "--database", str(database), *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 65536):
                shown += data
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    return out.decode(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_large_snapshot_has_a_bar_on_a_terminal(large: Path) -> None:
    out, shown = apply(large, least=NODES - 1)
    assert out.count("\n") == 1  # the result, as ever
    assert BAR.search(shown)


def test_a_small_one_has_none_and_neither_have_programs(large: Path) -> None:
    assert apply(large, least=NODES)[1] == ""
    assert apply(large, "--json", least=0)[1] == ""
    assert output._LARGE > NODES


def test_without_a_terminal_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w") as nowhere:
        for stderr in (nowhere, None):  # None: it was closed before the program was started
            monkeypatch.setattr(sys, "stderr", stderr)
            with output.progress(wanted=True) as hook:
                assert hook is None
