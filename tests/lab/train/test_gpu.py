"""Trainings on a GPU, if there is one: weights and moments are on it, before and after a resume."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from bids_dgmseg.lab.simulate.anatomy import LabelMap
from bids_dgmseg.lab.simulate.sample import View
from bids_dgmseg.lab.train import frame, simulated
from bids_dgmseg.lab.train.core import Run, train
from bids_dgmseg.lab.train.folds import build_trainable
from bids_dgmseg.lab.train.frame import TrainingRequest
from bids_dgmseg.lab.train.patches import Case, WindowSamples
from bids_dgmseg.lab.train.simulated import train_on_simulations
from bids_dgmseg.models.registry import MODELS, get_model
from tests.lab.train.recipe_trainings import read
from tests.lab.train.recorder import Lines

VIEW = View(shape=(14, 16, 14), spacing_mm=10.0, centre_mm=(0.0, -18.0, 5.0))
SMALL = replace(get_model("default"), arch={"features": [4, 8]}, weights=None)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GPU = torch.device("cuda", 0)


@pytest.fixture
def states(monkeypatch):
    """The states that `train` was called with."""
    seen = []

    def record(state, *args, **kwargs):
        seen.append(state)
        return train(state, *args, **kwargs)

    monkeypatch.setattr(frame, "train", record)
    return seen


def check_places(network, optimizer, others=()):
    """Weights, both moments of each and what else there is lie on the GPU."""
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    learned = [parameter for parameter in network.parameters() if parameter.grad is not None]
    assert len(moments) == 2 * len(learned) > 0
    assert {value.device for value in [*network.state_dict().values(), *moments, *others]} == {GPU}


@pytest.fixture
def small_maps(small_head, monkeypatch):
    """Heads that are drawn quickly, in few and large voxels."""
    plain = LabelMap(small_head.labels, small_head.world_to_index)
    monkeypatch.setattr("bids_dgmseg.lab.train.simulated.phantom_head", lambda: plain)
    for name in ("SEGMENTER_VIEW", "LOCALIZER_VIEW"):
        monkeypatch.setattr(simulated, name, VIEW)


@pytest.mark.parametrize("part", ["segmenter", "localizer"])
def test_simulated_training_stays_on_the_gpu(small_maps, states, tmp_path, part):
    for steps in (2, 4):
        request = TrainingRequest(model=SMALL, out=tmp_path, part=part, steps=steps, device="cuda")
        assert train_on_simulations(request, log=Lines()).state.step == steps
        check_places(states[-1].network, states[-1].optimizer, states[-1].average.values())
    assert len(states) == 2


PAPERS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "attunet25d": ({"features": (2, 4, 8, 16)}, (12, 3, 12)),
    "dcnnet": ({"initial_features": 2, "growth": 2, "dilations": ((1,), (1,)), "bottleneck_layers": 1}, (8, 8, 8)),
    "deepqsmseg": ({"features": (2, 4, 8), "blocks": (1, 1, 1)}, (9, 8, 8)),
}
"""Smallest arguments and samples."""


@pytest.fixture
def train_paper(tmp_path):
    """Trains for some epochs of a few steps, resuming what is there; returns the state."""

    def run(name, *, n_epochs, device):
        (arch, size), model, replace = PAPERS[name], MODELS[name], msgspec.structs.replace
        recipe = read(name)
        x, y, z = (4 * min(step, 1) for step in recipe.sampling.step)
        sampling = replace(recipe.sampling, size=size, step=(x, y, z), normalization="ppm", empty=1.0)
        sampling = replace(sampling, zero_padding=False)  # the case has no room for it
        pace = replace(recipe.pace, epochs=n_epochs, batch=2, milestones=())
        recipe = replace(recipe, sampling=sampling, pace=pace, arch=arch)
        labels = torch.zeros((12, 12, 12), dtype=torch.uint8)
        for number in range(1, len(recipe.classes) + 1):
            labels[:, number] = number
        case = Case("one", labels * 0.1, labels, (slice(2, 10),) * 3)
        samples = WindowSamples([case], recipe, seed=1, augment=True)
        checkpoint, classes = tmp_path / "fold_0" / "checkpoint.pt", tuple(recipe.classes)
        run = Run(recipe.pace, recipe.loss, checkpoint, classes, device=torch.device(device))
        network, weights = build_trainable(model, recipe, seed=1), tmp_path / "fold_0.safetensors"
        return frame.fit(network, samples, run, weights, log=Lines(), record={}, validation=samples).state

    return run


@pytest.mark.parametrize("name", PAPERS)
def test_recipe_training_stays_on_the_gpu(name, train_paper):
    for n_epochs in (1, 2):
        state = train_paper(name, n_epochs=n_epochs, device="cuda")
        assert len(state.rows) == n_epochs
        check_places(state.network, state.optimizer)


def test_gpu_training_resumes_on_a_cpu(train_paper):
    before = train_paper("deepqsmseg", n_epochs=1, device="cuda")
    after = train_paper("deepqsmseg", n_epochs=2, device="cpu")
    assert [row["epoch"] for row in after.rows] == [1, 2]
    assert after.rows[0]["validation_loss"] == before.rows[0]["validation_loss"]
