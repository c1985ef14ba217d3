"""What the fuzzing campaign feeds with bytes: each target raises where a promise is broken."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import io
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import tomllib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from campaigns import snapshots
from mbcap_watch import PersistResult, Settings, SettingsError, Timings, WatchState
from mbcap_watch.cli import config, views
from mbcap_watch.doctor.health import judge
from mbcap_watch.settings import SETTING_NAMES
from mbcap_watch.telemetry.ask import ask, digest_of
from mbcap_watch.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LONGEST: Final = 400  # of a message about one value


class Feed:
    """Makes choices of bytes, the same for the same bytes; at the end, always the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def number(self, below: int) -> int:
        size = (below.bit_length() + 7) // 8
        return int.from_bytes(self._data.read(size), "little") % below

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.number(len(options))]

    def rest(self) -> bytes:
        return self._data.read()

    def text(self) -> str:
        return self._data.read(self.number(100)).decode("utf-8", "surrogateescape")

    def value(self) -> Any:
        """Return a value of any type that JSON and TOML have, mostly an extreme one."""
        kind = self.number(12)
        if kind < 5:
            return copy.deepcopy(self.choice(EXTREMES))  # what takes it may put something inside
        if kind < 7:
            return self.text()
        if kind < 9:
            return self.number(1 << 64) - self.choice([0, 1 << 63])
        if kind < 10:
            return self.number(1 << 40) / self.choice([1, 1000, 7])
        return [self.text()] if kind < 11 else {self.text(): self.text()}


EXTREMES: Final[list[Any]] = [
    *(None, True, False, 0, -1, 1, 0.0, -0.0, 1e308, -1e308, 1e-308, 2**31, 2**63, 2**64, 10**400),
    *("", " ", "0", "1s", "1 h", "1.5e3", "٣s", "\x1b[31m", "\u202e", "\ud800", "\0", "a\nb"),
    *("x" * 9999, "/" * 99, "4" * 5000),
    *("auto", "inotify", "hold", "10GiB", "99999999999999999h", "0x10", "NaN", "Infinity", "-1s"),
    *("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999-23:59", "0001-01-01T00:00:00"),
    *([], {}, [[]], float("inf"), float("nan")),
]  # fmt: skip


def require_message(text: str) -> None:
    assert text.isprintable(), ascii(text)
    assert len(text) < LONGEST, text


# ------------------------------------------------------------------------------ the targets


def parse(data: bytes) -> None:
    """A snapshot: as the judge of `snapshots` says."""
    snapshots.check(data)


def settings(data: bytes) -> None:
    """Any value of any setting: a SettingsError on one line, or what is kept can be given again."""
    feed = Feed(data)
    given: dict[str, Any] = {"database": "m.db"}
    for _ in range(1 + feed.number(3)):
        name = feed.choice(SETTING_NAMES)
        given[name] = feed.text() if feed.number(2) else feed.value()
    if not feed.number(50):
        given[feed.text()] = 1
    try:
        made = Settings.from_mapping(given)
    except SettingsError as exc:
        require_message(exc.problem.replace(", ".join(SETTING_NAMES), ""))
        return
    kept = {name: getattr(made, name) for name in SETTING_NAMES}
    assert Settings.from_mapping(kept) == made, given


def toml(data: bytes) -> None:
    """A configuration file: a SettingsError on one line, or the settings that are in it."""
    path = scratch() / "config.toml"
    path.write_bytes(data)
    try:
        table = tomllib.loads("\n".join(re.split("\r\n?", data.decode())))
    except (ValueError, RecursionError):
        table = None
    try:
        loaded = config.load({}, {}, path)
    except SettingsError as exc:
        require_message(str(exc).replace(", ".join(config.DECLARED), ""))
        return
    assert table is not None
    assert {name for name, origin in loaded.origins.items() if origin != "default"} == {*table}
    assert all(table.get(name, word) == word for name, word in [("log_level", loaded.log_level)])


def answer(data: bytes) -> None:
    """What a socket answers: `status` shows it, or does not, and every line can be printed."""
    feed = Feed(data)
    said = feed.rest() if feed.number(4) == 0 else changed(feed)
    offer = listener()
    offer.answer = said
    peers = ask(offer.settings, {"RUNTIME_DIRECTORY": str(offer.home)}, scratch())
    assert [peer.fate for peer in peers] in ([["answered"], ["odd"]] if said else [[]])
    if not peers or peers[0].stats is None:
        return
    stats = peers[0].stats
    assert (stats.pid, stats.uid) == (os.getpid(), os.getuid())
    health = judge(stats)
    lines = [f"{name} {value}" for name, value in views.rows(stats)]
    lines += [text for text, _ in views.marked(health)] + [health.verdict]
    shown = json.dumps(views.as_json(stats, health), allow_nan=False)
    assert sum(map(len, lines)) + len(shown) < 20_000 + 20 * len(said), lines
    if zlib.crc32(data) % 50 == 0:  # it takes a while
        console = Console(file=io.StringIO(), width=100)
        views.render(stats, health, console)
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert printed.replace("\n", "").isprintable(), ascii(printed)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "parse": parse,
    "settings": settings,
    "toml": toml,
    "answer": answer,
}


# ------------------------------------------------------------------------------ what they need


@functools.cache
def scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def changed(feed: Feed) -> bytes:
    """Return a daemon's answer in which a few values are others, missing, or there twice."""
    whole = json.loads(SAMPLE)
    for _ in range(1 + feed.number(4)):
        inner, key = whole, feed.choice(sorted(whole))
        while isinstance(inner[key], dict | list) and inner[key] and feed.number(8):
            inner = inner[key]
            key = feed.choice(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
        if feed.number(10):
            inner[key] = feed.value()
        else:
            inner.pop(key)
            if not whole:
                break
    return json.dumps(whole).encode()


def sample() -> bytes:
    """Return what a daemon answers after a few results, with no part left empty."""
    import msgspec  # noqa: PLC0415

    metrics = Metrics(Settings("/data/m.db"), version="1", pid=1)
    metrics.on_state(WatchState(mode="inotify", last_sync=1.0, last_sweep_hit=1.0, sweep_hits=1))
    metrics.on_result(PersistResult(outcome="applied", reason="rename", changed_active=1))
    metrics.on_timings(Timings(lag=0.5, waits=(0.1,), holds=(0.6,)))
    metrics.on_result(PersistResult(outcome="failed", reason="retry", error="no", cause="corrupt"))
    return msgspec.json.encode(metrics.snapshot(1.7e9))


SAMPLE: Final = sample()


class Listener:
    """A daemon that answers whatever it is told to."""

    def __init__(self) -> None:
        self.answer = b""
        self.home = scratch() / "mbcap-watch"
        self.home.mkdir()
        self.settings = Settings("/data/m.db")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(
            str(self.home / f"{digest_of(self.settings)}-{os.getpid()}-00000000.sock")
        )
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._socket.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(self.answer)


@functools.cache
def listener() -> Listener:
    return Listener()


def seeds(name: str) -> list[bytes]:
    """Return where to start from."""
    match name:
        case "parse":
            dice = random.Random(0)
            return [b"null", *(snapshots.grown(dice) for _ in range(300))]
        case "toml":
            lines = [
                f"{each} = {word}" for each in config.DECLARED for word in ('"1s"', "5", "true")
            ]
            return [line.encode() for line in lines]
        case "answer":
            return [b"\0" + SAMPLE, bytes(40), bytes(range(1, 100))]
        case _:
            return [bytes(20), bytes(range(100))]
