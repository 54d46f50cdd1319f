import math
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.phantom.head import PHANTOM

SHAPE = (40, 48, 32)


def head() -> np.ndarray:
    """An ellipsoid that fills half of the image."""
    x, y, z = (np.linspace(-1, 1, size).reshape(np.roll((-1, 1, 1), axis)) for axis, size in enumerate(SHAPE))
    return x**2 + y**2 + z**2 < 1


def brain(*, seed: int = 0, noise_ppm: float = 0.01) -> np.ndarray:
    """White matter at -0.03 ppm, grey at 0.02, iron at 0.13 in 2 % of the voxels, noise; 0 outside."""
    rng = np.random.default_rng(seed)
    chi = rng.choice([-0.03, 0.02, 0.13], p=[0.5, 0.48, 0.02], size=SHAPE) + noise_ppm * rng.standard_normal(SHAPE)
    return np.where(head(), chi, 0)


@pytest.fixture
def store(tmp_path: Path):
    def write(array: np.ndarray, dtype=np.float32) -> Path:
        nib.Nifti1Image(array.astype(dtype), np.eye(4)).to_filename(tmp_path / "sub-07_Chimap.nii.gz")
        return tmp_path / "sub-07_Chimap.nii.gz"

    return write


@pytest.mark.parametrize(
    ("spelling", "units", "factor"),
    [
        *[(spelling, "ppm", 1) for spelling in ("ppm", " Parts_per million ")],
        *[(spelling, "ppb", 1000) for spelling in ("ppb", "parts per billion")],
    ],
)
def test_unit_is_read_from_the_sidecar(store, spelling, units, factor):
    checked = check_chi(store(brain() * factor), {"Units": spelling})
    assert (checked.units, checked.units_from, checked.warnings) == (units, "sidecar", ())
    expected, rounding = brain().astype(np.float32), 0 if units == "ppm" else 1e-7
    np.testing.assert_allclose(checked.chi_ppm.array, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("sidecar", [{}, {"Units": ""}, {"Units": "arbitrary"}, {"EchoTime": 0.02}])
def test_units_are_inferred_without_sidecar(store, sidecar):
    assert check_chi(store(brain()), sidecar).units_from == "magnitude of the values"
    assert check_chi(store(brain()), sidecar).units == "ppm"


def test_inferred_ppb_is_a_warning(store):
    checked = check_chi(store(brain() * 1000), {})
    assert (checked.units, checked.units_from) == ("ppb", "magnitude of the values")
    assert len(checked.warnings) == 1
    assert 'no "Units" in its sidecar; assuming ppb because values reach 1' in checked.warnings[0]


@pytest.mark.parametrize("key", ["ReferenceRegion", "SusceptibilityReference", "QSMReference", "reference_tissue"])
def test_reference_region_is_reported(store, key):
    assert check_chi(store(brain()), {key: "CSF"}).reference == "CSF"
    assert check_chi(store(brain()), {key: " "}).reference == "not stated"


@pytest.mark.parametrize("outside", ["noise", "uniform noise", "NaN", "streaks"])
def test_any_background_is_accepted(store, outside):
    rng = np.random.default_rng(1)
    background = {
        "noise": rng.normal(scale=0.4, size=SHAPE),
        "uniform noise": rng.uniform(-1, 1, SHAPE),
        "NaN": np.full(SHAPE, np.nan),
        "streaks": np.where(rng.random(SHAPE) < 0.05, rng.choice([-1, 1], SHAPE), 0),
    }[outside]
    checked = check_chi(store(np.where(head(), brain(), background)), {})
    assert (checked.units, checked.n_replaced, checked.warnings) == ("ppm", 0, ())


def veins_and_calcification() -> np.ndarray:
    chi = brain(noise_ppm=0.05)
    chi[20, 10:40, 16] = 0.8
    chi[25:27, 20:22, 16:18] = -2.5
    return chi


@pytest.mark.parametrize(
    "chi",
    [
        pytest.param(veins_and_calcification(), id="veins and calcification"),
        pytest.param(brain()[14:26, 18:30, 10:22], id="tight crop"),
        pytest.param(brain(noise_ppm=0), id="no noise"),
    ],
)
def test_unusual_maps_are_accepted(store, chi):
    checked = check_chi(store(chi), {})
    assert (checked.units, checked.warnings) == ("ppm", ())


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30, -10.5])
@pytest.mark.parametrize("outside", [0, np.nan])
def test_holes_in_the_brain_are_a_warning(store, value, outside):
    chi = np.where(head(), brain(), outside)
    chi[18:20, 22:25, 15] = value
    checked = check_chi(store(chi), {"Units": "ppm"})
    assert checked.n_replaced == 6
    assert checked.warnings == (
        "sub-07_Chimap.nii.gz: 6 voxels inside the brain are NaN, infinite or beyond ±10 ppm; "
        "excluded from the measures; small holes are filled in for the network",
    )
    assert np.isnan(checked.chi_ppm.array[18:20, 22:25, 15]).all()
    assert np.isfinite(checked.chi_ppm.array[head()]).sum() == head().sum() - 6


@pytest.mark.parametrize(("units", "factor", "dtype"), [("ppm", 1, "f4"), ("ppb", 1000, "f4"), ("ppb", 1000, "i2")])
def test_missing_slice_is_not_measured(store, units, factor, dtype):
    chi = brain() * factor
    chi[:, :, 15] = 0
    checked = check_chi(store(chi, dtype), {"Units": units})
    both = head()[:, :, 14] & head()[:, :, 16]
    assert np.isnan(checked.chi_ppm.array[both, 15]).all()
    assert checked.n_empty == pytest.approx(both.sum(), rel=0.05)
    assert checked.warnings == (
        f"sub-07_Chimap.nii.gz: {checked.n_empty} voxels inside the brain are 0 in whole slices or connected groups "
        "(missing data); excluded from the measures; small holes are filled in for the network",
    )


def test_empty_voxels_outside_brain_are_background(store):
    chi = brain()
    chi[2:4, 2:4, 2:4] = np.nan
    checked = check_chi(store(chi), {})
    assert checked.n_replaced == 0
    assert checked.chi_ppm.array[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("array", "sidecar", "message"),
    [
        pytest.param(np.zeros(SHAPE), {}, "all voxels are 0; reconstruct the map again", id="zeros"),
        pytest.param(np.full(SHAPE, np.nan), {}, "no voxel is finite; reconstruct the map again", id="NaN"),
        pytest.param(brain() * 1e-6, {}, "value range is only 1.*e-07, expected ppm", id="fractions of one"),
        pytest.param(np.full(SHAPE, 0.05), {}, "value range is only 0", id="constant"),
        pytest.param(
            brain() * 1000,
            {"Units": "ppm"},
            r'values reach 1\d\d, expected ppm \(about -1 to 1\); set "Units" in its sidecar to "ppb" or rescale',
            id="ppb called ppm",
        ),
        pytest.param(
            brain(),
            {"Units": "ppb"},
            r'values reach 0.1\d*, expected ppb \(about -1000 to 1000\); set "Units" in its sidecar to "ppm"',
            id="ppm called ppb",
        ),
        pytest.param(
            brain() * 127.7, {}, "too large for ppm and too small for ppb, like a field map in Hz", id="Hz, not stated"
        ),
        pytest.param(
            brain() * 127.7, {"Units": "ppm"}, "like a field map in Hz or an unwrapped phase", id="Hz called ppm"
        ),
        pytest.param(brain() * 127.7, {"Units": "Hz"}, r'"Units" in its sidecar is Hz \(a field map\)', id="Hz"),
        pytest.param(brain() * 1e6, {}, "too large for both ppm and ppb", id="out of all range"),
        pytest.param(brain(), {"Units": "mm"}, '"Units" in its sidecar is \'mm\', expected "ppm" or', id="other unit"),
        pytest.param(brain(), {"Units": ["ppm"]}, r'"Units" in its sidecar is \[\'ppm\'\]', id="unit is not text"),
    ],
)
def test_other_values_and_units_are_rejected(store, array, sidecar, message):
    with pytest.raises(InputError, match=f"^sub-07_Chimap.nii.gz: .*{message}"):
        check_chi(store(array), sidecar)


PHASE = np.random.default_rng(2).uniform(-math.pi, math.pi, SHAPE)


@pytest.mark.parametrize(
    ("array", "sidecar"),
    [
        pytest.param(PHASE, {}, id="radians"),
        pytest.param(PHASE, {"Units": "ppm"}, id="radians called ppm"),
        pytest.param(PHASE % (2 * math.pi), {}, id="0 to 2 pi"),
        pytest.param(np.rint((PHASE / math.pi + 1) / 2 * 4095), {}, id="12 bits"),
        pytest.param(np.rint(PHASE * 1000), {}, id="milliradians"),
        pytest.param(PHASE / 4, {"Units": "rad"}, id="radians by its sidecar"),
        pytest.param(PHASE / 4, {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}, id="image type"),
    ],
)
def test_phase_image_is_rejected(store, array, sidecar):
    with pytest.raises(InputError, match=r"looks like a phase image .*; provide the reconstructed susceptibility map"):
        check_chi(store(array), sidecar)


MAGNITUDE = np.abs(np.random.default_rng(3).normal(300, 120, SHAPE))


@pytest.mark.parametrize(
    ("array", "sidecar"),
    [
        pytest.param(MAGNITUDE, {}, id="not stated"),
        pytest.param(MAGNITUDE, {"Units": "ppb"}, id="called ppb"),
        pytest.param(np.where(head(), MAGNITUDE, 0), {}, id="skull-stripped"),
        pytest.param(MAGNITUDE / MAGNITUDE.max(), {}, id="scaled to 1"),
        pytest.param(np.random.default_rng(4).integers(1, 17, SHAPE), {}, id="labels"),
    ],
)
def test_magnitude_image_is_rejected(store, array, sidecar):
    with pytest.raises(InputError, match=r"looks like a magnitude image or labels .* which has both signs; provide"):
        check_chi(store(array), sidecar)


@pytest.mark.parametrize(("limit_ppm", "ends"), [(0.05, 2), (0.1, 1), (0.3, 0)])
def test_clipped_map_is_a_warning(store, limit_ppm, ends):
    chi = np.clip(brain(), -limit_ppm, limit_ppm)
    lines = check_chi(store(chi), {"Units": "ppm"}).warnings
    shares = [f"{100 * np.mean(chi[chi != 0] == sign * limit_ppm):.2g} % at {sign * limit_ppm} ppm" for sign in (-1, 1)]
    shown = ", ".join(shares[-ends:])
    said = f"many voxels have the same extreme value ({shown}), probably clipped to a display window"
    assert [line.startswith(f"sub-07_Chimap.nii.gz: {said}") for line in lines] == [True] * bool(ends)


@pytest.mark.parametrize("spacing_mm", [3.0])
def test_phantom_without_noise_is_not_clipped(tmp_path, spacing_mm):
    chi = PHANTOM.chi(world_grid(Box((-75, -110, -80), (75, 74, 80)), (spacing_mm,) * 3))
    nib.Nifti1Image(chi.array, chi.affine).to_filename(tmp_path / "sub-07_Chimap.nii")
    assert check_chi(tmp_path / "sub-07_Chimap.nii", {"Units": "ppm"}).warnings == ()


def test_tissue_at_the_end_of_a_phantom_is_not_clipping(store):
    # Five tissues of one value each, and edges with any mixture of two of them.
    rng = np.random.default_rng(0)
    tissues = rng.choice([-0.04, -0.03, 0.01, 0.02, 0.13], size=(2, *SHAPE))
    fraction = np.where(rng.random(SHAPE) < 0.3, rng.random(SHAPE), 1)
    chi = fraction * tissues[0] + (1 - fraction) * tissues[1]
    assert check_chi(store(np.where(head(), chi, 0)), {"Units": "ppm"}).warnings == ()


@pytest.mark.parametrize(("width_ppm", "n_warnings"), [(0.6, 1), (0.25, 0)])
def test_map_of_8_bits_is_a_warning(store, width_ppm, n_warnings):
    # 0.25 ppm in 256 steps, 1 ppb each, is the precision of a map in integers of ppb.
    levels = np.rint((brain() / width_ppm + 0.4) * 255)
    lines = check_chi(store((levels - 102) / 255 * width_ppm), {"Units": "ppm"}).warnings
    assert [
        re.match(r"sub-07_Chimap.nii.gz: only \d+ different values, as in an 8-bit image", line) is not None
        for line in lines
    ] == [True] * n_warnings


def test_paramagnetic_map_is_a_warning(store):
    (warning,) = check_chi(store(np.abs(brain())), {"Units": "ppm"}).warnings
    assert "no negative values, as in maps of paramagnetic sources only" in warning
