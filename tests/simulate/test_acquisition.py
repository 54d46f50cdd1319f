import dataclasses

import pytest
import torch
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.simulate.acquisition import ScanGrid


def thick(**changes):
    return dataclasses.replace(ScanGrid((8, 8, 12), (1.0, 1.0, 3.0)), **changes)


def ramp(shape):
    return torch.arange(shape[2], dtype=torch.float32).expand(shape).contiguous()


def test_a_slice_is_the_mean_of_what_it_covers():
    # 12 fine slices, 3 to a scan slice: four and one to spare; the middle one reaches from 4 to 7 about 5.5.
    scan = thick().average(ramp((8, 8, 12)))
    assert scan.shape == (8, 8, 5)
    assert scan[0, 0, 2].item() == pytest.approx(5.5)
    step = torch.zeros(8, 8, 12)
    step[:, :, 6:] = 1.0
    assert thick().average(step)[0, 0].tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_slices_move_with_the_offset():
    spot = torch.zeros(8, 8, 12)
    spot[:, :, 4] = 1.0
    # It reaches from 3.5 to 4.5; scan slices from 1 to 4 and 4 to 7 halve it, moved by a third of 3 one has it whole.
    assert thick().average(spot)[0, 0].tolist() == pytest.approx([0, 1 / 6, 1 / 6, 0, 0])
    assert thick(offsets=(0.0, 0.0, 1 / 3)).average(spot)[0, 0].tolist() == pytest.approx([0, 1 / 3, 0, 0, 0])


def test_fine_scans_are_left_as_they_are():
    array = torch.randn(8, 8, 12)
    grid = ScanGrid((8, 8, 12), (1.0, 1.0, 1.0))
    assert torch.equal(grid.interpolate(grid.average(array)), array)


def test_a_constant_stays_in_any_scan():
    tilted = torch.tensor(Rotation.from_euler("xyz", [10, -5, 20], degrees=True).as_matrix(), dtype=torch.float32)
    for grid in (thick(), thick(steps=(1.3, 1.3, 2.6)), thick(rotation=tilted, offsets=(0.0, 0.0, 0.4))):
        back = grid.interpolate(grid.average(torch.full((8, 8, 12), 0.3)))
        assert back.shape == (8, 8, 12)
        assert torch.allclose(back, torch.tensor(0.3))


def test_slices_are_interpolated_as_the_pipeline_resamples_maps():
    scan = torch.randn((8, 8, 5), generator=torch.Generator().manual_seed(0))
    # Scan slices lie at 5.5 + 3 (c - 2): the first at -0.5. The pipeline's resampling is told so by the affine.
    source = Volume(scan.numpy(), torch.diag(torch.tensor([1.0, 1, 3, 1])).double().numpy())
    affine = torch.eye(4).double().numpy()
    affine[2, 3] = 0.5
    expected = resample(source, Grid((8, 8, 12), affine)).array
    assert torch.allclose(thick().interpolate(scan), torch.from_numpy(expected), atol=1e-5)


@pytest.mark.parametrize("step", [1.0, 1.5, 3.0])
def test_an_oblique_scan_does_not_move_what_it_shows(step):
    rotation = torch.tensor(Rotation.from_euler("xyz", [15, -10, 5], degrees=True).as_matrix(), dtype=torch.float32)
    axis = torch.arange(31.0) - 15
    blob = torch.exp(-(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) / 18)
    grid = ScanGrid((31, 31, 31), (1.0, 1.0, step), offsets=(0.0, 0.0, 0.45), rotation=rotation)
    shown = grid.interpolate(grid.average(blob))
    for others in ((1, 2), (0, 2), (0, 1)):
        along = shown.sum(others)
        assert float((along * torch.arange(31)).sum() / along.sum()) == pytest.approx(15.0, abs=0.05)


def test_oblique_slices_cross_the_array():
    """A plane is a plane for any slices, inside: its gradient along the slices' normal survives."""
    rotation = torch.tensor(Rotation.from_euler("x", 15, degrees=True).as_matrix(), dtype=torch.float32)
    grid = ScanGrid((24, 24, 24), (1.0, 1.0, 3.0), rotation=rotation)
    plane = ramp((24, 24, 24))
    scan = grid.average(plane)
    inner = (slice(9, 15),) * 3
    assert torch.allclose(grid.interpolate(scan)[inner], plane[inner], atol=1e-3)
    # From one scan slice to the next, z grows by 3 cos 15 degrees; along the scan's y axis by sin 15 degrees.
    middle = grid.size[2] // 2
    assert (scan[12, 12, middle] - scan[12, 12, middle - 1]).item() == pytest.approx(2.898, abs=0.02)
    assert (scan[12, 13, middle] - scan[12, 12, middle]).item() == pytest.approx(0.2588, abs=0.02)
