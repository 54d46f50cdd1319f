import numpy as np
import torch

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import LabelMap


def test_label_map_is_indexed_in_mm():
    array = np.zeros((3, 3, 3), np.uint8)
    array[2, 1, 0] = 7
    head = LabelMap.from_volume(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0])))
    points = torch.tensor([[4.0, 2.0, 0.0], [4.9, 2.9, 0.9], [5.1, 2.0, 0.0], [-20.0, 0.0, 0.0]])
    assert head.at(head.indices(points)).tolist() == [7, 7, 0, 0]
