"""A restored backup comes to no harm from us, in whatever order the operator does it.

Each order is played twice, with us and without; where the backup is whole without us, it has to
be with us. By default each kind of ours meets each way of restoring once, which takes half a
minute; `MBCAP_TEST_RESTORES=all` plays every order, `MBCAP_TEST_REPEAT=10` all that are selected
ten times, and `-k` selects by name: `live-mv-daemon-after-first-restart-smaller`.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from restores import Case, Restored, play

AXES: dict[str, tuple[Any, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(Case).items()
}
OURS: tuple[Any, ...] = ("apply", "dry_run", "daemon", "embedded")

# What was seen to destroy a backup. Where no tail is given, the control is whole only with this.
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


def each_once() -> list[Case]:
    """Return what was found, and each other (ingestor, put, ours) once.

    The tail is the one that leaves the control whole.
    """
    found = list(itertools.chain(*FOUND.values()))
    known = {(case.ingestor, case.put, case.ours) for case in found}
    tails: dict[object, Any] = {
        ("live", "cp"): "killed_tidy",
        "live": "restart",
        "stopped": "restart",
    }
    arrivals = itertools.cycle(AXES["snapshot"])
    servers = itertools.cycle(AXES["server"][1::-1])
    return [
        Case(
            i, put, ours, next(arrivals), next(servers), tails.get((i, put)) or tails.get(i, "tidy")
        )
        for i, put, ours in itertools.product(AXES["ingestor"], AXES["put"], OURS)
        if (i, put, ours) not in known
    ]


def every_order() -> list[Case]:
    cases = itertools.product(*(OURS if name == "ours" else AXES[name] for name in AXES))
    # One that does not run cannot be killed.
    return [
        case for c in cases if (case := Case(*c)).ingestor == "live" or "killed" not in case.tail
    ]


def selected() -> list[Case]:
    if os.environ.get("MBCAP_TEST_RESTORES") == "all":
        return every_order()
    return each_once()


@functools.cache
def control(case: Case) -> Restored:
    """Return how the database is after the same steps without us."""
    with tempfile.TemporaryDirectory() as directory:
        return play(Path(directory), case)[0]


@pytest.mark.parametrize("_", range(int(os.environ.get("MBCAP_TEST_REPEAT", "1"))))
@pytest.mark.parametrize("case", selected(), ids=str)
def test_a_restored_backup_comes_to_no_harm(tmp_path: Path, case: Case, _: int) -> None:
    expected = control(case.control)
    gets_well = expected.whole and expected.served
    restored, results = play(tmp_path, case, gets_well=gets_well)
    if expected.whole:
        assert restored.whole, (expected, restored, results)
        assert restored.served or not expected.served, (restored, results)
    # A host whose `-shm` was removed while it had the database open cannot go on.
    broken = case.ours == "embedded" and case.put == "cp" and "tidy" in case.tail
    if gets_well and not broken:
        assert restored.values == case.values, (restored, results)


@pytest.mark.parametrize("case", list(itertools.chain(*FOUND.values())), ids=str)
def test_without_us_what_was_found_is_no_danger(case: Case) -> None:
    """Else the test above would have nothing to compare with."""
    assert control(case.control).whole
