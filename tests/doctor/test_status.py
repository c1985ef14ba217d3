"""`run` and `status` as processes of their own, as an operator meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from fuse import fuse
from machine import NOBODY, as_nobody, as_root, unshared
from mbcap_watch import Settings, snapshot_path
from mbcap_watch.telemetry.ask import digest_of
from mbcap_watch.telemetry.metrics import Metrics
from processes import MBCAP_WATCH, call, call_json, daemon, running, start_daemon
from support import DEADLINE, document, locked, make_database, offered, planted, put, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def status(
    database: Path, *arguments: str, prefix: Sequence[str] = (), code: str = "", **variables: str
) -> tuple[int, dict[str, Any]]:
    options = {"prefix": prefix, "code": code, "env": variables}
    return call_json("status", "--database", database, *arguments, **options)


def codes(told: dict[str, Any]) -> list[str]:
    """Return what is told; but not that other daemons run, which is so beside other tests."""
    found = [each["code"] for each in told["problems"] + told["warnings"]]
    return [code for code in found if code != "other_settings"]


def is_running(database: Path, *arguments: str, **variables: str) -> bool:
    return bool(status(database, *arguments, **variables)[1]["state"] == "running")


def test_from_the_start_to_the_end(database: Path) -> None:
    assert status(database)[0] == 1
    written_at = "2026-07-18T08:47:37Z"
    put(document(("aa11", "confirmed"), written_at=written_at), snapshot_path(database))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with daemon(database, "--http", address) as process:
        wait_until(lambda: is_running(database))
        code, told = status(database, "--max-age", "15m")
        assert (code, told["problems"]) == (0, [])
        assert (told["stats"]["pid"], told["stats"]["uid"]) == (process.popen.pid, os.geteuid())
        assert told["stats"]["outcomes"]["applied"] == told["stats"]["changed_active"] == 1
        assert told["stats"]["mbcap_persist"]["count"] == told["stats"]["lag_ms"]["count"] == 1
        assert told["stats"]["snapshot_written_at"] == written_at
        assert status(database, "--max-age", "100ms")[0] == 1
        with urllib.request.urlopen(f"http://{address}/healthz") as answer:
            assert json.load(answer)["stats"]["pid"] == process.popen.pid
        assert process.end(signal.SIGTERM) == 0
    code, told = status(database)
    assert (code, told["state"], told["stats"]) == (1, "not running", None)
    assert codes(told) == ["not_running"]


def test_remedies_over_http_name_the_file_of_settings(database: Path, tmp_path: Path) -> None:
    config = tmp_path / "my settings.toml"
    config.write_text("busy_deadline = '0s'\nsweep_interval = '100ms'\n")
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    remedies: list[str] = []

    def is_told() -> bool:
        try:
            urllib.request.urlopen(f"http://{address}/healthz").close()
        except urllib.error.HTTPError as told:
            problems = json.load(told)["problems"]
            remedies.extend(each["remedy"] for each in problems if each["code"] == "busy")
        except OSError:
            pass  # it does not listen yet
        return bool(remedies)

    with locked(database), daemon(database, "--config", str(config), "--http", address):
        wait_until(is_told)
    assert f" --config '{config}'`" in remedies[0]


def test_killed_and_started_again(database: Path) -> None:
    with daemon(database) as process:
        wait_until(lambda: is_running(database))
        process.end(signal.SIGKILL)
        code, told = status(database)
        assert (code, told["state"], codes(told)) == (1, "not running", ["gone"])
        assert f"process {process.popen.pid} is gone" in told["problems"][0]["text"]
    with daemon(database) as process:
        wait_until(lambda: is_running(database))
        assert status(database)[1]["stats"]["pid"] == process.popen.pid
        process.end(signal.SIGTERM)
    assert codes(status(database)[1]) == ["not_running"]  # nothing is left of the killed one


def test_paused_and_let_go_on(database: Path) -> None:
    with daemon(database) as process:
        wait_until(lambda: is_running(database))
        process.popen.send_signal(signal.SIGSTOP)
        code, told = status(database)
        assert (code, told["state"], codes(told)) == (1, "paused", ["paused"])
        assert f"kill -CONT {process.popen.pid}" in told["problems"][0]["remedy"]
        process.popen.send_signal(signal.SIGCONT)
        assert status(database)[1]["state"] == "running"


def test_before_its_first_sync_it_is_starting(database: Path) -> None:
    """Another connection keeps the first sync waiting for the lock: exit 1 until it has ended."""
    settings = Settings(database)
    metrics = Metrics(settings, version="1", pid=1)
    environ = {"RUNTIME_DIRECTORY": os.environ["RUNTIME_DIRECTORY"]}
    with offered(settings, environ, lambda: metrics.snapshot(time.time())):
        code, told = status(database)
    assert (code, told["state"], codes(told)) == (1, "starting", ["starting"])


def test_the_database_goes_and_comes_back(database: Path) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with daemon(database, "--sweep-interval", "200ms") as process:
        wait_until(lambda: status(database)[0] == 0)
        aside = database.with_name("aside.db")
        database.rename(aside)
        code, told = status(database)  # at once, and not with the next sync
        assert (code, told["state"], codes(told)[0]) == (1, "running", "database_missing")
        aside.rename(database)
        wait_until(lambda: status(database)[0] == 0)
        assert not process.ended


def test_other_settings_are_named(database: Path, tmp_path: Path) -> None:
    with daemon(database, "--snapshot-dir", str(tmp_path / "other")) as process:
        wait_until(lambda: is_running(database, "--snapshot-dir", str(tmp_path / "other")))
        code, told = status(database)
        assert (code, told["state"]) == (1, "not running")
        assert codes(told) == ["not_running", "other_snapshot_dir"]
        assert str(process.popen.pid) in told["warnings"][0]["text"]
        elsewhere = make_database(tmp_path / "elsewhere.db")
        told = status(elsewhere)[1]
        assert codes(told) == ["not_running"]
        [other] = [w for w in told["warnings"] if f"process {process.popen.pid} " in w["text"]]
        assert other["code"] == "other_settings"


def test_a_link_to_the_database_is_seen_through(database: Path) -> None:
    """The daemon with another path is found, and the work that is done twice is told."""
    link = database.parent.with_name("link")
    link.symlink_to(database.parent)
    linked = link / database.name
    with daemon(database) as first:
        wait_until(lambda: is_running(linked))
        with daemon(linked) as second:
            wait_until(lambda: "several_bridges" in codes(status(database)[1]))
            second.popen.send_signal(signal.SIGSTOP)
            code, told = status(linked)
            second.popen.send_signal(signal.SIGCONT)
    assert (code, told["stats"]["pid"]) == (0, first.popen.pid)
    assert named(told, first.popen.pid).endswith(": running, healthy")
    assert named(told, second.popen.pid) == f"pid {second.popen.pid} (user {os.geteuid()}): paused"


def named(told: dict[str, Any], pid: int) -> str:
    """Return what is said of one of several bridges."""
    [text] = [each["text"] for each in told["warnings"] if each["code"] == "several_bridges"]
    [who] = [each for each in text.partition(": ")[2].split("; ") if f"pid {pid} " in each]
    return str(who)


@pytest.mark.system
def test_a_mount_that_does_not_answer_does_not_keep_status(database: Path, tmp_path: Path) -> None:
    """Who waits for a lookup of another process cannot be killed, and its command does not end."""
    far, near = tmp_path / "far", tmp_path / "near"
    (far / "inner").mkdir(parents=True)
    near.mkdir()
    inner = ["--snapshot-dir", str(near / "inner")]
    with fuse("bindfs", far, near, "-o", "attr_timeout=600") as server:
        os.stat(near)
        server.send_signal(signal.SIGSTOP)
        # If it is kept, this test shall fail and not hang.
        rescue = threading.Timer(DEADLINE, server.send_signal, [signal.SIGCONT])
        rescue.start()
        with running(start_daemon(database, *inner)) as process:
            wait_until(lambda: "does not answer" in process.said)
            told = status(database, *inner)[1]
            assert rescue.is_alive()
            rescue.cancel()
            server.send_signal(signal.SIGCONT)
    assert told["state"] == "stuck"


# ------------------------------------------------------------------------------ no socket


def test_the_number_of_a_process_in_another_container_is_not_taken_for_one_of_ours(
    database: Path,
) -> None:
    beside = [*unshared("true"), "unshare", "--pid", "--fork", "--mount-proc"]
    with daemon(database) as process:
        wait_until(lambda: is_running(database))
        code, told = status(database, prefix=beside)
        assert (code, told["stats"]["pid"]) == (0, process.popen.pid)
        process.popen.send_signal(signal.SIGSTOP)
        code, told = status(database, prefix=beside)
        assert (code, codes(told)) == (1, ["blocked"])
        assert told["problems"][0]["text"].startswith("a process in another container (user 0) ")
        process.popen.send_signal(signal.SIGCONT)


NOWHERE = {"RUNTIME_DIRECTORY": "", "XDG_RUNTIME_DIR": ""}


def test_dev_shm_that_is_read_only_is_no_obstacle(database: Path) -> None:
    prefix = unshared("mount -t tmpfs -o ro none /dev/shm; mount -t tmpfs none /run")
    with daemon(database, prefix=prefix, **NOWHERE) as process:
        inside = ["nsenter", "--mount", f"--target={process.popen.pid}"]
        code, told = status(database, prefix=inside, **NOWHERE)
        assert (code, told["state"], told["stats"]["pid"]) == (0, "running", process.popen.pid)


def test_where_no_socket_can_be_made_it_is_found_in_proc(database: Path) -> None:
    where = database.parent
    prefix = unshared(
        "mount -t tmpfs -o ro none /dev/shm; mount -t tmpfs -o ro none /run;"
        f"mount --bind {where} {where}; mount --rbind /tmp /tmp; mount -o remount,bind,ro /tmp"
    )
    with daemon(database, prefix=prefix, **NOWHERE) as process:
        inside = ["nsenter", "--mount", f"--target={process.popen.pid}"]
        wait_until(lambda: "no control socket can be made" in process.said)
        assert "/dev/shm/mbcap-watch-" in process.said
        code, told = status(database, prefix=inside, **NOWHERE)
        assert (code, told["state"]) == (1, "starting")  # it is young: this may yet come

        of_age = "import mbcap_watch.doctor.service as s; s._YOUNG_SECONDS = 0"
        for prefix in (inside, []):  # from outside its container, likewise
            code, told = status(database, prefix=prefix, code=of_age, **NOWHERE)
            assert (code, told["state"], codes(told)) == (0, "running", ["unasked"])
            assert str(process.popen.pid) in told["warnings"][0]["text"]
        done = call("status", "--database", database, env=NOWHERE, code=of_age)
        assert done.stdout.startswith("running, but cannot be asked: process ")
        assert "healthy" not in done.stdout

        process.popen.send_signal(signal.SIGSTOP)
        code, told = status(database, prefix=inside, **NOWHERE)
        assert (code, told["state"]) == (1, "paused")


def test_a_snapshot_that_is_mounted_alone(database: Path) -> None:
    """It works on, but what is renamed over the file outside never arrives."""
    path = snapshot_path(database)
    put(document(("aa11", "confirmed")), path)
    with daemon(database, prefix=unshared(f"mount --bind {path} {path}")) as process:
        inside = ["nsenter", "--mount", f"--target={process.popen.pid}"]
        wait_until(lambda: "single_snapshot" in codes(status(database, prefix=inside)[1]))
        code, told = status(database, prefix=inside)
        assert (code, told["state"], codes(told)) == (1, "running", ["single_snapshot"])


def test_a_directory_that_was_deleted_behind_its_mount(database: Path) -> None:
    directory, outside = snapshot_path(database).parent, database.with_name("outside")
    script = f"mkdir {outside}; mount --bind {outside} {directory}; rmdir {outside}"
    with daemon(database, prefix=unshared(script)) as process:
        inside = ["nsenter", "--mount", f"--target={process.popen.pid}"]
        wait_until(lambda: "deleted_mount" in codes(status(database, prefix=inside)[1]))


def test_a_data_directory_that_was_deleted_behind_its_mount(database: Path) -> None:
    """Of all that is gone with it, only the reason is named."""
    directory, outside = database.parent, database.parent.with_name("outside")
    shutil.copytree(directory, outside)
    put(document(("aa11", "confirmed")), outside / "mbcap-snapshot" / "snapshot.json")
    options = ("--sweep-interval=100ms",)
    with daemon(database, *options, prefix=unshared(f"mount --bind {outside} {directory}")) as one:
        inside = ["nsenter", "--mount", f"--target={one.popen.pid}"]
        wait_until(lambda: status(database, prefix=inside)[0] == 0)
        shutil.rmtree(outside)
        wait_until(lambda: codes(status(database, prefix=inside)[1]) == ["deleted_mount"])


# ------------------------------------------------------------------------------ another user


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in which anybody can put a socket that root finds."""
    path = Path(f"/dev/shm/mbcap-watch-{NOBODY}")
    if path.exists():
        pytest.skip(f"there is {path}")
    yield path
    shutil.rmtree(path)


@as_root
def test_what_another_user_plants_is_told_and_never_believed(database: Path, place: Path) -> None:
    settings = Settings(database)
    name = f"{digest_of(settings)}-1-00000000.sock"
    lie = Metrics(settings, version="1", pid=1)
    lie.on_state(msgspec.convert({"last_sync": time.time()}, type(lie.snapshot(0.0).watch)))
    with planted(place / name, msgspec.json.encode(lie.snapshot(time.time()))) as pid:
        code, told = status(database)
        assert (code, told["state"], told["stats"]) == (1, "unknown", None)
        text = told["problems"][0]["text"]
        assert f"process {pid} is of user {NOBODY}, and says: running, healthy" in text
        assert f"sudo -u '#{NOBODY}'" in told["problems"][0]["remedy"]
        with daemon(database) as process:  # and hides no other
            wait_until(lambda: status(database)[0] == 0)
            assert status(database)[1]["stats"]["pid"] == process.popen.pid


@as_root
def test_one_that_another_user_leaves_silent_or_dead_is_not_ours(
    database: Path, place: Path
) -> None:
    name = f"{digest_of(Settings(database))}-1-00000000.sock"
    with planted(place / name, b""):
        assert status(database)[1]["state"] == "unknown"
    assert codes(status(database)[1]) == ["not_running"]


@as_root
def test_root_believes_the_owner_of_the_database(database: Path, tmp_path: Path) -> None:
    runs = as_nobody()
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    for path in (runtime, database, snapshot_path(database).parent, database.parent):
        os.chown(path, NOBODY, NOBODY)
    for parent in database.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    variables = {"RUNTIME_DIRECTORY": str(runtime)}
    with daemon(database, prefix=runs, **variables):
        wait_until(lambda: is_running(database, **variables))
        code, told = status(database, **variables)
        assert (code, told["stats"]["uid"]) == (0, NOBODY)
        os.chown(database, 0, 0)
        code, told = status(database, **variables)
        assert (code, told["state"], codes(told)) == (1, "unknown", ["not_trusted"])


@as_root
def test_another_user_is_told_to_ask_as_root(database: Path) -> None:
    runs = as_nobody()
    with daemon(database) as process:
        wait_until(lambda: is_running(database))
        code, told = status(database, prefix=runs)
        assert (code, told["state"], codes(told)) == (1, "unknown", ["not_asked"])
        text = told["problems"][0]["text"]
        assert (
            text == f"process {process.popen.pid} is of user 0, and does not answer user {NOBODY}"
        )
        assert "as root (sudo)" in told["problems"][0]["remedy"]


@as_root
def test_processes_that_proc_hides_may_run(database: Path) -> None:
    inside = unshared("mount -t proc -o hidepid=invisible proc /proc")
    with daemon(database, prefix=inside):
        code, told = status(database, prefix=[*inside, *as_nobody()])
    assert (code, told["state"], codes(told)) == (1, "unknown", ["hidden"])


@as_root
def test_another_users_daemon_may_be_the_one(database: Path) -> None:
    """Its environment names its database, and that is closed to others."""
    runs = as_nobody()
    command, environ = [*MBCAP_WATCH, "run"], os.environ | NOWHERE | {"DB_PATH": str(database)}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environ) as process:
        wait_until(lambda: is_running(database, **NOWHERE))
        Path("/dev/shm/mbcap-watch-0").chmod(0o700)
        code, told = status(database, prefix=runs, **NOWHERE)
        process.kill()
    assert (code, told["state"], codes(told)) == (1, "unknown", ["not_asked"])
    assert "can tell which database" in told["problems"][0]["text"]


# ------------------------------------------------------------------------------ for people


def test_an_answer_that_was_not_due_yet_is_no_answer_that_works(database: Path) -> None:
    snapshot_path(database).parent.rmdir()
    with daemon(database, "--ack"):
        wait_until(lambda: is_running(database))
        done = call("status", "--database", database)
    assert re.search(r"\nack +not used yet *\n", done.stdout)


def test_a_terminal_that_knows_no_unicode(database: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = call("status", "--database", database.with_name("größe.db"), env=ascii_only)
    assert (done.returncode, done.stderr) == (1, "")
    assert "x no mbcap-watch runs with" in done.stdout
    assert "  -> start it" in done.stdout
    assert "gr\\xf6\\xdfe.db" in done.stdout
