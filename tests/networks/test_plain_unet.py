import torch

from bids_dgmseg.networks.plain_unet import PlainUNet


def test_logit_shifts_are_permanent():
    torch.manual_seed(0)
    network, image = PlainUNet(1, 3, features=(4, 8, 12)).eval(), torch.randn(1, 1, 8, 8, 8)
    before = network(image)
    shifts = torch.tensor([0.0, 0.5, -2.0])
    network.shift_logits(shifts)
    torch.testing.assert_close(network(image), before + shifts.view(1, 3, 1, 1, 1))
