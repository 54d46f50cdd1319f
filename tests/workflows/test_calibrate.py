# ruff: noqa: F811 - fixtures
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import (
    TYPICAL_WIDTH,
    class_labels,
    draw_sample,
    phantom_head,
    typical_view,
    without_resampling,
)
from bids_dgmseg.lab.simulate.simulated_dataset import scanner_grid, whole_head_view
from bids_dgmseg.models.model_folder import (
    load_weights,
    read_model_folder,
    segmenter_network,
    write_model_toml,
)
from bids_dgmseg.segmentation.predict import Location, merge_auxiliary, network_grid
from bids_dgmseg.segmentation.segment import segment_map
from tests.lab.train.conftest import small_maps, start  # noqa: F401 - fixtures
from tests.lab.train.small_maps import SMALL_MODEL

pytestmark = pytest.mark.usefixtures("small_maps")

N_CHANNELS = 1 + len(SMALL_MODEL.classes)


def test_temperature_is_written_to_the_folder(script, start):
    lines: list[str] = []
    own = replace(SMALL_MODEL, input=replace(SMALL_MODEL.input, patch_mm=(64.0, 72.0, 80.0)))
    write_model_toml(own, start, about={"temperatures": [9.0] * N_CHANNELS})
    temperature = script.calibrate(SMALL_MODEL, None, start, n_maps=1, seed=1, device="cpu", log=lines.append)
    assert len(lines) == 16 + 8
    assert lines[0].startswith("DN_L ")
    assert lines[16].startswith("DN ")
    trained = read_model_folder(SMALL_MODEL, start)
    assert trained.temperatures == pytest.approx([temperature] * N_CHANNELS, abs=1e-4)
    assert trained.input == own.input


def test_calibration_changes_only_the_last_biases(script, start):
    before = load_file(start / "segmenter.safetensors")
    script.calibrate(SMALL_MODEL, None, start, n_maps=1, seed=1, device="cpu", log=lambda line: None)
    after = load_file(start / "segmenter.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["heads.0.bias"]
    moved = (after["heads.0.bias"] - before["heads.0.bias"]).float()
    shifts = moved / torch.tensor(read_model_folder(SMALL_MODEL, start).temperatures)
    torch.testing.assert_close(shifts[1::2], shifts[2::2], atol=0.02, rtol=0)  # left and right; float16
    assert abs(float(shifts[0])) < 1e-6


def test_interrupted_calibration_changes_nothing(script, start, monkeypatch):
    write_model_toml(SMALL_MODEL, start, about={"temperatures": [9.0] * N_CHANNELS})
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    rounds: list[int] = []

    def stop_in_the_second_round(*args):
        if rounds:
            raise KeyboardInterrupt
        rounds.append(1)
        return torch.full((17,), 0.5)

    monkeypatch.setattr(script, "fit_shifts", stop_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        script.calibrate(SMALL_MODEL, None, start, n_maps=1, seed=1, device="cpu", log=print)
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before


def test_other_networks_are_refused(script, tmp_path):
    other = replace(SMALL_MODEL, network="bids_dgmseg.networks.dcn_net:DCNNet", arch={})
    with pytest.raises(InputError, match="DCNNet is not trained on simulated maps; pass a folder of dgm16"):
        script.calibrate(other, None, tmp_path, n_maps=1, seed=1, device="cpu", log=print)


def test_missing_weights_are_refused(script, tmp_path):
    with pytest.raises(
        InputError, match=r"no weights in .*; pass another folder as `weights` or choose another `model`"
    ):
        script.calibrate(SMALL_MODEL, None, tmp_path, n_maps=1, seed=1, device="cpu", log=print)


def test_cropped_head_gives_the_same_probabilities(script, start):
    (head,) = script._draw_heads(SMALL_MODEL, phantom_head(), start, n_maps=1, seed=2, device="cpu")
    view = without_resampling(typical_view(whole_head_view(4.0), TYPICAL_WIDTH))
    values, labels = draw_sample([(phantom_head(), 1.0)], view, script._FIRST_HEAD + 2 * script._HEADS_PER_SEED)
    chi, location = Volume(values.numpy(), scanner_grid(view).affine), Location(head.box)
    whole, part = (segment_map(one, SMALL_MODEL, weights=start, location=location).block for one in (chi, head.chi))
    np.testing.assert_allclose(part.probabilities, whole.probabilities, atol=1e-5)
    assert torch.equal(head.labels[part.slices], class_labels(labels, SMALL_MODEL.classes)[whole.slices])

    shown, classes = script._network_input(head, SMALL_MODEL)
    first = np.linalg.inv(head.chi.affine) @ network_grid(head.chi, head.box, SMALL_MODEL).affine[:, 3]
    places = zip(part.slices, first[:3].round().astype(int), strict=True)
    seen = tuple(slice(along.start - n, along.stop - n) for along, n in places)
    assert torch.equal(classes[seen], head.labels[part.slices])
    network = load_weights(segmenter_network(SMALL_MODEL), SMALL_MODEL, "segmenter", start)
    passes = script._logits(network, shown, SMALL_MODEL, "cpu")
    given = merge_auxiliary(passes.softmax(dim=1).mean(dim=0)[:, *seen].numpy(), SMALL_MODEL)
    measured = part.probabilities[0] < 1  # nothing is labelled where the map shows nothing
    assert measured.mean() > 0.5
    np.testing.assert_allclose(given[:, measured], part.probabilities[:, measured], atol=0.02)


def slope(n: int, width: int, lack: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a nucleus of `width` of `n` voxels that fall by 0.1 a voxel and lack a constant."""
    place = torch.arange(n)
    logits = torch.zeros(n, 2)
    logits[:, 1] = 0.1 * (width - 0.5 - place) - lack
    return logits, (place < width).long()


def test_volume_error_is_a_median_over_maps(script):
    maps = [slope(200, width, lack) for width, lack in ((100, 1.0), (50, 1.0), (100, 5.0))]  # 90, 40 and 50 voxels
    maps.append((torch.tensor([[0.0, 9.0]]), torch.tensor([0])))  # shows none
    assert script.volume_errors(maps, [[1]], torch.zeros(2)) == pytest.approx([-0.2])


def test_absent_nucleus_has_no_volume_error(script):
    assert script.volume_errors([(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))], [[1]], torch.zeros(2)) == [0.0]


@pytest.mark.parametrize("lack", [-1.2, 0.7, 1.3])
def test_shift_corrects_the_volume(script, lack):
    shifts = script.fit_shifts([slope(400, width, lack) for width in (80, 90, 100, 110, 120)], [[1]])
    assert shifts[0] == 0
    assert float(shifts[1]) == pytest.approx(lack, abs=0.05)  # half a voxel


def test_hemispheres_share_a_shift(script):
    left, right = slope(400, 100, 1.0), slope(400, 100)
    logits = torch.cat([torch.nn.functional.pad(left[0], (0, 1), value=-99.0), right[0][:, [0, 1, 1]]])
    logits[400:, 1] = -99.0
    shifts = script.fit_shifts([(logits, torch.cat([left[1], 2 * right[1]]))], [[1, 2]])
    assert shifts[1] == shifts[2]
    assert float(shifts[1]) == pytest.approx(0.5, abs=0.05)


def test_shift_is_limited(script):
    logits, labels = slope(200, 50, 40.0)
    assert math.isclose(float(script.fit_shifts([(logits, labels)], [[1]])[1]), 1.5)


def draw_classes(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the class of each voxel with the probabilities that the logits stand for."""
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_temperature_is_found(script, temperature):
    generator = torch.Generator().manual_seed(2)
    true_logits = torch.randn((100_000, 3), generator=generator) * 2
    fitted = script.fit_temperature((true_logits * temperature)[None], draw_classes(true_logits, generator))
    assert fitted == pytest.approx(temperature, rel=0.04)


def test_uncertain_and_true_voxels_are_chosen(script):
    logits = torch.zeros(1, 2, 4, 1, 1)
    logits[0, 0, :, 0, 0] = torch.tensor([9.0, 9.0, 0.0, 0.0])  # surely background, but the second is not
    labels = torch.tensor([0, 1, 0, 1]).view(4, 1, 1)
    picked, classes = script.choose_voxels(logits, labels, n_voxels=10, generator=torch.Generator().manual_seed(0))
    assert sorted(zip(picked[0, :, 0].tolist(), classes.tolist(), strict=True)) == [(0.0, 0), (0.0, 1), (9.0, 1)]


@pytest.mark.parametrize("n_voxels", [1, 5])
def test_number_of_chosen_voxels_is_limited(script, n_voxels):
    picked, classes = script.choose_voxels(
        torch.zeros(2, 3, 4, 4, 4), torch.zeros(4, 4, 4), n_voxels=n_voxels, generator=torch.Generator().manual_seed(0)
    )
    assert picked.shape == (2, n_voxels, 3)
    assert classes.shape == (n_voxels,)


@pytest.mark.parametrize(
    ("sign", "limit"), [pytest.param(1, 0.01, id="always right"), pytest.param(-1, 100, id="wrong")]
)
def test_temperature_is_limited(script, sign, limit):
    logits = torch.randn((5000, 3), generator=torch.Generator().manual_seed(3))
    assert script.fit_temperature(logits[None], (sign * logits).argmax(dim=1)) == limit


def test_mean_of_passes_is_calibrated(script):
    generator = torch.Generator().manual_seed(6)
    passes = torch.randn((2, 100_000, 3), generator=generator) * 2
    labels = torch.multinomial(passes.softmax(dim=2).mean(dim=0), 1, generator=generator)[:, 0]
    assert script.fit_temperature(2 * passes, labels) == pytest.approx(2.0, rel=0.05)
