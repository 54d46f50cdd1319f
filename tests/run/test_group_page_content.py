"""What the group page says of messy participants, from the command line, on results without images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.cli.bids_app import main
from tests.report.conftest import Page
from tests.run.test_group import NUCLEI, add_scan


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(dataset: Path, out: Path) -> Callable[..., Page]:
    """Run the group level and return its page."""

    def call(*options: str) -> Page:
        assert main([str(dataset), str(out), "group", *options]) == 0
        return Page(out / "group.html")

    return call


def add_scans(out: Path, *names: str) -> None:
    """Add scans whose values differ a little."""
    rng = np.random.default_rng(0)
    for name in names:
        values = {nucleus: (700 + 10 * rng.normal(), 0.1 + 0.01 * rng.normal()) for nucleus in NUCLEI}
        add_scan(out, name, values)


def test_page_has_the_categories_of_the_analyses(out, run, participants):
    add_scans(out, *(f"sub-0{number}" for number in range(1, 7)))
    rows = ["01 female HC", "02 F HC", "03 Male HC", "04 m PD", "05 n/a PD", "06 M n/a"]
    participants("participant_id sex group", *rows)
    table = run().tables["participants-table"]
    assert [row[0] for row in table[1:]] == ["all", "HC", "PD", "not known"]
    assert [row[table[0].index("Sex")] for row in table[1:]] == [
        "F: 2, M: 3, n/a: 1",
        "F: 2, M: 1",
        "M: 1, n/a: 1",
        "M: 1",
    ]


def test_group_named_all_is_a_group(out, run, participants):
    add_scans(out, *(f"sub-0{number}_ses-{session}" for number in range(1, 7) for session in (1, 2)))
    participants("participant_id group", *(f"0{number} {'all' if number < 4 else 'PD'}" for number in range(1, 7)))
    for number in range(1, 7):
        table = pd.DataFrame({"session_id": ["ses-1", "ses-2"], "age": [50 + number, 52 + number]})
        folder = out.with_name("ds") / f"sub-0{number}"
        folder.mkdir()
        table.to_csv(folder / f"sub-0{number}_sessions.tsv", sep="\t", index=False)
    run()
    changes = pd.read_csv(out / "group" / "group_longitudinal.tsv", sep="\t")
    assert set(changes["group"]) == {"all groups", "all", "PD"}
    assert set(changes.loc[changes["group"] == "all", "n"]) == {3}


def test_unknown_sites_are_not_confounded(out, run, participants, capsys):
    add_scans(out, *(f"sub-0{number}" for number in range(1, 9)))
    sites = ["A", "B", "A", "B", "n/a", "n/a", "n/a", "n/a"]
    rows = [f"0{number} {'HC' if number < 5 else 'PD'} {sites[number - 1]}" for number in range(1, 9)]
    participants("participant_id group site", *rows)
    run()
    err = capsys.readouterr().err
    assert "confounded" not in err
    assert "groups are compared regardless of site: no site of PD is known (column site)" in err
    differences = pd.read_csv(out / "group" / "group_differences.tsv", sep="\t")
    assert differences["p_t"].notna().all()
