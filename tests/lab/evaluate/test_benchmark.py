"""The model benchmark on phantoms, with models that need no weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_json
from bids_dgmseg.lab.evaluate import multi_atlas, timed_segmentation
from bids_dgmseg.lab.evaluate.benchmark import (
    Candidate,
    benchmark,
    check_candidates,
    find_test_set,
    parse_candidates,
    segment_scan,
)
from bids_dgmseg.lab.evaluate.timed_segmentation import SegmentationJob
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from tests.conftest import start_dataset, write_map
from tests.segmentation.nnunet_folders import write_folder

pytestmark = pytest.mark.figures

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
TABLE = ["index\tname\tabbreviation", *(f"{row.index}\t{row.name}\t{row.abbreviation}" for row in STRUCTURES)]
TALL = {"sub-01": 4, "sub-02": 6, "sub-03": 5}
"""Voxels of DN_L along y."""


def boxes(long: int, *, right: bool = True) -> np.ndarray:
    """DN_L of 3 x `long` x 2 voxels of 2 mm3, DN_R of 3 x 3 x 2."""
    array = np.zeros((12, 12, 6), np.uint8)
    array[1:4, 2 : 2 + long, 1:3] = 1
    array[7:10, 2:5, 1:3] = 2 * right
    return array


def write_labels(path: Path, array: np.ndarray, names: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, AFFINE).to_filename(path)
    rows = [row for row in TABLE if row.split("\t")[-1] in ("abbreviation", *names)]
    path.with_name(path.name.replace(".nii.gz", ".tsv")).write_text("\n".join(rows))


def write_dataset(root: Path) -> Path:
    """Write three maps whose value is 0.1 ppm in the labels' DN_L and 0.02 ppm elsewhere."""
    start_dataset(root)
    for scan, long in TALL.items():
        labels = boxes(long)
        write_map(root, scan, Volume(np.where(labels == 1, 0.1, 0.02).astype(np.float32), AFFINE))
        truth = root / "derivatives/truth" / scan / "anat" / f"{scan}_seg-truth_dseg.nii.gz"
        write_labels(truth, labels, ("DN_L", "DN_R"))
    start_dataset(root / "derivatives/truth")
    return root


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "ds")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Two models: one makes DN_L a voxel longer, one also has RN_L and fails in the third scan."""
    root = tmp_path_factory.mktemp("compared")
    dataset, out, costs = write_dataset(root / "ds"), root / "out", []
    for model, names in (("long", ("DN_L", "DN_R")), ("two", ("DN_L", "RN_L"))):
        for number, (scan, tall) in enumerate(TALL.items(), start=1):
            folder = out / "predictions" / model / scan / "anat"
            failed = model == "two" and number == 3
            if not failed:
                array = boxes(tall + 1) if model == "long" else boxes(tall, right=False)
                write_labels(folder / f"{scan}_seg-{model}_dseg.nii.gz", array, names)
            spent = {"seconds": 10.0 * number, "cpu_seconds": 1.0 * number, "peak_mb": 100.0 * number}
            cost = folder / f"{scan}_seg-{model}_cost.json"
            write_json({"model": model, "scan": scan, **({"problem": "no brain found"} if failed else spent)}, cost)
            costs.append(cost)
    candidates = [Candidate("long", "dgm16"), Candidate("two", "dgm16", root / "weights")]
    return benchmark(candidates, find_test_set(dataset, warn=print), costs, out), out


def read(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / f"{name}.tsv", sep="\t", na_values=["n/a"])


def row_of(table: pd.DataFrame, **named: object) -> Any:
    for key, value in named.items():
        table = table[table[key] == value]
    (row,) = (row for _, row in table.iterrows())
    return row


def test_summary_has_one_row_per_model_and_nucleus(outcome):
    summary = read(outcome[1], "summary")
    assert summary[["model", "abbreviation", "n"]].to_numpy().tolist() == [
        ["long", "DN_L", 3],
        ["long", "DN_R", 3],
        ["two", "DN_L", 2],
        ["two", "RN_L", 0],
    ]
    long = row_of(summary, model="long", abbreviation="DN_L")
    # With length n in y: Dice 2 n / (2 n + 1); the far surface lies 1 mm further; 6 voxels of 2 mm3 more.
    assert long["dice"] == pytest.approx((8 / 9 + 12 / 13 + 10 / 11) / 3)
    assert (long["hausdorff_mm"], long["centre_distance_mm"], long["volume_mm3_bias"]) == (1, 0.5, 12)
    assert long["volume_mm3_pearson_r"] == pytest.approx(1)
    # Differences are equal, so that ICC(2,1) is MS_t / (MS_t + 2 MS_r / n) with MS_t = 2 * 144, MS_r = 1.5 * 144.
    assert long["volume_mm3_icc21"] == pytest.approx(288 / (288 + 2 * 216 / 3))
    # The mean under the longer label is (0.1 n + 0.02) / (n + 1).
    expected = np.mean([(0.1 * n + 0.02) / (n + 1) for n in TALL.values()])
    assert long["mean_ppm_mean_prediction"] == pytest.approx(expected)
    assert row_of(summary, model="two", abbreviation="RN_L").drop(["model", "abbreviation", "n"]).isna().all()


def test_bilateral_rows_are_added(outcome, dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(outcome[1] / "predictions", out / "predictions")
    costs = sorted((out / "predictions").rglob("*_cost.json"))
    candidates = [Candidate("long", "dgm16"), Candidate("two", "dgm16")]
    benchmark(candidates, find_test_set(dataset, bilateral=True, warn=print), costs, out)
    row = row_of(read(out, "summary"), model="long", abbreviation="DN")
    # DN_L has 6 n voxels and 6 (n + 1) in the prediction, DN_R 18: Dice 2 (6 n + 18) / (12 n + 6 + 36).
    assert row["dice"] == pytest.approx(np.mean([(2 * n + 6) / (2 * n + 7) for n in TALL.values()]))
    pd.testing.assert_frame_equal(read(out, "models"), read(outcome[1], "models"))  # means of single sides


def test_failed_scans_are_counted(outcome):
    models: Any = read(outcome[1], "models").set_index("model")
    assert models.loc["two", ["n_scans", "n_failed", "n_nuclei", "n_compared"]].tolist() == [2, 1, 2, 1]
    assert models.loc["two", ["dice", "seconds", "cpu_seconds", "peak_mb"]].tolist() == [1, 15, 1.5, 200]
    assert models.loc["long", ["seconds", "peak_mb", "n_failed"]].tolist() == [20, 300, 0]
    assert outcome[0] == ["two: sub-03: no brain found"]
    failed = row_of(read(outcome[1], "comparison"), model="two", scan="sub-03")
    assert failed["problem"] == "no brain found"
    assert failed["participant_id"] == "sub-03"
    assert np.isnan(failed["dice"])


def test_comparison_has_measures_and_cost_per_scan(outcome):
    row = row_of(read(outcome[1], "comparison"), model="long", scan="sub-02", abbreviation="DN_R")
    assert (row["dice"], row["volume_reference_mm3"], row["seconds"], row["peak_mb"]) == (1, 36, 20, 200)
    tests = read(outcome[1] / "evaluation", "methods")
    assert set(tests["abbreviation"]) == {"DN_L"}  # the only nucleus of both models and the labels


def test_costs_match_labels_with_their_own_desc(tmp_path):
    root, out, costs = tmp_path / "ds", tmp_path / "out", []
    start_dataset(root)
    start_dataset(root / "derivatives/truth")
    results: dict[str, dict[str, Any]] = {
        "sub-01_ses-1": {"seconds": 7.0},
        "sub-02_ses-1": {"problem": "no brain found"},
    }
    for scan, result in results.items():
        folder = f"{scan.replace('_', '/')}/anat"
        write_map(root, scan, Volume(np.full((12, 12, 6), 0.1, np.float32), AFFINE))
        write_labels(root / "derivatives/truth" / folder / f"{scan}_desc-manual_dseg.nii.gz", boxes(3), ("DN_L",))
        automatic = root / "derivatives/truth" / folder / f"{scan}_seg-dgm16_dseg.nii.gz"  # beside it, no reference
        write_labels(automatic, boxes(5), ("DN_L",))
        if "seconds" in result:
            write_labels(out / "predictions/long" / folder / f"{scan}_seg-long_dseg.nii.gz", boxes(3), ("DN_L",))
        cost = out / "predictions/long" / folder / f"{scan}_seg-long_cost.json"
        costs.append(write_json({"model": "long", "scan": scan, **result}, cost))
    benchmark([Candidate("long", "dgm16")], find_test_set(root, warn=print), costs, out)
    table = read(out, "comparison")
    assert table["scan"].tolist() == ["sub-01_ses-1_desc-manual", "sub-02_ses-1_desc-manual"]
    assert table[["participant_id", "session_id"]].to_numpy().tolist() == [["sub-01", "ses-1"], ["sub-02", "ses-1"]]
    assert table[["dice", "seconds"]].to_numpy().tolist()[0] == [1, 7]
    assert table[["dice", "seconds"]].iloc[1].isna().all()
    assert table["problem"].tolist()[1] == "no brain found"


def test_tables_have_dictionaries_and_the_page_figures(outcome):
    out = outcome[1]
    for name in ("models", "summary", "comparison"):
        dictionary = json.loads((out / f"{name}.json").read_text())
        assert list(dictionary) == list(read(out, name))
        assert all(entry["Description"] for entry in dictionary.values())
    units = {name: entry.get("Units") for name, entry in json.loads((out / "summary.json").read_text()).items()}
    assert [units[name] for name in ("volume_mm3_bias", "hd95_mm_sd", "mean_ppm_icc21")] == ["mm^3", "mm", None]
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2
    assert "two: sub-03: no brain found" in page
    for link in ("figures/overlap.png", "figures/costs.png", "evaluation/evaluate.html", "summary.tsv"):
        assert f'href="{link}"' in page
        assert (out / link).is_file()


def test_candidates_are_keys_with_folders(tmp_path):
    tuned, atlases = tmp_path / "my-tuned", tmp_path / "atlases"
    for folder in (tuned, atlases):
        folder.mkdir()
    found = parse_candidates(["default", f"dgm16={tuned}", "dcnnet"], atlases=atlases)
    assert [(one.name, one.model, one.weights) for one in found] == [
        ("dgm16", "dgm16", None),
        ("dgm16mytuned", "dgm16", tuned),
        ("dcnnet", "dcnnet", None),
        ("multiatlas", "multiatlas", atlases),
    ]
    assert [one.name for one in parse_candidates(["multiatlasjoint"], atlases=atlases)] == ["multiatlasjoint"]
    # a folder with another network than that of the model is named with the folder, also alone
    (tuned / "model.toml").write_text('model = "dcnnet"\nheads = [["DN", "IN"]]\n')
    assert [one.name for one in parse_candidates([f"dcnnet={tuned}"])] == ["dcnnet"]
    with (tuned / "model.toml").open("a") as file:
        file.write('network = "bids_dgmseg.networks.plain_unet:PlainUNet"\n')
    assert [one.name for one in parse_candidates([f"dcnnet={tuned}"])] == ["dcnnetmytuned"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["unet"], "`model` unet: no such model; choose from default, "),
        (["dgm16", "default"], "default: two models would be named dgm16; rename a folder of weights"),
        (["dgm16=nowhere"], "nowhere: no such folder; check the folder passed for dgm16"),
        (["multiatlas"], "multiatlas: no atlases; pass a labelled dataset as `atlases`"),
    ],
)
def test_invalid_candidate_is_an_error(given, message):
    with pytest.raises(InputError, match=message):
        parse_candidates(given)


@pytest.fixture
def foreign(tmp_path):
    """An nnU-Net folder with other names of the labels, and the table that maps them."""
    folder = write_folder(
        tmp_path / "foreign",
        labels={"background": 0, "sinister": 1, "dexter": 2},
        patch_size=[32, 32, 32],
        spacing=[5.0, 5.0, 5.0],
    )
    table = tmp_path / "map.tsv"
    table.write_text("label\tabbreviation\nsinister\tRN_L\n2\tRN_R\n")
    return folder, table


def test_label_map_is_only_for_nnunet(foreign):
    folder, table = foreign
    own, other = parse_candidates(["dgm16", f"nnunet2step={folder}"], label_map=table)
    assert (own.label_map, other.registered.labels) == (None, ("RN_L", "RN_R"))
    with pytest.raises(InputError, match=r"`label_map` map.tsv: no model uses one; add nnunet2step=FOLDER"):
        parse_candidates(["dgm16"], label_map=table)


def run_isolated(folder: Path, chi: Path, model: str, **options: Any) -> int:
    """Segment a map as the isolated process does, into ``dseg.nii.gz`` and ``cost.json``."""
    files = {"chi": str(chi), "out": str(folder / "dseg.nii.gz"), "cost": str(folder / "cost.json")}
    job = {**files, "sidecar": {"Units": "ppm"}, "model": model, "weights": None, **options}
    return timed_segmentation.main([str(write_json(job, folder / "request.json"))])


def test_timed_segmentation_uses_the_label_map(bids_dataset, foreign, tmp_path):
    folder, table = foreign
    chi = bids_dataset("sub-01") / "sub-01/anat/sub-01_Chimap.nii.gz"
    assert run_isolated(tmp_path, chi, "nnunet2step", weights=str(folder), label_map=str(table)) == 0
    rows = (tmp_path / "dseg.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[2] for row in rows] == ["RN_L", "RN_R"]


@pytest.mark.parametrize("linked", [False, True])
def test_own_labels_are_no_atlas_whatever_the_path(dataset, tmp_path, monkeypatch, linked):
    used: list[str] = []

    def segment(chi, atlases, *arguments, **options):
        used.extend(atlas.name for atlas in atlases)
        raise InputError("enough")

    monkeypatch.setattr(multi_atlas, "segment_by_atlases", segment)
    (tmp_path / "link").symlink_to(dataset, target_is_directory=True)
    chi = tmp_path / "link/sub-01/anat/sub-01_Chimap.nii.gz"
    if linked:  # the content lies in a store outside the dataset
        chi.symlink_to(chi.rename(tmp_path / "content.nii.gz"))
    run_isolated(tmp_path, chi, "multiatlas", weights=str(dataset), holdout=["02"])
    assert used
    assert not {"sub-01", "sub-02"} & set(used)


def test_scan_is_segmented_once(dataset, tmp_path, monkeypatch):
    calls: list[int] = []

    def run(self, folder):
        calls.append(self.threads)
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        write_labels(Path(self.out), boxes(3), ("DN_L",))
        write_json({"seconds": 1.0}, Path(self.cost))
        return {"seconds": 1.0}

    monkeypatch.setattr(SegmentationJob, "run", run)
    scan = find_test_set(dataset, warn=print).scans[0]
    for threads in (1, 1, 2):  # two threads change the times
        cost = segment_scan(Candidate("dgm16", "dgm16"), scan, tmp_path / "out", device="cpu", threads=threads)
    assert calls == [1, 2]
    assert cost == tmp_path / "out/predictions/dgm16/sub-01/anat/sub-01_seg-dgm16_cost.json"


def test_unusable_labels_are_an_error(dataset):
    other = dataset / "derivatives/other/sub-04/anat"
    write_map(dataset, "sub-04", Volume(np.full((12, 12, 6), 0.1, np.float32), AFFINE))
    write_labels(other / "sub-04_dseg.nii.gz", boxes(3), ("DN_L",))
    with pytest.raises(InputError, match=r"ds: labels in several datasets \(other, truth\); move them into one$"):
        find_test_set(dataset, warn=print)
    shutil.rmtree(dataset / "derivatives/other")
    rename(dataset, DN_L="hippocampus", DN_R="cortex")
    with pytest.raises(InputError, match=r"ds: none of the labels that can be read is a nucleus \(DN_L, DN_R, …\)"):
        find_test_set(dataset, warn=print)


def test_labels_that_are_not_nuclei_are_one_warning(dataset):
    folder, warnings = dataset / "derivatives/truth", list[str]()
    for path in folder.rglob("*.tsv"):
        path.unlink()
    rows = ["index\tabbreviation", "1\tDN_L", "2\tDN_RIGHT", "3\tDN_R", "4\thippocampus"]
    (folder / "dseg.tsv").write_text("\n".join(rows))
    for number, path in enumerate(sorted(folder.rglob("*_dseg.nii.gz")), start=2):  # 2, 3, 4 instead of 2
        labels = boxes(3)
        labels[labels == 2] = number
        labels[0, 0, 0] = 9
        nib.Nifti1Image(labels, AFFINE).to_filename(path)
    find_test_set(dataset, warn=warnings.append)
    assert warnings == [
        "dseg.tsv: 2 (DN_RIGHT), 4 (hippocampus), 9 (without a row) not among the nuclei of structures.tsv "
        "(DN_L, DN_R, …); ignored"
    ]


def rename(dataset: Path, **names: str) -> None:
    """Rename labels of a dataset in its label tables."""
    for path in (dataset / "derivatives/truth").rglob("*_dseg.tsv"):
        (header, *rows) = [row.split("\t") for row in path.read_text().splitlines()]
        named = [[index, "", names.get(abbreviation, abbreviation)] for index, _, abbreviation in rows]
        path.write_text("\n".join("\t".join(row) for row in [header, *named]))


@pytest.fixture
def atlases(dataset, tmp_path):
    """A copy of the dataset, to change its labels."""
    return Path(shutil.copytree(dataset, tmp_path / "library"))


def check(dataset: Path, atlases: Path) -> list[str]:
    warnings: list[str] = []
    candidates = parse_candidates(["multiatlas"], atlases=atlases)
    check_candidates(candidates, test_set=find_test_set(dataset, warn=print), device="cpu", warn=warnings.append)
    return [line for line in warnings if "dseg" in line or "no nucleus" in line]


def test_atlas_labels_that_are_not_nuclei_are_warnings(dataset, atlases):
    assert check(dataset, atlases) == []
    rename(atlases, DN_R="hippocampus")
    tables = [f"sub-0{number}_seg-truth_dseg.tsv" for number in (1, 2, 3)]
    assert check(dataset, atlases) == [
        f"atlases: {table}: 2 (hippocampus) not among the nuclei of multiatlas; ignored" for table in tables
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cortex", r"library: no label is a nucleus of multiatlas \(DN_L, .*; use these"),
        ("RN_L", "library: atlases of RN_L, but the scans have DN_L, DN_R; use atlases"),
    ],
)
def test_atlases_without_a_common_nucleus_are_an_error(dataset, atlases, name, message):
    rename(atlases, DN_L=name, DN_R="hippocampus")
    with pytest.raises(InputError, match=f"^{message}"):
        check(dataset, atlases)


def test_timed_segmentation_reports_the_problem(dataset, tmp_path):
    scan = find_test_set(dataset, warn=print).scans[0]  # 864 voxels of 2 mm3
    cost = segment_scan(Candidate("dgm16", "dgm16"), scan, tmp_path / "out", device="cpu", threads=1)
    assert json.loads(cost.read_text())["problem"] == "no brain found (2 mL); check that the map shows a head, in ppm"
    assert not list((tmp_path / "out").rglob("*_dseg.nii.gz"))


def test_timed_segmentation_keeps_the_grid_of_the_map(bids_dataset, oracle, tmp_path):
    root = bids_dataset("sub-01")
    chi = root / "sub-01/anat/sub-01_Chimap.nii.gz"
    assert run_isolated(tmp_path, chi, oracle.name) == 0
    image = nib.Nifti1Image.from_filename(tmp_path / "dseg.nii.gz")
    np.testing.assert_array_equal(image.affine, nib.Nifti1Image.from_filename(chi).affine)
    assert set(np.unique(image.dataobj)) == {0, *(row.index for row in STRUCTURES)}
    assert (tmp_path / "dseg.tsv").read_text().count("\n") == 1 + len(STRUCTURES)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert set(cost) == {"seconds", "cpu_seconds", "peak_mb"}
    assert cost["peak_mb"] > 50
    assert cost["seconds"] > 0


def test_atlases_exclude_the_participant_itself(bids_dataset, tmp_path, monkeypatch):
    root = bids_dataset("sub-01", "sub-02")
    chi = nib.Nifti1Image.from_filename(root / "sub-01/anat/sub-01_Chimap.nii.gz")
    labels = np.zeros(chi.shape, np.uint8)
    labels[20:23, 20:23, 20:23] = 1
    for scan in ("sub-01", "sub-02"):
        path = root / f"derivatives/truth/{scan}/anat/{scan}_dseg.nii.gz"
        path.parent.mkdir(parents=True)
        nib.Nifti1Image(labels, chi.affine).to_filename(path)
    seen: list[str] = []

    def remember(chi, atlases, model, *, fuse):
        seen.extend(atlas.name for atlas in atlases)
        raise InputError("enough")

    monkeypatch.setattr("bids_dgmseg.lab.evaluate.multi_atlas.segment_by_atlases", remember)
    assert run_isolated(tmp_path, root / "sub-02/anat/sub-02_Chimap.nii.gz", "multiatlas", weights=str(root)) == 1
    assert seen == ["sub-01"]
    assert MODELS.keys().isdisjoint({"multiatlas", "multiatlasjoint"})  # not available without atlases
