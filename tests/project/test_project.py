"""The package as others meet it: what an import costs, what the files beside it say."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest
from watchdog.observers.inotify import InotifyEmitter, InotifyObserver

import mbcap_watch
from mbcap_watch.cli import config
from mbcap_watch.settings import SETTING_NAMES
from support import TESTS

if TYPE_CHECKING:
    from pathlib import Path

ROOT = TESTS.parent


def python(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_library_loads_no_command_line() -> None:
    loaded = python("""if True:
        import sys
        import mbcap_watch
        mbcap_watch.run, mbcap_watch.persist_once
        print(*sys.modules)
    """).split()
    assert not {"rich", "click"} & set(loaded)
    assert "watchdog" in loaded


def test_importing_the_package_loads_nothing_else() -> None:
    """A signal in the first moments finds the handlers of `run` set (test_signals.py)."""
    out = python("""if True:
        import sys
        before = set(sys.modules)
        import mbcap_watch
        print(*set(sys.modules) - before)
    """)
    assert out.split() == ["mbcap_watch"]


def test_the_library_is_silent_until_its_host_configures_logging() -> None:
    script = """if True:
        import logging
        from mbcap_watch import run
        logging.getLogger("mbcap_watch").warning("unasked")
        logging.getLogger("other").warning("heard")
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == ["heard"]


def test_every_public_name_is_there() -> None:
    for name in mbcap_watch.__all__:
        assert getattr(mbcap_watch, name) is not None
    assert set(mbcap_watch.__all__) <= set(dir(mbcap_watch))
    with pytest.raises(AttributeError, match="no_such_name"):
        mbcap_watch.no_such_name  # noqa: B018


def test_every_error_derives_from_one() -> None:
    names = [name for name in mbcap_watch.__all__ if name.startswith(("Snapshot", "Database"))]
    errors = [getattr(mbcap_watch, name) for name in names if name != "Snapshot"]
    assert all(issubclass(error, mbcap_watch.MbcapWatchError) for error in errors)
    assert len(errors) > 8


def test_the_private_names_of_watchdog_are_there() -> None:
    observer = InotifyObserver()
    try:
        assert observer._emitter_kwargs == {"inotify_fd": observer._inotify_fd}
        assert isinstance(observer._inotify_fd._inotify_fd, int)
        assert callable(observer._inotify_fd._close_resources)
        assert callable(InotifyEmitter.get_event_mask_from_filter)
    finally:
        observer.stop()


def test_the_private_names_of_aiosqlite_are_there() -> None:
    async def main() -> int:
        connection: Any
        async with aiosqlite.connect(":memory:") as connection:
            answer = await connection._execute(lambda raw: raw.total_changes, connection._conn)
            return int(answer)

    assert asyncio.run(main()) == 0


def test_the_configuration_file_shows_every_setting_with_its_default(tmp_path: Path) -> None:
    text = (ROOT / "config" / "mbcap-watch.toml").read_text()
    settings = re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    shown = tomllib.loads(settings)

    assert set(shown) == {*SETTING_NAMES, *config.CLI_ONLY}
    (tmp_path / "c.toml").write_text(settings)
    loaded = config.load({}, {}, tmp_path / "c.toml")
    default = config.load({"database": shown["database"]}, {})
    assert (loaded.settings, loaded.log_level) == (default.settings, default.log_level)


def test_the_configuration_file_as_it_stands_changes_nothing() -> None:
    loaded = config.load({}, {}, ROOT / "config" / "mbcap-watch.toml")
    assert loaded.settings == config.load({}, {}).settings


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_path_of_a_developers_machine_is_in_the_project() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for name in listed.stdout.split():
        text = (ROOT / name).read_bytes()
        assert b"/wo" + b"rk/main" not in text, name
