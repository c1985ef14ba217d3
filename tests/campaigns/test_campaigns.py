"""Every campaign, briefly. `make campaign NAME=…` plays one at full size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from campaigns import campaign
from campaigns.campaign import Report, load, names, play, play_round

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("name", names())
def test_a_campaign_at_its_short_size(name: str) -> None:
    loaded = load(name)
    tally = play_round(name, 0, loaded.short)
    assert tally[loaded.unit] >= loaded.short


@pytest.mark.slow
def test_a_campaign_goes_on_where_its_report_ends(tmp_path: Path) -> None:
    name = names()[0]
    path, said = tmp_path / "reports" / "one.json", list[object]()
    play(first := Report(path, name), 1, 1, said.append)
    assert (first.rounds, first.failures) == (1, [])
    play(again := Report(path, name), first.done + 1, 2, said.append)
    assert (again.rounds, again.failures) == (3, [])
    assert again.tally.total() > first.tally.total()
    assert len(said) == 2


def test_what_goes_wrong_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "MOST_FAILURES", 3)
    path, name, said = tmp_path / "one.json", names()[0], list[object]()
    # `pow` takes three arguments, and raises for these.
    play(Report(path, name), 1, 1, said.append, one=pow)  # type: ignore[arg-type]
    again = Report(path, name)
    assert [each.round for each in again.failures] == [0, 1, 2]
    assert all("TypeError" in each.what for each in again.failures)
