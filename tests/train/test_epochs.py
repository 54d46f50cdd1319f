"""Learning in epochs, on one pair of cubes and a network of a few dozen weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bids_dgmseg.train.cases import Case
from bids_dgmseg.train.epochs import Run, State, learn, validate
from bids_dgmseg.train.objectives import DiceCrossEntropyObjective, main_logits, most_probable_classes
from bids_dgmseg.train.patches import WindowSamples
from bids_dgmseg.train.recipe import Augmentation, Pace, Recipe, Sampling

PACE = Pace(epochs=4, batch=2, learning_rate=0.05)
RECIPE = Recipe(
    classes={"CN": ("CN",)},
    loss=DiceCrossEntropyObjective(),
    pace=PACE,
    augmentation=Augmentation(shift=1),
    sampling=Sampling((4, 4, 4), (4, 4, 4), "labels", normalization="ppm", normalized="region"),
)


class Tiny(nn.Module):
    """A convolution with dropout, which must not depend on where a training was interrupted."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.outer(nn.functional.dropout(self.inner(x).relu(), 0.3, self.training))


@pytest.fixture
def samples():
    """A bright cube in noise: eight samples, of which one epoch makes four batches."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros((8, 8, 8), dtype=torch.uint8)
    labels[2:6, 2:6, 2:6] = 1
    chi = labels.float() + 0.3 * torch.randn(labels.shape, generator=generator)
    return WindowSamples([Case("one", chi, labels, (slice(0, 8),) * 3)], RECIPE, seed=3, moved=True)


def start(pace=PACE):
    torch.manual_seed(0)
    return State.start(Tiny(), pace)


def run_until(samples, folder, *, pace=PACE, stop=None, state=None, validation=None, **options):
    """Learn; `stop` is (epoch, step) after which an interruption comes, as a kill would."""
    state = state or start(pace)
    run = Run(pace, RECIPE.loss, folder / "checkpoint.pt", 2, **{"checkpoint_minutes": 0, **options})

    def interrupt(state, steps, loss):
        if (state.epoch, state.step) == stop:
            raise KeyboardInterrupt

    learn(state, samples, samples if validation is None else validation, run, report=interrupt)
    return state


@pytest.mark.parametrize("stop", [(0, 3), (1, 4), (2, 1)], ids=["in the first", "at an end", "after a beginning"])
def test_an_interrupted_training_goes_on_to_the_same_rows_and_weights(samples, tmp_path, stop):
    whole = run_until(samples, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_until(samples, tmp_path, stop=stop)
    again = start()
    again.load(tmp_path / "checkpoint.pt")
    assert (again.epoch, again.step) < (4, 0)
    run_until(samples, tmp_path, state=again)
    assert again.rows == whole.rows
    for name, value in whole.result().items():
        assert torch.equal(again.result()[name], value)


def test_it_learns(samples, tmp_path):
    state = run_until(samples, tmp_path, pace=replace(PACE, epochs=15))
    assert state.rows[-1].validation_loss < 0.7 * state.rows[0].validation_loss
    assert state.rows[-1].dice[0] > 0.85


def test_the_best_weights_are_kept_and_patience_ends_the_training(samples, tmp_path):
    pace = replace(PACE, epochs=50, learning_rate=3.0, patience=2)  # far too fast
    state = run_until(samples, tmp_path, pace=pace)
    losses = [row.validation_loss for row in state.rows]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert state.over(pace)
    network = Tiny()
    network.load_state_dict(state.result())
    assert validate(network, samples, Run(pace, RECIPE.loss, tmp_path / "x", 2))[0] == pytest.approx(min(losses))


def test_time_ends_an_epoch_early_and_more_time_goes_on(samples, tmp_path):
    clock = iter(range(1000))
    pace = replace(PACE, minutes=0.1)  # six seconds, one a step
    state = run_until(samples, tmp_path, pace=pace, clock=lambda: float(next(clock)))
    assert state.over(pace)
    assert [row.steps for row in state.rows][:1] == [4]
    assert sum(row.steps for row in state.rows) <= 6
    longer = replace(pace, minutes=None)
    assert not state.over(longer)
    assert run_until(samples, tmp_path, pace=longer, state=state).epoch == 4


def test_a_loss_that_is_no_number_ends_the_training(samples, tmp_path):
    broken = start()
    with torch.no_grad():
        broken.network.outer.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan in step 1 of epoch 1"):
        run_until(samples, tmp_path, state=broken)


def test_without_validation_the_last_weights_are_kept(samples, tmp_path):
    state = start()
    learn(state, samples, None, Run(PACE, RECIPE.loss, tmp_path / "c.pt", 2), report=lambda *figures: None)
    assert math.isnan(state.rows[-1].validation_loss)
    assert torch.equal(state.result()["outer.bias"], state.network.outer.bias)


def test_each_epoch_shows_every_sample_once_in_another_order(samples, tmp_path):
    from bids_dgmseg.train.epochs import _Batches

    batches = list(_Batches(8, replace(PACE, epochs=2), seed=1, epoch=0, step=0))
    first, second = ([index % 8 for batch in part for index in batch] for part in (batches[:4], batches[4:]))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert list(_Batches(8, replace(PACE, epochs=2), seed=1, epoch=0, step=3)) == batches[3:]


def test_independent_nuclei_are_decided_by_the_most_probable_that_is_more_probable_than_not():
    # Heads (background, nucleus): voxel 1 has 0.4 and 0.1, voxel 2 has 0.6 and 0.9, voxel 3 has 0.8 and 0.6.
    nuclei = torch.tensor([[0.4, 0.6, 0.8], [0.1, 0.9, 0.6]])
    logits = torch.stack([1 - nuclei[0], nuclei[0], 1 - nuclei[1], nuclei[1]]).log()[None]
    assert most_probable_classes(logits, 3).tolist() == [[0, 2, 1]]
    assert main_logits([logits, logits[..., :1]]) is logits
