"""Cross-validation by the papers' recipes on labelled phantoms, with networks of a few hundred weights."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.cli import verb_train
from bids_dgmseg.cli.bids_app import main as app
from bids_dgmseg.cli.main import main
from bids_dgmseg.io.files import sha256
from bids_dgmseg.lab.train.frame import TrainingRequest
from bids_dgmseg.models.model_folder import find_folds_trained_on
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from tests.lab.train.conftest import small_recipes  # noqa: F401 - a fixture
from tests.lab.train.recipe_trainings import command, make_dataset, train

pytestmark = pytest.mark.usefixtures("small_recipes", "coarse_midplane")

FOLDS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four phantoms, three of them labelled."""
    return make_dataset(tmp_path_factory.mktemp("cross") / "ds")


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr("bids_dgmseg.cli.bids_app.count_cpus", lambda: 1)


def cross_validate(model, dataset, out, *options):
    return main(command(model, dataset, out, *options, folds=FOLDS, epochs=1, verb="cross-validate"))


def evaluate(dataset, out):
    return verb_train.evaluate_folds(TrainingRequest(model=MODELS["dcnnet"], dataset=dataset, out=out))


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_each_participant_is_segmented_by_an_unseen_fold(dataset, tmp_path, capsys):
    out = tmp_path / "cv"
    assert cross_validate("deepqsmseg", dataset, out) == 0
    tested = []
    for fold in range(FOLDS):
        split = json.loads((out / "models" / f"fold-{fold}" / "training.json").read_text())["folds"][fold]
        assert len(split["test"]) == 1
        assert len({*split["test"], *split["training"], *split["validation"]}) == FOLDS
        assert [path.name for path in (out / f"fold-{fold}").glob("sub-*/")] == [f"sub-{split['test'][0]}"]
        tested += split["test"]
    assert sorted(tested) == ["01", "02", "03"]
    overlap = pd.read_csv(out / "evaluation" / "overlap.tsv", sep="\t", na_values="n/a")
    assert len(overlap) == FOLDS * 15  # five nuclei: left, right, both
    for row in overlap.to_dict("records"):
        name = row["abbreviation"]
        labels = [nucleus.index for nucleus in STRUCTURES if name in (nucleus.abbreviation, nucleus.nucleus)]
        (truth,) = (dataset / "derivatives" / "manual").glob(f"{row['scan']}/anat/*_dseg.nii.gz")
        (result,) = out.glob(f"fold-*/{row['scan']}/anat/*_dseg.nii.gz")
        first, other = (np.isin(nib.Nifti1Image.from_filename(path).get_fdata(), labels) for path in (truth, result))
        assert row["dice"] == pytest.approx(2 * (first & other).sum() / (first.sum() + other.sum()), abs=1e-6)
    assert overlap["n_prediction"].sum() > 0
    assert "CN_L: Dice " in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in out.glob("fold-*/sub-*/anat/*_dseg.nii.gz")}
    assert cross_validate("deepqsmseg", dataset, out, "--fold", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written  # not segmented again
    assert cross_validate("deepqsmseg", dataset, out, "--seed", "2") == 2
    assert "already contains a run with different settings (seed" in capsys.readouterr().err
    shutil.copytree(out / "fold-1" / f"sub-{tested[1]}", out / "fold-0" / f"sub-{tested[1]}")
    assert cross_validate("deepqsmseg", dataset, out) == 2
    assert f"fold-0: has results of sub-{tested[1]}, not in the test set of the fold" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_training_maps_are_reported(dataset, tmp_path, capsys):
    weights, out = tmp_path / "weights", tmp_path / "out"
    assert train("attunet25d", dataset, weights, "--fold", "0", "1", folds=FOLDS, epochs=1) == 0
    run = [str(dataset), str(out), "participant", "--model", "attunet25d", "--weights", str(weights)]
    assert app([*run, "--participant-label", "01", "04", "--no-viewer"]) == 0
    line = "sub-01: weights: 2 of 2 networks trained on this map (training.json)"
    shown = capsys.readouterr().err
    assert line in shown
    assert "sub-04: weights" not in shown  # it has no labels
    (record,) = out.glob("sub-01/anat/*_qc.json")
    content = json.loads(record.read_text())
    assert any(warning.startswith(line) for warning in content["warnings"])
    maps = [dataset / name / "anat" / f"{name}_Chimap.nii.gz" for name in ("sub-01", "sub-02", "sub-03")]
    assert content["settings"]["training_maps"] == sorted(map(sha256, maps))  # by one fold or the other
    assert line.removeprefix("sub-01: ") in (out / "sub-01.html").read_text()
    # Nothing to start an unbiased cross-validation from
    assert cross_validate("attunet25d", dataset, tmp_path / "cv", "--from", str(weights)) == 2
    assert f"--from {weights}: these weights were trained on sub-01, sub-02, sub-03" in capsys.readouterr().err
    file = weights / "fold_0.safetensors"
    assert cross_validate("attunet25d", dataset, tmp_path / "cv", "--from", str(file)) == 2
    assert f"--from {file}: these weights were trained on sub-0" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """Three folds on three participants with two sessions; sub-4 has pseudo-labels."""
    (tmp_path / "references").mkdir(parents=True)
    maps = {}
    for scan in ("sub-1_ses-1", "sub-1_ses-2", "sub-2", "sub-3", "sub-4"):
        (tmp_path / f"{scan}.nii").write_text(scan)
        maps[scan] = sha256(tmp_path / f"{scan}.nii")
        for suffix in ("Chimap", "dseg"):
            (tmp_path / "references" / f"{scan}_{suffix}.nii.gz").touch()
    folds = [{"training": ["1"], "validation": ["2"], "test": ["3"]}, {"training": ["3", "2"], "test": ["1"]}, {}]
    for number in (0, 1):
        (tmp_path / f"fold_{number}.safetensors").touch()
    record = {"maps": maps, "folds": folds, "pseudo_labels": {"sub-4": "…"}, "seed": 1}
    (tmp_path / "training.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize(
    ("scan", "learned"),
    [
        ("sub-1_ses-2", {0: True, 1: False}),
        ("sub-2", {0: True, 1: True}),
        ("sub-3", {0: False, 1: True}),
        ("sub-4", {0: True, 1: True}),
    ],
)
def test_maps_are_recognized_by_their_content(folder, scan, learned):
    copied = shutil.copy(folder / f"{scan}.nii", folder / "renamed.nii")
    assert find_folds_trained_on(folder, copied) == learned
    copied.write_text("another map")
    assert find_folds_trained_on(folder, copied) == {0: False, 1: False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attunet25d", "--folds", "1"], "--folds 1: cross-validation needs 2 or more"),
        (["attunet25d", "--fold", "5"], "--fold 5: choose from 0 to 4"),
        (["nnunet2step", "--scans", "2"], "--scans: not available for nnunet2step; omit it"),
        (["dgm16"], "dgm16: not trained by dgmseg cross-validate; use dgmseg finetune or dgmseg train-simulated"),
    ],
)
def test_impossible_options_are_refused(options, message, dataset, tmp_path, capsys):
    model, *rest = options
    assert main(["cross-validate", model, str(dataset), str(tmp_path / "cv"), *rest]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()
