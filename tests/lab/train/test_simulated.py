from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.lab.train import simulated
from bids_dgmseg.lab.train.core import State
from bids_dgmseg.lab.train.log import StepLog
from bids_dgmseg.lab.train.losses import dice_and_cross_entropy, dice_and_focal
from bids_dgmseg.lab.train.schedule import StepSchedule
from bids_dgmseg.lab.train.simulated import (
    FIRST_FIXED_MAP,
    FixedMaps,
    TrainingConfig,
    mix_in_typical_maps,
    simulated_maps,
    train_on_simulations,
)
from bids_dgmseg.models.model_folder import (
    load_weights,
    read_model_folder,
    save_weights,
    segmenter_network,
    write_model_toml,
)
from bids_dgmseg.models.registry import BRAIN_MASK, MODELS
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision
from tests.lab.train.recorder import Lines
from tests.lab.train.small_maps import SMALL_MODEL

pytestmark = pytest.mark.usefixtures("small_maps")


@pytest.fixture
def drawn(monkeypatch):
    """The views of the maps that are drawn, which show nothing."""
    views = []

    def draw(heads, view, seed):
        views.append(view)
        return torch.zeros(16, 16, 16), torch.ones(16, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(simulated, "draw_sample", draw)
    return views


def train(out, *, log=None, **options):
    defaults = {"part": "segmenter", "minutes": 5, "workers": 0, "device": "cpu", "validation_maps": 0}
    config = TrainingConfig(**{**defaults, **options})
    outcome = train_on_simulations(SMALL_MODEL, None, out, config, log=log or Lines())
    return outcome, load_file(out / f"{config.part}.safetensors")


@pytest.mark.parametrize(("loss", "formula"), [("cross-entropy", dice_and_cross_entropy), ("focal", dice_and_focal)])
def test_chosen_loss_is_used(start, tmp_path, monkeypatch, loss, formula):
    losses = []
    monkeypatch.setattr(StepLog, "step", lambda log, state, result: losses.append(result.loss))
    train(tmp_path / "out", steps=1, start=start, loss=loss, seed=3)
    values, labels = mix_in_typical_maps(simulated_maps(SMALL_MODEL, None, "segmenter", seed=3), SMALL_MODEL)[0]
    network = load_weights(segmenter_network(SMALL_MODEL), SMALL_MODEL, "segmenter", start)
    with torch.no_grad(), mixed_precision(torch.device("cpu")):
        expected = float(formula(network(batch_to_device(values[None], torch.device("cpu"))), labels[None]))
    assert losses == pytest.approx([expected], rel=1e-3)


def test_training_starts_from_given_weights(start, tmp_path):
    given = load_file(start / "segmenter.safetensors")
    outcome, learned = train(tmp_path / "out", steps=1, learning_rate=1e-9, start=start)
    assert outcome.done
    for name, values in given.items():
        torch.testing.assert_close(learned[name], values, atol=2e-3, rtol=0)  # float16 of values that hardly moved


def test_template_with_unknown_labels_is_refused(tmp_path):
    nib.Nifti1Image(np.full((4, 4, 4), 60, np.uint8), np.eye(4)).to_filename(tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match=r"^labels\.nii\.gz: 60 is not a label of a template"):
        simulated_maps(SMALL_MODEL, tmp_path / "labels.nii.gz", "segmenter", seed=1)


def test_template_without_parts_of_nuclei_does_not_train_them(tmp_path):
    grid = world_grid(Box((-75, -108, -78), (75, 72, 79)), (3.0, 3.0, 3.0))
    nib.Nifti1Image(PHANTOM.labels(grid.centres_mm()), grid.affine).to_filename(tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match=r"^labels\.nii\.gz: no label of SNc_L; create it with `dgmseg template`"):
        simulated_maps(MODELS["dgm24"], tmp_path / "labels.nii.gz", "segmenter", seed=1)


def test_each_step_updates_the_status(tmp_path, lines):
    train(tmp_path / "out", steps=2, log=lines)
    assert [line.partition(" min, ")[0].rpartition(", ")[0] for line in lines.status] == ["step 1/2", "step 2/2"]


def test_simulation_restores_the_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulated_maps(SMALL_MODEL, None, "segmenter", seed=1)[0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_validation_maps_do_not_depend_on_seed(start, tmp_path):
    # Weights that hardly move: what they find in the fixed maps is all but the same after one seed's step or another's.
    tables = []
    for seed in (1, 2):
        train(tmp_path / str(seed), steps=1, learning_rate=1e-9, start=start, seed=seed, validation_maps=2)
        tables.append((tmp_path / str(seed) / "segmenter_validation.tsv").read_text(encoding="utf-8").splitlines())
    assert tables[0][0].split("\t") == ["step", *SMALL_MODEL.classes]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


def test_checkpoint_takes_precedence_over_starting_weights(start, tmp_path):
    train(tmp_path / "out", steps=2, learning_rate=0.05)
    before = load_file(tmp_path / "out" / "segmenter.safetensors")
    _, after = train(tmp_path / "out", steps=2, start=start)
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_finished_training_keeps_the_calibration(tmp_path):
    out, lines = tmp_path / "out", Lines()
    train(out, steps=1)
    write_model_toml(SMALL_MODEL, out, about={"temperatures": [1.5] * (1 + len(SMALL_MODEL.classes))})
    weights = load_file(out / "segmenter.safetensors")
    weights["heads.0.bias"] += 1  # as by a calibration
    save_weights(weights, out / "segmenter.safetensors")
    _, again = train(out, steps=1, log=lines)
    assert torch.equal(again["heads.0.bias"], weights["heads.0.bias"].half())
    assert read_model_folder(SMALL_MODEL, out).temperatures
    train(out, steps=2, log=lines)
    assert not read_model_folder(SMALL_MODEL, out).temperatures
    assert lines.lines[-1].endswith("is removed; calibrate again")


@pytest.mark.parametrize("other", [{"seed": 2}, {"loss": "focal"}], ids=["seed", "loss"])
def test_different_training_in_the_folder_is_refused(tmp_path, other):
    train(tmp_path / "out", steps=1)
    with pytest.raises(InputError, match=rf"^out: contains a different training \(differs in {next(iter(other))}\)"):
        train(tmp_path / "out", steps=1, **other)


def test_segmenter_sees_typical_maps(start, tmp_path, drawn):
    train(tmp_path / "out", steps=6, start=start)
    assert [view.values.mixture == 0 for view in drawn] == [True, False, False, True, False, False]
    # 95 × 120 × 105 mm in voxels of 4 mm; 3 voxels more in z, half of them below.
    assert [view.shape for view in drawn[:2]] == [(24, 30, 27), (24, 24, 24)]
    assert [view.cut_mm for view in drawn[:2]] == [(23.0, 14.0), (17.0, 8.0)]


def test_localizer_sees_no_typical_maps(tmp_path, drawn):
    train(tmp_path / "out", steps=2, part="localizer")
    assert [view.values.mixture == 0 for view in drawn] == [False, False]


class Ramps(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Inputs 0, 1, 2, …, 9 in a row; class 1 is where the input is above 4, or 5 in maps of odd number."""

    def __init__(self):
        self.drawn = []

    def __getitem__(self, index):
        self.drawn.append(index)
        values = torch.arange(10.0).reshape(1, 1, 1, 10)
        return values, (values[0] > 4 + index % 2).byte()


class Above(nn.Module):
    """Class 1 where the input is above the only parameter, class 2 nowhere."""

    def __init__(self, limit=4.5):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), x - self.limit, torch.full_like(x, -99.0)], dim=1)


@pytest.fixture
def ramps():
    return Ramps()


@pytest.fixture
def fixed(ramps, tmp_path, lines):
    """Returns a validation and its state after some steps and minutes."""

    def make(*, n_maps=2, step=0, minutes=0.0):
        state = State.start(Above(), StepSchedule(steps=99))
        state.step, state.seconds = step, 60 * minutes
        options = {"path": tmp_path / "v.tsv", "classes": ["A", "B"], "device": torch.device("cpu"), "log": lines}
        return FixedMaps(ramps, state, n_maps=n_maps, every_minutes=10, **options), state

    return make


def measure(check, state, *steps):
    for step in steps:
        state.step = step
        check.measure()


def rows(tmp_path):
    return [line.split("\t") for line in (tmp_path / "v.tsv").read_text(encoding="utf-8").splitlines()]


def test_averaged_weights_are_measured(fixed, tmp_path, lines):
    check, state = fixed()
    measure(check, state, 3)  # found 5 of 5, then 5 of which 4 are true: 1 and 8 / 9; class B is in no map
    state.average["limit"].copy_(torch.tensor(7.5))  # found 2 of 5 and 2 of 4: 4 / 7 and 4 / 6
    measure(check, state, 5)
    header, first, second = rows(tmp_path)
    assert header == ["step", "A", "B"]
    assert first == ["3", f"{(1 + 8 / 9) / 2:.4f}", "n/a"]
    assert second[:2] == ["5", f"{(4 / 7 + 4 / 6) / 2:.4f}"]
    assert lines.lines[0] == "step 3, Dice 0.944 on 2 simulated validation maps"


def test_maps_are_simulated_once(fixed, ramps):
    measure(*fixed(), 1, 2)
    assert ramps.drawn == [FIRST_FIXED_MAP, FIRST_FIXED_MAP + 1]


@pytest.mark.parametrize(
    ("step", "start", "minutes", "measured"),
    [(0, 0, (4, 9, 11, 15, 20, 22), ["3", "6"]), (50, 30, (31, 39, 41), ["53"])],
    ids=["new", "resumed"],
)
def test_measurements_are_minutes_apart(fixed, tmp_path, step, start, minutes, measured):
    check, state = fixed(step=step, minutes=start)
    for number, minute in enumerate(minutes, start=1):
        state.step, state.seconds = step + number, 60.0 * minute
        check.step()
    check.measure()
    assert [row[0] for row in rows(tmp_path)] == ["step", *measured]


def test_resumed_table_keeps_earlier_rows(fixed, tmp_path):
    measure(*fixed(), 2, 4, 6)
    measure(*fixed(step=4), 5)
    assert [row[0] for row in rows(tmp_path)] == ["step", "2", "4", "5"]


def test_no_maps_give_no_table(fixed, tmp_path):
    measure(*fixed(n_maps=0), 3)
    assert not (tmp_path / "v.tsv").exists()


def test_brain_mask_is_learned_from_magnitudes(tmp_path, monkeypatch):
    def draw(head, generator):
        brain = torch.zeros(16, 16, 16, dtype=torch.uint8)
        x, y, z = torch.randint(1, 7, (3,), generator=generator).tolist()
        brain[x : x + 8, y : y + 8, z : z + 8] = 1
        return 500 * brain + 100 * torch.rand(brain.shape, generator=generator), brain

    monkeypatch.setattr(simulated, "prepare_whole_head", lambda template: None)
    monkeypatch.setattr(simulated, "draw_magnitude", draw)
    small = replace(BRAIN_MASK, arch={"features": [4, 8]}, weights=None)
    monkeypatch.setattr(simulated, "BRAIN_MASK", small)
    outcome, weights = train(tmp_path, part="brain-mask", steps=80, learning_rate=1e-2, validation_maps=3)
    assert outcome.done
    assert weights.keys() == segmenter_network(small).state_dict().keys()
    last = (tmp_path / "brain-mask_validation.tsv").read_text().splitlines()[-1]
    assert float(last.split("\t")[1]) > 0.9
