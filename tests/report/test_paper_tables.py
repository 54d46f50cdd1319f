"""Table 1 and results for a paper."""

import re

import pandas as pd
import pytest

from bids_dgmseg.report.group_data import read_group_data
from bids_dgmseg.report.paper_tables import write_paper_tables
from tests.report.group_tables import write_table, write_tables


@pytest.fixture
def out(tmp_path):
    return write_tables(tmp_path / "out")


def read(path):
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def test_results_have_adjusted_differences_in_ppb(out):
    row: dict[str, object] = {"model": "dgm16", "abbreviation": "DN_L", "reference": "HC", "group": "MS"}
    row |= {"n_reference": 3, "n_group": 3, "ancova_n_reference": 3, "ancova_n_group": 2, "p_t": 0.9, "q_t": 0.9}
    values = {"mean_reference": 0.11, "std_reference": 0.0123, "mean_group": 0.2, "std_group": 0.01}
    values |= {"ancova_difference": 0.0125, "ancova_difference_low": -0.001, "ancova_difference_high": 0.026}
    values |= {"ancova_hedges_g": 0.8, "ancova_hedges_g_low": -0.1, "ancova_hedges_g_high": 1.7}
    values |= {"ancova_p": 0.04, "ancova_q": 0.08}
    rows = [row | values | {"measure": measure} for measure in ("mean_ppm", "mean_ppm_harmonized")]
    write_table(out, "group_differences", rows, {"AncovaCovariates": ["age", "site"]})
    paths = write_paper_tables(read_group_data(out, names=["group_differences"]), out)
    assert [path.name for path in paths] == ["group_table1.tsv", "group_results.tsv"]
    (found,) = read(out / "group_results.tsv").to_dict("records")
    assert found == {
        **{"Measure": "mean susceptibility (ppb)", "Nucleus": "DN_L", "Reference group": "HC", "Group": "MS"},
        **{"n": "3 / 2", "Reference group, mean ± SD": "110.0 ± 12.3", "Group, mean ± SD": "200.0 ± 10.0"},
        **{"Difference [95 % CI]": "12.5 [−1.0, 26.0]", "Standardized [95 % CI]": "0.80 [−0.10, 1.70]"},
        **{"p": "0.040", "q": "0.080", "Adjusted": "yes"},
    }
    html = (out / "group_results.html").read_text(encoding="utf-8")
    assert "adjusted for age, site (ANCOVA)" in html
    assert re.findall("<td>(.*?)</td>", html)[-1] == "yes"


def test_without_groups_results_are_means(out):
    """DN_L 600, 610, 620, 700, 710, 720: mean 660, SD sqrt(15400 / 5) = 55.5; six participants."""
    write_paper_tables(read_group_data(out, names=[]), out)
    row = read(out / "group_results.tsv").set_index("Nucleus").loc["DN_L"]
    assert row["volume (mm³)"] == "660.0 ± 55.5"
    assert row["volume (mm³): n"] == "6"
    first = read(out / "group_table1.tsv")
    assert first.iloc[0]["Participants"] == "6"
    assert list(first["Group"])[:3] == ["all", "HC", "MS"]


def test_results_are_of_the_measures_that_were_chosen(out):
    """With --measures core_mean_ppm: its difference of 0.0125 ppm is 12.5 ppb."""
    row: dict[str, object] = {"model": "dgm16", "abbreviation": "DN_L", "reference": "HC", "group": "MS"}
    row |= {"measure": "core_mean_ppm", "n_reference": 3, "n_group": 3, "difference": 0.0125}
    write_table(out, "group_differences", [row], {"Settings": {"Measures": ["core_mean_ppm"]}})
    write_paper_tables(read_group_data(out, names=["group_differences"]), out)
    (found,) = read(out / "group_results.tsv").to_dict("records")
    assert found["Difference [95 % CI]"] == "12.5"
    assert found["Measure"] == "core_mean_ppb (ppb)"
