"""Matching of reference segmentations with the scans of a study."""

import json
from itertools import product

import pytest

from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.analyses import fit_ageing
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import build_study, read_reference_values

HEADER = "participant_id\tsession_id\tscan\treference\tabbreviation\tvolume_reference_mm3\tmean_reference_ppm"


@pytest.fixture
def compared(tmp_path):
    """Write DN_L as `dgmseg evaluate` does: scans with their means."""

    def write(scans, *, choose=()):
        folder = tmp_path / "compared"
        folder.mkdir()
        rows = []
        for scan, mean in scans.items():
            ids = [next((part for part in scan.split("_") if part.startswith(key)), "n/a") for key in ("sub-", "ses-")]
            rows.append("\t".join([*ids, scan, "manual", "DN_L", "700", str(mean)]))
        (folder / "overlap.tsv").write_text("\n".join([HEADER, *rows]) + "\n")
        (folder / "evaluation.json").write_text(json.dumps({"choose": choose}))
        return folder

    return write


@pytest.mark.parametrize(
    ("labels", "choose", "found"),
    [
        ("sub-01_desc-rts", [], "sub-01_seg-dgm16_desc-rts"),
        ("sub-02_desc-manual", [], "sub-02_seg-dgm16"),  # a desc of the labels
        ("sub-03_run-1", [], "sub-03_run-01_seg-dgm16"),
        ("sub-02_space-T1w", [], "sub-02_seg-dgm16"),  # an entity that the scan lacks
        ("sub-01", ["desc-l1"], "sub-01_seg-dgm16_desc-l1"),  # several, one chosen
        ("sub-01_desc-manual", [], None),  # several, none chosen
        ("sub-03_run-3", [], None),  # a run without results
        ("sub-04", [], None),
    ],
)
def test_labels_are_matched_by_entities(output, add_scan, compared, labels, choose, found):
    for name in ("01_%s_desc-l1", "01_%s_desc-rts", "02_%s", "03_run-01_%s", "05_%s"):
        add_scan(f"sub-{name % 'seg-dgm16'}")
    cohort = load_cohort([ResultsFolder(output, "out", None)])
    records = cohort.scans.to_dict("records")
    names = [
        join_entities({str(key): value for key, value in scan.items() if isinstance(value, str)}) for scan in records
    ]
    table, warnings = read_reference_values(compared({labels: 0.1, "sub-05": 0.1}, choose=choose), cohort)
    others = [names[place] for place in table["scan"] if names[place] != "sub-05_seg-dgm16"]
    assert others == ([found] if found else [])
    assert warnings == (
        []
        if found
        else [
            f"`evaluation` compared: 1 scan(s), such as {labels}, do not match exactly one scan that enters the "
            "statistics; left out"
        ]
    )


def test_evaluation_of_other_scans_is_an_error(output, add_scan, compared):
    add_scan("sub-01_seg-dgm16")
    message = r"^`evaluation` compared: none of its scans, such as sub-02, matches exactly one"
    with pytest.raises(InputError, match=message):
        read_reference_values(compared({"sub-02": 0.1}), load_cohort([ResultsFolder(output, "out", None)]))


@pytest.fixture
def lines(output, add_scan, compared, tmp_path):
    """Fit straight lines to the labelled DN_L; slopes are 0.002 (``first``) and -0.001 ppm per year (``second``)."""

    def fit(first, second, labelled):
        rows = "".join(f"sub-{n}\t{30 + 5 * n}\n" for n in range(1, 8))
        (tmp_path / "participants.tsv").write_text("participant_id\tage\n" + rows)
        truth: dict[str, float] = {}
        for n, (end, slope) in product(range(1, 8), ((first, 0.002), (second, -0.001))):
            mean = 0.1 + slope * 5 * n + 1e-4 * (-1) ** n
            name = f"sub-{n}_seg-dgm16_{end}" if "desc" in end else f"sub-{n}_{end}_seg-dgm16"
            add_scan(name, means=(str(mean), "0.1"))
            truth |= {f"sub-{n}_{end}": mean} if end in labelled else {}
        cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
        table = fit_ageing(build_study(cohort, GroupOptions(evaluation=compared(truth)))).tables[0].rows
        chosen = table.query("measure == 'mean_ppm' and curve == 'linear' and scans == 'with_reference'")
        return chosen[chosen["abbreviation"] == "DN_L"]

    return fit


def test_only_scans_with_a_reference_are_compared(lines):
    table = lines("run-1", "run-2", ("run-1",))
    assert table[["labels", "n"]].to_numpy().tolist() == [["reference", 7], ["predicted", 7]]
    assert table["alpha"].to_numpy() == pytest.approx(0.002, rel=0.05)  # the noise turns the line a little


@pytest.mark.parametrize(
    ("groups", "options", "scans"),
    [
        ("aabb", {}, {"group a": 2, "group b": 2}),
        ("PHHH", {}, {"group H": 3, "group P": 1}),  # the largest is the reference group
        ("aaaa", {}, {"all": 4}),
        ("aabb", {"controls": ("B",)}, {"controls": 2, "group a": 2}),
        ("aabc", {"controls": ("b", "c")}, {"controls": 2, "group a": 2, "group b": 1, "group c": 1}),
    ],
)
def test_age_curves_of_each_group(output, add_scan, tmp_path, groups, options, scans):
    rows = "".join(f"sub-{n}\t{40 + 5 * n}\t{group}\n" for n, group in enumerate(groups))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tgroup\n" + rows)
    for n in range(len(groups)):
        add_scan(f"sub-{n}_seg-dgm16")
    study = build_study(load_cohort([ResultsFolder(output, "out", tmp_path)]), GroupOptions(**options))
    table = fit_ageing(study).tables[0].rows
    assert table.drop_duplicates("scans").set_index("scans")["n"].to_dict() == scans
    assert list(table["scans"].unique()) == list(scans)


def test_reconstructions_are_not_pooled(lines):
    table = lines("desc-l1", "desc-rts", ("desc-l1", "desc-rts"))
    assert table[["labels", "description", "n"]].to_numpy().tolist() == [
        [labels, desc, 7] for labels in ("reference", "predicted") for desc in ("l1", "rts")
    ]
    assert table["alpha"].to_numpy() == pytest.approx([0.002, -0.001] * 2, rel=0.05)


def test_reference_belongs_to_its_reconstruction(lines):
    table = lines("desc-l1", "desc-rts", ("desc-rts",))
    assert table[["labels", "description"]].to_numpy().tolist() == [["reference", "rts"], ["predicted", "rts"]]
    assert table["n"].tolist() == [7, 7]
    assert table["alpha"].to_numpy() == pytest.approx(-0.001, rel=0.05)


def test_nucleus_that_the_reference_lacks_has_no_volume(output, add_scan, compared):
    for name in ("sub-01", "sub-02"):
        add_scan(f"{name}_seg-dgm16")
    folder = compared({"sub-01": 0.1, "sub-02": "n/a"})
    path = folder / "overlap.tsv"
    path.write_text(path.read_text().replace("700\tn/a", "0\tn/a"))
    table, _ = read_reference_values(folder, load_cohort([ResultsFolder(output, "out", None)]))
    assert table["volume_mm3"].dropna().tolist() == [700]
    assert table["mean_ppm"].dropna().tolist() == [0.1]


@pytest.mark.parametrize(
    ("education", "values"),
    [(("12", "16", "n/a"), [12, 16]), (("low", "high", "n/a"), ["low", "high"]), (("l", "8", "h"), ["l", "8", "h"])],
)
def test_covariate_is_numbers_or_categories(output, add_scan, tmp_path, education, values):
    study = load_education(output, add_scan, tmp_path, education)
    assert study.covariates == ("education",)
    assert study.table["education"].dropna().unique().tolist() == values


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
