"""Group statistics of a simulated study with known truth: three sites of 60 participants, four nuclei.

Expected values are recomputed from group_stats.tsv with scipy where it has the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.cli.bids_app import main
from tests.run.test_group import NUCLEI, add_scan

ALPHA, BETA, GAMMA = 0.10, 0.05, 0.02
SHIFT_PPM = {"A": -0.02, "B": 0.0, "C": 0.02}
PATIENTS_PPM = 0.01
"""Excess of patients over controls."""
YEARLY_PPM = 0.002
"""Change per year of every participant."""
NOISE_PPM = 0.003


@dataclass(frozen=True)
class Study:
    out: Path

    def __getitem__(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.out / "group" / f"group_{name}.tsv", sep="\t", keep_default_na=False, na_values=["n/a"])

    def rows(self, name: str, **values: Any) -> pd.DataFrame:
        table = self[name]
        for column, value in values.items():
            table = table[table[column] == value]
        return table


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """Participants of three sites; the last six have a second session two years later."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(20)
    people = ["participant_id\tage\tsex\tgroup\tsite"]
    for place in range(180):
        site, group = "ABC"[place % 3], ("HC", "PD")[place // 3 % 2]
        age, late = rng.uniform(8, 85), place >= 174
        people.append(f"sub-{place:03d}\t{age!r}\t{rng.choice(['F', 'M'])}\t{group}\t{site}")
        noise = rng.normal(0, NOISE_PPM, 4)
        for session in ("1", "2") if late else ("1",):
            truth = ALPHA * (1 - np.exp(-BETA * age)) + GAMMA + PATIENTS_PPM * (group == "PD")
            means = truth + SHIFT_PPM[site] + noise + 2 * YEARLY_PPM * (session == "2")
            values = {name: (float(rng.normal(700, 30)), float(mean)) for name, mean in zip(NUCLEI, means, strict=True)}
            add_scan(folder / "out", f"sub-{place:03d}_ses-{session}", values)
        if late:
            (folder / "ds" / f"sub-{place:03d}").mkdir(parents=True)
            (folder / "ds" / f"sub-{place:03d}" / f"sub-{place:03d}_sessions.tsv").write_text(
                f"session_id\tage\nses-1\t{age!r}\nses-2\t{age + 2!r}\n"
            )
    (folder / "ds" / "participants.tsv").write_text("\n".join(people) + "\n")
    assert main([str(folder / "ds"), str(folder / "out"), "group", "--controls", "HC"]) == 0
    return Study(folder / "out")


def test_harmonization_removes_sites_and_preserves_age(study):
    both = study.rows("harmonized", measure="mean_ppm").merge(
        study["stats"][["participant_id", "session_id", "abbreviation", "age_years"]]
    )
    truth = ALPHA * (1 - np.exp(-BETA * both["age_years"]))
    slope = np.polyfit(truth, both["harmonized"], 1)[0]  # 1 if the effect of age is fully preserved
    assert slope == pytest.approx(1, abs=0.1)


def test_true_ageing_curve_is_recovered(study):
    fits = study.rows("ageing", measure="mean_ppm", scans="controls")
    best = fits[fits["best"]]
    assert set(best["curve"]) == {"exponential"}
    for name, truth in (("alpha", ALPHA), ("beta_per_year", BETA), ("gamma", GAMMA)):
        # site effects widen the limits, of which 5 % may miss
        assert (best[f"{name}_low"] < truth).all(), name
        assert (best[f"{name}_high"] > truth).all(), name
        assert best[name].mean() == pytest.approx(truth, rel=0.25)


def test_true_change_per_year_is_recovered(study):
    result = study.rows("change", measure="mean_ppm", group="all")
    assert set(result["n"]) == {6}
    assert result["change_per_year"].to_numpy() == pytest.approx(YEARLY_PPM)  # the noise is the same in both
