"""Fuzzing, led by coverage: whatever bytes come in, the promises about them hold (`targets`)."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from campaigns.campaign import Campaign
from campaigns.snapshots import mutated
from campaigns.targets import TARGETS, seeds

# Of a hundred executions, each target has so many. An answer takes the longest.
SHARES: Final = {"parse": 55, "settings": 28, "toml": 15, "answer": 2}

# atheris ends its process. What it finds is kept, and is where the next round starts.
CORPUS: Final = Path(".campaigns", "fuzz")
SHORT: Final = 10_000  # up to here, nothing is kept and atheris is not needed

CHILD: Final = """
import sys
import atheris
with atheris.instrument_imports(include=["mbcap_watch", "tomllib"]):
    from campaigns.targets import TARGETS
atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
atheris.Fuzz()
"""


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    """Play all targets.

    A round that is played again starts with what was found since, so a failure tells the bytes.
    """
    tally = Counter[str]()
    count = min(wanted, 400_000)
    if wanted > SHORT and importlib.util.find_spec("atheris") is None:
        raise ModuleNotFoundError("this campaign needs atheris: pip install -e '.[test,fuzz]'")
    for name, share in SHARES.items():
        done = (led if wanted > SHORT else blind)(base, name, number, 1 + count * share // 100)
        tally["executions"] += done
        tally[name] += done
    return tally


def led(base: Path, name: str, number: int, count: int) -> int:
    """Feed a target for so many executions in a child process; return how many it were."""
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds(name)):
        (corpus / f"seed-{index}").write_bytes(seed)
    options = [f"-runs={count}", f"-seed={number + 1}", "-max_len=4096", "-timeout=60"]
    options += [f"-artifact_prefix={base}/", str(corpus)]
    command = [sys.executable, "-c", CHILD, name, *options]
    done = subprocess.run(command, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace") + done.stdout.decode(errors="replace")
    found = [path.read_bytes() for path in base.iterdir() if path.is_file()]
    assert done.returncode == 0, (name, found, said[-6000:])
    [executions] = re.findall(r"^Done (\d+) runs", said, re.MULTILINE)
    return int(executions)


def blind(_: Path, name: str, number: int, count: int) -> int:
    """Change the seeds by dice, without a look at the coverage and without atheris."""
    dice, pool = random.Random(f"{name} {number}"), seeds(name)
    for _i in range(count):
        data = mutated(dice.choice(pool), dice.choice(pool), dice)
        if dice.random() < 0.5:
            data = dice.randbytes(dice.randrange(60))
        try:
            TARGETS[name](data)
        except Exception as exc:
            raise AssertionError(name, data) from exc
        if len(pool) < 500:
            pool.append(data)
    return count


CAMPAIGN = Campaign(
    about="fuzzing of snapshots, settings, TOML and socket answers, led by coverage (atheris)",
    unit="executions",
    full=20_000_000,
    short=1_000,
    play=play,
)
