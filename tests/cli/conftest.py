from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mbcap_watch.cli import app

if TYPE_CHECKING:
    from processes import Call


@pytest.fixture
def call_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """As `processes.call`, in this process: quick, for commands that end by themselves."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["mbcap-watch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        code = ended.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return call
