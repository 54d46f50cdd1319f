"""Nuclei as bodies of their own: each grows, shrinks, shifts, turns and bends apart from the head around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.anatomy import FIRST_TISSUE, LabelMap, chance, fill_places, normal, smooth_noise, uniform
from bids_dgmseg.simulate.bounding_blocks import Block, find_blocks
from bids_dgmseg.simulate.tissue_details import HEALTHY, Disease

VENTRICLES = (23, 24)
"""Lateral and third: tissues that are bodies too, since they widen with age."""

_MARGIN_MM, _WIDE_MARGIN_MM = 4.0, 9.0
"""Around a nucleus and around a ventricle, for growth and partial volume."""

_SMOOTH_MM = 0.5
"""SD by which surfaces are smoothed: atlases are drawn in steps from slice to slice."""

_STEPS_MM = ((10_000.0, 1.5), (1_500.0, 1.0), (0.0, 0.5))
"""Volume from which a lattice of this step is fine enough."""

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
"""Nuclei that touch shift together, for the most part."""

_TOGETHER = 0.85
"""Correlation of their shifts with the group's."""

_LEAST_VOLUME = 0.35
"""Relative: what a disease leaves at least."""

_TAKEN_MM = 0.2
"""How far, on average, a neighbour reaches into a nucleus where they touch."""


@dataclass(frozen=True)
class ShapeRanges:
    """How far each nucleus differs from the template, apart from the head; sides are drawn on their own."""

    amount: float = 1.0
    """Multiplies all of what follows; with 0 the template is looked up as it is."""
    volume_sd: float = 0.12
    """SD of the volume, relative; its mean is 1."""
    odd: tuple[float, float] = (0.2, 0.3)
    """Part of the people in whom this SD is larger, and how large."""
    stretch: float = 0.08
    """SD of the proportions, relative, at constant volume."""
    shift_mm: float = 0.8
    rotation_deg: float = 8.0
    bend_mm: float = 1.2
    """Largest way of a body's ends against its middle."""
    bumps: tuple[float, float] = (0.45, 0.25)
    """SD of the surface's way in mm, at wavelengths of 8 and 4 mm; less for thin nuclei."""
    fold_mm: tuple[float, float] = (0.3, 1.0)
    """SD of the dentate's folds."""
    hilum_mm: tuple[float, float] = (0.6, 3.0)
    """Radius of the dentate's mouth at its bottom."""
    spread: tuple[float, float] = (1.0, 1.15)
    """Length of the dentate's bag against the atlas's body, of the same volume."""
    gap_mm: tuple[float, float] = (-0.5, 1.8)
    """Between the two islands of the interposed nucleus; none below 0."""
    ventricle_mm: tuple[float, float] = (0.8, 1.6)
    """SD of the way of the ventricles' walls, and how far outwards they are at 75 against 45 years."""


@dataclass(frozen=True)
class Body:
    """One structure of the template: how deep a point lies in it.

    Parameters
    ----------
    label : int
    depth_mm : Tensor of shape (X, Y, Z), float16
        Distance from the surface on a lattice around the body, positive inside.
    world_to_lattice : Tensor of shape (3, 4)
    centre_mm : Tensor of shape (3,)
    reach_mm : Tensor of shape (3,)
        Half the size of the box that holds the lattice.
    voxels : float
        Volume in voxels of the lattice.
    touching : float
        Voxels that a layer of 1 mm has where other nuclei touch the body.
    """

    label: int
    depth_mm: Tensor
    world_to_lattice: Tensor
    centre_mm: Tensor
    reach_mm: Tensor
    voxels: float
    touching: float = 0.0

    @property
    def nucleus(self) -> str:
        """Nucleus without its side; empty for a tissue."""
        return STRUCTURES.numbered(self.label).nucleus if self.label <= FIRST_TISSUE else ""

    @property
    def side(self) -> float:
        """Sign of x: −1 left, 1 right."""
        return -1.0 if self.label % 2 else 1.0

    # What follows is asked for once a body, not once a sample: a GPU has to be waited for.

    @cached_property
    def step_mm(self) -> float:
        """Mean step of the lattice."""
        return float(1 / self.world_to_lattice[:, :3].norm(dim=0).mean())

    @cached_property
    def depth_limit_mm(self) -> float:
        """How deep the deepest point lies."""
        return float(self.depth_mm.float().max())

    @cached_property
    def lattice_to_place(self) -> Tensor:
        """Turns steps of the lattice into mm, (3, 3)."""
        inverse: Tensor = torch.linalg.inv(self.world_to_lattice[:, :3])
        return inverse


@dataclass(frozen=True)
class ShapedHead(LabelMap):
    """A labelled head whose nuclei can be shaped one by one.

    Parameters
    ----------
    ground : Tensor of shape (X, Y, Z), uint8
        Labels as if there were no bodies: the nearest tissue fills their place.
    bodies : tuple of Body
        Ventricles first.
    """

    ground: Tensor
    bodies: tuple[Body, ...]


def shape_head(head: LabelMap, whole: Tensor) -> ShapedHead:
    """Prepare a labelled head for `draw_bodies`.

    Parameters
    ----------
    head : LabelMap
        What is looked up where shapes are switched off.
    whole : Tensor of shape (X, Y, Z), uint8
        Its labels without parts of nuclei.
    """
    labels = whole.cpu().numpy()
    matrix = np.linalg.inv(head.world_to_index.cpu().numpy().astype(np.float64))
    wanted = [*VENTRICLES, *(structure.index for structure in STRUCTURES)]
    found = set(np.unique(labels).tolist())
    bodies = [_make_body(labels, label, matrix) for label in wanted if label in found]
    ground = torch.from_numpy(fill_places(labels, wanted))
    return ShapedHead(head.labels, head.world_to_index, ground, tuple(bodies))


def _make_body(labels: NDArray[np.uint8], label: int, index_to_world: NDArray[np.float64]) -> Body:
    steps_mm = np.linalg.norm(index_to_world[:3, :3], axis=0)
    voxels = np.argwhere(labels == label)
    volume_mm3 = float(len(voxels) * steps_mm.prod())
    wanted = next(step for volume, step in _STEPS_MM if volume_mm3 >= volume)
    stride = np.maximum(1, np.rint(wanted / steps_mm)).astype(int)
    margin = np.ceil((_MARGIN_MM if label <= FIRST_TISSUE else _WIDE_MARGIN_MM) / steps_mm).astype(int)
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + 1 + margin
    around = _cut(labels, low, high)
    depth = _signed_depth_mm(around == label, steps_mm, stride)
    lattice_to_world = index_to_world @ np.block([[np.diag(stride), low[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])
    centre = index_to_world[:3, :3] @ voxels.mean(axis=0) + index_to_world[:3, 3]
    corners = np.array(np.meshgrid(*([0, size - 1] for size in depth.shape))).reshape(3, -1)
    reach = np.abs(lattice_to_world[:3, :3] @ corners + lattice_to_world[:3, 3:] - centre[:, None]).max(axis=1)
    lattice_mm3 = float((steps_mm * stride).prod())
    return Body(
        label,
        torch.from_numpy(depth.astype(np.float16)),
        _tensor(np.linalg.inv(lattice_to_world)[:3]),
        _tensor(centre),
        _tensor(reach),
        volume_mm3 / lattice_mm3,
        _contact_mm2(around, label, steps_mm) / lattice_mm3,
    )


def _cut(labels: NDArray[np.uint8], low: NDArray[np.int_], high: NDArray[np.int_]) -> NDArray[np.uint8]:
    """Cut a block out that may reach beyond the array."""
    inner = tuple(slice(max(0, start), stop) for start, stop in zip(low, high, strict=True))
    before = np.maximum(0, -low)
    after = np.maximum(0, high - labels.shape)
    return np.pad(labels[inner], list(zip(before, after, strict=True)))


def _contact_mm2(labels: NDArray[np.uint8], label: int, steps_mm: NDArray[np.float64]) -> float:
    """Area of a nucleus's surface that has another nucleus within a millimetre."""
    inside = labels == label
    others = (labels > 0) & (labels <= FIRST_TISSUE) & ~inside
    if label > FIRST_TISSUE or not others.any():
        return 0.0
    near = ndimage.binary_dilation(others, iterations=max(1, round(1 / float(steps_mm.mean()))))
    surface = inside & ~ndimage.binary_erosion(inside)
    return float((surface & near).sum() * steps_mm.prod() ** (2 / 3))


def _signed_depth_mm(
    inside: NDArray[np.bool_], steps_mm: NDArray[np.float64], stride: NDArray[np.int_]
) -> NDArray[np.float64]:
    """Distance from the surface, positive inside, at every `stride`-th voxel."""
    thinned = tuple(slice(None, None, int(step)) for step in stride)
    if stride.max() > 2:  # a large body: coarse steps will do, and save time
        inside, steps_mm, thinned = inside[thinned], steps_mm * stride, (slice(None),) * 3
    within = ndimage.distance_transform_edt(inside, sampling=steps_mm)
    without = ndimage.distance_transform_edt(~inside, sampling=steps_mm)
    # The surface lies between two voxel centres, half a step from each.
    depth = within - without + (~inside - inside.astype(float)) * steps_mm.mean() / 2
    smooth: NDArray[np.float64] = ndimage.gaussian_filter(depth, _SMOOTH_MM / steps_mm, mode="nearest")
    return smooth[thinned]


def _tensor(array: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


@dataclass(frozen=True)
class Painted:
    """A shaped body in a block of the scan."""

    body: Body
    block: Block
    depth_mm: Tensor
    """(x, y, z), positive inside, in mm of the template."""
    local_mm: Tensor
    """(x, y, z, 3): from the body's centre, in the body's own axes."""


def draw_bodies(
    head: ShapedHead,
    points_mm: Tensor,
    *,
    ranges: ShapeRanges,
    ageing: float,
    generator: torch.Generator,
    disease: Disease = HEALTHY,
) -> Iterator[Painted]:
    """Draw the bodies of a head in turn, ventricles first.

    Parameters
    ----------
    head : ShapedHead
        Anatomy in template space.
    points_mm : Tensor of shape (X, Y, Z, 3)
        Template coordinates of the scan's voxels.
    ranges : ShapeRanges
        How far bodies differ.
    ageing : float
        0 at 45 years, 1 at 75: widens ventricles, pushes caudates outwards, takes from caudate and putamen.
    generator : torch.Generator
        Source of randomness.
    disease : Disease
        Its volumes and ventricles.

    Yields
    ------
    Painted
    """
    wide_mm = ranges.ventricle_mm[0] * normal(generator) + ranges.ventricle_mm[1] * ageing + disease.wider_mm
    wide_mm *= ranges.amount
    sd = ranges.odd[1] if chance(generator, ranges.odd[0]) else ranges.volume_sd
    common = {nucleus: normal(generator) for nucleus in _GROUPS}
    shifts = {
        (group, side): ranges.amount * ranges.shift_mm * torch.randn(3, generator=generator, device=points_mm.device)
        for group in sorted(set(_GROUPS.values()))
        for side in (-1.0, 1.0)
    }
    coarse = max(1, round(3 / float((points_mm[1, 0, 0] - points_mm[0, 0, 0]).norm())))
    sparse = points_mm[::coarse, ::coarse, ::coarse]
    reaches = [(body.centre_mm, body.reach_mm + 0.3 * _MARGIN_MM) for body in head.bodies]
    for body, block in zip(head.bodies, find_blocks(reaches, sparse, coarse), strict=True):
        if any(along.start == along.stop for along in block):
            continue
        if body.label > FIRST_TISSUE:
            local = points_mm[block] - body.centre_mm
            yield Painted(body, block, _sample(body, body.depth_mm.float(), local) + wide_mm, local)
            continue
        volume = 1 + ranges.amount * sd * (0.8 * common[body.nucleus] + 0.6 * normal(generator))
        if body.nucleus in ("CN", "PUT"):
            volume -= 0.1 * ranges.amount * ageing
        volume = min(max(volume, 0.5), 1.5) * disease.volume.get(body.nucleus, 1.0)
        voxels = body.voxels * max(volume, _LEAST_VOLUME) + ranges.amount * _TAKEN_MM * body.touching
        spread = 1 + ranges.amount * (uniform(generator, *ranges.spread) - 1) if body.nucleus == "DN" else 1.0
        depth = spread * _level(_carve(body, ranges, generator), voxels / spread**3)
        own = ranges.amount * ranges.shift_mm * torch.randn(3, generator=generator, device=points_mm.device)
        shift = _TOGETHER * shifts[_GROUPS[body.nucleus], body.side] + math.sqrt(1 - _TOGETHER**2) * own
        if body.nucleus == "CN":
            shift[0] += body.side * 0.7 * wide_mm
        local = _draw_motion(body, points_mm[block] - shift, spread, ranges, generator)
        deep = _sample(body, depth, local)
        # Neither side crosses the middle.
        yield Painted(body, block, torch.minimum(deep, points_mm[(*block, 0)] * body.side), local)


def _draw_motion(
    body: Body, points_mm: Tensor, spread: float, ranges: ShapeRanges, generator: torch.Generator
) -> Tensor:
    """Turn, stretch and bend: points as seen from the body's centre and axes."""
    amount, device = ranges.amount, points_mm.device
    limit = amount * ranges.rotation_deg
    turn = Rotation.from_euler("xyz", [uniform(generator, -limit, limit) for _ in range(3)], degrees=True).as_matrix()
    stretch = amount * ranges.stretch * torch.randn(3, generator=generator, device=device)
    zoom = torch.exp(stretch - stretch.mean()) / spread
    local = (points_mm - body.centre_mm) @ (torch.as_tensor(turn, dtype=torch.float32, device=device) * zoom)
    along = local[..., 1] / body.reach_mm[1]
    bend = along.clamp_(-1, 1).square_().sub_(0.2)
    for axis in (0, 2):
        local[..., axis] += uniform(generator, -1, 1) * amount * ranges.bend_mm * bend
    return local


def _sample(body: Body, depth: Tensor, local_mm: Tensor) -> Tensor:
    """Interpolate a lattice at places seen from the body's centre; beyond the lattice its border goes on."""
    matrix, shift = body.world_to_lattice[:, :3], body.world_to_lattice[:, 3]
    size = torch.tensor(depth.shape, device=depth.device)
    # grid_sample wants coordinates from -1 to 1 over the lattice's outermost points, last axis first.
    scale = 2 / (size - 1)
    places = (local_mm @ (matrix * scale[:, None]).T + ((matrix @ body.centre_mm + shift) * scale - 1)).flip(-1)
    sampled: Tensor = functional.grid_sample(
        depth[None, None], places[None], mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled[0, 0]


def _level(depth: Tensor, voxels: float) -> Tensor:
    """Move a surface in or out until it holds as many voxels of the lattice."""
    reach, bins = 5.0, 2000
    # Samples lie between the lattice's points, where interpolation has rounded edges off: count there too.
    between = functional.avg_pool3d(depth[None], 2, stride=1)
    counts = torch.stack(
        [
            torch.histc(values, bins=bins, min=-reach, max=reach).flip(0).cumsum(0) + (values > reach).sum()
            for values in (depth, between)
        ]
    ).mean(dim=0)
    place = int((counts < voxels).sum())
    surface_mm = reach - (place + 0.5) * 2 * reach / bins
    return depth - surface_mm


def _carve(body: Body, ranges: ShapeRanges, generator: torch.Generator) -> Tensor:
    """Roughen a body's surface, and give dentate and interposed nucleus their form."""
    depth = body.depth_mm.float()
    thin = min(1.0, body.depth_limit_mm / 3)
    for wavelength_mm, bump_mm in zip((8, 4), ranges.bumps, strict=True):
        noise = smooth_noise(depth.shape, wavelength_mm / body.step_mm, generator)[0]
        depth = depth + ranges.amount * thin * bump_mm * noise
    if body.nucleus == "DN":
        return _make_bag(body, depth, ranges, generator)
    if body.nucleus == "IN":
        return _make_islands(body, depth, ranges, generator)
    return depth


def _lattice_mm(body: Body) -> Tensor:
    """Places of the lattice's points from the body's centre, (X, Y, Z, 3)."""
    device = body.depth_mm.device
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in body.depth_mm.shape]
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return (lattice - body.world_to_lattice[:, 3]) @ body.lattice_to_place.T - body.centre_mm


def _make_bag(body: Body, depth: Tensor, ranges: ShapeRanges, generator: torch.Generator) -> Tensor:
    """Crumple the dentate and open it towards the middle and the front; what lies in the mouth is not the nucleus."""
    folds = smooth_noise(depth.shape, uniform(generator, 2.8, 4.5) / body.step_mm, generator)[0]
    depth = depth + ranges.amount * uniform(generator, *ranges.fold_mm) * folds
    towards = torch.tensor(
        [-body.side * uniform(generator, 0.5, 1.0), uniform(generator, 0.1, 0.8), uniform(generator, 0.0, 0.6)],
    )
    towards = (towards / towards.norm()).to(depth.device)
    places = _lattice_mm(body) + towards * uniform(generator, -1.5, 2.5)
    out = places @ towards
    across = (places - out.clamp(min=0)[..., None] * towards).norm(dim=-1)
    mouth = ranges.amount * uniform(generator, *ranges.hilum_mm) + 0.25 * out.clamp(min=0)
    return torch.minimum(depth, across - mouth)


def _make_islands(body: Body, depth: Tensor, ranges: ShapeRanges, generator: torch.Generator) -> Tensor:
    """Part the interposed nucleus into globose (behind, medial) and emboliform (in front, lateral) island."""
    across = torch.tensor([body.side * uniform(generator, 0, 0.7), 1.0, uniform(generator, -0.3, 0.3)])
    across = (across / across.norm()).to(depth.device)
    gap_mm = ranges.amount * uniform(generator, *ranges.gap_mm)
    if gap_mm <= 0:
        return depth
    between = _lattice_mm(body) @ across - uniform(generator, -1.5, 0.5)
    return torch.minimum(depth, between.abs() - gap_mm / 2)


def to_device(head: ShapedHead, device: str | torch.device) -> ShapedHead:
    """Carry a head to the device that draws."""
    bodies = tuple(
        replace(
            body,
            depth_mm=body.depth_mm.to(device),
            world_to_lattice=body.world_to_lattice.to(device),
            centre_mm=body.centre_mm.to(device),
            reach_mm=body.reach_mm.to(device),
        )
        for body in head.bodies
    )
    return ShapedHead(head.labels.to(device), head.world_to_index.to(device), head.ground.to(device), bodies)
