"""Small U-Net of ``dgm16``, and pooling and cropping on grids of any size, which the papers' networks share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def max_pool(x: Tensor, factor: int) -> Tensor:
    """Max-pool (B, C, X, Z) or (B, C, X, Y, Z); an incomplete group at the end of an axis counts too.

    Sizes are rounded up, so that pooling twice by 2 equals pooling by 4 for every size.
    """
    pool = functional.max_pool2d if x.ndim == 4 else functional.max_pool3d
    with torch.autocast(x.device.type, enabled=False):  # autocast would convert x to float32 first
        pooled: Tensor = pool(x, factor, ceil_mode=True)
    return pooled


def crop_like(x: Tensor, reference: Tensor) -> Tensor:
    """Crop the ends of `x` (B, C, ...), upsampled from a grid that was rounded up, to the grid of a reference."""
    for axis in range(2, x.ndim):
        x = x.narrow(axis, 0, reference.shape[axis])
    return x


def pad_to_even(x: Tensor) -> Tensor:
    """Pad axes of odd size by repeating the last value."""
    width, depth, height = x.shape[2:]
    return functional.pad(x, (0, height % 2, 0, depth % 2, 0, width % 2), mode="replicate")


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class PlainUNet(nn.Module):
    """U-Net with two convolutions per stage, the first of them strided below the top.

    Parameters
    ----------
    input_channels : int
        Input channels.
    num_classes : int
        Output channels including background.
    deep_supervision : bool
        Whether to return the logits of every scale, full resolution first.
    features : sequence of int
        Filters per stage, top first.

    Notes
    -----
    The decoder has two convolutions per stage but only one at the top, where a second would double the time.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        features: Sequence[int] = (12, 24, 48, 96, 128),
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(inputs, outputs, 1 if stage == 0 else 2), _convolution(outputs, outputs))
            for stage, (inputs, outputs) in enumerate(pairwise((input_channels, *features)))
        )
        steps = list(pairwise(reversed(features)))
        self.enlarge = nn.ModuleList(nn.ConvTranspose3d(low, skip, 2, 2) for low, skip in steps)
        self.up = nn.ModuleList(
            nn.Sequential(*(_convolution(2 * skip if part == 0 else skip, skip) for part in range(parts)))
            for (_, skip), parts in zip(steps, [2] * (len(steps) - 1) + [1], strict=True)
        )
        # Heads exist in both modes, so that the same weights load in both.
        self.heads = nn.ModuleList(nn.Conv3d(skip, num_classes, 1) for _, skip in steps)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Y, Z) of (B, C, X, Y, Z); with deep supervision a list, largest first."""
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        skips.pop()
        logits = []
        for enlarge, stage, head in zip(self.enlarge, self.up, self.heads, strict=True):
            skip = skips.pop()
            # A strided convolution rounds odd sizes up, so the upsampled grid can be one voxel too long.
            x = stage(torch.cat((crop_like(enlarge(x), skip), skip), dim=1))
            if self.deep_supervision or not skips:
                logits.append(head(x))
        return logits[::-1] if self.deep_supervision else logits[-1]

    @torch.no_grad()
    def shift_logits(self, by: Tensor) -> None:
        """Add a constant per class (background first) to the logits at full resolution, permanently."""
        bias = self.get_parameter(f"heads.{len(self.heads) - 1}.bias")
        bias.add_(by.to(bias.device))
