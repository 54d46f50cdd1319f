"""DCN-Net (Kim et al.): dilated dense blocks, attended skips, one softmax head per nucleus; its dense competitors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.networks.plain_unet import crop_like, max_pool

_EPSILON = 1.1e-5

_DILATIONS = ((1, 1, 2), (1, 1, 2, 4), (1, 1, 2, 4, 8))


class Attended(NamedTuple):
    """Output of DCN-Net in training mode."""

    logits: Tensor | list[Tensor]
    auxiliary: Tensor
    """Logits (B, 2, X, Y, Z) of the attention map: background, any nucleus."""


class _DenseLayer(nn.Module):
    """Batch normalization, ELU, 3³ convolution, dropout."""

    def __init__(self, inputs: int, outputs: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(inputs, _EPSILON)
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(functional.elu(self.norm(x))))


class _DenseBlock(nn.Module):
    """Dense block; returns input and new features together, and the new features alone."""

    def __init__(self, inputs: int, growth: int, dilations: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.inputs = inputs
        self.added = growth * len(dilations)
        self.layers = nn.ModuleList(
            _DenseLayer(inputs + growth * place, growth, dilation=dilation, dropout=dropout)
            for place, dilation in enumerate(dilations)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = torch.cat((x, layer(x)), dim=1)
        return x, x[:, self.inputs :]


class _PyramidInput(nn.Module):
    """3³ convolution, batch normalization and ELU on a downsampled input, concatenated with the features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(outputs, _EPSILON)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return torch.cat((features, functional.elu(self.norm(self.conv(image)))), dim=1)


class SkipAttention(nn.Module):
    """Attention scores from 0 to 1 for a skip connection (Fig. 2b)."""

    def __init__(self, skip: int, gate: int, features: int) -> None:
        super().__init__()
        self.skip = nn.Conv3d(skip, features, 1, bias=False)
        self.gate = nn.Conv3d(gate, features, 1, bias=False)
        self.squeeze = nn.Conv3d(features, 1, 1, bias=False)
        self.score = nn.Conv3d(3, 1, 1)

    def forward(self, skip: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled skip, with the channels of the gate, and the scores (B, 1, X, Y, Z)."""
        skip = self.skip(skip)
        both = skip + _enlarge(self.gate(gate), 2, skip)
        where = torch.cat((both.mean(1, keepdim=True), both.amax(1, keepdim=True), self.squeeze(both)), dim=1)
        score = torch.sigmoid(self.score(functional.elu(where)))
        return skip * score, score


class _PlainSkip(nn.Module):
    """1³ convolution of a skip connection to the channels of the gate, instead of `SkipAttention` (Table III)."""

    def __init__(self, skip: int, gate: int, features: int) -> None:
        super().__init__()
        self.skip = nn.Conv3d(skip, features, 1, bias=False)

    def forward(self, skip: Tensor, gate: Tensor) -> tuple[Tensor, None]:
        return self.skip(skip), None


def _enlarge(x: Tensor, factor: int, reference: Tensor) -> Tensor:
    """Upsample by nearest neighbour and crop to the grid of a reference."""
    return crop_like(functional.interpolate(x, scale_factor=float(factor), mode="nearest"), reference)


class DenseNetwork(nn.Module):
    """Networks of dense blocks: the first convolution, initialization and weight decay."""

    def __init__(self, input_channels: int, initial_features: int, *, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.first = nn.Conv3d(input_channels, initial_features, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm3d(initial_features, _EPSILON)

    def first_features(self, x: Tensor) -> Tensor:
        """Return the features of the first convolution."""
        return functional.elu(self.first_norm(self.first(x)))

    def initialize(self) -> None:
        """Draw He's initial weights; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def decayed_weights(self) -> Iterator[Tensor]:
        """Yield the weights to which the published code applies weight decay (L2, 1e-4).

        These are the first, pyramid and transposed convolutions and the four 1³ convolutions of each attended skip;
        not the dense layers, the heads, the 1³ convolution that joins the scores, nor any bias.
        """
        yield self.first.weight
        for module in self.modules():
            if isinstance(module, _PyramidInput):
                yield module.conv.weight
            elif isinstance(module, nn.ConvTranspose3d):
                yield module.weight
            elif isinstance(module, SkipAttention):
                yield from (part.weight for part in (module.skip, module.gate, module.squeeze, module.score))
            elif isinstance(module, _PlainSkip):
                yield module.skip.weight


class DCNNet(DenseNetwork):
    """FC-Dense ContextNet with attention on skips and independent probabilities per label.

    Parameters
    ----------
    input_channels : int
        Input channels.
    num_classes : int
        Background and nuclei: 3 for dentate and interposed.
    deep_supervision : bool
        Return a list; with one tensor, because the paper supervises the full resolution only.
    initial_features : int
        Filters of the first convolution.
    growth : int
        Filters added by every layer of a dense block.
    dilations : sequence of sequence of int
        Dilation of each layer of each block of the encoder.
    bottleneck_layers : int
        Layers of the block at the lowest resolution.
    dropout : float
        Dropout probability of dense layers.
    independent : bool
        One softmax over background and nucleus for each nucleus; otherwise one over all classes (Table II).
    attention : bool
        Attention modules in the skips; otherwise each has a 1³ convolution to the gate's channels (Table III).

    Notes
    -----
    Logits have 2 · (num_classes − 1) channels: background and nucleus 1, background and nucleus 2, …;
    `split_heads` separates them. With ``independent=False`` there are num_classes channels.

    In training mode the result is `Attended`, whose second part is supervised with the union of the nuclei; without
    attention there is no such part, and the logits are returned in both modes.

    Choices per section of the paper [1]_ ("silent": not stated there; taken from the published code if available):

    ==================  ===========================================  =======================================
    Section             Paper                                        Here
    ==================  ===========================================  =======================================
    II.A, Fig. 2a       3, 4, 5 layers in the dilated dense blocks,  ``dilations``, ``growth``; 16 filters
                        dilations (1,1,2), (1,1,2,4), (1,1,2,4,8),   before them (silent)
                        channels grow by 8
    II.A, Fig. 3a       encoder of dilated dense blocks only, no     every block at full resolution
                        transition down
    II.A                max-pooling in the skips, features at        skips pooled by 1, 2, 4, the bottleneck's
                        different scales into the decoder            input by 8
    II.A, Fig. 2a       pyramid of the input patch set beside the    max-pooled by 2, 4, 8 (silent); as many
                        max-pooled features                          filters as features (silent)
    II.A, ref. 24       decoder of FC-DenseNet                       6 layers, then 5, 4, 3; only what a block
                                                                     adds is enlarged; transposed 3³
                                                                     convolution, stride 2, ELU
    Fig. 2b             convolution layer                            batch normalization (ε 1.1e-5), ELU, 3³
                                                                     convolution without bias, dropout 0.2
    II.B, eq. 1         background/dentate and                       a 1³ convolution each (``heads``); their
                        background/interposed, softmax each          softmax belongs to loss and predictor
    II.C, Fig. 2b       skip to the gate's channels by 1³; gate      ``SkipAttention``: nearest neighbour, sum;
                        enlarged; channel mean, max, squeeze;        the gate passes a 1³ convolution too
                        ELU, 1³ convolution, sigmoid; skip scaled    (silent); the scaled skip has its channels
    IV.F, Table III     without attention module                     ``attention=False``: the 1³ convolution of the
                                                                     skip alone (silent)
    II.C, Fig. 2a       scores of all skips concatenated, 1³         enlarged to the input's grid; ``attention``
                        convolution, softmax of two classes          gives the logits
    III.B, ref. 56      He's initialization                          normal, variance 2 / fan-in; biases 0
    III.B               patches of 32³, output as large              any size: pooling rounds up, enlarging cuts
    Table I             890k trainable parameters                    890,940 with the defaults
    ==================  ===========================================  =======================================

    References
    ----------
    .. [1] Kim J, et al. Deep cerebellar nuclei segmentation via semi-supervised deep context-aware learning
       from 7T diffusion MRI. IEEE Access 8 (2020) 101550-101568. doi:10.1109/ACCESS.2020.2998537
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        initial_features: int = 16,
        growth: int = 8,
        dilations: Sequence[Sequence[int]] = _DILATIONS,
        bottleneck_layers: int = 6,
        dropout: float = 0.2,
        independent: bool = True,
        attention: bool = True,
    ) -> None:
        super().__init__(input_channels, initial_features, deep_supervision=deep_supervision)
        self.down = nn.ModuleList()
        features = initial_features
        skips = []
        for place, rates in enumerate(dilations):
            self.down.append(_DenseBlock(features, growth, rates, dropout))
            features += growth * len(rates)
            skips.append(features if place == 0 else 2 * features)  # below the top the pyramid doubles them
        pooled = [*skips[1:], 2 * features]
        self.pyramid = nn.ModuleList(_PyramidInput(input_channels, total // 2) for total in pooled)
        self.bottleneck = _DenseBlock(2 * features, growth, [1] * bottleneck_layers, dropout)
        self.enlarge, self.attend, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        gate = self.bottleneck.added
        for skip, rates in zip(reversed(skips), reversed(dilations), strict=True):
            self.enlarge.append(nn.ConvTranspose3d(gate, gate, 3, 2, padding=1, output_padding=1))
            self.attend.append((SkipAttention if attention else _PlainSkip)(skip, gate, gate))
            self.up.append(_DenseBlock(2 * gate, growth, [1] * len(rates), dropout))
            last, gate = 2 * gate, growth * len(rates)
        outputs = [2] * (num_classes - 1) if independent else [num_classes]
        self.heads = nn.ModuleList(nn.Conv3d(last + gate, count, 1, bias=False) for count in outputs)
        self.attention = nn.Conv3d(len(skips), 2, 1) if attention else None
        self.initialize()

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | Attended:
        """Return logits (B, 2 · nuclei, X, Y, Z) of (B, C, X, Y, Z); in training mode `Attended`."""

        def with_input(features: Tensor, level: int) -> Tensor:
            """Max-pool features and concatenate the input at the same resolution."""
            return self.pyramid[level - 1](max_pool(x, 2**level), max_pool(features, 2**level))

        features, skips = self.first_features(x), []
        for level, block in enumerate(self.down):
            features, _ = block(features)
            skips.append(with_input(features, level) if level else features)
        features, new = self.bottleneck(with_input(features, len(self.down)))
        scores = []
        for enlarge, attend, up in zip(self.enlarge, self.attend, self.up, strict=True):
            skip, score = attend(skips.pop(), new)
            if score is not None:
                scores.append(_enlarge(score, 2 ** len(skips), x))
            features, new = up(torch.cat((crop_like(functional.elu(enlarge(new)), skip), skip), dim=1))
        heads = torch.cat([head(features) for head in self.heads], dim=1)
        logits = [heads] if self.deep_supervision else heads
        if self.attention is None or not self.training:
            return logits
        return Attended(logits, self.attention(torch.cat(scores, dim=1)))


class FCDenseNet(DenseNetwork):
    """FC-DenseNet (Tables I, S-II and S-V): dense blocks between transitions down and up, one softmax.

    Parameters
    ----------
    input_channels, num_classes, deep_supervision, initial_features, growth, bottleneck_layers, dropout
        As of `DCNNet`.
    layers : sequence of int
        Layers of each block of the encoder.

    Notes
    -----
    Jegou et al. [1]_ in 3D, with the layers, growth and activations of `DCNNet`. Transitions down are batch
    normalization, ELU, a 1³ convolution, dropout and max-pooling; transitions up are 2³ transposed convolutions of the
    new features alone. 741,976 parameters for three classes; the paper prints 742k.

    References
    ----------
    .. [1] Jegou S, et al. The one hundred layers tiramisu: fully convolutional DenseNets for semantic segmentation.
       CVPR Workshops (2017) 11-19. doi:10.1109/CVPRW.2017.156
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        initial_features: int = 16,
        growth: int = 8,
        layers: Sequence[int] = (3, 4, 5),
        bottleneck_layers: int = 6,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(input_channels, initial_features, deep_supervision=deep_supervision)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        features, skips = initial_features, []
        for count in layers:
            self.down.append(_DenseBlock(features, growth, [1] * count, dropout))
            features += growth * count
            skips.append(features)
            parts = (nn.BatchNorm3d(features, _EPSILON), nn.ELU(), nn.Conv3d(features, features, 1, bias=False))
            self.shrink.append(nn.Sequential(*parts, nn.Dropout(dropout)))
        self.bottleneck = _DenseBlock(features, growth, [1] * bottleneck_layers, dropout)
        self.enlarge, self.up = nn.ModuleList(), nn.ModuleList()
        new = self.bottleneck.added
        for skip, count in zip(reversed(skips), reversed(layers), strict=True):
            self.enlarge.append(nn.ConvTranspose3d(new, new, 2, 2))
            self.up.append(_DenseBlock(new + skip, growth, [1] * count, dropout))
            features, new = new + skip + growth * count, growth * count
        self.head = nn.Conv3d(features, num_classes, 1, bias=False)
        self.initialize()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Y, Z) of (B, C, X, Y, Z)."""
        features, skips = self.first_features(x), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(block(features)[0])
            features = max_pool(shrink(skips[-1]), 2)
        features, new = self.bottleneck(features)
        for enlarge, up in zip(self.enlarge, self.up, strict=True):
            skip = skips.pop()
            features, new = up(torch.cat((crop_like(enlarge(new), skip), skip), dim=1))
        logits = self.head(features)
        return [logits] if self.deep_supervision else logits


class DilatedDenseNet(DenseNetwork):
    """Dilated DenseNet (Table S-V): the encoder of `DCNNet` alone, at full resolution, and one softmax; see there."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        initial_features: int = 16,
        growth: int = 8,
        dilations: Sequence[Sequence[int]] = _DILATIONS,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(input_channels, initial_features, deep_supervision=deep_supervision)
        self.down, features = nn.ModuleList(), initial_features
        for rates in dilations:
            self.down.append(_DenseBlock(features, growth, rates, dropout))
            features += growth * len(rates)
        self.head = nn.Conv3d(features, num_classes, 1, bias=False)
        self.initialize()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, classes, X, Y, Z) of (B, C, X, Y, Z)."""
        features = self.first_features(x)
        for block in self.down:
            features, _ = block(features)
        logits = self.head(features)
        return [logits] if self.deep_supervision else logits


def split_heads(logits: Tensor) -> tuple[Tensor, ...]:
    """Separate the logits of the independent heads.

    Parameters
    ----------
    logits : Tensor of shape (B, 2 · nuclei, X, Y, Z)
        Output of `DCNNet`.

    Returns
    -------
    tuple of Tensor of shape (B, 2, X, Y, Z)
        One per nucleus: background, nucleus.
    """
    return tuple(logits[:, start : start + 2] for start in range(0, logits.shape[1], 2))
