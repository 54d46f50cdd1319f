"""DeepQSMSeg (Guan et al.): residual encoder and decoder with 5×5×3 convolutions and attention; V-Net."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bids_dgmseg.networks.plain_unet import crop_like, pad_to_even


class _Residual(nn.Module):
    """Residual block of 5×5×3 (or 5³) convolutions; a 1³ convolution adapts the input if widths differ."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, depth: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for block in range(blocks):
            seen = inputs if block == 0 else outputs
            # Normalization removes the mean, and with it any bias. That of instances would make all channels' means
            # alike, which leaves the channel attention little to see.
            parts.append(nn.Conv3d(seen, outputs, (5, 5, depth), padding=(2, 2, depth // 2), bias=False))
            parts += [nn.BatchNorm3d(outputs), nn.PReLU(outputs)]
        self.last = parts.pop()  # the last activation comes after the sum
        self.body = nn.Sequential(*parts)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.shortcut(x))


class ChannelAttention(nn.Module):
    """Channel attention: weights from two layers applied to mean and maximum over the volume."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        hidden = max(features // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of a volume (B, C, X, Y, Z)."""
        weight = torch.sigmoid(self.mlp(x.mean((2, 3, 4))) + self.mlp(x.amax((2, 3, 4))))
        return x * weight[:, :, None, None, None]


class VoxelAttention(nn.Module):
    """Voxel attention: weights from a 1³ convolution of mean and maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv3d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each voxel of a volume (B, C, X, Y, Z)."""
        where = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)
        return x * torch.sigmoid(self.score(where))


class ResidualUNet(nn.Module):
    """Encoder and decoder of residual modules, of which subclasses create all but the first."""

    down: nn.ModuleList
    enlarge: nn.ModuleList
    up: nn.ModuleList
    last: nn.Module
    head: nn.Module

    def __init__(self, first: _Residual, features: Sequence[int], *, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision, self.first = deep_supervision, first
        self.shrink = nn.ModuleList(nn.Conv3d(high, low, 2, 2) for high, low in pairwise(features))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Y, Z) of (B, C, X, Y, Z)."""
        x = self.first(x)
        skips = []
        for shrink, down in zip(self.shrink, self.down, strict=True):
            skips.append(x)
            x = down(shrink(pad_to_even(x)))
        for enlarge, up in zip(self.enlarge, self.up, strict=True):
            skip = skips.pop()
            x = up(torch.cat((crop_like(enlarge(x), skip), skip), dim=1))
        logits = self.head(self.last(x))
        return [logits] if self.deep_supervision else logits


class DeepQSMSeg(ResidualUNet):
    """Residual U-shaped network for volumes with thick slices.

    Parameters
    ----------
    input_channels : int
        Input channels.
    num_classes : int
        Output channels, background included: 11 for five nuclei on two sides.
    deep_supervision : bool
        Return a list; with one tensor, because the paper supervises the full resolution only.
    features : sequence of int
        Filters of the input module and of each module of the encoder.
    blocks : sequence of int
        5×5×3 convolutions of each of these; the decoder has the same.
    attended : int
        Stages with attention: the last of the encoder and the first of the decoder.
    reduction : int
        Reduction factor of the hidden layer of the channel attention.

    Notes
    -----
    Choices per section of the paper [1]_; there is no published code, so "silent" means a choice of this project:

    ==================  ===========================================  =======================================
    Section             Paper                                        Here
    ==================  ===========================================  =======================================
    II.B, Fig. 1a       input module and four feature extraction     ``first``, ``down``
                        modules
    II.B                one to three 5×5×3 convolution blocks per    ``blocks`` 1, 2, 3, 3, 3 as V-Net, the
                        module, residual structure                   baseline (silent); the module's input is
                                                                     added before the last activation
                                                                     (silent); third axis slices
    II.B                between modules convolutions (2×2×2) of      ``shrink``; 16 to 256 filters as V-Net
                        stride two halve size, double channels       (silent)
    II.B                four feature reconstruction modules and      ``up``, ``last``; mirrored ``blocks``;
                        one output module, symmetric to the          the output module has one block and a 1³
                        encoder; blocks similar                      convolution (silent)
    II.B                transposed convolutions double size,         ``enlarge``, 2×2×2, stride two, halve the
                        decrease channels                            channels (silent)
    II.B                skip connections                             concatenated (silent); the skip of an
                                                                     attended stage is attended
    II.B                softmax, 11 channels, resolution of the      ``head``; softmax belongs to loss and
                        input                                        predictor
    II.B                attention in the last two encoder and the    ``attended``; E3, E4, D1, D2
                        first two decoder stages
    II.B                encoder: takes the stage's output;           after the module's blocks in both
                        decoder: convolution blocks first
    Fig. 1b, ref. 9     channel-wise, then voxel-wise attention      in this order
    II.B                global max and average pooling, multilayer   shared by both poolings, summed, sigmoid,
                        perceptron                                   hidden width 1/16: CBAM's (silent)
    II.B                average and maximum over channels, 1×1×1     concatenated, sigmoid
                        convolution
    II.D                patches of 128×128×64                        any size: an odd one is padded with its
                                                                     last value before it is halved
    ==================  ===========================================  =======================================

    References
    ----------
    .. [1] Guan Y, et al. DeepQSMSeg: a deep learning-based sub-cortical nucleus segmentation tool for
       quantitative susceptibility mapping. Annu Int Conf IEEE Eng Med Biol Soc (2021). PMID 34892034
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        features: Sequence[int] = (16, 32, 64, 128, 256),
        blocks: Sequence[int] = (1, 2, 3, 3, 3),
        attended: int = 2,
        reduction: int = 16,
    ) -> None:
        super().__init__(_Residual(input_channels, features[0], blocks[0]), features, deep_supervision=deep_supervision)

        def attention(width: int, *, wanted: bool) -> nn.Module:
            return nn.Sequential(ChannelAttention(width, reduction), VoxelAttention()) if wanted else nn.Identity()

        steps = list(pairwise(features))
        self.down = nn.ModuleList(
            nn.Sequential(_Residual(low, low, count), attention(low, wanted=place >= len(steps) - attended))
            for place, ((_, low), count) in enumerate(zip(steps, blocks[1:], strict=True))
        )
        self.enlarge = nn.ModuleList(nn.ConvTranspose3d(low, high, 2, 2) for high, low in reversed(steps))
        self.up = nn.ModuleList(
            nn.Sequential(_Residual(2 * high, high, count), attention(high, wanted=place < attended))
            for place, ((high, _), count) in enumerate(zip(reversed(steps), reversed(blocks[:-1]), strict=True))
        )
        self.last = _Residual(features[0], features[0], 1)
        self.head = nn.Conv3d(features[0], num_classes, 1)


class VNet(ResidualUNet):
    """V-Net (Milletari et al.), with which Guan et al. compare.

    Parameters
    ----------
    input_channels, num_classes, deep_supervision, features, blocks
        As of `DeepQSMSeg`.

    Notes
    -----
    5³ convolutions and no attention; a stage of the decoder keeps the width of the upsampled features and the skip
    together [1]_. Batch normalization is not in that paper; without it the recipe's learning rate would be too high.

    References
    ----------
    .. [1] Milletari F, et al. V-Net: fully convolutional neural networks for volumetric medical image segmentation.
       3DV (2016) 565-571. doi:10.1109/3DV.2016.79
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        features: Sequence[int] = (16, 32, 64, 128, 256),
        blocks: Sequence[int] = (1, 2, 3, 3, 3),
    ) -> None:
        first = _Residual(input_channels, features[0], blocks[0], depth=5)
        super().__init__(first, features, deep_supervision=deep_supervision)
        self.down = nn.ModuleList(
            _Residual(low, low, count, depth=5) for low, count in zip(features[1:], blocks[1:], strict=True)
        )
        self.enlarge, self.up = nn.ModuleList(), nn.ModuleList()
        below = features[-1]
        for high, count in zip(reversed(features[:-1]), reversed(blocks[:-1]), strict=True):
            self.enlarge.append(nn.ConvTranspose3d(below, high, 2, 2))
            below = 2 * high
            self.up.append(_Residual(below, below, count, depth=5))
        self.last = nn.Identity()
        self.head = nn.Conv3d(below, num_classes, 1)
