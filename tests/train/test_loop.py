from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.simulate.anatomy import LabelMap
from bids_dgmseg.simulate.sample import SEGMENTER_VIEW, nuclei_labels
from bids_dgmseg.train.loop import Progress, Reached, Schedule, train
from bids_dgmseg.train.sampling import SimulatedMaps

SCHEDULE = Schedule(steps=6, warmup_steps=2, learning_rate=5e-3)


@pytest.fixture
def samples():
    """Maps of a ball (CN_L) in a brain, 16 voxels wide."""
    distance = np.linalg.norm(np.indices((40, 40, 40)) - 20, axis=0)
    labels = np.where(distance < 6, 11, np.where(distance < 18, 22, 0)).astype(np.uint8)
    to_index = torch.eye(4)
    to_index[:3, 3] = 20
    view = replace(SEGMENTER_VIEW, shape=(16, 16, 16), spacing_mm=2.0, centre_mm=(0.0, 0.0, 0.0))
    head = LabelMap(torch.from_numpy(labels), to_index)
    return SimulatedMaps([(head, 1.0)], view, seed=0, classes_of=nuclei_labels, normalize=lambda chi: 10 * chi)


def _learn(samples, folder, *slices, schedule=SCHEDULE):
    """Train in slices, each from a new network and the checkpoint; returns (progress, losses)."""
    losses: list[float] = []
    for last in slices:
        torch.manual_seed(len(losses))
        progress = Progress.start(PlainUNet(1, 17, features=(4, 8)), schedule)
        if (folder / "checkpoint.pt").exists():
            progress.load(folder / "checkpoint.pt")

        def stop_after(now, last=last):
            losses.append(now.loss)
            if now.step == last < schedule.steps:
                raise KeyboardInterrupt

        try:
            train(
                progress,
                samples,
                schedule=schedule,
                checkpoint=folder / "checkpoint.pt",
                minutes=10,
                device=torch.device("cpu"),
                report=stop_after,
                workers=0,
            )
        except KeyboardInterrupt:
            progress.save(folder / "checkpoint.pt")
    return progress, losses


def test_a_training_in_slices_is_the_training_in_one_go(samples, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, losses = _learn(samples, tmp_path / "a", 6)
    parts, sliced_losses = _learn(samples, tmp_path / "b", 2, 5, 6)
    assert sliced_losses == losses
    for name, value in whole.average.items():
        torch.testing.assert_close(parts.average[name], value, rtol=0, atol=0)


def test_a_slice_ends_with_its_minutes_and_can_go_on(samples, tmp_path):
    progress = Progress.start(PlainUNet(1, 17, features=(4, 8)), SCHEDULE)
    checkpoint, cpu = tmp_path / "checkpoint.pt", torch.device("cpu")

    def ignore(now):
        pass

    assert not train(
        progress, samples, schedule=SCHEDULE, checkpoint=checkpoint, minutes=0, device=cpu, report=ignore, workers=0
    )
    assert progress.step == 1
    assert train(
        progress, samples, schedule=SCHEDULE, checkpoint=checkpoint, minutes=5, device=cpu, report=ignore, workers=0
    )
    assert progress.step == 6


@pytest.mark.parametrize(
    ("steps", "minutes", "slice_minutes", "left"),
    [
        pytest.param(4, None, 9, [30, 20, 10, 0], id="by steps: ten seconds each"),
        pytest.param(99, 0.5, 9, [20, 10, 0], id="by time: half a minute in all"),
        pytest.param(99, None, 0.4, [14, 4, 0], id="no longer than the slice: 24 seconds"),
    ],
)
def test_it_says_how_long_it_will_take(samples, tmp_path, steps, minutes, slice_minutes, left):
    schedule, seconds = replace(SCHEDULE, steps=steps, minutes=minutes), iter(range(0, 100, 10))
    told: list[Reached] = []
    train(
        Progress.start(PlainUNet(1, 17, features=(4, 8)), schedule),
        samples,
        schedule=schedule,
        workers=0,
        checkpoint=tmp_path / "checkpoint.pt",
        minutes=slice_minutes,
        device=torch.device("cpu"),
        report=told.append,
        clock=lambda: float(next(seconds)),
    )
    assert [now.left for now in told] == pytest.approx(left)
    assert [(now.step, now.seconds) for now in told] == [(step, 10.0 * step) for step in range(1, len(left) + 1)]


def test_it_learns(samples, tmp_path):
    _, losses = _learn(samples, tmp_path, 40, schedule=replace(SCHEDULE, steps=40))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_the_rate_warms_up_and_falls_to_a_hundredth():
    schedule = Schedule(steps=100, warmup_steps=4, learning_rate=1.0)
    assert [schedule.rate(step) for step in (0, 3)] == [0.25, 1.0]
    assert schedule.rate(50) == pytest.approx(0.505)  # 0.01 + 0.99 / 2, half of the cosine
    assert schedule.rate(100) == pytest.approx(0.01)


def test_a_sample_is_the_same_whenever_it_is_asked_for(samples):
    first, again, other = samples[3], samples[3], samples[4]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_average_takes_counters_as_they_are(samples, tmp_path):
    class Normalized(PlainUNet):
        def __init__(self):
            super().__init__(1, 17, features=(4, 8))
            self.norm = torch.nn.BatchNorm3d(1)

        def forward(self, x):
            return super().forward(self.norm(x))

    progress = Progress.start(Normalized(), SCHEDULE)
    train(
        progress,
        samples,
        schedule=SCHEDULE,
        checkpoint=tmp_path / "checkpoint.pt",
        minutes=5,
        device=torch.device("cpu"),
        report=lambda now: None,
        workers=0,
    )
    assert progress.average["norm.num_batches_tracked"] == 6


def test_a_timed_training_ends_with_its_minutes_and_its_slices_add_up(samples, tmp_path):
    schedule = Schedule(steps=1000, minutes=0.1, warmup_steps=1, learning_rate=1.0)  # six seconds, a second a step
    checkpoint, rates = tmp_path / "checkpoint.pt", []

    def learn(*, steps):
        progress = Progress.start(PlainUNet(1, 17, features=(4, 8)), schedule)
        if checkpoint.exists():
            progress.load(checkpoint)
        seconds = iter(range(100))
        done = train(
            progress,
            samples,
            schedule=schedule,
            checkpoint=checkpoint,
            minutes=(steps - 0.5) / 60,
            device=torch.device("cpu"),
            workers=0,
            clock=lambda: float(next(seconds)),
            report=lambda now: rates.append(progress.optimizer.param_groups[0]["lr"]),
        )
        return progress.step, progress.seconds, done

    assert learn(steps=2) == (2, 2.0, False)
    assert learn(steps=9) == (6, 6.0, True)
    assert learn(steps=9) == (6, 6.0, True)
    assert rates[1:] == pytest.approx([schedule.rate(60, seconds) for seconds in (1, 2, 3, 4, 5)])
    assert schedule.rate(60, 3.0) == pytest.approx(0.505)  # 0.01 + 0.99 / 2 at half of the time


def test_a_resumed_average_stays_on_the_device_of_the_training(tmp_path):
    Progress.start(PlainUNet(1, 17, features=(4, 8)), SCHEDULE).save(tmp_path / "checkpoint.pt")
    progress = Progress.start(PlainUNet(1, 17, features=(4, 8)), SCHEDULE)
    progress.average = {name: value.to("meta") for name, value in progress.average.items()}  # in place of a GPU's
    progress.load(tmp_path / "checkpoint.pt")
    assert {value.device.type for value in progress.average.values()} == {"meta"}


@pytest.mark.parametrize("quick", [True, False], ids=["has bfloat16", "emulates bfloat16"])
def test_it_computes_in_bfloat16_where_that_is_quicker(samples, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: quick, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    seen = []
    network = PlainUNet(1, 17, features=(4, 8))
    network.heads[-1].register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    train(
        Progress.start(network, SCHEDULE),
        samples,
        schedule=SCHEDULE,
        checkpoint=tmp_path / "checkpoint.pt",
        minutes=0,
        device=torch.device("cpu"),
        report=lambda now: None,
        workers=0,
    )
    assert seen == [torch.bfloat16 if quick else torch.float32]


def test_a_training_learns_by_the_loss_that_it_is_given(samples, tmp_path):
    progress = Progress.start(PlainUNet(1, 17, features=(4, 8)), SCHEDULE)
    nearest = []

    def to_zero(logits, labels):
        nearest.append(float(logits.detach().abs().mean()))
        return logits.abs().mean()

    train(
        progress,
        samples,
        schedule=replace(SCHEDULE, steps=30),
        checkpoint=tmp_path / "checkpoint.pt",
        minutes=10,
        device=torch.device("cpu"),
        report=lambda now: None,
        workers=0,
        loss=to_zero,
    )
    assert nearest[-1] < nearest[0] / 2
