"""One labelled training sample: a head drawn, filled, degraded and seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.simulate.anatomy import (
    FIRST_TISSUE,
    HeadRanges,
    LabelMap,
    chance,
    draw_head_points,
    pick,
    smooth_noise,
    uniform,
)
from bids_dgmseg.simulate.artefacts import ArtefactRanges, degrade, draw_view
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.simulate.shapes import ShapedHead, ShapeRanges, shape_head
from bids_dgmseg.simulate.smoothing import blur
from bids_dgmseg.simulate.susceptibility import ValueRanges, fill, split_dentate


@dataclass(frozen=True)
class View:
    """A field of view and what may happen in it."""

    shape: tuple[int, int, int]
    spacing_mm: float
    centre_mm: tuple[float, float, float]
    """Template point about which the view is centred."""
    head: HeadRanges = field(default_factory=HeadRanges)
    shapes: ShapeRanges = field(default_factory=ShapeRanges)
    values: ValueRanges = field(default_factory=ValueRanges)
    artefacts: ArtefactRanges = field(default_factory=ArtefactRanges)
    cut_mm: tuple[float, float] = (17.0, 8.0)
    outside_noise: float = 0.15
    """Chance that the map is noise, not 0, outside the brain."""


SEGMENTER_VIEW = View(shape=(80, 104, 80), spacing_mm=1.0, centre_mm=(0.0, -20.0, -7.0))
"""The nuclei of the largest head, with room for an error of the localizer."""

LOCALIZER_VIEW = View(
    shape=(80, 80, 80),
    spacing_mm=3.0,
    centre_mm=(0.0, -18.0, 5.0),
    head=HeadRanges(rotation_deg=(35.0, 30.0, 30.0), shift_mm=(15.0, 22.0, 30.0), bends=((40.0, 5.0), (20.0, 3.0))),
    artefacts=ArtefactRanges(blur_mm=(0.6, 1.4)),
    cut_mm=(110.0, 90.0),
    outside_noise=0.3,
)

WHOLE_HEAD_VIEW = View(
    shape=(176, 208, 176), spacing_mm=1.0, centre_mm=(0.0, -18.0, 5.0), head=HeadRanges(shift_mm=(3.0, 3.0, 3.0))
)
"""A whole scan, for datasets that are written out."""

_PHANTOM_BOX = Box((-75.0, -108.0, -78.0), (75.0, 72.0, 79.0))

_REGION_OF_TISSUE = {
    21: 1,
    22: 1,
    23: 3,
    24: 1,
    25: 2,
    26: 1,
    27: 1,
    28: 1,
    29: 2,
    30: 2,
    31: 1,
    32: 1,
    33: 1,
    34: 5,
    35: 1,
}


def template_head(template: Volume) -> ShapedHead:
    """Take a label template for an anatomy to draw heads from."""
    whole = LabelMap.from_volume(template)
    return shape_head(split_dentate(whole), whole.labels)


@cache
def phantom_head() -> ShapedHead:
    """Take the phantom for an anatomy to draw heads from; it takes seconds to make, and is made once a process."""
    grid = world_grid(_PHANTOM_BOX, (0.75, 0.75, 0.75))
    return template_head(Volume(PHANTOM.labels(grid.centres_mm()), grid.affine))


def draw_sample(heads: Sequence[tuple[LabelMap, float]], view: View, seed: int) -> tuple[Tensor, Tensor]:
    """Draw one map with its labels.

    Parameters
    ----------
    heads : sequence of (LabelMap, float)
        Anatomies, on the device that draws, and how often each is drawn.
    view : View
        Field of view.
    seed : int
        The same seed gives the same sample on one device.

    Returns
    -------
    chi : Tensor of shape (X, Y, Z)
        Map in ppm.
    labels : Tensor of shape (X, Y, Z), uint8
        Nuclei and tissues at the voxel centres, 0 where the map does not reach.
    """
    device = heads[0][0].labels.device
    generator = torch.Generator(device).manual_seed(seed)
    chi, labels = draw_head(heads, view, generator)
    seen = draw_view(labels > 0, spacing_mm=view.spacing_mm, cut_mm=view.cut_mm, generator=generator)
    chi = degrade(chi, spacing_mm=view.spacing_mm, ranges=view.artefacts, generator=generator, mask=seen)
    chi, labels = _show(chi, seen, view, generator), torch.where(seen, labels, torch.zeros_like(labels))
    return mirror_half(chi, labels, generator)


def draw_head(heads: Sequence[tuple[LabelMap, float]], view: View, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a head as it is, before any scan: susceptibility in ppm, 0 outside, and labels, both (X, Y, Z)."""
    head, _ = heads[pick(generator, [weight for _, weight in heads])]
    points = draw_head_points(
        view.shape, view.spacing_mm, centre_mm=view.centre_mm, ranges=view.head, generator=generator
    )
    return fill(head, points, spacing_mm=view.spacing_mm, ranges=view.values, generator=generator, shapes=view.shapes)


def mirror_half(chi: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Exchange left and right half of the time."""
    if chance(generator, 0.5):
        return chi.flip(0), swap_sides(labels.flip(0))
    return chi, labels


def _show(chi: Tensor, seen: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """Put zeros outside the brain, or noise, or what the scalp's tissues leave in a map that is not skull-stripped."""
    if not chance(generator, view.outside_noise):
        return torch.where(seen, chi, torch.zeros_like(chi))
    level_ppm = 0.3 * 10 ** uniform(generator, -2.5, 0.0)
    outside = torch.randn(chi.shape, generator=generator, device=chi.device) * level_ppm
    if chance(generator, 0.5):
        wavelength = uniform(generator, 6.0, 20.0) / view.spacing_mm
        outside = outside * 0.3 + smooth_noise(chi.shape, wavelength, generator)[0] * uniform(generator, 0.02, 0.3)
        near = blur(seen.float(), [8.0 / view.spacing_mm] * 3) > uniform(generator, 0.01, 0.3)
        outside = outside * near
    return torch.where(seen, chi, outside)


def swap_sides(labels: Tensor) -> Tensor:
    """Exchange left and right: nuclei are numbered left, right, left, right and so on."""
    nuclei = (labels > 0) & (labels <= FIRST_TISSUE)
    return torch.where(nuclei, ((labels - 1) ^ 1) + 1, labels)


def nuclei_labels(labels: Tensor) -> Tensor:
    """Keep the nuclei: what the segmenter learns."""
    return torch.where(labels <= FIRST_TISSUE, labels, torch.zeros_like(labels))


def region_labels(labels: Tensor) -> Tensor:
    """Join labels to what the localizer learns: brain, cerebellum, ventricles, nuclei, cerebellar nuclei (1–5)."""
    table = torch.zeros(64, dtype=torch.uint8, device=labels.device)
    for label, region in _REGION_OF_TISSUE.items():
        table[label] = region
    table[1:5], table[5:17] = 5, 4
    return table[labels.long()]
