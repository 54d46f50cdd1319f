from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.model_folder import load_weights, save_weights, segmenter_network
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision
from bids_dgmseg.simulate.sample import View
from bids_dgmseg.train import simulated
from bids_dgmseg.train.log import StepLog
from bids_dgmseg.train.losses import dice_and_cross_entropy, dice_and_focal
from bids_dgmseg.train.simulated import TrainingConfig, mix_in_typical_maps, simulated_maps, train_on_simulations
from tests.train.recorder import Lines

DEFAULT = get_model("default")
SMALL = replace(
    DEFAULT, arch={"features": [4, 8]}, weights=None, input=replace(DEFAULT.input, spacing_mm=(4.0, 4.0, 4.0))
)
"""For maps of 4 mm."""


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    """Maps of 24³ voxels of 4 mm."""
    monkeypatch.setattr(simulated, "SEGMENTER_VIEW", View((24, 24, 24), 4.0, (0.0, -20.0, -7.0)))


@pytest.fixture
def drawn(monkeypatch):
    """The views of the maps that are drawn, which show nothing."""
    views = []

    def draw(heads, view, seed):
        views.append(view)
        return torch.zeros(16, 16, 16), torch.ones(16, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(simulated, "draw_sample", draw)
    return views


@pytest.fixture
def start(tmp_path):
    """A folder of weights, drawn at random, and those weights."""
    torch.manual_seed(5)
    save_weights(segmenter_network(SMALL).state_dict(), tmp_path / "start" / "segmenter.safetensors")
    return tmp_path / "start"


def train(out, *, log=None, **options):
    defaults = {"part": "segmenter", "minutes": 5, "workers": 0, "device": "cpu", "validation_maps": 0}
    config = TrainingConfig(**{**defaults, **options})
    outcome = train_on_simulations(SMALL, None, out, config, log=log or Lines())
    return outcome, load_file(out / f"{config.part}.safetensors")


@pytest.mark.parametrize(("loss", "formula"), [("cross-entropy", dice_and_cross_entropy), ("focal", dice_and_focal)])
def test_chosen_loss_is_used(start, tmp_path, monkeypatch, loss, formula):
    losses = []
    monkeypatch.setattr(StepLog, "step", lambda log, state, result: losses.append(result.loss))
    train(tmp_path / "out", steps=1, start=start, loss=loss, seed=3)
    values, labels = mix_in_typical_maps(simulated_maps(SMALL, None, "segmenter", seed=3), SMALL)[0]
    network = load_weights(segmenter_network(SMALL), SMALL, "segmenter", start)
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
        simulated_maps(SMALL, tmp_path / "labels.nii.gz", "segmenter", seed=1)


def test_each_step_updates_the_status(tmp_path, lines):
    train(tmp_path / "out", steps=2, log=lines)
    assert [line.partition(" min, ")[0].rpartition(", ")[0] for line in lines.status] == ["step 1/2", "step 2/2"]


def test_simulation_restores_the_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulated_maps(SMALL, None, "segmenter", seed=1)[0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_validation_maps_do_not_depend_on_seed(start, tmp_path):
    # Weights that hardly move: what they find in the fixed maps is all but the same after one seed's step or another's.
    tables = []
    for seed in (1, 2):
        train(tmp_path / str(seed), steps=1, learning_rate=1e-9, start=start, seed=seed, validation_maps=2)
        tables.append((tmp_path / str(seed) / "segmenter_validation.tsv").read_text(encoding="utf-8").splitlines())
    assert tables[0][0].split("\t") == ["step", *SMALL.labels]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


def test_checkpoint_takes_precedence_over_starting_weights(start, tmp_path):
    train(tmp_path / "out", steps=2, learning_rate=0.05)
    before = load_file(tmp_path / "out" / "segmenter.safetensors")
    _, after = train(tmp_path / "out", steps=2, start=start)
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_segmenter_sees_typical_maps(start, tmp_path, drawn):
    train(tmp_path / "out", steps=6, start=start)
    assert [view.values.mixture == 0 for view in drawn] == [True, False, False, True, False, False]
    # 95 × 120 × 105 mm in voxels of 4 mm; 3 voxels more in z, half of them below.
    assert [view.shape for view in drawn[:2]] == [(24, 30, 27), (24, 24, 24)]
    assert [view.cut_mm for view in drawn[:2]] == [(23.0, 14.0), (17.0, 8.0)]


def test_localizer_sees_no_typical_maps(tmp_path, drawn):
    train(tmp_path / "out", steps=2, part="localizer")
    assert [view.values.mixture == 0 for view in drawn] == [False, False]
