"""Conditions of simulated maps for `accuracy.py`: one setting changed, all others typical."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.ranges import NO_PATHOLOGY
from bids_dgmseg.lab.simulate.sample import View, draw_sample, structure_labels, typical_view, without_resampling
from bids_dgmseg.lab.simulate.shapes import ShapedHead
from bids_dgmseg.lab.simulate.simulated_dataset import whole_head_view
from bids_dgmseg.models.structures import STRUCTURES, Structure

_PATHOLOGIES = {
    "small dentates of ataxia": dataclasses.replace(NO_PATHOLOGY, ataxia=1.0),
    "small caudates and putamina": dataclasses.replace(NO_PATHOLOGY, atrophy=1.0),
    "calcified pallida": dataclasses.replace(NO_PATHOLOGY, calcified=1.0),
    "lesions and perivascular spaces of white matter": dataclasses.replace(NO_PATHOLOGY, white_matter=1.0, spaces=1.0),
    "microbleeds": dataclasses.replace(NO_PATHOLOGY, microbleeds=1.0),
    "a haemorrhage": dataclasses.replace(NO_PATHOLOGY, haemorrhage=1.0),
}


@dataclass(frozen=True)
class Condition:
    """Settings of simulated maps."""

    name: str
    view: View
    slice_factor: int = 1
    """Number of slices averaged to a thick one; odd, so that it has a central slice."""
    frequent: bool = False
    """Whether to draw as many heads as `--maps` says."""

    def draw(
        self, head: ShapedHead, seed: int, structures: Sequence[Structure] = STRUCTURES, **more: Any
    ) -> tuple[Volume, NDArray[np.uint8]]:
        """Draw a map, centred on the origin, with its true structures; other arguments are those of `draw_sample`."""
        chi, labels, _ = draw_sample([(head, 1.0)], self.view, seed, **more)
        array, truth = self.thicken(chi.numpy(), structure_labels(labels, structures).numpy())
        step = self.view.spacing_mm
        spacing_mm = (step, step, step * self.slice_factor)
        x, y, z = (size * edge / 2 for size, edge in zip(array.shape, spacing_mm, strict=True))
        return Volume(array, world_grid(Box((-x, -y, -z), (x, y, z)), spacing_mm, array.shape).affine), truth

    def thicken(self, chi: NDArray[np.float32], labels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Average slices; a thick voxel has the most frequent label, or the central one if all differ."""
        factor, depth = self.slice_factor, chi.shape[2] // self.slice_factor
        stacks = [array[:, :, : depth * factor].reshape(*array.shape[:2], depth, factor) for array in (chi, labels)]
        votes = [
            (stacks[1] == number).sum(axis=-1) + 0.5 * (stacks[1][..., factor // 2] == number)
            for number in range(int(labels.max()) + 1)
        ]
        return stacks[0].mean(axis=-1, dtype=np.float32), np.argmax(votes, axis=0).astype(np.uint8)


def conditions() -> Iterator[Condition]:
    """Yield all conditions, starting with typical settings.

    The same seed draws the same head in all of them, except with pathology, with all settings random, and for the
    fifth of subjects whose susceptibility is unrelated to age.
    """
    view = typical_head_view(1.0)
    yield Condition("mid-range, 1 mm", view, frequent=True)
    trained = whole_head_view(1.0)
    yield Condition("subjects as in training", dataclasses.replace(view, values=trained.values), frequent=True)
    yield Condition("0.7 mm", typical_head_view(0.7))
    yield Condition("0.67 × 0.67 × 2 mm", typical_head_view(2 / 3), slice_factor=3)
    yield Condition("1 × 1 × 3 mm", view, slice_factor=3)
    for largest in (15.0, 30.0):
        head = dataclasses.replace(view.head, rotation_deg=(largest,) * 3)
        yield Condition(f"rotated by up to {largest:.0f}°, all axes", dataclasses.replace(view, head=head))
    for snr in (20.0, 120.0):
        yield Condition(f"SNR {snr:.0f}", _reconstructed(view, snr=(snr, snr)))
    for method, name in enumerate(("truncated division", "least squares", "conjugate gradients", "total variation")):
        weights = tuple(float(other == method) for other in range(4))
        yield Condition(name, _reconstructed(view, methods=weights))
    yield Condition("degraded by filters", _with_artefacts(view, physics=0.0))
    for age in (15.0, 75.0):
        yield Condition(f"{age:.0f} years", _with_values(view, age_years=(age, age)))
    yield Condition("abnormal iron in every nucleus", _with_values(view, odd=1.0))
    for name, pathology in _PATHOLOGIES.items():
        yield Condition(name, _with_values(view, pathology=pathology))
    yield Condition("slices missing, noise outside", dataclasses.replace(view, cut_mm=(17.0, 8.0), outside_noise=1.0))
    yield Condition("all settings random, as in training", trained)


def typical_head_view(spacing_mm: float) -> View:
    """Return a typical view of the whole head at a voxel size, without noise outside."""
    view = without_resampling(typical_view(whole_head_view(spacing_mm)))
    return dataclasses.replace(view, cut_mm=(0.0, 0.0), outside_noise=0.0)


def _with_values(view: View, **values: Any) -> View:
    return dataclasses.replace(view, values=dataclasses.replace(view.values, **values))


def _with_artefacts(view: View, **artefacts: Any) -> View:
    return dataclasses.replace(view, artefacts=dataclasses.replace(view.artefacts, **artefacts))


def _reconstructed(view: View, **reconstruction: Any) -> View:
    changed = dataclasses.replace(view.artefacts.reconstruction, **reconstruction)
    return _with_artefacts(view, physics=1.0, reconstruction=changed)
