from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bids_dgmseg.measurement.columns import CONFIDENCE_COLUMNS
from bids_dgmseg.measurement.field_of_view import FieldOfView
from bids_dgmseg.measurement.rating import measure_confidence
from bids_dgmseg.models.structures import STRUCTURES

DN_L, DN_R = STRUCTURES.both_sides(["DN"])
UNIT = (1.0, 1.0, 1.0)


def measure(
    chi: np.ndarray,
    dseg: np.ndarray,
    probability: np.ndarray | None = None,
    *,
    size_mm: tuple[float, float, float] = UNIT,
    fov: FieldOfView | None = None,
) -> pd.Series:
    """Measure DN_L; by default all voxels are valid and the probabilities are 0 or 1."""
    certain = (dseg == 1).astype(float) if probability is None else probability
    fov = fov or FieldOfView.of(np.ones(chi.shape, bool), voxel_size_mm=size_mm)
    return measure_confidence(chi, dseg, certain[None], structures=[DN_L], voxel_size_mm=size_mm, fov=fov).iloc[0]


def cube(shape: tuple[int, int, int] = (11, 11, 11), low: int = 4, high: int = 7) -> np.ndarray:
    dseg = np.zeros(shape, np.uint8)
    dseg[low:high, low:high, low:high] = 1
    return dseg


def line(values: Any) -> np.ndarray:
    return np.asarray(values).reshape(-1, 1, 1)


def test_columns_match_the_data_dictionary():
    dseg, probseg = np.zeros((4, 4, 4), np.uint8), np.zeros((16, 4, 4, 4))
    fov = FieldOfView.of(dseg == 0, voxel_size_mm=UNIT)
    table = measure_confidence(np.zeros((4, 4, 4)), dseg, probseg, structures=STRUCTURES, voxel_size_mm=UNIT, fov=fov)
    assert list(table.columns) == ["index", "abbreviation", *CONFIDENCE_COLUMNS]
    assert table["abbreviation"].tolist() == [structure.abbreviation for structure in STRUCTURES]


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    [
        pytest.param([1.0, 1.0], 0.0, id="certain"),
        pytest.param([0.5, 0.5], 1.0, id="0.5"),
        pytest.param([0.5, 1.0], 0.5, id="mean over voxels"),
        # H(1/4) = 1/4 log2 4 + 3/4 log2 (4/3) = 1/2 + 3/4 (2 - log2 3)
        pytest.param([0.25, 0.75], 0.5 + 0.75 * (2 - np.log2(3)), id="symmetric in p and 1 - p"),
    ],
)
def test_entropy_of_nucleus_against_the_rest(probabilities, bits):
    row = measure(line([0.1, 0.1, 0]), line([1, 1, 0]), line([*probabilities, 0.5]))
    assert row["mean_entropy_bits"] == pytest.approx(bits)


def test_mass_outside_and_expected_dice_by_hand():
    row = measure(line([0.1] * 4), line([0, 1, 1, 0]), line([0.4, 0.8, 0.7, 0.1]))
    assert row["mass_outside_fraction"] == pytest.approx(0.25)  # 0.8 + 0.7 inside, 0.4 + 0.1 outside: 0.5 of 2
    assert row["expected_dice"] == pytest.approx(0.75)  # 1.5 shared, 2 voxels outlined, 2 expected: 2 * 1.5 / 4


@given(seed=st.integers(0, 2**32 - 1))
def test_expected_dice_is_mean_over_drawn_labels(seed):
    rng = np.random.default_rng(seed)
    probability = rng.random((8, 8, 8))
    dseg = (probability > 0.5).astype(np.uint8)
    drawn = rng.random((100, *probability.shape)) < probability
    dice = 2 * (drawn & (dseg == 1)).sum(axis=(1, 2, 3)) / (dseg.sum() + drawn.sum(axis=(1, 2, 3)))
    found = measure(np.zeros(dseg.shape), dseg, probability)["expected_dice"]
    # Dice of one draw varies by 0.02, the mean of a hundred by 0.002; the mean of a ratio differs by less.
    assert found == pytest.approx(dice.mean(), abs=0.015)


def test_contrast_uses_rim_in_mm():
    # Voxels of 1 mm at 3: the rim holds those 2 and 3 mm away (0.03, 0.05 on both sides), not the neighbours (9).
    chi = line([7, 0.05, 0.03, 9, 0.24, 9, 0.03, 0.05, 7])
    row = measure(chi, line([0, 0, 0, 0, 1, 0, 0, 0, 0]))
    assert row["rim_contrast_ppm"] == pytest.approx(0.24 - 0.04)


def test_rim_width_does_not_depend_on_slice_thickness():
    # Along z the next slice is 3 mm away and within the rim; the next one, at 6 mm, is not.
    chi = np.array([[[5, 0.04, 0.24, 0.04, 5]]], float)
    row = measure(chi, np.array([[[0, 0, 1, 0, 0]]]), size_mm=(1.0, 1.0, 3.0))
    assert row["rim_contrast_ppm"] == pytest.approx(0.2)


def test_rim_excludes_other_nuclei_and_holes():
    # At 2 and 3 mm on the left lies DN_R, on the right one invalid voxel and 0.04.
    chi = line([0.9, 0.9, 0.0, 0.24, 0.0, np.nan, 0.04])
    row = measure(chi, line([2, 2, 0, 1, 0, 0, 0]))
    assert row["rim_contrast_ppm"] == pytest.approx(0.2)


def test_gradient_is_step_over_distance_of_centres():
    # Every face of the cube steps by 0.12 ppm over 2 mm.
    dseg = cube()
    row = measure(0.12 * (dseg == 1), dseg, size_mm=(2.0, 2.0, 2.0))
    assert row["boundary_gradient_ppm_per_mm"] == pytest.approx(0.06)


def test_gradient_weights_faces_by_area():
    # One voxel of 1 x 1 x 3 mm: 4 sides of 3 mm2 step over 1 mm, 2 ends of 1 mm2 over 3 mm.
    dseg = cube((3, 3, 3), 1, 2)
    row = measure(0.1 * (dseg == 1), dseg, size_mm=(1.0, 1.0, 3.0))
    assert row["boundary_gradient_ppm_per_mm"] == pytest.approx((12 * 0.1 + 2 * 0.1 / 3) / 14)


def test_gradient_excludes_faces_to_other_nuclei():
    row = measure(line([0.5, 0.3, 0.1]), line([2, 1, 0]))
    assert row["boundary_gradient_ppm_per_mm"] == pytest.approx(0.2)


def test_components_touching_at_a_corner_are_one():
    dseg = np.zeros((6, 6, 1), np.uint8)
    dseg[0, 0] = dseg[1, 1] = dseg[4, 4] = 1
    assert measure(np.zeros(dseg.shape), dseg)["n_components"] == 2


def test_rim_excludes_voxels_outside_field_of_view():
    # The right half holds 0 outside the field of view; inside it the rim has values of 0.1.
    chi = line([0.1] * 8 + [0.3] + [0.1] * 4 + [0.0] * 12).repeat(9, 1).repeat(9, 2)
    dseg = np.zeros(chi.shape, np.uint8)
    dseg[8:12, 4, 4] = 1
    fov = FieldOfView.of(chi != 0, voxel_size_mm=UNIT)
    row = measure(chi, dseg, fov=fov)
    assert row["rim_contrast_ppm"] == pytest.approx(0.0)  # median of 0.3, 0.1, 0.1, 0.1
    assert row["edge_distance_mm"] == 1


def test_absent_nucleus_has_only_defined_measures():
    row = measure(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), np.uint8), np.full((3, 3, 3), 0.1))
    assert row["n_components"] == 0
    assert (row["mass_outside_fraction"], row["expected_dice"]) == (1, 0)
    names = ["mean_entropy_bits", "rim_contrast_ppm", "boundary_gradient_ppm_per_mm", "edge_distance_mm"]
    assert row[names].isna().all()


def test_zero_probability_has_no_fraction():
    row = measure(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3, 3)))
    assert np.isnan(row["mass_outside_fraction"])
    assert np.isnan(row["expected_dice"])


@given(seed=st.integers(0, 2**32 - 1))
def test_confidence_does_not_depend_on_orientation(seed):
    rng = np.random.default_rng(seed)
    shape, size_mm = (8, 9, 10), (0.7, 1.0, 2.5)
    dseg = (rng.random(shape) < 0.2).astype(np.uint8) * rng.integers(0, 3, shape, dtype=np.uint8)
    dseg[4, 4, 4] = 1
    chi = np.where(rng.random(shape) < 0.1, np.nan, rng.normal(size=shape))
    probability = rng.random(shape)
    order = tuple(rng.permutation(3).tolist())
    flips = tuple(np.flatnonzero(rng.random(3) < 0.5).tolist())
    x, y, z = (size_mm[axis] for axis in order)
    reoriented = [np.flip(array.transpose(order), flips) for array in (chi, dseg, probability)]
    first, second = measure(chi, dseg, probability, size_mm=size_mm), measure(*reoriented, size_mm=(x, y, z))
    np.testing.assert_allclose(first[2:].astype(float), second[2:].astype(float), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dseg", "probseg", "fov", "message"),
    [
        pytest.param((3, 3, 3), (1, 3, 3, 2), (3, 3, 3), r"probseg has shape \(1, 3, 3, 2\)", id="probabilities"),
        pytest.param((3, 3, 2), (1, 3, 3, 3), (3, 3, 3), r"dseg has shape \(3, 3, 2\), expected", id="labels"),
        pytest.param((3, 3, 3), (1, 3, 3, 3), (3, 2, 3), r"fov has shape \(3, 2, 3\), expected", id="fov"),
    ],
)
def test_arrays_on_another_grid_are_rejected(dseg, probseg, fov, message):
    with pytest.raises(ValueError, match=message):
        measure_confidence(
            np.zeros((3, 3, 3)),
            np.zeros(dseg, int),
            np.zeros(probseg),
            structures=[DN_L],
            voxel_size_mm=UNIT,
            fov=FieldOfView.of(np.ones(fov, bool), voxel_size_mm=UNIT),
        )
