"""`make install` and `make uninstall`: in a directory, and with a systemd that is booted for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mbcap_watch import snapshot_path
from mbcap_watch.watcher.mounts import mount_table
from support import DEADLINE, TESTS, document, make_database, put, read_rows, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = TESTS.parent
SYSTEM_PYTHON = "/usr/bin/python3"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the checkout"),
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]


def checked(done: subprocess.CompletedProcess[str]) -> str:
    """Return all that was printed; skip where there is no package index."""
    text = done.stdout + done.stderr
    if done.returncode and re.search("connection|resolution|No matching distribution", text):
        pytest.skip(f"no package index within reach: {text[-300:]}")
    assert done.returncode == 0, text
    return text


def make(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments, f"SYSTEM_PYTHON={python}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


# ------------------------------------------------------------------------------ in a directory


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """What the first `make install` put below DESTDIR, its arguments, and what it said."""
    root = tmp_path_factory.mktemp("root")
    database = make_database(tmp_path_factory.mktemp("my data") / "meshcore.db")
    arguments = [f"DESTDIR={root}", "PREFIX=/opt/own", f"DATABASE={database}"]
    return root, arguments, checked(make("install", *arguments))


def test_it_installs_what_the_service_needs(installed: tuple[Path, list[str], str]) -> None:
    root, (_, _, database), _ = installed
    database = database.removeprefix("DATABASE=")
    assert os.readlink(root / "usr/local/bin/mbcap-watch") == "/opt/own/bin/mbcap-watch"
    program = root / "opt/own/bin/mbcap-watch"
    assert "#!/opt/own/bin/python" in program.read_text()
    assert os.access(program, os.X_OK)
    done = subprocess.run(
        [root / "opt/own/bin/python", "-m", "mbcap_watch", "--version"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"\d+\.\d+", done.stdout)
    for name in ("mbcap-watch.service", "mbcap-watch@.service"):
        text = (root / "etc/systemd/system" / name).read_text()
        assert "\nExecStart=/opt/own/bin/mbcap-watch run" in text
    assert f'\ndatabase = "{database}"\n' in (root / "etc/mbcap-watch/mbcap-watch.toml").read_text()
    choice = (root / "etc/systemd/system/mbcap-watch.service.d/10-install.conf").read_text()
    assert f"User={Path(database).owner()}\n" in choice
    assert f'ReadWritePaths="{Path(database).parent}"\n' in choice


def test_an_upgrade_keeps_the_choices_and_uninstalling_keeps_the_configuration(
    installed: tuple[Path, list[str], str],
) -> None:
    root, (destdir, prefix, _), _ = installed
    toml = root / "etc/mbcap-watch/mbcap-watch.toml"
    choice = root / "etc/systemd/system/mbcap-watch.service.d/10-install.conf"
    toml.write_text('database = "/elsewhere.db"\n')
    before = choice.read_text()
    checked(make("install", destdir, prefix))
    assert (toml.read_text(), choice.read_text()) == ('database = "/elsewhere.db"\n', before)

    checked(make("install", destdir, prefix, "OWNER=somebody", "DATA=/home/pi"))
    lines = ["User=somebody", "Group=", "ReadWritePaths=", 'ReadWritePaths="/home/pi"']
    assert choice.read_text().splitlines() == ["[Service]", *lines, "ProtectHome=no"]

    (root / "etc/systemd/system/mbcap-watch.service.d/override.conf").write_text("[Service]\n")
    checked(make("uninstall", destdir, prefix))
    assert files(root) == [
        "etc/mbcap-watch/mbcap-watch.toml",
        "etc/systemd/system/mbcap-watch.service.d/override.conf",
    ]
    checked(make("uninstall", destdir, prefix))  # once more is no error


def test_without_a_database_it_says_what_is_missing(tmp_path: Path) -> None:
    text = checked(make("install", f"DESTDIR={tmp_path}"))
    assert f"Set database in {tmp_path}/etc/mbcap-watch/mbcap-watch.toml." in text
    assert not list(tmp_path.rglob("10-install.conf"))


def test_a_directory_that_is_no_venv_is_neither_used_nor_removed(tmp_path: Path) -> None:
    there = tmp_path / "usr/bin/mbcap-watch"
    there.parent.mkdir(parents=True)
    there.write_text("")
    for command in ("install", "uninstall"):
        done = make(command, f"DESTDIR={tmp_path}", "PREFIX=/usr")
        assert done.returncode
        assert f"{tmp_path}/usr" in done.stdout
        assert there.exists()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["DATABASE=data/meshcore.db"], "DATABASE= must be an absolute path"),
        (["DATABASE=/nowhere/meshcore.db"], "/nowhere/meshcore.db is not there: set OWNER="),
    ],
)
def test_what_it_is_told_must_make_sense(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    done = make("install", f"DESTDIR={tmp_path}", *arguments)
    assert done.returncode
    assert complaint in done.stdout
    assert files(tmp_path) == []


def test_a_python_that_will_not_do_is_named(tmp_path: Path) -> None:
    done = make("install", f"DESTDIR={tmp_path}", python=f"{tmp_path}/python3")
    assert f"{tmp_path}/python3 is missing or older than Python 3.11" in done.stdout
    # As Debian's python3 without python3-venv.
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError\n")
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    done = make("install", f"DESTDIR={tmp_path}/root", python=str(bare))
    assert done.returncode
    assert f"{bare} cannot make a venv: apt install python3-venv" in done.stdout
    assert not (tmp_path / "root").exists()


# ------------------------------------------------------------------------------ with systemd

# A copy of this machine that forgets what is written, with a systemd of its own. Without the right
# to write to /proc/sys: systemd would set what holds for the machine (net.unix.max_dgram_qlen).
BOOT = """
    set -eu; mount -t tmpfs tmpfs "$1"; cd "$1"; mkdir upper work root
    mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root; cd root
    mkdir -p srv checkout old
    mount --bind "$2" srv
    mount --bind "$3" checkout
    mount -t proc proc proc
    mount --bind proc/sys proc/sys
    mount -o remount,bind,ro proc/sys
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs tmpfs run
    mount -t tmpfs tmpfs tmp
    mount --rbind /dev dev
    rm -rf etc/systemd/system/*.wants
    pivot_root . old; umount -l old
    exec env -i container=test PATH="$PATH" "$4" --unit=basic.target --log-target=null
"""
SYSTEMD = "/usr/lib/systemd/systemd"
JOURNAL = "journalctl -o cat _SYSTEMD_UNIT=mbcap-watch.service"


class Machine:
    """What was booted. `data` is its /srv."""

    def __init__(self, init: int, data: Path) -> None:
        self._init = str(init)
        self.data = data

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", self._init, "-m", "-p", "-i", "-u", "-C", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def shell(self, script: str) -> str:
        return checked(self.run("sh", "-ec", script))

    def shown(self, name: str) -> str:
        return self.shell(f"systemctl show --value -p {name} mbcap-watch").strip()

    def drop_in(self, text: str) -> None:
        """Do what `systemctl edit` does."""
        directory = "/etc/systemd/system/mbcap-watch.service.d"
        self.shell(f"printf %s '{text}' >{directory}/override.conf; systemctl daemon-reload")


def cgroups() -> set[Path]:
    """Return the control groups below that of this process."""
    (own,) = re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE) or [""]
    mounts = [Path(each.mount_point) for each in mount_table() if each.type == "cgroup2"]
    return {path for mount in mounts for path in (mount / own).rglob("*") if path.is_dir()}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    tools = ("unshare", "nsenter", "pivot_root", "useradd")
    if os.geteuid() or not os.path.exists(SYSTEMD) or not all(map(shutil.which, tools)):
        pytest.skip("needs root, systemd, util-linux and useradd")
    fit = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([SYSTEM_PYTHON, "-c", fit], check=False, capture_output=True).returncode:
        pytest.skip(f"{SYSTEM_PYTHON} is too old, or lacks venv")
    top, data = tmp_path / "top", tmp_path / "data"
    top.mkdir()
    data.mkdir()
    before = cgroups()
    spaces = ["--fork", "--pid", "--mount", "--uts", "--ipc", "--cgroup"]
    places = [str(top), str(data), str(ROOT), SYSTEMD]
    command = ["unshare", *spaces, "sh", "-c", BOOT, "boot", *places]
    with open(tmp_path / "log", "wb") as log:
        unshare = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")

    def up() -> bool:
        if unshare.poll() is not None:
            pytest.skip(f"systemd does not boot: {(tmp_path / 'log').read_text()}")
        state = Machine(int(children.read_text() or 0), data).run("systemctl", "is-system-running")
        return state.stdout.strip() in ("running", "degraded")

    try:
        try:
            wait_until(up, "systemd")
        except AssertionError as exc:
            pytest.skip(f"systemd does not boot here: {exc}")
        yield Machine(int(children.read_text()), data)
    finally:
        with contextlib.suppress(FileNotFoundError, ValueError):
            os.kill(int(children.read_text()), 9)
        unshare.wait(DEADLINE)
        for group in sorted(cgroups() - before, reverse=True):  # the innermost first
            with contextlib.suppress(OSError):
                group.rmdir()


def test_with_a_real_systemd(machine: Machine) -> None:
    """From `make install` to a written row, the ways in which a start fails, and back."""
    database = make_database(machine.data / "meshcore.db", [("nodes", "aa11", 0, None)])
    put(document(("aa11", "confirmed", "advert")), snapshot_path(database))
    machine.shell("useradd --system corescope; chown -R corescope /srv")

    machine.shell("make -C /checkout install DATABASE=/srv/meshcore.db")
    machine.shell("systemctl enable --now mbcap-watch")
    wait_until(lambda: ("nodes", "aa11", 2, "advert") in read_rows(database), "the row")
    toml = "/etc/mbcap-watch/mbcap-watch.toml"
    assert "aa11" not in machine.shell(f"mbcap-watch status --config {toml}")
    assert machine.shown("User") == "corescope"

    # The port, as the unit describes it.
    unit = (ROOT / "config/mbcap-watch.service").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    machine.shell("/opt/mbcap-watch/bin/pip install -q '/checkout[metrics]'")
    machine.shell(f"""echo 'http = "{address}"' >>{toml}""")
    machine.drop_in("\n".join(re.findall(r"^#   (\[Service\]|\w+=.*)$", unit, re.MULTILINE)))
    machine.shell("systemctl restart mbcap-watch")
    ask = f'import urllib.request as u; print(u.urlopen("http://{address}/metrics").read())'
    assert "mbcap" in machine.shell(f"{SYSTEM_PYTHON} -c '{ask}'")
    machine.shell(f"sed -i /^http/d {toml}")
    machine.drop_in("")

    # A database that was forgotten is one line, and no path in /.
    machine.shell(f"sed -i 's/^database/#&/' {toml}")
    assert machine.run("systemctl", "restart", "mbcap-watch").returncode
    wait_until(lambda: machine.shown("ActiveState") == "failed")
    assert (machine.shown("ExecMainStatus"), machine.shown("NRestarts")) == ("2", "0")
    wait_until(lambda: f"database: is not set; set it in {toml}\n" in machine.shell(JOURNAL))
    machine.drop_in("[Service]\nEnvironment=DB_PATH=/srv/meshcore.db\n")
    machine.shell("systemctl restart mbcap-watch")

    # The numbers that the unit explains.
    for wrong, number in (("User=nobody-here", "217"), ("ReadWritePaths=/nowhere", "226")):
        machine.drop_in(f"[Service]\n{wrong}\n")
        assert machine.run("systemctl", "restart", "mbcap-watch").returncode
        assert machine.shown("ExecMainStatus") == number
        assert f"#   {number}/" in unit

    machine.shell("rm /etc/systemd/system/mbcap-watch.service.d/override.conf")
    machine.shell("make -C /checkout uninstall")
    assert machine.shown("LoadState") == "not-found"
    left = "ls -d /opt/mbcap-watch /usr/local/bin/mbcap-watch /etc/systemd/system/*mbcap* || true"
    assert "\n/" not in "\n" + machine.shell(left)
    assert "mbcap-watch.toml" in machine.shell("ls /etc/mbcap-watch")
    assert "mbcap-watch" not in machine.shell("ls /etc/systemd/system/*.wants || true")
