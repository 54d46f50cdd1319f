"""Similarity transforms: rotation, scaling, translation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Similarity:
    """Map points (..., 3) to ``(points - centre) @ matrix + target``."""

    matrix: NDArray[np.float64]
    centre: NDArray[np.float64]
    target: NDArray[np.float64]

    def __call__(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transform points."""
        transformed: NDArray[np.float64] = (points - self.centre) @ self.matrix + self.target
        return transformed


def fit_similarity(
    points: NDArray[np.float64],
    targets: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    mirrored: bool = False,
) -> Similarity:
    """Fit the similarity from points to targets by weighted least squares (Umeyama 1991, doi:10.1109/34.88573).

    Parameters
    ----------
    points, targets : ndarray of shape (n, 3)
        Corresponding points, not all on one line; with `mirrored` not all on one plane.
    weights : ndarray of shape (n,), optional
        Equal by default.
    mirrored : bool
        Allow reflections, as between arrays with different axis orders and directions.
    """
    shares = np.full(len(points), 1 / len(points)) if weights is None else weights / weights.sum()
    centre, target = shares @ points, shares @ targets
    centred = points - centre
    left, stretches, right = np.linalg.svd((centred * shares[:, None]).T @ (targets - target))
    signs = np.array([1.0, 1.0, 1.0 if mirrored else np.sign(np.linalg.det(left @ right))])
    scale = (stretches * signs).sum() / (shares @ (centred**2).sum(axis=1))
    return Similarity(scale * (left * signs) @ right, centre, target)
