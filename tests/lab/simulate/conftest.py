"""Shared by the tests of simulated datasets: a coarse label template, and BIDS validation."""

from __future__ import annotations

import nibabel as nib
import pytest

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import template_head
from bids_dgmseg.phantom.head import PHANTOM

HEAD_GRID: Grid = world_grid(Box((-75, -108, -78), (75, 72, 79)), (3.0, 3.0, 3.0))


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """Labels of the phantom as a file."""
    path = tmp_path_factory.mktemp("template") / "labels.nii.gz"
    nib.Nifti1Image(PHANTOM.labels(HEAD_GRID.centres_mm()), HEAD_GRID.affine).to_filename(path)
    return path


@pytest.fixture(scope="session")
def head():
    """The phantom with voxels of 3 mm, prepared for drawing heads."""
    return template_head(Volume(PHANTOM.labels(HEAD_GRID.centres_mm()), HEAD_GRID.affine))
