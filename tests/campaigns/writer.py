"""A busy ingestor: `writer.py DATABASE SEED KEY…` says the number of each packet it has committed.

It holds the write lock for a third of the time. At times one of the nodes that are named moves to
`inactive_nodes`, or comes back as a new row. An error ends it.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import time


def main(database: str, seed: str, *moving: str) -> None:
    connection = sqlite3.connect(database, timeout=5, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    [(number,)] = connection.execute("SELECT coalesce(max(number), 0) FROM packets").fetchall()
    dice = random.Random(int(seed))
    while True:
        number += 1
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO packets VALUES (?, randomblob(300))", (number,))
        connection.execute("UPDATE nodes SET last_seen = ?1 WHERE rowid % 9 = ?1 % 9", (number,))
        if number % 200 == 0:
            move(connection, dice.choice(moving))
        time.sleep(dice.random() / 50)
        connection.execute("COMMIT")
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        time.sleep(dice.random() / 25)


def move(connection: sqlite3.Connection, key: str) -> None:
    if connection.execute("SELECT 1 FROM nodes WHERE public_key = ?", (key,)).fetchall():
        where = "nodes WHERE public_key = ?"
        connection.execute(f"REPLACE INTO inactive_nodes SELECT * FROM {where}", (key,))
        connection.execute(f"DELETE FROM {where}", (key,))
    else:
        connection.execute("INSERT INTO nodes (public_key) VALUES (?)", (key,))


if __name__ == "__main__":
    main(*sys.argv[1:])
