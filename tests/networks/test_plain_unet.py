import torch

from bids_dgmseg.networks.plain_unet import PlainUNet


def test_logit_shifts_are_permanent():
    network, image = PlainUNet(1, 3, features=(4, 8, 12)).eval(), torch.randn(1, 1, 8, 8, 8)
    before = network(image)
    shifts = torch.tensor([0.0, 0.5, -2.0])
    network.shift_logits(shifts)
    torch.testing.assert_close(network(image), before + shifts.view(1, 3, 1, 1, 1))


def test_normalization_does_not_depend_on_the_batch():
    network = PlainUNet(1, 3, features=(4, 8, 8)).eval()
    two = torch.randn(2, 1, 17, 21, 12, generator=torch.Generator().manual_seed(0))
    two = two.to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        torch.testing.assert_close(network(two[:1]), network(two)[:1])
    torch.testing.assert_close(network(two[:1]), network(two)[:1])
