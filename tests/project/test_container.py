"""The container files, where no image can be built: their rules, and the steps in a venv."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from mbcap_watch import snapshot_path
from mbcap_watch.cli import signals
from support import TESTS, document, make_database, put, read_rows, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.system

ROOT = TESTS.parent
KNOWN = frozenset(
    {
        *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV"),
        *("FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"),
    }
)


class Instruction(NamedTuple):
    name: str
    arguments: str


def instructions() -> list[Instruction]:
    text = (ROOT / "config" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", "", text).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line and line[0] != "#"]


def stages() -> list[list[Instruction]]:
    found: list[list[Instruction]] = [[]]
    for instruction in instructions():
        if instruction.name == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found[1:]


def last(name: str) -> str:
    """Return the arguments of the only `name` in the final stage."""
    (arguments,) = (found.arguments for found in stages()[-1] if found.name == name)
    return arguments


def test_the_final_image_has_no_build_tools_and_is_not_root() -> None:
    assert {found.name for found in instructions()} == KNOWN
    _, final = stages()
    assert "RUN" not in {found.name for found in final}
    assert last("COPY") == "--from=build /opt/mbcap-watch /opt/mbcap-watch"
    assert last("USER") == "${UID}:${GID}"
    defaults = dict(found.arguments.split("=") for found in final if found.name == "ARG")
    assert defaults.keys() == {"UID", "GID"}
    assert all(int(value) > 0 for value in defaults.values())


def test_signals_and_the_question_for_its_health_reach_the_program() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["mbcap-watch"]  # exec form: no shell in between
    assert json.loads(last("CMD")) == ["run"]
    assert json.loads(last("HEALTHCHECK").partition(" CMD ")[2]) == ["mbcap-watch", "status"]


def copied() -> list[str]:
    return [
        source
        for found in stages()[0]
        if found.name == "COPY"
        for source in found.arguments.split()[:-1]
    ]


def test_the_context_is_what_is_copied_and_no_more() -> None:
    lines = (ROOT / "config" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    assert [line[1:] for line in lines if line.startswith("!")] == copied()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the steps of the Dockerfile were done, as far as possible."""
    pytest.importorskip("pip")
    root = tmp_path_factory.mktemp("image")
    for name in ("app/data", "opt", "src"):
        (root / name).mkdir(parents=True)
    for source in copied():
        subprocess.run(["cp", "-r", str(ROOT / source), str(root / "src")], check=True)
    base = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    for found in stages()[0]:
        if found.name != "RUN":
            continue
        done = subprocess.run(
            ["sh", "-ec", found.arguments.replace("/opt/", f"{root}/opt/")],
            cwd=root / "src",
            env=os.environ | {"PATH": base},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode and re.search(r"connection|resolution", done.stderr, re.IGNORECASE):
            pytest.skip(f"no package index within reach: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
    return root


def test_the_steps_build_a_program_that_serves_corescopes_directory(image: Path) -> None:
    database = make_database(image / "app/data/meshcore.db", [("nodes", "aa11", 0, None)])
    put(document(("aa11", "confirmed", "advert")), snapshot_path(database))
    assert not list((image / "opt/mbcap-watch").rglob("site-packages/pip"))
    assert list((image / "opt").rglob("mbcap_watch/__pycache__/*.pyc"))  # it is read-only later
    command = [f"{image}/opt/mbcap-watch/bin/mbcap-watch", *json.loads(last("CMD"))]
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "DB_PATH") and not name.startswith("MBCAP_WATCH_")
    }
    where = f"{image}{last('WORKDIR')}"
    with subprocess.Popen(command, cwd=where, env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            row = ("nodes", "aa11", 2, "advert")
            wait_until(lambda: row in read_rows(database) or process.poll() is not None, "the row")
            process.send_signal(signal.SIGTERM)  # what `docker stop` sends
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
    assert row in read_rows(database)


# ------------------------------------------------------------------------------ compose.yaml


COMPOSE = ROOT / "config" / "compose.yaml"


def ours() -> list[str]:
    """Return the lines of the service, without comments."""
    text = re.sub(r"(^|\s)#.*", "", COMPOSE.read_text())
    match = re.search(r"^services:\s+  mbcap-watch:\n((?:    .*\n|\s*\n)*)", text, re.MULTILINE)
    assert match
    assert not text[match.end() :].strip()  # no other service, no name for a common project
    return [line.strip() for line in match[1].splitlines() if line.strip()]


def test_compose_shares_the_directory_and_the_owner_and_gives_away_little() -> None:
    lines = set(ours())
    assert {"read_only: true", "network_mode: none", "cap_drop: [ALL]"} <= lines
    assert any(line.startswith('- "${CORESCOPE_DATA:?') for line in lines)
    assert any(line.startswith('user: "${CORESCOPE_USER:?') for line in lines)
    (grace,) = (line.split()[1] for line in lines if line.startswith("stop_grace_period: "))
    assert int(grace.removesuffix("s")) > signals._STOP_SECONDS


def compose(*files: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    docker = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if shutil.which(docker[0]) is None:
        pytest.skip("needs docker compose")
    return subprocess.run(
        [*docker, *(word for file in files for word in ("-f", str(file))), "config"],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("data", ["/srv/corescope", "meshcore-data"])
def test_compose_adds_to_corescopes_own_file_and_changes_nothing_in_it(
    data: str, tmp_path: Path
) -> None:
    theirs = tmp_path / "compose.yaml"
    service = "services:\n  corescope:\n    image: corescope\n    volumes:\n      - {}:/app/data\n"
    theirs.write_text(service.format(data) + "volumes:\n  meshcore-data: {}\n")
    alone = compose(theirs)
    if alone.returncode:
        pytest.skip(f"no docker compose: {alone.stderr}")
    environ = {"CORESCOPE_DATA": data, "CORESCOPE_USER": "1000:1000"}
    both = compose(theirs, COMPOSE, **environ)
    assert both.returncode == 0, both.stderr
    assert [line for line in alone.stdout.splitlines() if line not in both.stdout] == []
    assert f"{data}:/app/data:z" in both.stdout or "selinux: z" in both.stdout
    forgotten = compose(theirs, COMPOSE, CORESCOPE_DATA=data)
    assert forgotten.returncode
    assert "set it to the owner of meshcore.db" in forgotten.stderr
