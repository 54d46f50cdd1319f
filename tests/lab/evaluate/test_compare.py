"""`dgmseg evaluate` on small label images."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel import orientations

from bids_dgmseg.cli.main import main

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
DN_L, DN_R = (slice(1, 4), slice(2, 5), slice(1, 3)), (slice(6, 9), slice(2, 5), slice(1, 3))
"""18 voxels of 2 mm3 each."""


def labels(*numbers: int, grow: int = 0, size: int = 12) -> np.ndarray:
    """Two boxes with these numbers; the first is longer by `grow` voxels in y."""
    array = np.zeros((size, size, 6), np.int16)
    for number, (x, y, z) in zip(numbers, (DN_L, DN_R), strict=False):
        longer = slice(y.start, y.stop + (grow if x is DN_L[0] else 0))
        array[x, longer, z] = number
    return array


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def dataset(root: Path, images: dict[str, np.ndarray], table: dict[int, str] | None = None, seg: str = "x") -> Path:
    """Write a dataset of segmentations; a scan is ``sub-01_ses-1``."""
    for scan, array in images.items():
        folder = root.joinpath(*scan.split("_")[:2], "anat") if "_ses-" in scan else root / scan / "anat"
        write(folder / f"{scan}_seg-{seg}_dseg.nii.gz", array)
    (root / "dataset_description.json").write_text("{}")
    rows = "".join(f"{number}\t{name}\t{name}\n" for number, name in (table or {1: "DN_L", 2: "DN_R"}).items())
    (root / "dseg.tsv").write_text(f"index\tname\tabbreviation\n{rows}")
    return root


def grown(number: int, *, places: int = 99) -> dict[str, np.ndarray]:
    """Scans with ever longer DN_L: 36 mm3, and 12 more in each."""
    return {f"sub-0{place + 1}": labels(1, 2, grow=place % places) for place in range(number)}


@pytest.fixture
def same(tmp_path):
    """Two datasets with the same labels of two scans."""
    return [dataset(tmp_path / name, dict.fromkeys(("sub-01", "sub-02"), labels(1, 2))) for name in ("first", "second")]


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command with output folder ``out``: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def read(tmp_path: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(tmp_path / f"out/{name}.tsv", sep="\t", na_values=["n/a"])


def row_of(tmp_path: Path, name: str, **where: str) -> dict[str, Any]:
    """First row of a table with these values."""
    table = read(tmp_path, name)
    for column, value in where.items():
        table = table[table[column] == value]
    return {str(column): value for column, value in table.iloc[0].items()}


def test_two_files_are_compared_per_nucleus(evaluate, tmp_path):
    # DN_L: 18 voxels in a box of 18 + 6: Dice 36 / 42. DN_R is the same in both.
    first, second = write(tmp_path / "a.nii.gz", labels(1, 2)), write(tmp_path / "b.nii", labels(1, 2, grow=1))
    code, out, err = evaluate(first, second)
    assert (code, err) == (0, "")
    rows = read(tmp_path, "overlap").set_index("abbreviation")
    assert rows["dice"].tolist() == pytest.approx([36 / 42, 1], abs=1e-6)
    assert rows.loc["DN_L", "volume_difference_mm3"] == 12
    assert rows.loc["DN_L", "hausdorff_mm"] == 1
    assert "note: a: no dseg.tsv found; assuming the labels of this program (1 DN_L, 2 DN_R, …)" in out
    assert "note: agreement across scans needs at least 3 scans, found 1; see overlap.tsv" in out


def test_each_dataset_has_its_own_labels(evaluate, tmp_path):
    names = ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"]
    ours = dataset(tmp_path / "ours", {name: labels(1, 2) for name in names})
    theirs = dataset(tmp_path / "theirs", {name: labels(31, 30) for name in names}, {30: "DN_R", 31: "DN_L"}, seg="y")
    code, out, _ = evaluate(ours, theirs)
    assert code == 0
    assert "3 scan(s) compared; open" in out
    rows = read(tmp_path, "overlap")
    assert rows["dice"].tolist() == [1] * 6
    assert rows["participant_id"].tolist() == ["sub-01"] * 4 + ["sub-02"] * 2
    assert rows["session_id"].tolist() == ["ses-1"] * 2 + ["ses-2"] * 2 + ["ses-1"] * 2


def test_axis_order_does_not_matter(evaluate, tmp_path):
    array = labels(1, 2, grow=2)
    turn = orientations.ornt_transform(*map(orientations.axcodes2ornt, ("RAS", "PIL")))
    turned = nib.Nifti1Image(array, AFFINE).as_reoriented(turn)
    turned.to_filename(tmp_path / "turned.nii.gz")
    code, _, _ = evaluate(write(tmp_path / "a.nii.gz", array), tmp_path / "turned.nii.gz")
    assert code == 0
    assert read(tmp_path, "overlap")["dice"].tolist() == [1, 1]


def test_scans_that_a_network_has_seen_are_named(evaluate, tmp_path):
    first = dataset(tmp_path / "first", {"sub-01": labels(1), "sub-02": labels(1)})
    second = dataset(tmp_path / "second", {"sub-01": labels(1), "sub-02": labels(1)})
    (dseg,) = second.rglob("sub-02*_dseg.nii.gz")
    record = {"settings": {"trained_on_map": True, "correction": "sub-02_desc-manual_dseg.nii.gz"}}
    dseg.with_name(dseg.name.replace("dseg.nii.gz", "qc.json")).write_text(json.dumps(record))
    code, out, _ = evaluate(first, second)
    assert code == 0
    assert "note: second: trained on sub-02, whose agreement is better than that of other scans" in out
    assert "note: second: corrected by hand: sub-02; derivatives/automatic has the automatic labels" in out


def test_unmatched_scans_and_nuclei_are_notes(evaluate, tmp_path):
    first = dataset(tmp_path / "first", {"sub-01": labels(1, 9), "sub-02": labels(1, 2)})
    second = dataset(tmp_path / "second", {"sub-01": labels(1), "sub-03": labels(1)}, {1: "DN_L", 5: "RN_L"})
    code, out, _ = evaluate(first, second)
    assert code == 0
    assert out.splitlines()[:5] == [
        "note: first: no partner in second for sub-02; left out",
        "note: second: no partner in first for sub-03; left out",
        "note: first: label(s) 9 without a row in the label table; ignored",
        "note: first: lacks RN_L, which second has; not compared",
        "note: second: lacks DN_R, which first has; not compared",
    ]
    assert read(tmp_path, "overlap")["abbreviation"].tolist() == ["DN_L"]


def test_files_on_different_grids_are_an_error(evaluate, tmp_path):
    first, second = write(tmp_path / "a.nii.gz", labels(1)), write(tmp_path / "b.nii.gz", labels(1, size=14))
    code, _, err = evaluate(first, second)
    assert code == 2
    assert "b.nii.gz is not on the same grid as a.nii.gz (shape (12, 12, 6) differs" in err
    assert "resample one of them first" in err
    assert not (tmp_path / "out").exists()


def moved(affine: np.ndarray) -> np.ndarray:
    return np.asarray(affine + np.outer([0, 0, 3.0, 0], [0, 0, 0, 1]))


def test_scan_on_another_grid_fails_alone(evaluate, tmp_path):
    first, second = (dataset(tmp_path / name, grown(5)) for name in ("first", "second"))
    write(second / "sub-05/anat/sub-05_seg-x_dseg.nii.gz", labels(1, 2), moved(AFFINE))
    code, out, _ = evaluate(first, second)
    assert code == 1
    assert "failed: sub-05: sub-05_seg-x_dseg.nii.gz" in out
    assert "corners are 3 mm apart" in out
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["failures"]
    assert "sub-05" not in set(read(tmp_path, "overlap")["scan"])
    row = row_of(tmp_path, "agreement", quantity="volume_mm3", abbreviation="DN_L")
    # 3 x (3 + grow) x 2 voxels of 2 mm3, grow from 0 to 3; the fifth is 84 mm3 in one and 36 in the other
    assert (row["n"], row["n_missing"], row["bias"], row["mean_reference"]) == (4, 1, 0, (36 + 48 + 60 + 72) / 4)


def test_raters_are_compared_pairwise(evaluate, tmp_path):
    for rater in "abcd":
        root = dataset(tmp_path / rater, grown(4))
        if rater in "cd":  # on the same grid, which is not that of a and b
            write(root / "sub-04/anat/sub-04_seg-x_dseg.nii.gz", labels(1, 2), moved(AFFINE))
    assert evaluate(*(tmp_path / rater for rater in "abcd"), "--raters")[0] == 1
    table = read(tmp_path, "agreement").query("quantity == 'volume_mm3' and abbreviation == 'DN_L'")
    counts = {(row["reference"], row["prediction"]): row["n"] for _, row in table.iterrows()}
    assert counts == {("a", "b"): 4, ("c", "d"): 4, **{(first, other): 3 for first in "ab" for other in "cd"}}
    assert not (tmp_path / "out/methods.tsv").exists()


def test_maps_give_mean_susceptibilities(evaluate, tmp_path):
    # The longer box has 6 of 24 voxels at 20 ppb instead of 100 ppb.
    scans = [f"sub-0{number}" for number in range(1, 4)]
    first = dataset(tmp_path / "first", dict.fromkeys(scans, labels(1, 2)))
    second = dataset(tmp_path / "second", dict.fromkeys(scans, labels(1, 2, grow=1)), seg="y")
    chi = np.random.default_rng(0).normal(0, 20, (12, 12, 6)).astype(np.float32)
    chi[labels(1, 2, grow=1) == 1], chi[labels(1, 2) == 1] = 20, 100
    for scan in scans:
        path = write(tmp_path / "maps" / scan / "anat" / f"{scan}_Chimap.nii.gz", chi)
        path.with_name(f"{scan}_Chimap.json").write_text('{"Units": "ppb"}')
    code, _, _ = evaluate(first, second, "--chi", tmp_path / "maps")
    assert code == 0
    row = row_of(tmp_path, "agreement", quantity="mean_ppm", abbreviation="DN_L")
    assert row["mean_reference"] == pytest.approx(0.1)
    assert row["mean_prediction"] == pytest.approx(0.08)
    assert read(tmp_path, "overlap")["mean_prediction_ppm"].iloc[0] == pytest.approx(0.08)


def test_labels_beyond_the_brain_mask_do_not_count_its_zeros(evaluate, tmp_path):
    first, second = (write(tmp_path / f"{name}_dseg.nii.gz", labels(1, 2)) for name in "ab")
    chi = np.random.default_rng(0).normal(0, 0.02, (12, 12, 6)).astype(np.float32)
    chi[labels(1, 2) == 1] = 0.1
    chi[:, :4] = 0  # the mask ends inside of DN_L, which begins at y = 2
    assert evaluate(first, second, "--chi", write(tmp_path / "chi.nii.gz", chi))[0] == 0
    row = row_of(tmp_path, "overlap", abbreviation="DN_L")
    assert row["mean_reference_ppm"] == pytest.approx(0.1)  # with the zeros a third of it


@pytest.fixture
def aged(tmp_path):
    """Ten controls and ten patients: DN_L has 0.1 (1 - exp(-0.05 age)) + 0.02 ppm, in patients 0.05 more.

    The predicted DN_L is larger by a third, where there is 0 ppm, so that its mean is 0.75 of the true one.
    """
    ages, scans = np.tile(np.linspace(10, 82, 10), 2), [f"sub-{number:02d}" for number in range(1, 21)]
    groups = ["HC"] * 10 + ["PD"] * 10
    reference = dataset(tmp_path / "ds/derivatives/manual", dict.fromkeys(scans, labels(1, 2)))
    prediction = dataset(tmp_path / "found", dict.fromkeys(scans, labels(1, 2, grow=1)))
    random = np.random.default_rng(0)
    for scan, age, group in zip(scans, ages, groups, strict=True):
        chi = random.normal(0, 0.02, (12, 12, 6)).astype(np.float32)
        chi[labels(1, 2, grow=1) == 1] = 0
        chi[labels(1, 2) == 1] = 0.1 * (1 - np.exp(-0.05 * age)) + 0.02 + 0.05 * (group == "PD")
        write(tmp_path / f"ds/{scan}/anat/{scan}_Chimap.nii.gz", chi)
    rows = "".join(f"{row[0]}\t{row[1]}\t{row[2]}\n" for row in zip(scans, ages, groups, strict=True))
    (tmp_path / "ds/participants.tsv").write_text(f"participant_id\tage\tgroup\n{rows}")
    return reference, prediction, "--chi", tmp_path / "ds"


def parameters(tmp_path, scans):
    rows = read(tmp_path, "ageing").query("abbreviation == 'DN_L' and scans == @scans").set_index("labels")
    assert (rows["n"] == 10).all()
    return rows.loc[["manual", "found"], ["alpha", "beta_per_year", "gamma"]].to_numpy()


def test_age_curves_are_fitted_to_reference_and_prediction(evaluate, tmp_path, aged):
    assert evaluate(*aged, "--controls", "HC")[0] == 0
    expected = [[0.1, 0.05, 0.02], [0.075, 0.05, 0.015]]
    np.testing.assert_allclose(parameters(tmp_path, "controls"), expected, rtol=1e-3)
    assert set(read(tmp_path, "ageing")["scans"]) == {"controls"}
    page = (tmp_path / "out/evaluate.html").read_text()
    assert "Susceptibility over age, controls" in page
    assert (tmp_path / "out/figures/manual_found_age_controls.png").is_file()


def test_age_curves_do_not_pool_groups(evaluate, tmp_path, aged):
    code, _, error = evaluate(*aged, "--controls", "XX")
    assert code == 2
    assert "XX" in error
    assert evaluate(*aged)[0] == 0
    for scans, more_ppm in (("group HC", 0), ("group PD", 0.05)):
        expected = np.array([[0.1, 0.05, 0.02 + more_ppm], [0.075, 0.05, 0.75 * (0.02 + more_ppm)]])
        np.testing.assert_allclose(parameters(tmp_path, scans), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--controls", "HC"], "--controls: no participants.tsv found, or no sub- in the names"),
        (["--participants", "first"], "--participants first: participants.tsv not found; pass the dataset that has it"),
    ],
)
def test_age_curves_need_participants(evaluate, tmp_path, same, options, message):
    code, _, err = evaluate(*same, *(str(tmp_path / name) if name == "first" else name for name in options))
    assert code == 2
    assert message in err


def test_predictions_are_compared_with_each_other(evaluate, tmp_path):
    scans = grown(5)
    truth = dataset(tmp_path / "truth", scans)
    close = dataset(tmp_path / "close", {name: np.roll(array, 1, 1) for name, array in scans.items()})
    far = dataset(tmp_path / "far", {name: np.roll(array, 2, 1) for name, array in scans.items()})
    assert evaluate(truth, close, far)[0] == 0
    row = row_of(tmp_path, "methods", measure="centre_distance_mm", abbreviation="DN_L")
    assert (row["first"], row["second"]) == ("close", "far")
    assert (row["mean_first"], row["mean_second"], row["mean_difference"]) == (1, 2, 1)
    assert row_of(tmp_path, "raters", abbreviation="DN_L")["icc21"] == 1


def test_one_of_several_segmentations_can_be_chosen(evaluate, tmp_path):
    truth = dataset(tmp_path / "truth", {"sub-01": labels(1, 2)})
    both = dataset(tmp_path / "both", {"sub-01": labels(1, 2)}, seg="a")
    dataset(both, {"sub-01": labels(1)}, seg="b")
    assert evaluate(truth, both)[0] == 2
    assert evaluate(truth, both, "--choose", "seg-b")[0] == 0
    assert read(tmp_path, "overlap")["dice"].tolist() == [1, 0]


def test_every_table_of_the_run_has_a_dictionary(evaluate, tmp_path):
    roots = [dataset(tmp_path / name, {"sub-01": labels(1, 2)}) for name in "abc"]
    assert evaluate(*roots)[0] == 0
    tables = sorted((tmp_path / "out").glob("*.tsv"))
    assert [table.stem for table in tables] == ["agreement", "methods", "overlap", "overlap_summary", "raters"]
    for table in tables:
        assert list(json.loads(table.with_suffix(".json").read_text())) == list(pd.read_csv(table, sep="\t"))
    assert evaluate(*roots[:2])[0] == 0  # removes what it does not write
    assert not list((tmp_path / "out").glob("raters.*"))


@pytest.mark.figures
def test_page_is_self_contained(evaluate, tmp_path):
    first = dataset(tmp_path / "first", grown(4))
    second = dataset(tmp_path / "second <b>", grown(4, places=2))
    assert evaluate(first, second)[0] == 0
    page = (tmp_path / "out/evaluate.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count('src="data:image/png;base64,') == 2  # overlap and volumes
    assert 'src="http' not in page
    assert "second &lt;b&gt; against first" in page
    (figure,) = (tmp_path / "out" / "figures").glob("first_second-b-_overlap-*.png")  # with a checksum of the name
    for link in ("overlap.tsv", "evaluation.json", f"figures/{figure.name}"):
        assert f'href="{link}"' in page
        assert (tmp_path / "out" / link).is_file()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("nowhere", "nowhere: no such file or folder; check the path"),
        ("a.nii.gz", "a.nii.gz: a file cannot be compared with folders; pass only files, or only datasets"),
        ("empty", r"no _dseg.nii[.gz] files in sub-X folders; pass the root directory of a dataset with them"),
        ("strangers", "first: no scan in common with strangers; check the entities in the names"),
        ("thalami", "first: no nucleus in common with thalami (first: lacks THA_L, which thalami has; not compared); "),
        ("halves", "contains 0.5, expected integers; provide a label image (dseg)"),
    ],
)
def test_input_that_cannot_be_compared_is_an_error(evaluate, tmp_path, other, message):
    first = dataset(tmp_path / "first", {"sub-01": labels(1, 2)})
    write(tmp_path / "a.nii.gz", labels(1))
    (tmp_path / "empty").mkdir()
    dataset(tmp_path / "strangers", {"sub-99": labels(1, 2)})
    dataset(tmp_path / "thalami", {"sub-01": labels(1)}, {1: "THA_L"})
    dataset(tmp_path / "halves", {"sub-01": labels(1, 2).astype(np.float32) / 2})
    code, _, err = evaluate(first, tmp_path / other)
    assert code == 2
    assert err.startswith("dgmseg evaluate: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_values_of_all_nuclei_are_pooled(evaluate, tmp_path):
    reference = dataset(tmp_path / "truth", grown(3))
    prediction = dataset(tmp_path / "found", {f"sub-0{number}": labels(1, 2, grow=1) for number in (1, 2, 3)})
    assert evaluate(reference, prediction, "--bilateral")[0] == 0
    # mm3: DN_L 36, 48, 60 and 48, 48, 48; DN_R 36 in both. All have the mean 42, and their deviations (in 6 mm3)
    # -1 1 3 -1 -1 -1 and 1 1 1 -1 -1 -1: r = 6 / sqrt(14 * 6). Differences 12, 0, -12, 0, 0, 0.
    row = row_of(tmp_path, "agreement", quantity="volume_mm3", abbreviation="all")
    assert (row["n"], row["mean_reference"], row["mean_prediction"], row["bias"]) == (6, 42, 42, 0)
    assert row["pearson_r"] == pytest.approx(6 / 84**0.5, abs=1e-6)
    assert row["loa_upper"] == pytest.approx(1.959964 * (288 / 5) ** 0.5, abs=1e-4)
    assert (row["sd_reference"], row["sd_prediction"]) == pytest.approx(((36 * 14 / 5) ** 0.5, (36 * 6 / 5) ** 0.5))
    assert np.isnan([row["t_p"], row["wilcoxon_p"], row["t_p_holm"], row["pearson_r_p"], row["icc21_p"]]).all()
    assert "all" not in set(read(tmp_path, "overlap")["abbreviation"])
    assert '"bilateral": true' in (tmp_path / "out" / "evaluation.json").read_text()


def test_both_sides_are_compared_together(evaluate, tmp_path):
    reference = dataset(tmp_path / "truth", {"sub-01": labels(1, 2)})
    prediction = dataset(tmp_path / "found", {"sub-01": labels(31, 30, grow=1)}, {30: "DN_R", 31: "DN_L"})
    chi = write(tmp_path / "sub-01_Chimap.nii.gz", np.where(labels(1, 2) == 1, 0.1, 0.04))
    maps = tmp_path / "maps" / "sub-01" / "anat"
    maps.mkdir(parents=True)
    chi.rename(maps / chi.name)
    assert evaluate(reference, prediction, "--bilateral", "--chi", tmp_path / "maps")[0] == 0
    # 36 voxels of 2 mm3 against 36 + 6
    row = row_of(tmp_path, "overlap", abbreviation="DN")
    assert (row["n_reference"], row["n_prediction"], row["volume_prediction_mm3"]) == (36, 42, 84)
    assert row["dice"] == pytest.approx(72 / 78, abs=1e-6)
    assert (row["mean_reference_ppm"], row["mean_prediction_ppm"]) == pytest.approx((0.07, (1.8 + 24 * 0.04) / 42))
    assert evaluate(reference, prediction)[0] == 0
    assert set(read(tmp_path, "overlap")["abbreviation"]) == {"DN_L", "DN_R"}


def test_nucleus_that_the_reference_lacks_is_not_scored(evaluate, tmp_path):
    reference = dataset(tmp_path / "truth", {"sub-01": labels(1, 2), "sub-02": labels(0, 2)})
    prediction = dataset(tmp_path / "found", dict.fromkeys(("sub-01", "sub-02"), labels(1, 2)))
    assert evaluate(reference, prediction)[0] == 0
    assert row_of(tmp_path, "overlap_summary", abbreviation="DN_L", measure="dice")["mean"] == 1
    row = row_of(tmp_path, "overlap", scan="sub-02", abbreviation="DN_L")
    assert np.isnan([row["dice"], row["volume_similarity"], row["volume_difference_mm3"]]).all()
    assert (row["n_reference"], row["volume_reference_mm3"]) == (0, 0)
    assert row_of(tmp_path, "overlap", scan="sub-02", abbreviation="DN_R")["dice"] == 1
