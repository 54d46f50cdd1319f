"""Details below the level of labels: texture, tracts, veins and small lesions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.grids import sample_points
from bids_dgmseg.lab.simulate.anatomy import IN_VEIN, LAST_NUCLEUS, RIGHT_TISSUES, merge_parts
from bids_dgmseg.lab.simulate.ranges import (
    DetailRanges,
    PathologyRanges,
    chance,
    cpu_generator,
    log_uniform,
    smooth_noise,
    uniform,
)
from bids_dgmseg.models.structures import STRUCTURES

_VISIBLE_PPM = 0.04
"""By which a visible vein raises the susceptibility."""

Path = tuple[tuple[float, float, float], ...]

_VENTRICLE_EDGE = ((12.0, 22.0, 8.0), (17.0, 8.0, 16.0), (20.0, -8.0, 21.0), (22.0, -25.0, 22.0), (26.0, -42.0, 16.0))
"""Points along the upper lateral edge of the right lateral ventricle (mm of the template)."""

_VEINS: tuple[tuple[Path, tuple[float, float]], ...] = (
    (((2, 0, 9), (2, -10, 12), (2, -22, 11), (2, -33, 6), (0.5, -40, 3)), (0.6, 1.2)),  # internal cerebral
    (((3, -1, 9), (7, -1, 13), (12, -8, 17), (17, -18, 19)), (0.35, 0.8)),  # thalamostriate
    (((2.5, 0, 9), (3, 8, 8), (4, 15, 6), (8, 24, 8)), (0.35, 0.7)),  # of the septum
    (((12, -3, -16), (16, -10, -17), (20, -20, -13), (19, -30, -8), (11, -38, -1), (1, -41, 3)), (0.4, 1.0)),  # basal
    (((3, -36, 6), (14, -38, 14), (22, -40, 10)), (0.3, 0.7)),  # of the atrium
    (((18, 0, -10), (22, 0, 0), (24, -1, 9), (22, -4, 20)), (0.2, 0.45)),  # striate
    (
        ((17, -18, 19), (15, -5, 19), (12, 8, 14), (9, 15, 8)),
        (0.2, 0.6),
    ),  # of the caudate, on the wall of the ventricle
    (_VENTRICLE_EDGE, (0.3, 1.1)),  # longitudinal, on the edge of the ventricle
    (((11, -38, -1), (22, -38, 4), (27, -44, 12), (24, -40, 20)), (0.25, 0.7)),  # lateral of the atrium
    (((9, -20, 18), (14, -30, 20), (20, -38, 18)), (0.2, 0.6)),  # on the floor of the body
    (((7, -52, -34), (11, -56, -35), (15, -60, -36)), (0.2, 0.5)),  # of the dentate
    (((0, -40, 3), (0, -45, 6), (0, -60, 8), (0, -80, 2)), (0.8, 1.8)),  # great and straight sinus
    (((0.5, -42, 2), (0, -48, -15), (1, -52, -22)), (0.3, 0.6)),  # precentral
)
"""Courses in the right hemisphere (mm of the template), mirrored for the left, and radii in mm of the scan."""

_TRACTS: tuple[tuple[Path, int, tuple[float, float], tuple[float, float]], ...] = (
    (((12, 4, 8), (18, -8, 8), (23, -18, 8), (24, -24, 4)), 22, (-0.085, 0.005), (2.0, 5.0)),  # internal capsule
    (((31, 12, 0), (35, -2, 0), (34, -16, 3)), 22, (-0.065, 0.005), (0.6, 1.5)),  # external capsule
    (((25, -26, 2), (30, -35, 4), (30, -50, 4), (24, -70, 4)), 22, (-0.04, 0.005), (2.0, 4.5)),  # optic radiation
    (((9, -8, -17), (14, -14, -16), (17, -22, -13)), 28, (-0.05, 0.0), (1.5, 3.0)),  # crus cerebri
    (((12, -26, 7), (16, -30, 5)), 27, (-0.01, 0.035), (3.0, 6.0)),  # pulvinar
    (((14, 14, 0), (21, 13, 1)), 22, (0.0, 0.05), (0.5, 1.2)),  # bridges between caudate and putamen
    (((15, 8, 6), (23, 7, 6)), 22, (0.0, 0.05), (0.5, 1.2)),
    (((16, 2, 12), (24, 1, 10)), 22, (0.0, 0.05), (0.5, 1.2)),
)
"""Courses in the right hemisphere (mm of the template), tissue that changes, change in ppm, radius in mm."""

_LESIONS: tuple[tuple[tuple[float, float, float], float, tuple[float, float], tuple[float, float], float], ...] = (
    ((18, -3, -1), 2.5, (0.7, 2.5), (-0.25, 0.35), 0.15),  # calcification of the pallidum
    ((24, -38, 8), 3.0, (1.5, 4.0), (-0.3, 0.25), 0.5),  # choroid plexus
    ((10, -18, 13), 3.0, (0.8, 2.0), (-0.1, 0.2), 0.4),  # choroid plexus in the body of the ventricle
    ((0, -33, 1), 1.5, (1.5, 3.5), (-0.4, 0.1), 0.25),  # pineal gland
)
"""Centre in the right hemisphere and its SD in mm, radius in mm, ppm, probability per side."""

_SPOT_CENTRES = (
    ((25.0, 2.0, 0.0), (4.0, 9.0, 6.0)),
    ((13.0, 12.0, 10.0), (4.0, 8.0, 6.0)),
    ((10.0, -17.0, -11.0), (4.0, 4.0, 4.0)),
    ((14.0, -58.0, -35.0), (4.0, 5.0, 4.0)),
)
"""Centre in the right hemisphere and its SD per axis, in mm."""


def add_details(
    chi: Tensor,
    labels: Tensor,
    points_mm: Tensor,
    *,
    spacing_mm: float,
    ranges: DetailRanges,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Add texture, tracts, veins and small lesions to a map in ppm, 0 outside the head.

    The map and its labels have shape (X, Y, Z), the template coordinates of their voxels (X, Y, Z, 3). Returns the map
    and its labels, to which `IN_VEIN` is added in visible veins.
    """
    shape, inside = tuple(chi.shape), labels > 0
    nuclei = inside & (labels <= LAST_NUCLEUS)

    def noise(amplitude: tuple[float, float], wavelength_mm: tuple[float, float]) -> Tensor:
        wavelength = uniform(generator, *wavelength_mm) / spacing_mm
        return uniform(generator, *amplitude) * smooth_noise(shape, wavelength, generator)[0]

    chi = chi * (1 + nuclei * noise(ranges.texture, (3, 8)))
    chi = chi + noise(ranges.fine_ppm, (2.5, 6)) + noise(ranges.slow_ppm, (10, 25))
    if chance(generator, 0.8):
        near = blurred_mask(nuclei, uniform(generator, 1.0, 3.0) / spacing_mm)
        chi = chi - 2 * near * ((labels == 22) | (labels == 28)) * uniform(generator, *ranges.halo_ppm)
    locator = TemplateLocator(points_mm, spacing_mm)
    chi = _add_tracts(chi, labels, locator, ranges, generator)
    vein_ppm = uniform(generator, *ranges.vein_ppm)
    without_veins = chi
    if chance(generator, 0.8):
        # Small vessels: thin tubes along the lines where two smooth noise fields are both near zero.
        wavelength = uniform(generator, 7.5, 14) / spacing_mm
        first, second = smooth_noise(shape, wavelength, generator, 2)
        width = uniform(generator, 0.04, 0.15)
        vessels = (1.4 - first.square_().add_(second.square_()).sqrt_() / width).clamp_(0, 1)
        chi = chi + vessels * ~nuclei * uniform(generator, 0.3, 1.0) * vein_ppm
    if chance(generator, 0.9):
        chi = _add_veins(chi, locator, vein_ppm, ranges, generator)
    covering = (labels > LAST_NUCLEUS) & (chi - without_veins > _VISIBLE_PPM)
    for tissue in RIGHT_TISSUES:
        covering &= labels != tissue
    chi = _add_spots(chi, locator, ranges, generator)
    return chi * inside, torch.where(covering, labels + IN_VEIN, labels)


class TemplateLocator:
    """Finds points of the template in a scan with given template coordinates (X, Y, Z, 3) of its voxels."""

    def __init__(self, points_mm: Tensor, spacing_mm: float) -> None:
        self.shape, self.spacing_mm = points_mm.shape[:3], spacing_mm
        self._points = points_mm.permute(3, 0, 1, 2)
        self._size = torch.tensor(self.shape, device=points_mm.device)
        middle = [size // 2 for size in self.shape]
        lines = points_mm[:, middle[1], middle[2]], points_mm[middle[0], :, middle[2]], points_mm[middle[0], middle[1]]
        slopes = torch.stack([(line[-1] - line[0]) / (len(line) - 1) for line in lines])
        self._inverse_slopes, _ = torch.linalg.inv_ex(slopes)  # unlike `inv` it does not wait for a GPU

    def find_all(self, paths_mm: Sequence[Tensor]) -> Sequence[Tensor]:
        """Find several lists of points at once; otherwise like `find`."""
        if not paths_mm:
            return ()
        indices = self.find(torch.cat(list(paths_mm)).to(self._points.device))
        return torch.split(indices, [len(path) for path in paths_mm])

    def find(self, template_mm: Tensor) -> Tensor:
        """Find the fractional voxel indices (N, 3) of template points (N, 3) by Newton's method with a fixed slope."""
        indices = (self._size - 1).expand(len(template_mm), 3) / 2
        for _ in range(5):
            here = sample_points(self._points, indices[None, None], extend=True)[:, 0, 0].T
            # Beyond the scan, extrapolate with the same slope.
            beyond = indices - indices.clamp(min=0).minimum(self._size - 1)
            indices = indices + (template_mm - here) @ self._inverse_slopes - beyond
        return indices

    def volume_fractions(self, indices: Tensor, radius_mm: float, soft: float = 1.0) -> tuple[Tensor, Tensor]:
        """Compute the fraction of voxels filled by balls at voxel indices (N, 3), whose edges are `soft` voxels wide.

        Returns flat voxel indices (M,), some of them repeated, and fractions (M,), some of them 0.
        """
        reach = math.ceil(radius_mm / self.spacing_mm + soft / 2)
        steps = torch.arange(-reach, reach + 1, device=indices.device)
        offsets = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1).view(-1, 3)
        voxels = indices.round().long()[:, None] + offsets
        radius = radius_mm / self.spacing_mm
        depth = (radius - (voxels - indices[:, None]).norm(dim=-1)) / soft + 0.5
        # A ball or tube thinner than a voxel fills the fraction given by its cross-section.
        fraction = depth.clamp(0, 1) / min(1.0, radius / soft + 0.5) * min(1.0, math.pi * radius**2)
        # Zero, do not remove, voxels beyond the scan: counting them would make a GPU wait.
        fraction = fraction * ((voxels >= 0) & (voxels < self._size)).all(dim=-1)
        x, y, z = voxels.clamp(min=0).minimum(self._size - 1).view(-1, 3).unbind(-1)
        return (x * self.shape[1] + y) * self.shape[2] + z, fraction.view(-1)

    def paint(self, courses_mm: Sequence[Tensor], calibres: Sequence[tuple[float, float]]) -> Tensor:
        """Return the fraction (X, Y, Z) of each voxel that balls along courses (N, 3) fill; the largest wins.

        A calibre is the radius in mm of the balls and the factor of their fractions.
        """
        layer = torch.zeros(math.prod(self.shape), device=self._points.device)
        for indices, (radius_mm, strength) in zip(self.find_all(courses_mm), calibres, strict=True):
            numbers, fraction = self.volume_fractions(indices, radius_mm)
            layer.scatter_reduce_(0, numbers, fraction * strength, "amax")
        return layer.view(self.shape)


def mirrored(path: Path, side: float) -> Tensor:
    """Return a path of the right hemisphere on one side: -1 left, 1 right."""
    return torch.tensor(path, dtype=torch.float32) * torch.tensor([side, 1.0, 1.0])


def draw_side(generator: torch.Generator) -> float:
    """Draw a hemisphere: -1 left, 1 right."""
    return -1.0 if chance(generator, 0.5) else 1.0


def draw_shift(sd_mm: float | Sequence[float], generator: torch.Generator) -> Tensor:
    """Draw a displacement (1, 3) in mm; the SD is the same for all axes or given per axis."""
    return torch.tensor(sd_mm) * torch.randn((1, 3), generator=cpu_generator(generator))


def draw_course(path: Tensor, generator: torch.Generator) -> Tensor:
    """Draw points (N, 3), 0.5 mm apart, along a displaced and tortuous path (P, 3); on the CPU."""

    def stretch(values: Tensor) -> Tensor:
        stretched: Tensor = functional.interpolate(values.T[None], size=count, mode="linear", align_corners=True)
        return stretched[0].T

    path = path + 1.2 * torch.randn(path.shape, generator=cpu_generator(generator))
    count = max(2, round(2 * float((path[1:] - path[:-1]).norm(dim=-1).sum())))
    tortuosity = torch.randn((max(2, count // 10), 3), generator=cpu_generator(generator))
    return stretch(path) + 0.5 * stretch(tortuosity)


def _add_veins(
    chi: Tensor, locator: TemplateLocator, vein_ppm: float, ranges: DetailRanges, generator: torch.Generator
) -> Tensor:
    """Add the deep cerebral veins."""
    courses: list[Tensor] = []
    calibres: list[tuple[float, float]] = []
    for side in (-1.0, 1.0):
        for path, radius_mm in _VEINS:
            if chance(generator, ranges.veins):
                courses.append(draw_course(mirrored(path, side), generator))
                calibres.append((uniform(generator, *radius_mm), uniform(generator, 0.5, 1.0)))
        for _ in range(round(uniform(generator, *ranges.medullary))):
            courses.append(draw_course(mirrored(draw_medullary(generator), side), generator))
            calibres.append((uniform(generator, 0.15, 0.5), uniform(generator, 0.4, 1.0)))
    return chi + locator.paint(courses, calibres) * (vein_ppm - chi)


def draw_medullary(generator: torch.Generator) -> Path:
    """Draw a vein from the upper lateral edge of the lateral ventricle into white matter, in the right hemisphere."""
    along = uniform(generator, 0, len(_VENTRICLE_EDGE) - 1.001)
    first, second = _VENTRICLE_EDGE[int(along)], _VENTRICLE_EDGE[int(along) + 1]
    start = [a + (along % 1) * (b - a) for a, b in zip(first, second, strict=True)]
    length, angle = uniform(generator, 8, 30), uniform(generator, 0.1, 1.4)
    step = (length * math.cos(angle), length * uniform(generator, -0.4, 0.4), length * math.sin(angle))
    x, y, z = start
    return ((x, y, z), (x + step[0] / 2, y + step[1] / 2, z + step[2] / 2), (x + step[0], y + step[1], z + step[2]))


def blurred_mask(mask: Tensor, sigma_voxels: float) -> Tensor:
    """Smooth a mask (X, Y, Z) by three box filters, whose result is nearly Gaussian."""
    width = 2 * max(1, round(sigma_voxels)) + 1
    smooth = mask.float()[None]
    for _ in range(3):
        smooth = functional.avg_pool3d(smooth, width, stride=1, padding=width // 2)
    return smooth[0]


def _add_tracts(
    chi: Tensor, labels: Tensor, locator: TemplateLocator, ranges: DetailRanges, generator: torch.Generator
) -> Tensor:
    """Add differences between fibre tracts, due to iron, myelin and orientation to B0."""
    courses: list[Tensor] = []
    changes: list[tuple[float, int, float]] = []
    for path, tissue, ppm, radius_mm in _TRACTS:
        if not chance(generator, ranges.tracts):
            continue
        added = uniform(generator, *ppm)
        for side in (-1.0, 1.0):
            courses.append(draw_course(mirrored(path, side), generator)[::4])
            changes.append((added, tissue, uniform(generator, *radius_mm)))
    for indices, (added, tissue, radius) in zip(locator.find_all(courses), changes, strict=True):
        numbers, fraction = locator.volume_fractions(indices, radius, 2.0)
        layer = torch.zeros(chi.numel(), device=chi.device).scatter_reduce_(0, numbers, fraction, "amax")
        chi = chi + added * layer.view(chi.shape) * (labels == tissue)
    return chi


def _add_spots(chi: Tensor, locator: TemplateLocator, ranges: DetailRanges, generator: torch.Generator) -> Tensor:
    """Add calcifications, and vessels and perivascular spaces cut across."""
    spots: list[Tensor] = []
    contrasts: list[tuple[float, float]] = []
    for centre, sd_mm, radius_mm, ppm, probability in _LESIONS:
        for side in (-1.0, 1.0):
            if chance(generator, ranges.lesions * probability):
                spots.append(mirrored((centre,), side) + draw_shift(sd_mm, generator))
                contrasts.append((uniform(generator, *radius_mm), uniform(generator, *ppm)))
    for _ in range(round(uniform(generator, *ranges.spots))):
        around, sd = _SPOT_CENTRES[int(uniform(generator, 0, len(_SPOT_CENTRES)))]
        spots.append(mirrored((around,), draw_side(generator)) + draw_shift(sd, generator))
        contrasts.append((uniform(generator, 0.3, 1.1), uniform(generator, -0.1, 0.2)))
    flat = chi.flatten().clone()
    for indices, (radius, ppm_here) in zip(locator.find_all(spots), contrasts, strict=True):
        numbers, fraction = locator.volume_fractions(indices, radius)
        flat.index_add_(0, numbers, fraction * (ppm_here - flat[numbers]))
    return flat.view(chi.shape)


_CALCIFICATION_MM = (3.0, 6.0)
"""Size of calcifications in the pallidum."""

_BLEEDING_CENTRES = (
    ((31.0, -3.0, 2.0), (3.0, 10.0, 6.0)),  # external capsule
    ((14.0, -18.0, 8.0), (3.0, 5.0, 4.0)),  # thalamus
    ((32.0, -45.0, 22.0), (8.0, 12.0, 8.0)),  # parietal lobe
    ((26.0, 28.0, 14.0), (8.0, 8.0, 8.0)),  # frontal lobe
    ((20.0, -62.0, -36.0), (6.0, 6.0, 5.0)),  # cerebellum
)
"""Of haemorrhages in the right hemisphere: mean and SD per axis in mm of the template."""

_BRAIN_CENTRE_MM, _BRAIN_SD_MM = (0.0, -20.0, 5.0), (30.0, 32.0, 25.0)
"""Of microbleeds."""

_WHITE_MATTER, _FLUID = (22, 33), (23, 24, 25, 26)


@dataclass(frozen=True)
class Pathology:
    """Pathology of one head."""

    volume: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its volume."""
    iron: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its iron."""
    wider_mm: float = 0.0
    """Outward shift of each wall of the ventricles."""
    mineral_ppm: float = 0.0
    """In calcifications of the pallidum; 0 without any."""


HEALTHY = Pathology()


def draw_pathology(ranges: PathologyRanges, generator: torch.Generator) -> Pathology:
    """Draw the pathology of one head; diseases may coincide."""
    volume: dict[str, float] = {}
    iron: dict[str, float] = {}
    wider_mm = mineral_ppm = 0.0
    if chance(generator, ranges.ataxia):
        volume["DN"] = uniform(generator, *ranges.dentate_volume)
        low, high = ranges.dentate_iron[:2], ranges.dentate_iron[2:]
        iron["DN"] = uniform(generator, *(high if chance(generator, 0.5) else low))
    if chance(generator, ranges.atrophy):
        volume |= {nucleus: uniform(generator, *ranges.striatal_volume) for nucleus in ("CN", "PUT")}
        wider_mm = uniform(generator, *ranges.wider_mm)
    if chance(generator, ranges.calcified):
        mineral_ppm = uniform(generator, *ranges.mineral_ppm)
    return Pathology(volume, iron, wider_mm, mineral_ppm)


def add_calcifications(
    chi: Tensor, labels: Tensor, pathology: Pathology, *, spacing_mm: float, generator: torch.Generator
) -> Tensor:
    """Add calcifications to the pallida of a map (X, Y, Z) in ppm; return it unchanged if there are none."""
    if pathology.mineral_ppm == 0:
        return chi
    pallida = merge_parts(labels)
    left, right = (structure.index for structure in STRUCTURES.both_sides(["GP"]))
    noise = smooth_noise(tuple(chi.shape), uniform(generator, *_CALCIFICATION_MM) / spacing_mm, generator)[0]
    fraction = (2 * noise - uniform(generator, -0.5, 1.5) + 0.5).clamp(0, 1) * ((pallida == left) | (pallida == right))
    return chi + fraction * (pathology.mineral_ppm - chi)


def add_lesions(
    chi: Tensor,
    labels: Tensor,
    points_mm: Tensor,
    *,
    spacing_mm: float,
    ranges: PathologyRanges,
    generator: torch.Generator,
) -> Tensor:
    """Draw lesions of white matter, wide perivascular spaces, microbleeds and haemorrhages.

    The map in ppm and its labels, in which veins may be marked by `IN_VEIN`, have shape (X, Y, Z), the template
    coordinates of their voxels (X, Y, Z, 3). Only microbleeds may lie in nuclei; labels do not change.
    """
    tissue, locator = labels % IN_VEIN, TemplateLocator(points_mm, spacing_mm)
    if chance(generator, ranges.white_matter):
        chi = _add_lesions_of_white_matter(chi, tissue, locator, ranges, generator)
    if chance(generator, ranges.spaces):
        spaces, radii_mm = [], []
        for side in (-1.0, 1.0):
            for _ in range(round(uniform(generator, *ranges.perivascular))):
                spaces.append(draw_course(mirrored(draw_medullary(generator)[1:], side), generator))
                radii_mm.append(uniform(generator, 0.25, 0.7))
        chi = _fill(chi, _paint(locator, spaces, radii_mm) * _is_any(tissue, _WHITE_MATTER), (-0.02, 0.03), generator)
    if chance(generator, ranges.microbleeds):
        bleeds, radii_mm = [], []
        for _ in range(round(log_uniform(generator, *ranges.bleeds))):
            bleeds.append(torch.tensor(_BRAIN_CENTRE_MM) + draw_shift(_BRAIN_SD_MM, generator))
            radii_mm.append(uniform(generator, 0.6, 2.5))
        solid = (tissue > 0) & ~_is_any(tissue, _FLUID)
        chi = _fill(chi, _paint(locator, bleeds, radii_mm) * solid, ranges.blood_ppm, generator)
    if chance(generator, ranges.haemorrhage):
        chi = _add_haemorrhage(chi, tissue, locator, ranges, generator)
    return chi


def _add_lesions_of_white_matter(
    chi: Tensor, tissue: Tensor, locator: TemplateLocator, ranges: PathologyRanges, generator: torch.Generator
) -> Tensor:
    """Add lesions of white matter, some with a bright rim."""
    lesions, radii_mm = [], []
    for _ in range(round(log_uniform(generator, *ranges.white_matter_lesions))):
        radii_mm.append(uniform(generator, 0.8, 4.0))
        _, middle, _ = draw_medullary(generator)
        lesions.append(_draw_stroke(mirrored((middle,), draw_side(generator)), radii_mm[-1], generator))
    inside = _paint(locator, lesions, radii_mm) * _is_any(tissue, _WHITE_MATTER)
    chi = chi + inside * uniform(generator, *ranges.white_matter_ppm)
    if chance(generator, 0.125):
        chi = chi + 4 * inside * (1 - inside) * uniform(generator, *ranges.rim_ppm)
    return chi


def _add_haemorrhage(
    chi: Tensor, tissue: Tensor, locator: TemplateLocator, ranges: PathologyRanges, generator: torch.Generator
) -> Tensor:
    """Add a haemorrhage beside nuclei, some with a cavity or clot that is less bright than the rim."""
    centre, sd_mm = _BLEEDING_CENTRES[int(uniform(generator, 0, len(_BLEEDING_CENTRES)))]
    radius_mm = uniform(generator, 3.0, 9.0)
    start = mirrored((centre,), draw_side(generator)) + draw_shift(sd_mm, generator)
    course = _draw_stroke(start, radius_mm, generator)
    beside = (tissue > LAST_NUCLEUS) & ~_is_any(tissue, _FLUID)
    chi = _fill(chi, _paint(locator, [course], [radius_mm]) * beside, ranges.blood_ppm, generator)
    if chance(generator, 0.5):
        core_mm = uniform(generator, 0.4, 0.8) * radius_mm
        chi = _fill(chi, _paint(locator, [course], [core_mm]) * beside, (-0.02, 0.2), generator)
    return chi


def _paint(locator: TemplateLocator, courses_mm: Sequence[Tensor], radii_mm: Sequence[float]) -> Tensor:
    return locator.paint(courses_mm, [(radius_mm, 1.0) for radius_mm in radii_mm])


def _fill(chi: Tensor, fraction: Tensor, ppm: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw one susceptibility and give it to a fraction of each voxel."""
    return chi + fraction * (uniform(generator, *ppm) - chi)


def _is_any(tissue: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.isin(tissue, torch.tensor(numbers, dtype=tissue.dtype, device=tissue.device))


def _draw_stroke(start: Tensor, radius_mm: float, generator: torch.Generator) -> Tensor:
    """Draw a course (N, 3) about as long as wide from a point (1, 3)."""
    return draw_course(torch.cat([start, start + draw_shift(radius_mm, generator)]), generator)
