from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from bids_dgmseg.image.grids import Box, Grid, resample, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS, ModelInput
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.postprocess import postprocess
from bids_dgmseg.segmentation.predict import (
    InferenceOptions,
    Location,
    NetworkPredictor,
    merge_auxiliary,
    merge_heads,
    resample_back,
    softmax_heads,
)
from bids_dgmseg.segmentation.segment import segment_map
from tests.oracle import oracle_model

NUCLEI_BOX = Box((-45, -76, -52), (45, 34, 36))
FINE_GRID = world_grid(NUCLEI_BOX, (1, 1, 1))
ORACLE = oracle_model()


def predict(chi, box, model):
    return segment_map(chi, model, location=Location(box)).block


def oracle(**postprocessing):
    return replace(ORACLE, postprocessing=replace(ORACLE.postprocessing, **postprocessing))


def test_volumes_and_sides_do_not_depend_on_the_grid(grid):
    block = predict(PHANTOM.chi(grid), NUCLEI_BOX, ORACLE)
    np.testing.assert_allclose(block.probabilities.sum(axis=0), 1, atol=1e-5)  # float32
    voxel_mm3 = abs(np.linalg.det(grid.affine[:3, :3]))
    centres_mm = grid.centres_mm()[block.slices]
    for channel, structure in enumerate(ORACLE.structures, 1):
        fraction = block.probabilities[channel]
        # Trilinear interpolation keeps sums, except for the position of small nuclei on a coarse grid.
        true_mm3 = PHANTOM.volumes_mm3[structure.abbreviation]
        assert fraction.sum() * voxel_mm3 == pytest.approx(true_mm3, rel=0.12)
        x_mm = (fraction * centres_mm[..., 0]).sum() / fraction.sum()
        assert (x_mm < 0) == (structure.hemisphere == "L")


def test_thick_voxel_contains_the_mean():
    model = replace(ORACLE, input=ModelInput(spacing_mm=(1, 1, 1), patch_mm=(90, 110, 88)))
    grids = FINE_GRID, world_grid(NUCLEI_BOX, (1, 1, 4))
    fine, thick = (predict(PHANTOM.chi(grid), NUCLEI_BOX, model).probabilities for grid in grids)
    means = fine.reshape(*fine.shape[:3], 22, 4).mean(axis=-1)
    np.testing.assert_allclose(thick, means, atol=1e-4)  # the four points of a voxel are those of the fine grid


def test_box_beyond_the_map_is_background():
    half = world_grid(Box((-75, -110, -10), (75, 74, 80)), (2, 2, 2))
    block = predict(PHANTOM.chi(half), NUCLEI_BOX, ORACLE)
    assert block.slices[2].start == 0
    assert block.probabilities[1:3].max() == 0  # the dentates lie below


@pytest.mark.parametrize("valid_voxels_only", [True, False])
def test_mask_holes_are_background_single_zeros_are_not(valid_voxels_only):
    # The oracle finds every nucleus, whatever the map: a hole of 3 voxels and a zero in the left putamen.
    chi, model = PHANTOM.chi(FINE_GRID), oracle(valid_voxels_only=valid_voxels_only)
    x, y, z = np.argwhere(PHANTOM.dseg(FINE_GRID).array == 13).mean(axis=0).astype(int)
    hole, voxel = (slice(x, x + 3), slice(y, y + 3), slice(z, z + 3)), (x, y - 4, z)
    chi.array[hole] = chi.array[voxel] = 0
    probabilities = predict(chi, NUCLEI_BOX, model).probabilities
    putamen = probabilities[1 + list(model.labels).index("PUT_L")]
    assert putamen[voxel] > 0.9
    assert (putamen[hole] == 0).all() == valid_voxels_only
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


def test_hidden_nucleus_is_not_seen():
    chi, model = PHANTOM.chi(FINE_GRID), oracle(valid_voxels_only=True)
    nucleus = PHANTOM.dseg(FINE_GRID).array == STRUCTURES.named("RN_L").index
    chi.array[ndimage.binary_dilation(nucleus, iterations=2)] = 0
    assert set(model.labels) - set(predict(chi, NUCLEI_BOX, model).seen) == {"RN_L"}


class Speck:
    """Certain of two voxels of DN_R on its own grid, and slightly in doubt about DN_L everywhere."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, volume):
        probabilities = np.zeros((3, *volume.shape), np.float32)
        probabilities[1] = 0.2
        probabilities[2, 4:6, 4, 4] = 0.8
        probabilities[0] = 1 - probabilities[1:].sum(axis=0)
        return probabilities


@pytest.mark.parametrize(("slice_mm", "n_voxels"), [(1.0, 2), (5.0, 0)])
def test_block_lists_nuclei_lost_in_thick_slices(slice_mm, n_voxels):
    network_input = ModelInput(spacing_mm=(1, 1, 1), patch_mm=(10, 10, 10))
    model, box = (
        replace(ORACLE, labels=("DN_L", "DN_R"), predictor=Speck, input=network_input),
        Box((0,) * 3, (10,) * 3),
    )
    block = predict(PHANTOM.chi(world_grid(box, (1, 1, slice_mm))), box, model)
    assert block.seen == ("DN_R",)
    assert block.voxel_size_mm == pytest.approx((1, 1, slice_mm))
    assert np.count_nonzero(postprocess(block, model)) == n_voxels  # one of five thin slices is not a majority
    assert block.probabilities[1].sum() > 39  # a fifth of 10 x 10 x 2 voxels or more


class Pointwise(nn.Module):
    """Network whose logits are functions of its input, which it remembers."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.seen = logits, []

    def forward(self, x):
        self.seen.append(x.clone())
        return torch.cat([logit(x) for logit in self.logits], dim=1)


def opposite():
    """Return a network of the logits (v, -v)."""
    return Pointwise(lambda x: x, lambda x: -x)


def sided():
    """Return a network of the logits 0, v and 2v for background, left and right."""
    return Pointwise(torch.zeros_like, lambda x: x, lambda x: 2 * x)


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def softmax(*logits):
    return np.exp(logits) / np.exp(logits).sum(axis=0)


@pytest.fixture
def predictor_of(monkeypatch):
    """Return the predictor of a model of 1 mm with given networks."""

    def build(*networks, labels=("DN_L",), auxiliary=(), mirrored=False, temperatures=(), **network_input):
        monkeypatch.setattr("bids_dgmseg.segmentation.predict.load_segmenters", lambda *_, **__: list(networks))
        inputs = {"spacing_mm": (1.0, 1.0, 1.0), "patch_mm": (8.0, 8.0, 8.0), **network_input}
        model = replace(MODELS["dgm16"], name="unshipped", labels=labels, heads=(), mirrored=mirrored)
        model = replace(model, temperatures=temperatures, auxiliary=auxiliary)
        return NetworkPredictor(replace(model, input=ModelInput(**inputs)), InferenceOptions())

    return build


def some_map(shape, seed=0):
    """A map in ppm that float16 and bfloat16 hold exactly: tenths of a ppm are multiples of 1/64."""
    tenths = np.random.default_rng(seed).integers(-128, 128, shape) / 64
    return Volume((tenths / 10).astype(np.float32), np.eye(4))


def normal_map(shape, affine):
    return Volume(np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32), affine)


def test_auxiliary_classes_become_background(predictor_of):
    class ThreeClasses(nn.Module):
        def forward(self, x):
            return torch.cat([0 * x, x, 2 * x], dim=1)

    chi = normal_map((9, 8, 7), np.eye(4))
    background, nucleus, fluid = softmax(0 * chi.array, 10 * chi.array, 20 * chi.array)
    predictor = predictor_of(ThreeClasses(), auxiliary=("fluid",))
    result = predictor(chi)
    np.testing.assert_allclose(result, [background, nucleus, fluid], atol=1e-5)
    np.testing.assert_allclose(merge_auxiliary(result, predictor.model), [background + fluid, nucleus], atol=1e-5)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("patch_mm", [(20, 24, 28), (16, 16, 16), (7, 24, 9)])
def test_windows_agree_with_the_whole(predictor_of, patch_mm, step):
    chi = normal_map((20, 24, 28), np.eye(4))
    probabilities = predictor_of(opposite(), patch_mm=patch_mm, window_step=step)(chi)
    np.testing.assert_allclose(probabilities[0], sigmoid(20 * chi.array), atol=1e-5)  # softmax of ±v, v in 0.1 ppm
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


def test_box_is_padded_with_zeros_after_normalization(predictor_of):
    network, chi = opposite(), some_map((5, 12, 8))
    probabilities = predictor_of(network, normalization="minmax", zero_padding=True)(chi)
    seen = torch.cat(network.seen)
    assert seen.shape[2:] == (8, 8, 8)
    assert not seen[:, :, [0, 6, 7]].any()  # 3 of 8 planes: one before, two behind
    scaled = (chi.array - chi.array.min()) / np.ptp(chi.array)
    np.testing.assert_allclose(probabilities[0], sigmoid(2 * scaled), atol=2e-3)  # bfloat16 where the processor has it


def test_native_voxels_are_not_interpolated(predictor_of):
    affine = np.diag([0.94, 1.0, 1.06, 1.0])
    affine[:3, 3] = (-5.55, 3.21, 0.4)
    chi, network = normal_map((20, 20, 20), affine), opposite()
    box = Box.centred((affine @ [9.9, 9.2, 10.4, 1])[:3], (8.0, 8.0, 8.0))
    model = predictor_of(network, native_voxel_tolerance=0.1).model
    block = predict(chi, box, model)
    assert [tuple(x.shape[2:]) for x in network.seen] == [(9, 8, 8)]  # 8 mm in 0.94, 1 and 1.06 mm, rounded up
    inner = (slice(1, -1),) * 3
    expected = sigmoid(-20 * chi.array[block.slices])
    np.testing.assert_allclose(block.probabilities[1][inner], expected[inner], atol=1e-4)  # float32


def test_window_step_gives_the_exact_volume(predictor_of):
    truth = np.zeros((23, 14, 17), bool)
    truth[3:12, 2:9, 5:16] = truth[22, 13, 16] = truth[0, 0, 0] = True
    above_half = Pointwise(torch.zeros_like, lambda x: 200 * x - 100)  # of a tenth of a ppm
    chi = Volume(np.where(truth, 0.1, 0.0).astype(np.float32), np.eye(4))
    probabilities = predictor_of(above_half, window_step=5)(chi)
    np.testing.assert_array_equal(probabilities.argmax(axis=0).astype(bool), truth)


def test_probabilities_of_folds_are_averaged(predictor_of):
    # Sigmoids 1/2, 1 and 0; the mean of the logits would give 1.
    folds = [Pointwise(torch.zeros_like, lambda x, logit=logit: 0 * x + logit) for logit in (0.0, 100.0, -50.0)]
    np.testing.assert_allclose(predictor_of(*folds)(some_map((4, 4, 4)))[1], 0.5, atol=1e-6)


def middle_slice():
    return Pointwise(lambda x: x[:, 1:2], lambda x: -x[:, 1:2])


@pytest.mark.parametrize(("axis", "shape"), [(1, (11, 3, 6, 5)), (2, (11, 3, 6, 7))], ids=["coronal", "axial"])
def test_slices_return_in_order(axis, shape, predictor_of):
    network, chi = middle_slice(), some_map({1: (6, 11, 5), 2: (6, 7, 11)}[axis])
    probabilities = predictor_of(network, slices=3, stack_axis=axis)(chi)
    np.testing.assert_allclose(probabilities[0], sigmoid(20 * chi.array), atol=1e-5)
    seen = torch.cat(network.seen).numpy() / 10
    assert seen.shape == shape
    for position, neighbours in [(0, (0, 0, 1)), (4, (3, 4, 5)), (10, (9, 10, 10))]:
        np.testing.assert_allclose(seen[position], np.moveaxis(chi.array, axis, 0)[list(neighbours)], rtol=1e-6)


def test_mirror_images_are_averaged(predictor_of):
    chi, predictor = some_map((6, 5, 4)), predictor_of(sided(), labels=("DN_L", "DN_R"), mirrored=True)
    v = 10 * chi.array.astype(np.float64)
    background, left, right = softmax(0 * v, v, 2 * v)
    # Left in the mirror image is right in the map, and a pointwise network does not see the difference.
    expected = [background, (left + right) / 2, (left + right) / 2]
    np.testing.assert_allclose(predictor(chi), expected, atol=0.01)  # bfloat16


def test_temperatures_divide_logits_per_channel(predictor_of):
    temperatures = (1.0, 2.0, 4.0)
    chi, predictor = some_map((6, 5, 4)), predictor_of(sided(), labels=("DN_L", "DN_R"), temperatures=temperatures)
    half = 10 * chi.array.astype(np.float64) / 2
    np.testing.assert_allclose(predictor(chi), softmax(0 * half, half, half), atol=0.01)  # bfloat16


TWO = (("DN",), ("IN",))


def as_logits(*values):
    return torch.tensor(values).reshape(1, -1, 1, 1, 1)


def test_each_head_has_its_softmax():
    logits = as_logits(0.0, np.log(3), 0.0, -np.log(3))
    assert softmax_heads(logits, TWO).flatten().tolist() == pytest.approx([1 / 4, 3 / 4, 3 / 4, 1 / 4])
    assert softmax_heads(logits[:, :3], (("A", "B"),)).flatten().tolist() == pytest.approx([1 / 5, 3 / 5, 1 / 5])


def test_calibrated_low_probabilities_become_background():
    # Odds of 1 to 8 and to 400 of two nuclei against the background: 1 in 400 is less than a hundredth.
    kept = 1 / 8 / (1 + 1 / 8 + 1 / 400)
    logits = as_logits(0.0, -2 * np.log(8), -2 * np.log(400))
    probabilities = softmax_heads(logits, (("DN", "IN"),), temperatures=(2.0, 2.0, 2.0))
    assert probabilities.flatten().tolist() == pytest.approx([1 - kept, kept, 0])
    uncalibrated = softmax_heads(as_logits(0.0, -np.log(400)), (("DN",),))
    assert uncalibrated.flatten().tolist() == pytest.approx([400 / 401, 1 / 401])


@pytest.mark.parametrize(
    ("dentate", "interposed", "expected"),
    [
        # neither 0.4 * 0.2, dentate alone 0.6 * 0.2, interposed alone 0.4 * 0.8; together 0.52
        pytest.param(0.6, 0.8, [0.08 / 0.52, 0.12 / 0.52, 0.32 / 0.52], id="both likely"),
        pytest.param(0.9, 0.0, [0.1, 0.9, 0.0], id="one head is certain of background"),
        pytest.param(0.5, 0.5, [1 / 3, 1 / 3, 1 / 3], id="both undecided"),
        pytest.param(1.0, 1.0, [0, 0.5, 0.5], id="both certain"),
    ],
)
def test_two_heads_are_merged_by_hand(dentate, interposed, expected):
    heads = np.array([1 - dentate, dentate, 1 - interposed, interposed], np.float32).reshape(4, 1, 1, 1)
    assert merge_heads(heads, TWO).ravel().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("sizes_mm", "first_mm"),
    [
        pytest.param((0.8, 0.7, 1.4), (-1.5, 0.4, 0.9), id="other voxels"),
        pytest.param((1, 1, 1), (-2, 1, 0), id="same voxels, shifted"),
        pytest.param((1, 1, 1.4), (1, -1, 0.9), id="same voxels, other slices"),
        pytest.param((1, 0.7, 1), (-0.5, 0.4, 3), id="half a voxel apart"),
        pytest.param((1, 1, 1), (8, 0, 0), id="beyond the network's grid"),
        pytest.param((1, 1, 1), (0, -11, 0), id="before the network's grid"),
        pytest.param((1, 0.7, 1), (0, 0.4, 30), id="far from the network's grid"),
    ],
)
def test_probabilities_return_to_parallel_axes(sizes_mm, first_mm):
    nucleus = np.random.default_rng(0).random((8, 9, 7), np.float32)
    affine = np.diag([*sizes_mm, 1.0])
    affine[:3, 3] = first_mm
    rotated = Grid((12, 11, 5), affine)
    grid, block = Grid(nucleus.shape, np.eye(4)), (slice(0, 12), slice(2, 11), slice(1, 5))
    probabilities = np.stack([1 - nucleus, nucleus])
    back = resample_back(probabilities, grid, rotated, block)
    np.testing.assert_array_equal(probabilities[1], nucleus)  # the input is not changed
    # scipy's linear interpolation, whose background is 0 beyond the image, too
    expected = resample(Volume(nucleus, grid.affine), rotated, order=1).array[block]
    np.testing.assert_allclose(back[1], expected, atol=1e-5)  # float32
    np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-5)
