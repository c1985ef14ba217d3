"""Backups are restored in every order of steps: what is whole without us is whole with us.

A round takes a few ways of restoring. Each is played twice without us: these are the controls. Then
it is played with each program of ours, and with a new snapshot before, after or not at all. A round
fails if a database is not whole where that of its control is. If the control's is not whole either,
the order proves nothing, and only its result is counted. After all ways, all begin again.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

import restores
from campaigns.campaign import Campaign
from forked import Forked
from processes import started_by
from restores import Case

if TYPE_CHECKING:
    from pathlib import Path

TURNS: Final = 20
WAYS_OF_A_ROUND: Final = 4

# Orders that are played at once. Each waits most of the time. With more of them on a busy machine,
# some would take too long.
AT_ONCE: Final = 3


def all_ways() -> list[list[Case]]:
    """Return a list of orders for each way of restoring; the orders of a way share two controls."""
    axes: dict[str, tuple[Any, ...]] = {
        name: get_args(hint) for name, hint in get_type_hints(Case).items()
    }
    axes["ours"] = ("apply", "dry_run", "daemon", "embedded")
    found: dict[Case, list[Case]] = {}
    for values in itertools.product(*axes.values()):
        case = Case(*values)
        # One that does not run cannot be killed.
        if case.ingestor == "live" or "killed" not in case.tail:
            way = dataclasses.replace(case, ours="none", snapshot="no")
            found.setdefault(way, []).append(case)
    return list(found.values())


WAYS: Final = all_ways()


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    turn, place = divmod(number * WAYS_OF_A_ROUND, len(WAYS))
    ways = random.Random(turn).sample(WAYS, len(WAYS))[place : place + WAYS_OF_A_ROUND]
    orders = list(itertools.chain(*ways))
    orders = random.Random(number).sample(orders, min(wanted, len(orders)))
    tally, errors = Counter[str](), list[Exception]()
    with started_by(Forked), ThreadPoolExecutor(AT_ONCE) as pool:
        controls = {
            case: pool.submit(restores.play, base / f"{case}", case)
            for case in {order.control for order in orders}
        }
        without = {case: played.result()[0] for case, played in controls.items()}
        played = {
            case: pool.submit(
                restores.require_no_harm, base / f"{case}", case, without[case.control]
            )
            for case in orders
        }
        for case, future in played.items():
            try:
                restored, control = future.result(), without[case.control]
            except Exception as exc:  # noqa: BLE001 - the others are to be told of as well
                errors.append(exc)
                continue
            tally["restores"] += 1
            tally["whole without us"] += control.whole
            tally["whole with us alone"] += restored.whole and not control.whole
            tally["with the snapshot's values"] += restored.values == case.values
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(orders)} orders", errors)
    return tally


CAMPAIGN = Campaign(
    about="backups restored in every order of steps: what is whole without us is whole with us",
    unit="restores",
    full=TURNS * sum(map(len, WAYS)),
    short=2,
    play=play,
)
