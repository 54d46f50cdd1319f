"""Age curves and covariates of a study."""

from itertools import product

import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.analyses import fit_ageing
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import build_study
from tests.study.conftest import HEADER


@pytest.mark.parametrize(
    ("groups", "options", "scans"),
    [
        ("ab", {}, {"group a": 6, "group b": 6}),
        ("PHH", {}, {"group H": 12, "group P": 6}),  # the largest is the reference group
        ("a", {}, {"all": 6}),
        ("ab", {"controls": ("B",)}, {"controls": 6, "group a": 6}),
        # of the controls' groups the first is the reference group, as they are equally large
        ("abc", {"controls": ("b", "c")}, {"controls": 12, "group b": 6, "group a": 6, "group c": 6}),
    ],
)
def test_age_curves_of_each_group(output, add_scan, tmp_path, groups, options, scans):
    groups = 6 * groups
    rows = "".join(f"sub-{n}\t{40 + 5 * n}\t{group}\n" for n, group in enumerate(groups))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tgroup\n" + rows)
    for n in range(len(groups)):
        add_scan(f"sub-{n}_seg-dgm16", means=(f"{0.1 + 0.001 * (n % 7)}", "0.1"))
    study = build_study(load_cohort([ResultsFolder(output, "out", tmp_path)]), GroupOptions(**options))
    table = fit_ageing(study).tables[0].rows
    assert table.drop_duplicates("scans").set_index("scans")["n"].to_dict() == scans
    assert list(table["scans"].unique()) == list(scans)


def test_reconstructions_are_not_pooled(output, add_scan, tmp_path):
    rows = "".join(f"sub-{n}\t{30 + 5 * n}\n" for n in range(1, 8))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\n" + rows)
    for n, (desc, slope) in product(range(1, 8), (("l1", 0.002), ("rts", -0.001))):
        add_scan(f"sub-{n}_seg-dgm16_desc-{desc}", means=(str(0.1 + slope * 5 * n + 1e-4 * (-1) ** n), "0.1"))
    cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
    table = fit_ageing(build_study(cohort, GroupOptions())).tables[0].rows
    table = table.query("measure == 'mean_ppm' and curve == 'linear' and abbreviation == 'DN_L'")
    assert table[["description", "n"]].to_numpy().tolist() == [["l1", 7], ["rts", 7]]
    assert table["alpha"].to_numpy() == pytest.approx([0.002, -0.001], rel=0.05)  # the noise turns the lines a little


@pytest.mark.parametrize(
    ("education", "values"),
    [(("12", "16", "n/a"), [12, 16]), (("low", "high", "n/a"), ["low", "high"]), (("l", "8", "h"), ["l", "8", "h"])],
)
def test_covariate_is_numbers_or_categories(output, add_scan, tmp_path, education, values):
    study = load_education(output, add_scan, tmp_path, education)
    assert study.covariates == ("education",)
    assert study.table["education"].dropna().unique().tolist() == values


def test_volume_that_a_lesion_mask_cuts_is_not_analysed(output, add_scan, tmp_path):
    rows = "1\tname\tDN_L\tL\t400\t400\t0.1\t0.4\n2\tname\tDN_R\tR\t700\t700\t0.1\t0.0\n"
    add_scan("sub-01_seg-dgm16", text=HEADER.replace("\n", "\texcluded_fraction\n") + rows)
    study = build_study(load_cohort([ResultsFolder(output, "out", tmp_path)]), GroupOptions())
    assert study.table["volume_mm3"].tolist() == pytest.approx([float("nan"), 700], nan_ok=True)
    assert study.table["mean_ppm"].tolist() == [0.1, 0.1]
    assert study.warnings == ("group_stats.tsv: lesion masks cut 1 of the nuclei; their volumes are not analysed",)


def test_codes_with_levels_are_categories(output, add_scan, tmp_path):
    (tmp_path / "participants.json").write_text('{"education": {"Levels": {"1": "school", "2": "university"}}}')
    study = load_education(output, add_scan, tmp_path, ("1", "2", "1"))
    assert study.table["education"].unique().tolist() == ["1", "2"]


def test_word_among_numbers_of_a_covariate_is_refused(output, add_scan, tmp_path):
    with pytest.raises(InputError, match=r"^participants.tsv: education is not a number: 'l6' of sub-02; write ids"):
        load_education(output, add_scan, tmp_path, ("12", "l6", "18"))


def load_education(output, add_scan, tmp_path, education):
    rows = [f"sub-0{number}\t{value}" for number, value in enumerate(education, start=1)]
    for number in range(1, 4):
        add_scan(f"sub-0{number}_seg-dgm16")
    (tmp_path / "participants.tsv").write_text("\n".join(["participant_id\teducation", *rows]) + "\n")
    cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
    return build_study(cohort, GroupOptions(covariates=("education",)))
