"""What labels do not tell: tracts, veins, calcifications, spots and texture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.resample import sample_points
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.anatomy import FIRST_TISSUE, chance, host, smooth_noise, uniform

Path = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class DetailRanges:
    """How far details differ; a pair is the lowest and highest value, drawn uniformly."""

    texture: tuple[float, float] = (0.0, 0.4)
    """Of the nuclei, relative."""
    fine_ppm: tuple[float, float] = (0.0, 0.012)
    slow_ppm: tuple[float, float] = (0.0, 0.015)
    tracts: float = 0.7
    """Chance of each tract, and of the pulvinar, to differ from the tissue around."""
    vein_ppm: tuple[float, float] = (0.05, 0.30)
    veins: float = 0.75
    """Chance of each of the deep veins."""
    spots: tuple[float, float] = (0.0, 14.0)
    """Vessels, perivascular spaces and calcifications in and near the nuclei."""


_VEINS: tuple[tuple[Path, tuple[float, float]], ...] = (
    (((2, 0, 9), (2, -10, 12), (2, -22, 11), (2, -33, 6), (0.5, -40, 3)), (0.6, 1.2)),  # internal cerebral
    (((3, -1, 9), (7, -1, 13), (12, -8, 17), (17, -18, 19)), (0.35, 0.8)),  # thalamostriate
    (((2.5, 0, 9), (3, 8, 8), (4, 15, 6), (8, 24, 8)), (0.35, 0.7)),  # of the septum
    (((12, -3, -16), (16, -10, -17), (20, -20, -13), (19, -30, -8), (11, -38, -1), (1, -41, 3)), (0.4, 1.0)),  # basal
    (((3, -36, 6), (14, -38, 14), (22, -40, 10)), (0.3, 0.7)),  # of the atrium
    (((18, 0, -10), (22, 0, 0), (24, -1, 9), (22, -4, 20)), (0.2, 0.45)),  # striate
    (((7, -52, -34), (11, -56, -35), (15, -60, -36)), (0.2, 0.5)),  # of the dentate
    (((0, -40, 3), (0, -45, 6), (0, -60, 8), (0, -80, 2)), (0.8, 1.8)),  # great and straight sinus
    (((0.5, -42, 2), (0, -48, -15), (1, -52, -22)), (0.3, 0.6)),  # precentral
)
"""Courses in mm of the template on the right, drawn on both sides, with their radii in mm of the scan."""

_TRACTS: tuple[tuple[Path, int, tuple[float, float], tuple[float, float]], ...] = (
    (((12, 4, 8), (18, -8, 8), (23, -18, 8), (24, -24, 4)), 22, (-0.04, 0.005), (2.0, 4.0)),  # internal capsule
    (((25, -26, 2), (30, -35, 4), (30, -50, 4), (24, -70, 4)), 22, (-0.04, 0.005), (2.0, 4.5)),  # optic radiation
    (((9, -8, -17), (14, -14, -16), (17, -22, -13)), 28, (-0.05, 0.0), (1.5, 3.0)),  # crus cerebri
    (((12, -26, 7), (16, -30, 5)), 27, (-0.01, 0.035), (3.0, 6.0)),  # pulvinar
    (((14, 14, 0), (21, 13, 1)), 22, (0.0, 0.05), (0.5, 1.2)),  # bridges between caudate and putamen
    (((15, 8, 6), (23, 7, 6)), 22, (0.0, 0.05), (0.5, 1.2)),
    (((16, 2, 12), (24, 1, 10)), 22, (0.0, 0.05), (0.5, 1.2)),
)
"""Courses on the right in mm of the template, the tissue that they change, by how much, and their radius in mm."""

_PLACES: tuple[tuple[tuple[float, float, float], float, tuple[float, float], tuple[float, float], float], ...] = (
    ((18, -3, -1), 2.5, (0.7, 2.5), (-0.25, 0.35), 0.15),  # mineral in the pallidum
    ((24, -38, 8), 3.0, (1.5, 4.0), (-0.15, 0.2), 0.4),  # choroid plexus
    ((0, -33, 1), 1.5, (1.5, 3.5), (-0.4, 0.1), 0.25),  # pineal gland
)
"""Centre on the right and its SD in mm, radius, ppm, chance on each side."""

_SPOT_PLACES = (
    ((25.0, 2.0, 0.0), (4.0, 9.0, 6.0)),
    ((13.0, 12.0, 10.0), (4.0, 8.0, 6.0)),
    ((10.0, -17.0, -11.0), (4.0, 4.0, 4.0)),
    ((14.0, -58.0, -35.0), (4.0, 5.0, 4.0)),
)


def add_details(
    chi: Tensor,
    labels: Tensor,
    points_mm: Tensor,
    *,
    spacing_mm: float,
    ranges: DetailRanges,
    generator: torch.Generator,
) -> Tensor:
    """Add what labels do not tell.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        Susceptibility in ppm of a filled head.
    labels : Tensor of shape (X, Y, Z), uint8
    points_mm : Tensor of shape (X, Y, Z, 3)
        Template coordinates of the voxels.
    spacing_mm : float
        Voxel size of the scan.
    ranges : DetailRanges
        How far details differ.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        In ppm, 0 outside the head.
    """
    shape, inside = tuple(chi.shape), labels > 0
    nuclei = inside & (labels <= FIRST_TISSUE)

    def noise(amplitude: tuple[float, float], wavelength_mm: tuple[float, float]) -> Tensor:
        wavelength = uniform(generator, *wavelength_mm) / spacing_mm
        return uniform(generator, *amplitude) * smooth_noise(shape, wavelength, generator)[0]

    chi = chi * (1 + nuclei * noise(ranges.texture, (3, 8)))
    chi = chi + noise(ranges.fine_ppm, (2.5, 6)) + noise(ranges.slow_ppm, (10, 25))
    places = _Places(points_mm, spacing_mm)
    _add_tracts(chi, labels, places, ranges, generator)
    vein_ppm = uniform(generator, *ranges.vein_ppm)
    if chance(generator, 0.6):
        tubes = _draw_tubes(shape, spacing_mm, generator)
        chi = chi + tubes * ~nuclei * uniform(generator, 0.3, 1.0) * vein_ppm
    if chance(generator, 0.9):
        _add_veins(chi, places, vein_ppm, ranges, generator)
    _add_spots(chi, places, ranges, generator)
    return chi * inside


class _Places:
    """Finds places of the template in the scan and paints balls there.

    Parameters
    ----------
    points_mm : Tensor of shape (X, Y, Z, 3)
        Template coordinates of the voxels.
    spacing_mm : float
        Voxel size of the scan.
    """

    def __init__(self, points_mm: Tensor, spacing_mm: float) -> None:
        self.shape, self.spacing_mm = points_mm.shape[:3], spacing_mm
        self._points = points_mm.permute(3, 0, 1, 2)[None]
        self._size = torch.tensor(self.shape, device=points_mm.device)
        middle = [size // 2 for size in self.shape]
        lines = points_mm[:, middle[1], middle[2]], points_mm[middle[0], :, middle[2]], points_mm[middle[0], middle[1]]
        slopes = torch.stack([(line[-1] - line[0]) / (len(line) - 1) for line in lines])
        self._back, _ = torch.linalg.inv_ex(slopes)  # unlike `inv` it does not wait for a GPU

    def find_all(self, places_mm: Sequence[Tensor]) -> Sequence[Tensor]:
        """Find some lists of places at once; else as `find`."""
        if not places_mm:
            return ()
        found = self.find(torch.cat(list(places_mm)).to(self._points.device))
        return torch.split(found, [len(one) for one in places_mm])

    def find(self, template_mm: Tensor) -> Tensor:
        """Voxel indices (N, 3), with fractions, of template places (N, 3): Newton's method with one slope for all."""
        indices = (self._size - 1).expand(len(template_mm), 3) / 2
        for _ in range(5):
            here = sample_points(self._points[0], indices[None, None], extend=True)[:, 0, 0].T
            # Beyond the scan the map goes on with the same slope.
            beyond = indices - indices.clamp(min=0).minimum(self._size - 1)
            indices = indices + (template_mm - here) @ self._back - beyond
        return indices

    def shares(self, indices: Tensor, radius_mm: float, soft: float = 1.0) -> tuple[Tensor, Tensor]:
        """Flat voxel numbers near the indices (N, 3), and how much of each voxel balls of a radius fill.

        `soft` is the width of their edge in voxels. Some voxels come more than once, and of some nothing is filled.
        """
        reach = math.ceil(radius_mm / self.spacing_mm + soft / 2)
        steps = torch.arange(-reach, reach + 1, device=indices.device)
        offsets = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1).view(-1, 3)
        voxels = indices.round().long()[:, None] + offsets
        radius = radius_mm / self.spacing_mm
        depth = (radius - (voxels - indices[:, None]).norm(dim=-1)) / soft + 0.5
        # A ball or tube thinner than a voxel fills the part of it that its cross-section has.
        share = depth.clamp(0, 1) / min(1.0, radius / soft + 0.5) * min(1.0, math.pi * radius**2)
        # To leave out what lies beyond the scan would make a GPU wait for how many that are.
        share = share * ((voxels >= 0) & (voxels < self._size)).all(dim=-1)
        x, y, z = voxels.clamp(min=0).minimum(self._size - 1).view(-1, 3).unbind(-1)
        return (x * self.shape[1] + y) * self.shape[2] + z, share.view(-1)

    def paint(self, chi: Tensor, indices: Tensor, radius_mm: float, ppm: float) -> None:
        """Fill a ball about indices (1, 3) with a susceptibility, in place."""
        numbers, share = self.shares(indices, radius_mm)
        flat = chi.view(-1)
        flat.index_add_(0, numbers, share * (ppm - flat[numbers]))


def _mirrored(path: Path, side: float) -> Tensor:
    """Put a path on one side: −1 left, 1 right."""
    return torch.tensor(path, dtype=torch.float32) * torch.tensor([side, 1.0, 1.0])


def _draw_course(path: Tensor, jitter_mm: float, generator: torch.Generator) -> Tensor:
    """Draw points (N, 3), half a mm apart, along a path (P, 3) that is moved and made to wind; on the CPU."""
    path = path + jitter_mm * torch.randn(path.shape, generator=host(generator))
    count = max(2, round(2 * float((path[1:] - path[:-1]).norm(dim=-1).sum())))
    winding = torch.randn((max(2, count // 10), 3), generator=host(generator))
    return _stretch(path, count) + 0.5 * _stretch(winding, count)


def _stretch(values: Tensor, count: int) -> Tensor:
    """Interpolate rows (P, 3) to another number of them."""
    stretched: Tensor = functional.interpolate(values.T[None], size=count, mode="linear", align_corners=True)
    return stretched[0].T


def _add_veins(chi: Tensor, places: _Places, vein_ppm: float, ranges: DetailRanges, generator: torch.Generator) -> None:
    """Add the large veins near the nuclei, in place."""
    layer = torch.zeros(chi.numel(), device=chi.device)
    courses: list[Tensor] = []
    looks: list[tuple[float, float]] = []
    for path, radius_mm in _VEINS:
        for side in (-1.0, 1.0):
            if chance(generator, ranges.veins):
                courses.append(_draw_course(_mirrored(path, side), 1.2, generator))
                looks.append((uniform(generator, *radius_mm), uniform(generator, 0.5, 1.0)))
    for indices, (radius, strength) in zip(places.find_all(courses), looks, strict=True):
        numbers, share = places.shares(indices, radius)
        layer.scatter_reduce_(0, numbers, share * strength, "amax")
    chi += layer.view(chi.shape) * (vein_ppm - chi)


def _add_tracts(chi: Tensor, labels: Tensor, places: _Places, ranges: DetailRanges, generator: torch.Generator) -> None:
    """Make tissues differ by tract, in place: iron, and the fibres' direction to the main field, show."""
    courses: list[Tensor] = []
    looks: list[tuple[float, int, float]] = []
    for path, tissue, ppm, radius_mm in _TRACTS:
        if not chance(generator, ranges.tracts):
            continue
        added = uniform(generator, *ppm)
        for side in (-1.0, 1.0):
            courses.append(_draw_course(_mirrored(path, side), 1.2, generator)[::4])
            looks.append((added, tissue, uniform(generator, *radius_mm)))
    for indices, (added, tissue, radius) in zip(places.find_all(courses), looks, strict=True):
        numbers, share = places.shares(indices, radius, 2.0)
        layer = torch.zeros(chi.numel(), device=chi.device).scatter_reduce_(0, numbers, share, "amax")
        chi += added * layer.view(chi.shape) * (labels == tissue)


def _draw_tubes(shape: tuple[int, ...], spacing_mm: float, generator: torch.Generator) -> Tensor:
    """Draw thin tubes anywhere: where two smooth fields are both near zero."""
    wavelength = uniform(generator, 7.5, 14) / spacing_mm
    first, second = smooth_noise(shape, wavelength, generator, 2)
    width = uniform(generator, 0.04, 0.12)
    tubes: Tensor = (1.4 - first.square_().add_(second.square_()).sqrt_() / width).clamp_(0, 1)
    return tubes


def _add_spots(chi: Tensor, places: _Places, ranges: DetailRanges, generator: torch.Generator) -> None:
    """Add calcifications, and vessels and spaces around them that are seen as spots, in place."""
    spots: list[Tensor] = []
    looks: list[tuple[float, float]] = []
    for centre, sd_mm, radius_mm, ppm, likely in _PLACES:
        for side in (-1.0, 1.0):
            if chance(generator, likely):
                spots.append(_mirrored((centre,), side) + sd_mm * torch.randn((1, 3), generator=host(generator)))
                looks.append((uniform(generator, *radius_mm), uniform(generator, *ppm)))
    for _ in range(round(uniform(generator, *ranges.spots))):
        around, sd = _SPOT_PLACES[int(uniform(generator, 0, len(_SPOT_PLACES)))]
        middle = _mirrored((around,), -1.0 if chance(generator, 0.5) else 1.0)
        spots.append(middle + torch.tensor(sd) * torch.randn((1, 3), generator=host(generator)))
        looks.append((uniform(generator, 0.3, 1.1), uniform(generator, -0.1, 0.2)))
    for indices, look in zip(places.find_all(spots), looks, strict=True):
        places.paint(chi, indices, *look)


_LUMPS_MM = (3.0, 6.0)
"""Size of the lumps of mineral in a calcified pallidum."""


@dataclass(frozen=True)
class DiseaseRanges:
    """How many people have which disease; a pair is the lowest and highest value, drawn uniformly."""

    ataxia: float = 0.06
    """Part of the people whose dentates are small, in half of them full of iron and in half of them pale."""
    dentate_volume: tuple[float, float] = (0.4, 0.8)
    """Then, relative."""
    dentate_iron: tuple[float, float, float, float] = (0.4, 0.7, 1.3, 1.9)
    """Then, relative: from first to second or from third to fourth."""
    atrophy: float = 0.06
    """Part of the people whose caudates and putamina are small between wide ventricles, as in Huntington's disease."""
    striatal_volume: tuple[float, float] = (0.5, 0.85)
    """Then, relative; of caudate and putamen each."""
    wider_mm: tuple[float, float] = (1.0, 4.0)
    """Then, by which each wall of the ventricles lies farther outwards."""
    calcified: float = 0.04
    """Part of the people with lumps of mineral in both pallida."""
    mineral_ppm: tuple[float, float] = (-0.7, -0.1)
    """Then, in the lumps."""


@dataclass(frozen=True)
class Disease:
    """What is different in one head."""

    volume: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its volume."""
    iron: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its iron."""
    wider_mm: float = 0.0
    """Of the ventricles: the way of each wall."""
    mineral_ppm: float = 0.0
    """In lumps of the pallidum; 0 for none."""


HEALTHY = Disease()

NOBODY_ILL = DiseaseRanges(ataxia=0.0, atrophy=0.0, calcified=0.0)


def draw_disease(ranges: DiseaseRanges, generator: torch.Generator) -> Disease:
    """Draw what a person has; one may have several."""
    volume: dict[str, float] = {}
    iron: dict[str, float] = {}
    wider_mm = mineral_ppm = 0.0
    if chance(generator, ranges.ataxia):
        volume["DN"] = uniform(generator, *ranges.dentate_volume)
        pale, bright = ranges.dentate_iron[:2], ranges.dentate_iron[2:]
        iron["DN"] = uniform(generator, *(bright if chance(generator, 0.5) else pale))
    if chance(generator, ranges.atrophy):
        volume |= {nucleus: uniform(generator, *ranges.striatal_volume) for nucleus in ("CN", "PUT")}
        wider_mm = uniform(generator, *ranges.wider_mm)
    if chance(generator, ranges.calcified):
        mineral_ppm = uniform(generator, *ranges.mineral_ppm)
    return Disease(volume, iron, wider_mm, mineral_ppm)


def calcify(chi: Tensor, labels: Tensor, disease: Disease, *, spacing_mm: float, generator: torch.Generator) -> Tensor:
    """Put lumps of mineral into the pallida.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        Susceptibility in ppm.
    labels : Tensor of shape (X, Y, Z), uint8
    disease : Disease
        Without mineral the map stays as it is.
    spacing_mm : float
        Voxel size.
    generator : torch.Generator
        Source of randomness.
    """
    if disease.mineral_ppm == 0:
        return chi
    left, right = (structure.index for structure in STRUCTURES.both_sides(["GP"]))
    waves = smooth_noise(tuple(chi.shape), uniform(generator, *_LUMPS_MM) / spacing_mm, generator)[0]
    share = (2 * waves - uniform(generator, -0.5, 1.5) + 0.5).clamp(0, 1) * ((labels == left) | (labels == right))
    return chi + share * (disease.mineral_ppm - chi)
