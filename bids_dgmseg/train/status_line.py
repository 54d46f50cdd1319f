"""Where a training is, and the line that shows it; a terminal replaces it by the next."""

from __future__ import annotations

import math
from collections.abc import Iterable


def unseen(line: str) -> None:
    """Show nothing."""


def part_over(part: float, seconds: float, minutes: float | None) -> float:
    """Find which part of a training lies behind, 0 to 1: by its steps or by its time, whichever is more.

    Parameters
    ----------
    part : float
        Of the steps or epochs that are over.
    seconds : float
        It has taken so far.
    minutes : float or None
        After which it ends, whatever is over by then; None for never.

    Examples
    --------
    >>> part_over(0.25, seconds=30, minutes=1), part_over(0.75, seconds=30, minutes=1), part_over(0.25, 30, None)
    (0.5, 0.75, 0.25)
    """
    return min(part if minutes is None else max(part, seconds / (60 * minutes)), 1.0)


def seconds_left(seconds: float, part: float) -> float:
    """Estimate how long a training still takes.

    Parameters
    ----------
    seconds : float
        It has taken so far.
    part : float
        Of it that is over, above 0, up to 1.
    """
    return seconds * (1 - part) / part


def live_line(where: str, *, seconds: float, left: float, loss: float, dice: Iterable[float]) -> str:
    """Say where a training is.

    Parameters
    ----------
    where : str
        Step, epoch and what is trained.
    seconds, left : float
        Time so far and time to go.
    loss : float
        Of the last step.
    dice : iterable of float
        The latest of each class, of which the mean is shown; NaN where a class was not seen, nothing before the first.

    Examples
    --------
    >>> live_line("step 30/120", seconds=90, left=270, loss=0.5, dice=[0.75, 0.85])
    'step 30/120, 1.5 min, 4.5 left, loss 0.500, Dice 0.80'
    """
    seen = [value for value in dice if not math.isnan(value)]
    mean = f"{sum(seen) / len(seen):.2f}" if seen else "n/a"
    return f"{where}, {_minutes(seconds)} min, {_minutes(left)} left, loss {loss:.3f}, Dice {mean}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.{1 if seconds < 6000 else 0}f}"  # a terminal may have 80 columns
