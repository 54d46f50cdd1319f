"""A harmonization that is saved by one study and applied to another."""

import json

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.harmonization import harmonize_sites
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.saved_harmonization import load_harmonization
from bids_dgmseg.study.saved_models import check_fits, check_targets, save_fits
from bids_dgmseg.study.study import build_study
from tests.study.conftest import NUCLEI, people


@pytest.fixture
def harmonized(tmp_path):
    """Harmonize a study: its table, the warnings, and what is saved."""

    def call(folder, **options):
        cohort = load_cohort([ResultsFolder(folder, "out", folder)])
        study = build_study(cohort, GroupOptions(measures=("mean_ppm",), **options))
        analysis = harmonize_sites(study)
        check_fits(analysis.tables, study.options)
        save_fits(analysis.tables, study)
        rows = analysis.tables[0].rows
        return rows.merge(study.cohort.demographics.rename_axis("scan").reset_index(), on="scan"), analysis

    return call


@pytest.fixture
def saved(write_study, harmonized, tmp_path):
    """The file of a study with controls at A and B, and patients at B."""
    folder = write_study("first", people(("A", 14, "HC"), ("B", 12, "HC"), ("B", 6, "PD")))
    path = tmp_path / "harmonization.json"
    harmonized(folder, control_filter='group == "HC"', harmonization_save=path)
    return path


@pytest.mark.parametrize("options", [{}, {"covariates": ("none",)}, {"combat_age": "spline"}], ids=str)
def test_applied_to_the_same_study_nothing_changes(write_study, harmonized, tmp_path, options):
    folder, path = write_study("first", people(("A", 9, "HC"), ("B", 8, "HC"))), tmp_path / "saved.json"
    first, _ = harmonized(folder, harmonization_save=path, **options)
    assert first["harmonized"].notna().all()
    again, analysis = harmonized(folder, harmonization_apply=path)
    pd.testing.assert_frame_equal(first, again)
    assert analysis.warnings == ()
    assert set(analysis.tables[2].rows["note"]) == {""}


def test_controls_are_fitted_and_patients_keep_their_difference(saved):
    content = json.loads(saved.read_text())
    assert (content["Type"], content["FormatVersion"]) == ("bids_dgmseg harmonization", 1)
    assert content["GeneratedBy"]["Name"] == "bids_dgmseg"
    assert content["Units"] == {"mean_ppm": "ppm"}
    assert (content["Participants"], content["ControlFilter"]) == (26, 'group == "HC"')
    fit = content["Fits"][0]
    assert fit["Nuclei"] == list(NUCLEI)
    assert {site["Name"]: site["Participants"] for site in fit["Sites"]} == {"A": [14] * 4, "B": [12] * 4}
    assert [term["Name"] for term in fit["Covariates"]] == ["age", "sex"]


def test_new_scans_of_a_known_site_lose_its_shift(saved, write_study, harmonized):
    new, analysis = harmonized(write_study("new", people(("B", 20, "HC")), seed=5), harmonization_apply=saved)
    expected = new["raw"] - (0.08 + 0.001 * new["age"])
    assert expected.mean() == pytest.approx(0.02, abs=0.005)
    left = (new["harmonized"] - (0.08 + 0.001 * new["age"])).mean()
    assert left == pytest.approx(0.02 * 12 / 26, abs=0.006)  # the mean of the sites, weighted by participants
    assert analysis.tables[1].not_computed.startswith("the site effects are those of harmonization.json")


def test_new_sites_need_ten_controls(saved, write_study, harmonized, tmp_path):
    enough = write_study("enough", people(("C", 10, "HC"), ("C", 4, "PD")))
    extended = tmp_path / "extended.json"
    options = {"harmonization_apply": saved, "control_filter": 'group == "HC"'}
    rows, analysis = harmonized(enough, harmonization_save=extended, **options)
    line = "harmonization.json: site C is new (known: A, B); its effects are estimated from 10 controls"
    assert line in analysis.warnings
    assert rows["harmonized"].notna().all()
    again, analysis = harmonized(enough, harmonization_apply=extended)
    pd.testing.assert_frame_equal(rows, again)
    assert not any("is new" in line for line in analysis.warnings)
    few = write_study("few", people(("C", 9, "HC"), ("C", 4, "PD")))
    rows, analysis = harmonized(few, **options)
    assert rows["harmonized"].isna().all()
    assert analysis.warnings[0] == (
        "harmonization.json: site C is new (known: A, B); its values are not harmonized: 9 controls, needed are 10, or "
        "5 also scanned at a known site (here 0)"
    )


def _change(folder, column, values):
    """Change the last values of a column of participants.tsv."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    table.loc[table.index[-len(values) :], column] = values
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    return folder


def test_category_without_controls_is_said(write_study, harmonized, tmp_path):
    folder = _change(write_study("first", people(("A", 9, "HC"), ("B", 9, "HC"), ("B", 3, "PD"))), "sex", ["O", "O"])
    options = {"control_filter": 'group == "HC"', "harmonization_save": tmp_path / "saved.json"}
    rows, analysis = harmonized(folder, **options)
    assert analysis.warnings == (
        "group_harmonized.tsv: sex of 2 scans is not F or M, as of the controls; not harmonized",
    )
    assert rows["harmonized"].isna().tolist() == (rows["sex"] == "O").tolist()


def test_categories_may_all_be_numbers(write_study, harmonized, tmp_path):
    """The head coils are 8, a and b in the study of the fit, and 8 and a in the other one."""
    folder = write_study("first", people(("A", 9, "HC"), ("B", 9, "HC")))
    _change(folder, "coil", ["8", "a", "b"] * 6)
    harmonized(folder, covariates=("age", "coil"), harmonization_save=tmp_path / "saved.json")
    new = _change(write_study("new", people(("A", 4, "HC"))), "coil", ["8", "a"] * 2)
    rows, analysis = harmonized(new, harmonization_apply=tmp_path / "saved.json")
    assert analysis.warnings == ()
    assert rows["harmonized"].notna().all()


def test_scans_without_site_are_said(saved, write_study, harmonized):
    folder = _change(write_study("new", people(("A", 4, "HC"))), "site", ["n/a"])
    rows, analysis = harmonized(folder, harmonization_apply=saved)
    assert analysis.warnings == ("harmonization.json: site of 1 scan is missing; not harmonized",)
    assert rows["harmonized"].isna().tolist() == rows["site"].isna().tolist()


def test_nucleus_without_effects_has_a_note(saved, write_study, harmonized):
    """Of GP_L the fit has no effect of B, and at the new site C three of twelve people have no value."""
    content = json.loads(saved.read_text())
    for entry in ("Shift", "Variance", "ShiftBayes", "VarianceBayes"):
        content["Fits"][0]["Sites"][1][entry][2] = "n/a"
    content["Fits"][0]["Sites"][1]["Participants"][2] = 2
    saved.write_text(json.dumps(content))
    folder = write_study("new", people(("B", 3, "HC"), ("C", 12, "HC")))
    for path in sorted(folder.glob("sub-*/ses-0/anat/*_stats.tsv"))[-3:]:
        lines = path.read_text().splitlines()
        lines[3] = "\t".join([*lines[3].split("\t")[:-1], "n/a"])
        path.write_text("\n".join(lines) + "\n")
    rows, analysis = harmonized(folder, harmonization_apply=saved)
    assert rows["harmonized"].isna().tolist() == (rows["abbreviation"] == "GP_L").tolist()
    effects = analysis.tables[2].rows.set_index(["site", "abbreviation"])
    assert effects.loc[("B", "GP_L"), "note"] == "not harmonized: values of only 2 participants"
    assert effects.loc[("C", "GP_L"), "note"] == "not harmonized: values of only 9 participants"
    assert effects["note"].str.startswith("not harmonized").sum() == 2
    assert effects.loc[("C", "GP_R"), "note"] == "estimated from matched participants"


def test_ages_beyond_the_fit_are_said(saved, write_study, harmonized):
    _, analysis = harmonized(write_study("old", [("A", 85.0, "HC"), ("A", 60.0, "HC")]), harmonization_apply=saved)
    assert analysis.warnings == (
        "harmonization.json: age of 1 scan is beyond that of the fit, 50 to 71; its effect is extrapolated",
    )


def test_longitudinal_harmonization_travels(write_study, harmonized, tmp_path):
    folder = write_study("first", people(("A", 8, "HC"), ("B", 8, "HC")), sessions=3)
    path = tmp_path / "harmonization.json"
    first, _ = harmonized(folder, harmonization_save=path, combat_longitudinal=True)
    again, _ = harmonized(folder, harmonization_apply=path)
    pd.testing.assert_frame_equal(first, again)
    single, _ = harmonized(folder)
    assert not np.allclose(first["harmonized"], single["harmonized"])


UNSUITABLE = [
    (lambda c: c.update(Type="bids_dgmseg norms"), "Type is 'bids_dgmseg norms', expected 'bids_dgmseg harm"),
    (lambda c: c.update(FormatVersion=2), "FormatVersion: 2, this version reads 1; save it again with `harmon"),
    (lambda c: c["Units"].update(mean_ppm="ppb"), "mean_ppm is in ppb, expected ppm"),
    (lambda c: c["Fits"][0].update(Measure="median_ppm"), "median_ppm is in None, expected ppm"),
    (lambda c: c["Fits"][0]["Stratum"].update(model="other"), "is of model other, not of model dgm16"),
    (lambda c: c["Fits"][0].update(Nuclei=["A", "B", "C", "D"]), r"has no mean_ppm of DN_L, .* \(has A, B, C, D\)"),
    (lambda c: c["Fits"][0].update(Constant=[1, 2]), r"Fits.Constant: shape \(2,\), expected \(4,\); save it"),
    (lambda c: c["Fits"][0].update(Constant=["x"] * 4), "Fits.Constant: not numbers"),
    (lambda c: c["Fits"][0].pop("Sites"), "Fits.Sites: missing or of another type"),
    (lambda c: c["Fits"][0]["Covariates"][0].update(Name="dose"), "needs dose of the participants; add it to part"),
    (lambda c: c.pop("Fits"), "file.Fits: missing or of another type"),
]


def test_unsuitable_files_are_one_line(saved, write_study):
    folder = write_study("new", people(("A", 3, "HC")))
    cohort = load_cohort([ResultsFolder(folder, "out", folder)])
    study = build_study(cohort, GroupOptions(measures=("mean_ppm",), harmonization_apply=saved))
    text = saved.read_text()
    for change, message in UNSUITABLE:
        content = json.loads(text)
        change(content)
        saved.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"^harmonization.json: {message}") as error:
            load_harmonization(study)
        assert "\n" not in str(error.value)
    saved.unlink()
    with pytest.raises(InputError, match=r"harmonization.json: no such file; check the path$"):
        load_harmonization(study)


def test_other_measures_and_versions_are_said(saved, write_study, harmonized):
    folder = write_study("new", people(("A", 3, "HC")))
    content = json.loads(saved.read_text())
    content["GeneratedBy"]["Version"] = "0.0.1"
    content["ReferenceRegions"] = ["csf"]
    saved.write_text(json.dumps(content))
    _, analysis = harmonized(folder, harmonization_apply=saved)
    assert analysis.warnings[0].startswith("harmonization.json: is of version 0.0.1, this is ")


def test_one_site_has_nothing_to_save(write_study, harmonized, tmp_path):
    with pytest.raises(InputError, match=r"^`harmonization_save`: nothing to save: only one site \(A\)"):
        harmonized(write_study("one", people(("A", 5, "HC"))), harmonization_save=tmp_path / "x.json")


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("harmonization_save", "norms_save"),
        ("harmonization_save", "harmonization_apply"),
        ("norms_save", "harmonization_apply"),
    ],
)
def test_file_to_save_is_no_other_file_of_the_run(tmp_path, first, other):
    (tmp_path / "folder").mkdir()
    same = {first: tmp_path / "saved.json", other: tmp_path / "folder" / ".." / "saved.json"}
    with pytest.raises(InputError, match=rf"^`{first}` .*saved.json: is also the file of `{other}`; name another file"):
        check_targets(GroupOptions(**same))
    check_targets(GroupOptions(**same | {other: tmp_path / "other.json"}))
