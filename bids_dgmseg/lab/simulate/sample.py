"""Labelled samples: a chi map with its labels, drawn from ranges within a field of view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import (
    IN_VEIN,
    LAST_NUCLEUS,
    RIGHT_TISSUES,
    LabelMap,
    draw_head_points,
    merge_parts,
)
from bids_dgmseg.lab.simulate.artefacts import ScanGrid, blur, degrade, draw_coverage, draw_scan_grid
from bids_dgmseg.lab.simulate.ranges import (
    NO_PATHOLOGY,
    ArtefactRanges,
    HeadRanges,
    ShapeRanges,
    SusceptibilityRanges,
    chance,
    narrow,
    pick,
    smooth_noise,
    uniform,
)
from bids_dgmseg.lab.simulate.shapes import ShapedHead, dilate, prepare_shapes
from bids_dgmseg.lab.simulate.susceptibility import draw_susceptibility, split_hilum
from bids_dgmseg.lab.simulate.template import Warps, interpolate, read_other_templates, read_template, read_warps
from bids_dgmseg.models.registry import LATERAL_VENTRICLE, VEIN
from bids_dgmseg.models.structures import STRUCTURES, Structure
from bids_dgmseg.phantom.head import PHANTOM


@dataclass(frozen=True)
class View:
    """A field of view and the ranges of what it shows."""

    shape: tuple[int, int, int]
    spacing_mm: float
    centre_mm: tuple[float, float, float]
    """Template point at the centre."""
    head: HeadRanges = field(default_factory=HeadRanges)
    shapes: ShapeRanges = field(default_factory=ShapeRanges)
    values: SusceptibilityRanges = field(default_factory=SusceptibilityRanges)
    artefacts: ArtefactRanges = field(default_factory=ArtefactRanges)
    cut_mm: tuple[float, float] = (17.0, 8.0)
    """Largest extent of missing slices below and above."""
    outside_noise: float = 0.15
    """Probability that the map contains noise, not 0, outside the brain."""


SEGMENTER_VIEW = View(shape=(80, 104, 80), spacing_mm=1.0, centre_mm=(0.0, -20.0, -7.0))
"""Contains the nuclei of the largest head, with a margin for errors of the localizer."""

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
"""A whole scan, for simulated datasets."""

_TISSUES_OF_REGION = {1: (21, 22, 24, 26, 27, 28, 31, 32, 33, 35, 36, 37, 38), 2: (25, 29, 30), 3: (23,), 5: (34,)}


_LABELS_OF: Mapping[str, tuple[int, ...]] = {
    **{
        structure.abbreviation: (structure.index,)
        for structure in STRUCTURES.both_sides(["DN", "IN", "RN", "STN", "CN", "PUT"])
    },
    **{"SN_L": (7, 19), "SN_R": (8, 20), "GP_L": (15, 17), "GP_R": (16, 18)},
    **{"SNr_L": (7,), "SNr_R": (8,), "SNc_L": (19,), "SNc_R": (20,)},
    **{"GPe_L": (15,), "GPe_R": (16,), "GPi_L": (17,), "GPi_R": (18,)},
    **{"NAC_L": (36,), "NAC_R": (RIGHT_TISSUES[36],), "THA_L": (27,), "THA_R": (RIGHT_TISSUES[27],)},
    LATERAL_VENTRICLE: (23,),
    VEIN: tuple(range(IN_VEIN, 2 * IN_VEIN)),
}
"""Class of a network → labels of drawn heads."""


def read_training_head(template: Path) -> ShapedHead:
    """Read a label template for drawing heads, with the warps of people and other anatomies next to it, if any."""
    others = {name: template_head(other) for name, other in read_other_templates(template).items()}
    return replace(template_head(read_template(template), read_warps(template)), others=others)


def template_head(template: Volume, warps: Warps | None = None) -> ShapedHead:
    """Prepare a label template for drawing heads."""
    whole = LabelMap.from_volume(template)
    nuclei = replace(whole, labels=merge_parts(whole.labels))
    return prepare_shapes(split_hilum(nuclei), whole.labels, warps)


@cache
def phantom_head() -> ShapedHead:
    """Prepare the phantom for drawing heads; takes seconds and is cached."""
    return template_head(phantom_labels())


def phantom_labels() -> Volume:
    """Return the labels of the phantom like those of a template."""
    grid = world_grid(Box((-75.0, -108.0, -78.0), (75.0, 72.0, 79.0)), (0.75, 0.75, 0.75))
    return Volume(PHANTOM.labels(grid.centres_mm()), grid.affine)


def draw_sample(
    heads: Sequence[tuple[LabelMap, float]],
    view: View,
    seed: int,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, ScanGrid]:
    """Draw a map with its labels.

    Parameters
    ----------
    heads : sequence of (LabelMap, float)
        Anatomies, on the device of the computation, and their relative frequencies.
    view : View
        Field of view and ranges.
    seed : int
        The same seed gives the same sample on the same device.
    change : callable, optional
        Changes the true susceptibility, given its labels, before it is degraded.

    Returns
    -------
    chi : Tensor of shape (X, Y, Z)
        Map in ppm.
    labels : Tensor of shape (X, Y, Z), uint8
        Nuclei and tissues at the voxel centres, in visible veins plus `IN_VEIN`; 0 outside the coverage of the map.
    grid : ScanGrid
        Grid of the scan, whose voxels may be larger.
    """
    device = heads[0][0].labels.device
    generator = torch.Generator(device).manual_seed(seed)
    chi, labels = mirror_randomly(*_draw_head(heads, view, generator), generator)
    chi = change(chi, labels) if change else chi
    covered = draw_coverage(labels > 0, spacing_mm=view.spacing_mm, cut_mm=view.cut_mm, generator=generator)
    grid = draw_scan_grid(tuple(chi.shape), view.spacing_mm, view.artefacts, generator)
    chi = degrade(chi, grid, spacing_mm=view.spacing_mm, ranges=view.artefacts, generator=generator, mask=covered)
    outside = torch.zeros_like(chi)
    if chance(generator, view.outside_noise):
        level_ppm = 0.3 * 10 ** uniform(generator, -2.5, 0.0)
        outside = torch.randn(chi.shape, generator=generator, device=device) * level_ppm
        if chance(generator, 0.5):  # residual scalp, as in maps without skull stripping
            wavelength = uniform(generator, 6.0, 20.0) / view.spacing_mm
            outside = outside * 0.3 + smooth_noise(chi.shape, wavelength, generator)[0] * uniform(generator, 0.02, 0.3)
            near = blur(covered.float(), [8.0 / view.spacing_mm] * 3) > uniform(generator, 0.01, 0.3)
            outside = outside * near
    return torch.where(covered, chi, outside), torch.where(covered, labels, torch.zeros_like(labels)), grid


def draw_head(heads: Sequence[tuple[LabelMap, float]], view: View, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the true susceptibility in ppm, 0 outside the head, and nuclei and tissues, both (X, Y, Z)."""
    chi, labels = _draw_head(heads, view, generator)
    return chi, labels % IN_VEIN


def _draw_head(
    heads: Sequence[tuple[LabelMap, float]], view: View, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a head like `draw_head`; labels in visible veins plus `IN_VEIN`."""
    head, _ = heads[pick(generator, [weight for _, weight in heads])]
    ranges, warps = view.head, head.warps if isinstance(head, ShapedHead) else None
    if warps is not None:
        ranges = replace(ranges, bends=[(length, ranges.bends_of_people * size) for length, size in ranges.bends])
    points = draw_head_points(view.shape, view.spacing_mm, centre_mm=view.centre_mm, ranges=ranges, generator=generator)
    if warps is not None:
        points = points + interpolate(warps.draw(ranges, generator), warps.world_to_index, points)
    if isinstance(head, ShapedHead) and head.others:
        level = uniform(generator, 0.0, 1.0)
        for name, fraction in ranges.anatomies:
            if 0 <= level < fraction:
                head = head.others.get(name, head)
            level -= fraction
    if isinstance(head, ShapedHead) and head.ventricles is not None and view.shapes.amount > 0:
        points = dilate(points, head.ventricles, ranges=ranges.dilation, generator=generator)
    chi, labels = draw_susceptibility(
        head, points, spacing_mm=view.spacing_mm, ranges=view.values, generator=generator, shapes=view.shapes
    )
    for left, right in RIGHT_TISSUES.items():
        labels = torch.where((labels == left) & (points[..., 0] > 0), right, labels)
    return chi, labels


def mirror_randomly(chi: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror a map and exchange its left and right labels with a probability of 1/2."""
    if not chance(generator, 0.5):
        return chi, labels
    labels = labels.flip(0)
    nuclei = (labels > 0) & (labels <= LAST_NUCLEUS)  # left nuclei have odd numbers, right nuclei even ones
    mirrored = torch.where(nuclei, ((labels - 1) ^ 1) + 1, labels)
    for left, right in RIGHT_TISSUES.items():
        mirrored = torch.where(labels == left, right, torch.where(labels == right, left, mirrored))
    return chi.flip(0), mirrored


def nuclei_labels(labels: Tensor) -> Tensor:
    """Return the sixteen nuclei in drawn labels, everything else 0."""
    return structure_labels(labels, STRUCTURES)


def class_labels(labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Return the classes of a network, numbered from 1, in drawn labels; everything else 0.

    Classes are abbreviations of nuclei, such as ``DN_L``, and `LATERAL_VENTRICLE` and `VEIN`.
    """
    return _convert(labels, {label: number for number, name in enumerate(classes, 1) for label in _LABELS_OF[name]})


def missing_classes(template: Volume, classes: Sequence[str]) -> list[str]:
    """Return the classes of a network, but for veins, that do not occur in a label template."""
    labels_of_left = {right: left for left, right in RIGHT_TISSUES.items()}
    present = set(np.unique(template.array).tolist())
    return [
        name
        for name in classes
        if name != VEIN and present.isdisjoint(labels_of_left.get(label, label) for label in _LABELS_OF[name])
    ]


def structure_labels(labels: Tensor, structures: Sequence[Structure]) -> Tensor:
    """Return the structures, numbered as in structures.tsv, in drawn labels; everything else 0."""
    return _convert(
        labels, {label: structure.index for structure in structures for label in _LABELS_OF[structure.abbreviation]}
    )


def _convert(labels: Tensor, numbers: Mapping[int, int]) -> Tensor:
    """Replace labels by their numbers, 0 if they have none; a vein without a number gets that of its tissue."""
    values = [numbers.get(label, numbers.get(label % IN_VEIN, 0)) for label in range(2 * IN_VEIN)]
    table = torch.tensor(values, dtype=torch.uint8)
    return table.to(labels.device, non_blocking=True)[labels.int()]


def region_labels(labels: Tensor) -> Tensor:
    """Return the classes of the localizer: brain, cerebellum, ventricles, nuclei, cerebellar nuclei (1-5)."""
    numbers = {tissue: region for region, tissues in _TISSUES_OF_REGION.items() for tissue in tissues}
    return _convert(labels, {**numbers, **{label: 5 if label < 5 else 4 for label in range(1, LAST_NUCLEUS + 1)}})


TYPICAL_WIDTH = 0.5
"""Fraction of the width of each parameter range that typical maps use."""


def typical_view(view: View, width: float = 0.0) -> View:
    """Narrow a view to typical 3 T scans of healthy, middle-aged subjects.

    Parameters
    ----------
    view : View
        Field of view and full ranges. Voxel size, missing slices, noise outside the brain, direction of B0, reference
        and shapes keep their ranges.
    width : float
        Fraction of each range's width that is kept about its middle; 0 keeps the middle alone.

    Returns
    -------
    View
        Without pathology and values unrelated to age; head rotations are halved.
    """
    artefacts = replace(
        narrow(view.artefacts, width),
        in_plane_mm=view.artefacts.in_plane_mm,
        slice_mm=view.artefacts.slice_mm,
        clinical_mm=view.artefacts.clinical_mm,
        reconstruction=replace(narrow(view.artefacts.reconstruction, width), b0_tesla=(3.0,)),
    )
    pitch, roll, yaw = view.head.rotation_deg
    head = replace(view.head, rotation_deg=(pitch / 2, roll / 2, yaw / 2))
    values = replace(view.values, age_years=narrow(view.values, width).age_years, mixture=0.0, pathology=NO_PATHOLOGY)
    return replace(view, head=head, values=values, artefacts=artefacts)


def without_resampling(view: View) -> View:
    """Set the voxel grid of scans to that of the view: no thick or oblique slices, no interpolation."""
    artefacts = replace(view.artefacts, in_plane_mm=(0.0, 0.0), thick=0.0, coarse=0.0)
    return replace(view, artefacts=artefacts)
