"""Play a campaign: `make campaign NAME=kills N=10000`; without a name, list them.

What is begun goes on where its report ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from campaigns.campaign import Report, load, names, play, play_round


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names())
    parser.add_argument("-n", type=int, help="how many units in all (default: the full size)")
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time (default: 1)")
    parser.add_argument("--round", type=int, help="play this round alone, without a report")
    parser.add_argument(
        "--report", type=Path, help="where the report is (default: .campaigns/NAME.json)"
    )
    asked = parser.parse_args()
    if asked.name is None:
        for name in names():
            campaign = load(name)
            print(f"{name}: {campaign.about}\n    full size: {campaign.full:,} {campaign.unit}")
            if (path := _report_of(name)).exists():
                print(f"    so far: {Report(path, name)}")
        return 0
    campaign = load(asked.name)
    if asked.round is not None:
        print(dict(play_round(asked.name, asked.round, asked.n or campaign.full)))
        return 0
    report = Report(asked.report or _report_of(asked.name), asked.name)
    print(f"{campaign.about}\n{report}", flush=True)
    play(report, asked.n or campaign.full, asked.jobs, lambda said: print(said, flush=True))
    return 1 if report.failures else 0


def _report_of(name: str) -> Path:
    return Path(".campaigns", f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
