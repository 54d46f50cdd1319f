"""Transforms that keep shapes: turned, scaled, shifted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Similarity:
    """Turns, scales and shifts points (..., 3)."""

    turn: NDArray[np.float64]
    centre: NDArray[np.float64]
    goal: NDArray[np.float64]

    def __call__(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Carry points."""
        carried: NDArray[np.float64] = (points - self.centre) @ self.turn + self.goal
        return carried


def fit_similarity(
    points: NDArray[np.float64],
    goals: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    mirrored: bool = False,
) -> Similarity:
    """Find the similarity that brings points nearest to their goals, by weighted least squares (Umeyama 1991).

    Parameters
    ----------
    points, goals : ndarray of shape (n, 3)
        Pairs that do not all lie on one line; on one plane only where nothing is mirrored.
    weights : ndarray of shape (n,), optional
        By default all alike.
    mirrored : bool
        Whether it may mirror too, as between arrays whose axes have different orders and directions.
    """
    shares = np.full(len(points), 1 / len(points)) if weights is None else weights / weights.sum()
    centre, goal = shares @ points, shares @ goals
    spread = points - centre
    left, stretches, right = np.linalg.svd((spread * shares[:, None]).T @ (goals - goal))
    signs = np.array([1.0, 1.0, 1.0 if mirrored else np.sign(np.linalg.det(left @ right))])
    scale = (stretches * signs).sum() / (shares @ (spread**2).sum(axis=1))
    return Similarity(scale * (left * signs) @ right, centre, goal)
