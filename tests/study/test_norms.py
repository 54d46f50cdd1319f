"""Norms that are saved by one study and applied to another."""

import json

import pandas as pd
import pytest
from scipy.stats import norm, t
from statsmodels.formula.api import ols

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.analyses import compare_with_norms, load_norms
from bids_dgmseg.study.harmonization import check_fits, harmonize_sites, save_fits
from tests.study.conftest import NUCLEI, people, study_of


@pytest.fixture
def scored():
    """Compare a study with its controls or saved norms: its z-scores with the demographics, and the warnings."""

    def call(folder, **options):
        study = study_of(folder, **options)
        harmonization = harmonize_sites(study)
        analysis = compare_with_norms(study.with_measures(harmonization.measures))
        check_fits([*harmonization.tables, *analysis.tables], study.options)
        save_fits([*harmonization.tables, *analysis.tables], study)
        rows = analysis.tables[1].rows
        return rows.merge(study.cohort.demographics.rename_axis("scan").reset_index(), on="scan"), analysis

    return call


@pytest.fixture
def saved(write_study, scored, tmp_path):
    """The norms of 24 controls at A and B, raw and harmonized; the harmonization is beside them."""
    folder = write_study("first", people(("A", 12, "HC"), ("B", 12, "HC"), ("B", 4, "PD")))
    options = {"harmonization_save": tmp_path / "harmonization.json", "norms_save": tmp_path / "norms.json"}
    rows, _ = scored(folder, controls=("HC",), **options)
    return tmp_path / "norms.json", rows


def test_new_scans_have_the_z_of_the_regression(saved, write_study, scored):
    path, first = saved
    new, analysis = scored(write_study("new", people(("A", 6, "HC")), seed=8), norms=path)
    of_nucleus = first[(first["measure"] == "mean_ppm") & (first["abbreviation"] == "GP_L") & first["control"]]
    fit = ols("value ~ age + C(sex)", of_nucleus).fit()
    scores = new[(new["measure"] == "mean_ppm") & (new["abbreviation"] == "GP_L")]
    frame = fit.get_prediction(scores).summary_frame(alpha=0.05)
    error = (frame["obs_ci_upper"] - frame["mean"]).to_numpy() / t.ppf(0.975, 21)
    centile = t.cdf((scores["value"] - frame["mean"].to_numpy()) / error, 21)
    assert scores["centile"].to_numpy() == pytest.approx(100 * centile)
    assert scores["z"].to_numpy() == pytest.approx(norm.ppf(centile))
    assert set(new["measure"]) == {"mean_ppm"}  # no harmonized values on the same scale
    assert analysis.warnings == ()
    assert set(analysis.tables[0].rows["sex"]) == {"F", "M"}


def test_harmonized_norms_travel_with_their_harmonization(saved, write_study, scored, tmp_path):
    path, _ = saved
    folder, harmonization = write_study("new", people(("B", 6, "HC")), seed=8), tmp_path / "harmonization.json"
    new, analysis = scored(folder, norms=path, harmonization_apply=harmonization)
    assert set(new["measure"]) == {"mean_ppm", "mean_ppm_harmonized"}
    assert analysis.warnings == ()
    content = json.loads(harmonization.read_text())
    harmonization.write_text(json.dumps(content))  # the same numbers in another layout
    _, analysis = scored(folder, norms=path, harmonization_apply=harmonization)
    assert "norms of harmonized values were saved with a different harmonization" in analysis.warnings[0]


def test_other_sites_ages_and_sexes_are_said(saved, write_study, scored):
    path, _ = saved
    folder = write_study("new", [("C", 60.0, "HC"), ("A", 85.0, "HC"), ("A", 60.0, "HC"), ("A", 60.0, "HC")])
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    table.loc[2, "sex"] = "O"
    table.loc[3, "age"] = "n/a"
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    rows, analysis = scored(folder, norms=path)
    assert analysis.warnings == (
        "norms.json: site C is not among those of the norms (A, B); z-scores of raw values contain the difference "
        "between the sites",
        "norms.json: no score for 1 scan(s): age beyond those of the controls (50 to 71)",
        "norms.json: no score for 1 scan(s): the norms are of F and M",
        "norms.json: no score for 1 scan(s): no age",
    )
    assert rows.groupby("scan")["z"].apply(lambda z: z.notna().all()).tolist() == [True, False, False, False]


def _first(content):
    return content["Fits"][0]["norms"]["DN_L"]


UNSUITABLE = [
    (lambda c: c.update(Type="bids_dgmseg harmonization"), r"Invalid value 'bids_dgmseg harmonization' - at `\$.Type`"),
    (lambda c: _first(c).update(inverse=[1]), r"\(3,\) coefficients, expected 3 - at `\$.Fits\[0\].norms\[...\]`"),
]


def test_unsuitable_norms_are_one_line(saved, write_study):
    path, _ = saved
    folder = write_study("new", people(("A", 3, "HC")))
    study = study_of(folder, norms=path)
    text = path.read_text()
    for change, message in UNSUITABLE:
        content = json.loads(text)
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"^norms.json: {message}"):
            load_norms(study)


def test_bilateral_rows_change_nothing_of_the_sides(write_study):
    rows = []
    for name, nuclei in (("sides", NUCLEI), ("both", (*NUCLEI, "DN", "GP"))):
        folder = write_study(name, people(("A", 12, "HC"), ("B", 12, "HC")), nuclei=nuclei)
        tables = sorted(folder.rglob("*_stats.tsv"))
        if name == "both":  # the same values of the sides
            for path, sides in zip(tables, sorted((folder.parent / "sides").rglob("*_stats.tsv")), strict=True):
                path.write_text(sides.read_text() + "".join(path.read_text().splitlines(keepends=True)[-2:]))
        study = study_of(folder, controls=("HC",))
        result = compare_with_norms(study).tables[1].rows
        assert set(result["abbreviation"]) == set(nuclei)
        rows.append(result[result["abbreviation"].isin(NUCLEI)].reset_index(drop=True))
    sides, both = (part[["scan", "abbreviation", "z"]] for part in rows)
    pd.testing.assert_frame_equal(sides, both, check_categorical=False)


def test_controls_of_saved_norms_are_compared_with_the_others(saved, scored, tmp_path):
    path, first = saved
    again, _ = scored(tmp_path / "first", norms=path)
    first = first[first["measure"] == "mean_ppm"]
    pd.testing.assert_series_equal(again["z"], first["z"].reset_index(drop=True))
