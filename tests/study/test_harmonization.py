"""A harmonization that is saved by one study and applied to another."""

import json

import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.harmonization import check_fits, harmonize_sites, load_harmonization, save_fits
from tests.study.conftest import NUCLEI, people, study_of


@pytest.fixture
def harmonized():
    """Harmonize a study: its table, the warnings, and what is saved."""

    def call(folder, **options):
        study = study_of(folder, **options)
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
    harmonized(folder, controls=("hc",), harmonization_save=path)
    return path


def _change(folder, column, values):
    """Change the last values of a column of participants.tsv."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    table.loc[table.index[-len(values) :], column] = values
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    return folder


@pytest.mark.parametrize("options", [{}, {"covariates": ("none",)}], ids=str)
def test_applied_to_the_same_study_nothing_changes(write_study, harmonized, tmp_path, options):
    folder, path = write_study("first", people(("A", 9, "HC"), ("B", 8, "HC"))), tmp_path / "saved.json"
    first, _ = harmonized(folder, harmonization_save=path, **options)
    assert first["harmonized"].notna().all()
    again, analysis = harmonized(folder, harmonization_apply=path)
    pd.testing.assert_frame_equal(first, again)
    assert analysis.warnings == ()
    assert set(analysis.tables[1].rows["note"]) == {""}


def test_groups_are_kept_whichever_covariates_are_named(write_study, harmonized):
    folder = write_study("first", people(("A", 9, "HC"), ("A", 3, "PD"), ("B", 3, "HC"), ("B", 9, "PD")))
    named, _ = harmonized(folder, covariates=("age", "sex", "site"))
    pd.testing.assert_frame_equal(named, harmonized(folder)[0])


def test_controls_are_fitted(saved):
    content = json.loads(saved.read_text())
    assert (content["Type"], content["Units"]) == ("bids_dgmseg harmonization", {"mean_ppm": "ppm"})
    assert (content["Controls"], content["Sites"]) == (["hc"], ["A", "B"])
    model = content["Fits"][0]["model"]
    assert model["nuclei"] == list(NUCLEI)
    assert dict(zip(model["sites"], model["n_participants"], strict=True)) == {"A": [14] * 4, "B": [12] * 4}
    assert [covariate["name"] for covariate in model["covariates"]] == ["age", "sex"]


def test_new_scans_of_a_site_lose_its_shift(saved, write_study, harmonized):
    new, _ = harmonized(write_study("new", people(("B", 20, "HC")), seed=5), harmonization_apply=saved)
    expected = new["raw"] - (0.08 + 0.001 * new["age"])
    assert expected.mean() == pytest.approx(0.02, abs=0.005)
    left = (new["harmonized"] - (0.08 + 0.001 * new["age"])).mean()
    assert left == pytest.approx(0.02 * 12 / 26, abs=0.006)  # the mean of the sites, weighted by participants


def test_other_sites_are_not_harmonized(saved, write_study, harmonized):
    folder = _change(write_study("new", people(("C", 12, "HC"), ("A", 4, "HC"))), "site", ["n/a"])
    rows, analysis = harmonized(folder, harmonization_apply=saved)
    assert analysis.warnings == (
        "harmonization.json: site C is not in the harmonization (has A, B); its values are not harmonized",
        "harmonization.json: 1 scan(s) without site or age or sex, or with a category that is not in the saved fit; "
        "not harmonized",
    )
    assert rows["harmonized"].notna().tolist() == (rows["site"] == "A").tolist()


def test_ages_beyond_the_fit_are_said(saved, write_study, harmonized):
    _, analysis = harmonized(write_study("old", [("A", 85.0, "HC"), ("A", 60.0, "HC")]), harmonization_apply=saved)
    assert analysis.warnings == (
        "harmonization.json: age of 1 scan(s) is beyond that of the fit, 50 to 71; its effect is extrapolated",
    )


UNSUITABLE = [
    (lambda c: c.update(Type="bids_dgmseg norms"), r"Invalid value 'bids_dgmseg norms' - at `\$.Type`; save it again"),
    (lambda c: c["Units"].update(mean_ppm="ppb"), "mean_ppm is in ppb, expected ppm; save it again with `harmoniz"),
    (
        lambda c: c["Fits"][0]["stratum"].update(model="other"),
        "has no mean_ppm, dgm16: DN_L, .* \\(has mean_ppm, other: ",
    ),
    (lambda c: c["Fits"][0]["model"].update(nuclei=list("ABCD")), r"has no .* \(has mean_ppm, dgm16: A, B, C, D\)"),
    (lambda c: c["Fits"][0]["model"].update(constant=[1, 2]), r"constant has shape \(2,\), expected \(4,\) - at `\$.F"),
    (lambda c: c["Fits"][0]["model"]["covariates"][0].update(name="dose"), "needs dose of the participants; add it"),
    (lambda c: c.update(Fits=[]), "no fits; save it again with `harmonization_save`"),
]


def test_unsuitable_files_are_one_line(saved, write_study):
    folder = write_study("new", people(("A", 3, "HC")))
    study = study_of(folder, harmonization_apply=saved)
    text = saved.read_text()
    for change, message in UNSUITABLE:
        content = json.loads(text)
        change(content)
        saved.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"^harmonization.json: {message}") as error:
            load_harmonization(study)
        assert "\n" not in str(error.value)


def test_one_site_has_nothing_to_save(write_study, harmonized, tmp_path):
    with pytest.raises(InputError, match=r"^`harmonization_save`: nothing to save: only one site \(A\)"):
        harmonized(write_study("one", people(("A", 5, "HC"))), harmonization_save=tmp_path / "x.json")


def test_warnings_name_the_model(write_study, harmonized):
    folder = write_study("first", people(("A", 4, "HC"), ("B", 4, "HC"), ("C", 2, "HC")))
    for path in list(folder.rglob("*_seg-dgm16_stats.tsv")):
        path.with_name(path.name.replace("dgm16", "dgm24")).write_bytes(path.read_bytes())
    _, analysis = harmonized(folder)
    starts = {line.partition(" has only")[0] for line in analysis.warnings if "site C" in line}
    assert starts == {f"group_harmonized.tsv: {model}: site C" for model in ("dgm16", "dgm24")}
