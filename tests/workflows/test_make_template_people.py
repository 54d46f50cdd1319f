import nibabel as nib
import numpy as np
import people
import pytest
import torch
from people import find_heads, read_head, write_warps
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.ranges import HeadRanges
from bids_dgmseg.lab.simulate.sample import phantom_labels
from bids_dgmseg.lab.simulate.template import interpolate, read_warps, warps_path

pytestmark = pytest.mark.slow

HOA = {11: 9, 12: 10, 13: 11, 14: 12, 15: 13, 16: 14, 24: 4, 25: 5, 5: 15, 6: 15, 7: 15, 8: 15, 9: 15, 10: 15, 28: 15}
"""Label of the phantom → label of the Harvard-Oxford Atlas, for structures without sides or with the same sides."""

SIDES = {23: (1, 2), 27: (16, 17), 29: (29, 30), 30: (31, 32), 1: (31, 31), 2: (32, 32), 3: (31, 31), 4: (32, 32)}
"""Label of the phantom → labels on the left and right."""

NOT_IN_PHANTOM = ((7, 8), (18, 19), (20, 21), (22, 23), (27, 28))
"""Accumbens, temporal horn, hippocampus, amygdala and ventral diencephalon: one voxel each."""


def write(path, array, affine):
    nib.Nifti1Image(array.astype(np.uint8), affine).to_filename(path)
    return path


def as_person(labels):
    """Convert the labels of the phantom into those of a person."""
    left = (labels.affine[0, 0] * np.arange(labels.shape[0]) + labels.affine[0, 3] < 0)[:, None, None]
    person = np.zeros(labels.shape, np.uint8)
    for number, other in HOA.items():
        person[labels.array == number] = other
    for number, (on_left, on_right) in SIDES.items():
        person[(labels.array == number) & left] = on_left
        person[(labels.array == number) & ~left] = on_right
    for place, (on_left, on_right) in enumerate(NOT_IN_PHANTOM):
        person[place, 0, 0], person[-1 - place, 0, 0] = on_left, on_right
    return person


@pytest.fixture(scope="module")
def template():
    labels = phantom_labels()
    thinned = labels.array[::2, ::2, ::2]
    affine = labels.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    return Volume(thinned, affine)


@pytest.fixture(scope="module")
def study(template, tmp_path_factory):
    """A template, a person whose right putamen lies 3 mm further outside, and their warps."""
    folder = tmp_path_factory.mktemp("people")
    path = write(folder / "template.nii.gz", template.array, template.affine)
    person = as_person(template)
    putamen = person == 12
    person[putamen] = 0
    person[ndimage.shift(putamen, (2, 0, 0), order=0)] = 12  # two voxels of 1.5 mm
    (folder / "heads").mkdir()
    write(folder / "heads" / "person_dseg.nii.gz", person, template.affine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people, "_STEP_MM", 3.0)
        patch.setattr(people, "_POINTS", 4000)
        lines = list(write_warps(path, find_heads(folder / "heads")))
    return path, lines


def test_warp_moves_the_displaced_putamen(study, template):
    path, _ = study
    warps = read_warps(path)
    assert warps
    centre = torch.tensor(nib.affines.apply_affine(template.affine, np.argwhere(template.array == 14).mean(axis=0)))
    there = (centre + torch.tensor([3.0, 0.0, 0.0])).float()[None]
    moved = interpolate(warps.displacement_mm[0].float(), warps.world_to_index, there)
    # From the person's putamen back to the template's, 3 mm towards the midline, less what the affine explains.
    assert -3.6 < float(moved[0, 0]) < -1.5


def test_people_vary_between_none_and_the_whole_warp(study):
    warps = read_warps(study[0])
    assert warps
    ranges = HeadRanges(person=(1.0, 1.0), mixed=0.0)
    drawn = [warps.draw(ranges, torch.Generator().manual_seed(seed)).abs().max() for seed in range(12)]
    # One person and the template itself, each drawn in half of the heads.
    assert {round(float(size), 2) for size in drawn} == {0.0, round(float(warps.displacement_mm.abs().max()), 2)}


def test_warps_of_another_template_are_refused(study, template, tmp_path):
    other = write(tmp_path / "template.nii.gz", template.array[:-1], template.affine)
    warps_path(other).write_bytes(warps_path(study[0]).read_bytes())
    with pytest.raises(InputError, match=r"template_warps.nii.gz: was computed for another version of template.nii.gz"):
        read_warps(other)


def test_missing_structure_is_reported(template, tmp_path):
    person = as_person(template)
    person[person == 13] = 0
    with pytest.raises(InputError, match=r"head.nii.gz: label 13 not found"):
        read_head(write(tmp_path / "head.nii.gz", person, template.affine))


@pytest.mark.parametrize(("label", "other"), [(9, 11), (1, 2)])
def test_exchanged_structures_are_reported_before_computing(template, tmp_path, label, other):
    person = as_person(template)
    path = write(tmp_path / "template.nii.gz", template.array, template.affine)
    good = write(tmp_path / "good.nii.gz", person, template.affine)
    exchanged = np.where(person == label, other, np.where(person == other, label, person))
    head = write(tmp_path / "head.nii.gz", exchanged, template.affine)
    first, second = sorted((label, other))
    with pytest.raises(InputError, match=rf"^head.nii.gz: label ({first} lies where {second}|{second} .* {first}) is "):
        next(iter(write_warps(path, [good, head])))
    assert not warps_path(path).exists()
