# ruff: noqa: F811 - fixtures
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.models.model_folder import read_model_folder, write_model_toml
from tests.lab.train.conftest import small_head, small_maps, start  # noqa: F401 - fixtures
from tests.lab.train.small_maps import SMALL_MODEL

pytestmark = pytest.mark.usefixtures("small_maps")

N_CHANNELS = 1 + len(SMALL_MODEL.classes)


def test_temperature_is_written_to_the_folder(script, start):
    lines: list[str] = []
    smaller = replace(SMALL_MODEL, input=replace(SMALL_MODEL.input, patch_mm=(64.0, 72.0, 80.0)))
    write_model_toml(smaller, start, about={"temperatures": [9.0] * N_CHANNELS})
    temperature = script.calibrate(SMALL_MODEL, None, start, n_maps=1, seed=1, device="cpu", log=lines.append)
    assert len(lines) == 16 + 8
    assert lines[0].startswith("DN_L ")
    assert lines[16].startswith("DN ")
    trained = read_model_folder(SMALL_MODEL, start)
    assert trained.temperatures == pytest.approx([temperature] * N_CHANNELS, abs=1e-4)
    assert trained.input == smaller.input


def test_calibration_changes_only_the_last_biases(script, start):
    before = load_file(start / "segmenter.safetensors")
    script.calibrate(SMALL_MODEL, None, start, n_maps=1, seed=1, device="cpu", log=lambda line: None)
    after = load_file(start / "segmenter.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["heads.0.bias"]
    moved = (after["heads.0.bias"] - before["heads.0.bias"]).float()
    shifts = moved / torch.tensor(read_model_folder(SMALL_MODEL, start).temperatures)
    torch.testing.assert_close(shifts[1::2], shifts[2::2], atol=0.02, rtol=0)  # left and right; float16
    assert abs(float(shifts[0])) < 1e-6


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


@pytest.mark.parametrize("lack", [-1.2, 1.3])
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


def draw_classes(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the class of each voxel with the probabilities that the logits stand for."""
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.6, 2.5])
def test_temperature_is_found(script, temperature):
    generator = torch.Generator().manual_seed(2)
    true_logits = torch.randn((100_000, 3), generator=generator) * 2
    fitted = script.fit_temperature((true_logits * temperature)[None], draw_classes(true_logits, generator))
    assert fitted == pytest.approx(temperature, rel=0.04)


def test_mean_of_passes_is_calibrated(script):
    generator = torch.Generator().manual_seed(6)
    passes = torch.randn((2, 100_000, 3), generator=generator) * 2
    labels = torch.multinomial(passes.softmax(dim=2).mean(dim=0), 1, generator=generator)[:, 0]
    assert script.fit_temperature(2 * passes, labels) == pytest.approx(2.0, rel=0.05)
