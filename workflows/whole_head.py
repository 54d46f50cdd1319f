"""Magnitude images of whole heads with random contrast, and the brain in them, for training the brain mask.

Only the brain comes from labels. Fluid, skull, marrow, fat, muscles, eyes, air and neck are drawn around it by their
distance from the brain and by their typical position in the template, and every tissue gets a random intensity [1]_.

References
----------
.. [1] Hoopes A, et al. SynthStrip: skull-stripping for any brain image. NeuroImage 260 (2022) 119474.
   doi:10.1016/j.neuroimage.2022.119474
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.image.grids import Box, resample, sample_points, world_grid
from bids_dgmseg.image.masks import close_with_ball
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import draw_head_points
from bids_dgmseg.lab.simulate.artefacts import blur
from bids_dgmseg.lab.simulate.ranges import HeadRanges, chance, log_uniform, normal, smooth_noise, uniform

SPACING_MM = 3.0

SHAPE = (72, 80, 72)
"""Voxels of a simulated magnitude."""

_CENTRE_MM = (0.0, -18.0, 5.0)

_HEAD = HeadRanges(
    scale=(0.78, 1.06),
    axis_scale=(0.94, 1.06),
    rotation_deg=(35.0, 30.0, 30.0),
    shift_mm=(15.0, 22.0, 30.0),
    bends=((50.0, 6.0), (20.0, 2.0)),
)

_STEP_MM = 2.0
"""Of the grid on which the brain is kept."""

_BRAIN = {
    "white matter": (22, 33),
    "cortex": (21, 31, 32, 35, 36),
    "deep gray matter": (*range(1, 21), 27),
    "ventricles": (23, 24, 25),
    "fluid": (26,),
    "cerebellar cortex": (29,),
    "cerebellar white matter": (30, 34),
    "brainstem": (28,),
}
"""Tissue → labels of a template."""

_SULCUS_MM, _HULL_MM = 3.0, 14.0
"""Radii of the closings that give the brain with its sulci, and the inside of the skull."""

_INTENSITIES: Mapping[str, tuple[float, float]] = {
    "white matter": (0.5, 1.0),
    "cortex": (0.55, 1.1),
    "deep gray matter": (0.4, 1.0),
    "ventricles": (0.2, 1.3),
    "fluid": (0.2, 1.3),
    "cerebellar cortex": (0.55, 1.1),
    "cerebellar white matter": (0.5, 1.0),
    "brainstem": (0.5, 1.0),
    "dura": (0.1, 1.5),
    "bone": (0.0, 0.2),
    "marrow": (0.05, 1.2),
    "fat": (0.2, 2.0),
    "skin": (0.3, 1.5),
    "muscle": (0.25, 1.0),
    "mucosa": (0.4, 1.6),
    "glands": (0.3, 1.6),
    "vitreous body": (0.2, 1.4),
    "lens": (0.1, 0.8),
    "cord": (0.4, 1.1),
    "disc": (0.1, 1.0),
    "vessel": (0.05, 2.5),
}
"""Ranges in a gradient echo, relative."""

_ALIKE = {"cerebellar cortex": "cortex", "cerebellar white matter": "white matter", "brainstem": "white matter"}

_RANDOM_CONTRAST = 0.2
"""Probability that tissues have any intensity from 0 to 1."""


@dataclass(frozen=True)
class WholeHead:
    """A brain prepared for drawing heads around it."""

    maps: Tensor
    """Shape (C, X, Y, Z): fractions of the tissues of the brain, of the brain with its sulci, and the distances in mm
    from that and from the inside of the skull, negative inside."""
    world_to_index: Tensor
    """Shape (4, 4): mm of the template to voxels of `maps`."""


def prepare_whole_head(template: Volume) -> WholeHead:
    """Prepare a label template (see workflows/make_template); takes seconds."""
    grid = world_grid(Box((-100.0, -140.0, -105.0), (100.0, 105.0, 115.0)), (_STEP_MM,) * 3)
    fractions = [np.isin(template.array, labels).astype(np.float32) for labels in _BRAIN.values()]
    maps = [resample(template.with_array(fraction), grid, antialias=True).array for fraction in fractions]
    inside = np.sum(maps, axis=0) > 0.5
    brain, hull = (close_with_ball(inside, radius, grid.voxel_size_mm) for radius in (_SULCUS_MM, _HULL_MM))
    maps.append(ndimage.gaussian_filter(brain.astype(np.float32), 0.5))
    for mask in (brain, hull):
        without, within = (ndimage.distance_transform_edt(part, sampling=_STEP_MM) for part in (~mask, mask))
        maps.append((without - within).astype(np.float32))
    inverse = torch.tensor(np.linalg.inv(grid.affine), dtype=torch.float32)
    stacked = torch.from_numpy(np.stack(maps, axis=-1)).movedim(-1, 0)  # in this memory layout, interpolation is fast
    return WholeHead(stacked, inverse)


def draw_magnitude(head: WholeHead, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a magnitude image of a head.

    Parameters
    ----------
    head : WholeHead
        The brain.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    magnitude : Tensor of shape `SHAPE`
        Signal in any unit, not negative, with voxels of `SPACING_MM`; 0 outside the field of view.
    brain : Tensor of shape `SHAPE`, uint8
        1 in the brain and its sulci within the field of view.
    """
    points = draw_head_points(SHAPE, SPACING_MM, centre_mm=_CENTRE_MM, ranges=_HEAD, generator=generator)
    indices = points @ head.world_to_index[:3, :3].T + head.world_to_index[:3, 3]
    *tissues, brain, from_brain, from_hull = sample_points(head.maps, indices, extend=True)
    drawing = _Drawing(points, torch.lerp(from_brain, from_hull, uniform(generator, 0, 1)), generator)
    drawing.draw_around_brain()
    signal = drawing.signal * (1 - torch.stack(tissues).sum(dim=0).clamp(max=1))
    for name, fraction in zip(_BRAIN, tissues, strict=True):
        signal += fraction * drawing.levels[name]
    signal = _lose_signal_near_air(signal, drawing.air * (drawing.depth_mm > 0), generator)
    if chance(generator, 0.05):  # the skull has been stripped already
        signal = signal * (from_brain < uniform(generator, 0, 6))
    signal = _degrade(signal, drawing.depth_mm, generator)
    view = _draw_field_of_view(generator)
    return signal * view, ((brain > 0.5) & view).to(torch.uint8)


class _Drawing:
    """The head around a brain, drawn from the outside inwards: what is drawn later covers what is there."""

    def __init__(self, points_mm: Tensor, from_brain_mm: Tensor, generator: torch.Generator) -> None:
        self.points_mm = points_mm.permute(3, 0, 1, 2).contiguous()
        self.from_brain_mm, self.generator = from_brain_mm, generator
        self.signal, self.air = torch.zeros_like(from_brain_mm), torch.zeros_like(from_brain_mm)
        self.depth_mm = torch.zeros_like(from_brain_mm)
        """Below the skin."""
        self.levels = self._draw_levels()

    def _draw_levels(self) -> dict[str, Tensor]:
        """Draw the intensity and texture of every tissue."""
        random = chance(self.generator, _RANDOM_CONTRAST)
        textures = [self.noise(self.u(4, 10)), self.noise(self.u(10, 40))]
        levels = {}
        for name, (low, high) in _INTENSITIES.items():
            level = self.u(0, 1) if random else self.u(low, high)
            levels[name] = level * (1 + self.u(0, 0.25) * textures[int(self.u(0, 2))])
        if chance(self.generator, 0.8):  # the same tissues above and below the tentorium
            for name, alike in _ALIKE.items():
                levels[name] = self.u(0.85, 1.15) * levels[alike]
        if chance(self.generator, 0.2):  # gray and white matter alike, as after a short echo time
            for name in _BRAIN:
                if name not in ("ventricles", "fluid"):
                    levels[name] = 0.9 * levels["white matter"] + 0.1 * levels[name]
        return levels

    def u(self, low: float, high: float) -> float:
        return uniform(self.generator, low, high)

    def noise(self, wavelength_mm: float) -> Tensor:
        return smooth_noise(SHAPE, wavelength_mm / SPACING_MM, self.generator)[0]

    def thickness(self, low_mm: float, high_mm: float) -> Tensor:
        """Thickness of a layer, which varies over the head."""
        return self.u(low_mm, high_mm) * torch.exp(self.u(0.1, 0.7) * self.noise(self.u(25, 60)))

    def ball(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], jitter: float = 4.0
    ) -> Tensor:
        """Approximate distance in mm from the surface of an ellipsoid of the template, positive inside."""
        shift = jitter * torch.randn(3, generator=self.generator)
        scale = min(radii) / torch.tensor(radii)
        squared = torch.zeros(())
        for axis in range(3):
            local = self.points_mm[axis] * scale[axis] - (centre[axis] + shift[axis]) * scale[axis]
            squared = local.square_().add_(squared)
        return min(radii) - squared.sqrt_()

    def pair(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], jitter: float = 4.0
    ) -> Tensor:
        """Mirror an ellipsoid to the other side."""
        x, y, z = centre
        return torch.maximum(self.ball((-x, y, z), radii, jitter), self.ball((x, y, z), radii, jitter))

    def paint(self, name: str, inside_mm: Tensor) -> None:
        """Cover everything where a distance is positive with a tissue, with partial volumes at its border."""
        fraction = (inside_mm / SPACING_MM + 0.5).clamp_(0, 1)
        self.signal = (
            torch.lerp(self.signal, self.levels[name], fraction) if name != "air" else self.signal * (1 - fraction)
        )
        self.air = torch.lerp(self.air, torch.ones(()) if name == "air" else torch.zeros(()), fraction)

    def draw_around_brain(self) -> None:
        """Draw everything around the brain."""
        u = self.u
        _, y, z = self.points_mm
        fluid = self.thickness(0.3, 5.0)
        inner, outer = fluid + self.thickness(0.8, 3.0), self.thickness(0.8, 3.0)
        base = 1 + u(0, 1.5) * torch.sigmoid((-25 - z) / 8)  # bone is thicker below the brain
        marrow = self.thickness(0.3, 5.0) * base
        skull = inner + marrow + outer
        fat, skin = self.thickness(1.0, 9.0), u(0.5, 3.0)
        scalp = skull + fat + skin + self.thickness(0.0, 4.0)
        self._draw_outline(scalp)
        self._draw_soft_tissue(fat, skin)
        self._draw_neck()
        from_brain = self.from_brain_mm
        lower = torch.sigmoid((z + u(60, 80)) / 3)  # no skull in the neck
        self.paint("bone", torch.minimum(skull - from_brain, 20 * lower - 5))
        self.paint("marrow", torch.minimum(inner + marrow - from_brain, from_brain - inner))
        self.paint("bone", inner - from_brain)
        self._draw_air(fluid)
        self._draw_canal()
        self.paint("dura", fluid + u(0.3, 1.5) - from_brain)
        self.paint("fluid", fluid - from_brain)
        if chance(self.generator, 0.7):  # superior sagittal sinus
            x = self.points_mm[0]
            sinus = torch.minimum(u(2, 5) - x.abs(), u(3, 7) - (from_brain - 1).abs())
            self.paint("vessel", torch.minimum(sinus, torch.maximum(z - 20, -60 - y)))
        if chance(self.generator, 0.7):
            vessels = u(0.05, 0.14) - self.noise(u(15, 30)).square().add(self.noise(u(15, 30)).square()).sqrt()
            near = torch.minimum(from_brain + 3, u(4, 30) - from_brain)
            self.paint("vessel", torch.minimum(torch.minimum(20 * vessels, near), self.depth_mm))

    def _draw_outline(self, scalp: Tensor) -> None:
        """Find the depth below the skin: scalp, face, nose, ears, neck, and air around them."""
        u = self.u
        x, y, z = self.points_mm
        parts = [scalp - self.from_brain_mm]
        parts.append(self.ball((0, u(30, 50), u(-75, -50)), (u(55, 72), u(48, 66), u(55, 80))))
        parts.append(self.ball((0, u(88, 102), u(-65, -45)), (u(9, 16), u(14, 24), u(18, 28))))
        if chance(self.generator, 0.8):
            parts.append(self.pair((u(72, 84), u(-35, -15), u(-55, -35)), (u(4, 9), u(10, 18), u(18, 30))))
        slope, radius_x, radius_y = u(-0.3, 0.5), u(45, 75), u(45, 75)
        along = (y + u(20, 50) + slope * (z + 60)) / radius_y
        radial = ((x / radius_x).square() + along.square()).sqrt()
        neck = torch.minimum((1 - radial) * min(radius_x, radius_y), u(-60, -40) - z)
        shoulders = u(-230, -160) - z
        parts += [neck, torch.minimum(shoulders, 160 - x.abs())]
        self.depth_mm = torch.stack(parts).amax(dim=0) + u(0, 4) * self.noise(u(20, 50))

    def _draw_soft_tissue(self, fat: Tensor, skin: float) -> None:
        """Draw skin, fat and a mixture of muscles, fat, glands and bone below them."""
        u, depth = self.u, self.depth_mm
        self.paint("skin", depth)
        self.paint("fat", depth - skin)
        self.paint("muscle", depth - skin - fat)
        deep = depth - skin - fat - u(0, 5)
        for name in ("fat", "glands", "bone", "marrow", "mucosa", "fat"):
            blobs = 8 * (self.noise(u(9, 35)) - u(0.1, 0.8))
            self.paint(name, torch.minimum(blobs, deep))
        orbit = self.pair((u(27, 33), u(46, 54), u(-42, -34)), (u(16, 21), u(20, 28), u(15, 20)), 2.0)
        self.paint("bone", orbit + u(0, 3))
        self.paint("fat", orbit)
        cone = 6 * (self.noise(u(6, 12)) - u(0.2, 0.8))
        self.paint("muscle", torch.minimum(cone, orbit))
        eye, size, wall = (u(29, 35), u(55, 66), u(-44, -34)), u(10.5, 13.5), u(0, 1.5)
        seed = self.generator.get_state()
        for name, thinner in (("muscle", 0.0), ("vitreous body", wall)):
            self.generator.set_state(seed)
            self.paint(name, self.pair(eye, (size,) * 3, 2.0) - thinner)
        self.generator.set_state(seed)
        self.paint("lens", self.pair((eye[0], eye[1] + 0.7 * size, eye[2]), (4.5, u(2, 3.5), 4.5), 2.0))

    def _draw_neck(self) -> None:
        """Draw vertebrae with discs, and vessels of the neck."""
        u = self.u
        x, y, z = self.points_mm
        slope, radius, period = u(-0.2, 0.3), u(9, 14), u(13, 20)
        column = radius - (x.square() + (y + u(22, 30) + slope * (z + 70)).square()).sqrt()
        column = torch.minimum(column, u(-72, -60) - z)
        self.paint("bone", column + u(0, 3))
        self.paint("marrow", column)
        gaps = u(1, 3) - (torch.remainder(z, period) - period / 2).abs()
        self.paint("disc", torch.minimum(column, gaps))
        for centre_mm in (u(20, 32), u(20, 38)):
            tube = u(2.5, 6) - ((x.abs() - centre_mm).square() + (y + u(-5, 25)).square()).sqrt()
            self.paint("vessel", torch.minimum(tube, u(-60, -40) - z))

    def _draw_air(self, fluid: Tensor) -> None:
        """Draw sinuses, nose, throat and the cells of the temporal bone; none touches the brain."""
        u = self.u
        x, y, z = self.points_mm
        outside = self.from_brain_mm - fluid - u(0.5, 2.5)
        cavities = [
            (self.ball((0, u(74, 84), u(-22, -8)), (u(5, 26), u(4, 11), u(5, 18))), 0.8),
            (self.ball((0, u(45, 62), u(-52, -40)), (u(7, 17), u(18, 34), u(12, 24))), 0.9),
            (self.pair((u(23, 29), u(48, 60), u(-72, -60)), (u(8, 18), u(9, 18), u(10, 20))), 0.85),
            (self.ball((0, u(14, 28), u(-48, -36)), (u(6, 17), u(6, 15), u(5, 12))), 0.85),
            (self.ball((0, u(20, 40), u(-100, -85)), (u(5, 20), u(10, 30), u(3, 15))), 0.5),
        ]
        for inside, probability in cavities:
            if chance(self.generator, probability):
                walls = inside - u(0, 6) * self.noise(u(6, 15)).abs()
                self.paint("mucosa", torch.minimum(walls + u(0, 2), outside))
                self.paint("air", torch.minimum(walls, outside))
        cells = self.pair((u(46, 56), u(-40, -22), u(-60, -44)), (u(8, 22), u(8, 20), u(8, 22)))
        self.paint("bone", torch.minimum(cells + 4, outside))
        self.paint("air", torch.minimum(torch.minimum(cells, 8 * (self.noise(u(6, 10)) - u(-0.6, 0.5))), outside))
        canal = u(1.5, 4.5) - ((y + u(15, 30)).square() + (z + u(42, 54)).square()).sqrt()
        self.paint("air", torch.minimum(torch.minimum(canal, x.abs() - u(40, 55)), outside))
        throat = (1 - ((x / u(6, 16)).square() + ((y - u(-5, 15)) / u(4, 10)).square()).sqrt()) * 5
        self.paint("air", torch.minimum(torch.minimum(throat, u(-65, -50) - z), outside))

    def _draw_canal(self) -> None:
        """Draw the spinal canal with the cord, which continues the brainstem."""
        u = self.u
        x, y, z = self.points_mm
        away = (x.square() + (y + 43 + u(-0.2, 0.4) * (z + 68)).square()).sqrt()
        below = u(-66, -60) - z
        width, cord = u(8, 13), u(3.5, 6.5)
        self.paint("fluid", torch.minimum(width - away, below))
        self.paint("cord", torch.minimum(cord - away, below))


def _lose_signal_near_air(signal: Tensor, air: Tensor, generator: torch.Generator) -> Tensor:
    """Dephase the signal near air in the head, where the field is inhomogeneous."""
    if chance(generator, 0.25):
        return signal
    reach = [uniform(generator, 1.5, 4.5) for _ in range(3)]
    return signal * torch.exp(-log_uniform(generator, 0.5, 30.0) * blur(air, reach))


def _degrade(signal: Tensor, depth_mm: Tensor, generator: torch.Generator) -> Tensor:
    """Apply coil sensitivity, resolution, ghosts and noise."""

    def u(low: float, high: float) -> float:
        return uniform(generator, low, high)

    bias = sum(u(0, 0.6) * smooth_noise(SHAPE, u(70, 250) / SPACING_MM, generator)[0] for _ in range(2))
    signal = signal.clamp(min=0) * torch.exp(torch.as_tensor(bias))
    if chance(generator, 0.6):  # surface coils, or the dielectric effect of a high field
        signal = signal * (1 + u(-0.6, 3.0) * torch.exp(-depth_mm.clamp(min=0) / u(15, 50)))
    sigma = [u(0.0, 0.5)] * 3
    if chance(generator, 0.4):  # thick slices
        sigma[int(u(0, 3))] += u(0.2, 0.9)
    signal = blur(signal, sigma)
    if chance(generator, 0.25):
        axis = int(u(0, 3))
        ghost = signal.roll(int(u(0.3, 0.7) * SHAPE[axis]), axis)
        signal = signal + log_uniform(generator, 0.005, 0.1) * ghost
    scale = float(signal.quantile(0.98))
    sd = scale * log_uniform(generator, 0.002, 0.12)
    floor = scale * log_uniform(generator, 0.001, 0.08)
    real, imaginary = (sd * torch.randn(SHAPE, generator=generator) for _ in range(2))
    noisy = ((signal + real).square() + imaginary.square() + floor**2).sqrt()
    if chance(generator, 0.3):  # the background has been set to 0
        noisy = noisy * (noisy > u(1.0, 4.0) * (sd + floor))
    return noisy


def _draw_field_of_view(generator: torch.Generator) -> Tensor:
    """Draw the part of the grid that is imaged: an oblique box."""
    axes = [(torch.arange(size) - (size - 1) / 2) * SPACING_MM for size in SHAPE]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    oblique = chance(generator, 0.4)
    view = torch.ones(SHAPE, dtype=torch.bool)
    tilt = [0.25 * normal(generator) if oblique else 0.0 for _ in range(3)]
    x, y, z = points.unbind(-1)
    lines = (x + tilt[0] * y, y - tilt[0] * x + tilt[1] * z, z - tilt[1] * y + tilt[2] * x)
    limits = ((0.25, 65, 110), (0.35, 75, 125), (0.5, 55, 110))
    for along, (probability, low, high) in zip(lines, limits, strict=True):
        for sign in (-1, 1):
            if chance(generator, probability):
                view &= sign * along < uniform(generator, low, high)
    if chance(generator, 0.15):  # a slab that cuts the brain
        view &= (z - tilt[1] * y - uniform(generator, -40, 50)).abs() < uniform(generator, 20, 50)
    return view
