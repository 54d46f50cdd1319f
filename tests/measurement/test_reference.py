from functools import partial

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.columns import REFERENCE_COLUMNS, REFERENCED
from bids_dgmseg.measurement.nuclei import measure_nuclei
from bids_dgmseg.measurement.scan import (
    Reference,
    add_referenced_columns,
    describe_erosion,
    erode_ventricles,
    measure_reference,
)
from bids_dgmseg.models.structures import STRUCTURES

UNIT = (1.0, 1.0, 1.0)


def measure(chi: np.ndarray, size_mm: tuple[float, float, float] = UNIT) -> Reference:
    """Measure the whole array as the region."""
    return measure_reference(chi, np.ones(chi.shape, bool), name="csf", source="mask x", voxel_size_mm=size_mm)


def test_reference_averages_the_valid_voxels():
    # 50 voxels of 0.01, 50 of 0.03: mean 0.02; the sum of squares is 100 x 0.01^2, over 99. Ten more are NaN.
    chi = np.repeat([0.01, 0.03], 50).reshape(10, 10, 1)
    found = measure(np.concatenate([chi, np.full((10, 1, 1), np.nan)], axis=1))
    assert found.mean_ppm == pytest.approx(0.02)
    assert (found.n_voxels, found.problem) == (100, "")
    assert found.std_ppm == pytest.approx(np.sqrt(100 * 1e-4 / 99))
    assert found.sem_ppm == pytest.approx(found.std_ppm / 10)


@pytest.mark.parametrize(
    ("n_voxels", "size_mm", "enough"),
    [
        pytest.param(19, (2.0, 2.0, 2.0), False, id="152 mm3, but 19 voxels"),
        pytest.param(20, (2.0, 2.0, 2.0), True, id="20 voxels, 160 mm3"),
        pytest.param(49, UNIT, False, id="49 mm3"),
        pytest.param(50, UNIT, True, id="50 mm3"),
        pytest.param(0, UNIT, False, id="none"),
    ],
)
def test_small_region_is_no_reference(n_voxels, size_mm, enough):
    found = measure(np.full((n_voxels, 1, 1), 0.02), size_mm)
    assert np.isfinite(found.mean_ppm) == enough
    assert found.n_voxels == n_voxels
    assert (found.problem == "") == enough
    if not enough:
        assert found.problem.startswith(f"reference csf: {n_voxels} voxels")


def test_ventricles_are_eroded_by_half_a_label_voxel():
    # 12 mm wide with labels of 4 mm: voxels 2 mm or less from the outside, centre to centre, are eroded; 8 mm remain.
    ventricles = np.zeros((16, 16, 16), bool)
    ventricles[2:14, 2:14, 2:14] = True
    core = erode_ventricles(ventricles, voxel_size_mm=UNIT, label_size_mm=(4.0, 4.0, 4.0))
    expected = np.zeros_like(ventricles)
    expected[4:12, 4:12, 4:12] = True
    np.testing.assert_array_equal(core, expected)


def test_ventricles_are_eroded_at_image_border():
    whole = np.ones((6, 6, 6), bool)
    assert erode_ventricles(whole, voxel_size_mm=UNIT, label_size_mm=(3.0,) * 3).sum() == 4**3
    assert not erode_ventricles(~whole, voxel_size_mm=UNIT, label_size_mm=(3.0,) * 3).any()


@pytest.mark.parametrize(
    ("size_mm", "expected"),
    [
        pytest.param((2.0, 2.0, 2.0), (slice(3, 8), slice(3, 8), slice(3, 8)), id="2 mm: one layer"),
        pytest.param((1.0, 1.0, 3.0), (slice(3, 8), slice(3, 8), slice(3, 8)), id="3 mm slices: one layer"),
        pytest.param((1.5, 1.5, 1.5), (slice(3, 8), slice(3, 8), slice(3, 8)), id="1.5 mm: one layer"),
        pytest.param((0.7, 0.7, 0.7), (slice(4, 7), slice(4, 7), slice(4, 7)), id="0.7 mm: two layers"),
    ],
)
def test_ventricles_are_eroded_by_one_layer_at_least(size_mm, expected):
    # 7 voxels wide, labels of 3 mm: 1.5 mm cover one voxel of 1 or 1.5 mm, two of 0.7 mm, none of 2 or 3 mm.
    ventricles, core = np.zeros((2, 11, 11, 11), bool)
    ventricles[2:9, 2:9, 2:9] = True
    core[expected] = True
    found = erode_ventricles(ventricles, voxel_size_mm=size_mm, label_size_mm=(3.0, 3.0, 3.0))
    np.testing.assert_array_equal(found, core)


@pytest.mark.parametrize(
    ("edge_mm", "words"),
    [
        (1.0, "eroded by 1.5 mm"),
        (1.5 + 1e-8, "eroded by 1.5 mm"),
        (2.0, "eroded by 1.5 mm, at least by one voxel"),
    ],
)
def test_erosion_is_described(edge_mm, words):
    assert describe_erosion(voxel_size_mm=(1.0, 1.0, edge_mm), label_size_mm=(3.0, 3.0, 3.0)) == words


def test_referenced_columns_equal_a_shifted_map():
    # What add_referenced_columns() does to the table must equal measuring chi - 0.02.
    rng = np.random.default_rng(0)
    chi, dseg = rng.normal(0.1, 0.03, (9, 9, 9)), np.zeros((9, 9, 9), np.uint8)
    dseg[2:7, 2:7, 2:7] = 1
    chi[4, 4, 4] = np.nan
    measure_dentates = partial(measure_nuclei, structures=STRUCTURES.both_sides(["DN"]), voxel_size_mm=(1.0, 1.0, 2.0))
    probseg = np.stack([0.8 * (dseg == 1), 0 * dseg]).astype(np.float32)
    raw = measure_dentates(chi, dseg, probseg).assign(high_iron_mean_ppm=[0.15, np.nan])
    shifted = measure_dentates(chi - 0.02, dseg, probseg)
    table = add_referenced_columns(raw, Reference("csf", "", 0.02, 0.01, 99), voxel_size_mm=(1.0, 1.0, 2.0))
    assert list(table.columns) == [*raw.columns, *REFERENCE_COLUMNS]
    for column in ("mean", "median", "p05", "p25", "p75", "p95", "mean_pv", "core_mean"):
        assert table[f"{column}_ref_ppm"][0] == pytest.approx(shifted[f"{column}_ppm"][0], abs=1e-9), column
    assert table["mass_ref_ppm_mm3"][0] == pytest.approx(shifted["mass_ppm_mm3"][0])
    assert table["high_iron_mean_ref_ppm"][0] == pytest.approx(0.13)
    assert table["mean_ppm"][0] == raw["mean_ppm"][0]
    assert table.loc[1, list(REFERENCE_COLUMNS)].isna().all()  # DN_R has no voxel


def test_failed_reference_leaves_columns_missing():
    stats = pd.DataFrame({name: [0.1] for name in (*REFERENCED, "mass_ppm_mm3", "n_valid")})
    table = add_referenced_columns(stats, Reference("csf", "", problem="none"), voxel_size_mm=UNIT)
    assert table[list(REFERENCE_COLUMNS)].isna().all(axis=None)
    assert table["mean_ppm"].tolist() == [0.1]
