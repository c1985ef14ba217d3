"""What stands below the options in `--help`: examples, environment, files, exit codes."""

from __future__ import annotations

from typing import Final

_ENVIRONMENT: Final = """
Environment:
  DB_PATH             the database, CoreScope's own variable
  MBCAP_WATCH_CONFIG  a TOML file, as --config
  MBCAP_WATCH_...     every other setting: MBCAP_WATCH_POLL_INTERVAL=2s
  An option beats the environment, the environment beats the file; there
  the same names are keys: poll_interval = "2s".
  Durations are 250ms, 5s, 10m, 1h; sizes are 64KiB, 64MiB, 1GiB.
"""

_FILES: Final = """
Files:
  data/meshcore.db             the database, if none is given
  mbcap-snapshot/              beside the database: the snapshot directory
  mbcap-snapshot/snapshot.json the snapshot, replaced by rename
  mbcap-snapshot/result.json   the answer to the publisher, with --ack
"""


def page(*sections: str, settings: bool = True) -> str:
    r"""Return an epilog for a command, its lines broken as they are here (\b keeps them so).

    Args:
        sections: each a title and indented lines, at most 76 characters long.
        settings: whether the command takes settings, from the environment and files, too.

    """
    shared = (_ENVIRONMENT, _FILES) if settings else ()
    return "\n\n".join("\b\n" + section.strip() for section in (*sections, *shared))


MAIN: Final = page(
    """
Examples:
  mbcap-watch run --database /app/data/meshcore.db
  mbcap-watch apply --dry-run --database /app/data/meshcore.db
  mbcap-watch --install-completion
""",
    """
See "mbcap-watch COMMAND --help" for the options, examples, environment,
files and exit codes of each command.
""",
    settings=False,
)

RUN: Final = page(
    """
Examples:
  mbcap-watch run --database /app/data/meshcore.db
  mbcap-watch run --config /etc/mbcap-watch/mbcap-watch.toml
  mbcap-watch run --snapshot-dir /mnt/nfs/mbcap-snapshot --poll-interval 5s
  DB_PATH=/app/data/meshcore.db mbcap-watch run --json 2>run.log
""",
    """
Exit codes:
  0  ended by SIGTERM or SIGINT
  1  standard output, written with --json, is gone
  2  usage or configuration
""",
)

APPLY: Final = page(
    """
Examples:
  mbcap-watch apply --dry-run --database /app/data/meshcore.db
  mbcap-watch apply --json --busy-deadline 5s
""",
    """
Exit codes:
  0  applied, unchanged, or no snapshot yet
  1  anything else, such as a database that cannot be written
  2  usage or configuration
  3  the snapshot is malformed or refused
  4  the database, or every table with both columns, is missing
  5  still busy at --busy-deadline
""",
)

PUBLISH: Final = page(
    """
Examples:
  mbcap-watch publish snapshot.json --database /app/data/meshcore.db
  echo '[{"public_key": "5f3a", "status": "confirmed"}]' |
      mbcap-watch publish - --snapshot-dir /app/data/mbcap-snapshot
""",
    """
Exit codes:
  0  published
  1  it could not be written or renamed into place
  2  usage or configuration
  3  it is no snapshot; nothing was published
""",
)

DEMO: Final = page(
    """
Examples:
  mbcap-watch demo
  mbcap-watch demo --nodes 100000 --snapshots 3 --mode poll
""",
    """
Exit codes:
  0  every row is right
  1  one is not, or a snapshot did not arrive
  2  usage
""",
    settings=False,
)

CONFIG: Final = page(
    """
Examples:
  mbcap-watch config --config /etc/mbcap-watch/mbcap-watch.toml
  mbcap-watch config --json
""",
    """
Exit codes:
  0  the settings are usable
  2  usage or configuration
""",
)

STATUS: Final = page(
    """
Examples:
  mbcap-watch status
  mbcap-watch status --json --max-age 15m
  docker exec CONTAINER mbcap-watch status
  sudo -u corescope mbcap-watch status --database /app/data/meshcore.db
""",
    """
Exit codes:
  0  healthy; there may be warnings
  1  not healthy, not running, or another user's
  2  usage or configuration
""",
)

CHECK: Final = page(
    """
Examples:
  mbcap-watch check --database /app/data/meshcore.db
  sudo -u corescope mbcap-watch check --database /app/data/meshcore.db
""",
    """
Exit codes:
  0  no problem; there may be warnings
  1  at least one problem
  2  usage or configuration
""",
)

TOP: Final = page(
    """
Examples:
  mbcap-watch top
  ssh -t HOST mbcap-watch top --database /app/data/meshcore.db
""",
    """
Exit codes:
  0  ended by q or Ctrl-C; or printed once, without a terminal
  2  usage or configuration
""",
)

PLOT: Final = page(
    """
Examples:
  mbcap-watch plot -o lags.svg
  mbcap-watch plot --database /app/data/meshcore.db >lags.svg
""",
    """
Exit codes:
  0  drawn
  1  nothing runs, or the file cannot be written
  2  usage or configuration
""",
)
