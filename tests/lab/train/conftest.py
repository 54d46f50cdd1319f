from dataclasses import replace

import pytest
import torch

from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import View, template_head
from bids_dgmseg.lab.train import simulated
from bids_dgmseg.models.model_folder import save_weights, segmenter_network
from bids_dgmseg.models.registry import MODELS, Localizer
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import HEAD
from tests.lab.train.recipe_trainings import SMALL, make_dataset
from tests.lab.train.recorder import Lines
from tests.lab.train.small_maps import SMALL_MODEL


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads wait for one another longer than these small networks compute."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


@pytest.fixture
def lines():
    """A log that keeps its lines."""
    return Lines()


@pytest.fixture
def small_recipes(monkeypatch):
    """Boxes in the middle of the phantom instead of where a large network sees it."""
    for name in SMALL:
        if MODELS[name].localizer.kind != "atlas":
            monkeypatch.setitem(MODELS, name, replace(MODELS[name], localizer=Localizer(kind="centre")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four phantoms of two sites, three of them labelled."""
    return make_dataset(tmp_path_factory.mktemp("training") / "ds")


@pytest.fixture(scope="session")
def small_head():
    """The phantom at 3 mm."""
    grid = world_grid(HEAD, (3.0, 3.0, 3.0))
    return template_head(Volume(PHANTOM.labels(grid.centres_mm()), grid.affine))


@pytest.fixture
def small_maps(monkeypatch, small_head):
    """Maps of 24³ voxels of 4 mm, of a phantom that is quickly made."""
    monkeypatch.setattr(simulated, "phantom_head", lambda: small_head)
    monkeypatch.setattr(simulated, "SEGMENTER_VIEW", View((24, 24, 24), 4.0, (0.0, -20.0, -7.0)))


@pytest.fixture
def start(tmp_path):
    """A folder of weights, drawn at random, and those weights."""
    torch.manual_seed(5)
    save_weights(segmenter_network(SMALL_MODEL).state_dict(), tmp_path / "start" / "segmenter.safetensors")
    return tmp_path / "start"
