"""The publisher, in a process of its own: renames on request, answers with the moment of it."""

from __future__ import annotations

import json
import os
import sys
import time


def burst(masters: list[str], target: str, count: int, seconds: float) -> tuple[int, int]:
    """Rename `count` times, spread over `seconds`; the last file is one that came at no other time.

    Hard links of two files take turns before: a rename over a link to the same file does nothing.
    Returns the monotonic times of the first and the last rename in ns.
    """
    *turns, last = masters
    staged = f"{target}.burst.tmp"
    begun = time.monotonic()
    first = time.monotonic_ns()
    for number in range(1, count + 1):
        os.link(last if number == count else turns[number % 2], staged)
        pause = begun + seconds * number / count - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        os.replace(staged, target)
    return first, time.monotonic_ns()


def main() -> None:
    """Answer each line of standard input."""
    for line in sys.stdin:
        request = json.loads(line)
        if "count" in request:
            answer: object = burst(**request)
        else:
            answer = time.monotonic_ns()
            os.replace(request["staged"], request["target"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
