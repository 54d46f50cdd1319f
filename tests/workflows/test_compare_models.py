"""The workflow of the model benchmark, on phantoms and with the oracle."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.image.grids import Box
from bids_dgmseg.io.files import write_json
from bids_dgmseg.lab.evaluate import timed_segmentation
from bids_dgmseg.lab.evaluate.timed_segmentation import SegmentationJob
from bids_dgmseg.lab.train.splits import split_by_site
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.demo import DemoScan, write_demo
from bids_dgmseg.segmentation.postprocess import label_grid
from bids_dgmseg.segmentation.records import Location, ProbabilityBlock
from bids_dgmseg.segmentation.segment import SegmentedMap
from tests.conftest import start_dataset
from tests.oracle import oracle_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two coarse phantoms with their labels."""
    root = tmp_path_factory.mktemp("compare") / "ds"
    list(write_demo(root, [DemoScan("01", None, (2.5,) * 3), DemoScan("02", None, (2.5,) * 3, axes="LPS")]))
    return root


@pytest.fixture
def models(monkeypatch):
    """The oracle and a model that finds nothing; they are run in this process, since others do not know them."""
    for name, predictor in (("oracle", "Oracle"), ("blind", "Blind")):
        monkeypatch.setitem(MODELS, name, oracle_model(name, predictor))

    def run_here(self, folder):
        write_json(vars(self), folder / "request.json")
        timed_segmentation.main([str(folder / "request.json")])
        return json.loads(Path(self.cost).read_text())

    monkeypatch.setattr(SegmentationJob, "run", run_here)


def test_each_model_and_scan_is_a_node(script, dataset, models, tmp_path):
    candidates = script.parse_candidates(["oracle", "blind"])
    test_set = script.find_test_set(dataset, warn=print)
    workflow = script.init_compare_models_wf(candidates=candidates, test_set=test_set, out=tmp_path)
    assert sorted(workflow.list_node_names()) == [
        "compare",
        "gather",
        "segment_blind_sub01",
        "segment_blind_sub02",
        "segment_oracle_sub01",
        "segment_oracle_sub02",
    ]


def test_models_are_compared_on_a_page(script, dataset, models, tmp_path, capsys):
    out = tmp_path / "out"
    given = [str(dataset), str(out), "--models", "oracle", "blind", "--work-dir", str(tmp_path / "work")]
    assert script.main(given) == 0
    assert "not among" not in (said := capsys.readouterr().out)
    with (out / "models.tsv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert float(rows["oracle"]["dice"]) > 0.75  # a model of 2 mm voxels on a grid of 2.5 mm
    assert (rows["oracle"]["n_missed"], rows["oracle"]["n_scans"]) == ("0", "2")
    assert (float(rows["blind"]["dice"]), rows["blind"]["n_missed"], rows["blind"]["hd95_mm"]) == (0, "32", "n/a")
    assert "oracle" in (out / "compare.html").read_text(encoding="utf-8")
    assert f"open {out / 'compare.html'}" in said


SPLIT = "participant_id\tpart\nsub-01\ttrain\nsub-02\ttest\n"


def test_only_the_test_part_is_compared(script, dataset, models, tmp_path, capsys):
    (tmp_path / "split.tsv").write_text(SPLIT, encoding="utf-8")
    out, work = tmp_path / "out", str(tmp_path / "work")
    given = [str(dataset), str(out), "--models", "oracle", "--work-dir", work]
    assert script.main([*given, "--split", str(tmp_path / "split.tsv")]) == 0
    assert "test part: sub-02\n" in capsys.readouterr().out
    assert (out / "split.tsv").read_text(encoding="utf-8") == SPLIT
    with (out / "comparison.tsv").open(encoding="utf-8") as file:
        assert {row["participant_id"] for row in csv.DictReader(file, delimiter="\t")} == {"sub-02"}
    (tmp_path / "split.tsv").write_text(SPLIT.replace("01\ttrain", "01\ttest").replace("02\ttest", "02\ttune"))
    assert script.main([*given, "--split", str(tmp_path / "split.tsv")]) == 2
    assert "out: has results of sub-02, not in the test part; use a new OUT" in capsys.readouterr().err


def test_seed_gives_the_split_of_the_nnunet_training(script, dataset):
    scans = script.find_test_set(dataset, warn=print)
    participants = [f"{number:02d}" for number in range(20)]
    many = replace(scans, scans=tuple(replace(scans.scans[0], participant=one) for one in participants))
    test_set, table = script.select_test_part(many, dataset, "3")
    sites = dict.fromkeys(participants, "n/a") | {"01": "north", "02": "north"}  # of the demo
    expected = split_by_site(sites, seed=3)
    assert dict(zip(table["participant_id"].str[4:], table["part"], strict=True)) == expected
    assert [scan.participant for scan in test_set.scans] == [one for one in participants if expected[one] == "test"]


def test_atlases_are_never_of_the_test_part(dataset, tmp_path):
    chi = dataset / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"  # sub-02 is the only other participant
    job = SegmentationJob(str(chi), {}, "multiatlas", str(dataset), "", str(tmp_path / "cost.json"), holdout=("02",))
    assert timed_segmentation.main([str(write_json(vars(job), tmp_path / "request.json"))]) == 1
    assert "no labelled map of another participant" in json.loads((tmp_path / "cost.json").read_text())["problem"]


@pytest.fixture
def atlases(dataset, tmp_path):
    """A copy of the phantoms, each with a second segmentation of DN_L only."""
    root = Path(shutil.copytree(dataset, tmp_path / "library"))
    start_dataset(root / "derivatives" / "second", DatasetType="derivative")
    for path in sorted((root / "derivatives" / "truth").rglob("*_dseg.*")):
        name = path.name.replace("seg-truth", "seg-second")
        other = root / "derivatives" / "second" / path.parent.relative_to(root / "derivatives" / "truth") / name
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other)
        if name.endswith(".nii.gz"):
            image = nib.Nifti1Image.from_filename(path)
            one = (np.asanyarray(image.dataobj) == 1).astype(np.uint8)
            nib.Nifti1Image(one, image.affine).to_filename(other)
    shutil.copy(root / "derivatives" / "truth" / "dseg.tsv", root / "derivatives" / "second" / "dseg.tsv")
    return root


def test_choice_applies_to_atlases(script, dataset, atlases, models, monkeypatch, tmp_path, capsys):
    used = []

    def copy_labels(chi, atlases, model, *, fuse):
        """Return the labels of the atlas that is the map itself."""
        (own,) = (one for one in atlases if np.array_equal(one.chi.array, chi.array))
        used.append(set(np.unique(own.labels.array).tolist()))
        shares = np.stack([own.labels.array == number for number in range(len(model.labels) + 1)])
        block = ProbabilityBlock(shares.astype(np.float32), (slice(None),) * 3, voxel_size_mm=chi.voxel_size_mm)
        location = Location(Box((0, 0, 0), (1, 1, 1)), None)
        return SegmentedMap(label_grid(block, model, chi.array), block, location, model)

    monkeypatch.setattr("bids_dgmseg.lab.evaluate.multi_atlas.segment_by_atlases", copy_labels)
    given = [str(dataset), str(tmp_path / "out"), "--models", "multiatlas", "--atlases", str(atlases)]
    assert script.main(given) == 2
    assert "are of the same scan; select one with --choose, such as --choose seg-" in capsys.readouterr().err
    for entity, numbers in {"seg-truth": set(range(17)), "seg-second": {0, 1}}.items():  # neither is reused
        assert script.main([*given, "--choose", entity]) == 0
        assert used == [numbers, numbers]
        used.clear()


def test_invalid_weights_stop_before_the_first_scan(script, dataset, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert script.main([str(dataset), str(tmp_path / "out"), "--models", f"dcnnet={tmp_path / 'empty'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("compare_models: error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_benchmark_without_segmentations_is_an_error(script, dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "check_candidates", lambda candidates, **given: None)

    def fail(self, folder):
        Path(self.cost).parent.mkdir(parents=True, exist_ok=True)
        write_json({"problem": "no brain found"}, Path(self.cost))
        return {"problem": "no brain found"}

    monkeypatch.setattr(SegmentationJob, "run", fail)
    assert script.main([str(dataset), str(tmp_path / "out"), "--work-dir", str(tmp_path / "work")]) == 2
    assert capsys.readouterr().err.endswith(
        "compare_models: error: no scan could be segmented: dgm16: sub-01: no brain found\n"
    )
