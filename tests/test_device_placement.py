"""Networks and losses keep everything on the device that they are told.

Here torch's fake tensors are on a GPU: they have no values but, as real ones do, refuse to meet tensors of the CPU.
Trainings on a real GPU: tests/lab/train/test_gpu.py.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bids_dgmseg.lab.train.learner import build_trainable
from bids_dgmseg.lab.train.recipes import get_recipe
from bids_dgmseg.models.model_folder import localizer_network, segmenter_network
from bids_dgmseg.models.registry import MODELS, get_model
from bids_dgmseg.segmentation.inference import batch_to_device, forward_batch, mixed_precision

GPU = torch.device("cuda", 0)
ARCHES: dict[str, dict[str, Any]] = {
    "dgm16": {"features": [2, 4]},
    "attunet25d": {"features": (2, 4, 8, 16)},
    "dcnnet": {"initial_features": 2, "growth": 2, "dilations": ((1,), (1,)), "bottleneck_layers": 1},
    "deepqsmseg": {"features": (2, 4, 8), "blocks": (1, 1, 1)},
}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Only the names of devices matter, not whether they exist."""
    monkeypatch.setattr("bids_dgmseg.segmentation.inference.pick_device", torch.device)
    monkeypatch.setattr("bids_dgmseg.segmentation.inference._has_fast_bfloat16", lambda device: False)
    # Modules of fake tensors cannot be moved: they are made where they belong.
    monkeypatch.setattr("bids_dgmseg.segmentation.inference.to_channels_last", lambda network, device: network)
    with FakeTensorMode():
        yield


def test_network_left_behind_is_refused():
    with pytest.raises(RuntimeError, match="cpu"):
        torch.nn.Conv3d(1, 1, 1)(torch.ones(1, 1, 3, 3, 3, device=GPU))


@pytest.mark.parametrize("name", [*ARCHES, "localizer"])
def test_logits_stay_on_the_device_in_float32(name):
    slices = 0 if name == "localizer" else MODELS[name].input.slices
    with GPU:
        small = segmenter_network(replace(MODELS[name], arch=ARCHES[name])) if name in ARCHES else None
        network = small or localizer_network(get_model("default"))
    size = (16, 16) if slices else (16, 16, 16)
    logits = forward_batch(network.eval(), np.zeros((2, slices or 1, *size), np.float32), "cuda:0")
    assert {logits.device, *(values.device for values in network.state_dict().values())} == {GPU}
    assert (len(logits), logits.shape[2:], logits.dtype) == (2, size, torch.float32)


@pytest.mark.parametrize("name", list(ARCHES)[1:])
def test_loss_stays_on_the_device(name):
    recipe = get_recipe(name)
    with GPU:
        network = build_trainable(replace(MODELS[name], arch=ARCHES[name]), recipe, seed=0)
    size = (16, 16) if MODELS[name].input.slices else (16, 16, 16)
    inputs = torch.zeros((2, MODELS[name].input.slices or 1, *size))
    labels = torch.zeros((2, *size), dtype=torch.long, device=GPU)
    with mixed_precision(GPU):
        answer = network(batch_to_device(inputs, GPU))
    assert recipe.loss(network, answer, labels).device == GPU
