import torch

from bids_dgmseg.networks.plain_unet import PlainUNet, crop_like, max_pool
from bids_dgmseg.segmentation.inference import FastLayers


def test_logit_shifts_are_permanent():
    network, image = PlainUNet(1, 3, features=(4, 8, 12)).eval(), torch.randn(1, 1, 8, 8, 8)
    before = network(image)
    shifts = torch.tensor([0.0, 0.5, -2.0])
    network.shift_logits(shifts)
    torch.testing.assert_close(network(image), before + shifts.view(1, 3, 1, 1, 1))


def test_normalization_does_not_depend_on_the_batch():
    network = PlainUNet(1, 3, features=(4, 8, 8)).eval()
    two = torch.randn(2, 1, 17, 21, 12).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode(), FastLayers():
        torch.testing.assert_close(network(two[:1]), network(two)[:1])
    torch.testing.assert_close(network(two[:1]), network(two)[:1])


def test_incomplete_last_group_is_pooled():
    x = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 5)
    assert max_pool(x, 2).flatten().tolist() == [5, 3, 4]


def test_pooling_keeps_bfloat16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert max_pool(torch.zeros(1, 1, 4, 4, 4, dtype=torch.bfloat16), 2).dtype == torch.bfloat16


def test_cropping_keeps_the_start():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert crop_like(x, torch.zeros(1, 7, 2, 3)).tolist() == [[[[0, 1, 2], [4, 5, 6]]]]
