from __future__ import annotations

import math

import numpy as np
import pytest

from bids_dgmseg.qsm.sign import MIN_HEAD_CORRELATION, correlate_with_head_field, decide_sign, describe_doubt, find_head

SHAPE, VOXEL_MM = (60, 60, 70), (2.0, 2.0, 2.0)
HEAD_MM, BODY_MM = 36.0, 28.0
TISSUE = np.random.default_rng(0).uniform(0.8, 1.2, SHAPE).astype(np.float32)
BODY_CENTRE_MM = (0.0, 10.0, -60.0)


def offsets_mm(centre_mm=(0.0, 0.0, 0.0)):
    """Coordinates relative to a point given from the centre of the head, which is 28 mm above that of the grid."""
    middle = (0.0, 0.0, 28.0)
    axes = [2 * (np.arange(n) - (n - 1) / 2) - m - c for n, m, c in zip(SHAPE, middle, centre_mm, strict=True)]
    return np.meshgrid(*axes, indexing="ij")


def distance_mm(centre_mm=(0.0, 0.0, 0.0)):
    return np.sqrt(sum(np.square(offset) for offset in offsets_mm(centre_mm)))


def field_of_body(b0_direction):
    """Field in ppm of a ball of -9.41 ppm, outside of it: a dipole, χ a³ / 3 · (3 cos² θ − 1) / r³.

    The head, a ball itself, does not change the field inside it.
    """
    r = distance_mm(BODY_CENTRE_MM)
    cosine = sum(o * c for o, c in zip(offsets_mm(BODY_CENTRE_MM), b0_direction, strict=True)) / r
    return (-9.41 * BODY_MM**3 / 3 * (3 * cosine**2 - 1) / r**3).astype(np.float32)


def correlate(field, b0_direction=(0.0, 0.0, 1.0), *, brain_mm=32.0, magnitude=None):
    both = (distance_mm() < HEAD_MM) | (distance_mm(BODY_CENTRE_MM) < BODY_MM)
    signal = both * TISSUE if magnitude is None else magnitude
    brain = distance_mm() < brain_mm
    return correlate_with_head_field(field, brain, signal, voxel_size_mm=VOXEL_MM, b0_direction=b0_direction)


@pytest.mark.parametrize("b0_direction", [(0.0, 0.0, 1.0), (-0.28, 0.0, 0.96), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_field_of_body_is_recognized_under_any_shim(b0_direction, sign):
    x, y, z = (offset / 40 for offset in offsets_mm())
    shim = 5 + 3 * x - 2 * z + 4 * x * y - 3 * z**2
    result = correlate((sign * field_of_body(b0_direction) + shim).astype(np.float32), b0_direction)
    assert sign * result > MIN_HEAD_CORRELATION


def test_direction_of_main_field_matters():
    # Below the head, 3 cos² θ − 1 is 2 for a main field along z and -1 for one along x: the opposite sign.
    assert correlate(field_of_body((1.0, 0.0, 0.0)), (0.0, 0.0, 1.0)) < -MIN_HEAD_CORRELATION


@pytest.mark.parametrize(("brain_mm", "signal"), [(10.0, None), (32.0, 1.0)])
def test_no_deep_brain_or_no_outline_is_no_evidence(brain_mm, signal):
    magnitude = None if signal is None else np.full(SHAPE, signal, np.float32)
    field = field_of_body((0.0, 0.0, 1.0))
    assert math.isnan(correlate(field, brain_mm=brain_mm, magnitude=magnitude))


def test_head_includes_bone_but_not_sinuses():
    # Brain, 6 mm of dark skull and scalp in a slab, and a sinus of 24 mm.
    r, from_sinus = distance_mm()[..., 43:55], distance_mm((0.0, 0.0, -1.0))[..., 43:55]
    sinus = from_sinus < 12
    magnitude = (((r < 24) | ((r > 30) & (r < HEAD_MM))) & ~sinus) * TISSUE[..., 43:55]
    head = find_head(magnitude, voxel_size_mm=VOXEL_MM)
    sure = (np.abs(r - HEAD_MM) > 2) & (np.abs(from_sinus - 12) > 2)  # farther than a voxel from the surfaces
    np.testing.assert_array_equal(head[sure], ((r < HEAD_MM) & ~sinus)[sure])


@pytest.mark.parametrize(
    ("correlation", "ratio", "sign", "source"),
    [
        (0.8, 0.5, 1, "the shape of the head"),
        (-0.8, 2.0, -1, "the shape of the head"),
        (0.3, 0.5, -1, "the map's extreme values"),
        (math.nan, 2.0, 1, "the map's extreme values"),
        (math.nan, 0.9, -1, "the map's extreme values"),
        (0.4, 0.9, 1, "the shape of the head"),  # neither is clear
    ],
)
def test_shape_of_head_decides_unless_only_the_map_is_clear(correlation, ratio, sign, source):
    assert decide_sign(correlation, ratio) == (sign, source)


@pytest.mark.parametrize(
    ("correlation", "ratio", "is_stated", "doubt"),
    [
        (0.8, 1.0, False, ""),
        (0.8, 0.5, False, "by the head (correlation 0.80), but the map's extreme values say the opposite"),
        (0.3, 1.6, False, ""),  # both say the same, and the extremes are clear
        (-0.2, 1.6, False, "values alone: the field induced by the head could not be identified (correlation -0.20)"),
        (0.3, 1.1, False, "the phase sign is uncertain: the field induced by the head could not be identified"),
        (math.nan, 1.1, False, "the phase sign is uncertain: the magnitude does not show the shape of the head"),
        (math.nan, 0.5, True, ""),
        (-0.8, 1.6, True, "`phase_sign` disagrees with the field induced by the head (correlation -0.80)"),
    ],
)
def test_doubts_are_described(correlation, ratio, is_stated, doubt):
    result = describe_doubt(correlation, ratio, is_stated=is_stated)
    assert doubt in result
    assert bool(doubt) == bool(result)
