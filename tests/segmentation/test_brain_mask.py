import numpy as np
import pytest

from bids_dgmseg.segmentation.localize import find_brain, find_mask_problems

VOXEL_MM = (3.0, 2.0, 4.0)
SHAPE = (72, 112, 54)
SEMI_AXES_MM = (66.0, 82.0, 62.0)
"""Of an ellipsoidal brain of 4/3 π · 66 · 82 · 62 mm³ = 1,405 ml."""
SCALE = np.float32(300)


def depth_mm():
    """Approximate depth below the surface of the ellipsoid."""
    axes = [step * (np.arange(n) - (n - 1) / 2) for n, step in zip(SHAPE, VOXEL_MM, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    a, b, c = SEMI_AXES_MM
    return (1 - np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)) * min(SEMI_AXES_MM)


def head():
    """A brain with fluid, skull and bright scalp around it, brighter on the right, in noise of 2 %."""
    depth = depth_mm()
    signal = np.select([depth > 0, depth > -2, depth > -7, depth > -13], [1.0, 0.7, 0.05, 1.6], 0.0)
    random = np.random.default_rng(0)
    noise = random.normal(scale=0.02, size=(2, *SHAPE))
    return (SCALE * np.hypot(signal * np.linspace(0.7, 1.3, SHAPE[0])[:, None, None] + noise[0], noise[1])).astype(
        np.float32
    )


BRAIN = depth_mm() > 0


def dice(result, true):
    return 2 * np.sum(result & true) / (result.sum() + true.sum())


@pytest.fixture(scope="module")
def result():
    return find_brain(head(), voxel_size_mm=VOXEL_MM)


def test_brain_is_found_without_skull_and_scalp(result):
    assert dice(result, BRAIN) > 0.93
    assert not result[depth_mm() < -8].any()
    assert not list(find_mask_problems(result, head(), voxel_size_mm=VOXEL_MM))


def test_unit_and_invalid_voxels_do_not_matter(result):
    magnitude = head() * np.float32(1024)  # a power of two changes no digit
    magnitude[:2] = np.nan
    expected = head()
    expected[:2] = 0
    np.testing.assert_array_equal(
        find_brain(magnitude, voxel_size_mm=VOXEL_MM), find_brain(expected, voxel_size_mm=VOXEL_MM)
    )


def test_brain_in_slab_is_kept_up_to_its_faces():
    slab = (slice(None), slice(None), slice(17, 38))
    result = find_brain(head()[slab], voxel_size_mm=VOXEL_MM)
    assert dice(result, BRAIN[slab]) > 0.9
    assert not list(find_mask_problems(result, head()[slab], voxel_size_mm=VOXEL_MM))


def test_stripped_head_is_its_own_mask():
    stripped = np.where(BRAIN, head(), 0)
    result = find_brain(stripped, voxel_size_mm=VOXEL_MM)
    assert dice(result, BRAIN) > 0.93
    assert not list(find_mask_problems(result, stripped, voxel_size_mm=VOXEL_MM))


# Blocks of 5 mm voxels (0.125 ml) with a square base; those that begin at index 0 are cut by a face of the image.
@pytest.mark.parametrize(
    ("edge", "first", "message"),
    [
        (19, 5, "its brain mask has 857 ml (parts of the brain missing?), expected 900 to 1,900 ml"),
        (19, 0, ""),
        (20, 5, ""),
        (24, 5, ""),
        (25, 5, "its brain mask has 1,953 ml (scalp or neck included?), expected 900 to 1,900 ml"),
        (25, 0, "its brain mask has 1,953 ml (scalp or neck included?), expected 900 to 1,900 ml"),
    ],
)
def test_volume_of_mask_is_checked(edge, first, message):
    mask = np.zeros((40, 40, 40), bool)
    mask[5 : 5 + edge, 5 : 5 + edge, first : first + edge] = True
    result = find_mask_problems(mask, mask.astype(np.float32), voxel_size_mm=(5, 5, 5))
    assert ", ".join(result) == message


def test_mask_that_reaches_the_skin_is_reported():
    # Upper half: the whole head. Lower half: the brain alone.
    mask = BRAIN.copy()
    mask[:, :, SHAPE[2] // 2 :] |= (depth_mm() > -13)[:, :, SHAPE[2] // 2 :]
    (problem,) = (text for text in find_mask_problems(mask, head(), voxel_size_mm=VOXEL_MM) if "skin" in text)
    percent, _, text = problem.partition("% of the surface of its brain mask lies at the skin")
    assert text == ", expected at most 25%"
    fraction = float(percent) / 100
    assert fraction == pytest.approx(0.5, abs=0.1)  # that half is larger, but its lower end is near the other's scalp
