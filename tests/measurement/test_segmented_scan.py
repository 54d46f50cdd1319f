from typing import Any

import numpy as np
import pytest

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.segmented_scan import Coverage, FieldOfView, check_coverage
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM


def gap(fov: FieldOfView, *voxel: int) -> float:
    """Distance of one voxel to the edge."""
    region = np.zeros(fov.inside.shape, bool)
    region[voxel] = True
    return fov.distance_to_edge(region)


def slab(*valid: int, length: int = 20, width: int = 15) -> np.ndarray:
    mask = np.zeros((width, width, length), bool)
    mask[..., list(valid)] = True
    return mask


def test_distance_to_edge_is_between_surfaces_in_mm():
    # 15 voxels across: the middle one has 7 on each side of 1 mm; along z the slab begins at slice 5.
    fov = FieldOfView.of(slab(*range(5, 20)), voxel_size_mm=(1.0, 1.0, 3.0))
    assert gap(fov, 7, 7, 5) == 0  # touches the empty slice
    assert gap(fov, 7, 7, 6) == 3
    assert gap(fov, 7, 7, 12) == 7  # x and y end before z, which is 21 mm away
    assert gap(fov, 7, 7, 19) == 0
    assert gap(fov.crop((slice(7, 8),) * 3), 0, 0, 0) == 6


@pytest.mark.parametrize(("hole", "is_inside", "gap_mm"), [(slice(7, 8), True, 3), (slice(6, 9), False, 2)])
def test_only_holes_of_three_voxels_are_an_edge(hole, is_inside, gap_mm):
    valid = np.ones((15, 15, 15), bool)
    valid[hole, hole, hole] = False
    fov = FieldOfView.of(valid, voxel_size_mm=(1.0, 1.0, 1.0))
    assert fov.inside[7, 7, 7] == is_inside
    assert gap(fov, 11, 7, 7) == gap_mm


NUCLEI = Box((-40.5, -75, -51), (40.5, 40.5, 34.5))
"""Contains all nuclei of the phantom with a margin; an integer number of voxels of 1.5 mm."""


def coverage(dseg: Volume, **options: Any) -> Coverage:
    """Coverage of a segmentation; all voxels are valid and all probabilities 0 by default."""
    defaults: dict[str, Any] = {"voxels_pv": np.zeros(16), "valid": np.ones(dseg.shape, bool), "labelled": ()}
    return check_coverage(dseg, structures=STRUCTURES, **defaults | options)


def masked_below(z_mm: float) -> tuple[Volume, np.ndarray]:
    """The phantom in an image without valid voxels below a height, and its valid voxels."""
    dseg = phantom_in()
    valid = np.ones(dseg.shape, bool)
    valid[:, :, dseg.affine[2, 2] * np.arange(dseg.shape[2]) + dseg.affine[2, 3] < z_mm] = False
    return dseg.with_array(dseg.array * valid), valid


def phantom_in(
    low_mm: tuple[float, float, float] = NUCLEI.low_mm,
    high_mm: tuple[float, float, float] = NUCLEI.high_mm,
    rotation: np.ndarray | None = None,
) -> Volume:
    """The phantom's nuclei in a field of view at 1.5 mm, optionally with a rotated head."""
    upright = world_grid(Box(low_mm, high_mm), (1.5, 1.5, 1.5))
    dseg = PHANTOM.dseg(upright)
    return dseg if rotation is None else Volume(dseg.array, rotation @ dseg.affine)


def test_exchanged_sides_are_reported():
    dseg = phantom_in()
    swapped = np.where((dseg.array == 1) | (dseg.array == 2), 3 - dseg.array, dseg.array)  # 1 DN_L, 2 DN_R
    assert coverage(dseg.with_array(swapped)) == Coverage((), (), exchanged=(("DN_L", "DN_R"),))


@pytest.mark.parametrize(
    ("low_mm", "high_mm", "face", "missing"),
    [
        # the first voxel's centre lies 0.75 mm inside the box
        ((-40.5, -75, -24), NUCLEI.high_mm, "lowest slice at z = -23 mm", {"DN_L", "DN_R", "IN_L", "IN_R"}),
        ((-40.5, -36, -51), NUCLEI.high_mm, "most posterior slice at y = -35 mm", {"DN_L", "DN_R", "IN_L", "IN_R"}),
    ],
)
def test_nucleus_beyond_the_image_is_missing(low_mm, high_mm, face, missing):
    shares = coverage(phantom_in(low_mm, high_mm))
    assert set(shares.missing) == missing
    assert f"DN_L lies outside the field of view ({face}); its values are n/a" in shares.warnings


def test_nucleus_at_edge_of_mask_or_image_may_be_cut():
    dseg, valid = masked_below(-36)  # through the middle of the dentate nuclei
    for shares in (coverage(dseg, valid=valid), coverage(phantom_in((-40, -75, -36)))):
        assert "DN_L touches the edge of the field of view; its volume may be too small" in shares.warnings
        assert shares.missing == ()


def test_nucleus_in_hole_of_brain_mask_is_reported():
    dseg, valid = masked_below(-24)
    valid[0, 0, :] = True  # a line that is valid down to the lowest slice
    assert "DN_L is in a region without valid data; its values are n/a" in coverage(dseg, valid=valid).warnings


SMALL = "was detected, but is too small to label at 1.5 x 1.5 x 1.5 mm; use volume_pv_mm3"


@pytest.mark.parametrize(
    ("labelled", "fills", "missing", "warning"),
    [
        (["STN_R"], 0.5, (), SMALL),
        ([], 0.0, ("STN_R",), "was not found; its values are n/a"),
        (["STN_R"], 0.4, ("STN_R",), "was not found; its values are n/a"),
        (["STN_L"], 9.0, ("STN_R",), "was not found; its values are n/a"),  # low probabilities everywhere
    ],
)
def test_labelled_nucleus_of_half_a_voxel_is_not_missing(labelled, fills, missing, warning):
    dseg = phantom_in()
    dseg.array[dseg.array == STRUCTURES.named("STN_R").index] = 0
    voxels_pv = np.where([structure.abbreviation == "STN_R" for structure in STRUCTURES], fills, 0)
    assert coverage(dseg, voxels_pv=voxels_pv, labelled=labelled) == Coverage(missing, (f"STN_R {warning}",))
