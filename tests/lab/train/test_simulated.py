import nibabel as nib
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.lab.simulate.artefacts import ScanGrid
from bids_dgmseg.lab.train import simulated
from bids_dgmseg.lab.train.frame import TrainingRequest
from bids_dgmseg.lab.train.simulated import simulated_maps, train_on_simulations
from bids_dgmseg.models.model_folder import read_model_folder, save_weights, write_model_toml
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.head import PHANTOM
from tests.lab.train.recorder import Lines
from tests.lab.train.small_maps import SMALL_MODEL

pytestmark = pytest.mark.usefixtures("small_maps")


@pytest.fixture
def drawn(monkeypatch):
    """The views of the maps that are drawn, which show nothing."""
    views = []

    def draw(heads, view, seed):
        views.append(view)
        ones = torch.ones(16, 16, 16, dtype=torch.uint8)
        return torch.zeros(16, 16, 16), ones, ScanGrid((16, 16, 16), (1.0, 1.0, 1.0))

    monkeypatch.setattr(simulated, "draw_sample", draw)
    return views


def train(out, *, log=None, **options):
    defaults = {"workers": 0, "device": "cpu", "seed": 0}
    request = TrainingRequest(model=SMALL_MODEL, out=out, **{**defaults, **options})
    outcome = train_on_simulations(request, log=log or Lines())
    return outcome, load_file(out / f"{request.part}.safetensors")


def test_training_starts_from_given_weights(start, tmp_path):
    initial = load_file(start / "segmenter.safetensors")
    outcome, learned = train(tmp_path / "out", steps=1, learning_rate=1e-9, start=start)
    assert outcome.done
    for name, values in initial.items():
        torch.testing.assert_close(learned[name], values, atol=2e-3, rtol=0)  # float16 of values that hardly moved


def test_template_without_parts_of_nuclei_does_not_train_them(tmp_path):
    grid = world_grid(Box((-75, -108, -78), (75, 72, 79)), (3.0, 3.0, 3.0))
    nib.Nifti1Image(PHANTOM.labels(grid.centres_mm()), grid.affine).to_filename(tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match=r"^labels\.nii\.gz: no label of SNc_L; create it"):
        simulated_maps(MODELS["dgm24"], tmp_path / "labels.nii.gz", "segmenter", seed=1)


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


def test_segmenter_sees_typical_maps(start, tmp_path, drawn):
    train(tmp_path / "out", steps=6, start=start)
    assert [view.values.mixture == 0 for view in drawn] == [True, False, False, True, False, False]
    # 95 × 120 × 105 mm in voxels of 4 mm; 3 voxels more in z, half of them below.
    assert [view.shape for view in drawn[:2]] == [(24, 30, 27), (24, 24, 24)]
    assert [view.cut_mm for view in drawn[:2]] == [(23.0, 14.0), (17.0, 8.0)]
