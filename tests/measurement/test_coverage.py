from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.masks import is_measured
from bids_dgmseg.image.resample import Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.field_of_view import Coverage, find_gaps
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.phantom import PHANTOM

NUCLEI = Box((-40.5, -75, -51), (40.5, 40.5, 34.5))
"""Holds all nuclei of the phantom with room around; whole voxels of 1.5 mm."""


def gaps_of(
    dseg: Volume,
    voxels_pv: NDArray[np.float64] | None = None,
    measured: NDArray[np.bool_] | None = None,
    seen: Collection[str] = (),
) -> Coverage:
    return find_gaps(
        dseg,
        structures=STRUCTURES,
        voxels_pv=np.zeros(16) if voxels_pv is None else voxels_pv,
        measured=np.ones(dseg.shape, bool) if measured is None else measured,
        seen=seen,
    )


def centres_z_mm(dseg: Volume) -> NDArray[np.float64]:
    """Height of the slices."""
    heights: NDArray[np.float64] = dseg.affine[2, 2] * np.arange(dseg.shape[2]) + dseg.affine[2, 3]
    return heights


def masked_below(z_mm: float) -> tuple[Volume, NDArray[np.bool_]]:
    """The phantom in an image that shows nothing below a height, and where it shows something."""
    dseg = phantom_in()
    measured = np.ones(dseg.shape, bool)
    measured[:, :, centres_z_mm(dseg) < z_mm] = False
    return dseg.with_array(dseg.array * measured), measured


def phantom_in(
    low_mm: tuple[float, float, float] = NUCLEI.low_mm,
    high_mm: tuple[float, float, float] = NUCLEI.high_mm,
    turn: NDArray[np.float64] | None = None,
) -> Volume:
    """The phantom's nuclei in a field of view at 1.5 mm, the head turned if asked."""
    upright = world_grid(Box(low_mm, high_mm), (1.5, 1.5, 1.5))
    dseg = PHANTOM.dseg(upright)
    return dseg if turn is None else Volume(dseg.array, turn @ dseg.affine)


def test_nothing_is_said_where_every_nucleus_is_whole():
    assert gaps_of(phantom_in()) == Coverage(missing=(), warnings=())


def test_sides_that_are_exchanged_are_named():
    dseg = phantom_in()
    swapped = np.where((dseg.array == 1) | (dseg.array == 2), 3 - dseg.array, dseg.array)  # 1 DN_L, 2 DN_R
    (warning,) = gaps_of(dseg.with_array(swapped)).warnings
    assert warning.startswith("DN_L lies to the right of DN_R: left and right are exchanged; check the map's header")


@pytest.mark.parametrize(
    ("low_mm", "high_mm", "face", "missing"),
    [
        # the first voxel's centre lies 0.75 mm inside the box
        ((-40.5, -75, -24), NUCLEI.high_mm, "lowest slice at z = -23 mm", {"DN_L", "DN_R", "IN_L", "IN_R"}),
        ((-40.5, -36, -51), NUCLEI.high_mm, "hindmost slice at y = -35 mm", {"DN_L", "DN_R", "IN_L", "IN_R"}),
    ],
)
def test_what_lies_beyond_the_image_is_missing_and_the_side_is_named(low_mm, high_mm, face, missing):
    gaps = gaps_of(phantom_in(low_mm, high_mm))
    assert set(gaps.missing) == missing
    assert f"DN_L lies outside the image ({face}); its values are n/a" in gaps.warnings


def test_slices_without_a_measurement_are_outside_too():
    dseg, measured = masked_below(-24)
    gaps = gaps_of(dseg, measured=measured)
    assert set(gaps.missing) == {"DN_L", "DN_R", "IN_L", "IN_R"}
    # Slices lie at -50.25 + 1.5 n mm: the first that is not below -24 is the 18th, at -23.25.
    assert (
        "DN_L lies outside the measured part of the image (lowest slice at z = -23 mm); its values are n/a"
        in gaps.warnings
    )


def test_a_nucleus_at_the_edge_of_what_was_measured_may_be_cut():
    dseg, measured = masked_below(-36)
    assert (
        "DN_L touches the edge of the measured part of the image; its volume may be too small"
        in gaps_of(dseg, measured=measured).warnings
    )


def test_a_nucleus_in_a_hole_of_the_brain_mask_was_not_measured():
    dseg, measured = masked_below(-24)
    measured[0, 0, :] = True  # a line that is measured down to the lowest slice
    assert "DN_L lies where the map has no measurement; its values are n/a" in gaps_of(dseg, measured=measured).warnings


def test_what_counts_as_measured():
    chi = np.array([0.0, np.nan, 1e-5, -0.002, 0.1])
    assert is_measured(chi).tolist() == [False, False, False, True, True]


def test_a_turned_head_has_its_nuclei_where_the_others_say():
    about_x = np.deg2rad(25)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(about_x), -np.sin(about_x)], [np.sin(about_x), np.cos(about_x)]]
    gaps = gaps_of(phantom_in((-40, -75, -24), turn=turn))
    assert set(gaps.missing) == {"DN_L", "DN_R", "IN_L", "IN_R"}
    assert all("lies outside the image (lowest slice at z = " in line for line in gaps.warnings)


def test_a_nucleus_that_should_be_in_the_image_was_not_found():
    dseg = phantom_in()
    dseg.array[dseg.array == STRUCTURES.named("STN_R").index] = 0
    gaps = gaps_of(dseg)
    assert gaps.missing == ("STN_R",)
    assert gaps.warnings == ("STN_R was not found; its values are n/a",)


@pytest.mark.parametrize(
    ("seen", "fills", "missing", "warning"),
    [
        (
            ["STN_R"],
            0.5,
            (),
            "STN_R was found, but fills no voxel of 1.5 x 1.5 x 1.5 mm: its label volume is 0, see volume_pv_mm3",
        ),
        (["STN_R"], 0.4, ("STN_R",), "STN_R was not found; its values are n/a"),
        (["STN_L"], 9.0, ("STN_R",), "STN_R was not found; its values are n/a"),  # a doubt everywhere
    ],
)
def test_only_a_nucleus_that_was_seen_and_fills_half_a_voxel_was_lost_between_grids(seen, fills, missing, warning):
    dseg = phantom_in()
    dseg.array[dseg.array == STRUCTURES.named("STN_R").index] = 0
    voxels_pv = np.where([structure.abbreviation == "STN_R" for structure in STRUCTURES], fills, 0)
    assert gaps_of(dseg, voxels_pv, seen=seen) == Coverage(missing, (warning,))


def test_a_nucleus_at_the_edge_may_be_cut():
    gaps = gaps_of(phantom_in((-40, -75, -36)))  # through the middle of the dentate nuclei
    assert "DN_L touches the edge of the image; its volume may be too small" in gaps.warnings
    assert gaps.missing == ()


def test_an_empty_segmentation_names_every_nucleus():
    empty = Grid((10, 10, 10), np.eye(4))
    gaps = gaps_of(Volume(np.zeros(empty.shape, np.uint8), empty.affine))
    assert len(gaps.missing) == 16
    assert gaps.warnings[0] == "DN_L was not found; its values are n/a"
