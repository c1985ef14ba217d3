"""The pages that people read: their links, commands, programs and lists are true."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import pytest

from campaigns.campaign import names
from mbcap_watch.results import Outcome, PersistResult
from processes import call
from support import TESTS, make_database, read_rows, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = TESTS.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
DESIGN, EMBEDDING, REFERENCE = (DOCS / f"{it}.md" for it in ("design", "embedding", "reference"))
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted(DOCS.glob("*.md"))]


class Block(NamedTuple):
    """A block of code on a page."""

    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*each) for each in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline(page: Path) -> list[str]:
    """Return what stands in backticks; one may go over the end of a line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def in_each(find: str) -> Iterator[tuple[str, str]]:
    """Yield each page's name, relative to the root, with what `find` matches in its code."""
    for page in PAGES:
        code = [*inline(page), *(block.code for block in blocks(page))]
        for match in re.findall(find, "\n".join(code), re.MULTILINE):
            yield str(page.relative_to(ROOT)), match


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", prose(page))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_file_that_is_named_is_there() -> None:
    folders = "benchmarks|config|docs|examples|tests"
    rooms = "bridge|cli|doctor|snapshot|store|telemetry|watcher"
    missing = []
    for page, path in in_each(rf"(?<![\w/.-])((?:{folders}|{rooms})/[\w@.-]*\w)"):
        home = ROOT if re.match(folders, path) else ROOT / "src" / "mbcap_watch"
        # In `store/native.Connection` the module is store/native.py.
        candidates = [path, f"{path}.py", f"{path.partition('.')[0]}.py"]
        if not any((home / each).exists() for each in candidates):
            missing.append(f"{page}: {path}")
    assert missing == []


def test_every_target_of_make_is_there() -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(in_each(r"(?:^|&& |sudo )make ([a-z]+)"))
    assert {target for _, target in named} >= {"demo", "test"}
    assert {(page, target) for page, target in named if target not in there} == set()


# ------------------------------------------------------------------------------ commands


def simple_commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell script, without where its output goes."""
    script = re.sub(r"'''.*?'''", "", script, flags=re.DOTALL)  # a program over several lines
    script = script.replace("\\\n", " ").replace("|\n", "| ")
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def arguments(words: list[str]) -> list[str] | None:
    """Return what comes after our program's name; None if it is not called."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if words[:1] == ["sudo"]:
        words = words[3 if words[1] == "-u" else 1 :]
    elif words[:1] == ["docker"] and "exec" in words:
        words = words[words.index("exec") + 2 :]
    if not words or Path(words[0]).name != "mbcap-watch":
        return None
    found = words[1:]
    end = next((at for at, word in enumerate(found) if set(word) <= set("<>")), len(found))
    return found[:end]


def calls() -> set[tuple[str, ...]]:
    """Return the arguments of every call of `mbcap-watch` on the pages."""
    found: set[tuple[str, ...]] = set()
    for page in PAGES:
        quoted = [code for code in inline(page) if "mbcap-watch " in code]
        scripts = [block.code for block in blocks(page) if block.language == "sh"]
        for script in [*quoted, *scripts]:
            called = map(arguments, simple_commands(script))
            found |= {tuple(each) for each in called if each and "COMMAND" not in each}
    return found


@functools.cache
def help_of(*words: str) -> subprocess.CompletedProcess[str]:
    return call(*words, "--help")


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options that each command has."""
    listed = re.findall(r"^  ([a-z]+)  ", help_of().stdout.partition("Commands:")[2], re.MULTILINE)
    found = {each: set(re.findall(r"--[a-z-]+", help_of(each).stdout)) for each in listed}
    assert "--database" in found["run"]
    return found


@pytest.mark.slow
def test_every_command_can_be_given() -> None:
    assert len(calls()) > 10
    # Options are parsed before --help is answered, so one that there is not is an error.
    answers = {each: help_of(*each) for each in calls()}
    assert {each: done.stderr for each, done in answers.items() if done.returncode} == {}


@pytest.mark.slow
def test_every_option_that_is_named_is_there(options: dict[str, set[str]]) -> None:
    there = set.union(*options.values())
    named = {
        (page.name, word)
        for page in PAGES
        for code in inline(page)
        for word in re.findall(r"^--[a-z-]+", code)
    }
    assert {(page, option) for page, option in named if option not in there} == set()


# ------------------------------------------------------------------------------ programs


def test_every_program_compiles() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page)]
    programs = [(page, block.code) for page, block in found if block.language == "python"]
    assert len(programs) >= 5
    for page, code in programs:
        compile(code, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def environment() -> dict[str, str]:
    """Return an environment in which `python` and `mbcap-watch` are those of the tests."""
    programs = os.path.dirname(sys.executable)
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


@pytest.mark.system
def test_the_quick_start_for_asyncio_word_for_word(tmp_path: Path) -> None:
    section = README.read_text().partition("### asyncio")[2].partition("\n## ")[0]
    [program] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    _, steps = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    out = tmp_path / "out"
    with (
        out.open("w") as stdout,
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment(), stdout=stdout
        ) as process,
    ):
        try:
            wait_until(out.read_text, "the first result")
            subprocess.run(["sh", "-ec", steps], cwd=tmp_path, env=environment(), check=True)
            wait_until(lambda: "applied 1 None\n" in out.read_text(), "the first row")
        finally:
            process.kill()
    assert read_rows(tmp_path / "meshcore.db") == {("nodes", "aa11", 2, "advert")}


PROGRAMS = {
    "lifespan": (
        "async def main():\n    async with lifespan(None): pass\n\n"
        "import asyncio; asyncio.run(main())\n"
    ),
    "on_result": "",
    "sync": (
        "async def main():\n"
        "    async with aiosqlite.connect('meshcore.db') as connection:\n"
        "        print(await sync(connection, asyncio.Lock()))\n\n"
        "asyncio.run(main())\n"
    ),
}


@pytest.mark.system
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_for_embedding_write_the_rows(tmp_path: Path, name: str) -> None:
    [code] = [b.code for b in blocks(EMBEDDING) if re.search(rf"def {name}\(", b.code)]
    database = make_database(tmp_path / "meshcore.db", [("nodes", "5f3a", 0, None)])
    [publish] = [b.code for b in blocks(EMBEDDING) if "write_snapshot(" in b.code]
    for program in (publish, f"{code}\n\n{PROGRAMS[name]}"):
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert read_rows(database) == {("nodes", "5f3a", 2, "advert")}


# ------------------------------------------------------------------------------ lists


def test_the_reference_has_every_outcome_and_every_field() -> None:
    named = set(inline(REFERENCE))
    assert set(get_args(Outcome)) <= named
    fields = json.loads(PersistResult(outcome="applied", reason="once").to_json())
    assert set(fields) <= named


def test_the_map_has_every_module() -> None:
    table = re.findall(r"^\| `(\w+)/` \| .* \| (.*) \|$", prose(DESIGN), re.MULTILINE)
    named = {
        f"{room}/{item.split('`')[1].removesuffix('.toml')}"
        for room, items in table
        for item in items.split(" · ")
    }
    package = ROOT / "src" / "mbcap_watch"
    modules = [path for path in package.glob("*/*.*") if path.suffix in (".py", ".toml")]
    there = {f"{path.parent.name}/{path.stem}" for path in modules if path.stem != "__init__"}
    assert named == there


def test_the_readme_is_for_five_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_page_names_each_campaign() -> None:
    commands = set(re.findall(r"`make campaign NAME=(\w+)`", (DOCS / "reliability.md").read_text()))
    assert commands == set(names())
