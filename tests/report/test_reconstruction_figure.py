"""The figure of a reconstruction: its slices, sides and scales."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.report.scan_figures import draw_reconstruction

HEADER, N_ROWS, BAR = 62, 4, 150  # pixels
SIDE = 20  # voxels


def draw(folder, **arrays: Any) -> np.ndarray:
    """Draw a head of cubes of 2 mm that fills its image; the brain is within a margin of two voxels."""
    brain = np.zeros((SIDE, SIDE, SIDE), bool)
    brain[2:-2, 2:-2, 2:-2] = True
    nothing = np.zeros(brain.shape, np.float32)
    complete = dict.fromkeys(("magnitude", "total_field_ppm", "local_field_ppm", "chi_ppm"), nothing)
    complete |= {"magnitude": nothing + 1, "brain": brain, "mask": brain, **arrays}
    grid = Volume(nothing, np.diag([2.0, 2, 2, 1]))
    out = draw_reconstruction(
        cast(Any, SimpleNamespace(**complete)), grid, folder / "figure.png", hz_per_ppm=128.0, title="sub-$1"
    )
    return np.asarray(Image.open(out).convert("L")).astype(int)


def panel(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    """Inner part of a slice, without lines and letters at its edge; all seven are squares here."""
    size = (pixels.shape[1] - BAR) / 7
    height = (pixels.shape[0] - HEADER) / N_ROWS
    top, left = HEADER + row * height, column * size
    inside = pixels[round(top + 0.2 * height) : round(top + 0.8 * height)]
    return inside[:, round(left + 0.2 * size) : round(left + 0.8 * size)]


def test_left_of_each_image_is_on_the_left(tmp_path):
    left_half = np.broadcast_to(np.arange(SIDE)[:, None, None] < SIDE // 2, (SIDE,) * 3)  # x increases to the right
    values = {"magnitude": (1, 0.2), "total_field_ppm": (0.5, -0.5), "local_field_ppm": (0.01, -0.01)}
    values["chi_ppm"] = (0.15, -0.05)
    arrays = {name: np.where(left_half, *pair).astype(np.float32) for name, pair in values.items()}
    pixels = draw(tmp_path, **arrays)
    for row in range(N_ROWS):
        for column in range(6):  # axial and coronal
            left, right = np.array_split(panel(pixels, row, column), 2, axis=1)
            assert left[:, :-9].mean() > right[:, 9:].mean() + 100


def test_anterior_is_up_and_scales_are_fixed(tmp_path):
    """That of the map from -0.1 to 0.2 ppm, that of the local field symmetric; anterior is on the right if sagittal."""
    anterior = np.broadcast_to(np.arange(SIDE)[None, :, None] >= SIDE // 2, (SIDE,) * 3)
    right = np.broadcast_to(np.arange(SIDE)[:, None, None] >= SIDE // 2, (SIDE,) * 3)
    chi, field = (
        np.where(mask, inside, outside).astype(np.float32)
        for mask, inside, outside in ((anterior, 0.05, -0.1), (right, 0.02, 0.0))
    )
    pixels = draw(tmp_path, chi_ppm=chi, local_field_ppm=field)
    upper, lower = np.array_split(panel(pixels, 3, 0), 2, axis=0)
    behind, before = np.array_split(panel(pixels, 3, 6), 2, axis=1)
    for half in (upper[:-9], before[:, 9:]):
        assert half.mean() == pytest.approx(127.5, abs=2)
    for half in (lower[9:], behind[:, :-9]):
        assert half.mean() == pytest.approx(0, abs=2)
    zero, positive = np.array_split(panel(pixels, 2, 2), 2, axis=1)
    assert zero[:, :-9].mean() == pytest.approx(127.5, abs=2)
    assert positive[:, 9:].mean() > 240
