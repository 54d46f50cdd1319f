import pytest
import torch

from bids_dgmseg.networks.blocks import crop_like, max_pool


def test_incomplete_last_group_is_pooled():
    x = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 5)
    assert max_pool(x, 2).flatten().tolist() == [5, 3, 4]


@pytest.mark.parametrize("size", range(1, 10))
def test_pooling_twice_by_two_equals_four(size):
    x = torch.randn(1, 2, size, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(max_pool(max_pool(x, 2), 2), max_pool(x, 4))


def test_cropping_keeps_the_start():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert crop_like(x, torch.zeros(1, 7, 2, 3)).tolist() == [[[[0, 1, 2], [4, 5, 6]]]]


def test_pooling_keeps_bfloat16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert max_pool(torch.zeros(1, 1, 4, 4, 4, dtype=torch.bfloat16), 2).dtype == torch.bfloat16
