"""Trainings on a GPU that is pretended: everything that meets lies on the same device, before and after a resume."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import save_weights, segmenter_network, write_model_toml
from bids_dgmseg.models.nnunet_folder import read_checkpoint
from bids_dgmseg.models.registry import MODELS, ModelInput, get_model
from bids_dgmseg.simulate.anatomy import LabelMap
from bids_dgmseg.simulate.artefacts import degrade, draw_scan_grid, simulate_reconstruction
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.simulate.ranges import ArtefactRanges, ReconstructionRanges
from bids_dgmseg.simulate.sample import View, draw_sample, template_head
from bids_dgmseg.simulate.simulated_dataset import whole_head_view
from bids_dgmseg.train import finetune, learner, simulated
from bids_dgmseg.train.calibration import calibrate
from bids_dgmseg.train.core import train
from bids_dgmseg.train.finetune import FineTuning, train_segmenter
from bids_dgmseg.train.labelled_maps import LabelledMap
from bids_dgmseg.train.learner import RuntimeOptions, build_trainable, train_network
from bids_dgmseg.train.nnunet.step import NnunetTraining, train_step
from bids_dgmseg.train.patches import Case, LabelledPatches, prepare_map
from bids_dgmseg.train.recipes import get_recipe
from bids_dgmseg.train.simulated import TrainingConfig, train_on_simulations
from tests.conftest import HEAD
from tests.pretend_gpu import CPU, GPU, place_of, pretend_gpu
from tests.train.recorder import Lines
from tests.train.test_nnunet_step import NAMES, make_cases

VIEW = View(shape=(14, 16, 14), spacing_mm=10.0, centre_mm=(0.0, -18.0, 5.0))
SMALL = replace(get_model("default"), arch={"features": [4, 8]}, weights=None)


@pytest.fixture
def gpu():
    """A machine that has a GPU, as far as torch can tell."""
    with pretend_gpu():
        yield


def on(place, *shape):
    return torch.ones(shape, device=place)


@pytest.mark.parametrize(
    "mix",
    [
        pytest.param(lambda: on(GPU, 2) + on(CPU, 2), id="sum"),
        pytest.param(lambda: torch.stack([on(GPU), on(CPU)]), id="numbers side by side"),
        pytest.param(lambda: on(CPU).add_(on(GPU)), id="into a number"),
        pytest.param(lambda: on(CPU, 2)[torch.zeros(1, dtype=torch.long, device=GPU)], id="index of the other side"),
        pytest.param(lambda: nn.Linear(2, 1)(on(GPU, 1, 2)), id="network left behind"),
        pytest.param(lambda: torch.rand(2, generator=torch.Generator(), device=GPU), id="generator left behind"),
        pytest.param(lambda: on(CPU, 2).normal_(generator=torch.Generator(GPU)), id="generator of the other side"),
        pytest.param(lambda: on(GPU, 2).numpy(), id="array"),
        pytest.param(lambda: np.asarray(on(GPU, 2)), id="array by NumPy"),
    ],
)
def test_pretended_gpu_refuses_mixed_devices(gpu, mix):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|device type (for generator|tensor to numpy)"):
        mix()


def test_pretended_gpu_accepts_valid_operations(gpu):
    values = on(GPU, 3) * torch.tensor(2.0)  # a number of the CPU
    values[torch.tensor([0])] = on(CPU, 1)[0]
    values[1:] = on(CPU, 2) * 3  # copied
    assert values.tolist() == [1, 3, 3]
    assert values.device == values.sum().device == values[torch.tensor([0])].device == GPU
    assert values.cpu().device == CPU


@pytest.fixture(scope="module")
def head():
    """The phantom at 3 mm: its bodies are made in no time."""
    grid = world_grid(Box((-75, -108, -78), (75, 72, 79)), (3.0, 3.0, 3.0))
    return template_head(Volume(PHANTOM.labels(grid.centres_mm()), grid.affine))


@pytest.mark.parametrize("seed", range(3))
def test_simulated_map_equals_that_of_the_cpu(head, gpu, seed, monkeypatch):
    # single numbers from a separate stream, as on a GPU
    monkeypatch.setattr("bids_dgmseg.simulate.ranges._is_on_gpu", lambda generator: True)
    expected = draw_sample([(head, 1.0)], VIEW, seed)
    drawn = draw_sample([(head.to("cuda"), 1.0)], VIEW, seed)
    for one, other in zip(drawn, expected, strict=True):
        assert place_of(one) == GPU
        assert torch.equal(one.cpu(), other)  # the pretended GPU draws the CPU's numbers


def test_simulation_rarely_waits_for_the_gpu(head, gpu, monkeypatch):
    on_gpu, read = head.to("cuda"), []
    draw_sample([(on_gpu, 1.0)], VIEW, 0)  # what is asked for once a body
    item = torch.Tensor.__float__

    def look(tensor):
        read.append(place_of(tensor))
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "__float__", look)
    draw_sample([(on_gpu, 1.0)], VIEW, 1)
    assert len(read) > 200
    assert read.count(GPU) < 20


@pytest.mark.parametrize("method", range(4))
def test_reconstruction_stays_on_the_gpu(gpu, method):
    chi = torch.randn((12, 14, 10), generator=torch.Generator(GPU).manual_seed(0), device=GPU)
    shares = tuple(float(number == method) for number in range(4))
    ranges = ReconstructionRanges(methods=(shares[0], shares[1], shares[2], shares[3]))
    for seed in range(2):
        made = simulate_reconstruction(
            chi,
            chi > -1,
            voxel_size_mm=(2.0, 2.0, 2.0),
            ranges=ranges,
            generator=torch.Generator(GPU).manual_seed(seed),
        )
        assert place_of(made) == GPU


@pytest.mark.parametrize("physics", [0.0, 1.0], ids=["at random", "reconstructed"])
@pytest.mark.parametrize("oblique", [False, True], ids=["upright", "oblique"])
def test_degradation_stays_on_the_gpu(gpu, physics, oblique):
    chi = torch.randn((12, 14, 10), generator=torch.Generator(GPU).manual_seed(0), device=GPU)
    ranges, made = ArtefactRanges(physics=physics), list[torch.Tensor]()
    for seed in range(50):
        grid = draw_scan_grid((12, 14, 10), 2.0, ranges, torch.Generator(GPU).manual_seed(seed))
        if (grid.rotation is not None) == oblique and len(made) < 4:
            made.append(degrade(chi, spacing_mm=2.0, ranges=ranges, generator=torch.Generator(GPU).manual_seed(seed)))
    assert [place_of(one) for one in made] == [GPU] * 4


@pytest.fixture
def states(monkeypatch):
    """The states that `train` was called with."""
    seen = []

    def record(state, *args, **kwargs):
        seen.append(state)
        return train(state, *args, **kwargs)

    for module in (simulated, finetune, learner):
        monkeypatch.setattr(module, "train", record)
    return seen


def check_places(network, optimizer, others=()):
    """Weights, both moments of each and what else there is lie on the GPU."""
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    learned = [parameter for parameter in network.parameters() if parameter.grad is not None]
    assert len(moments) == 2 * len(learned) > 0
    assert {place_of(value) for value in [*network.state_dict().values(), *moments, *others]} == {GPU}


@pytest.fixture
def small_maps(head, monkeypatch):
    """Heads that are drawn quickly, in few and large voxels."""
    plain = LabelMap(head.labels, head.world_to_index)
    monkeypatch.setattr("bids_dgmseg.train.simulated.phantom_head", lambda: plain)
    monkeypatch.setattr("bids_dgmseg.train.calibration.whole_head_view", lambda spacing_mm: whole_head_view(4.0))
    for name in ("SEGMENTER_VIEW", "LOCALIZER_VIEW"):
        monkeypatch.setattr(simulated, name, VIEW)


@pytest.mark.parametrize("part", ["segmenter", "localizer"])
def test_simulated_training_stays_on_the_gpu(small_maps, states, gpu, tmp_path, part):
    for steps in (2, 4):
        this = TrainingConfig(part, steps=steps, minutes=5, device="cuda", validation_maps=1)
        assert train_on_simulations(SMALL, None, tmp_path, this, log=Lines()).step == steps
        check_places(states[-1].network, states[-1].optimizer, states[-1].average.values())
    assert len(states) == 2


def test_calibration_runs_on_the_gpu(small_maps, gpu, tmp_path):
    save_weights(segmenter_network(SMALL).state_dict(), tmp_path / "segmenter.safetensors")
    write_model_toml(SMALL, tmp_path, about={})
    assert calibrate(SMALL, None, tmp_path, n_maps=1, seed=1, device="cuda", log=lambda line: None).shape == (17,)


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
        arch, size = PAPERS[name]
        recipe = get_recipe(name)
        x, y, z = (4 * min(step, 1) for step in recipe.sampling.step)
        sampling = replace(recipe.sampling, size=size, step=(x, y, z), normalization="ppm", empty=1.0)
        sampling = replace(sampling, zero_padding=False)  # the case has no room for it
        pace = replace(recipe.pace, epochs=n_epochs, batch=2, milestones=())
        labels = torch.zeros((12, 12, 12), dtype=torch.uint8)
        for number in range(1, len(recipe.classes) + 1):
            labels[:, number] = number
        case = Case("one", labels * 0.1, labels, (slice(2, 10),) * 3)
        options = RuntimeOptions(device=device, checkpoint_minutes=0)
        recipe = replace(recipe, sampling=sampling, pace=pace)
        network = build_trainable(replace(MODELS[name], arch=arch), recipe, seed=options.seed)
        state = train_network(network, recipe, [case], [case], tmp_path, options)
        save_weights(network.state_dict(), tmp_path / "fold_0.safetensors")
        return state

    return run


@pytest.mark.parametrize("name", PAPERS)
def test_recipe_training_stays_on_the_gpu(name, train_paper, gpu):
    for n_epochs in (1, 2):
        state = train_paper(name, n_epochs=n_epochs, device="cuda")
        assert len(state.rows) == n_epochs
        check_places(state.network, state.optimizer)


def test_gpu_training_resumes_on_a_cpu(train_paper):
    with pretend_gpu():
        before = train_paper("deepqsmseg", n_epochs=1, device="cuda")
    after = train_paper("deepqsmseg", n_epochs=2, device="auto")
    assert [row["epoch"] for row in after.rows] == [1, 2]
    assert after.rows[0]["validation_loss"] == before.rows[0]["validation_loss"]


def test_finetuning_stays_on_the_gpu(states, gpu, tmp_path):
    torch.manual_seed(0)
    shown = ModelInput(spacing_mm=(6.0, 6.0, 6.0), patch_mm=(96.0, 120.0, 96.0))
    model = replace(SMALL, input=shown, temperatures=(1.5,) * 17)
    start, box = tmp_path / "start", Box((-48, -78, -52), (48, 42, 44))
    save_weights(segmenter_network(model).state_dict(), start / "segmenter.safetensors")
    write_model_toml(model, start, about={})
    grid = world_grid(HEAD, (6.0, 6.0, 6.0))
    labels = PHANTOM.dseg(grid)
    one = LabelledMap("sub-01", PHANTOM.chi(grid), labels.with_array(labels.array * (labels.array < 5)))
    prepared = prepare_map(one, box, model, weights=start, device="cuda")
    for steps in (1, 2):
        samples = LabelledPatches([prepared], model, seed=1)
        this = FineTuning(steps=steps, device="cuda", workers=0)
        assert train_segmenter(model, samples, tmp_path / "out", this, start=start, log=Lines()).step == steps
        check_places(states[-1].network, states[-1].optimizer, states[-1].average.values())


def test_nnunet_training_resumes_on_the_gpu(gpu, tmp_path):
    for n_epochs in (1, 2):
        this = NnunetTraining(epochs=n_epochs, iterations=1, validation_iterations=1, device="cuda", plan="small")
        assert train_step("dentate", make_cases, NAMES, tmp_path, this, log=Lines()).epochs == n_epochs
    (latest,) = tmp_path.rglob("checkpoint_latest.pth")
    assert read_checkpoint(latest)["grad_scaler_state"]["_growth_tracker"] == 2  # a step each, none too large
