"""Detached voxels, size and height of the caudate, and scales of the head."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.affines import from_matvec

from bids_dgmseg.image.grids import Box, Grid, resample, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.rating import measure_placement, measure_slice_scale
from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES, with_wholes

GRID = world_grid(Box((-60, -90, -60), (60, 60, 60)), (2.0, 2.0, 2.0))
POINTS = GRID.centres_mm()


def ball(centre_mm, radius_mm: float) -> np.ndarray:
    """Return the voxels within a distance of a point."""
    return np.asarray(np.linalg.norm(POINTS - np.asarray(centre_mm, float), axis=-1) <= radius_mm)


@pytest.fixture
def labels() -> np.ndarray:
    """Balls of 4 mm along the typical course of each nucleus."""
    array = np.zeros(GRID.shape, np.uint8)
    for structure in STRUCTURES:
        for point in structure.mni_course_mm:
            array[ball(point, 4)] = structure.index
    return array


def test_caudates_are_compared_with_putamina_and_pallida():
    labels = np.zeros((10, 4, 4), np.uint8)
    numbers = {"CN_L": 6, "CN_R": 9, "PUT_L": 7, "PUT_R": 5, "GPe_L": 2, "GPi_L": 1, "GPe_R": 3, "GPi_R": 2}
    for row, (name, n_voxels) in enumerate(numbers.items()):
        labels[row].flat[:n_voxels] = ALL_STRUCTURES.named(name).index
    parts = with_wholes([ALL_STRUCTURES.named(name) for name in numbers])
    table = measure_placement(Volume(labels, np.eye(4)), structures=parts).set_index("abbreviation")
    assert table["caudate_ratio"].dropna().to_dict() == {"CN_L": 15 / 20, "CN_R": 15 / 20}
    labels[3] = 0
    assert measure_placement(Volume(labels, np.eye(4)), structures=parts)["caudate_ratio"].isna().all()


def test_caudate_high_above_the_putamen():
    """Of 1 mm³ each, 415 at 7 mm are half of 830; 150 more at 10 mm are half of 300, and all together 565 of 830."""
    labels = np.zeros((30, 20, 20), np.uint8)
    labels[:, :, 0] = STRUCTURES.named("PUT_L").index
    labels[:, :, 7].flat[:415] = STRUCTURES.named("CN_L").index
    assert measure_height(labels)["CN_L"] == pytest.approx(0.5)
    labels[:, :, 10].flat[:150] = STRUCTURES.named("CN_L").index
    assert measure_height(labels)["CN_L"] == pytest.approx(565 / 830)
    assert np.isnan(measure_height(labels)["CN_R"])


def measure_height(labels: np.ndarray) -> dict[str, float]:
    table = measure_placement(Volume(labels, np.eye(4)), structures=STRUCTURES)
    return dict(zip(table["abbreviation"], table["caudate_height"], strict=True))


def test_wrong_slice_thickness_is_measured(labels):
    # a head of 0.9 times the size in slices that are tilted by 15 degrees against it
    pitch = np.deg2rad(15)
    turn = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    tilted = Grid((80, 100, 45), from_matvec(turn @ np.diag([2.0, 2.0, 3.0]), turn @ [-80.0, -110.0, -70.0]))
    head = Volume(labels.astype(np.float32), np.diag([0.9, 0.9, 0.9, 1]) @ GRID.affine)
    scanned = resample(head, tilted, order=0).array.astype(np.uint8)
    true = measure_slice_scale(Volume(scanned, tilted.affine), structures=STRUCTURES)
    assert true == pytest.approx(1, abs=0.06)  # balls of 4 mm on slices of 3 mm are off by up to 3 mm
    for factor in (0.8, 4 / 3):
        stated = Volume(scanned, tilted.affine @ np.diag([1, 1, factor, 1]))
        assert measure_slice_scale(stated, structures=STRUCTURES) == pytest.approx(true * factor, rel=1e-3)
