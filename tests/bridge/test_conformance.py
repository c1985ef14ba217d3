"""The bridge against what the reference was observed to do, and the differences that are meant."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import PersistResult, Settings, persist_once, snapshot_dir, snapshot_path
from support import TESTS, connect, make_database, read_rows

if TYPE_CHECKING:
    from pathlib import Path

CASES = [json.loads(line) for line in (TESTS / "cases.jsonl").read_text().splitlines()]

SETUPS = {
    "drop_nodes_cols": [
        "ALTER TABLE nodes DROP COLUMN multibyte_sup",
        "ALTER TABLE nodes DROP COLUMN multibyte_evidence",
    ],
    "drop_inactive_cols": [
        "ALTER TABLE inactive_nodes DROP COLUMN multibyte_sup",
        "ALTER TABLE inactive_nodes DROP COLUMN multibyte_evidence",
    ],
    "drop_nodes_evidence": ["ALTER TABLE nodes DROP COLUMN multibyte_evidence"],
    "drop_inactive_table": ["DROP TABLE inactive_nodes"],
    "abort_trigger": [
        "CREATE TRIGGER t BEFORE UPDATE ON nodes WHEN OLD.public_key = 'dd44' BEGIN"  # noqa: ISC004
        " SELECT RAISE(ABORT, 'no'); END"
    ],
}


def set_up(case: dict[str, Any], directory: Path) -> Path:
    database = make_database(directory / "meshcore.db", [tuple(row) for row in case["seed"]])
    data = base64.b64decode(case["snapshot_b64"] or "")
    path = snapshot_path(database)
    match case["setup"]:
        case "notdir":
            path.parent.write_bytes(b"")
        case "dangling":
            path.parent.mkdir()
            path.symlink_to(directory / "nowhere")
        case "only_tmp":
            path.parent.mkdir()
            path.with_name("snapshot.json.tmp").write_bytes(data)
        case setup:
            path.parent.mkdir()
            if case["snapshot_b64"] is not None:
                path.write_bytes(data)
            with connect(database) as connection:
                for statement in SETUPS.get(setup, []):
                    connection.execute(statement)
    return database


def rows(case: dict[str, Any], field: str) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in case[field]}


def test_all_cases_are_here() -> None:
    assert len(CASES) == 100


@pytest.mark.anyio
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
async def test_case(case: dict[str, Any], tmp_path: Path) -> None:
    database = set_up(case, tmp_path)
    before = read_rows(database)
    settings = Settings(database=database)
    result = [await persist_once(settings) for _ in range(case["times"])][-1]
    after = read_rows(database)

    match case["ours"]:
        case "same":
            assert after == rows(case, "reference_after")
            if case["reference_malformed"]:
                assert (result.outcome, after) == ("malformed", before)
                assert str(snapshot_path(database)) in str(result.error)
            else:
                check_counts(case, result)
        case "either":
            # As the reference, or malformed; or, with the oddity ignored, applied.
            ignored = {("nodes", "aa11", 2, "advert")} | (before - {("nodes", "aa11", 0, None)})
            assert after in (rows(case, "reference_after"), before, ignored)
            assert result.outcome in ("applied", "unchanged", "malformed")
        case "malformed":
            assert (result.outcome, after) == ("malformed", before)
            assert after == rows(case, "ours_after")
        case _:
            assert after == rows(case, "ours_after")
            assert result.outcome in ("applied", "unchanged")


def check_counts(case: dict[str, Any], result: PersistResult) -> None:
    stats = case["reference_stats"]
    assert result.entries == stats["read"]
    assert result.skipped_unknown + result.skipped_unrecognized == stats["skipped"] or (
        # An entry whose key is missing is looked for by the reference, and is skipped by us.
        case["name"] in {"public_key_null", "key_publicKey_camel", "key_with_space"}
    )
    if not case["name"].startswith("dup"):  # the reference counts a row once per entry
        assert result.matched_active == stats["updated_active"]
        assert result.matched_inactive == stats["updated_inactive"]


@pytest.mark.anyio
async def test_the_real_database_and_snapshot(
    tmp_path: Path, real_files: tuple[Path, Path]
) -> None:
    database = tmp_path / "corescope.db"
    database.write_bytes(real_files[0].read_bytes())
    snapshot_dir(database).mkdir()
    snapshot_path(database).write_bytes(real_files[1].read_bytes())

    result = await persist_once(Settings(database=database))
    values = [row[2:] for row in read_rows(database)]

    assert (result.outcome, result.changed_active, result.skipped_unknown) == ("applied", 54, 146)
    assert values.count((2, "advert")) == 21
    assert values.count((1, "path")) == 33
    assert values.count((0, None)) == 146
    assert (await persist_once(Settings(database=database))).outcome == "unchanged"


@pytest.fixture
def real_files() -> tuple[Path, Path]:
    folder = TESTS.parent.parent / "shared" / "fixtures"
    found = folder / "corescope.db", folder / "corescope-snapshot.json"
    if not all(path.exists() for path in found):
        pytest.skip("no real CoreScope files beside the project")
    return found
