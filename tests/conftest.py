from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import uvloop

from mbcap_watch import ensure_snapshot_dir, snapshot_path
from mbcap_watch.bridge import service
from mbcap_watch.store import plan, reconcile
from support import (
    Row,
    at_rest,
    connect,
    document,
    interrupted_as_usual,
    make_database,
    open_descriptors,
    put,
    thread_names,
    threads_beside,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

hypothesis.settings.register_profile("default", deadline=None, max_examples=100)
interrupted_as_usual()

# `ci` is built in: the same examples each time, for mutation testing.
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

SEED: list[Row] = [
    ("nodes", "aa11", 0, None),
    ("inactive_nodes", "bb22", 0, None),
    ("nodes", "cc33", 2, "advert"),
    ("nodes", "dd44", 1, "path"),
    ("nodes", "ee55", 0, None),
    ("inactive_nodes", "ee55", 0, None),
    ("inactive_nodes", "ff66", 2, "advert"),
]


LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is async on asyncio, or on the loops that its module names in `LOOPS`."""
    if "anyio_backend" in metafunc.fixturenames:
        loops = getattr(metafunc.module, "LOOPS", ["asyncio"])
        metafunc.parametrize("anyio_backend", loops, indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return LOOPS[request.param]


@pytest.fixture(scope="session", autouse=True)
def libuv_has_its_descriptors() -> None:
    """libuv opens descriptors for the whole process at its first use; they are no leak."""
    uvloop.run(asyncio.sleep(0))


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No settings of whoever runs the tests. Daemons that are killed leave their sockets here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MBCAP_WATCH_") or name == "DB_PATH":
                patch.delenv(name)
        patch.setenv("RUNTIME_DIRECTORY", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database as the ingestor makes it, with a few rows, and a directory for snapshots."""
    path = make_database(tmp_path / "meshcore.db", SEED)
    ensure_snapshot_dir(path)
    return path


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def slow_pages(database: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a number: so many pages are compared at the next sync, each of them slowly.

    As on a slow machine, whose every page takes seconds, but four times as quick.
    """
    compare = plan.compare

    def compare_slowly(*args: Any) -> plan.Comparison:
        time.sleep(0.3)
        return compare(*args)

    def publish(pages: int) -> None:
        with connect(database) as connection:
            # A table that is much larger than the snapshot is asked for keys, page by page.
            connection.execute("INSERT INTO nodes (rowid, public_key) VALUES (1000000000, 'last')")
        keys = (f"k{number}" for number in range(reconcile.PAGES.keys * pages - 1))
        put(
            document(("aa11", "confirmed"), *((key, "confirmed") for key in keys)),
            snapshot_path(database),
        )

    monkeypatch.setattr(service, "STUCK_SECONDS", 1.2)
    monkeypatch.setattr(plan, "compare", compare_slowly)
    return publish


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a number: so many threads more can be started from then on.

    Those of trio itself do not count: it keeps them for a while, and cannot end without one.
    """
    start = threading.Thread.start

    def limit(spare: int) -> None:
        most = len(thread_names()) + spare

        def start_if_there_is_room(thread: threading.Thread) -> None:
            if not thread.name.startswith("Trio thread") and len(thread_names()) >= most:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_if_there_is_room)

    return limit


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """No thread and no descriptor is gained, whatever the test did.

    No error of SQLite waits for Python's collector: its frames may hold the whole snapshot.
    """
    gc.collect()
    gc.disable()
    threads, descriptors = at_rest(), open_descriptors()
    yield
    kept = [each for each in gc.get_objects() if isinstance(each, sqlite3.Error)]
    gc.enable()
    assert not kept, [(each, gc.get_referrers(each)) for each in kept]
    wait_until(lambda: not threads_beside(threads), f"an end of all threads but {threads}")
    wait_until(
        lambda: len(open_descriptors()) <= len(descriptors),
        f"closing of {set(open_descriptors().items()) - set(descriptors.items())}",
    )
