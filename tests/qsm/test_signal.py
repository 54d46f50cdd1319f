from __future__ import annotations

import math
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, combine_echoes
from bids_dgmseg.qsm.phase import unwrap_echoes
from bids_dgmseg.qsm.signal import read_signal

TIMES_S, B0_T, VOXEL_MM = (0.006, 0.012), 3.0, (2.0, 2.0, 2.0)
SHAPE = (24, 22, 20)
HEAD = sum(((index - (n - 1) / 2) / (0.4 * n)) ** 2 for index, n in zip(np.indices(SHAPE), SHAPE, strict=True)) < 1
X, Y, Z = np.indices(SHAPE)
FIELD_PPM = 0.05 * (Z - 9.5) + 0.005 * (X - 11.5) + 0.003 * (Y - 10.5)
"""In the head 0.6 turns from end to end at the first echo, 1.3 at the second."""


@pytest.fixture(scope="module")
def signal():
    """Complex signal of a head in a linear field, with noise around it whose phase fills the range."""
    turns = np.multiply.outer(TIMES_S, GYROMAGNETIC_MHZ_PER_T * B0_T * FIELD_PPM)
    noise_rad = np.random.default_rng(0).uniform(-math.pi, math.pi, (2, *SHAPE))
    return np.where(HEAD, 1000 * np.exp(1j * (2 * math.pi * turns + 0.5)), np.exp(1j * noise_rad))


def write(folder, part, number, array, slope=0.0, inter=0.0):
    """Write one image of an echo; with a slope, `array` are the stored integers."""
    path = folder / f"sub-01_echo-{number}_part-{part}_MEGRE.nii.gz"
    image = nib.Nifti1Image(array, np.diag([2, 2, 2, 1]))
    if slope:
        image.header.set_slope_inter(slope, inter)
    image.to_filename(path)
    return path


def write_polar(folder, signal, stored, **scaling):
    """Write magnitude and phase of all echoes; `stored` converts rad."""
    return [
        {
            "phase": write(folder, "phase", number, stored(np.angle(echo)), **scaling),
            "mag": write(folder, "mag", number, np.abs(echo).astype(np.float32)),
        }
        for number, echo in enumerate(signal, 1)
    ]


def field_of(read):
    """Field in ppm inside the head."""
    head, phase, magnitude = (torch.from_numpy(image) for image in (HEAD, np.nan_to_num(read.phase), read.magnitude))
    unwrapped = unwrap_echoes(phase, magnitude, head, echo_times_s=TIMES_S, voxel_size_mm=VOXEL_MM)
    return combine_echoes(unwrapped, magnitude, echo_times_s=TIMES_S, b0_tesla=B0_T).numpy()[HEAD]


def check_field(read, step_rad):
    """Compare the field with the truth; a constant and the rounding to a step of phase are allowed."""
    difference = field_of(read) - FIELD_PPM[HEAD]
    per_rad = 1 / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * B0_T * TIMES_S[0])
    # Each echo is wrong by half a step at most, the offset at time 0 by 2 phi_1 - phi_2, so 1.5 steps.
    np.testing.assert_allclose(difference - np.median(difference), 0, atol=(2 * step_rad + 1e-5) * per_rad)


def integers(scale, offset=0.0, dtype=np.int16):
    return lambda rad: np.rint(rad * scale + offset).astype(dtype)


TURN = 2 * math.pi
POLAR: dict[str, tuple[Any, dict[str, float], float, bool]] = {
    "radians": (lambda rad: rad.astype(np.float32), {}, 0, False),
    "0 to 2 pi": (lambda rad: np.mod(rad, TURN).astype(np.float32), {}, 0, False),
    "Siemens, 0 to 4095": (lambda rad: np.mod(integers(4096 / TURN, 2048)(rad), 4096), {}, TURN / 4096, False),
    "Siemens, -4096 to 4094": (
        lambda rad: np.mod(integers(4096 / TURN, 2048)(rad), 4096),
        {"slope": 2, "inter": -4096},
        TURN / 4096,
        False,
    ),
    "-2048 to 2047": (integers(4095.9 / TURN), {}, TURN / 4096, False),
    "Philips, radians by slope": (
        integers(4095 / TURN, 2047.5),
        {"slope": TURN / 4095, "inter": -math.pi},
        TURN / 4095,
        False,
    ),
    "Philips and GE, milliradians": (integers(1000), {}, 1e-3, False),
    "8 bits": (integers(255 / TURN, 127.5, np.uint8), {}, TURN / 255, True),
    "16 bits": (integers(65534 / TURN), {}, TURN / 4096, True),
    "fractions of half a turn": (lambda rad: (rad / math.pi).astype(np.float32), {}, TURN / 4096, True),
    "degrees": (lambda rad: np.rad2deg(rad).astype(np.float32), {}, TURN / 4096, True),
}
"""Stored phase of rad, its scaling, one step of it in rad, and whether the scale is a guess."""


@pytest.mark.parametrize("name", POLAR)
def test_every_convention_gives_the_same_field(tmp_path, signal, name):
    stored, scaling, step_rad, is_guess = POLAR[name]
    read = read_signal(write_polar(tmp_path, signal, stored, **scaling))
    check_field(read, step_rad)
    assert bool(read.warnings) == is_guess
    assert all("echo-1_part-phase_MEGRE.nii.gz: values from " in line for line in read.warnings)
    assert read.conversion == "radians" or read.conversion.endswith("mapped to a turn")


def test_parts_and_complex_values_give_the_same_field(tmp_path, signal):
    files = [
        {
            "real": write(tmp_path, "real", number, echo.real.astype(np.float32)),
            "imag": write(tmp_path, "imag", number, echo.imag.astype(np.float32)),
        }
        for number, echo in enumerate(signal, 1)
    ]
    parts = read_signal(files)
    check_field(parts, 0)
    np.testing.assert_allclose(parts.magnitude, np.abs(signal), rtol=1e-5)
    files = [
        {"complex": write(tmp_path, "x", number, echo.astype(dtype))}
        for number, (echo, dtype) in enumerate(zip(signal, (np.complex64, np.complex128), strict=True), 1)
    ]
    whole = read_signal(files)
    np.testing.assert_allclose(whole.phase, parts.phase, atol=1e-5)
    assert (parts.conversion, whole.conversion) == ("real and imaginary parts", "complex values")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sign_that_alternates_between_slices_is_removed(tmp_path, signal, axis):
    chopped = signal * (-1) ** np.indices(SHAPE)[axis]
    read = read_signal(write_polar(tmp_path, chopped, POLAR["radians"][0]))
    check_field(read, 0)
    (warning,) = read.warnings
    assert "echo-1_part-mag_MEGRE.nii.gz: the sign of the signal alternates between slices" in warning
    assert read.conversion == "radians; sign that alternates between slices removed"


def test_range_is_that_of_all_echoes(tmp_path, signal):
    # The first echo alone spans 0.6 turns, and zeros around the head are not a phase of -pi.
    masked = [np.where(HEAD, integers(4096 / TURN, 2048)(np.angle(echo)), 0).astype(np.int16) for echo in signal]
    assert masked[0].max() - masked[0][HEAD].min() < 3000
    files = write_polar(tmp_path, signal, lambda rad: masked[int(abs(rad - np.angle(signal[1])).max() == 0)])
    read = read_signal(files)
    check_field(read, TURN / 4096)
    assert read.conversion == "values from 0 to 4095, mapped to a turn"
    with pytest.raises(InputError, match=r"echo-1_part-phase_MEGRE.nii.gz: values from .* do not wrap in any echo"):
        read_signal(files[:1])


def test_outliers_and_background_values_are_not_phase(tmp_path, signal):
    def stored(rad):
        values = integers(1000 / math.pi)(rad)  # no known range
        values[~HEAD & (X < 12)] = -32768
        if rad[0, 0, 0] == np.angle(signal[0, 0, 0, 0]):
            values[0, 0, 0] = 32767
        return values

    read = read_signal(write_polar(tmp_path, signal, stored))
    check_field(read, TURN / 2000)
    assert read.conversion == "values from -1000 to 1000, mapped to a turn"
    assert np.isnan(read.phase[:, 0, 0, 0]).all()


def test_contradiction_with_the_sidecar_is_named(tmp_path, signal):
    for name, warns in (("radians", False), ("Siemens, 0 to 4095", True), ("fractions of half a turn", True)):
        stored, scaling, step_rad, _ = POLAR[name]
        read = read_signal(write_polar(tmp_path, signal, stored, **scaling), units=("rad", "Radians"))
        check_field(read, step_rad or TURN / 4096)
        assert bool(read.warnings) == warns
        for line in read.warnings:
            assert line.startswith('sub-01_echo-1_part-phase_MEGRE.nii.gz: "Units" in its sidecar is rad, but values ')


def test_stated_radians_may_be_unwrapped_or_few(tmp_path, signal):
    unwrapped = TURN * GYROMAGNETIC_MHZ_PER_T * B0_T * TIMES_S[0] * FIELD_PPM
    for rad in (3 * unwrapped, 0.1 * unwrapped):
        (echo,) = write_polar(tmp_path, signal[:1], lambda _, rad=rad: rad.astype(np.float32))
        read = read_signal([echo], units=["rad"])
        np.testing.assert_allclose(np.exp(1j * read.phase[0]), np.exp(1j * rad), atol=1e-4)
        with pytest.raises(InputError, match="are not in a known range of phase images"):
            read_signal([echo])


@pytest.mark.parametrize("units", ["Hz", "rad/s", "ppm"])
def test_stated_field_is_no_phase(tmp_path, signal, units):
    """Phase divided by 2 pi times the echo time: each echo has a range of its own, 1 / TE."""
    echoes = write_polar(tmp_path, signal, lambda rad: rad.astype(np.float32))
    with pytest.raises(InputError, match=rf'phase.*: "Units" is {units}, expected a wrapped phase'):
        read_signal(echoes, units=["arbitrary", units])
    assert read_signal(echoes, units=["arbitrary", "degree"]).conversion == "radians"


def test_nonfinite_values_are_excluded(tmp_path, signal):
    damaged = signal.copy()
    damaged[0, 5, 5, 5] = np.nan
    read = read_signal(write_polar(tmp_path, damaged, POLAR["radians"][0]))
    assert np.isnan(read.phase[0, 5, 5, 5])
    assert read.magnitude[0, 5, 5, 5] == 0
    assert np.isfinite(read.phase[1]).all()


def test_phase_of_zero_in_all_echoes_is_missing(tmp_path, signal):
    """Background set to 0 is not named; a part of the head without phase is."""
    masked = np.where(HEAD, signal, np.abs(signal))  # the phase of positive numbers is 0
    read = read_signal(write_polar(tmp_path, masked, lambda rad: rad.astype(np.float32)), units=["rad", "rad"])
    assert read.warnings == ()
    np.testing.assert_array_equal(np.isnan(read.phase[0]), ~HEAD)
    gap = HEAD & (X < 8)
    echoes = write_polar(tmp_path, np.where(gap, np.abs(masked), masked), lambda rad: rad.astype(np.float32))
    read = read_signal(echoes, units=["rad", "rad"])
    assert read.magnitude[0][gap].min() > 0
    percent = f"{100 * gap.sum() / HEAD.sum():.0f} %"
    assert len(read.warnings) == 1
    assert f"echo-1_part-phase_MEGRE.nii.gz: phase is exactly 0 in all echoes in {percent} of" in read.warnings[0]
    np.testing.assert_array_equal(np.isnan(read.phase[1]), ~HEAD | gap)


@pytest.mark.parametrize(
    ("part", "low", "high", "message"),
    [
        ("phase", 2, 2, "values from 2 to 2, expected a phase image"),
        ("mag", -1, 1, "values from -1 to 1, expected a magnitude image"),
        ("mag", 3, 3, "values from 3 to 3, expected a magnitude image"),
        ("imag", 0, 4095, "values from 0 to 4095, expected a real or imaginary part with both signs"),
    ],
)
def test_other_images_are_rejected(tmp_path, part, low, high, message):
    ramp = np.linspace(-3, 3, 64, dtype=np.float32).reshape(4, 4, 4)
    pair = ("real", "imag") if part == "imag" else ("phase", "mag")
    files = {image: write(tmp_path, image, 1, np.abs(ramp) if image == "mag" else ramp) for image in pair}
    write(tmp_path, part, 1, np.linspace(low, high, 64, dtype=np.float32).reshape(4, 4, 4))
    with pytest.raises(InputError, match=f"part-{part}_MEGRE.nii.gz: {message}"):
        read_signal([files])


def test_real_values_are_no_complex_image(tmp_path, signal):
    whole = write(tmp_path, "x", 1, signal[0].astype(np.complex64))
    magnitude = write(tmp_path, "x", 2, np.abs(signal[1]).astype(np.float32))
    with pytest.raises(InputError, match=r"^sub-01_echo-2_part-x_MEGRE.nii.gz: has real values, expected a complex"):
        read_signal([{"complex": whole}, {"complex": magnitude}])


@pytest.mark.parametrize(
    ("qform_code", "sform_code", "form", "why"),
    [
        (1, 2, "qform", ", whose code is that of the scanner"),
        (2, 1, "sform", ", whose code is that of the scanner"),
        (1, 1, "sform", ""),
    ],
)
@pytest.mark.parametrize("flip", [1, -1])
def test_main_field_is_that_of_the_scanner(signal, tmp_path, qform_code, sform_code, form, why, flip):
    echoes = write_polar(tmp_path, signal, lambda rad: rad.astype(np.float32))
    straight = np.diag([2.0 * flip, 2.0, 2.0, 1.0])
    sine, cosine = math.sin(math.radians(20)), math.cos(math.radians(20))
    tilted = np.array([[1, 0, 0, 0], [0, cosine, -sine, 0], [0, sine, cosine, 0], [0, 0, 0, 1]]) @ straight
    for path in (path for echo in echoes for path in echo.values()):
        image = nib.Nifti1Image(np.asanyarray(load_image(path).dataobj), tilted)
        image.set_qform(straight, qform_code)
        image.set_sform(tilted, sform_code)
        image.to_filename(path)
    read = read_signal(echoes)
    # Along the second axis z rises by the sine of the tilt.
    np.testing.assert_allclose(read.b0_direction, (0, 0, 1) if form == "qform" else (0, sine, cosine), atol=1e-6)
    (warning,) = read.warnings
    assert warning == (
        "sub-01_echo-1_part-mag_MEGRE.nii.gz: the direction of the main field differs by 20 degrees between qform and "
        f"sform; that of the {form} is used{why}; if it is not the scanner's, correct the header"
    )
