import nibabel as nib
import numpy as np
import pandas as pd
import people
import pytest
import torch
from bigbrain import NAMES, read_bigbrain, write_bigbrain
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW, View, draw_head, phantom_labels, read_training_head
from bids_dgmseg.lab.simulate.template import read_bigbrain_template

pytestmark = pytest.mark.slow

OF_PHANTOM = {"red-nucleus": 5, "substantia-nigra": 7, "subthalamic-nucleus": 9, "caudate": 11, "putamen": 13}
"""Structure → its label in the phantom on the left; one more on the right."""

SHIFT_MM = np.array([0.0, 1.5, -1.5])
"""Of BigBrain's nigrae from those of the phantom."""


def write(path, array, affine):
    nib.Nifti1Image(array.astype(np.uint8), affine).to_filename(path)
    return path


def write_labels(path, array, affine, numbers):
    """Write labels of BigBrain with their table."""
    rows = [(number, name) for name, number in numbers.items()]
    pd.DataFrame(rows, columns=["index", "name"]).to_csv(str(path).replace(".nii.gz", ".tsv"), sep="\t", index=False)
    return write(path, array, affine)


def ball(labels, centre_mm, radius_mm):
    points_mm = Grid(labels.shape, labels.affine).centres_mm()
    return np.linalg.norm(points_mm - centre_mm, axis=-1) < radius_mm


@pytest.fixture(scope="module")
def template():
    """The phantom with balls in the places of accumbens, hippocampus and amygdala."""
    whole = phantom_labels()
    labels = Volume(whole.array[::2, ::2, ::2].copy(), whole.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
    for x_mm in (-1, 1):
        labels.array[ball(labels, (25 * x_mm, -17, -17), 6)] = 31
        labels.array[ball(labels, (10 * x_mm, 9, -10), 4)] = 36
    return labels


@pytest.fixture(scope="module")
def bigbrain(template):
    """Labels and their numbers, from 31 on, not in the order of the program: the template with displaced nigrae."""
    places = [f"{side}-{name}" for name in reversed(NAMES) for side in ("Right", "Left")]
    numbers = {place: number for number, place in enumerate(places, 31)}
    labels = np.zeros(template.shape, np.uint8)
    x_mm, y_mm, _ = np.moveaxis(Grid(template.shape, template.affine).centres_mm(), -1, 0)
    for order, (side, sign) in enumerate((("Left", -1), ("Right", 1))):
        for name, label in OF_PHANTOM.items():
            mask = template.array == label + order
            if name == "substantia-nigra":
                mask = ndimage.shift(mask, SHIFT_MM / template.voxel_size_mm, order=0)
            labels[mask] = numbers[f"{side}-{name}"]
        pallidum, temporal = template.array == 15 + order, template.array == 31
        middle_mm = np.abs(x_mm[pallidum]).mean()
        for name, mask in {
            "thalamus": template.array == 27,
            "nucleus-accumbens": template.array == 36,
            "hippocampus": temporal & (y_mm < -17),
            "amygdala": temporal & (y_mm >= -17),
            "globus-pallidus-externa": pallidum & (np.abs(x_mm) > middle_mm),
            "globus-pallidus-interna": pallidum & (np.abs(x_mm) <= middle_mm),
        }.items():
            labels[mask & (sign * x_mm > 0)] = numbers[f"{side}-{name}"]
    return labels, numbers


@pytest.fixture(scope="module")
def carried(template, bigbrain, tmp_path_factory):
    """Path of a template with BigBrain's nuclei next to it."""
    folder = tmp_path_factory.mktemp("bigbrain")
    path = write(folder / "template.nii.gz", template.array, template.affine)
    labels, numbers = bigbrain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people, "_STEP_MM", 3.0)
        patch.setattr(people, "_POINTS", 2000)
        other = read_bigbrain(write_labels(folder / "other.nii.gz", labels, template.affine, numbers))
        line = write_bigbrain(path, other, name="other.nii.gz")
    assert line.startswith("other.nii.gz  caudate 0.9")
    return path


@pytest.mark.parametrize(("nigra", "red_nucleus"), [(7, 5), (8, 6)])
def test_nigra_has_the_place_of_bigbrain_and_the_volume_of_the_template(carried, template, nigra, red_nucleus):
    result = read_bigbrain_template(carried)
    assert result

    def distance_mm(labels):
        """From the centre of the red nucleus: the affine may displace both."""
        centres = (np.argwhere(labels.array == label).mean(axis=0) for label in (nigra, red_nucleus))
        return np.subtract(*centres) * template.voxel_size_mm

    np.testing.assert_allclose(distance_mm(result) - distance_mm(template), SHIFT_MM, atol=0.6)  # voxels of 1.5 mm
    assert (result.array == nigra).sum() == pytest.approx((template.array == nigra).sum(), rel=0.02)


def test_pallidum_keeps_its_outline_and_is_divided_as_in_bigbrain(carried, template, bigbrain):
    result, (labels, numbers) = read_bigbrain_template(carried), bigbrain
    assert result
    np.testing.assert_array_equal(np.isin(result.array, (15, 17)), template.array == 15)
    np.testing.assert_array_equal(np.isin(result.array, (16, 18)), template.array == 16)
    for label, side in ((17, "Left"), (18, "Right")):
        true = labels == numbers[f"{side}-globus-pallidus-interna"]
        assert 2 * ((result.array == label) & true).sum() / ((result.array == label).sum() + true.sum()) > 0.9


def test_other_structures_are_those_of_the_template(carried, template):
    result = read_bigbrain_template(carried)
    assert result
    for label in (1, 2, 3, 4, 11, 12, 13, 14, 23, 24, 29):
        np.testing.assert_array_equal(result.array == label, template.array == label)


def test_a_third_of_drawn_heads_has_its_nuclei(carried):
    head = read_training_head(carried)
    assert head.bigbrain

    small = View(shape=(40, 52, 40), spacing_mm=2.0, centre_mm=SEGMENTER_VIEW.centre_mm)
    internal = [
        bool((draw_head([(head, 1.0)], small, torch.Generator().manual_seed(seed))[1] == 17).any())
        for seed in range(30)
    ]
    assert 4 <= sum(internal) <= 17  # binomial, p = 1/3: with 99 % between 4 and 17
