"""`python -m benchmarks [NAME…] [--quick]`: run benchmarks, print a table, keep the samples."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks import report

NAMES: Final = (
    "latency",
    "apply",
    "large",
    "hostile",
    "neighbour",
    "busy_host",
    "bursts",
    "idle",
    "startup",
    "stalls",
    "single_writer",
)


def main() -> None:
    """Run what was asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="a few seconds each; rough figures")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    rows: list[report.Row] = []
    for name in arguments.names or NAMES:
        started = time.monotonic()
        sys.stderr.write(f"{name} …")
        sys.stderr.flush()
        with tempfile.TemporaryDirectory(prefix="mbcap-bench-") as directory:
            result = importlib.import_module(f"benchmarks.{name}").run(
                Path(directory), quick=arguments.quick
            )
        report.save(name, result, quick=arguments.quick)
        rows += result.rows
        sys.stderr.write(f" {time.monotonic() - started:.0f} s\n")
    sys.stdout.write(f"{report.markdown(rows)}\n\n{report.machine()}\n")


if __name__ == "__main__":
    main()
