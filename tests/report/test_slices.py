import numpy as np
import pytest

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.slices import LAYOUTS, PLANES, MosaicSlices, choose_mosaic, choose_slices, format_position
from bids_dgmseg.simulate.phantom import PHANTOM

HEAD = Box((-75, -105, -65), (75, 75, 75))


@pytest.fixture(scope="module", params=[(1.0, 1.0, 1.0), (1.0, 1.0, 3.0)], ids=["1 mm", "3 mm slices"])
def phantom_on_grid(request):
    grid = world_grid(HEAD, request.param)
    labels = PHANTOM.dseg(grid)
    head = np.ones(grid.shape, np.float32)
    return Volume(head, grid.affine), labels


@pytest.mark.parametrize("plane", PLANES)
def test_every_nucleus_is_shown_at_least_twice(phantom_on_grid, plane):
    chi, dseg = phantom_on_grid
    cut = choose_mosaic(chi, dseg, layout=LAYOUTS[plane], structures=STRUCTURES)
    drawn = np.take(dseg.array, cut.slices, axis=LAYOUTS[plane].axis)
    for structure in STRUCTURES:
        slices = (np.moveaxis(drawn == structure.index, LAYOUTS[plane].axis, 0)).any(axis=(1, 2)).sum()
        there = (np.moveaxis(dseg.array == structure.index, LAYOUTS[plane].axis, 0)).any(axis=(1, 2)).sum()
        assert slices >= min(2, there), structure.abbreviation


@pytest.mark.parametrize("plane", PLANES)
def test_no_nucleus_is_cut_off(phantom_on_grid, plane):
    chi, dseg = phantom_on_grid
    view = LAYOUTS[plane]
    cut = choose_mosaic(chi, dseg, layout=view, structures=STRUCTURES)
    kept = [slice(None)] * 3
    kept[view.across], kept[view.up] = cut.across, cut.up
    assert np.count_nonzero(dseg.array[tuple(kept)]) == np.count_nonzero(dseg.array)


def test_a_small_nucleus_gets_as_many_slices_as_a_large_one():
    shown = np.zeros((2, 50), bool)
    shown[0, 2:8] = True  # 6 slices
    shown[1, 10:50] = True  # 40 slices
    chosen = np.array(choose_slices(shown, counts=[12]))
    assert (chosen < 8).sum() == 6
    assert (chosen >= 10).sum() == 6


def test_a_nucleus_that_was_not_found_is_looked_for_where_the_others_tell(phantom_on_grid):
    chi, dseg = phantom_on_grid
    dentates = [STRUCTURES.named(f"DN_{side}") for side in "LR"]
    cut_off = dseg.with_array(np.where(np.isin(dseg.array, [nucleus.index for nucleus in dentates]), 0, dseg.array))
    cut = choose_mosaic(chi, cut_off, layout=LAYOUTS["axial"], structures=STRUCTURES)
    shown_mm = chi.affine[2, 2] * np.array(cut.slices) + chi.affine[2, 3]
    mni_mm = np.array([nucleus.mni_mm[2] for nucleus in dentates])
    assert (np.abs(shown_mm - mni_mm.mean()) < 8).any()
    others = np.flatnonzero((cut_off.array > 0).any(axis=(0, 1)))
    assert max(cut.slices) <= others.max()  # no slice above all nuclei, where no dentate nucleus is


@pytest.mark.parametrize(
    ("step_mm", "tilt_deg", "names"),
    [
        pytest.param(1.0, 0, ["z = −1 mm", "z = 0 mm", "z = 1 mm"], id="whole mm"),
        pytest.param(0.5, 0, ["z = −0.5 mm", "z = 0.0 mm", "z = 0.5 mm"], id="half mm"),
        pytest.param(
            1.0, 60, ["z = −0.5 mm", "z = 0.0 mm", "z = 0.5 mm"], id="oblique: cos 60° is half a step along z"
        ),
    ],
)
def test_slices_have_names_of_their_own(step_mm, tilt_deg, names):
    affine = np.diag([1, 1, step_mm, 1])
    turn = np.deg2rad(tilt_deg)
    affine[1:3, 1:3] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ affine[1:3, 1:3]
    affine[:3, 3] = -affine[:3, :3] @ [1, 1, 1]
    volume = Volume(np.zeros((3, 3, 3), np.float32), affine)
    cut = MosaicSlices((0, 1, 2), slice(0, 3), slice(0, 3))
    assert [format_position(volume, position, mosaic=cut, layout=LAYOUTS["axial"]) for position in cut.slices] == names


def test_surroundings_of_a_missing_nucleus_are_shown():
    shape, affine = (120, 120, 120), np.eye(4)
    chi = Volume(np.ones(shape, np.float32), affine)
    dseg = np.zeros(shape, np.uint8)
    dseg[60, 60, 60] = STRUCTURES.named("RN_L").index
    red, dentate = STRUCTURES.named("RN_L"), STRUCTURES.named("DN_L")
    near = choose_mosaic(chi, Volume(dseg, affine), layout=LAYOUTS["axial"], structures=[red])
    wide = choose_mosaic(chi, Volume(dseg, affine), layout=LAYOUTS["axial"], structures=[red, dentate])
    assert (near.up, near.slices) == (slice(48, 73), (60,))  # 12 mm on both sides
    assert wide.up == slice(15, 106)  # 45 mm
    assert min(wide.slices) < 25
