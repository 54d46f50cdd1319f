"""Multi-input attention U-Net (Zhao et al.): 2D, gated skips, deep supervision; 3D U-Nets that Kim et al. compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.networks.plain_unet import crop_like, max_pool, pad_to_even


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class AttentionGate(nn.Module):
    """Attention gate (Fig. 3B): scale a skip connection by a signal from the coarser level of the decoder."""

    def __init__(self, features: int, gate: int) -> None:
        super().__init__()
        self.to_gate = nn.Conv2d(features, gate, 1)
        self.score = nn.Conv2d(gate, 1, 1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Scale a skip (B, C, X, Z) by a gate of half its size."""
        # Every second voxel, instead of a stride of the convolution: PyTorch 2.14 crashes in the gradient of a strided
        # 1×1 convolution in channels-last order on processors without AVX-512.
        both = functional.relu(self.to_gate(x[:, :, ::2, ::2]) + gate)
        score = torch.sigmoid(self.score(both))
        return x * functional.interpolate(score, size=x.shape[2:], mode="bilinear", align_corners=False)


class AttentionUNet25D(nn.Module):
    """U-Net that predicts the middle one of a few adjacent slices.

    Parameters
    ----------
    input_channels : int
        Input channels per slice.
    num_classes : int
        Output channels including background: 4 for red nucleus, substantia nigra, subthalamic nucleus.
    deep_supervision : bool
        Return logits at 1, 1/2 and 1/4, full resolution first.
    slices : int
        Adjacent slices in the input, channels of the first slice first.
    features : sequence of int
        Filters per stage, top first, each twice the one before; the last is below the last pooling.
    scales : int
        Number of supervised scales.
    attention : bool
        Whether skips pass attention gates; False is the ablation of the paper.

    Notes
    -----
    Choices per section of the paper [1]_ ("silent": not stated there; taken from the published code if available):

    ==================  ===========================================  =======================================
    Section             Paper                                        Here
    ==================  ===========================================  =======================================
    Preprocessing       three consecutive images, truth of the       ``slices`` as channels
                        middle one
    Preprocessing       128×128 (source), 96×96 (target)             any size: pooling rounds up, enlarging
                                                                     cuts
    Architecture,       U-Net, four downsampling and upsampling      max-pooling; 2×2 transposed convolution,
    Fig. 3A             stages                                       stride 2 (silent); (3×3 convolution, batch
                                                                     normalization, ReLU) twice (silent);
                                                                     filters 16 to 256 (silent)
    Architecture        image downsampled 2, 4 and 8 times is put    max-pooled (silent), two convolutions, set
                        in too                                       beside the pooled features; each gives
                                                                     half of the stage's channels (silent)
    Fig. 3B             gate: 1×1 convolution of stride 2 on the     ``AttentionGate``: to the gate's
                        skip, as large as the gate signal; added     channels, added, ReLU, 1×1, sigmoid,
                        to it; 1×1 convolutions, ReLU, sigmoid,      bilinear (silent), times the skip;
                        up-sampling; input times coefficient         paper mentions two 1×1 convolutions: the
                                                                     strided one counts as the first
    Fig. 3B             gate signal from a lower scale               the decoder's features one grid below
    Architecture        deeply supervised                            ``heads`` at 1, 1/2, 1/4, each with all
                                                                     classes
    Description         transfer without the output layers           everything but ``heads.*`` transfers
    Comparison          without attention gates                      ``attention=False``
    Comparison          encoder with ImageNet's ResNet50             `ResNet50AttentionUNet25D`
    Evaluation          probabilities                                softmax over background and nuclei
                                                                     (silent); belongs to loss and predictor
    ==================  ===========================================  =======================================

    Default initialization of torch, no dropout (both silent).

    References
    ----------
    .. [1] Zhao W, et al. Automated segmentation of midbrain structures in high-resolution susceptibility maps
       based on convolutional neural network and transfer learning. Front Neurosci 16 (2022) 801618.
       doi:10.3389/fnins.2022.801618
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        slices: int = 3,
        features: Sequence[int] = (16, 32, 64, 128, 256),
        scales: int = 3,
        attention: bool = True,
    ) -> None:
        super().__init__()
        *upper, bottom = features
        self.deep_supervision = deep_supervision
        inputs = input_channels * slices
        self.image = nn.ModuleList(
            _two_convolutions(inputs, outputs) for outputs in (upper[0], *(width // 2 for width in upper[1:]))
        )
        self.down = nn.ModuleList(_two_convolutions(width, width) for width in upper[1:])
        self.bottom = _two_convolutions(upper[-1], bottom)
        steps = list(pairwise(reversed(features)))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, 2) for low, high in steps)
        self.gates = nn.ModuleList(AttentionGate(high, low) for low, high in steps if attention)
        self.up = nn.ModuleList(_two_convolutions(2 * high, high) for _, high in steps)
        # Heads exist in both modes, so that the same weights load in both.
        self.heads = nn.ModuleList(nn.Conv2d(high, num_classes, 1) for high in reversed(upper[:scales]))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Z) of (B, C · slices, X, Z); with deep supervision a list, largest first."""
        skips = [self.image[0](x)]
        for image, down in zip(self.image[1:], self.down, strict=True):
            x = max_pool(x, 2)
            skips.append(down(torch.cat((image(x), max_pool(skips[-1], 2)), dim=1)))
        features = self.bottom(max_pool(skips[-1], 2))
        logits = []
        for stage, (enlarge, up) in enumerate(zip(self.enlarge, self.up, strict=True)):
            skip = skips.pop()
            attended = self.gates[stage](skip, features) if len(self.gates) else skip
            features = up(torch.cat((attended, crop_like(enlarge(features), skip)), dim=1))
            head = stage - len(self.up) + len(self.heads)
            if head >= 0 and (self.deep_supervision or not skips):
                logits.append(self.heads[head](features))
        return logits[::-1] if self.deep_supervision else logits[-1]


class _Bottleneck(nn.Module):
    """Residual block of ResNet-50, with the names of the published weights."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        inner = functional.relu(self.bn2(self.conv2(inner)))
        return functional.relu(self.bn3(self.conv3(inner)) + self.downsample(x))


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


class _ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016) without classifier; returns the features at 1/2, 1/4, 1/8, 1/16 and 1/32."""

    widths = (64, 256, 512, 1024, 2048)

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1, self.layer2 = _stage(64, 64, 3, 1), _stage(256, 128, 4, 2)
        self.layer3, self.layer4 = _stage(512, 256, 6, 2), _stage(1024, 512, 3, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [functional.relu(self.bn1(self.conv1(x)))]
        x = functional.max_pool2d(features[0], 3, 2, 1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class ResNet50AttentionUNet25D(nn.Module):
    """Comparison in the paper: attention U-Net with a ResNet-50 encoder pretrained on ImageNet.

    Parameters
    ----------
    input_channels, num_classes, deep_supervision, slices
        See `AttentionUNet25D`.
    features : sequence of 5 int
        Filters per stage of the decoder, top first.

    Notes
    -----
    The paper names the encoder alone. Here the decoder has the filters of the other network, the skips are
    the encoder's features at 1/2 to 1/16, each through an attention gate, the full resolution has no skip, and
    the image enters once. Three slices are the three channels that the published weights expect.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        slices: int = 3,
        features: Sequence[int] = (16, 32, 64, 128, 256),
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.encoder = _ResNet50(input_channels * slices)
        *skips, bottom = _ResNet50.widths
        widths = list(reversed(features))
        self.gates, self.enlarge, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for skip, low, width in zip([*reversed(skips), 0], [bottom, *widths], widths, strict=False):
            if skip:
                self.gates.append(AttentionGate(skip, low))
            self.enlarge.append(nn.ConvTranspose2d(low, width, 2, 2))
            self.up.append(_two_convolutions(width + skip, width))
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths[-3:])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Z) of (B, C · slices, X, Z); with deep supervision a list, largest first."""
        *skips, features = self.encoder(x)
        decoded = []
        for gate, enlarge, up in zip(self.gates, self.enlarge, self.up, strict=False):
            skip = skips.pop()
            features = up(torch.cat((gate(skip, features), crop_like(enlarge(features), skip)), dim=1))
            decoded.append(features)
        decoded.append(self.up[-1](crop_like(self.enlarge[-1](features), x)))
        if not self.deep_supervision:
            return self.heads[-1](decoded[-1])
        return [head(part) for head, part in zip(self.heads, decoded[-3:], strict=True)][::-1]

    def load_imagenet(self, state: Mapping[str, Tensor]) -> None:
        """Load published ResNet-50 weights, with the names of torchvision and timm.

        Parameters
        ----------
        state : mapping of str to Tensor
            From a safetensors file; the classifier ``fc`` is ignored.

        Raises
        ------
        RuntimeError
            If the weights belong to another network.
        """
        self.encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})


class _GridGate(nn.Module):
    """Attention gate of Schlemper et al. in 3D, on the grid of the gate signal, with a convolution after it."""

    def __init__(self, features: int, gate: int) -> None:
        super().__init__()
        self.signal = nn.Sequential(nn.Conv3d(gate, features, 1), nn.BatchNorm3d(features), nn.ReLU(inplace=True))
        self.skip = nn.Conv3d(features, features, 2, 2, bias=False)
        self.gate = nn.Conv3d(features, features, 1)
        self.score = nn.Conv3d(features, 1, 1)
        self.after = nn.Sequential(nn.Conv3d(features, features, 1), nn.BatchNorm3d(features))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        both = functional.relu(self.skip(pad_to_even(x)) + self.gate(self.signal(gate)))
        score = torch.sigmoid(self.score(both))
        enlarged = functional.interpolate(score, size=x.shape[2:], mode="trilinear", align_corners=False)
        return self.after(x * enlarged)


def _two_convolutions_3d(inputs: int, outputs: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for width in (inputs, outputs):
        parts += [nn.Conv3d(width, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class UNet3D(nn.Module):
    """U-Net and attention U-Net in 3D, as Kim et al. compare them with DCN-Net (Tables I, V and S-II).

    Parameters
    ----------
    input_channels, num_classes : int
        Channels of input and output.
    deep_supervision : bool
        Return a list; with one tensor.
    features : sequence of int
        Filters per stage, top first.
    attention : bool
        Whether skips pass attention gates [1]_.

    Notes
    -----
    Two 3³ convolutions with batch normalization and ReLU per stage, max-pooling, 2³ transposed convolutions. 5,602,595
    parameters for three classes, and 5,862,438 with gates; the paper prints 5,605k and 5,862k.

    References
    ----------
    .. [1] Schlemper J, et al. Attention gated networks: learning to leverage salient regions in medical images. Med
       Image Anal 53 (2019) 197-207. doi:10.1016/j.media.2019.01.012
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        features: Sequence[int] = (32, 64, 128, 256),
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.down = nn.ModuleList(_two_convolutions_3d(*pair) for pair in pairwise((input_channels, *features)))
        steps = list(pairwise(reversed(features)))
        self.enlarge = nn.ModuleList(nn.ConvTranspose3d(low, high, 2, 2) for low, high in steps)
        self.gates = nn.ModuleList(_GridGate(high, low) for low, high in steps if attention)
        self.up = nn.ModuleList(_two_convolutions_3d(2 * high, high) for _, high in steps)
        self.head = nn.Conv3d(features[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Y, Z) of (B, C, X, Y, Z)."""
        skips = [self.down[0](x)]
        for down in self.down[1:]:
            skips.append(down(max_pool(skips[-1], 2)))
        features = skips.pop()
        for stage, (enlarge, up) in enumerate(zip(self.enlarge, self.up, strict=True)):
            skip = skips.pop()
            attended = self.gates[stage](skip, features) if len(self.gates) else skip
            features = up(torch.cat((crop_like(enlarge(features), skip), attended), dim=1))
        logits = self.head(features)
        return [logits] if self.deep_supervision else logits
