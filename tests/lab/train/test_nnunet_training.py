import csv
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.main import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import sha256
from bids_dgmseg.lab.train.nnunet import run as nnunet_train
from bids_dgmseg.lab.train.nnunet.run import NnunetRequest, run_nnunet_training
from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.nnunet.step import NnunetCase, StepOutcome
from bids_dgmseg.models.registry import get_model, weights_folder
from bids_dgmseg.phantom.dataset import Image, LabelledScan, write_dataset, write_participants
from bids_dgmseg.segmentation.records import Location
from tests.lab.train.recorder import Lines
from tests.segmentation.nnunet_folders import write_folder
from tests.terminal import Terminal

MODEL = get_model("nnunet2step")
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
SHAPE = (20, 20, 20)
LENGTHS: list[NnunetTraining] = []
STARTS: dict[str, Path | None] = {}
HELD: dict[str, Sequence[Collection[str]] | None] = {}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ten scans of two sites; a cerebellum of 8 x 6 x 6 voxels around two dentates of one."""
    root = tmp_path / "ds"
    random, rows = np.random.default_rng(0), []
    with write_dataset(root, name="Balls", readme="For a test.\n", settings={}) as dataset:
        for number in range(10):
            dseg, cerebellum = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
            dseg[8, 6, 6], dseg[12, 6, 6] = 1, 2
            cerebellum[6:14, 3:9, 3:9] = 1
            chi = Image("Chimap", 0.05 * random.normal(size=SHAPE).astype(np.float32))
            masks = {"cerebellum": cerebellum}
            dataset.add(LabelledScan(f"{number:02d}", [chi], dseg, AFFINE, {"Units": "ppm"}, masks=masks))
            rows.append({"participant_id": f"sub-{number:02d}", "site": "AB"[number % 2]})
    write_participants(root, rows, {})
    return root


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Sequence[str], list[NnunetCase]]]:
    """Names and cases per step, recorded instead of training; the model folders get random weights."""
    seen: dict[str, tuple[Sequence[str], list[NnunetCase]]] = {}

    LENGTHS.clear()

    def train_step(step, cases, names, out, this, *, log, validation=None, start=None):
        HELD[step], STARTS[step] = validation, start
        log.update(f"{step}: step 1")
        # As in a training, maps are read before their files are removed.
        seen[step] = names, [replace(one, chi=Volume(one.chi.array, one.chi.affine)) for one in cases()]
        LENGTHS.append(this)
        folder = out / step
        if not folder.exists():
            write_folder(folder, labels={"background": 0, **{name: n for n, name in enumerate(names, start=1)}})
        return StepOutcome(this.epochs, folder, "00ff", f"{step} {this.fold}")

    monkeypatch.setattr(nnunet_train, "train_step", train_step)
    return seen


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_both_steps_share_the_split(dataset, steps, tmp_path):
    outcomes, table = run_nnunet_training(
        NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out"), log=Lines()
    )
    assert [outcome.folder.name for outcome in outcomes] == ["cerebellum", "dentate"]
    assert steps["cerebellum"][0] == ("cerebellum",)
    assert steps["dentate"][0] == ("DN_L", "DN_R")
    split = {row["participant_id"]: row for row in read_table(tmp_path / "out" / "split.tsv")}
    assert sorted(row["part"] for row in split.values()) == ["test"] * 2 + ["train"] * 7 + ["tune"]
    assert {row["site"] for row in split.values()} == {"A", "B"}
    for step in ("cerebellum", "dentate"):
        parts = {case.name: case.part for case in steps[step][1]}
        assert parts == {name: row["part"] for name, row in split.items() if row["part"] != "test"}
    test_set = {name for name, row in split.items() if row["part"] == "test"}
    assert set(table["scan"]) == test_set
    assert len(table) == 4  # two scans, two sides
    assert {row["scan"] for row in read_table(tmp_path / "out" / "dice.tsv")} == test_set


def test_folds_divide_all_but_the_test_set(dataset, steps, tmp_path):
    out = tmp_path / "out"
    outcomes, table = run_nnunet_training(NnunetRequest(model=MODEL, dataset=dataset, out=out, folds=4), log=Lines())
    assert [outcome.name for outcome in outcomes] == [
        f"{step} {fold}" for step in ("cerebellum", "dentate") for fold in range(4)
    ]
    rows = read_table(out / "split.tsv")
    test = {row["participant_id"] for row in rows if row["part"] == "test"}
    assert (len(test), set(table["scan"])) == (2, test)
    assert HELD["cerebellum"] == HELD["dentate"]
    held = HELD["dentate"] or []
    assert [sorted(row["participant_id"] for row in rows if row["fold"] == str(fold)) for fold in range(4)] == [
        sorted(own) for own in held
    ]
    assert sorted(name for own in held for name in own) == sorted({row["participant_id"] for row in rows} - test)
    for fold in json.loads((out / "training.json").read_text())["folds"]:
        assert (len(fold["training"]), len(fold["validation"]), len(fold["test"])) == (6, 2, 2)
    with pytest.raises(InputError, match="`folds` 9: 8 participants are too few for 9 folds"):
        run_nnunet_training(NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "other", folds=9), log=Lines())


def test_step_two_is_trained_on_crops(dataset, steps, tmp_path):
    run_nnunet_training(NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out"), log=Lines())
    whole, crop = steps["cerebellum"][1][0], steps["dentate"][1][0]
    assert whole.chi.shape == SHAPE
    assert whole.labels.sum() == 8 * 6 * 6
    assert crop.chi.shape == (12, 10, 10)  # 8 mm are two voxels on every side
    assert np.argwhere(crop.labels).tolist() == [[4, 5, 5], [8, 5, 5]]


def test_missing_mask_is_largest_component_of_the_localizer(dataset, steps, tmp_path, monkeypatch, lines):
    for path in (dataset / "derivatives" / "truth").rglob("*_mask.nii.gz"):
        path.unlink()
    grid = world_grid(Box((-2.0, -2.0, -2.0), (78.0, 78.0, 78.0)), (8.0, 8.0, 8.0))
    regions = np.zeros(grid.shape, np.uint8)
    regions[3:7, 2:5, 2:5] = 2  # cerebellum: x from 22 to 54 mm, y and z from 14 to 38 mm
    regions[4, 3, 3] = 5  # cerebellar nuclei
    regions[8, 8, 8] = 2  # a small component
    found = Location(Box((0, 0, 0), (1, 1, 1)), Volume(regions, grid.affine))
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.run_localizer", lambda *args, **options: found)
    request = NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out", steps=("cerebellum",))
    run_nnunet_training(request, log=lines)
    assert lines.lines[-1].startswith("no label-cerebellum mask for sub-00, sub-01")
    inside = np.argwhere(steps["cerebellum"][1][0].labels)
    assert (inside.min(axis=0).tolist(), inside.max(axis=0).tolist()) == ([6, 4, 4], [13, 9, 9])


@pytest.mark.parametrize("step", ["cerebellum", "dentate"])
@pytest.mark.parametrize("found", [None, "no deep nuclei found in the brain"])
def test_scan_without_cerebellum_is_refused(dataset, steps, tmp_path, monkeypatch, step, found):
    for path in (dataset / "derivatives" / "truth").rglob("*_mask.nii.gz"):
        path.unlink()

    def localize(*args, **options):
        if found:
            raise InputError(found)
        return Location(Box((0, 0, 0), (1, 1, 1)), Volume(np.zeros((4, 4, 4), np.uint8), np.diag([20.0] * 3 + [1])))

    monkeypatch.setattr("bids_dgmseg.segmentation.localize.run_localizer", localize)
    request = NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out", steps=(step,))
    with pytest.raises(InputError, match=rf"^sub-\d\d: {found or 'the localizer finds no cerebellum; add a '}"):
        run_nnunet_training(request, log=Lines())


def test_different_training_in_folder_is_refused(dataset, steps, tmp_path):
    run_nnunet_training(NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out"), log=Lines())
    other = NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out", training=NnunetTraining(seed=2))
    with pytest.raises(
        InputError, match=r"^out: contains a different training \(differs in seed, folds\); choose a new OUT$"
    ):
        run_nnunet_training(other, log=Lines())


@pytest.mark.parametrize("changed", ["masks", "label_tables"])
def test_changed_masks_and_names_are_a_different_training(dataset, steps, tmp_path, changed):
    """Preprocessed images of an earlier call contain the masks and labels as they were."""
    request = NnunetRequest(model=MODEL, dataset=dataset, out=tmp_path / "out")
    run_nnunet_training(request, log=Lines())
    run_nnunet_training(request, log=Lines())
    truth = dataset / "derivatives" / "truth"
    if changed == "masks":
        one, other = (truth / f"sub-0{number}/anat/sub-0{number}_label-cerebellum_mask.nii.gz" for number in (0, 1))
        mask = nib.Nifti1Image.from_filename(other)
        nib.Nifti1Image(np.roll(np.asarray(mask.dataobj), 1, axis=2), AFFINE).to_filename(one)
    else:
        table = (truth / "dseg.tsv").read_text()
        exchanged = table.replace("\tDN_L", "\tleft").replace("\tDN_R", "\tDN_L").replace("\tleft", "\tDN_R")
        (truth / "dseg.tsv").write_text(exchanged)
    with pytest.raises(InputError, match=rf"^out: contains a different training \(differs in {changed}\)"):
        run_nnunet_training(request, log=Lines())


def test_test_set_that_the_starting_weights_know_is_reported(dataset, steps, tmp_path, lines):
    for step in ("cerebellum", "dentate"):
        write_folder(tmp_path / "old" / step)
    digest = sha256(dataset / "sub-03" / "anat" / "sub-03_Chimap.nii.gz")
    record = {"maps": {"sub-03": digest}, "folds": [{"training": ["03"]}]}
    (tmp_path / "old" / "training.json").write_text(json.dumps(record))
    for held_out, expected in (("03", True), ("04", False)):
        out = tmp_path / f"out{held_out}"
        request = NnunetRequest(model=MODEL, dataset=dataset, out=out, start=tmp_path / "old", holdout=(held_out, "05"))
        lines.lines.clear()
        run_nnunet_training(request, log=lines)
        said = "warning: the starting weights were trained on sub-03 of the test set, so its Dice does not show"
        assert any(line.startswith(said) for line in lines.lines) == expected


def test_both_steps_share_the_time(dataset, steps, tmp_path, capsys):
    command = ["train-nnunet", "nnunet2step", str(dataset), str(tmp_path / "out")]
    assert main([*command, "--minutes", "4", "--epochs", "9"]) == 0
    assert [(this.minutes, this.epochs) for this in LENGTHS] == [(2.0, 9), (2.0, 9)]
    assert [this.plan for this in LENGTHS] == ["paper", "paper"]
    assert "on 2 test scans" in (said := capsys.readouterr().out)
    assert "step 1" not in said


def test_terminal_shows_both_steps(dataset, steps, tmp_path, monkeypatch):
    terminal = Terminal.connected(monkeypatch)
    assert main(["train-nnunet", "nnunet2step", str(dataset), str(tmp_path / "out")]) == 0
    *reading, first, second = terminal.shown
    assert reading == [f"reading sub-0{number}, {number + 1} of 10" for number in range(10)]
    assert [first, second] == ["cerebellum: step 1", "dentate: step 1"]
    assert "step 1" not in "\n".join(terminal.lines)


def test_other_plan_is_a_different_training(dataset, steps, tmp_path, capsys):
    command = ["train-nnunet", "nnunet2step", str(dataset), str(tmp_path / "out")]
    assert main([*command, "--plan", "small"]) == 0
    assert [this.plan for this in LENGTHS] == ["small", "small"]
    assert main(command) == 2
    assert "out: contains a different training (differs in plan); choose a new OUT" in capsys.readouterr().err


def test_each_step_starts_from_its_own_weights(dataset, steps, tmp_path, capsys):
    command = ["train-nnunet", "nnunet2step", str(dataset)]
    for step in ("cerebellum", "dentate"):
        write_folder(tmp_path / "old" / step)
    assert main([*command, str(tmp_path / "out"), "--from", str(tmp_path / "old")]) == 0
    assert {step: tmp_path / "old" / step for step in STARTS} == STARTS
    assert main([*command, str(tmp_path / "out")]) == 2  # from scratch
    assert "out: contains a different training (differs in start, start_maps)" in capsys.readouterr().err
    for step in ("cerebellum", "dentate"):  # one after the other into the same folder
        assert main([*command, str(tmp_path / "shipped"), "--from", "default", "--step", step]) == 0
        assert STARTS[step] == weights_folder(MODEL) / step


def test_weights_of_a_missing_step_are_refused(dataset, steps, tmp_path, capsys):
    command = ["train-nnunet", "nnunet2step", str(dataset), str(tmp_path / "out"), "--from"]
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "none: no such folder or file; pass a model folder, or default for the shipped weights\n" in (
        capsys.readouterr().err
    )
    single = write_folder(tmp_path / "single")
    assert main([*command, str(single)]) == 2
    assert "single: no plans.json of a network for the step cerebellum; train the other step" in capsys.readouterr().err
    assert main([*command, str(single), "--step", "dentate"]) == 0
    assert STARTS["dentate"] == single
