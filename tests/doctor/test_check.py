"""Broken installations, real ones: is the cause named, and the remedy right?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from fuse import fuse
from machine import NOBODY, ROOT, as_nobody, unshared
from mbcap_watch import Settings
from mbcap_watch.cli import output
from mbcap_watch.doctor import check, database, machine, snapshot
from mbcap_watch.doctor.findings import Finding, Installation, ok, size
from mbcap_watch.settings import SNAPSHOT_DIR_NAME
from mbcap_watch.snapshot import timestamp
from mbcap_watch.store import steps
from mbcap_watch.store.native import HAS_RESET_BUG
from mbcap_watch.watcher.mounts import Mount
from processes import call, call_json
from support import (
    IN_USE,
    connect,
    document,
    in_use,
    locked,
    make_database,
    put,
    run_sql,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.anyio

READER = IN_USE.replace("print", "connection.execute('BEGIN'); _ = connection.execute('SELECT"
                          " * FROM nodes').fetchall(); print")  # fmt: skip


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)


@pytest.fixture
def installation(database: Path) -> Path:
    """A sound one: a database, and a fresh snapshot for it."""
    publish(database)
    return database


def publish(database: Path, *entries: Any, written_at: str | None = None) -> None:
    entries = entries or (("aa11", "confirmed", "advert"), ("bb22", "suspected", "path"))
    stamp = timestamp.now() if written_at is None else written_at
    put(document(*entries, written_at=stamp), snapshot_of(database))


def snapshot_of(database: Path) -> Path:
    return database.parent / SNAPSHOT_DIR_NAME / "snapshot.json"


class Report(list[Finding]):
    """Findings that a test asks for by subject."""

    def __call__(self, subject: str, level: str) -> str:
        """Return what is said about the subject, at this level."""
        found = [f for f in self if f.subject == subject and f.severity == level]
        assert found, f"no {level} about {subject} in\n{shown(self)}"
        assert all(bool(each.remedy) is (level != "ok") for each in found)
        return " ".join(f"{each.text} -> {each.remedy}" for each in found)

    @property
    def worse(self) -> set[tuple[str, str]]:
        """What is wrong; the SQLite of the machine is another matter."""
        judged: set[tuple[str, str]] = {
            (each.subject, each.severity) for each in self if each.severity != "ok"
        }
        return judged - {("sqlite", "warning")}


async def report_on(database: Path, **settings: Any) -> Report:
    made = Settings.from_mapping({"database": database, **settings})
    return Report(await check.examine(made, {}))


def shown(findings: Sequence[Finding], encoding: str = "utf-8") -> str:
    class File(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    file = File()
    output.print_findings(findings, Console(file=file, width=40))
    return file.getvalue()


# ------------------------------------------------------------------------------ all is well


async def test_a_sound_installation(installation: Path) -> None:
    with in_use(installation) as process:
        report = await report_on(installation)
    assert not report.worse, shown(report)
    assert "2 rows would change; of 2 keys 0 are in no table" in report("preview", "ok")
    assert f"pid {process.pid}" in report("open by", "ok")
    assert report("watch", "ok").startswith("inotify: ")
    assert check.exit_code(report) == 0


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("state", ["closed", "in use", "crashed", "rollback"])
async def test_nothing_is_changed(tmp_path: Path, state: str) -> None:
    mode = "delete" if state == "rollback" else "wal"
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)], journal_mode=mode)
    publish(database, ("aa11", "confirmed"))
    with in_use(database) if state != "closed" else contextlib.nullcontext() as process:
        if process is not None and state == "crashed":
            process.kill()
            process.wait()
        before = everything_in(tmp_path)
        report = await report_on(database, wal_grace=0)
        assert "1 row would change; of 1 key 0 are" in report("preview", "ok")
        assert everything_in(tmp_path) == before
    worse = {"rollback": {("journal mode", "warning")}, "crashed": {("wal", "warning")}}
    assert report.worse == worse.get(state, set())


def everything_in(directory: Path) -> dict[str, object]:
    """What must be as it was, times included; but -shm is where even a reader marks its place."""
    return {
        path.name: (
            path.name.endswith("-shm")
            or (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        )
        for path in directory.rglob("*")
    }


# ------------------------------------------------------------------------------ one thing wrong


def sql(*statements: str) -> Callable[[Path], None]:
    return lambda database: run_sql(database, *statements)


DROP = "ALTER TABLE {} DROP COLUMN multibyte_evidence"


def published(*entries: Any, written_at: str | None = None) -> Callable[[Path], None]:
    return lambda database: publish(database, *entries, written_at=written_at)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda database: put(data, snapshot_of(database))


def touched(days: float) -> Callable[[Path], None]:
    return lambda database: os.utime(database, (0, time.time() + days * 86_400))


ONE_LACKS = sql(DROP.format("inactive_nodes"))
BOTH_LACK = sql(DROP.format("nodes"), DROP.format("inactive_nodes"))
ANOTHER = sql("ALTER TABLE nodes RENAME TO recipes", "DROP TABLE inactive_nodes")
CAPITALS = [(f"{number:04x}", "Confirmed") for number in range(3)]
STRANGERS = [(f"{number:04x}", "confirmed") for number in range(20)]


@pytest.mark.parametrize(
    "breaks, subject, level, words",
    [
        ("rm meshcore.db", "database", "problem", ["does not exist", "there is", "other.db"]),
        ("rm meshcore.db; mkdir meshcore.db", "database", "problem", ["Docker", "rmdir"]),
        ("rm meshcore.db; mkfifo meshcore.db", "database", "problem", ["no regular file"]),
        ("ln -sf gone.db meshcore.db", "database", "problem", ["a link on the way", "gone.db"]),
        ("rm m*.db; ln -s meshcore.db meshcore.db", "database", "problem", ["symbolic links"]),
        ("truncate -s 0 meshcore.db", "database", "problem", ["is empty", "by mistake"]),
        ("seq 1000 > meshcore.db", "tables", "problem", ["is not an SQLite", "set --database"]),
        ("truncate -s 8192 meshcore.db", "tables", "problem", ["is corrupt", "restore a backup"]),
        (ANOTHER, "tables", "problem", ["there is recipes", "set --database"]),
        (BOTH_LACK, "tables", "problem", ["nodes lacks multibyte_evidence; inactive_", "upgrade"]),
        (ONE_LACKS, "tables", "warning", ["inactive_nodes lacks multibyte_evidence", "upgrade"]),
        (sql("PRAGMA journal_mode = delete"), "journal mode", "warning", ["delete, not WAL"]),
        (sql("DELETE FROM nodes", "DELETE FROM inactive_nodes"), "preview", "problem", ["no rows"]),
        (touched(-5), "activity", "warning", ["for 5 d", "old copy"]),
        (touched(+1), "clock", "warning", ["in the future: the clock jumped", "timedatectl"]),
        ("seq 400 > meshcore.db-wal", "wal", "problem", ["left behind", "remove the -wal"]),
        ("rm mbcap-snapshot/*", "snapshot", "warning", ["does not exist", "CoreScope's server"]),
        ("rm -r mbcap-snapshot", "snapshot dir", "warning", ["the publisher creates it"]),
        ("rm -r mbcap*; touch mbcap-snapshot", "snapshot dir", "problem", ["not a directory"]),
        ("cd mbcap*; rm *; mkfifo snapshot.json", "snapshot", "problem", ["is a FIFO", "remove"]),
        (written(b""), "snapshot", "problem", ["malformed", "is empty", "rename it over"]),
        (written(b'{"entries": ['), "snapshot", "problem", ["malformed", "truncated"]),
        (written(b"x" * 2_000_000), "snapshot", "problem", ["refused", "raise --max-bytes"]),
        (written(b"{}"), "snapshot", "warning", ["nothing to write"]),
        (
            published(("aa11", "Confirmed")),
            "snapshot",
            "problem",
            ["1 entry, of which none", "another format"],
        ),
        (published(*CAPITALS, ("aa11", "confirmed")), "snapshot", "warning", ["another format"]),
        (
            published(*STRANGERS),
            "preview",
            "problem",
            ["not one of the 20 keys", "the same CoreScope"],
        ),
        (published(*STRANGERS, ("aa11", "confirmed")), "preview", "warning", ["20 are in no"]),
        (published(written_at="2024-01-01T00:00:00Z"), "age", "warning", ["stale", "put back"]),
        (
            published(written_at="2099-01-01T00:00:00Z"),
            "age",
            "warning",
            ["in the future", "timedatectl"],
        ),
    ],
)
async def test_one_thing_wrong(
    installation: Path,
    breaks: str | Callable[[Path], None],
    subject: str,
    level: str,
    words: list[str],
) -> None:
    make_database(installation.with_name("other.db"))
    if isinstance(breaks, str):
        subprocess.run(["sh", "-ec", breaks], cwd=installation.parent, check=True)
    else:
        breaks(installation)
    before = everything_in(installation.parent)
    report = await report_on(installation, max_bytes=1_000_000)
    said = report(subject, level)
    assert all(word in said for word in words), said
    assert report.worse == {(subject, level)}, shown(report)
    assert check.exit_code(report) == (level == "problem")
    assert everything_in(installation.parent) == before


async def test_the_database_that_corescope_is_told(tmp_path: Path) -> None:
    settings = Settings(database=tmp_path / "data" / "meshcore.db")
    report = Report(await check.examine(settings, {"DB_PATH": "/elsewhere/m.db"}))
    said = report("database", "problem")
    assert "DB_PATH says /elsewhere/m.db" in said
    assert f"{tmp_path}/data is missing or empty" in said
    assert not list(tmp_path.iterdir())


async def test_the_snapshot_directory_that_was_meant(installation: Path, tmp_path: Path) -> None:
    said = (await report_on(installation, snapshot_dir=tmp_path / "typo"))(
        "snapshot dir", "warning"
    )
    assert f"there is {snapshot_of(installation).parent}" in said


async def test_a_linked_database_is_judged_by_where_it_leads(
    installation: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "m.db").symlink_to(installation)
    report = await report_on(tmp_path / "link" / "m.db")
    assert f"which is {installation}" in report("database", "ok")
    assert str(snapshot_of(installation).parent) in report("snapshot dir", "warning")


# ------------------------------------------------------------------------------ other processes


@pytest.mark.parametrize("mode", ["wal", "delete"])
async def test_a_lock_that_nobody_lets_go(tmp_path: Path, mode: str) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)], journal_mode=mode)
    with locked(database) as release:
        said = (await report_on(database))("lock", "problem")
        assert "by pid" in said
        assert "sqlite3" in said
        release()
    (await report_on(database))("lock", "ok")


async def test_a_database_that_is_locked_against_readers(tmp_path: Path) -> None:
    database = make_database(tmp_path / "m.db", journal_mode="delete")
    with in_use(database, IN_USE.replace("UPDATE nodes SET name = 'written'", "BEGIN EXCLUSIVE")):
        report = await report_on(database)
    assert "by pid" in report("lock", "problem")
    assert ("tables", "problem") not in report.worse  # one problem, once


@pytest.mark.parametrize("written", [True, False])
async def test_a_database_that_a_process_has_for_itself(installation: Path, written: bool) -> None:
    """In WAL mode, `locking_mode=EXCLUSIVE` needs no -shm; nothing was left behind by a crash."""
    first = "connection.execute('PRAGMA locking_mode = EXCLUSIVE'); connection.execute("
    script = IN_USE.replace("connection.execute(", first, 1)
    if not written:
        script = script.replace("UPDATE nodes SET name = 'written'", "BEGIN IMMEDIATE")
    with in_use(installation, script) as process:
        report = await report_on(installation, wal_grace=0)
    assert f"by pid {process.pid}" in report("lock", "problem")
    assert not {subject for subject, _ in report.worse} - {"lock"}, shown(report)


async def test_a_reader_that_keeps_the_wal_growing(installation: Path) -> None:
    with in_use(installation, READER) as process:
        os.truncate(f"{installation}-wal", 65 << 20)
        said = (await report_on(installation))("wal", "warning")
    assert "has grown to 65 MiB" in said
    assert f"pid {process.pid}" in said


async def test_a_database_that_is_opened_while_it_is_read(
    installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a daemon: what was read then may be torn, and is read again."""
    preview, opened = steps.preview_steps, list[int]()

    def interrupted(*arguments: Any) -> None:
        if not opened:
            opened.append(1)
            script = "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1]);"
            script += "connection.execute('UPDATE nodes SET name = 1'); connection.commit();"
            script += "connection.close()"
            subprocess.run([sys.executable, "-c", script, installation], check=True)
        preview(*arguments)

    monkeypatch.setattr(database, "preview_steps", interrupted)
    report = await report_on(installation)
    assert opened
    assert not report.worse, shown(report)


async def test_an_sqlite_with_the_wal_reset_bug(installation: Path) -> None:
    subjects = {each.subject for each in await report_on(installation)}
    assert ("sqlite" in subjects) is HAS_RESET_BUG


async def test_a_database_replaced_under_the_ingestor(installation: Path, tmp_path: Path) -> None:
    backup = make_database(tmp_path / "backup.db", [("nodes", "aa11", 0, None)])
    with in_use(installation) as process:
        os.replace(backup, installation)
        said = (await report_on(installation))("open by", "problem")
    assert str(process.pid) in said
    assert "restart that process" in said


@contextlib.contextmanager
def daemon(*arguments: object, inside: Sequence[str] = (), **variables: str) -> Iterator[int]:
    """Run a bridge until the end of the block."""
    command = [*inside, sys.executable, "-m", "mbcap_watch", "run", *map(str, arguments)]
    environ = {**os.environ, **variables}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stderr is not None
            process.stderr.readline()
            yield process.pid
        finally:
            process.terminate()


async def test_two_daemons(installation: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(installation)
    config = tmp_path / "config.toml"
    config.write_text(f'database = "{tmp_path}/link.db"')
    with daemon("--database", installation) as first, daemon(f"--database={tmp_path}/no.db"):
        report = await report_on(installation)
        assert f"pid {first} (user" in report("daemons", "ok")
        assert f"for {tmp_path}/no.db" in report("daemons", "ok")
        with daemon("--config", config) as second, daemon(DB_PATH=str(installation)) as third:
            said = (await report_on(installation))("daemons", "warning")
    assert said.startswith("3 bridges serve this database, and do the same work as many times: pid")
    assert all(str(pid) in said for pid in (first, second, third))
    assert "to save the work, leave one" in said


async def test_a_daemon_that_is_paused(installation: Path) -> None:
    with daemon("--database", installation) as pid:
        os.kill(pid, signal.SIGSTOP)
        try:
            said = (await report_on(installation))("daemons", "problem")
        finally:
            os.kill(pid, signal.SIGCONT)
    assert "is paused" in said
    assert f"kill -CONT {pid}" in said


async def test_a_daemon_that_was_killed(installation: Path) -> None:
    with daemon("--database", installation) as pid:
        await service(installation, "running, healthy", "ok")
        os.kill(pid, signal.SIGKILL)
    said = await service(installation, "is gone", "problem")
    assert "start it again" in said


async def service(database: Path, words: str, level: str, **settings: Any) -> str:
    """Check until the line about the service has these words."""
    deadline = time.monotonic() + 10
    while True:
        made = Settings.from_mapping({"database": database, **settings})
        report = await check.examine(made, os.environ)
        said = [each for each in report if each.subject == "service" and words in each.text]
        if said:
            assert said[0].severity == level
            return f"{said[0].text} -> {said[0].remedy}"
        assert time.monotonic() < deadline, shown(report)


async def test_what_only_the_daemon_knows(installation: Path) -> None:
    """Rows that a trigger refuses: nothing shows it until somebody writes."""
    with connect(installation) as connection:
        connection.execute("CREATE TRIGGER aa BEFORE UPDATE ON nodes BEGIN"
                           " SELECT RAISE(ABORT, 'no thanks'); END")  # fmt: skip
        connection.execute("CREATE TRIGGER bb AFTER INSERT ON nodes BEGIN"
                           " UPDATE nodes SET name = 1; END")  # fmt: skip
    with daemon("--database", installation):
        said = await service(installation, "no thanks", "problem")
        assert "sqlite3 -readonly" in said
        said = (await report_on(installation))("triggers", "warning")
        assert "the trigger aa runs at each update of nodes" in said
        assert """ "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'";""" in said
        assert "bb" not in said
        # With other settings there is none, but there is one that may be meant.
        elsewhere = installation.parent / "elsewhere"
        said = await service(
            installation, "another snapshot directory", "warning", snapshot_dir=elsewhere
        )
        assert str(snapshot_of(installation).parent) in said


# ------------------------------------------------------------------------------ another user


@pytest.fixture
def shared() -> Iterator[Path]:
    """An installation that another user can reach."""
    if not ROOT:
        pytest.skip("becoming another user takes root")
    with tempfile.TemporaryDirectory(prefix="mbcap-check-") as directory:
        os.chmod(directory, 0o755)
        database = make_database(Path(directory) / "m.db", [("nodes", "aa11", 0, None)])
        publish(database, ("aa11", "confirmed"))
        yield database


# Becomes the other user when all is loaded: the interpreter may be out of that user's reach.
CHECK = """if True:
    import anyio._backends._asyncio, encodings.ascii, json, msgspec, os, sys
    from mbcap_watch import Settings
    from mbcap_watch.doctor import check, findings
    findings.catalogue()
    uid = int(sys.argv[2])
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    found = anyio.run(check.examine, Settings(sys.argv[1]), os.environ)
    print(json.dumps(msgspec.to_builtins(found)))
"""


def check_as(database: Path, uid: int = 0, *, inside: Sequence[str] = ()) -> Report:
    """Check as another user, or inside of other namespaces."""
    command = [*inside, sys.executable, "-c", CHECK, str(database), str(uid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
    assert done.returncode == 0, done.stderr
    return Report(Finding(**finding) for finding in json.loads(done.stdout))


def test_what_belongs_to_somebody_else(shared: Path) -> None:
    os.chmod(shared, 0o666)
    said = check_as(shared, NOBODY)("permissions", "problem")
    assert f"user {NOBODY} may not create -wal and -shm in {shared.parent} (user 0" in said
    assert "as the database's owner, user 0" in said
    os.chmod(shared, 0o600)
    os.chmod(snapshot_of(shared), 0o600)
    report = check_as(shared, NOBODY)
    assert f"may not read {shared}" in report("permissions", "problem")
    assert f"chmod 644 {snapshot_of(shared)}" in report("snapshot", "problem")
    os.chmod(snapshot_of(shared).parent, 0o711)
    assert "may not list" in check_as(shared, NOBODY)("snapshot dir", "problem")
    os.chmod(shared.parent, 0o700)
    report = check_as(shared, NOBODY)
    assert f"may not enter {shared.parent}" in report("database", "problem")
    assert "Permission denied" in report("watch", "ok")  # not that it does not exist
    assert report.worse == {("database", "problem"), ("snapshot dir", "problem")}


def test_an_owner_who_may_not_write_the_directory(shared: Path) -> None:
    """To run as the owner is no remedy: that is what it does."""
    os.chown(shared, NOBODY, NOBODY)
    os.chmod(shared.parent, 0o755)
    said = check_as(shared, NOBODY)("permissions", "problem")
    assert f"-> as root: chown {NOBODY} {shared.parent}; " in said
    os.chown(shared.parent, NOBODY, NOBODY)
    os.chmod(shared.parent, 0o555)
    os.chmod(shared, 0o444)
    said = check_as(shared, NOBODY)("permissions", "problem")
    assert said.endswith(f"chmod u+rwX {shared} {shared.parent}")


def test_a_service_that_may_less_than_this_check(shared: Path) -> None:
    """From here all looks well."""
    runs = as_nobody()
    runtime = shared.parent / "runtime"
    runtime.mkdir()
    os.chown(runtime, NOBODY, NOBODY)
    script = f"export RUNTIME_DIRECTORY={runtime}"
    with daemon("--database", shared, inside=runs, RUNTIME_DIRECTORY=str(runtime)):
        deadline = time.monotonic() + 10
        report = check_with(shared, script)
        while ("service", "problem") not in report.worse:
            assert time.monotonic() < deadline, shown(report)
            report = check_with(shared, script)
    assert f"user {NOBODY} may not write {shared}" in report("service", "problem")
    assert {subject for subject, level in report.worse if level == "problem"} == {"service"}


@contextlib.contextmanager
def changed(apply: list[str], undo: list[str]) -> Iterator[None]:
    """Change how a file is protected, for the block."""
    if shutil.which(apply[0]) is None or subprocess.run(apply, check=False).returncode:
        pytest.skip(f"needs {apply[0]}(1), and a filesystem that knows it")
    try:
        yield
    finally:
        subprocess.run(undo, check=True)


def test_what_the_mode_would_allow(shared: Path) -> None:
    with changed(["chattr", "+i", str(shared)], ["chattr", "-i", str(shared)]):
        said = check_as(shared)("permissions", "problem")
    assert f"lsattr -d {shared}" in said
    assert "chmod" not in said
    snapshot = str(snapshot_of(shared))
    acl = ["setfacl", "-m", f"u:{NOBODY}:-", snapshot]
    with changed(acl, ["setfacl", "-b", snapshot]):
        said = check_as(shared, NOBODY)("snapshot", "problem")
    assert f"getfacl {snapshot}" in said
    assert "chmod" not in said


def test_files_that_lock_the_ingestor_out(shared: Path) -> None:
    os.chown(shared, 12345, 12345)
    with in_use(shared):
        os.chown(f"{shared}-shm", NOBODY, NOBODY)
        os.chmod(f"{shared}-shm", 0o644)
        report = check_as(shared)
    assert f"chown 12345:12345 {shared}-shm (never delete it)" in report("owner", "problem")


def test_two_files_are_one_problem(shared: Path) -> None:
    os.chown(shared, 12345, 12345)
    with in_use(shared):
        for side in ("-wal", "-shm"):
            os.chown(f"{shared}{side}", 0, 0)
            os.chmod(f"{shared}{side}", 0o600)
        report = check_as(shared)
        owner = [each for each in report if each.subject == "owner" and each.severity == "problem"]
        assert len(owner) == 1
        assert f"chown 12345:12345 {shared}-wal {shared}-shm (never" in owner[0].remedy
        report = check_as(shared, NOBODY)
    codes = [each.code for each in report if each.severity == "problem"]
    assert codes == ["not_permitted"], shown(report)
    assert "see permissions" not in shown(report)


def test_a_daemon_of_another_user(shared: Path) -> None:
    with daemon("--database", shared) as pid:
        said = check_as(shared, NOBODY)("daemons", "warning")
    assert f"pid {pid} (user 0" in said
    assert f"sudo -u '#0' mbcap-watch check --database {shared} --snapshot-dir " in said


# ------------------------------------------------------------------------------ filesystems


def check_with(database: Path, script: str, *options: str) -> Report:
    return check_as(database, inside=unshared(script, *options))


def test_a_full_disk(installation: Path) -> None:
    near = installation.parent / "near"
    near.mkdir()
    script = f"mount -t tmpfs -o size=1m none {near}; cp {installation} {near}/m.db"
    script += f"; head -c 2m /dev/zero > {near}/fill 2>/dev/null || true"
    report = check_with(near / "m.db", script)
    assert "the disk is full" in report("disk space", "problem")
    assert f"df -h {near}" in report("disk space", "problem")


def test_a_full_disk_of_the_snapshot(installation: Path) -> None:
    """The publisher cannot fill its temporary file."""
    near = snapshot_of(installation).parent
    script = f"cp -r {near} {near}2; mount -t tmpfs -o size=1m none {near}; cp {near}2/* {near}"
    script += f"; head -c 2m /dev/zero > {near}/fill 2>/dev/null || true"
    report = check_with(installation, script)
    assert f"df -h {near}" in report("snapshot disk", "problem")
    report("disk space", "ok")


def test_a_disk_without_inodes(installation: Path) -> None:
    near = installation.parent / "near"
    near.mkdir()
    script = f"mount -t tmpfs -o nr_inodes=6 none {near}; cp {installation} {near}/m.db"
    script += f"; touch {near}/1 {near}/2 {near}/3 {near}/4 {near}/5 2>/dev/null || true"
    said = check_with(near / "m.db", script)("disk space", "problem")
    assert "no inode is left" in said
    assert f"df -i {near}" in said


def test_a_read_only_volume(installation: Path) -> None:
    path = installation.parent
    report = check_with(
        installation, f"mount --bind {path} {path}; mount -o remount,ro,bind {path}"
    )
    assert f"ReadWritePaths={path}" in report("permissions", "problem")


@pytest.mark.parametrize(
    "mounts, code",
    [
        ("mount --bind {0} {0}; mount -o remount,ro,bind {0}", "read_only"),
        ("mount -t tmpfs none {0}", "no_database"),
    ],
)
async def test_a_daemon_whose_unit_keeps_it_away(
    installation: Path, mounts: str, code: str
) -> None:
    """From here all looks well; the daemon itself knows better."""
    inside = unshared(mounts.format(installation.parent))
    with daemon("--database", installation, inside=inside):
        said = await service(installation, "running: ", "problem")
        report = await check.examine(Settings(installation), os.environ)
    assert [each.code for each in report if each.severity == "problem"] == [code], said


def test_a_volume_that_is_a_single_file(installation: Path) -> None:
    report = check_with(installation, f"mount --bind {installation} {installation}")
    assert "mounted as a single file" in report("filesystem", "problem")


def test_no_inotify_instance_left(installation: Path) -> None:
    script = "echo 0 > /proc/sys/user/max_inotify_instances"
    report = check_with(installation, script, "-U", "-r")
    said = report("watch", "warning")
    assert said.startswith("it polls: no inotify watch on")
    assert "sysctl -w fs.inotify.max_user_instances=" in said
    assert "user.max_inotify_instances" in said


async def test_fuse(installation: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    near.mkdir()
    with fuse("bindfs", installation.parent, near):
        report = await report_on(near / installation.name)
        assert "fuse" in report("filesystem", "warning")
        assert "inotify does not see every change" in report("watch", "ok")
        report = await report_on(
            installation, snapshot_dir=near / SNAPSHOT_DIR_NAME, mode="inotify"
        )
        assert "set mode to auto or poll" in report("watch", "problem")


@pytest.mark.usefixtures("no_leaks")
async def test_a_mount_that_does_not_answer(
    installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "DATA_SECONDS", 1.0)
    near = tmp_path / "near"
    near.mkdir()
    with fuse("bindfs", snapshot_of(installation).parent, near) as process:
        process.send_signal(signal.SIGSTOP)
        # If it hangs, this test shall fail and not hang.
        rescue = threading.Timer(8, process.send_signal, [signal.SIGCONT])
        rescue.start()
        started = time.monotonic()
        report = await report_on(installation, snapshot_dir=near)
        rescue.cancel()
        rescue.join()
        assert time.monotonic() - started < 6
    assert f"mounted on {near}) did not answer" in report("filesystem", "problem")
    report("tables", "ok")


async def test_a_mount_whose_server_has_died(installation: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    near.mkdir()
    with fuse("bindfs", snapshot_of(installation).parent, near) as process:
        process.kill()
        wait_until(lambda: not os.path.exists(near), "what the kernel has cached to go")
        report = await report_on(installation, snapshot_dir=near)
    said = report("snapshot dir", "problem")
    assert f"{near} cannot be reached: Transport endpoint is not connected" in said
    assert "umount" in said
    assert report.worse == {("snapshot dir", "problem")}
    assert "does not exist" not in report("watch", "ok")


def test_a_snapshot_that_is_mounted_alone(installation: Path) -> None:
    """What is renamed over it outside does not arrive inside."""
    path = snapshot_of(installation)
    report = check_with(installation, f"mount --bind {path} {path}")
    assert "mounted as a single file" in report("snapshot dir", "problem")


@pytest.mark.parametrize("gone", ["", SNAPSHOT_DIR_NAME])
def test_a_directory_that_was_deleted_behind_its_mount(tmp_path: Path, gone: str) -> None:
    """As in a container whose volume was made anew: it goes on showing what was there."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for directory in (outside, inside):
        (directory / SNAPSHOT_DIR_NAME).mkdir(parents=True)
        publish(make_database(directory / "m.db", [("nodes", "aa11", 0, None)]))
    script = f"mount --bind {outside / gone} {inside / gone}; rm -r {outside / gone}"
    report = check_with(inside / "m.db", script)
    said = report("snapshot dir" if gone else "database", "problem")
    assert f"{inside / gone} was deleted" in said
    assert "restart the container" in said


def test_a_snapshot_directory_that_is_set_to_the_file(installation: Path) -> None:
    path = snapshot_of(installation)
    _, told = call_json("check", "--database", installation, "--snapshot-dir", path)
    [said] = [each for each in told["findings"] if each["severity"] == "problem"]
    assert said["code"] == "snapshot_dir_is_file"
    assert said["remedy"].endswith(f": {path.parent}")
    assert "rm" not in said["remedy"]


def test_a_machine_without_proc(installation: Path) -> None:
    for used in (False, True):
        with in_use(installation) if used else contextlib.nullcontext():
            report = check_with(installation, "mount -t tmpfs none /proc")
        assert "/proc is not mounted" in report("check", "problem")
        assert report.worse == {("check", "problem")}, shown(report)
        assert "disk" not in report("check", "problem")


def test_no_descriptor_left(installation: Path) -> None:
    """One reason, and the right one."""
    report = check_as(installation, inside=["prlimit", "--nofile=20", "--"])
    assert [each.code for each in report] == ["limit"]
    assert "LimitNOFILE" in report[0].remedy


# ------------------------------------------------------------------------------ judgements

NOW = 1_800_000_000.0
HERE = Installation("/d/m.db", "/d/mbcap-snapshot")


@pytest.mark.parametrize(
    "written_at, placed_ago, level, words",
    [
        ("2027-01-15T07:59:00.123456789+00:00", 60, "ok", "written 1 min ago"),
        (None, 60, "ok", "no writtenAt"),
        ("0001-01-01T00:00:00Z", 60, "ok", "no writtenAt"),
        ("0001-01-01T00:00:00+14:00", 60, "warning", "written 739995 d 22 h ago"),
        ("0000-01-01T00:00:00Z", 60, "ok", "no writtenAt"),
        ("2027-01-15T07:00:00Z", 3600, "warning", "the publisher is stale"),
        (None, 3600, "warning", "the publisher is stale"),
        ("2027-01-15T07:00:00Z", 5, "warning", "old snapshot was put back"),
        ("2027-01-15T08:00:00Z", 3600, "warning", "timedatectl"),
        ("2027-01-15T08:00:00Z", -600, "warning", "put in place 10 min in the future"),
        ("2027-01-15T08:00:30Z", -30, "ok", "put in place"),
    ],
)
def test_ages(written_at: str | None, placed_ago: float, level: str, words: str) -> None:
    finding = snapshot.judge_stamp(HERE, written_at, placed_ago, NOW)
    assert finding.severity == level
    assert words in finding.text + finding.remedy


@pytest.mark.parametrize(
    "mount, codes",
    [
        (Mount("nfs4", "/mnt", ("rw", "nocto", "vers=4.2")), ["nocto"]),
        (Mount("nfs4", "/mnt", ("rw", "vers=4.2", "acregmax=60")), []),
        (Mount("nfs4", "/mnt", ("acregmax=60", "acdirmax=600")), ["attribute_cache"]),
        (Mount("nfs4", "/mnt", ("acregmin=600", "acregmax=600", "acdirmax=60")), []),
        (Mount("nfs4", "/mnt", ("nocto", "actimeo=3600")), ["nocto", "attribute_cache"]),
        (Mount("ext4", "/", ("nocto", "actimeo=3600")), []),
    ],
)
def test_mount_options(mount: Mount, codes: list[str]) -> None:
    assert [finding.code for finding in snapshot.judge_options(HERE, mount)] == codes


@pytest.mark.parametrize(
    "kind, level",
    [
        *(("ext4", "ok"), ("vfat", "ok"), ("nfs4", "problem"), ("cifs", "problem")),
        *(("fuse.sshfs", "problem"), ("fuse.shfs", "warning"), ("overlay", "ok")),
    ],
)
def test_filesystems(kind: str, level: str) -> None:
    [finding] = database.judge_filesystem(HERE, Mount(kind, "/", ()))
    assert finding.severity == level


@pytest.mark.parametrize(
    "uid, gid, mode, levels",
    [
        (1000, 1000, 0o644, []),
        (0, 0, 0o644, []),
        (33, 33, 0o644, ["warning"]),
        (33, 1000, 0o664, []),
        (33, 33, 0o664, ["warning"]),
        (33, 33, 0o666, []),
    ],
)
def test_whose_files_would_be_left(uid: int, gid: int, mode: int, levels: list[str]) -> None:
    status = os.stat_result((0o100000 | mode, 2, 3, 1, 1000, 1000, 1, 0, 0, 0))
    file = machine.Place(Path("/d/m.db"), status)
    findings = list(database.judge_owner(HERE, file, machine.Place(Path("/d")), [], uid, gid))
    assert [finding.severity for finding in findings] == levels


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("/usr/bin/python3 /usr/bin/mbcap-watch run --json", True),
        ("python3 -m mbcap_watch run", True),
        ("mbcap-watch check", False),
        ("vim run mbcap-watch", False),
    ],
)
def test_what_a_daemon_looks_like(arguments: str, expected: bool) -> None:
    assert machine.is_daemon(arguments.split()) is expected


# ------------------------------------------------------------------------------ the report


async def test_an_examination_that_fails_is_a_problem(
    installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(check, "_examine_holders", fail)
    report = await report_on(installation)
    assert "ZeroDivisionError: of all things" in report("check", "problem")
    report("tables", "ok")


def test_rendering() -> None:
    findings = [
        ok("one", "fine"),
        Finding("x", "warning", "longer", "[red]so[/] é\x1b[31m\n", "mend it"),
        Finding("y", "problem", "two", "bad \udcff", f"do something {'that is long ' * 5}"),
    ]
    assert shown(findings).splitlines() == [
        "ok      one     fine",
        r"warning longer  [red]so[/] é\x1b[31m\n",
        "                -> mend it",
        r"problem two     bad \udcff",
        f"                -> do something {'that is long ' * 5}",
        "1 problem, 1 warning",
    ]
    assert shown(findings, "ascii").isascii()
    assert shown(findings[:1]).endswith("everything is in order\n")


def test_quantities() -> None:
    sizes = [size(count) for count in (0, 2048, 5 << 20, 3 << 30)]
    assert sizes == ["0 bytes", "2 KiB", "5 MiB", "3.0 GiB"]


def test_the_command(installation: Path) -> None:
    done = call("check", "--database", installation)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ok      database      {installation}, ")
    code, body = call_json("check", "--database", "/no/such.db")
    assert (code, body["ok"]) == (1, False)
    assert set(body["findings"][0]) == {"code", "severity", "subject", "text", "remedy"}


def test_remedies_repeat_the_settings_that_were_given(shared: Path) -> None:
    config = shared.parent / "my settings.toml"
    config.write_text(f'database = "{shared}"')
    with daemon("--config", config, "--database", shared) as pid:
        other = as_nobody()
        _, said = call_json("check", "--config", config, prefix=other)
        told = {each["code"]: each["remedy"] for each in said["findings"]}
        assert told["other_user"].endswith(f" --config '{config}'")
        _, said = call_json("status", "--config", config, prefix=other)
        [told] = said["problems"]
        assert told["code"] == "not_asked"
        assert f" --snapshot-dir {snapshot_of(shared).parent}" in told["remedy"]
        assert told["remedy"].endswith(f" --config '{config}'")
        os.kill(pid, signal.SIGSTOP)
        _, said = call_json("check", "--config", config)
        os.kill(pid, signal.SIGCONT)
    problems = [each for each in said["findings"] if each["severity"] == "problem"]
    assert [each["code"] for each in problems] == ["paused"]  # once
