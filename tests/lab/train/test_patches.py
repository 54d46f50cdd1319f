import functools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from nibabel.affines import from_matvec
from scipy.spatial.transform import Rotation

from bids_dgmseg.bids.labelled_scans import LabelledMap
from bids_dgmseg.image.grids import Box, Grid, OrientedBox, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.ranges import HeadRanges
from bids_dgmseg.lab.train.core import Pace
from bids_dgmseg.lab.train.losses import DeepQSMSegLoss
from bids_dgmseg.lab.train.patches import (
    Case,
    LabelledPatches,
    Variation,
    WindowSamples,
    list_windows,
    most_probable,
    prepare_case,
    prepare_map,
    soft_masks,
)
from bids_dgmseg.lab.train.recipe import Augmentation, Recipe, Sampling
from bids_dgmseg.models.registry import MODELS, Localizer, ModelInput
from bids_dgmseg.phantom.head import PHANTOM
from tests.lab.train.recipe_trainings import read
from tests.oracle import oracle_model

DCNNET = MODELS["dcnnet"]


STILL = Augmentation()


def recipe(size, step, *, augmentation=STILL, **sampling):
    return Recipe(
        classes={"DN": ("DN",)},
        loss=DeepQSMSegLoss(),
        augmentation=augmentation,
        pace=Pace(epochs=1, batch=1, learning_rate=1.0),
        sampling=Sampling(size=size, step=step, region="labels", normalization="ppm", normalized="region", **sampling),
    )


def case(shape, *, margin=0, labelled=()):
    """A case whose values are x + 100 y + 10000 z; voxels of the region are counted from 0."""
    outer = [width + 2 * margin for width in shape]
    x, y, z = np.indices(outer) - margin
    labels = torch.zeros(outer, dtype=torch.uint8)
    for place in labelled:
        labels[tuple(np.add(place, margin))] = 1
    a, b, c = (slice(margin, margin + width) for width in shape)
    return Case("one", torch.from_numpy((x + 100 * y + 10_000 * z).astype(np.float32)), labels, (a, b, c))


def starts(shape, sampling, **options):
    return [start for _, start in list_windows([case(shape, **options)], sampling, seed=1)]


def test_patches_cover_the_region():
    result = starts((12, 4, 9), recipe((4, 4, 4), (5, 5, 5)).sampling)
    assert sorted({start[0] for start in result}) == [0, 5, 8]  # 8 is the last that fits
    assert sorted({start[2] for start in result}) == [0, 5]
    assert len(result) == 6


@pytest.mark.parametrize(("step", "per_participant"), [(5, 3453 / 29), (9, 765 / 29)])
def test_padded_samples_are_as_many_as_in_the_paper(step, per_participant):
    # Kim 2020: 3,453 samples of 29 participants at step 5, 765 at step 9. The size of their regions is not printed;
    # regions of 31 x 20 x 16 voxels, each edge up to 2 shorter or longer, give both numbers.
    sampling = msgspec.structs.replace(read("dcnnet").sampling, step=(step,) * 3)
    shapes = np.array([31, 20, 16]) + np.array(list(np.ndindex(5, 5, 5))) - 2
    counts = [len(starts(shape, sampling, margin=16)) for shape in shapes]
    assert np.mean(counts) == pytest.approx(per_participant, rel=0.02)
    # By hand: half of 32 before the first voxel, half after the last, so one sample per step and one more.
    assert counts[0] == (29 // step + 1) * (18 // step + 1) * (14 // step + 1)


def test_stacks_cover_slices_and_drop_empty_ones():
    sampling = recipe((4, 3, 4), (0, 1, 0), stack_axis=1, empty=0.0).sampling
    options = {"margin": 1, "labelled": [(1, 0, 1), (1, 199, 1)]}
    assert starts((4, 200, 4), sampling, **options) == [(1, 0, 1), (1, 199, 1)]  # the middles are 1 + 0 and 1 + 199
    some = len(starts((4, 200, 4), msgspec.structs.replace(sampling, empty=0.3), **options))
    assert 2 + 0.3 * 198 - 25 < some < 2 + 0.3 * 198 + 25  # 4 SD of a binomial are 26
    assert len(starts((4, 200, 4), msgspec.structs.replace(sampling, empty=1.0), **options)) == 200


def test_stack_has_labels_of_its_middle_slice():
    stacks = recipe((2, 3, 2), (0, 1, 0), stack_axis=1, empty=0)
    samples = WindowSamples([case((2, 6, 2), labelled=[(0, 3, 1)])], stacks, seed=1, augment=False)
    chi, labels = samples[0]
    assert chi.shape == (3, 2, 2)
    assert chi[:, 0, 0].tolist() == [200, 300, 400]
    assert labels.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("augmentation", "check"),
    [
        (Augmentation(shift=3), lambda points, still: (points - still).reshape(-1, 3).std(dim=0).max() < 1e-5),
        (Augmentation(scale=(2.0, 2.0)), lambda points, still: torch.allclose(points - 8, (still - 8) / 2)),
        (
            Augmentation(axes=(0, 2), shift=3, rotation_deg=30, scale=(0.8, 1.2)),
            lambda points, still: torch.equal(points[..., 1], still[..., 1]),
        ),
    ],
    ids=["a shift moves all alike", "a factor of two enlarges twofold", "the third axis stays"],
)
def test_augmentation_moves_points(augmentation, check):
    still = torch.from_numpy(np.moveaxis(np.indices((5, 5, 5)), 0, -1)).float() + 6
    points = augmentation.draw_points((6, 6, 6), (5, 5, 5), (1.0, 1.0, 1.0), torch.Generator().manual_seed(2))
    assert not torch.equal(points, still)
    assert check(points, still)


def test_rotation_preserves_distances_in_mm():
    spacing = torch.tensor([1.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(2)
    points = Augmentation(rotation_deg=30).draw_points((0, 0, 0), (5, 5, 5), (1.0, 1.0, 2.0), generator)
    corner, other = (points[0, 0, 0] * spacing, points[4, 0, 4] * spacing)
    assert float((corner - other).norm()) == pytest.approx(np.hypot(4, 8), rel=1e-5)


@functools.cache
def phantom(spacing_mm):
    grid = world_grid(Box((-75, -110, -80), (75, 74, 80)), (spacing_mm,) * 3)
    return PHANTOM.chi(grid, supersampling=1), PHANTOM.dseg(grid)


def phantom_map(model, spacing_mm=2.0):
    chi, truth = phantom(spacing_mm)
    channels = np.zeros(17, np.uint8)
    for channel, structure in enumerate(model.structures, start=1):
        channels[structure.index] = channel
    return LabelledMap("sub-01", chi, truth.with_array(channels[truth.array]))


@pytest.mark.parametrize("padded", [True, False])
def test_region_has_a_margin_around_labels(padded):
    paper = read("dcnnet")
    sampling = msgspec.structs.replace(paper.sampling, zero_padding=padded)
    paper = msgspec.structs.replace(paper, sampling=sampling)
    prepared = prepare_case(phantom_map(DCNNET, 1.1), DCNNET, paper)
    result = np.argwhere(prepared.labels.numpy() > 0)
    low, high = result.min(axis=0), result.max(axis=0) + 1
    for axis, part in enumerate(prepared.region):
        around = (low[axis] - part.start, part.stop - high[axis])
        widest = padded or high[axis] - low[axis] + 10 > 32
        assert all(4 <= margin <= 6 for margin in around) if widest else part.stop - part.start in (32, 33)
        room = (part.start, prepared.chi.shape[axis] - part.stop)
        assert min(room) >= (16 if padded else 1)
    voxel_mm3 = 1.25**3
    for number, name in enumerate(("DN", "IN"), start=1):
        truth = sum(PHANTOM.volumes_mm3[f"{name}_{side}"] for side in "LR")
        assert int((prepared.labels == number).sum()) * voxel_mm3 == pytest.approx(truth, rel=0.1)  # rims of voxels
    inside = prepared.chi[prepared.region].clone()
    assert (float(inside.min()), float(inside.max())) == (0.0, 1.0)
    prepared.chi[prepared.region] = 0
    assert bool(prepared.chi.any()) is not padded


@pytest.mark.parametrize(
    ("origin_mm", "degrees"), [((0.0, 0.0, 0.0), 0), ((0.3, -0.5, 0.6), 0), ((0.3, -0.5, 0.6), 15)]
)
def test_maps_of_the_papers_voxel_size_are_not_resampled(origin_mm, degrees):
    labelled = phantom_map(DCNNET, 1.25)
    shift = from_matvec(Rotation.from_euler("x", degrees, degrees=True).as_matrix(), origin_mm)
    chi, truth = (Volume(item.array, shift @ item.affine) for item in (labelled.chi, labelled.channel_map))
    prepared = prepare_case(replace(labelled, chi=chi, channel_map=truth), DCNNET, read("dcnnet"))
    for number, channels in enumerate(((1, 2), (3, 4)), start=1):  # DN and IN, left and right
        assert int((prepared.labels == number).sum()) == np.isin(truth.array, channels).sum()


def test_crop_has_the_papers_size():
    model = replace(MODELS["deepqsmseg"], localizer=Localizer(kind="centre"))
    paper = read("deepqsmseg")
    prepared = prepare_case(phantom_map(model), model, paper)
    assert [part.stop - part.start for part in prepared.region] == [128, 128, 64]
    samples = WindowSamples([prepared], paper, seed=1, augment=True)
    chi, labels = samples[0]
    assert (len(samples), chi.shape, labels.shape) == (1, (1, 128, 128, 64), (128, 128, 64))
    assert (float(chi.mean()), float(chi.std())) == pytest.approx((0.0, 1.0), abs=1e-3)
    assert set(np.unique(labels.numpy()).tolist()) == set(range(11))
    left = np.argwhere(labels.numpy() == 1)[:, 0].mean()  # CN_L: patient's left is low x in RAS+
    assert left < np.argwhere(labels.numpy() == 2)[:, 0].mean()


MODEL = replace(oracle_model(), input=ModelInput(spacing_mm=(3.0, 3.0, 3.0), patch_mm=(90.0, 111.0, 90.0)))
BOX = Box((-45, -76, -52), (45, 35, 38))
CN, PUT = MODEL.labels.index("CN_L") + 1, MODEL.labels.index("PUT_L") + 1
UNVARIED = Variation(
    head=HeadRanges(scale=(1, 1), axis_scale=(1, 1), rotation_deg=(0, 0, 0), shear=0, shift_mm=(0, 0, 0), bends=()),
    gain=(1, 1),
    shift_ppm=0,
    slow_ppm=0,
    noise_ppm=(1e-9, 1e-9),
    blur_mm=0,
    mirrored=0,
)


def labelled(grid, *, moved_mm=0.0, names=("CN_L",)):
    """The phantom's map and some of its nuclei, drawn `moved_mm` too far to the right."""
    shift = np.eye(4)
    shift[0, 3] = -moved_mm
    drawn = PHANTOM.dseg(Grid(grid.shape, shift @ grid.affine)).array
    numbers = [MODEL.labels.index(name) + 1 for name in names]  # the phantom's numbers are the model's channels
    return LabelledMap("sub-01", PHANTOM.chi(grid), Volume(np.where(np.isin(drawn, numbers), drawn, 0), grid.affine))


def targets(prepared):
    """Targets, and the points at which they lie."""
    to_world = np.linalg.inv(prepared.target.world_to_index.numpy().astype(float))
    labels = prepared.target.labels.numpy()
    return labels, Grid(labels.shape, to_world).centres_mm()


def test_manual_labels_override_predictions():
    grid = world_grid(Box((-75, -110, -80), (75, 74, 80)), (2, 2, 2))
    labels, points = targets(prepare_map(labelled(grid, moved_mm=6.0), BOX, MODEL, weights=None))
    truth, moved = PHANTOM.labels(points), PHANTOM.labels(points - [6.0, 0, 0])
    truth[truth > 20] = 0
    inside = np.all((points > BOX.low_mm) & (points < BOX.high_mm), axis=-1)
    assert ((labels == CN) == (moved == CN)).mean() > 0.999
    # Background where the model sees the caudate and the user does not.
    assert np.bincount(labels[(truth == CN) & (moved != CN) & inside])[0] > 0
    assert not (labels[(moved != CN)] == CN)[truth[moved != CN] == CN].mean() > 0.1
    kept = (labels == PUT) & (moved != CN)
    expected = (truth == PUT) & (moved != CN) & inside
    assert 2 * (kept & expected).sum() / (kept.sum() + expected.sum()) > 0.9  # the oracle answers on 3 mm voxels


def test_outlines_between_slices_are_interpolated():
    box = Box((-45, -76, -52), (45, 35, 36))  # 22 slices of 4 mm
    thick, fine = world_grid(box, (1, 1, 4)), world_grid(box, (1, 1, 1))
    caudates = (PHANTOM.dseg(thick).array == CN).astype(np.uint8)
    carried = most_probable(soft_masks(Volume(caudates * CN, thick.affine)), fine, at_least=0.5) == CN
    truth = PHANTOM.dseg(fine).array == CN
    repeated = np.repeat(caudates > 0, 4, axis=2)
    between = [2 * (truth & other).sum() / (truth.sum() + other.sum()) for other in (carried, repeated)]
    assert between[0] > between[1] + 0.005


def test_samples_follow_an_oriented_box():
    centre_mm = np.array(BOX.centre_mm)
    turned = Box.around(centre_mm, OrientedBox((10.0, -5.0, 20.0), MODEL.input.patch_mm))
    prepared = prepare_map(labelled(world_grid(BOX, (3, 3, 3)), names=MODEL.labels), turned, MODEL, weights=None)
    _, labels = LabelledPatches([prepared], MODEL, seed=1, variation=UNVARIED)[0]
    for box, low, high in ((turned, 0.75, 1.0), (Box.centred(centre_mm, MODEL.input.patch_mm), 0.0, 0.6)):
        truth = PHANTOM.dseg(world_grid(box, MODEL.input.spacing_mm)).array
        result, wanted = labels.numpy() == PUT, truth == PUT
        assert low < 2 * (result & wanted).sum() / (result.sum() + wanted.sum()) <= high  # as of a still sample


def test_mirroring_exchanges_left_and_right():
    grid = world_grid(BOX, (3, 3, 3))
    prepared = prepare_map(labelled(grid, names=MODEL.labels), BOX, MODEL, weights=None)
    _, labels = LabelledPatches([prepared], MODEL, seed=1, variation=UNVARIED)[0]
    chi, mirrored = LabelledPatches([prepared], MODEL, seed=1, variation=replace(UNVARIED, mirrored=1))[0]
    assert chi.shape[1:] == mirrored.shape
    flipped = mirrored.flip(0)
    assert torch.equal(flipped == CN, labels == CN + 1)
    assert torch.equal(flipped > 0, labels > 0)


def test_samples_are_reproducible_and_maps_alternate():
    grid = world_grid(BOX, (3, 3, 3))
    first, second = (prepare_map(labelled(grid, names=(name,)), BOX, MODEL, weights=None) for name in ("CN_L", "PUT_L"))
    second = replace(second, chi=second.chi + 1)
    samples = LabelledPatches([first, second], MODEL, seed=3)
    assert all(torch.equal(item, other) for item, other in zip(samples[5], samples[5], strict=True))
    assert not torch.equal(samples[5][0], samples[6][0])
    brightness = [samples[index][0].median() > 2 for index in range(6)]  # 1 ppm is 10, clipped at 5
    assert [sum(brightness[turn : turn + 2]) for turn in (0, 2, 4)] == [1, 1, 1]
