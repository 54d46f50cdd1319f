from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS, ModelInput
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.segmentation.inference import forward_batch
from bids_dgmseg.segmentation.postprocess import label_grid, postprocess
from bids_dgmseg.segmentation.predict import NetworkPredictor, ProbabilityBlock, predict
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.oracle import oracle_model

NUCLEI_BOX = Box((-45, -76, -52), (45, 34, 36))


def test_probabilities_sum_to_one_on_every_grid(grid):
    block = predict(PHANTOM.chi(grid), NUCLEI_BOX, oracle_model())
    np.testing.assert_allclose(block.probabilities.sum(axis=0), 1, atol=1e-5)  # float32


def test_volumes_and_sides_do_not_depend_on_the_grid(grid):
    model = oracle_model()
    block = predict(PHANTOM.chi(grid), NUCLEI_BOX, model)
    voxel_mm3 = abs(np.linalg.det(grid.affine[:3, :3]))
    centres_mm = grid.centres_mm()[block.slices]
    for channel, structure in enumerate(model.structures, 1):
        fraction = block.probabilities[channel]
        # Trilinear interpolation keeps sums but for the way a coarse grid falls on a small body.
        true_mm3 = PHANTOM.volumes_mm3[structure.abbreviation]
        assert fraction.sum() * voxel_mm3 == pytest.approx(true_mm3, rel=0.12)
        x_mm = (fraction * centres_mm[..., 0]).sum() / fraction.sum()
        assert (x_mm < 0) == (structure.hemisphere == "L")


def test_thick_voxel_contains_the_mean():
    model = replace(oracle_model(), input=ModelInput(spacing_mm=(1, 1, 1), patch_mm=(90, 110, 88)))
    fine, thick = (world_grid(NUCLEI_BOX, (1, 1, step)) for step in (1.0, 4.0))
    blocks = [predict(PHANTOM.chi(grid), NUCLEI_BOX, model).probabilities for grid in (fine, thick)]
    means = blocks[0].reshape(*blocks[0].shape[:3], 22, 4).mean(axis=-1)
    np.testing.assert_allclose(blocks[1], means, atol=1e-4)  # the four points of a voxel are the fine grid's


def test_box_beyond_the_map_is_background():
    half = world_grid(Box((-75, -110, -10), (75, 74, 80)), (2, 2, 2))
    block = predict(PHANTOM.chi(half), NUCLEI_BOX, oracle_model())
    assert block.slices[2].start == 0
    assert block.probabilities[1:3].max() == 0  # the dentates lie below


@pytest.mark.parametrize("valid_voxels_only", [True, False])
def test_mask_holes_are_background_single_zeros_are_not(valid_voxels_only):
    # The oracle sees every nucleus, whatever is measured: a hole of 3 voxels and a zero in the left putamen.
    oracle = oracle_model()
    model = replace(oracle, postprocessing=replace(oracle.postprocessing, valid_voxels_only=valid_voxels_only))
    chi = PHANTOM.chi(world_grid(NUCLEI_BOX, (1, 1, 1)))
    putamen = PHANTOM.dseg(world_grid(NUCLEI_BOX, (1, 1, 1))).array == 13
    x, y, z = np.argwhere(putamen).mean(axis=0).astype(int)
    holes = {"hole": (slice(x, x + 3), slice(y, y + 3), slice(z, z + 3)), "voxel": (x, y - 4, z)}
    for hole in holes.values():
        chi.array[hole] = 0
    probabilities = predict(chi, NUCLEI_BOX, model).probabilities
    place = 1 + list(model.labels).index("PUT_L")
    assert probabilities[place][holes["voxel"]] > 0.9
    assert (probabilities[place][holes["hole"]] == 0).all() == valid_voxels_only
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


def test_hidden_nucleus_is_not_seen():
    oracle = oracle_model()
    model = replace(oracle, postprocessing=replace(oracle.postprocessing, valid_voxels_only=True))
    chi, labels = (phantom(world_grid(NUCLEI_BOX, (1, 1, 1))) for phantom in (PHANTOM.chi, PHANTOM.dseg))
    chi.array[ndimage.binary_dilation(labels.array == STRUCTURES.named("RN_L").index, iterations=2)] = 0
    block = predict(chi, NUCLEI_BOX, model)
    assert set(model.labels) - set(block.seen) == {"RN_L"}


class _Speck:
    """Sure of two voxels of DN_R on its own grid, and everywhere in a little doubt of DN_L."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, volume):
        answer = np.full((3, *volume.shape), 0.0, np.float32)
        answer[1] = 0.2
        answer[2, 4:6, 4, 4] = 0.8
        answer[0] = 1 - answer[1:].sum(axis=0)
        return answer


def test_block_has_the_voxel_size_of_the_map():
    model = replace(oracle_model(), labels=("DN_L", "DN_R"), predictor=_Speck)
    box = Box((0, 0, 0), (10, 10, 10))
    block = predict(PHANTOM.chi(world_grid(box, (1.0, 2.0, 5.0))), box, model)
    assert block.voxel_size_mm == pytest.approx((1.0, 2.0, 5.0))


def test_block_lists_nuclei_lost_in_thick_slices():
    shown = ModelInput(spacing_mm=(1, 1, 1), patch_mm=(10, 10, 10))
    model = replace(oracle_model(), labels=("DN_L", "DN_R"), predictor=_Speck, input=shown)
    box = Box((0, 0, 0), (10, 10, 10))
    for slice_mm, n_voxels in ((1.0, 2), (5.0, 0)):
        block = predict(PHANTOM.chi(world_grid(box, (1, 1, slice_mm))), box, model)
        assert block.seen == ("DN_R",)
        assert np.count_nonzero(postprocess(block, model)) == n_voxels  # one of five thin slices is no majority
        assert block.probabilities[1].sum() > 39  # a fifth of 10 x 10 x 2 voxels or more


class _Position(nn.Module):
    """A network whose answer is its input, twice."""

    def forward(self, x):
        return torch.cat((x, -x), dim=1)


def predictor_of(monkeypatch, *networks, labels=("DN_L",), heads=(), **shown):
    """The predictor of a model of 1 mm whose networks are given."""
    monkeypatch.setattr("bids_dgmseg.segmentation.predict.load_segmenters", lambda model, weights: list(networks))
    given = ModelInput(**{"spacing_mm": (1.0, 1.0, 1.0), "patch_mm": (8.0, 8.0, 8.0), "normalization": "ppm", **shown})
    model = replace(MODELS["dgm16"], name="unshipped", labels=labels, heads=heads, input=given, mirrored=False)
    return NetworkPredictor(model, weights=None, device="cpu")


def some_map(shape, seed=0):
    """A map in ppm that float16 and bfloat16 hold exactly: tenths of a ppm are multiples of 1/64."""
    tenths = np.random.default_rng(seed).integers(-128, 128, shape) / 64
    return Volume((tenths / 10).astype(np.float32), np.eye(4))


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("patch_mm", [(20, 24, 28), (16, 16, 16), (7, 24, 9)])
def test_windows_agree_with_the_whole(monkeypatch, patch_mm, step):
    values = np.random.default_rng(0).normal(0, 0.05, (20, 24, 28)).astype(np.float32)
    whole = 1 / (1 + np.exp(-2 * 10 * values.astype(np.float64)))  # softmax of (v, -v), v in tenths of a ppm
    answer = predictor_of(monkeypatch, _Position(), patch_mm=patch_mm, window_step=step)(Volume(values, np.eye(4)))
    np.testing.assert_allclose(answer[0], whole, atol=1e-5)  # float32
    np.testing.assert_allclose(answer.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((20, 20, 20), [(20, 20, 20)]),
        ((22, 20, 21), [(22, 20, 21)]),  # a tenth longer
        ((23, 22, 20), [(20, 22, 20)] * 2),
        ((18, 20, 20), [(18, 20, 20)]),
    ],
)
def test_slightly_larger_box_is_one_window(monkeypatch, shape, seen):
    shapes = []

    class Seen(_Position):
        def forward(self, x):
            shapes.extend([tuple(x.shape[2:])] * len(x))
            return super().forward(x)

    answer = predictor_of(monkeypatch, Seen(), patch_mm=(20.0, 20.0, 20.0), window_slack=0.1)(some_map(shape))
    assert shapes == seen
    assert answer.shape == (2, *shape)


def test_native_voxels_are_not_interpolated(monkeypatch):
    shapes = []

    class Once(_Position):
        def forward(self, x):
            shapes.append(tuple(x.shape[2:]))
            return super().forward(x)

    affine = np.diag([0.94, 1.0, 1.06, 1.0])
    affine[:3, 3] = (-5.55, 3.21, 0.4)
    chi = Volume(np.random.default_rng(0).normal(0, 0.05, (20, 20, 20)).astype(np.float32), affine)
    box = Box.centred((affine @ [9.9, 9.2, 10.4, 1])[:3], (8.0, 8.0, 8.0))
    model = predictor_of(monkeypatch, Once(), native_voxel_tolerance=0.1).model
    monkeypatch.setattr("bids_dgmseg.segmentation.predict.read_model_folder", lambda model, weights: model)
    block = predict(chi, box, model)
    assert shapes == [(9, 8, 8)]  # 8 mm in voxels of 0.94, 1 and 1.06 mm, rounded up
    # softmax of (v, -v), v in tenths of a ppm; background is the first
    expected = 1 / (1 + np.exp(2 * 10 * chi.array[block.slices].astype(np.float64)))
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(block.probabilities[inner][1], expected[inner[1:]], atol=1e-4)  # float32


class _Threshold(nn.Module):
    """Finds what is brighter than 0.05 ppm, with a convolution built by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)
        self.conv.load_state_dict(
            {"weight": torch.tensor([0.0, 200.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([0.0, -100.0])}
        )

    def forward(self, x):
        return self.conv(x)


def test_window_step_gives_the_exact_volume(monkeypatch):
    truth = np.zeros((23, 14, 17), bool)
    truth[3:12, 2:9, 5:16] = truth[22, 13, 16] = truth[0, 0, 0] = True
    chi = np.where(truth, 0.1, 0.0).astype(np.float32)
    predict_crop = predictor_of(monkeypatch, _Threshold(), window_step=5)
    answer = predict_crop(Volume(chi, np.eye(4)))
    np.testing.assert_array_equal(answer.argmax(axis=0).astype(bool), truth)


class _Constant(nn.Module):
    """Answers one logit everywhere."""

    def __init__(self, logit):
        super().__init__()
        self.logit = logit

    def forward(self, x):
        return torch.cat((torch.zeros_like(x), torch.full_like(x, self.logit)), dim=1)


def test_probabilities_of_folds_are_averaged(monkeypatch):
    # Sigmoids 1/2, 1 and 0; the mean of the logits would say 1.
    folds = [_Constant(logit) for logit in (0.0, 100.0, -50.0)]
    answer = predictor_of(monkeypatch, *folds)(some_map((4, 4, 4)))
    np.testing.assert_allclose(answer[1], 0.5, atol=1e-6)


class _Middle(nn.Module):
    """A 2.5D network that answers with the middle slice, and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return torch.cat((x[:, 1:2], -x[:, 1:2]), dim=1)


def test_coronal_slices_return_in_order(monkeypatch):
    network, volume = _Middle(), some_map((6, 11, 5))
    answer = predictor_of(monkeypatch, network, slices=3)(volume)
    np.testing.assert_allclose(answer[0], 1 / (1 + np.exp(-20 * volume.array)), atol=1e-5)
    seen = torch.cat(network.seen).numpy() / 10
    assert seen.shape == (11, 3, 6, 5)
    for place, neighbours in [(0, (0, 0, 1)), (4, (3, 4, 5)), (10, (9, 10, 10))]:
        np.testing.assert_allclose(seen[place], volume.array[:, neighbours, :].swapaxes(0, 1), rtol=1e-6)


def test_each_stack_is_normalized_separately(monkeypatch):
    network = _Middle()
    predictor_of(monkeypatch, network, slices=3, normalization="zscore")(some_map((6, 9, 5)))
    seen = torch.cat(network.seen)
    torch.testing.assert_close(seen.mean(dim=(1, 2, 3)), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(dim=(1, 2, 3), correction=0), torch.ones(9))


def test_prediction_is_deterministic():
    torch.manual_seed(0)
    network = nn.Conv3d(1, 3, 3, padding=1).eval()
    values = np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32)
    first, second = (forward_batch(network, values[None], "cpu").softmax(dim=1).numpy().tobytes() for _ in range(2))
    assert first == second


def _block_of(labels, classes=17):
    one_hot = np.moveaxis(np.eye(classes, dtype=np.float32)[labels], -1, 0)
    return ProbabilityBlock(one_hot, (slice(0, labels.shape[0]), slice(0, labels.shape[1]), slice(0, labels.shape[2])))


def test_small_component_is_removed():
    labels = np.zeros((20, 10, 10), int)
    labels[1:5, 1:5, 1:5] = 5  # 64 voxels
    labels[15, 1:7, 5] = 5  # 6 voxels, less than a tenth
    labels[15, 1:8, 9] = 5  # 7 voxels, more than a tenth
    cleaned = postprocess(_block_of(labels), MODELS["dgm16"])
    assert (cleaned == 5).sum() == 64 + 7
    assert cleaned[15, :, 5].max() == 0


def test_components_of_similar_size_are_kept():
    labels = np.zeros((20, 10, 10), int)
    labels[1:3, 1:3, 1:3] = labels[10:12, 1:3, 1] = 3  # 8 and 4 voxels of the interposed nucleus
    assert (postprocess(_block_of(labels), MODELS["dgm16"]) == 3).sum() == 12


def test_labels_do_not_depend_on_the_channel():
    model = replace(MODELS["dgm16"], labels=("GP_R", "RN_L"))
    labels = np.zeros((4, 4, 4), int)
    labels[0], labels[2] = 1, 2
    cleaned = postprocess(_block_of(labels, classes=3), model)
    assert [int(cleaned[0, 0, 0]), int(cleaned[2, 0, 0]), int(cleaned[1, 0, 0])] == [16, 5, 0]


def test_outside_the_block_is_background():
    labels = np.ones((2, 3, 4), int)
    block = ProbabilityBlock(_block_of(labels).probabilities, (slice(1, 3), slice(0, 3), slice(5, 9)))
    dseg = label_grid(block, MODELS["dgm16"], (6, 4, 10))
    assert dseg.shape == (6, 4, 10)
    assert (dseg[1:3, 0:3, 5:9] == 1).all()
    assert dseg.sum() == 24  # the block's 2 x 3 x 4 voxels of label 1


class _Sides(nn.Module):
    """Logits of background, left and right: 0, the input, twice the input."""

    def forward(self, x):
        return torch.cat((torch.zeros_like(x), x, 2 * x), dim=1)


@pytest.mark.parametrize("wanted", ["mirrored", "ensemble"])
def test_mirror_images_are_averaged(wanted, monkeypatch):
    chi = some_map((6, 5, 4))
    predictor = predictor_of(monkeypatch, _Sides(), labels=("DN_L", "DN_R"))
    predictor.model = replace(predictor.model, **{wanted: True})
    v = 10 * chi.array.astype(np.float64)
    background, left, right = np.exp([0 * v, v, 2 * v]) / np.exp([0 * v, v, 2 * v]).sum(axis=0)
    # What is left in the mirror image is right in the map, and a network without a sense of place sees no difference.
    expected = [background, (left + right) / 2, (left + right) / 2]
    np.testing.assert_allclose(predictor(chi), expected, atol=0.01)  # bfloat16


def test_ensemble_averages_all_checkpoints(monkeypatch):
    chi = some_map((6, 5, 4))
    both = predictor_of(monkeypatch, _Sides(), _Position3(), labels=("DN_L", "DN_R"))(chi)
    first, second = (predictor_of(monkeypatch, one, labels=("DN_L", "DN_R"))(chi) for one in (_Sides(), _Position3()))
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)


class _Position3(nn.Module):
    """Another answer in three channels."""

    def forward(self, x):
        return torch.cat((-x, x, x), dim=1)


def test_temperatures_divide_logits_per_channel(monkeypatch):
    chi = some_map((6, 5, 4))
    predictor = predictor_of(monkeypatch, _Sides(), labels=("DN_L", "DN_R"))
    predictor.model = replace(predictor.model, temperatures=(1.0, 2.0, 4.0))
    half = 10 * chi.array.astype(np.float64) / 2
    expected = np.exp([0 * half, half, half]) / np.exp([0 * half, half, half]).sum(axis=0)
    np.testing.assert_allclose(predictor(chi), expected, atol=0.01)  # bfloat16
