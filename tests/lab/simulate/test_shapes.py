import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import IN_VEIN, LAST_NUCLEUS, LabelMap, look_up
from bids_dgmseg.lab.simulate.ranges import ShapeRanges, SusceptibilityRanges
from bids_dgmseg.lab.simulate.shapes import RenderedShape, draw_shapes, prepare_shapes
from bids_dgmseg.lab.simulate.susceptibility import draw_susceptibility

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


def prepare(labels, origin_mm=-26):
    """Shapes of labels with 1 mm voxels."""
    affine = np.eye(4)
    affine[:3, 3] = origin_mm
    whole = LabelMap.from_volume(Volume(labels, affine))
    return prepare_shapes(whole, whole.labels)


def ball(centre_mm, points_mm):
    return np.linalg.norm(points_mm - centre_mm, axis=-1) <= RADIUS_MM


@pytest.fixture(scope="module")
def points():
    """Voxel centres of a scan with 1 mm voxels."""
    axes = [torch.arange(-26.0, 27.0)] * 3
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


@pytest.fixture(scope="module")
def head(points):
    """Six balls of 7 mm in white matter; labels on the left are odd."""
    labels = np.full(points.shape[:3], 22, np.uint8)
    for label, centre in CENTRES_MM.items():
        labels[ball(centre, points.numpy())] = label
    return prepare(labels)


def draw(head, points, seed, ranges=ShapeRanges()) -> dict[int, RenderedShape]:  # noqa: B008 -- frozen
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_shapes(head, points, ranges=ranges, ageing=0.0, generator=generator)
    return {shape.structure.label: shape for shape in drawn}


def count_components(rendered, shape):
    return ndimage.label(full_mask(rendered, shape), np.ones((3, 3, 3)))[1]


def full_mask(rendered, shape):
    mask = np.zeros(shape, bool)
    mask[rendered.block] = rendered.depth_mm.numpy() > 0
    return mask


def test_border_of_caudate_and_accumbens_does_not_vary(points):
    labels = np.full(points.shape[:3], 22, np.uint8)
    labels[6:18, 18:34, 24:40] = 11  # -20 to -9 mm, left; from z = -2 mm upwards
    labels[6:18, 18:34, 16:24] = 36
    labels[34:46, 18:34, 24:40] = 12
    labels[34:46, 18:34, 16:24] = 36
    head, volumes = prepare(labels), []
    for seed in range(8):
        shapes = draw(head, points, seed)
        for label, middle in ((11, slice(10, 14)), (12, slice(38, 42))):
            mask = full_mask(shapes[label], labels.shape)
            assert not mask[:, :, :24].any()
            assert mask[middle, 23:29, 24].all()  # up to the border, although the caudate moves and turns
            volumes.append(mask.sum())
    assert np.mean(volumes) == pytest.approx(12 * 16 * 16, rel=0.15)
    assert np.std(volumes) > 100


def test_background_is_filled_with_nearest_tissue():
    labels = np.full((9, 5, 5), 22, np.uint8)
    labels[6:] = 21
    labels[3:6, 1:4, 1:4] = 13
    background = prepare(labels, 0).background
    assert background[3, 2, 2] == 22
    assert background[5, 2, 2] == 21
    assert not ((background > 0) & (background <= LAST_NUCLEUS)).any()


@pytest.mark.parametrize(("wide_mm", "edge_mm"), [(-2.0, 8.0), (0.0, 12.0), (2.0, 16.0), (6.0, 24.0)])
def test_ventricles_become_narrower_or_wider(points, wide_mm, edge_mm):
    labels = np.full(points.shape[:3], 22, np.uint8)
    labels[20:32, 20:32, 20:32] = 23  # a cube of 12 mm
    ranges = dataclasses.replace(RIGID, ventricle_mm=(0.0, wide_mm))
    values = SusceptibilityRanges(age_years=(75.0, 75.0), mixture=0)
    _, drawn = draw_susceptibility(
        prepare(labels),
        points,
        spacing_mm=1.0,
        ranges=values,
        shapes=ranges,
        generator=torch.Generator().manual_seed(0),
    )
    # A wider cube has rounded corners: cube, six faces, twelve quarters of a cylinder, a sphere of that radius.
    radius = max(wide_mm, 0.0)
    rounded = 12**3 + 6 * 144 * radius + 3 * np.pi * radius**2 * 12 + 4 / 3 * np.pi * radius**3
    assert int((drawn == 23).sum()) == pytest.approx(rounded if radius else edge_mm**3, rel=0.12)
    reach = torch.nonzero(drawn == 23)
    assert (reach.max(dim=0).values - reach.min(dim=0).values + 1).tolist() == pytest.approx([edge_mm] * 3, abs=2)


def test_shape_without_variation_matches_template(head, points):
    for label, rendered in draw(head, points, 0, RIGID).items():
        truth = head.labels.numpy() == label
        mask = full_mask(rendered, truth.shape)
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.97, label


def test_depth_is_a_distance_in_mm(head, points):
    rendered = draw(head, points, 0, RIGID)[13]
    x, y, z = (centre + 26 for centre in CENTRES_MM[13])
    block = rendered.block
    along = rendered.depth_mm[x - block[0].start, :, z - block[2].start]
    middle = y - block[1].start
    # Voxels of 1 mm determine the surface to about a third of a millimetre.
    assert float(along[middle + 3] - along[middle + 6]) == pytest.approx(3, abs=0.35)
    assert float(along[middle + 6]) == pytest.approx(RADIUS_MM - 6, abs=0.35)


def test_mean_volumes_match_template(head, points):
    ranges = dataclasses.replace(ShapeRanges(), volume_sd=0.05, odd=(0.0, 0.0))
    drawn = [draw(head, points, seed, ranges) for seed in range(40)]
    for label in CENTRES_MM:
        volumes = [float((shapes[label].depth_mm > 0).sum()) for shapes in drawn]
        # SD 5 % over 40 draws: 0.8 % of standard error.
        assert np.mean(volumes) == pytest.approx(int((head.labels == label).sum()), rel=0.03), label


def test_volumes_have_requested_sd(head, points):
    ranges = dataclasses.replace(ShapeRanges(), volume_sd=0.12, odd=(0.0, 0.0))
    volumes = np.array(
        [
            [float((shape.depth_mm > 0).sum()) for shape in draw(head, points, seed, ranges).values()]
            for seed in range(40)
        ]
    )
    assert (volumes.std(axis=0) / volumes.mean(axis=0)).mean() == pytest.approx(0.12, rel=0.2)


def test_sides_vary_independently(head, points):
    drawn = draw(head, points, 3)
    left, right = (full_mask(drawn[label], points.shape[:3]) for label in (13, 14))
    assert not np.array_equal(left, right[::-1])


@pytest.mark.parametrize("seed", range(4))
def test_nuclei_do_not_cross_midline(points, seed):
    labels = np.full(points.shape[:3], 22, np.uint8)
    near = np.abs(points.numpy()[..., 0]) <= 6
    deep = np.linalg.norm(points.numpy()[..., 1:], axis=-1) <= 6
    labels[near & deep & (points.numpy()[..., 0] < 0)] = 5
    labels[near & deep & (points.numpy()[..., 0] > 0)] = 6
    drawn = draw(prepare(labels), points, seed)
    for label, side in ((5, -1), (6, 1)):
        mask = full_mask(drawn[label], points.shape[:3])
        assert mask.sum() > 300
        assert (points.numpy()[mask][:, 0] * side > 0).all()


def test_interposed_nucleus_is_split_by_gap(head, points):
    split = dataclasses.replace(RIGID, gap_mm=(2.5, 2.5))
    for label in (3, 4):
        assert count_components(draw(head, points, 1, split)[label], points.shape[:3]) == 2
        assert count_components(draw(head, points, 1, RIGID)[label], points.shape[:3]) == 1


def test_dentate_hilum_opens_medially_and_anteriorly(head, points):
    opened = dataclasses.replace(RIGID, hilum_mm=(2.0, 2.0))
    for label, side in ((1, -1), (2, 1)):
        dentate = draw(head, points, 2, opened)[label]
        mask = full_mask(dentate, points.shape[:3])
        assert ndimage.label(mask)[1] == 1
        assert ndimage.label(~mask)[1] == 1  # the hilum is connected to the outside
        grown = (mask.sum() / (4 / 3 * np.pi)) ** (1 / 3)
        missing = np.linalg.norm(points.numpy() - CENTRES_MM[label], axis=-1) < grown - 1
        missing &= ~mask
        assert missing.sum() > 30
        away = (points.numpy()[missing] - CENTRES_MM[label]).mean(axis=0)
        assert away[0] * side < -1
        assert away[1] > 0


def test_zero_amount_uses_template_labels(head, points):
    generator = torch.Generator().manual_seed(5)
    moved = points + 0.3
    _, labels = draw_susceptibility(
        head, moved, spacing_mm=1.0, ranges=SusceptibilityRanges(), generator=generator, shapes=ShapeRanges(amount=0.0)
    )
    assert torch.equal(labels % IN_VEIN, look_up(head.labels, head.indices(moved)))


def test_same_seed_gives_same_head_with_all_nuclei(head, points):
    def filled(seed):
        return draw_susceptibility(
            head, points, spacing_mm=1.0, ranges=SusceptibilityRanges(), generator=torch.Generator().manual_seed(seed)
        )

    first, again, other = filled(1), filled(1), filled(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    for _, labels in (first, other):
        assert set(CENTRES_MM) <= set(labels.unique().tolist())


def test_nucleus_outside_view_is_omitted(head, points):
    assert set(draw(head, points[:26], 0)) == {1, 3, 13}
