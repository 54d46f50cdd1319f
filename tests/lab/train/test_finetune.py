"""Fine-tuning on labelled phantoms, 4 mm coarse, with a network of a few thousand weights."""

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from bids_dgmseg.cli.bids_app import main as app
from bids_dgmseg.cli.main import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.io.files import sha256
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.lab.train.finetune import describe_changes, finetune, summarize
from bids_dgmseg.lab.train.frame import TrainingRequest
from bids_dgmseg.models.model_folder import save_weights, segmenter_network, write_model_toml
from bids_dgmseg.models.registry import MODELS, Localizer, ModelInput
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import start_dataset, write_map
from tests.lab.train.recorder import Lines

HEAD = Box((-75, -110, -80), (75, 74, 80))
GRID = world_grid(HEAD, (3.0, 3.0, 6.0))
MODEL = replace(
    MODELS["dgm16"],
    labels=("CN_L", "CN_R", "PUT_L", "PUT_R"),
    auxiliary=(),
    arch={"features": (8, 16)},
    input=ModelInput(spacing_mm=(4.0, 4.0, 4.0), patch_mm=(88.0, 88.0, 64.0)),
    localizer=Localizer(kind="centre"),
)


QUICK = {"steps": 4, "seed": 2}
TEMPERATURES = (1.0, 2.0, 2.5, 4.0, 4.0)


def label(root, scan, *names, moved_mm=0.0, numbers=None, seg="manual", grid=GRID):
    """Draw nuclei of the phantom, moved to the front, as a derivative with its own numbers and dseg.tsv."""
    shift = np.eye(4)
    shift[1, 3] = -moved_mm
    truth = PHANTOM.dseg(Grid(grid.shape, shift @ grid.affine)).array
    numbers = numbers or {name: number for number, name in enumerate(names, start=31)}
    labels = np.zeros(grid.shape, np.uint8)
    for structure in STRUCTURES:
        labels[truth == structure.index] = numbers.get(structure.abbreviation, 0)
    derivative = root / "derivatives" / seg
    start_dataset(derivative, DatasetType="derivative")
    folder = derivative / f"sub-{scan[4:]}" / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{number}\t{name}\n" for name, number in numbers.items())
    (derivative / "dseg.tsv").write_text(f"index\tabbreviation\n{rows}", encoding="utf-8")
    nib.Nifti1Image(labels, grid.affine).to_filename(folder / f"{scan}_seg-{seg}_dseg.nii.gz")


@pytest.fixture
def dataset(tmp_path):
    """Two phantoms without labels."""
    root = tmp_path / "ds"
    start_dataset(root)
    for number, scan in enumerate(("sub-01", "sub-02")):
        write_map(root, scan, PHANTOM.chi(GRID, seed=number, supersampling=1))
    return root


@pytest.fixture
def untrained(tmp_path):
    """Weights of a network that knows nothing, and a file in place of a localizer."""
    torch.manual_seed(0)
    save_weights(segmenter_network(MODEL).state_dict(), tmp_path / "untrained" / "segmenter.safetensors")
    (tmp_path / "untrained" / "localizer.safetensors").touch()
    return tmp_path / "untrained"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Weights of a network that learned all four nuclei from scratch."""
    folder = tmp_path_factory.mktemp("teacher")
    root = folder / "ds"
    start_dataset(root)
    for number, scan in enumerate(("sub-01", "sub-02")):
        write_map(root, scan, PHANTOM.chi(GRID, seed=number, supersampling=1))
        label(root, scan, *MODEL.labels)
    torch.manual_seed(0)
    save_weights(segmenter_network(MODEL).state_dict(), folder / "untrained" / "segmenter.safetensors")
    tune(root, folder / "out", folder / "untrained", steps=60, learning_rate=2e-2)
    return folder / "out"


def tune(dataset, out, start, *, log=None, model=MODEL, **options):
    request = TrainingRequest(model=model, dataset=dataset, out=out, start=start, **{**QUICK, **options})
    return finetune(request, log=log or Lines())


def mean(table, column, nucleus, part="training"):
    rows = table[(table["part"] == part) & table["abbreviation"].str.startswith(nucleus)]
    return rows[column].mean()


@pytest.mark.slow
def test_labelled_nuclei_change_and_others_stay(teacher, tmp_path):
    root, grid = tmp_path / "ds", world_grid(HEAD, (2.0, 4.0, 2.0))  # thick coronal slices
    start_dataset(root)
    for number, scan in enumerate(("sub-01", "sub-02")):
        write_map(root, scan, PHANTOM.chi(grid, seed=number, supersampling=1))
        label(root, scan, "CN_L", "CN_R", moved_mm=6.0, grid=grid)
    outcome, table = tune(root, tmp_path / "out", teacher, steps=60, learning_rate=1e-2, holdout=("02",))
    assert outcome.done
    for part in ("training", "held-out"):
        assert mean(table, "dice_after", "CN", part) > mean(table, "dice_before", "CN", part) + 0.06
        assert mean(table, "dice_between", "PUT", part) > 0.85
        assert mean(table, "dice_between", "PUT", part) > mean(table, "dice_between", "CN", part)
    assert table.loc[table["abbreviation"] == "PUT_L", "dice_after"].isna().all()
    assert "Dice on 1 training scans:" in summarize(table)


def test_changed_nuclei_without_labels_are_named():
    rows: list[tuple[str, str, int | None, float]] = [
        ("STN_L", "training", None, 0.2),
        ("STN_L", "training", None, 0.4),
        ("DN_L", "training", None, 0.95),
    ]
    rows += [("CN_L", "training", 900, 0.3), ("CN_L", "training", None, 0.3)]  # labelled in one scan
    table = pd.DataFrame(rows, columns=["abbreviation", "part", "n_reference", "dice_between"])
    assert describe_changes(table).startswith("STN_L (0.30): not labelled, but segmented differently than before")
    assert describe_changes(table[table["abbreviation"] != "STN_L"]) == ""


@pytest.fixture
def calibrated(teacher, tmp_path):
    """The teacher with temperatures, which make its nuclei smaller."""
    shutil.copytree(teacher, tmp_path / "calibrated")
    write_model_toml(MODEL, tmp_path / "calibrated", about={"temperatures": list(TEMPERATURES)})
    return tmp_path / "calibrated"


def labels_of_the_app(dataset, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "dgm16", MODEL)
    out = tmp_path / f"results of {weights.name}"
    options = ["--weights", str(weights), "-w", str(tmp_path / "work"), "--nprocs", "1", "--skip-bids-validation"]
    assert app([str(dataset), str(out), "participant", *options]) == 0
    return np.asanyarray(load_image(out / "sub-01" / "anat" / "sub-01_seg-dgm16_dseg.nii.gz").dataobj)


def test_app_reproduces_the_scores(dataset, calibrated, tmp_path, monkeypatch):
    label(dataset, "sub-01", *MODEL.labels, moved_mm=3.0)
    _, table = tune(dataset, tmp_path / "out", calibrated)
    truth = np.asanyarray(load_image(next(dataset.rglob("*_dseg.nii.gz"))).dataobj)
    result = labels_of_the_app(dataset, tmp_path / "out", tmp_path, monkeypatch)
    for number, name in enumerate(MODEL.labels, start=31):
        reference, labelled = truth == number, result == STRUCTURES.named(name).index
        dice = 2 * np.count_nonzero(reference & labelled) / (reference.sum() + labelled.sum())
        assert table.set_index("abbreviation").loc[name, "dice_after"] == pytest.approx(dice)
    quality = json.loads(next(tmp_path.rglob("*_seg-dgm16_qc.json")).read_text(encoding="utf-8"))
    assert quality["settings"]["mirrored"]  # mirror images are averaged, without being asked for
    (tmp_path / "out" / "model.toml").rename(tmp_path / "model.toml")
    assert not np.array_equal(result, labels_of_the_app(dataset, tmp_path / "out", tmp_path, monkeypatch))


def test_labels_are_matched_by_name(dataset, untrained, tmp_path, lines):
    numbers = {"CN_R": 3, "CN_L": 40, "GP_L": 7}
    label(dataset, "sub-01", numbers=numbers)
    _, table = tune(dataset, tmp_path / "out", untrained, log=lines)
    counts = table.dropna(subset="n_reference").set_index("abbreviation")["n_reference"]
    truth = PHANTOM.dseg(GRID).array
    assert counts.to_dict() == {name: (truth == STRUCTURES.named(name).index).sum() for name in ("CN_L", "CN_R")}
    assert lines.lines[:4] == [
        "no labels for sub-02; left out",
        "dseg.tsv: 7 (GP_L) not among the nuclei of dgm16; ignored",
        "1 training scans, labelled CN_L, CN_R",
        "not labelled, trained to stay as the starting weights predict them: PUT_L, PUT_R",
    ]


@pytest.mark.parametrize("known", ["map", "participant"])
def test_held_out_scan_that_the_starting_weights_know_is_reported(dataset, untrained, tmp_path, lines, known):
    for scan in ("sub-01", "sub-02"):
        label(dataset, scan, "CN_L")
    chi = next((dataset / "sub-02").rglob("*_Chimap.nii.gz"))
    maps = {"sub-02": sha256(chi)} if known == "map" else {"sub-02_ses-1": "another scan"}
    record = {"maps": maps, "folds": [{"training": ["02"]}]}
    (untrained / "training.json").write_text(json.dumps(record))
    tune(dataset, tmp_path / "out", untrained, log=lines, holdout=("02",))
    said = "warning: the starting weights were trained on sub-02 of the test set, or on other"
    assert any(line.startswith(said) for line in lines.lines)


def test_starting_weights_without_localizer_are_refused(dataset, untrained, tmp_path):
    label(dataset, "sub-01", *MODEL.labels)
    whole = replace(MODEL, localizer=MODELS["dgm16"].localizer)
    (untrained / "localizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"untrained: has no localizer\.safetensors; copy that of other weights of dg"):
        tune(dataset, tmp_path / "out", untrained, model=whole)
    assert not (tmp_path / "out" / "training.json").exists()


def use_small_default(patch):
    """Let the command's default model be the small one."""
    patch.setitem(MODELS, "dgm16", MODEL)
    patch.setattr(
        "bids_dgmseg.cli.verb_train.get_model",
        lambda name, **_: replace(MODEL, localizer=replace(MODEL.localizer, network="unused")),
    )
    patch.setattr("bids_dgmseg.lab.train.finetune.copy_file", lambda temporary, final: None)


@pytest.fixture
def small_default(monkeypatch):
    use_small_default(monkeypatch)


def test_command_prints_before_and_after(dataset, untrained, small_default, tmp_path, capsys):
    label(dataset, "sub-01", "CN_L", "CN_R")
    options = ["--from", str(untrained), "--steps", "2", "--workers", "0"]
    assert main(["finetune", "default", str(dataset), str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert "before  after  between" in said
    assert "use it with bids_dgmseg --model dgm16 --weights" in said
    assert "step 1" not in said
