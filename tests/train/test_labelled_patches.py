from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_dgmseg.image.grids import Box, Grid, OrientedBox, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import ModelInput
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.simulate.ranges import HeadRanges
from bids_dgmseg.train.augment import Variation, mirrored_labels
from bids_dgmseg.train.labelled_maps import LabelledMap, majority_vote
from bids_dgmseg.train.patches import LabelledPatches, most_probable, prepare_map, soft_masks
from tests.oracle import oracle_model

MODEL = replace(oracle_model(), input=ModelInput(spacing_mm=(3.0, 3.0, 3.0), patch_mm=(90.0, 111.0, 90.0)))
BOX = Box((-45, -76, -52), (45, 35, 38))
CN, PUT = MODEL.labels.index("CN_L") + 1, MODEL.labels.index("PUT_L") + 1
STILL = Variation(
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


def test_unlabelled_nucleus_keeps_its_prediction():
    grid = world_grid(BOX, (2, 2, 2))
    labels, _ = targets(prepare_map(labelled(grid, names=("PUT_L",)), BOX, MODEL, weights=None))
    assert (labels == CN).any()


def test_outlines_between_slices_are_interpolated():
    box = Box((-45, -76, -52), (45, 35, 36))  # 22 slices of 4 mm
    thick, fine = world_grid(box, (1, 1, 4)), world_grid(box, (1, 1, 1))
    one = (PHANTOM.dseg(thick).array == CN).astype(np.uint8)
    carried = most_probable(soft_masks(Volume(one * CN, thick.affine)), fine, at_least=0.5) == CN
    truth = PHANTOM.dseg(fine).array == CN
    repeated = np.repeat(one > 0, 4, axis=2)
    between = [2 * (truth & other).sum() / (truth.sum() + other.sum()) for other in (carried, repeated)]
    assert between[0] > between[1] + 0.005


def test_sample_without_variation_is_the_map(grid):
    prepared = prepare_map(labelled(grid, names=MODEL.labels), BOX, MODEL, weights=None)
    chi, labels = LabelledPatches([prepared], MODEL, seed=1, variation=STILL)[0]
    patch = world_grid(Box.centred(np.array(BOX.centre_mm), MODEL.input.patch_mm), MODEL.input.spacing_mm)
    assert chi.shape == (1, *patch.shape)
    truth = PHANTOM.dseg(patch).array
    for channel in (CN, PUT):
        found, wanted = labels.numpy() == channel, truth == channel
        assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.75  # 3 mm voxels, grids up to 3 mm apart
    assert np.corrcoef(chi[0].numpy().ravel(), PHANTOM.chi(patch).array.ravel())[0, 1] > 0.9


def test_samples_follow_an_oriented_box():
    centre_mm = np.array(BOX.centre_mm)
    turned = Box.around(centre_mm, OrientedBox((10.0, -5.0, 20.0), MODEL.input.patch_mm))
    prepared = prepare_map(labelled(world_grid(BOX, (3, 3, 3)), names=MODEL.labels), turned, MODEL, weights=None)
    _, labels = LabelledPatches([prepared], MODEL, seed=1, variation=STILL)[0]
    for box, low, high in ((turned, 0.75, 1.0), (Box.centred(centre_mm, MODEL.input.patch_mm), 0.0, 0.6)):
        truth = PHANTOM.dseg(world_grid(box, MODEL.input.spacing_mm)).array
        found, wanted = labels.numpy() == PUT, truth == PUT
        assert low < 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) <= high  # as of a still sample


def test_mirroring_exchanges_left_and_right():
    grid = world_grid(BOX, (3, 3, 3))
    prepared = prepare_map(labelled(grid, names=MODEL.labels), BOX, MODEL, weights=None)
    _, labels = LabelledPatches([prepared], MODEL, seed=1, variation=STILL)[0]
    chi, mirrored = LabelledPatches([prepared], MODEL, seed=1, variation=replace(STILL, mirrored=1))[0]
    assert chi.shape[1:] == mirrored.shape
    flipped = mirrored.flip(0)
    assert torch.equal(flipped == CN, labels == CN + 1)
    assert torch.equal(flipped > 0, labels > 0)


def test_mirroring_drops_unpaired_nuclei():
    assert mirrored_labels(replace(MODEL, labels=("CN_L", "PUT_R", "CN_R"))).tolist() == [0, 3, 0, 1]


def test_samples_are_reproducible_and_maps_alternate():
    grid = world_grid(BOX, (3, 3, 3))
    first, second = (prepare_map(labelled(grid, names=(name,)), BOX, MODEL, weights=None) for name in ("CN_L", "PUT_L"))
    second = replace(second, chi=second.chi + 1)
    samples = LabelledPatches([first, second], MODEL, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(samples[5], samples[5], strict=True))
    assert not torch.equal(samples[5][0], samples[6][0])
    brightness = [samples[index][0].median() > 2 for index in range(6)]  # 1 ppm is 10, clipped at 5
    assert [sum(brightness[turn : turn + 2]) for turn in (0, 2, 4)] == [1, 1, 1]


def test_small_samples_cover_the_box():
    prepared = prepare_map(labelled(world_grid(BOX, (3, 3, 3)), names=MODEL.labels), BOX, MODEL, weights=None)
    samples = LabelledPatches([prepared], MODEL, seed=1, variation=STILL, size_mm=(48.0, 48.0, 48.0))
    seen = [samples[index] for index in range(40)]
    assert all(chi.shape == (1, 16, 16, 16) for chi, _ in seen)
    # The nuclei's 16 channels lie all over the box; no sample of half its edges shows all of them.
    found = [set(labels.unique().tolist()) - {0} for _, labels in seen]
    assert set.union(*found) == set(range(1, 17))
    assert max(map(len, found)) < 16


def test_anisotropic_voxels_are_refused():
    model = replace(MODEL, input=ModelInput(spacing_mm=(1.0, 1.0, 2.0), patch_mm=(90.0, 90.0, 90.0)))
    with pytest.raises(ValueError, match="not isotropic"):
        LabelledPatches([], model, seed=1)


def test_majority_vote_prefers_background_in_ties():
    votes = [np.array(row, np.uint8) for row in ([1, 2, 0, 1], [1, 2, 2, 2], [0, 1, 1, 0])]
    assert majority_vote(votes).tolist() == [1, 2, 0, 0]
