"""What a document costs in memory on its way from the file to what is wanted."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import documents
from mbcap_watch.errors import SnapshotMalformed, SnapshotRefused
from mbcap_watch.snapshot.codec import parse, parse_entries
from mbcap_watch.store import plan
from support import NOISE, cost_of_reading

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 4 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", documents.ALL)
def test_a_document_costs_at_most_ten_times_its_size(name: str, tmp_path: Path) -> None:
    (tmp_path / "snapshot.json").write_bytes(data := documents.ALL[name](SIZE))
    assert SIZE * 0.99 < len(data) <= SIZE
    growth, result = cost_of_reading(tmp_path)
    expected = "database_missing"
    if name in documents.REFUSED:
        expected = "refused"
    elif name in documents.MALFORMED:
        expected = "malformed"
    assert result["outcome"] == expected
    assert len(result["error"]) < 400
    assert growth <= 10 * len(data) + NOISE
    assert growth >= len(data) / 2  # it was read at all


@pytest.mark.parametrize("make", documents.REFUSED.values(), ids=documents.REFUSED)
def test_only_a_small_document_is_never_refused(make: Callable[[int], bytes]) -> None:
    assert parse(make((1 << 16) - 1)).entries
    with pytest.raises(SnapshotRefused):
        parse(make(1 << 18))


def test_what_would_swell_is_refused_as_a_bare_list_as_well() -> None:
    with pytest.raises(SnapshotRefused, match=r"^stdin: has 1,000,000 entries in 3,000,001 bytes"):
        parse_entries(b"[" + b"{}," * 999_999 + b"{}]", source="stdin")


@pytest.mark.parametrize("more", ["", ',"path":[1,2,3,4,5,6,7,8,9]', ',"a":{},"b":{},"c":{}'])
def test_unknown_fields_are_no_entries(more: str) -> None:
    entry = f'{{"public_key":"aa11","status":"unknown"{more}}}'
    data = f'{{"entries":[{",".join([entry] * 40_000)}]}}'.encode()
    assert plan.desired_state(parse(data).entries).skipped_unknown == 40_000


def test_a_large_document_says_which_entry_is_wrong() -> None:
    entries = [f'{{"public_key":"{number:064x}"}}' for number in range(20_000)]
    entries[12_345] = '{"public_key":12345}'
    with pytest.raises(SnapshotMalformed, match=r"entries\[12345\]: Expected `str \| null`"):
        parse(f'{{"entries":[{",".join(entries)}]}}'.encode())


def test_an_error_that_is_kept_does_not_keep_the_document(tmp_path: Path) -> None:
    data = documents.MALFORMED["the last entry is wrong"](SIZE)
    (tmp_path / "snapshot.json").write_bytes(data)
    code = """
import sys, tracemalloc
from pathlib import Path
from mbcap_watch.bridge.loading import load
from mbcap_watch.settings import Settings
directory = Path(sys.argv[1])
tracemalloc.start()
loaded = load(Settings(directory / "meshcore.db", snapshot_dir=directory))
print(type(loaded.error).__name__, tracemalloc.get_traced_memory()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    name, kept = done.stdout.split()
    assert name == "SnapshotMalformed"
    assert int(kept) < SIZE / 4
