import dataclasses

import numpy as np
import pytest
import torch

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.lab.simulate.ranges import DilationRanges
from bids_dgmseg.lab.simulate.shapes import dilate, measure_distance

GRID = world_grid(Box((-30.0, -30.0, -30.0), (30.0, 30.0, 30.0)), (1.0, 1.0, 1.0))
POINTS = torch.from_numpy(GRID.centres_mm()).float().view(*GRID.shape, 3)
RADIUS_MM = 10.0

EVEN = DilationRanges(
    spread_mm=0.0, wide=1.0, wide_mm=(6.0, 6.0), length_mm=(8.0, 8.0), asymmetry=0.0, irregularity=0.0
)


def labels_at(points_mm):
    """A ball of fluid (23) within a shell of caudate (11) 6 mm thick, in white matter (22)."""
    radius = points_mm.norm(dim=-1)
    return torch.where(radius < RADIUS_MM, 23, torch.where(radius < RADIUS_MM + 6, 11, 22)).to(torch.uint8)


@pytest.fixture(scope="module")
def distance():
    return measure_distance(labels_at(POINTS), torch.tensor(np.linalg.inv(GRID.affine), dtype=torch.float32))


def thickness_mm(points_mm, label):
    """Extent of a label along the ray from the centre towards +x, on the fine grid of the points."""
    middle = POINTS.shape[0] // 2
    line = labels_at(points_mm)[middle:, middle, middle]
    return int((line == label).sum())


def test_wall_moves_until_tissue_resists(distance):
    wide = dilate(POINTS, distance, ranges=EVEN, generator=torch.Generator().manual_seed(0))
    # The new wall is where d = 6 exp(-d / 8): d = 3.75 mm outside of the old one.
    assert thickness_mm(wide, 23) - thickness_mm(POINTS, 23) == pytest.approx(3.75, abs=1)


def test_surrounding_tissue_is_thinned(distance):
    wide = dilate(POINTS, distance, ranges=EVEN, generator=torch.Generator().manual_seed(0))
    # The outer face, 6 mm from the old wall, moves to d - 6 exp(-d / 8) = 6: d = 8.2; 8.2 - 3.75 = 4.45 mm remain.
    assert thickness_mm(wide, 11) == pytest.approx(4.45, abs=1)


def test_distant_tissue_stays_in_place(distance):
    wide = dilate(POINTS, distance, ranges=EVEN, generator=torch.Generator().manual_seed(0))
    corner = wide[0, 0, 0] - POINTS[0, 0, 0]
    # 41 mm from the wall: 6 exp(-41 / 8) = 0.03 mm.
    assert float(corner.norm()) < 0.1


def test_points_do_not_pass_through_thin_ventricles():
    thin = torch.full(GRID.shape, 22, dtype=torch.uint8)
    thin[GRID.shape[0] // 2 - 1 : GRID.shape[0] // 2 + 1] = 23  # a sheet of 2 mm in the midplane
    distance = measure_distance(thin, torch.tensor(np.linalg.inv(GRID.affine), dtype=torch.float32))
    assert distance
    wide = dilate(POINTS, distance, ranges=EVEN, generator=torch.Generator().manual_seed(0))
    right = POINTS[..., 0] > 2
    assert float(wide[..., 0][right].min()) > -1.0  # on the other side at most within the sheet


def test_narrow_ventricles_shrink(distance):
    narrow = dataclasses.replace(EVEN, wide_mm=(-2.0, -2.0))
    changed = dilate(POINTS, distance, ranges=narrow, generator=torch.Generator().manual_seed(0))
    assert thickness_mm(changed, 23) < thickness_mm(POINTS, 23)


def test_sides_differ_if_asymmetric(distance):
    uneven = dataclasses.replace(EVEN, asymmetry=0.3)
    differences = []
    for seed in range(5):
        changed = dilate(POINTS, distance, ranges=uneven, generator=torch.Generator().manual_seed(seed))
        fluid = labels_at(changed) == 23
        left, right = int(fluid[POINTS[..., 0] < 0].sum()), int(fluid[POINTS[..., 0] > 0].sum())
        differences.append(abs(left - right) / (left + right))
    assert max(differences) > 0.05


def test_head_without_ventricles_is_not_measured():
    assert measure_distance(torch.ones((4, 4, 4), dtype=torch.uint8), torch.eye(4)) is None
