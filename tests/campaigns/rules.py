"""The contract, as a model of the database: two dicts, and what a sync makes of them."""

from __future__ import annotations

from typing import Final, NamedTuple

TABLES: Final = ("nodes", "inactive_nodes")
Value = tuple[int, str | None]
Rows = dict[str, dict[str, Value]]


class Times(NamedTuple):
    """When a sync was.

    Attributes:
        began: when the steps since the last sync began.
        asked: when the sync was asked for.
        ended: when the rows had been read.

    """

    began: float
    asked: float
    ended: float


class Ask(NamedTuple):
    """A lowering that the snapshots ask for, and between which moments the bridge noted it.

    `latest` is None while it may have noted it anew since the last sync.
    """

    sup: int
    earliest: float
    latest: float | None


class Model:
    """The rows as they have to be: a dict for each table, and a few rules.

    With `hold`, the time decides. Where the bridge may have lowered a row and need not have, the
    model takes what it did.
    """

    def __init__(self, downgrade: str, hold: float) -> None:
        self.downgrade, self.hold = downgrade, hold
        self.rows: Rows = {table: {} for table in TABLES}
        self.wanted: dict[str, Value] | None = None  # there is no snapshot to be read
        self.asks: dict[str, Ask] = {}
        # The lowering that the last snapshot wanted, or the last bridge waited for; and from when
        # on a sync that was still under way may have written it.
        self.former: dict[str, tuple[Value, float]] = {}
        self.touched: set[str] = set()
        self.lowered = 0

    def replace(self, wanted: dict[str, Value] | None) -> None:
        """Note that the snapshot is replaced."""
        self.linger()
        self.wanted = wanted

    def restart(self) -> None:
        """Note that the bridge is: the waits start anew."""
        self.linger()
        self.asks.clear()

    def linger(self) -> None:
        if self.wanted is not None:
            for key, ask in self.asks.items():
                if key in self.wanted:
                    self.former[key] = self.wanted[key], ask.earliest + self.hold

    def sync(self, times: Times, found: Rows) -> Rows:
        """Note a sync; return what the rows have to be. If a row may be either, take `found`."""
        for key in self.touched & self.asks.keys():
            self.asks[key] = self.asks[key]._replace(latest=None)
        asks: dict[str, Ask] = {}
        for table, rows in self.rows.items():
            for key, before in rows.items():
                right = self.after(key, before, times, asks)
                value, due = self.former.get(key, (before, 0.0))
                if value[0] < before[0] and due <= times.ended:
                    right += self.after(key, value, times, asks)
                rows[key] = found[table][key] if found[table].get(key) in right else right[0]
                self.lowered += self.downgrade == "hold" and rows[key][0] < before[0]
        if self.wanted is not None:
            self.asks = {
                key: ask
                for key, ask in asks.items()
                if any(rows.get(key, (0, ""))[0] > ask.sup for rows in self.rows.values())
            }
        self.touched.clear()
        self.former.clear()
        return self.rows

    def after(self, key: str, before: Value, times: Times, asks: dict[str, Ask]) -> list[Value]:
        """Return what a row may be after a sync; note in `asks` that it would be lowered."""
        wanted = before if self.wanted is None else self.wanted.get(key, before)
        if wanted[0] >= before[0] or self.downgrade == "allow":
            return [wanted]
        if self.downgrade == "never":
            return [before]
        ask = self.asks.get(key)
        if ask is None or ask.sup != wanted[0]:
            ask = Ask(wanted[0], times.began, None)
        asks[key] = ask = ask._replace(latest=ask.latest or times.ended)
        assert ask.latest is not None
        if times.ended < ask.earliest + self.hold:
            return [before]
        return [wanted] if times.asked >= ask.latest + self.hold else [before, wanted]
