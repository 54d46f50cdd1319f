from dataclasses import replace

import pytest
import torch

from bids_dgmseg.lab.simulate.sample import View
from bids_dgmseg.lab.train import simulated
from bids_dgmseg.models.model_folder import save_weights, segmenter_network
from bids_dgmseg.models.registry import MODELS, Localizer
from tests.lab.train.recipe_trainings import SMALL, make_dataset
from tests.lab.train.recorder import Lines
from tests.lab.train.small_maps import SMALL_MODEL


@pytest.fixture
def lines():
    """A log that keeps its lines."""
    return Lines()


@pytest.fixture
def small_recipes(monkeypatch):
    """One thread, and boxes in the middle of the phantom instead of where a large network sees it."""
    monkeypatch.setattr("bids_dgmseg.lab.train.folds.use_all_cores", lambda: torch.set_num_threads(1))
    for name in SMALL:
        if MODELS[name].localizer.kind == "centre":
            monkeypatch.setitem(MODELS, name, replace(MODELS[name], localizer=Localizer(kind="centre")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four phantoms of two sites, three of them labelled."""
    return make_dataset(tmp_path_factory.mktemp("training") / "ds")


@pytest.fixture
def small_maps(monkeypatch):
    """Maps of 24³ voxels of 4 mm."""
    monkeypatch.setattr(simulated, "SEGMENTER_VIEW", View((24, 24, 24), 4.0, (0.0, -20.0, -7.0)))


@pytest.fixture
def start(tmp_path):
    """A folder of weights, drawn at random, and those weights."""
    torch.manual_seed(5)
    save_weights(segmenter_network(SMALL_MODEL).state_dict(), tmp_path / "start" / "segmenter.safetensors")
    return tmp_path / "start"
