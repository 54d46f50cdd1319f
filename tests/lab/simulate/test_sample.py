import dataclasses

import numpy as np
import pytest
import torch

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import IN_VEIN, RIGHT_TISSUES, TISSUES
from bids_dgmseg.lab.simulate.artefacts import draw_scan_grid
from bids_dgmseg.lab.simulate.sample import (
    LOCALIZER_VIEW,
    SEGMENTER_VIEW,
    View,
    class_labels,
    draw_sample,
    mirror_randomly,
    nuclei_labels,
    region_labels,
    structure_labels,
    template_head,
    typical_view,
    without_resampling,
)
from bids_dgmseg.models.registry import LATERAL_VENTRICLE, VEIN, get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM

VIEW = View(shape=(36, 44, 38), spacing_mm=4.5, centre_mm=(0.0, -18.0, 5.0), outside_noise=0.0)


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_known_and_cropped_to_coverage(head, seed):
    chi, labels, _ = draw_sample([(head, 1.0)], VIEW, seed)
    assert chi.shape == labels.shape == VIEW.shape
    assert chi.dtype == torch.float32
    assert chi.isfinite().all()
    assert set((labels % IN_VEIN).unique().tolist()) <= {0, *range(1, 17), *TISSUES, *RIGHT_TISSUES.values()}
    assert labels.max() < 2 * IN_VEIN
    assert (labels[chi == 0] == 0).all()


def test_left_is_at_low_x(head):
    upright = dataclasses.replace(VIEW, cut_mm=(0.0, 0.0))
    for seed in range(6):
        _, labels, _ = draw_sample([(head, 1.0)], upright, seed)
        middle_x = {index: float((labels == index).nonzero()[:, 0].float().mean()) for index in (11, 12)}
        assert middle_x[11] < middle_x[12], seed


def test_half_of_samples_are_mirrored_with_labels():
    others = {row.index: STRUCTURES.both_sides([row.nucleus])[row.hemisphere == "L"].index for row in STRUCTURES}
    others |= {17: 18, 18: 17, 19: 20, 20: 19, 27: 37, 37: 27, 36: 38, 38: 36}  # parts, thalamus, accumbens
    names = [0, *sorted({*others, *TISSUES})]
    labels = torch.tensor(names, dtype=torch.uint8).view(-1, 1, 1)
    chi = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    mirrored = [mirror_randomly(chi, labels, torch.Generator().manual_seed(seed)) for seed in range(40)]
    pairs = [(part[0].flatten().tolist(), part[1].flatten().tolist()) for part in mirrored]
    flipped = (chi.flip(0).flatten().tolist(), [others.get(label, label) for label in reversed(names)])
    assert all(pair in ((chi.flatten().tolist(), names), flipped) for pair in pairs)
    assert 8 < pairs.count(flipped) < 32  # 20, and four SD of 3


def test_segmenter_classes_are_nuclei():
    assert nuclei_labels(torch.tensor([0, 1, 16, 21, 35])).tolist() == [0, 1, 16, 0, 0]
    assert nuclei_labels(torch.tensor([7, 17, 18, 19, 20, 27, 38])).tolist() == [7, 15, 16, 7, 8, 0, 0]


def test_classes_of_finer_networks():
    labels = torch.tensor([15, 17, 7, 19, 27, 37, 36, 23, 1])
    assert class_labels(labels, ["GPe_L", "GPi_L", "SNr_L", "SNc_L", "THA_L", "THA_R"]).tolist() == [
        *(1, 2, 3, 4, 5, 6, 0, 0, 0)
    ]
    assert class_labels(labels, ["NAC_L", LATERAL_VENTRICLE]).tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0]
    in_veins = torch.tensor([22, 23, 26]) + IN_VEIN
    assert class_labels(in_veins, [LATERAL_VENTRICLE, VEIN]).tolist() == [2, 2, 2]
    assert class_labels(in_veins, [LATERAL_VENTRICLE]).tolist() == [0, 1, 0]
    assert structure_labels(labels, get_model("dgm24").structures).tolist() == [17, 19, 21, 23, 27, 28, 25, 0, 1]


def test_parts_and_tissues_of_the_right_are_told_apart():
    grid = world_grid(Box((-75, -108, -78), (75, 72, 79)), (2.0, 2.0, 2.0))
    divided, x_mm = PHANTOM.labels(grid.centres_mm()), grid.centres_mm()[..., 0]
    for number, inner in ((15, 17), (16, 18)):
        pallidum = divided == number
        divided[pallidum & (abs(x_mm) < np.median(abs(x_mm[pallidum])))] = inner
    head = template_head(Volume(divided, grid.affine))
    view = View(shape=(40, 52, 40), spacing_mm=2.0, centre_mm=(0.0, -20.0, -7.0), cut_mm=(0.0, 0.0))
    _, labels, _ = draw_sample([(head, 1.0)], view, 3)
    present = set(labels.unique().tolist())
    assert {15, 16, 17, 18} <= present
    for inner, outer, left in ((17, 15, True), (18, 16, False)):
        middle = {number: float((labels == number).nonzero()[:, 0].float().mean()) for number in (inner, outer)}
        assert (middle[inner] > middle[outer]) == left  # the inner part is nearer to the midline
    thalami = [float((labels == number).nonzero()[:, 0].float().mean()) for number in (27, 37)]
    assert thalami[0] < thalami[1]


def test_every_label_belongs_to_a_localizer_class():
    regions = region_labels(torch.tensor([*range(1, 21), *TISSUES, *RIGHT_TISSUES.values()]))
    assert (regions > 0).all()
    assert region_labels(torch.tensor([0, 1, 4, 5, 16, 21, 23, 29, 35])).tolist() == [0, 5, 5, 4, 4, 1, 3, 2, 1]
    assert region_labels(torch.tensor([22, 23, 30]) + IN_VEIN).tolist() == [1, 3, 2]


def test_views_match_spacing_of_shipped_networks():
    model = get_model("default")
    for shown, view in ((model.input, SEGMENTER_VIEW), (model.localizer.input, LOCALIZER_VIEW)):
        assert shown is not None
        assert (view.spacing_mm,) * 3 == pytest.approx(shown.spacing_mm)


def test_typical_subject_is_middle_aged_and_upright():
    values = typical_view(SEGMENTER_VIEW).values
    assert values.mixture == 0
    assert values.age_years == (45.0, 45.0)
    assert values.iron_sd == SEGMENTER_VIEW.values.iron_sd
    rotation_deg = typical_view(SEGMENTER_VIEW, 1.0).head.rotation_deg
    assert rotation_deg == tuple(angle / 2 for angle in SEGMENTER_VIEW.head.rotation_deg)


def test_typical_scan_is_3_tesla_with_same_view():
    view = dataclasses.replace(SEGMENTER_VIEW, outside_noise=0.4)
    typical = typical_view(view, 0.5)
    assert typical.artefacts.reconstruction.b0_tesla == (3.0,)
    for name in ("in_plane_mm", "slice_mm", "clinical_mm"):
        assert getattr(typical.artefacts, name) == getattr(view.artefacts, name)
    assert (typical.cut_mm, typical.outside_noise, typical.shape) == (view.cut_mm, 0.4, view.shape)


def test_scan_without_resampling_is_not_interpolated():
    ranges = without_resampling(SEGMENTER_VIEW).artefacts
    array = torch.randn((12, 14, 16), generator=torch.Generator().manual_seed(0))
    for seed in range(40):  # an eighth of scans would be oblique
        grid = draw_scan_grid((12, 14, 16), 1.0, ranges, torch.Generator().manual_seed(seed))
        assert torch.allclose(grid.interpolate(grid.average(array)), array, atol=1e-4)
