"""Plausible echo times and field strengths."""

from __future__ import annotations

from collections.abc import Sequence

ECHO_TIME_LIMITS_S = 1e-4, 0.5
"""Echo times beyond these are in other units."""

FIELD_LIMITS_T = 0.01, 20.0


def check_acquisition(echo_times_s: Sequence[float], field_strength_t: float) -> None:
    """Check that echo times are in s and ascending, and that the field strength is in T.

    Raises
    ------
    ValueError
        With one line that names the parameter and its value.
    """
    times, (shortest, longest) = list(echo_times_s), ECHO_TIME_LIMITS_S
    if not times or min(times) < shortest or max(times) > longest or sorted(set(times)) != times:
        raise ValueError(f"echo_times_s: {times}, expected ascending times in seconds, such as [0.005, 0.010]")
    if not FIELD_LIMITS_T[0] <= field_strength_t <= FIELD_LIMITS_T[1]:
        raise ValueError(f"field_strength_t: {field_strength_t}, expected the field strength in T, such as 3")
