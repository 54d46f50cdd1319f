from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor
from skimage.color import deltaE_ciede2000, rgb2lab

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.report.slices import PLANES

DENTATES = STRUCTURES.both_sides(["DN"])
DICHROMATS = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}
"""Linear RGB as it is seen. Machado GM, et al. IEEE Trans Vis Comput Graph 15 (2009) 1291-1298, severity 1."""
HEADER, FOOTER = 54, 98  # pixels above and below the slices where the legend has one line


def read_slices(path: Path) -> NDArray[np.int_]:
    """The slices of a mosaic, without legend."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)[HEADER:-FOOTER]


def places_of(colour: str, pixels: NDArray[np.int_]) -> NDArray[np.intp]:
    """Rows and columns of the pixels of a colour; lines are blended a little at their edges."""
    return np.argwhere(np.abs(pixels - ImageColor.getrgb(colour)).max(axis=-1) < 30)


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_the_patients_left_is_on_the_left(two_sides, plane, tmp_path):
    chi, dseg = two_sides
    # One slice, so that one panel fills the width.
    middle = np.zeros_like(dseg.array)
    index = (slice(None), slice(None), 2) if plane == "axial" else (slice(None), 24, slice(None))
    middle[index] = dseg.array[index]
    dseg = dseg.with_array(middle)
    pixels = read_slices(draw_mosaic(chi, dseg, tmp_path / "a.png", plane=plane, structures=DENTATES))
    left, right = (places_of(structure.color, pixels) for structure in DENTATES)
    assert len(left) > 50
    assert len(right) > 50
    assert left[:, 1].max() < pixels.shape[1] / 2 < right[:, 1].min()


def test_sagittal_slices_run_from_left_to_right_and_front_is_right(tmp_path):
    dseg = np.zeros((20, 30, 20), np.uint8)
    dseg[5, 4:8, 8:12], dseg[15, 22:26, 8:12] = 1, 2  # left and behind, right and in front
    volume = Volume(dseg, np.eye(4))
    # Dark, as a red line on white would blend to the right's pink.
    chi = Volume(np.full(dseg.shape, 0.01, np.float32), np.eye(4))
    pixels = read_slices(draw_mosaic(chi, volume, tmp_path / "s.png", plane="sagittal", structures=DENTATES))
    panel = pixels.shape[1] / 2  # two slices have a nucleus
    left, right = (places_of(structure.color, pixels)[:, 1] for structure in DENTATES)
    assert left.max() < panel / 2
    assert right.min() > 1.5 * panel


def test_a_cube_in_space_is_a_square_in_the_picture(tmp_path):
    affine = np.diag([1.0, 1, 3, 1])
    dseg = np.zeros((60, 5, 20), np.uint8)
    dseg[24:36, 2, 8:12] = 1  # 12 mm × 12 mm
    chi = Volume(np.ones(dseg.shape, np.float32), affine)
    pixels = read_slices(
        draw_mosaic(chi, Volume(dseg, affine), tmp_path / "c.png", plane="coronal", structures=DENTATES[:1])
    )
    height, width = np.ptp(places_of(DENTATES[0].color, pixels), axis=0)
    assert height == pytest.approx(width, rel=0.02)  # a line is 2 of 600 pixels wide


def test_a_pale_outline_on_a_bright_nucleus_has_a_thin_dark_rim(tmp_path):
    dseg = np.zeros((20, 20, 3), np.uint8)
    dseg[8:12, 8:12, 1] = 2
    white = Volume(np.full(dseg.shape, 0.3, np.float32), np.eye(4))
    pixels = read_slices(
        draw_mosaic(white, white.with_array(dseg), tmp_path / "r.png", plane="axial", structures=DENTATES[1:])
    )
    row = pixels[len(pixels) * 7 // 16].max(axis=-1)  # through the nucleus, clear of the letters in the middle
    assert (row < 0.6 * 255).any()  # the lines themselves are pale pink, 245 in red
    assert np.count_nonzero(row < 250) <= 2 * 4  # both edges of the nucleus, 4 of 1800 pixels each


@pytest.mark.parametrize("pair", [("CN", "PUT"), ("PUT", "GP")])
@pytest.mark.parametrize("side", "LR")
@pytest.mark.parametrize("blindness", DICHROMATS)
def test_nuclei_side_by_side_differ_for_colour_blind_readers(pair, side, blindness):
    seen = []
    for nucleus in pair:
        srgb = np.array(ImageColor.getrgb(STRUCTURES.named(f"{nucleus}_{side}").color)) / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        light = np.clip(np.array(DICHROMATS[blindness]) @ linear, 0, 1)
        seen.append(rgb2lab(np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)))
    assert deltaE_ciede2000(*seen) > 10  # two thin lines are told apart from about 10, shades of one colour from 2


def test_up_is_up(tmp_path):
    dseg = np.zeros((20, 5, 20), np.uint8)
    dseg[5:15, 2, 15:18] = 1
    chi = Volume(np.ones(dseg.shape, np.float32), np.eye(4))
    pixels = read_slices(
        draw_mosaic(chi, Volume(dseg, np.eye(4)), tmp_path / "u.png", plane="coronal", structures=DENTATES[:1])
    )
    assert places_of(DENTATES[0].color, pixels)[:, 0].max() < pixels.shape[0] / 2


def test_the_window_is_minus_01_to_02_ppm_and_nan_is_black(tmp_path):
    values_ppm = np.array([-0.1, 0.05, 0.2, np.nan], np.float32)
    chi = Volume(np.repeat(np.tile(values_ppm[:, None, None], (1, 4, 1)), 2, axis=2), np.eye(4))
    dseg = chi.with_array(np.zeros(chi.shape, np.uint8))
    dseg.array[0, 0, 0] = dseg.array[3, 3, 0] = 1  # crops to the whole slice
    pixels = read_slices(draw_mosaic(chi, dseg, tmp_path / "w.png", plane="axial", structures=DENTATES[:1]))
    row = pixels[pixels.shape[0] * 5 // 8]
    middles = [int(row[len(row) * (2 * column + 1) // 8, 0]) for column in range(4)]
    assert middles == pytest.approx([0, 127.5, 255, 0], abs=1)


@pytest.mark.parametrize("plane", PLANES)
def test_a_map_without_nuclei_is_still_drawn(plane, tmp_path):
    chi = Volume(np.linspace(-0.1, 0.2, 8000, dtype=np.float32).reshape(20, 20, 20), np.eye(4))
    empty = chi.with_array(np.zeros(chi.shape, np.uint8))
    pixels = read_slices(draw_mosaic(chi, empty, tmp_path / "e.png", plane=plane, structures=STRUCTURES))
    assert pixels.std() > 20


def test_a_map_of_zeros_is_still_drawn(tmp_path):
    zeros = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    out = draw_mosaic(zeros, zeros, tmp_path / "z.png", plane="axial", structures=STRUCTURES)
    assert out.stat().st_size > 0


def test_the_same_input_gives_the_same_bytes(two_sides, tmp_path):
    chi, dseg = two_sides
    first, second = (
        draw_mosaic(chi, dseg, tmp_path / name, plane="axial", structures=DENTATES, title="sub-01_$x$").read_bytes()
        for name in ("a.png", "b.png")
    )
    assert first == second


def test_labels_on_another_grid_are_refused(tmp_path):
    chi, dseg = (Volume(np.zeros(shape, np.float32), np.eye(4)) for shape in ((4, 4, 4), (4, 4, 5)))
    with pytest.raises(ValueError, match=r"dseg has shape \(4, 4, 5\), expected \(4, 4, 4\)"):
        draw_mosaic(chi, dseg, tmp_path / "x.png", plane="axial", structures=DENTATES)


def test_an_unknown_plane_is_refused(tmp_path):
    chi = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="plane 'oblique', expected one of axial, coronal, sagittal"):
        draw_mosaic(chi, chi, tmp_path / "x.png", plane="oblique", structures=DENTATES)  # type: ignore[arg-type]
