"""A restored backup comes to no harm from us: the orders of steps that were seen to destroy one.

`make campaign NAME=restores` plays every order.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from restores import Case, play, require_no_harm

if TYPE_CHECKING:
    from pathlib import Path

# Where no tail is given, the control is whole only with this.
FOUND = {
    "open while the backup is moved over it, restarted afterwards": [
        Case("live", "mv", "apply", "no", "no", "restart"),
        Case("live", "mv", "apply", "no", "no", "restart", "current"),
        Case("live", "mv", "dry_run", "no", "no", "restart"),
        Case("live", "mv", "daemon", "after", "no", "restart"),
    ],
    "the right order, and our frames in the wal of a server that stops": [
        Case("stopped", "mv", "apply", "before", "first", "restart"),
        Case("stopped", "cp", "apply", "before", "first", "restart"),
        Case("stopped", "cp", "daemon", "before", "first", "restart"),
    ],
    "killed, and its wal is removed later": [
        Case("killed", "mv", "daemon", "no", "first", "tidy"),
        Case("killed", "cp", "dry_run", "no", "first", "tidy"),
    ],
    "a host has it open": [
        Case("live", "mv", "embedded", "no", "no", "restart"),
        Case("stopped", "mv", "embedded", "before", "first", "restart"),
        Case("killed", "mv", "embedded", "after", "no", "tidy"),
    ],
}


@pytest.mark.parametrize("case", list(itertools.chain(*FOUND.values())), ids=str)
def test_a_restored_backup_comes_to_no_harm(tmp_path: Path, case: Case) -> None:
    without, _ = play(tmp_path / "without", case.control)
    assert without.whole  # else there is nothing to compare with
    require_no_harm(tmp_path / "with", case, without)
