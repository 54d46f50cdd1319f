"""Streams of labelled samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.simulate.anatomy import LabelMap
from bids_dgmseg.simulate.sample import View, draw_sample, phantom_head, template_head

PHANTOM_SHARE = 0.15
"""Part of the samples that show the phantom's ellipsoids in place of the template."""

ORDINARY_EVERY = 3
"""Every so many samples of the segmenter's training are ordinary: rare scans teach more, but most scans are not."""

ORDINARY_WIDTH = 0.5
"""Part of the width of each range that ordinary samples keep."""


def training_heads(template: Volume | None, device: str | torch.device = "cpu") -> list[tuple[LabelMap, float]]:
    """Gather the anatomies that training draws from: the label template, where there is one, and the phantom."""
    phantom = phantom_head().to(device)
    if template is None:
        return [(phantom, 1.0)]
    return [(template_head(template).to(device), 1 - PHANTOM_SHARE), (phantom, PHANTOM_SHARE)]


@dataclass(frozen=True, eq=False)
class SimulatedMaps(Dataset[tuple[Tensor, Tensor]]):
    """Maps drawn on demand; sample i of a seed is always the same map."""

    heads: Sequence[tuple[LabelMap, float]]
    """Anatomies and how often each is drawn; maps are drawn on their device."""
    view: View
    """Field of view."""
    seed: int
    """Two seeds share no sample."""
    classes_of: Callable[[Tensor], Tensor]
    """Turns the simulation's labels into the classes to learn."""
    normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Turns ppm into the network's input."""
    ordinary: View | None = None
    """Takes the place of `view` in every third sample, if given."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw sample `index`: input (1, X, Y, Z) and classes (X, Y, Z)."""
        view = self.view if self.ordinary is None or index % ORDINARY_EVERY else self.ordinary
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that sums are the same in a process of its own and here
        try:
            chi, labels = draw_sample(self.heads, view, self.seed * 10_000_000 + index)
        finally:
            torch.set_num_threads(threads)
        return torch.from_numpy(self.normalize(chi.cpu().numpy()))[None], self.classes_of(labels)
