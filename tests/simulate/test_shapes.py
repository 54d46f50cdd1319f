import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.simulate.anatomy import FIRST_TISSUE, LabelMap, look_up
from bids_dgmseg.simulate.patterns import Canvas, Look
from bids_dgmseg.simulate.shapes import Painted, ShapedHead, ShapeRanges, draw_bodies, shape_head
from bids_dgmseg.simulate.susceptibility import ValueRanges, fill

RIGID = ShapeRanges(
    volume_sd=0,
    odd=(0, 0),
    stretch=0,
    shift_mm=0,
    rotation_deg=0,
    bend_mm=0,
    bumps=(0, 0),
    fold_mm=(0, 0),
    hilum_mm=(-99, -99),
    gap_mm=(-1, -1),
    spread=(1, 1),
    ventricle_mm=(0, 0),
)
CENTRES_MM = {
    1: (-16, -14, -14),
    2: (16, -14, -14),
    3: (-16, 14, -14),
    4: (16, 14, -14),
    13: (-14, 0, 14),
    14: (14, 0, 14),
}
RADIUS_MM = 7.0


def ball(centre_mm, points_mm):
    return np.linalg.norm(points_mm - centre_mm, axis=-1) <= RADIUS_MM


@pytest.fixture(scope="module")
def points():
    """Voxel centres of a scan of 1 mm."""
    axes = [torch.arange(-26.0, 27.0)] * 3
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


@pytest.fixture(scope="module")
def head(points):
    """Six balls of 7 mm in white matter; the left halves of the world's numbers are odd."""
    labels = np.full(points.shape[:3], 22, np.uint8)
    for label, centre in CENTRES_MM.items():
        labels[ball(centre, points.numpy())] = label
    affine = np.eye(4)
    affine[:3, 3] = -26
    whole = LabelMap.from_volume(Volume(labels, affine))
    return shape_head(whole, whole.labels)


def draw(head, points, seed, ranges=ShapeRanges()) -> dict[int, Painted]:  # noqa: B008 -- frozen
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_bodies(head, points, ranges=ranges, ageing=0.0, generator=generator)
    return {painted.body.label: painted for painted in drawn}


def pieces(painted, shape):
    return ndimage.label(whole_mask(painted, shape), np.ones((3, 3, 3)))[1]


def whole_mask(painted, shape):
    mask = np.zeros(shape, bool)
    mask[painted.block] = painted.depth_mm.numpy() > 0
    return mask


def test_without_nuclei_their_place_is_the_nearest_tissue():
    labels = np.full((9, 5, 5), 22, np.uint8)
    labels[6:] = 21
    labels[3:6, 1:4, 1:4] = 13
    whole = LabelMap.from_volume(Volume(labels, np.eye(4)))
    ground = shape_head(whole, whole.labels).ground
    assert ground[3, 2, 2] == 22
    assert ground[5, 2, 2] == 21
    assert not ((ground > 0) & (ground <= FIRST_TISSUE)).any()


@pytest.mark.parametrize(("wide_mm", "edge_mm"), [(-2.0, 8.0), (0.0, 12.0), (2.0, 16.0), (6.0, 24.0)])
def test_ventricles_become_narrower_and_wider_than_the_template_s(points, wide_mm, edge_mm):
    labels = np.full(points.shape[:3], 22, np.uint8)
    labels[20:32, 20:32, 20:32] = 23  # a cube of 12 mm
    affine = np.eye(4)
    affine[:3, 3] = -26
    whole = LabelMap.from_volume(Volume(labels, affine))
    ranges = dataclasses.replace(RIGID, ventricle_mm=(0.0, wide_mm))
    values = ValueRanges(age_years=(75.0, 75.0), mixture=0)
    _, drawn = fill(
        shape_head(whole, whole.labels),
        points,
        spacing_mm=1.0,
        ranges=values,
        shapes=ranges,
        generator=torch.Generator().manual_seed(0),
    )
    # Where it is wider, corners are rounded: the cube, six faces, twelve quarters of a rod, a ball of that radius.
    radius = max(wide_mm, 0.0)
    rounded = 12**3 + 6 * 144 * radius + 3 * np.pi * radius**2 * 12 + 4 / 3 * np.pi * radius**3
    assert int((drawn == 23).sum()) == pytest.approx(rounded if radius else edge_mm**3, rel=0.12)
    reach = torch.nonzero(drawn == 23)
    assert (reach.max(dim=0).values - reach.min(dim=0).values + 1).tolist() == pytest.approx([edge_mm] * 3, abs=2)


def test_a_body_that_stays_as_it_is_lies_where_the_template_has_it(head, points):
    for label, painted in draw(head, points, 0, RIGID).items():
        truth = head.labels.numpy() == label
        mask = whole_mask(painted, truth.shape)
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.97, label


def test_depth_is_a_distance_in_mm(head, points):
    painted = draw(head, points, 0, RIGID)[13]
    x, y, z = (centre + 26 for centre in CENTRES_MM[13])
    block = painted.block
    along = painted.depth_mm[x - block[0].start, :, z - block[2].start]
    middle = y - block[1].start
    # Voxels of 1 mm know the surface to a third of a millimetre.
    assert float(along[middle + 3] - along[middle + 6]) == pytest.approx(3, abs=0.35)
    assert float(along[middle + 6]) == pytest.approx(RADIUS_MM - 6, abs=0.35)


def test_volumes_are_the_templates_on_average(head, points):
    ranges = dataclasses.replace(ShapeRanges(), volume_sd=0.05, odd=(0.0, 0.0))
    drawn = [draw(head, points, seed, ranges) for seed in range(100)]
    for label in CENTRES_MM:
        volumes = [float((one[label].depth_mm > 0).sum()) for one in drawn]
        # SD 5 % over 100 draws: 0.5 % of standard error.
        assert np.mean(volumes) == pytest.approx(int((head.labels == label).sum()), rel=0.03), label


def test_volumes_differ_as_asked_for(head, points):
    ranges = dataclasses.replace(ShapeRanges(), volume_sd=0.12, odd=(0.0, 0.0))
    volumes = np.array(
        [[float((body.depth_mm > 0).sum()) for body in draw(head, points, seed, ranges).values()] for seed in range(60)]
    )
    assert (volumes.std(axis=0) / volumes.mean(axis=0)).mean() == pytest.approx(0.12, rel=0.2)


def test_sides_are_drawn_on_their_own(head, points):
    drawn = draw(head, points, 3)
    left, right = (whole_mask(drawn[label], points.shape[:3]) for label in (13, 14))
    assert not np.array_equal(left, right[::-1])


@pytest.mark.parametrize("seed", range(4))
def test_a_nucleus_stays_on_its_side(points, seed):
    labels = np.full(points.shape[:3], 22, np.uint8)
    near = np.abs(points.numpy()[..., 0]) <= 6
    deep = np.linalg.norm(points.numpy()[..., 1:], axis=-1) <= 6
    labels[near & deep & (points.numpy()[..., 0] < 0)] = 5
    labels[near & deep & (points.numpy()[..., 0] > 0)] = 6
    affine = np.eye(4)
    affine[:3, 3] = -26
    whole = LabelMap.from_volume(Volume(labels, affine))
    drawn = draw(shape_head(whole, whole.labels), points, seed)
    for label, side in ((5, -1), (6, 1)):
        mask = whole_mask(drawn[label], points.shape[:3])
        assert mask.sum() > 300
        assert (points.numpy()[mask][:, 0] * side > 0).all()


def test_islands_are_two_when_a_gap_is_drawn(head, points):
    parted = dataclasses.replace(RIGID, gap_mm=(2.5, 2.5))
    for label in (3, 4):
        assert pieces(draw(head, points, 1, parted)[label], points.shape[:3]) == 2
        assert pieces(draw(head, points, 1, RIGID)[label], points.shape[:3]) == 1


def test_the_bag_is_open_towards_the_middle_and_closed_behind(head, points):
    opened = dataclasses.replace(RIGID, hilum_mm=(2.0, 2.0))
    for label, side in ((1, -1), (2, 1)):
        bag = draw(head, points, 2, opened)[label]
        mask = whole_mask(bag, points.shape[:3])
        assert ndimage.label(mask)[1] == 1
        # The mouth leads out: what a solid ball would hold there is joined to the outside.
        ground = ~mask
        assert ndimage.label(ground)[1] == 1
        grown = (mask.sum() / (4 / 3 * np.pi)) ** (1 / 3)
        missing = np.linalg.norm(points.numpy() - CENTRES_MM[label], axis=-1) < grown - 1
        missing &= ~mask
        assert missing.sum() > 30
        away = (points.numpy()[missing] - CENTRES_MM[label]).mean(axis=0)
        assert away[0] * side < -1
        assert away[1] > 0


def test_where_two_bodies_meet_the_deeper_one_wins_and_the_edge_holds_both():
    ground, chi = torch.full((5, 1, 1), 22, dtype=torch.uint8), torch.zeros(5, 1, 1)
    head = bodies_of(13, 15)
    canvas = Canvas(ground, chi, width_mm=1.0)
    block, local = (slice(0, 5),) * 3, torch.zeros(5, 1, 1, 3)
    ramp = torch.arange(5.0).view(5, 1, 1)
    canvas.paint(Painted(head[0], block, 2.2 - ramp, local), Look(0.04))  # ends at 2.2
    canvas.paint(Painted(head[1], block, ramp - 2.2, local), Look(0.12))  # begins there
    chi, labels = canvas.finish()
    assert labels.flatten().tolist() == [13, 13, 13, 15, 15]
    # Voxel 2 reaches from 1.5 to 2.5: 0.7 of it are putamen.
    assert chi.flatten().tolist() == pytest.approx([0.04, 0.04, 0.7 * 0.04 + 0.3 * 0.12, 0.12, 0.12])


def test_at_an_edge_a_voxel_has_its_share_of_the_ground():
    canvas = Canvas(torch.full((4, 1, 1), 22, dtype=torch.uint8), torch.full((4, 1, 1), -0.03), width_mm=1.0)
    ramp = torch.arange(4.0).view(4, 1, 1)
    canvas.paint(Painted(bodies_of(15)[0], (slice(0, 4),) * 3, ramp - 1.75, torch.zeros(4, 1, 1, 3)), Look(0.12))
    chi, labels = canvas.finish()
    assert labels.flatten().tolist() == [22, 22, 15, 15]
    # The surface lies at 1.75, voxel 2 reaches from 1.5 to 2.5.
    assert chi.flatten().tolist() == pytest.approx([-0.03, -0.03, 0.75 * 0.12 - 0.25 * 0.03, 0.12])


def bodies_of(*labels):
    empty = torch.zeros(3)
    head = LabelMap.from_volume(Volume(np.full((9, 9, 9), 22, np.uint8), np.eye(4)))
    blocks = []
    for label in labels:
        array = head.labels.numpy().copy()
        array[3:6, 3:6, 3:6] = label
        whole = LabelMap(torch.from_numpy(array), head.world_to_index)
        (body,) = shape_head(whole, whole.labels).bodies
        blocks.append(dataclasses.replace(body, centre_mm=empty))
    return blocks


def test_a_look_has_its_wall_and_its_stripe():
    body = bodies_of(1)[0]
    local = torch.zeros(1, 1, 3, 3)
    local[0, 0, :, 0] = torch.tensor([-3.0, 0.0, 3.0])
    painted = Painted(body, (slice(0, 1),) * 3, torch.tensor([[[0.2, 5.0, 5.0]]]), local)
    assert Look(0.1, core=0.5, wall_mm=1.5).at(painted).flatten().tolist() == pytest.approx([0.1, 0.05, 0.05])
    striped = Look(0.1, across=(1.0, 0.0, 0.0), stripe=0.4, stripe_mm=(0.0, 0.5), beyond=0.8).at(painted).flatten()
    # In the stripe's middle half of the change beyond it has happened.
    assert striped.tolist() == pytest.approx([0.1, 0.1 * 0.4 * 0.9, 0.08], rel=1e-3)


def test_shapes_switched_off_are_the_template_looked_up(head, points):
    generator = torch.Generator().manual_seed(5)
    moved = points + 0.3
    _, labels = fill(
        head, moved, spacing_mm=1.0, ranges=ValueRanges(), generator=generator, shapes=ShapeRanges(amount=0.0)
    )
    assert torch.equal(labels, look_up(head.labels, head.indices(moved)))


def test_a_seed_gives_one_filling_and_no_nucleus_is_lost(head, points):
    def filled(seed):
        return fill(head, points, spacing_mm=1.0, ranges=ValueRanges(), generator=torch.Generator().manual_seed(seed))

    first, again, other = filled(1), filled(1), filled(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    for _, labels in (first, other):
        assert set(CENTRES_MM) <= set(labels.unique().tolist())


def test_a_head_keeps_its_old_lookup(head):
    assert isinstance(head, ShapedHead)
    assert head.at(torch.tensor([[26.0 - 14, 26.0, 26.0 + 14]])).tolist() == [13]


def test_a_nucleus_out_of_view_is_left_out(head, points):
    assert set(draw(head, points[:26], 0)) == {1, 3, 13}
