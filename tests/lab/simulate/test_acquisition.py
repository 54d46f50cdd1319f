import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from bids_dgmseg.cli.main import main
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.lab.simulate.acquisition import AIR, BONE, FLUID, SCALP, SOFT_TISSUE, add_head_tissues, draw_echoes
from bids_dgmseg.lab.simulate.ranges import EchoRanges
from bids_dgmseg.lab.simulate.simulated_dataset import draw_echo_scan, echo_images, whole_head_view
from bids_dgmseg.qsm.phase import wrap
from tests.test_promise import VALIDATOR, validate

GREY, VENTRICLE = 21, 23
QUIET = EchoRanges(fluid_mm=(3.0, 3.0), bone_mm=(6.0, 6.0), scalp_mm=(5.0, 5.0), sinus_mm=(9.0, 9.0), snr=(1e6, 1e6))
SHAPE = (40, 40, 40)
STEP_S = 0.005


def ball(radius, voxel_size_mm=(1.0, 1.0, 1.0), shape=SHAPE):
    """Voxels within a distance in mm of the centre."""
    axes = [(torch.arange(n) - n // 2) * step for n, step in zip(shape, voxel_size_mm, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 <= radius**2


def draw(chi, labels=None, *, ranges=QUIET, seed=0, voxel_size_mm=(1.0, 1.0, 1.0), **options):
    labels = GREY * ball(13).to(torch.uint8) if labels is None else labels
    generator = torch.Generator().manual_seed(seed)
    return draw_echoes(chi, labels, voxel_size_mm=voxel_size_mm, generator=generator, ranges=ranges, **options)


def surround(brain, voxel_size_mm=(1.0, 1.0, 1.0), ranges=QUIET):
    generator = torch.Generator().manual_seed(0)
    return add_head_tissues(brain, voxel_size_mm=voxel_size_mm, generator=generator, ranges=ranges)


@pytest.mark.parametrize(
    ("voxel_size_mm", "b0_direction"),
    [((1.0, 1.0, 1.0), (0.0, 0.0, 1.0)), ((1.0, 1.0, 1.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 1.5), (1.0, 0.0, 0.0))],
)
def test_phase_follows_dipole_field(voxel_size_mm, b0_direction):
    axes = [(torch.arange(n) - n // 2) * step for n, step in zip(SHAPE, voxel_size_mm, strict=True)]
    offset_mm = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    distance_mm = offset_mm.norm(dim=-1)
    body, brain = 0.5 * torch.exp(-(distance_mm**2) / (2 * 1.5**2)), ball(13, voxel_size_mm)
    options = {"labels": GREY * brain.to(torch.uint8), "voxel_size_mm": voxel_size_mm, "b0_direction": b0_direction}
    plain, iron = draw(torch.zeros(SHAPE), **options), draw(body, **options)
    around = brain & (distance_mm > 6)  # four SD from the centre of the source
    # The field of moment m (ppm mm3) is m (3 cos^2 - 1) / (4 pi r^3) ppm; at 3 T, 127.7 Hz per ppm.
    cosine = (offset_mm @ torch.tensor(b0_direction))[around] / distance_mm[around] / math.hypot(*b0_direction)
    moment = float(body.sum()) * math.prod(voxel_size_mm)
    field_ppm = moment * (3 * cosine**2 - 1) / (4 * math.pi * distance_mm[around] ** 3)
    for echo in range(4):
        expected = 2 * math.pi * 42.577 * 3 * STEP_S * (echo + 1) * field_ppm
        measured = wrap(iron.phase[echo] - plain.phase[echo])[around]
        assert (measured - expected).abs().max() < 0.02 * expected.abs().max()


def test_phase_offset_is_quadratic_polynomial():
    phase = draw(torch.zeros(SHAPE), echo_times_s=(STEP_S, 2 * STEP_S)).phase
    offset = 2 * phase[0] - phase[1]
    inside = ball(12)
    for axis in range(3):
        step = torch.roll(offset, -1, axis) - offset
        third = torch.roll(step, -2, axis) - 2 * torch.roll(step, -1, axis) + step  # 0 for a parabola
        whole = inside & torch.roll(inside, -3, axis)
        assert wrap(third)[whole].abs().max() < 1e-3
        assert wrap(step)[inside].abs().max() > 1e-3


def test_iron_increases_decay():
    body = ball(3)
    magnitude = draw(0.1 * body.float()).magnitude
    decay_hz = (magnitude[0] / magnitude[1]).log() / STEP_S
    around = ball(12) & ~body
    # 137 Hz per ppm at 3 T
    assert (decay_hz[body].mean() - decay_hz[around].mean()).item() == pytest.approx(13.7, rel=1e-3)
    assert decay_hz[around].std() < 0.01


def test_head_tissues_surround_brain_in_layers():
    brain = np.zeros((70, 70, 70), np.uint8)
    brain[20:50, 20:50, 20:50] = GREY
    head = surround(brain)
    # 3 mm of fluid, 6 of bone and 5 of scalp above the top at index 49, with voxels of 1 mm
    assert head[35, 35, 49:].tolist() == [GREY, *[FLUID] * 3, *[BONE] * 6, *[SCALP] * 5, *[AIR] * 6]
    assert head[35, 35, :7].tolist() == [SOFT_TISSUE] * 6 + [SCALP]  # the neck continues
    assert np.array_equal(head[brain > 0], brain[brain > 0])


def test_fissures_contain_fluid_without_bone():
    brain = np.zeros((70, 70, 70), np.uint8)
    brain[20:50, 20:50, 20:50] = GREY
    brain[30:40, 20:50, 40:50] = 0  # a fissure of 10 mm, too narrow for a ball with a radius of 8 mm
    head = surround(brain)
    assert np.unique(head[30:40, 25:45, 40:47]).tolist() == [FLUID]
    brain[15:, 20:50, 40:50] = 0  # open on one side: no fissure
    head = surround(brain)
    assert head[45, 35, 45] == BONE  # 6 mm above the brain, whose fluid ends at 3 mm


def background_ppm(chi, labels=None):
    """Field from the phase difference of two echoes too early for wraps."""
    phase = draw(chi, labels, echo_times_s=(0.0005, 0.001)).phase
    return wrap(phase[1] - phase[0]) / (2 * math.pi * 42.577 * 3 * 0.0005)


def test_cut_brain_continues_beyond_field_of_view():
    """The central 20 mm of 70 mm of tissue: bone or air at the faces would change the field by 1 ppm or more."""
    shape = (20, 20, 20)
    everywhere = torch.full(shape, GREY, dtype=torch.uint8)
    assert np.ptp(background_ppm(torch.zeros(shape), everywhere).numpy()) < 0.5


def test_air_contains_noise_only():
    ranges = dataclasses.replace(QUIET, snr=(50.0, 50.0))
    echoes = draw(torch.zeros(SHAPE), GREY * ball(4).to(torch.uint8), ranges=ranges)
    outside = ~ball(22) & (torch.arange(40) > 26)  # the head has a radius of 18 mm, and a neck
    for phase, magnitude in zip(echoes.phase, echoes.magnitude, strict=True):
        noise_sd = (magnitude[outside].square().mean() / 2).sqrt()
        assert (echoes.magnitude[0][ball(4)].mean() / noise_sd).item() == pytest.approx(50, rel=0.03)
        direction = torch.polar(torch.ones(()), phase)[outside].mean().abs()
        assert direction < 4 / math.sqrt(int(outside.sum()))  # four times the expectation


def test_same_seed_gives_same_echoes():
    first, again, other = (draw(torch.zeros(SHAPE), seed=seed, ranges=EchoRanges()) for seed in (3, 3, 4))
    assert torch.equal(first.phase, again.phase)
    assert torch.equal(first.magnitude, again.magnitude)
    assert not torch.equal(first.magnitude, other.magnitude)


def test_quantization_error_is_half_a_step():
    echoes = draw(torch.zeros(SHAPE), ranges=EchoRanges())
    images = {image.suffix: image for image in echo_images(echoes)}
    for echo in range(4):
        magnitude, phase = (images[f"echo-{echo + 1}_part-{part}_MEGRE"] for part in ("mag", "phase"))
        assert magnitude.scale is not None
        difference = magnitude.array * magnitude.scale - echoes.magnitude[echo].numpy()
        assert np.abs(difference).max() <= 0.501 * float(echoes.magnitude.max()) / 4095
        assert wrap(torch.from_numpy(phase.array) - echoes.phase[echo]).abs().max() <= 0.501 * 2 * math.pi / 4096
        assert phase.array.min() > -math.pi
        assert phase.array.max() <= np.float32(math.pi)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, template):
    root = tmp_path_factory.mktemp("echoes") / "ds"
    argv = ["simulate", str(root), "--scans", "2", "--seed", "5", "--spacing-mm", "4", "--echoes"]
    assert main([*argv, "--labels", str(template)]) == 0
    return root


@pytest.mark.parametrize(("part", "units", "dtype"), [("mag", "arbitrary", np.uint16), ("phase", "rad", np.float32)])
def test_sidecars(simulated, part, units, dtype):
    for echo, time_s in enumerate((0.005, 0.01, 0.015, 0.02), 1):
        path = simulated / "sub-01" / "anat" / f"sub-01_echo-{echo}_part-{part}_MEGRE.json"
        assert json.loads(path.read_text(encoding="utf-8")) == {
            "MagneticFieldStrength": 3,
            "Description": "Simulated by bids_dgmseg from labels.nii.gz",
            "EchoTime": time_s,
            "Units": units,
        }
        assert load_image(path.with_suffix(".nii.gz")).get_data_dtype() == dtype


@pytest.mark.parametrize("seed", range(2))
def test_labels_and_true_map_match_echoes(head, seed):
    echoes, labels = draw_echo_scan(head, whole_head_view(4.0), seed)
    chi, first, last = echoes.chi, echoes.magnitude[0].numpy(), echoes.magnitude[3].numpy()
    nuclei = (labels > 0) & (labels <= 16)
    decay_hz = np.log(first[nuclei] / last[nuclei]) / 0.015
    # At 3 T, R2* is R2, about 12 Hz, plus 137 Hz per ppm.
    assert np.median(decay_hz - 137 * chi[nuclei].abs().numpy()) == pytest.approx(12, abs=1)
    assert np.corrcoef(decay_hz, chi[nuclei].abs())[0, 1] > 0.8


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_dataset_of_echoes_is_valid_bids(simulated, tmp_path):
    validate(simulated, tmp_path)
