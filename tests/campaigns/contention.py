"""A neighbour has the write lock for half of the time or more: no snapshot is lost, it never fails.

A daemon and a bridge in a host serve one database, in which a real second process writes: with the
lock for half of the time or nearly all of it, for six seconds at a time, or for a VACUUM.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from campaigns.campaign import Campaign
from processes import call, daemon, neighbour, running
from support import connect, document, make_database, put

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path


class Kind(NamedTuple):
    """What the neighbour does.

    Attributes:
        name: for the report.
        share: of the time in which it has the lock.
        holds: how long it has it each time, in seconds; one of these.
        bursts: in a round. A neighbour that holds the lock for long makes each of them long.
        vacuum: whether it does a VACUUM each time.

    """

    name: str
    share: float
    holds: tuple[float, ...]
    bursts: int
    vacuum: bool = False


MOST: Final = Kind("95 %", 0.95, (0.01, 0.05, 0.2), 25)
HALF: Final = Kind("50 %", 0.5, (0.001, 0.01, 0.1), 25)
LONG: Final = Kind("6 s", 0.9, (6.0,), 3)
VACUUM: Final = Kind("VACUUM", 0.5, (0.001,), 3, vacuum=True)
KINDS: Final = (*(MOST, HALF) * 5, LONG, *(MOST, HALF) * 5, VACUUM)

# Of what is vacuumed: at full size, and in a test.
MEGABYTES: Final = 300, 5
FULL: Final = 1_000

VALUES: Final = {"confirmed": 2, "suspected": 1}
KEYS: Final = [f"{number:064x}" for number in range(600)]
# A snapshot may wait for several holds of six seconds, and a VACUUM on a busy machine.
PATIENCE: Final = 180.0


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    dice, kind = random.Random(number), KINDS[number % len(KINDS)]
    database = make_database(base / "meshcore.db", [("nodes", key, 0, None) for key in KEYS])
    megabytes = MEGABYTES[wanted < FULL] if kind.vacuum else 0
    with connect(database, timeout=PATIENCE) as connection:
        connection.execute("CREATE TABLE packets (id INTEGER PRIMARY KEY, payload BLOB)")
        connection.execute("CREATE TABLE ballast (data BLOB)")
        for _ in range(megabytes):
            connection.execute("INSERT INTO ballast VALUES (zeroblob(1000000))")
    (base / "mbcap-snapshot").mkdir()
    settings = {
        "debounce": dice.choice(["0s", "20ms", "100ms"]),
        "batch_rows": dice.choice(["50", "500"]),
        "busy_deadline": "1s",
        "resync": "24h",
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    hold = dice.choice(kind.holds)
    pace = [f"{hold}", f"{hold / kind.share - hold}", f"{int(kind.vacuum)}"]
    with (
        connect(database, timeout=PATIENCE) as connection,
        daemon(database, *options) as watcher,
        running(neighbour("host", database, *(f"{n}={v}" for n, v in settings.items()))) as host,
        running(neighbour("writer", database, *pace)) as writer,
    ):
        last, bursts = list[tuple[int, str]](), min(kind.bursts, wanted)
        for burst in range(bursts):
            # The last one arrived between two holds; this one comes at any moment of the next.
            time.sleep(dice.random() * hold)
            last = publish(base / "mbcap-snapshot", f"{burst}", dice)
            deadline = time.monotonic() + PATIENCE
            while (found := values(connection)) != last:
                said = kind, hold, last, found, watcher.lines, host.lines
                assert time.monotonic() < deadline, ("a snapshot did not land", *said)
                time.sleep(0.005)
        assert writer.end() == 0, writer.said
        # The other bridge may have written last. Then the daemon has yet to find nothing to do.
        deadline = time.monotonic() + PATIENCE
        while (status := call("status", "--json", f"--database={database}")).returncode:
            assert time.monotonic() < deadline, status
        assert json.loads(status.stdout)["stats"]["watch"]["reports_dropped"] == 0
        assert host.end() == 0, host.said
        assert host.lines[-1] == "dropped 0"
        assert watcher.end(signal.SIGTERM) == 0, watcher.said

        neighbours = json.loads(writer.lines[-1])
        assert neighbours["errors"] == [], (kind, hold, neighbours)
        [(packets,)] = connection.execute("SELECT count(*) FROM packets")
        assert packets == neighbours["committed"], (packets, neighbours)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert values(connection) == last
    assert "Traceback" not in watcher.said + host.said, watcher.said + host.said
    tally = Counter({"snapshots": bursts, "packets of the neighbour": packets})
    for bridge in (watcher, host):
        outcomes = Counter(result["outcome"] for result in bridge.results)
        assert outcomes.keys() <= {"applied", "unchanged", "busy", "no_snapshot"}, bridge.results
        tally["syncs"] += outcomes["applied"] + outcomes["unchanged"]
        tally[f"syncs beside {kind.name}"] += outcomes["applied"] + outcomes["unchanged"]
        tally["told of as busy"] += outcomes["busy"]
    return tally


def publish(directory: Path, burst: str, dice: random.Random) -> list[tuple[int, str]]:
    """Publish a few snapshots; return what the last one wants in each row."""
    status, evidence = "", ""
    for number in range(dice.randint(1, 3)):
        time.sleep(dice.choice([0, 0.005, 0.05, 0.2]))
        status, evidence = dice.choice([*VALUES]), f"{burst}.{number}"
        put(document(*((key, status, evidence) for key in KEYS)), directory / "snapshot.json")
    return [(VALUES[status], evidence)]


def values(connection: sqlite3.Connection) -> list[tuple[int, str]]:
    sql = "SELECT DISTINCT multibyte_sup, multibyte_evidence FROM nodes"
    return connection.execute(sql).fetchall()


CAMPAIGN = Campaign(
    about="a neighbour has the write lock nearly always: each snapshot arrives, no report is"
    " dropped, the neighbour is never refused",
    unit="syncs",
    full=10_000,
    short=4,
    play=play,
)
