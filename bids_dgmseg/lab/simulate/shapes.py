"""Shape variation of single nuclei and ventricles: volume, position, orientation, proportions, surface."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.lab.simulate.anatomy import LAST_NUCLEUS, SECOND_PARTS, LabelMap, merge_parts
from bids_dgmseg.lab.simulate.details import HEALTHY, Pathology
from bids_dgmseg.lab.simulate.ranges import DilationRanges, ShapeRanges, chance, normal, smooth_noise, uniform
from bids_dgmseg.lab.simulate.template import Warps, interpolate
from bids_dgmseg.models.structures import STRUCTURES

_VENTRICLES = (23, 24)

_STEP_MM, _LATTICE_MARGIN_MM = 2.0, 30.0
"""Of the lattice of distances, and its margin around the ventricles."""

_SMOOTH_MM = 1.5

_REACH_MM = 1.0
"""Points outside a ventricle are mapped into it by no more than this, so that they do not pass through thin horns."""


@dataclass(frozen=True)
class VentricleDistance:
    """Distance from lateral and third ventricles.

    Parameters
    ----------
    values : Tensor of shape (4, X, Y, Z)
        Distance in mm, negative inside, and the direction away from the ventricles (unit vector).
    world_to_index : Tensor of shape (4, 4)
        RAS+ mm to indices of the lattice.
    """

    values: Tensor
    world_to_index: Tensor

    def to(self, device: str | torch.device) -> VentricleDistance:
        """Copy the distances to a device."""
        return VentricleDistance(self.values.to(device), self.world_to_index.to(device))


def measure_distance(labels: Tensor, world_to_index: Tensor) -> VentricleDistance | None:
    """Compute the distances for a label map (X, Y, Z); None if it has no ventricles."""
    affine = np.linalg.inv(world_to_index.cpu().numpy().astype(np.float64))
    steps_mm = np.linalg.norm(affine[:3, :3], axis=0)
    inside = np.isin(labels.cpu().numpy(), _VENTRICLES)
    if not inside.any():
        return None
    stride = np.maximum(1, np.rint(_STEP_MM / steps_mm)).astype(int)
    voxels = np.argwhere(inside)
    margin = np.ceil(_LATTICE_MARGIN_MM / steps_mm).astype(int)
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + margin + 1
    block = tuple(slice(max(0, start), stop) for start, stop in zip(low, high, strict=True))
    padding = list(zip(np.maximum(0, -low), np.maximum(0, high - inside.shape), strict=True))
    near = np.pad(inside[block], padding)
    signed = ndimage.distance_transform_edt(~near, sampling=steps_mm)
    signed -= ndimage.distance_transform_edt(near, sampling=steps_mm)
    signed = ndimage.gaussian_filter(signed, _SMOOTH_MM / steps_mm)
    thinned = signed[tuple(slice(None, None, int(step)) for step in stride)]
    gradient = np.stack(np.gradient(thinned))
    gradient = np.tensordot(np.linalg.inv(affine[:3, :3] * stride).T, gradient, axes=1)
    direction = gradient / np.maximum(np.linalg.norm(gradient, axis=0), 0.3)
    lattice = affine @ np.block([[np.diag(stride), low[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])
    values = np.concatenate([thinned[None], direction]).astype(np.float32)
    return VentricleDistance(torch.from_numpy(values), torch.tensor(np.linalg.inv(lattice), dtype=torch.float32))


def dilate(
    points_mm: Tensor, distance: VentricleDistance, *, ranges: DilationRanges, generator: torch.Generator
) -> Tensor:
    """Draw wider or narrower ventricles: change the template coordinates of the voxels of a scan (X, Y, Z, 3).

    Tissue at distance d is moved away by about w·exp(−d/L): it is pushed and thinned next to the ventricles and stays
    in place far away. Sides and horns differ.
    """
    amount_mm = ranges.spread_mm * normal(generator)
    if chance(generator, ranges.wide):
        amount_mm = uniform(generator, *ranges.wide_mm)
    amount_mm = max(amount_mm, -ranges.narrowest_mm)
    length_mm = uniform(generator, *ranges.length_mm)
    spacing_mm = float((points_mm[1, 0, 0] - points_mm[0, 0, 0]).norm())
    noise = smooth_noise(points_mm.shape[:3], ranges.wavelength_mm / spacing_mm, generator)[0]
    left, right = (1 + ranges.asymmetry * normal(generator) for _ in range(2))
    side = torch.sigmoid(points_mm[..., 0] / 3)
    factor = (left + (right - left) * side) * (1 + ranges.irregularity * noise).clamp(min=0)
    values = interpolate(distance.values, distance.world_to_index, points_mm)
    away_mm, direction = values[..., :1], values[..., 1:]
    shift = amount_mm * factor[..., None] * torch.exp(-away_mm.clamp(min=0) / length_mm)
    shift = torch.minimum(shift, (away_mm + _REACH_MM).clamp(min=0))
    return points_mm - shift * direction


Block = tuple[slice, slice, slice]

VENTRICLES = (23, 24)
"""Lateral and third ventricle: tissues with separate shapes, since they widen with age."""

_CAUDATES, _ACCUMBENS = (11, 12), 36

_MARGIN_MM, _VENTRICLE_MARGIN_MM = 4.0, 9.0
"""Around a nucleus and around a ventricle, for growth and partial volume."""

_SURFACE_SIGMA_MM = 0.5
"""SD of the Gaussian that smooths surfaces: atlases are drawn slice by slice."""

_LATTICE_STEPS_MM = ((10_000.0, 1.5), (1_500.0, 1.0), (0.0, 0.5))
"""Volume in mm³ above which a lattice of this step is fine enough."""

_GROUPS = {
    "PUT": "lentiform",
    "GP": "lentiform",
    "RN": "midbrain",
    "SN": "midbrain",
    "STN": "midbrain",
    "DN": "cerebellum",
    "IN": "cerebellum",
    "CN": "caudate",
}
"""Adjacent nuclei mostly shift together."""

_GROUP_CORRELATION = 0.85
"""Of the shifts of nuclei with that of their group."""

_MIN_VOLUME = 0.35
"""Relative to the template, also in disease."""

_PART_REACH_MM = 6.0
"""Largest distance that is computed from the border between the parts of a nucleus."""

_OVERLAP_MM = 0.2
"""Mean depth by which a neighbour reaches into a nucleus where they touch."""


@dataclass(frozen=True)
class StructureShape:
    """One structure of the template as a signed distance map."""

    label: int
    depth_mm: Tensor
    """Shape (X, Y, Z), float16: distance from the surface on a lattice around the structure, positive inside."""
    world_to_lattice: Tensor
    """Shape (3, 4)."""
    centre_mm: Tensor
    reach_mm: Tensor
    """Shape (3,): half the size of the box that contains the lattice."""
    voxels: float
    """Volume in voxels of the lattice."""
    touching: float = 0.0
    """Lattice voxels in a layer of 1 mm where the structure touches other nuclei."""
    second_mm: Tensor | None = None
    """Shape (X, Y, Z), float16: distance from the border between its parts, positive in the second one."""
    accumbens_mm: Tensor | None = None
    """Of a caudate, whose surface is then that of both: distance from the border with the accumbens, positive in it."""

    @property
    def nucleus(self) -> str:
        """Nucleus without hemisphere; empty for a tissue."""
        return STRUCTURES.numbered(self.label).nucleus if self.label <= LAST_NUCLEUS else ""

    @property
    def side(self) -> float:
        """Sign of x: -1 left, 1 right."""
        return -1.0 if self.label % 2 else 1.0

    # Cached, since reading a number from a GPU has to wait for it.

    @cached_property
    def step_mm(self) -> float:
        """Mean step of the lattice."""
        return float(1 / self.world_to_lattice[:, :3].norm(dim=0).mean())

    @cached_property
    def max_depth_mm(self) -> float:
        """Depth of the deepest point."""
        return float(self.depth_mm.float().max())

    @cached_property
    def lattice_to_world(self) -> Tensor:
        """Linear part (3, 3) of the map from lattice indices to mm."""
        inverse: Tensor = torch.linalg.inv(self.world_to_lattice[:, :3])
        return inverse

    def lattice_points_mm(self) -> Tensor:
        """Compute the coordinates (X, Y, Z, 3) of the lattice points relative to the centre."""
        axes = [torch.arange(n, device=self.depth_mm.device, dtype=torch.float32) for n in self.depth_mm.shape]
        lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return (lattice - self.world_to_lattice[:, 3]) @ self.lattice_to_world.T - self.centre_mm


@dataclass(frozen=True)
class ShapedHead(LabelMap):
    """A labelled head with a distance map per nucleus and ventricle."""

    background: Tensor
    """Shape (X, Y, Z), uint8: labels without these structures, filled with the nearest tissue."""
    structures: tuple[StructureShape, ...]
    """Ventricles first."""
    ventricles: VentricleDistance | None = None
    """For their enlargement; None if the head has none."""
    warps: Warps | None = None
    """Deformations of the head to those of people, if there are any."""
    others: Mapping[str, ShapedHead] = field(default_factory=dict)
    """The head with nuclei of other anatomies, by their names."""

    def to(self, device: str | torch.device) -> ShapedHead:
        """Copy the head to a device."""
        names = ("depth_mm", "world_to_lattice", "centre_mm", "reach_mm", "second_mm", "accumbens_mm")
        structures = tuple(
            replace(
                structure,
                **{name: tensor.to(device) for name in names if (tensor := getattr(structure, name)) is not None},
            )
            for structure in self.structures
        )
        labels, world_to_index = self.labels.to(device), self.world_to_index.to(device)
        ventricles = self.ventricles and self.ventricles.to(device)
        warps = self.warps and self.warps.to(device)
        others = {name: other.to(device) for name, other in self.others.items()}
        return ShapedHead(labels, world_to_index, self.background.to(device), structures, ventricles, warps, others)


def prepare_shapes(head: LabelMap, whole: Tensor, warps: Warps | None = None) -> ShapedHead:
    """Compute the distance maps of a head for `draw_shapes`; `whole` are its labels with `SECOND_PARTS`."""
    parts, labels = whole.cpu().numpy(), merge_parts(whole.cpu()).numpy()
    matrix = np.linalg.inv(head.world_to_index.cpu().numpy().astype(np.float64))
    wanted = [*VENTRICLES, *range(1, LAST_NUCLEUS + 1)]
    present = set(np.unique(labels).tolist())
    structures = [_compute_shape(labels, parts, label, matrix) for label in wanted if label in present]
    background = torch.from_numpy(fill_from_neighbours(labels, wanted))
    distance = measure_distance(whole, head.world_to_index)
    return ShapedHead(head.labels, head.world_to_index, background, tuple(structures), distance, warps)


def fill_from_neighbours(labels: NDArray[np.uint8], removed: Sequence[int]) -> NDArray[np.uint8]:
    """Replace labels by the nearest of the other labels around them."""
    inside = np.isin(labels, removed)
    filled = labels.copy()
    for box in ndimage.find_objects(ndimage.label(inside)[0]):
        block = tuple(slice(max(0, along.start - 2), along.stop + 2) for along in box)
        nearest = ndimage.distance_transform_edt(
            inside[block] | (labels[block] == 0), return_distances=False, return_indices=True
        )
        filled[block][inside[block]] = labels[block][tuple(nearest)][inside[block]]
    return filled


def _compute_shape(
    labels: NDArray[np.uint8], parts: NDArray[np.uint8], label: int, index_to_world: NDArray[np.float64]
) -> StructureShape:
    """Compute the distance map of one structure on a lattice as fine as its size requires."""
    steps_mm = np.linalg.norm(index_to_world[:3, :3], axis=0)
    mask = labels == label
    joined = mask | _find_accumbens(labels, label, index_to_world) if label in _CAUDATES else mask
    voxels = np.argwhere(joined)
    volume_mm3 = float(len(voxels) * steps_mm.prod())
    step_mm = next(step for volume, step in _LATTICE_STEPS_MM if volume_mm3 >= volume)
    stride = np.maximum(1, np.rint(step_mm / steps_mm)).astype(int)
    margin = np.ceil((_MARGIN_MM if label <= LAST_NUCLEUS else _VENTRICLE_MARGIN_MM) / steps_mm).astype(int)
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + 1 + margin
    inner = tuple(slice(max(0, start), stop) for start, stop in zip(low, high, strict=True))
    padding = list(zip(np.maximum(0, -low), np.maximum(0, high - labels.shape), strict=True))
    crop, crop_parts, crop_joined = (np.pad(array[inner], padding) for array in (labels, parts, joined))
    depth = _signed_depth_mm(crop_joined, steps_mm, stride)
    lattice_to_world = index_to_world @ np.block([[np.diag(stride), low[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])
    centre = (
        index_to_world[:3, :3] @ (voxels if joined is mask else np.argwhere(mask)).mean(axis=0) + index_to_world[:3, 3]
    )
    corners = np.array(np.meshgrid(*([0, size - 1] for size in depth.shape))).reshape(3, -1)
    reach = np.abs(lattice_to_world[:3, :3] @ corners + lattice_to_world[:3, 3:] - centre[:, None]).max(axis=1)
    lattice_mm3 = float((steps_mm * stride).prod())
    contact_mm2, inside = 0.0, crop == label
    others = (crop > 0) & (crop <= LAST_NUCLEUS) & ~inside
    if label <= LAST_NUCLEUS and others.any():  # the surface within 1 mm of another nucleus
        near = ndimage.binary_dilation(others, iterations=max(1, round(1 / float(steps_mm.mean()))))
        surface = inside & ~ndimage.binary_erosion(inside)
        contact_mm2 = float((surface & near).sum() * steps_mm.prod() ** (2 / 3))
    return StructureShape(
        label,
        torch.from_numpy(depth.astype(np.float16)),
        torch.tensor(np.linalg.inv(lattice_to_world)[:3], dtype=torch.float32),
        torch.tensor(centre, dtype=torch.float32),
        torch.tensor(reach, dtype=torch.float32),
        volume_mm3 / lattice_mm3,
        contact_mm2 / lattice_mm3,
        _border_mm(crop_parts == label, crop_parts == SECOND_PARTS.get(label, -1), steps_mm, stride),
        _border_mm(inside, crop_joined & ~inside, steps_mm, stride),
    )


def _find_accumbens(labels: NDArray[np.uint8], label: int, index_to_world: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the mask of the accumbens on the side of a caudate."""
    accumbens: NDArray[np.bool_] = labels == _ACCUMBENS
    voxels = np.argwhere(accumbens)
    left = voxels @ index_to_world[0, :3] + index_to_world[0, 3] < 0
    accumbens[tuple(voxels[left == (label % 2 == 0)].T)] = False  # of the other side
    return accumbens


def _border_mm(
    first: NDArray[np.bool_], second: NDArray[np.bool_], steps_mm: NDArray[np.float64], stride: NDArray[np.int_]
) -> Tensor | None:
    """Distance from the border between two masks, positive in the second, at every `stride`-th voxel; None if empty."""
    if not second.any():
        return None
    distance = ndimage.distance_transform_edt(~first, steps_mm) - ndimage.distance_transform_edt(~second, steps_mm)
    thinned = distance[tuple(slice(None, None, int(step)) for step in stride)]
    return torch.from_numpy(thinned.clip(-_PART_REACH_MM, _PART_REACH_MM).astype(np.float16))


def _signed_depth_mm(
    inside: NDArray[np.bool_], steps_mm: NDArray[np.float64], stride: NDArray[np.int_]
) -> NDArray[np.float64]:
    """Distance from the surface, positive inside, at every `stride`-th voxel."""
    thinned = tuple(slice(None, None, int(step)) for step in stride)
    if stride.max() > 2:  # a large structure: a coarse distance map is accurate enough and faster
        inside, steps_mm, thinned = inside[thinned], steps_mm * stride, (slice(None),) * 3
    within = ndimage.distance_transform_edt(inside, sampling=steps_mm)
    without = ndimage.distance_transform_edt(~inside, sampling=steps_mm)
    # The surface lies between two voxel centres, half a step from each.
    depth = within - without + (~inside - inside.astype(float)) * steps_mm.mean() / 2
    smooth: NDArray[np.float64] = ndimage.gaussian_filter(depth, _SURFACE_SIGMA_MM / steps_mm, mode="nearest")
    return smooth[thinned]


@dataclass(frozen=True)
class RenderedShape:
    """A structure with its drawn shape, in a block of the scan."""

    structure: StructureShape
    block: Block
    depth_mm: Tensor
    """Shape (x, y, z): distance from the surface in mm of the template, positive inside."""
    local_mm: Tensor
    """Shape (x, y, z, 3): coordinates relative to the centre and axes of the structure."""
    second_mm: Tensor | None = None
    """Shape (x, y, z): distance from the border between its parts, positive in the second one."""

    @property
    def labels(self) -> Tensor | int:
        """Label of the structure, or (x, y, z) of its parts."""
        number = self.structure.label
        if self.second_mm is None:
            return number
        return torch.where(self.second_mm > 0, SECOND_PARTS[number], number).to(torch.uint8)


def draw_shapes(
    head: ShapedHead,
    points_mm: Tensor,
    *,
    ranges: ShapeRanges,
    ageing: float,
    generator: torch.Generator,
    pathology: Pathology = HEALTHY,
) -> Iterator[RenderedShape]:
    """Draw the shapes of the ventricles and then of the nuclei of a head.

    `points_mm` are the template coordinates of the voxels of the scan (X, Y, Z, 3). `ageing`, 0 at 45 years and 1 at
    75, widens ventricles, shifts caudates outwards, shrinks caudate and putamen.
    """
    wider_mm = ranges.ventricle_mm[0] * normal(generator) + ranges.ventricle_mm[1] * ageing + pathology.wider_mm
    wider_mm *= ranges.amount
    sd = ranges.odd[1] if chance(generator, ranges.odd[0]) else ranges.volume_sd
    common = {nucleus: normal(generator) for nucleus in _GROUPS}
    shifts = {
        (group, side): ranges.amount * ranges.shift_mm * torch.randn(3, generator=generator, device=points_mm.device)
        for group in sorted(set(_GROUPS.values()))
        for side in (-1.0, 1.0)
    }
    blocks = _find_blocks(head.structures, points_mm)
    for structure, block in zip(head.structures, blocks, strict=True):
        if any(along.start == along.stop for along in block):
            continue
        if structure.label > LAST_NUCLEUS:
            local = points_mm[block] - structure.centre_mm
            depth = _interpolate_lattice(structure, structure.depth_mm.float(), local) + wider_mm
            yield RenderedShape(structure, block, depth, local)
            continue
        nucleus = structure.nucleus
        volume = 1 + ranges.amount * sd * (0.95 * common[nucleus] + 0.31 * normal(generator))
        if nucleus in ("CN", "PUT"):
            volume -= 0.1 * ranges.amount * ageing
        volume = min(max(volume, 0.5), 1.5) * pathology.volume.get(nucleus, 1.0)
        voxels = structure.voxels * max(volume, _MIN_VOLUME) + ranges.amount * _OVERLAP_MM * structure.touching
        spread = 1 + ranges.amount * (uniform(generator, *ranges.spread) - 1) if nucleus == "DN" else 1.0
        surface = spread * _match_volume(_draw_surface(structure, ranges, generator), voxels / spread**3)
        single = ranges.amount * ranges.shift_mm * torch.randn(3, generator=generator, device=points_mm.device)
        shift = _GROUP_CORRELATION * shifts[_GROUPS[nucleus], structure.side]
        shift = shift + math.sqrt(1 - _GROUP_CORRELATION**2) * single
        if nucleus == "CN":
            shift[0] += structure.side * 0.7 * wider_mm
        local = _draw_local_coordinates(structure, points_mm[block] - shift, spread, ranges, generator)
        depth = _interpolate_lattice(structure, surface, local)
        if structure.accumbens_mm is not None:  # its border stays where it is in this head, as in people
            border = structure.accumbens_mm.float()
            border = _interpolate_lattice(structure, border, points_mm[block] - structure.centre_mm)
            depth = torch.where(border > -_PART_REACH_MM, torch.minimum(depth, -border), depth)
        # Neither side crosses the midline.
        depth = torch.minimum(depth, points_mm[(*block, 0)] * structure.side)
        second = structure.second_mm
        second = None if second is None else _interpolate_lattice(structure, second.float(), local)
        yield RenderedShape(structure, block, depth, local, second)


def _find_blocks(structures: Sequence[StructureShape], points_mm: Tensor) -> list[Block]:
    """Find the block of the scan that may contain each structure (empty slices if none); waits for a GPU only once."""
    step = max(1, round(3 / float((points_mm[1, 0, 0] - points_mm[0, 0, 0]).norm())))
    sparse_mm = points_mm[::step, ::step, ::step]
    occupied = []
    for structure in structures:
        near = ((sparse_mm - structure.centre_mm).abs() < structure.reach_mm + 0.3 * _MARGIN_MM).all(dim=-1)
        occupied.append(torch.cat([near.any(dim=others[0]).any(dim=others[1]) for others in ((2, 1), (2, 0), (1, 0))]))
    if not occupied:
        return []
    axes = torch.split(torch.stack(occupied).cpu(), list(sparse_mm.shape[:3]), dim=1)
    blocks: list[Block] = []
    for number in range(len(structures)):
        hits = [along[number].nonzero()[:, 0].tolist() for along in axes]
        if not all(hits):
            blocks.append((slice(0, 0),) * 3)
            continue
        x, y, z = (slice(max(0, (hit[0] - 1) * step), (hit[-1] + 1) * step + 1) for hit in hits)
        blocks.append((x, y, z))
    return blocks


def _draw_local_coordinates(
    structure: StructureShape, points_mm: Tensor, spread: float, ranges: ShapeRanges, generator: torch.Generator
) -> Tensor:
    """Draw rotation, proportions and bending: coordinates relative to the centre and axes of the structure."""
    amount, device = ranges.amount, points_mm.device
    limit = amount * ranges.rotation_deg
    angles_deg = [uniform(generator, -limit, limit) for _ in range(3)]
    rotation = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    stretch = amount * ranges.stretch * torch.randn(3, generator=generator, device=device)
    zoom = torch.exp(stretch - stretch.mean()) / spread
    local = (points_mm - structure.centre_mm) @ (torch.as_tensor(rotation, dtype=torch.float32, device=device) * zoom)
    along = local[..., 1] / structure.reach_mm[1]
    bend = along.clamp_(-1, 1).square_().sub_(0.2)
    for axis in (0, 2):
        local[..., axis] += uniform(generator, -1, 1) * amount * ranges.bend_mm * bend
    return local


def _interpolate_lattice(structure: StructureShape, depth: Tensor, local_mm: Tensor) -> Tensor:
    """Interpolate a lattice at coordinates relative to the structure's centre; its faces are replicated."""
    matrix, shift = structure.world_to_lattice[:, :3], structure.world_to_lattice[:, 3]
    size = torch.tensor(depth.shape, device=depth.device)
    # grid_sample expects coordinates from -1 to 1 over the outermost lattice points, last axis first.
    scale = 2 / (size - 1)
    offset = (matrix @ structure.centre_mm + shift) * scale - 1
    coordinates = (local_mm @ (matrix * scale[:, None]).T + offset).flip(-1)
    sampled: Tensor = functional.grid_sample(
        depth[None, None], coordinates[None], mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled[0, 0]


def _match_volume(depth: Tensor, voxels: float) -> Tensor:
    """Shift a surface inwards or outwards until it encloses a number of lattice voxels."""
    reach, bins = 5.0, 2000
    # Samples lie between lattice points, where interpolation rounds edges off: count there too.
    between = functional.avg_pool3d(depth[None], 2, stride=1)
    counts = torch.stack(
        [
            torch.histc(values, bins=bins, min=-reach, max=reach).flip(0).cumsum(0) + (values > reach).sum()
            for values in (depth, between)
        ]
    ).mean(dim=0)
    surface_mm = reach - (int((counts < voxels).sum()) + 0.5) * 2 * reach / bins
    return depth - surface_mm


def _draw_surface(structure: StructureShape, ranges: ShapeRanges, generator: torch.Generator) -> Tensor:
    """Draw surface irregularities, and the folds and gaps of dentate and interposed nucleus."""
    depth = structure.depth_mm.float()
    thin = min(1.0, structure.max_depth_mm / 3)
    for wavelength_mm, bump_mm in zip((8, 4), ranges.bumps, strict=True):
        noise = smooth_noise(depth.shape, wavelength_mm / structure.step_mm, generator)[0]
        depth = depth + ranges.amount * thin * bump_mm * noise
    if structure.nucleus == "DN":
        folds = smooth_noise(depth.shape, uniform(generator, 2.8, 4.5) / structure.step_mm, generator)[0]
        depth = depth + ranges.amount * uniform(generator, *ranges.fold_mm) * folds
        # The hilum opens medially and anteriorly.
        medial, anterior = -structure.side * uniform(generator, 0.5, 1.0), uniform(generator, 0.1, 0.8)
        direction = torch.tensor([medial, anterior, uniform(generator, 0.0, 0.6)])
        direction = (direction / direction.norm()).to(depth.device)
        points = structure.lattice_points_mm() + direction * uniform(generator, -1.5, 2.5)
        outwards = points @ direction
        radius = (points - outwards.clamp(min=0)[..., None] * direction).norm(dim=-1)
        hilum = ranges.amount * uniform(generator, *ranges.hilum_mm) + 0.25 * outwards.clamp(min=0)
        return torch.minimum(depth, radius - hilum)
    if structure.nucleus == "IN":
        # The globose nucleus is posterior and medial, the emboliform nucleus anterior and lateral.
        direction = torch.tensor([structure.side * uniform(generator, 0, 0.7), 1.0, uniform(generator, -0.3, 0.3)])
        direction = (direction / direction.norm()).to(depth.device)
        gap_mm = ranges.amount * uniform(generator, *ranges.gap_mm)
        if gap_mm > 0:
            between = structure.lattice_points_mm() @ direction - uniform(generator, -1.5, 0.5)
            return torch.minimum(depth, between.abs() - gap_mm / 2)
    return depth
