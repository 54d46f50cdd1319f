"""Inference on a fake GPU: tensors stay on one device, and results equal those of the CPU."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import save_weights, segmenter_network, write_model_toml
from bids_dgmseg.models.nnunet_folder import read_folder
from bids_dgmseg.models.registry import MODELS, get_model
from bids_dgmseg.segmentation.inference import forward_batch
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.nnunet import Network
from bids_dgmseg.segmentation.predict import NetworkPredictor
from tests.conftest import coarse_chi
from tests.pretend_gpu import GPU, place_of, pretend_gpu
from tests.segmentation.nnunet_folders import write_folder


@pytest.fixture(autouse=True)
def quick_bfloat16(monkeypatch):
    """Compute in bfloat16 on both devices, and sum one window or four in the same order."""
    monkeypatch.setattr("bids_dgmseg.segmentation.inference._has_fast_bfloat16", lambda device: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_logits_stay_on_the_gpu_in_float32():
    network = nn.Conv3d(1, 2, 1)
    with pretend_gpu():
        logits = forward_batch(network, np.zeros((1, 1, 2, 3, 4), np.float32), "cuda")
        assert {place_of(values) for values in (logits, *network.parameters())} == {GPU}
        assert logits.dtype == torch.float32


ARCHES: dict[str, dict[str, Any]] = {
    "dgm16": {"features": [2, 4]},
    "attunet25d": {"features": (2, 4, 8, 16)},
    "dcnnet": {"initial_features": 2, "growth": 2, "dilations": ((1,), (1,)), "bottleneck_layers": 1},
    "deepqsmseg": {"features": (2, 4, 8), "blocks": (1, 1, 1)},
}


@pytest.mark.parametrize("name", ARCHES)
def test_gpu_prediction_equals_the_cpu(name, tmp_path):
    x, y, z = (8 * step for step in MODELS[name].input.spacing_mm)
    patch, shipped = replace(MODELS[name].input, patch_mm=(x, y, z)), name == "dgm16"
    model = replace(MODELS[name], arch=ARCHES[name], weights=None, input=patch, ensemble=shipped)
    model = replace(model, temperatures=(1.5,) * 17 if shipped else ())
    torch.manual_seed(0)
    part = "segmenter" if shipped else "fold_0"
    save_weights(segmenter_network(model).state_dict(), tmp_path / f"{part}.safetensors")
    write_model_toml(model, tmp_path, about={"temperatures": list(model.temperatures)} if shipped else {})
    chi = Volume(np.random.default_rng(0).normal(0, 0.1, (10, 11, 9)).astype(np.float32), np.eye(4))
    expected = NetworkPredictor(model, weights=tmp_path, device="cpu")(chi)
    with pretend_gpu():
        found = NetworkPredictor(model, weights=tmp_path, device="cuda")(chi)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gpu_localizer_equals_the_cpu():
    model = get_model("default")
    expected = localize(coarse_chi(), model)
    with pretend_gpu():
        found = localize(coarse_chi(), model, device="cuda")
    assert found.box == expected.box


def test_nnunet_on_the_gpu_equals_the_cpu(tmp_path):
    trained = read_folder(write_folder(tmp_path / "model", mirror_axes=(0, 1)))
    chi = Volume(np.random.default_rng(0).normal(size=(18, 22, 20)).astype(np.float32), np.diag([1.5, 1.7, 2.1, 1.0]))
    expected = Network(trained, device="cpu", sided=True)(chi)
    with pretend_gpu():
        found = Network(trained, device="cuda", sided=True)(chi)
    np.testing.assert_allclose(found, expected, atol=0.05)  # bfloat16 against float32
