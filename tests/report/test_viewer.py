"""The interactive viewer: sides, colours, size, no network."""

import base64
import io
import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from nibabel.affines import apply_affine
from PIL import Image

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.scan_figures import write_viewer
from tests.report.conftest import DENTATES


@pytest.fixture(scope="module")
def viewer(two_sides, tmp_path_factory):
    (chi, dseg), out = two_sides, tmp_path_factory.mktemp("viewer") / "viewer.html"
    return write_viewer(chi, dseg, out, structures=DENTATES, scan="sub-01_ses-1", model="dgm16")


def read_sprite(html, name):
    """Unpack an image of the viewer to (X, Y, Z, 4); slices x follow each other by rows, with z upwards."""
    (data,) = re.findall(rf'id="{name}"[^>]*base64,([^"]+)"', html)
    sprite = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
    shape = read_parameters(html)["nbSlice"]
    columns, slices = sprite.shape[1] // shape["Y"], []
    for x in range(shape["X"]):
        row, column = divmod(x, columns)
        tile = sprite[row * shape["Z"] : (row + 1) * shape["Z"], column * shape["Y"] : (column + 1) * shape["Y"]]
        slices.append(tile[::-1].swapaxes(0, 1))
    return np.array(slices)


def read_parameters(html):
    (parameters,) = re.findall(r"brainsprite\((\{.*?\})\);", html)
    return json.loads(parameters)


def test_left_is_left(viewer):
    """Colours of dseg.tsv lie on their sides whatever the orientation of the file."""
    html = viewer.read_text()
    overlay, parameters = read_sprite(html, "overlayImg"), read_parameters(html)
    assert parameters["radiological"] is False
    assert parameters["showLR"]
    for structure, x_mm in zip(DENTATES, (-20, 20), strict=True):
        colour = np.array([round(255 * part) for part in to_rgb(structure.color)])
        is_structure = (overlay[..., 3] > 0) & (np.abs(overlay[..., :3].astype(int) - colour).max(axis=-1) <= 1)
        # The viewer reads coordinates at the index plus 1.
        centre = apply_affine(np.array(parameters["affine"]), np.argwhere(is_structure).mean(axis=0) + 1)
        assert centre == pytest.approx([x_mm, 0, 0], abs=2)  # one voxel


def test_missing_nuclei_are_named(two_sides, tmp_path):
    chi, dseg = two_sides
    empty = dseg.with_array(np.zeros_like(dseg.array))
    out = tmp_path / "viewer.html"
    path = write_viewer(chi, empty, out, structures=tuple(STRUCTURES), scan="sub-01", model="dgm16")
    assert path.read_text().count("has no voxel</span>") == 16
