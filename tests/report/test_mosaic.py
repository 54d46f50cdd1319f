"""Slices of the mosaics: their choice, orientation, geometry and colours."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.report.mosaic import LAYOUTS, PLANES, MosaicSlices, choose_mosaic, draw_mosaic
from tests.report.conftest import DENTATES

HEADER, FOOTER = 54, 98  # pixels above and below the slices where the legend has one line


def read_slices(path: Path) -> NDArray[np.int_]:
    """The slices of a mosaic, without legend."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)[HEADER:-FOOTER]


def find_pixels(colour: str, pixels: NDArray[np.int_]) -> NDArray[np.intp]:
    """Rows and columns of the pixels of a colour, which is blended at the edges of lines."""
    return np.argwhere(np.abs(pixels - ImageColor.getrgb(colour)).max(axis=-1) < 30)


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_left_is_on_the_left(two_sides, plane, tmp_path):
    chi, dseg = two_sides
    # One slice, so that one panel fills the width.
    middle = np.zeros_like(dseg.array)
    index = (slice(None), slice(None), 2) if plane == "axial" else (slice(None), 24, slice(None))
    middle[index] = dseg.array[index]
    dseg = dseg.with_array(middle)
    pixels = read_slices(draw_mosaic(chi, dseg, tmp_path / "a.png", plane=plane, structures=DENTATES))
    left, right = (find_pixels(structure.color, pixels) for structure in DENTATES)
    assert len(left) > 50
    assert len(right) > 50
    assert left[:, 1].max() < pixels.shape[1] / 2 < right[:, 1].min()


def draw_uniform(
    folder: Path, dseg: NDArray[np.uint8], chi_ppm: float, *, slice_mm: float = 1, **options
) -> NDArray[np.int_]:
    """Draw labels on a map of one value and read the slices."""
    labels = Volume(dseg, np.diag([1.0, 1, slice_mm, 1]))
    chi = labels.with_array(np.full(dseg.shape, chi_ppm, np.float32))
    return read_slices(draw_mosaic(chi, labels, folder / "uniform.png", **options))


def test_sagittal_slices_run_from_left_to_right(tmp_path):
    dseg = np.zeros((20, 30, 20), np.uint8)
    dseg[5, 4:8, 8:12], dseg[15, 22:26, 8:12] = 1, 2  # left and behind, right and in front
    # Dark, as a red line on white would blend to the right's pink.
    pixels = draw_uniform(tmp_path, dseg, 0.01, plane="sagittal", structures=DENTATES)
    panel = pixels.shape[1] / 2  # two slices have a nucleus
    left, right = (find_pixels(structure.color, pixels)[:, 1] for structure in DENTATES)
    assert left.max() < panel / 2
    assert right.min() > 1.5 * panel


def test_superior_is_up_and_anisotropic_voxels_keep_proportions(tmp_path):
    dseg = np.zeros((60, 5, 20), np.uint8)
    dseg[24:36, 2, 15:19] = 1  # 12 mm × 12 mm
    pixels = draw_uniform(tmp_path, dseg, 1, slice_mm=3, plane="coronal", structures=DENTATES[:1])
    outline = find_pixels(DENTATES[0].color, pixels)
    assert outline[:, 0].mean() < pixels.shape[0] / 2
    height, width = np.ptp(outline, axis=0)
    assert height == pytest.approx(width, rel=0.02)  # a line is 2 of 600 pixels wide


def test_grey_scale_is_fixed_and_nan_black(tmp_path):
    values_ppm = np.array([-0.1, 0.05, 0.2, np.nan], np.float32)
    chi = Volume(np.repeat(np.tile(values_ppm[:, None, None], (1, 4, 1)), 2, axis=2), np.eye(4))
    dseg = chi.with_array(np.zeros(chi.shape, np.uint8))
    dseg.array[0, 0, 0] = dseg.array[3, 3, 0] = 1  # crops to the whole slice
    pixels = read_slices(draw_mosaic(chi, dseg, tmp_path / "w.png", plane="axial", structures=DENTATES[:1]))
    row = pixels[pixels.shape[0] * 5 // 8]
    middles = [int(row[len(row) * (2 * column + 1) // 8, 0]) for column in range(4)]
    assert middles == pytest.approx([0, 127.5, 255, 0], abs=1)


HEAD = Box((-75, -105, -65), (75, 75, 75))


@pytest.fixture(scope="module")
def phantom_on_grid():
    grid = world_grid(HEAD, (1.0, 1.0, 3.0))
    labels = PHANTOM.dseg(grid)
    head = np.ones(grid.shape, np.float32)
    return Volume(head, grid.affine), labels


@pytest.mark.parametrize("plane", PLANES)
def test_every_nucleus_is_shown_twice_and_uncropped(phantom_on_grid, plane):
    chi, dseg = phantom_on_grid
    layout = LAYOUTS[plane]
    mosaic = choose_mosaic(chi, dseg, layout=layout, structures=STRUCTURES)
    upright = np.moveaxis(dseg.array, layout.axis, 0)
    for structure in STRUCTURES:
        has_nucleus = (upright == structure.index).any(axis=(1, 2))
        assert has_nucleus[list(mosaic.slices)].sum() >= min(2, has_nucleus.sum()), structure.abbreviation
    kept = [slice(None)] * 3
    kept[layout.across], kept[layout.up] = mosaic.across, mosaic.up
    assert np.count_nonzero(dseg.array[tuple(kept)]) == np.count_nonzero(dseg.array)


@pytest.mark.parametrize(
    ("step_mm", "tilt_deg", "names"),
    [
        pytest.param(1.0, 0, ["z = −1 mm", "z = 0 mm", "z = 1 mm"], id="integer mm"),
        pytest.param(0.5, 0, ["z = −0.5 mm", "z = 0.0 mm", "z = 0.5 mm"], id="half mm"),
        pytest.param(1.0, 60, ["z = −0.5 mm", "z = 0.0 mm", "z = 0.5 mm"], id="oblique, cos 60°"),
    ],
)
def test_slice_labels_are_unique(step_mm, tilt_deg, names):
    affine = np.diag([1, 1, step_mm, 1])
    angle = np.deg2rad(tilt_deg)
    affine[1:3, 1:3] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ affine[1:3, 1:3]
    affine[:3, 3] = -affine[:3, :3] @ [1, 1, 1]
    volume = Volume(np.zeros((3, 3, 3), np.float32), affine)
    mosaic = MosaicSlices(LAYOUTS["axial"], (0, 1, 2), slice(0, 3), slice(0, 3))
    positions = [mosaic.format_position(volume, number) for number in mosaic.slices]
    assert positions == names
