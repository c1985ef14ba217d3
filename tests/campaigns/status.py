"""`status --json` at random moments: what it tells was true shortly before, or is shortly after."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from campaigns.campaign import Campaign
from processes import MBCAP_WATCH
from support import document, make_database, put, read_rows

# A verdict was true at some moment within so many seconds before or after. A daemon on a busy
# machine may need more; then it is asked again, until so many seconds have passed.
SLACK: Final = 2.0
PATIENCE: Final = 20.0


class Site:
    """A daemon to which things happen, and what is so: from /proc, and from the files."""

    def __init__(self, base: Path, dice: random.Random) -> None:
        self.dice = dice
        self.database = make_database(base / "meshcore.db", [("nodes", "aa11", 0, None)])
        self.aside, self.log = base / "aside.db", base / "log"
        self.snapshot = base / "mbcap-snapshot" / "snapshot.json"
        self.environ = os.environ | {"RUNTIME_DIRECTORY": str(base / "mbcap-watch")}
        (base / "mbcap-watch").mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.seen: list[tuple[float, str]] = []
        self.mend()

    # What happens.

    def start(self) -> None:
        self.send(0)
        if self.process is None:
            command = [*MBCAP_WATCH, "run", f"--database={self.database}", "--sweep-interval=500ms"]
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(command, stderr=log, env=self.environ)

    def send(self, signum: int) -> None:
        if self.process is not None:
            self.process.send_signal(signum)
            if signum == signal.SIGKILL:
                self.process.wait()
            if self.process.poll() is not None:
                self.process = None

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def stop(self) -> None:
        self.send(self.dice.choice([signal.SIGKILL, signal.SIGTERM]))

    def pause(self) -> None:
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    def lose(self) -> None:
        if self.database.exists():
            self.database.rename(self.aside)

    def bring_back(self) -> None:
        if self.aside.exists():
            self.aside.rename(self.database)

    def tear(self) -> None:
        put(b'{"entries": [', self.snapshot)

    def mend(self) -> None:
        put(document(("aa11", "confirmed", "advert")), self.snapshot)

    # What is so.

    def watch(self, until: float, question: subprocess.Popen[bytes] | None = None) -> None:
        """Note what is so until a moment, or until a question is answered."""
        while True:
            self.seen.append((time.monotonic(), self.now()))
            if question.poll() is not None if question else time.monotonic() >= until:
                return
            time.sleep(0.02)

    def now(self) -> str:
        try:
            pid = self.process.pid if self.process else 0
            letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            letter = "X"
        if letter in "XZ":
            return "not running"
        if letter in "Tt":
            return "paused"
        if not self.database.exists() or self.snapshot.read_bytes()[-1:] != b"}":
            return "unhealthy"
        served = ("nodes", "aa11", 2, "advert") in read_rows(self.database)
        return "healthy" if served else "unserved"

    def around(self, start: float, end: float) -> set[str]:
        return {what for at, what in self.seen if start - SLACK <= at <= end + SLACK}

    def ask(self) -> tuple[dict[str, Any], set[str]]:
        """Ask; return what was told, and what was so around then."""
        command = [*MBCAP_WATCH, "status", "--json", f"--database={self.database}"]
        asked = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=self.environ) as question:
            self.watch(asked, question)
            assert question.stdout is not None
            told = json.loads(question.stdout.read())
        answered = time.monotonic()
        assert (question.returncode == 0) == told["healthy"], (question.returncode, told)
        if not verdict(told) & self.around(asked, answered):
            self.watch(answered + SLACK)  # it must become true
        return told, self.around(asked, answered)


def verdict(told: dict[str, Any]) -> set[str]:
    """Return what may be true if this was told."""
    state = told["state"]
    if state == "running":
        return {"healthy"} if told["healthy"] else {"unhealthy", "unserved"}
    return {"healthy", "unserved", "unhealthy"} if state == "starting" else {state}


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    dice = random.Random(number)
    site, tally = Site(base, dice), Counter[str]()
    remedies = [site.start, site.go_on, site.bring_back, site.mend]
    troubles = [site.stop, site.pause, site.lose, site.tear]
    site.start()
    try:
        for _ in range(min(wanted, 40)):
            event = dice.choice(dice.choice([remedies, remedies, remedies, troubles]))
            event()
            site.watch(time.monotonic() + dice.choice([0.0, 0.1, 0.5, 1.5]))
            deadline = time.monotonic() + PATIENCE
            told, seen = site.ask()
            tally["questions"] += 1
            tally[told["state"]] += 1
            tally["healthy"] += told["healthy"]
            while not verdict(told) & seen:
                assert time.monotonic() < deadline, (event.__name__, told, seen)
                tally["late answers"] += 1
                told, seen = site.ask()
    finally:
        site.kill()
    assert "Traceback" not in site.log.read_text(), site.log.read_text()
    return tally


CAMPAIGN = Campaign(
    about="`status` at random moments of a daemon's life: it tells the truth",
    unit="questions",
    full=1_000,
    short=2,
    play=play,
)
