import math

import pytest
import torch

from bids_dgmseg.train.calibration import fit_shifts, volume_errors


def slope(n: int, width: int, lack: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a nucleus of `width` of `n` voxels that fall by 0.1 a voxel and lack a constant."""
    place = torch.arange(n)
    logits = torch.zeros(n, 2)
    logits[:, 1] = 0.1 * (width - 0.5 - place) - lack
    return logits, (place < width).long()


def test_volume_errors_are_the_median_of_the_maps_that_show_a_nucleus():
    maps = [slope(200, width, lack) for width, lack in ((100, 1.0), (50, 1.0), (100, 5.0))]  # 90, 40 and 50 voxels
    maps.append((torch.tensor([[0.0, 9.0]]), torch.tensor([0])))  # shows none
    assert volume_errors(maps, [[1]], torch.zeros(2)) == pytest.approx([-0.2])


def test_a_nucleus_that_no_map_shows_has_no_error():
    assert volume_errors([(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))], [[1]], torch.zeros(2)) == [0.0]


@pytest.mark.parametrize("lack", [-1.2, 0.7, 1.3])
def test_what_logits_lack_is_found(lack):
    shifts = fit_shifts([slope(400, width, lack) for width in (80, 90, 100, 110, 120)], [[1]])
    assert shifts[0] == 0
    assert float(shifts[1]) == pytest.approx(lack, abs=0.05)  # half a voxel


def test_both_sides_share_what_their_joint_volume_lacks():
    left, right = slope(400, 100, 1.0), slope(400, 100)
    logits = torch.cat([torch.nn.functional.pad(left[0], (0, 1), value=-99.0), right[0][:, [0, 1, 1]]])
    logits[400:, 1] = -99.0
    shifts = fit_shifts([(logits, torch.cat([left[1], 2 * right[1]]))], [[1, 2]])
    assert shifts[1] == shifts[2]
    assert float(shifts[1]) == pytest.approx(0.5, abs=0.05)


def test_a_nucleus_that_is_missed_is_not_shifted_without_limit():
    logits, labels = slope(200, 50, 40.0)
    assert math.isclose(float(fit_shifts([(logits, labels)], [[1]])[1]), 1.5)
