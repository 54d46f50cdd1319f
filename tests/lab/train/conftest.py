from dataclasses import replace

import pytest
import torch

from bids_dgmseg.models.registry import MODELS, Localizer
from tests.lab.train.recipe_trainings import SMALL, make_dataset
from tests.lab.train.recorder import Lines


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
