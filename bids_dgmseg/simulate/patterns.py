"""What a nucleus looks like inside: gradients, walls and stripes; and how bodies are painted over the ground."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bids_dgmseg.simulate.anatomy import FIRST_TISSUE, chance, normal, uniform
from bids_dgmseg.simulate.shapes import Body, Painted

_TOUCH = 0.25
"""Of a voxel."""


@dataclass(frozen=True)
class Look:
    """Susceptibility inside one body, relative to `value`."""

    value: float
    gradient: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Relative change per mm."""
    core: float = 1.0
    """Deeper than the wall."""
    wall_mm: float = 1.5
    across: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Unit vector across the stripe."""
    stripe_mm: tuple[float, float] = (0.0, 0.5)
    """Its place from the centre and its SD."""
    stripe: float = 1.0
    """In the stripe."""
    beyond: float = 1.0
    """On the far side of it."""

    def at(self, painted: Painted) -> Tensor:
        """Values in ppm in the body's block."""
        local, depth = painted.local_mm, painted.depth_mm
        relative = torch.ones_like(depth)
        if any(self.gradient):
            relative += (local @ _vector(self.gradient, local)).clamp_(-0.6, 0.8)
        if self.core != 1:
            relative *= 1 + (self.core - 1) * ((depth - self.wall_mm) / 0.8 + 0.5).clamp_(0, 1)
        if self.stripe != 1 or self.beyond != 1:
            place = local @ _vector(self.across, local) - self.stripe_mm[0]
            relative *= 1 + (self.beyond - 1) * (place / 1.2 + 0.5).clamp(0, 1)
            relative *= 1 + (self.stripe - 1) * torch.exp(-0.5 * (place / self.stripe_mm[1]) ** 2)
        return relative * self.value


def _vector(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def draw_look(body: Body, values: Tensor, ageing: float, generator: torch.Generator) -> Look:
    """Draw what a body looks like.

    Parameters
    ----------
    body : Body
        Nucleus or ventricle.
    values : Tensor of shape (64,)
        Susceptibility of each label in ppm, on the CPU.
    ageing : float
        0 at 45 years, 1 at 75: the putamen's back takes up iron first.
    generator : torch.Generator
        Source of randomness.
    """
    value, medial = float(values[body.label]), -body.side

    def draw(low: float, high: float) -> float:
        return uniform(generator, low, high)

    if body.nucleus == "DN":
        return Look(value, core=draw(0.3, 1.05), wall_mm=draw(0.9, 1.8))
    if body.nucleus == "PUT":
        backwards = -0.018 * max(draw(-0.5, 1.5) + ageing, -0.3)
        return Look(value, gradient=(0.01 * normal(generator), backwards, 0.008 * normal(generator)))
    if body.nucleus == "CN":
        return Look(value, gradient=(0.0, 0.008 * normal(generator), 0.012 * normal(generator)))
    if body.nucleus == "RN" and chance(generator, 0.5):
        return Look(value, core=draw(0.85, 1.4), wall_mm=draw(0.6, 1.4))
    if body.nucleus == "GP" and chance(generator, 0.6):
        across = _unit(medial, draw(-0.7, 0.0), draw(-0.6, 0.0))
        return Look(
            value,
            gradient=(0.0, 0.015 * normal(generator), 0.0),
            across=across,
            stripe_mm=(draw(0.0, 3.0), draw(0.4, 0.8)),
            stripe=draw(0.5, 1.0),
            beyond=draw(0.7, 1.2),
        )
    if body.nucleus == "SN" and chance(generator, 0.6):
        across = _unit(medial * draw(0.3, 1.0), -1.0, draw(0.0, 0.8))
        return Look(
            value,
            gradient=(0.0, 0.02 * normal(generator), 0.0),
            across=across,
            stripe_mm=(draw(-0.5, 1.5), draw(0.4, 0.8)),
            stripe=draw(0.35, 0.9),
            beyond=draw(0.5, 1.1),
        )
    return Look(value, gradient=(0.0, 0.0, 0.015 * normal(generator)) if body.label <= FIRST_TISSUE else (0.0,) * 3)


def _unit(x: float, y: float, z: float) -> tuple[float, float, float]:
    length = (x * x + y * y + z * z) ** 0.5
    return x / length, y / length, z / length


class Canvas:
    """A scan on which bodies are painted; where they meet, the deeper one wins and edges hold both.

    Parameters
    ----------
    ground : Tensor of shape (X, Y, Z), uint8
        Labels below the nuclei.
    chi : Tensor of shape (X, Y, Z)
        Their susceptibility.
    width_mm : float
        Voxel size in mm of the template.
    """

    def __init__(self, ground: Tensor, chi: Tensor, *, width_mm: float) -> None:
        self.ground, self.chi, self.width_mm = ground, chi, width_mm
        self.label = torch.zeros_like(ground)
        self.first, self.second = torch.full_like(chi, -1e3), torch.full_like(chi, -1e3)
        self.first_ppm, self.second_ppm = torch.zeros_like(chi), torch.zeros_like(chi)

    def paint(self, painted: Painted, look: Look) -> None:
        """Add a body; tissues go into the ground."""
        block, depth, value = painted.block, painted.depth_mm, look.at(painted)
        if painted.body.label > FIRST_TISSUE:
            inside = self.ground[block] > 0
            self.ground[block] = torch.where((depth > 0) & inside, painted.body.label, self.ground[block])
            share = (depth / self.width_mm + 0.5).clamp_(0, 1) * inside
            self.chi[block] += share * (value - self.chi[block])
            return
        first, second = self.first[block], self.second[block]
        first_ppm, second_ppm = self.first_ppm[block], self.second_ppm[block]
        wins = depth > first
        follows = depth > second
        self.second_ppm[block] = torch.where(wins, first_ppm, torch.where(follows, value, second_ppm))
        self.second[block] = torch.where(wins, first, torch.maximum(second, depth))
        self.first_ppm[block] = torch.where(wins, value, first_ppm)
        self.first[block] = torch.maximum(first, depth)
        self.label[block] = torch.where(wins, painted.body.label, self.label[block])

    def finish(self) -> tuple[Tensor, Tensor]:
        """Mix the two deepest at each voxel; the ground is as deep as the nuclei are away."""
        inside = self.first > 0
        # Where the gap between two bodies is a small part of a voxel, they touch.
        other = self.second + self.first > -_TOUCH * self.width_mm
        nucleus_ppm = self.first_ppm
        # Half the difference of two depths is the distance from the face between them.
        margin = torch.where(inside & other, (self.first - self.second) / 2, self.first)
        share = (margin / self.width_mm + 0.5).clamp_(0, 1)
        below = torch.where(inside & other, self.second_ppm, self.chi)
        head = self.ground > 0
        labels = torch.where(inside & head, self.label, self.ground)
        return torch.where(head, below + share * (nucleus_ppm - below), self.chi), labels
