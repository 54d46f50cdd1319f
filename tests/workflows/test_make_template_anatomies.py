from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import people
import pytest
import torch
from anatomies import ANATOMIES, read_anatomy, write_anatomy
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW, View, draw_head, phantom_labels, read_training_head
from bids_dgmseg.lab.simulate.template import read_other_templates

pytestmark = pytest.mark.slow

OF_PHANTOM = {"RN": 5, "SN": 7, "STN": 9, "CN": 11, "PUT": 13}
"""Structure → its label in the phantom on the left; one more on the right."""

SHIFT_MM = np.array([0.0, 1.5, -1.5])
"""Of the other anatomy's nigrae from those of the phantom."""


def write(path, array, affine):
    nib.Nifti1Image(array.astype(np.uint8), affine).to_filename(path)
    return path


def write_labels(path, array, affine, numbers):
    """Write labels of another anatomy with their table."""
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


def draw_labels(template, anatomy, accumbens_mm):
    """Labels and their numbers, from 31 on, not in the order of the program: the template with displaced nigrae."""
    names = {name: pattern.replace("(?!mtt).*", "medial") for name, pattern in ANATOMIES[anatomy].names.items()}
    places = [f"{side}-{name}" for name in reversed(names.values()) for side in ("Right", "Left")]
    numbers = {place: number for number, place in enumerate(places, 31)}
    labels = np.zeros(template.shape, np.uint8)
    x_mm, y_mm, _ = np.moveaxis(Grid(template.shape, template.affine).centres_mm(), -1, 0)
    for order, (side, sign) in enumerate((("Left", -1), ("Right", 1))):
        for name, label in OF_PHANTOM.items():
            mask = template.array == label + order
            if name == "SN":
                mask = ndimage.shift(mask, SHIFT_MM / template.voxel_size_mm, order=0)
            labels[mask] = numbers[f"{side}-{names[name]}"]
        pallidum, temporal = template.array == 15 + order, template.array == 31
        middle_mm = np.abs(x_mm[pallidum]).mean()
        for name, mask in {
            "THA": template.array == 27,
            "NAC": ball(template, (accumbens_mm * sign, 9, -10), 4),
            "hippocampus": temporal & (y_mm < -17),
            "amygdala": temporal & (y_mm >= -17),
            "GPe": pallidum & (np.abs(x_mm) > middle_mm),
            "GPi": pallidum & (np.abs(x_mm) <= middle_mm),
        }.items():
            if name in names:
                labels[mask & (sign * x_mm > 0)] = numbers[f"{side}-{names[name]}"]
    return labels, numbers


@pytest.fixture(scope="module")
def bigbrain(template):
    return draw_labels(template, "BigBrain", 10)


@pytest.fixture(scope="module")
def carried(template, bigbrain, tmp_path_factory):
    """Path of a template with BigBrain's nuclei next to it."""
    folder = tmp_path_factory.mktemp("bigbrain")
    path = write(folder / "template.nii.gz", template.array, template.affine)
    labels, numbers = bigbrain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people, "_STEP_MM", 3.0)
        patch.setattr(people, "_POINTS", 2000)
        other = read_anatomy(write_labels(folder / "other.nii.gz", labels, template.affine, numbers), "BigBrain")
        line = write_anatomy(path, other, "BigBrain")
    assert line.startswith("BigBrain  caudate 0.9")
    return path


def test_accumbens_is_that_of_7tami(template, tmp_path):
    labels, numbers = draw_labels(template, "7TAMIBrain", 13)
    path = write(tmp_path / "template.nii.gz", template.array, template.affine)
    other = read_anatomy(write_labels(tmp_path / "other.nii.gz", labels, template.affine, numbers), "7TAMIBrain")
    write_anatomy(path, other, "7TAMIBrain")
    result = read_other_templates(path)["7TAMIBrain"].array
    x_mm = np.abs(Grid(template.shape, template.affine).centres_mm()[..., 0])
    assert x_mm[template.array == 36].min() < 7
    assert 8 < x_mm[result == 36].min() < x_mm[result == 36].max() < 18  # 13 ± 4, voxels of 1.5 mm
    assert not np.isin(result[(template.array == 36) & (result != 36)], (0, 23, 24, 26)).any()
    for label in (23, 24, 26, 29):
        np.testing.assert_array_equal(result == label, template.array == label)


@pytest.mark.parametrize(("nigra", "red_nucleus"), [(7, 5), (8, 6)])
def test_nigra_has_the_place_of_bigbrain_and_the_volume_of_the_template(carried, template, nigra, red_nucleus):
    result = read_other_templates(carried)["BigBrain"]

    def distance_mm(labels):
        """From the centre of the red nucleus: the affine may displace both."""
        centres = (np.argwhere(labels.array == label).mean(axis=0) for label in (nigra, red_nucleus))
        return np.subtract(*centres) * template.voxel_size_mm

    np.testing.assert_allclose(distance_mm(result) - distance_mm(template), SHIFT_MM, atol=0.6)  # voxels of 1.5 mm
    assert (result.array == nigra).sum() == pytest.approx((template.array == nigra).sum(), rel=0.02)


def test_pallidum_keeps_its_outline_and_is_divided_as_in_bigbrain(carried, template, bigbrain):
    result, (labels, numbers) = read_other_templates(carried)["BigBrain"], bigbrain
    np.testing.assert_array_equal(np.isin(result.array, (15, 17)), template.array == 15)
    np.testing.assert_array_equal(np.isin(result.array, (16, 18)), template.array == 16)
    for label, side in ((17, "Left"), (18, "Right")):
        true = labels == numbers[f"{side}-globus-pallidus-interna"]
        assert 2 * ((result.array == label) & true).sum() / ((result.array == label).sum() + true.sum()) > 0.9


def test_other_structures_are_those_of_the_template(carried, template):
    result = read_other_templates(carried)["BigBrain"]
    for label in (1, 2, 3, 4, 11, 12, 13, 14, 23, 24, 29, 36):
        np.testing.assert_array_equal(result.array == label, template.array == label)


def test_anatomies_are_drawn_by_their_fractions(carried):
    head = read_training_head(carried)
    bare = replace(head.others["BigBrain"], structures=())
    head = replace(head, others={**head.others, "7TAMIBrain": bare})
    small = View(shape=(40, 52, 40), spacing_mm=2.0, centre_mm=SEGMENTER_VIEW.centre_mm)
    drawn = [draw_head([(head, 1.0)], small, torch.Generator().manual_seed(seed))[1] for seed in range(30)]
    assert 3 <= sum(bool((labels == 17).any()) for labels in drawn) <= 16  # binomial, p = 0.3: with 99 % in here
    assert 3 <= sum(not (labels == 15).any() for labels in drawn) <= 16
