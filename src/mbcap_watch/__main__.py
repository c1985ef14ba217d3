"""The command `mbcap-watch`, and `python -m mbcap_watch`: first the signals, then all the rest.

Loading the command line takes a fifth of a second, in which a signal would end `run` as if it had
failed. This module and the package itself import next to nothing, so that it need not.
"""

import os
import signal
import sys


def main() -> None:
    """Run the command line. A signal from now on ends `run` with exit code 0."""
    if sys.argv[1:2] == ["run"]:
        # SIGTERM last: whoever sees it caught knows that both are.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: os._exit(0))  # nothing is begun that could be undone
    from mbcap_watch.cli import app  # noqa: PLC0415 - the handlers come first

    app.main()


if __name__ == "__main__":
    main()
