"""Alignment of labels with standard space, for every orientation of the file."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from bids_dgmseg.config import MNI, parse_output_space
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.registration import mni
from bids_dgmseg.registration.mni import head_masks, nucleus_shape, overlap, standard_grid

NEAR = Grid((50, 66, 53), np.array([[2.0, 0, 0, -50], [0, 2, 0, -84], [0, 0, 2, -58], [0, 0, 0, 1]]))


def standard_labels() -> np.ndarray:
    labels = np.zeros(NEAR.shape, np.uint8)
    for structure in STRUCTURES:
        labels[nucleus_shape(structure.abbreviation, NEAR) > 0.5] = structure.index
    return labels


def tilted(labels: np.ndarray) -> Volume:
    """The nuclei of a head that is smaller, tilted by 15 degrees, and elsewhere."""
    angle = np.deg2rad(15)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    move = nib.affines.from_matvec(0.88 * turn, [10, -20, 30])
    return Volume(labels, move @ NEAR.affine)


@pytest.fixture(scope="module", autouse=True)
def _few_iterations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mni, "_ITERATIONS", 5)
        yield


@pytest.fixture(scope="module")
def aligned():
    """Labels of a tilted head, and their registration."""
    labels = tilted(standard_labels())
    return labels, mni.register(labels, {})


def test_tilted_head_is_aligned(aligned):
    labels, normalization = aligned
    # Of the shapes themselves, drawn at 2 mm: smallest for the interposed nuclei, with a dozen voxels.
    dice = overlap(normalization, labels)
    assert np.median(list(dice.values())) > 0.8
    assert normalization.jacobian().min() > 0


def normalize(folder):
    chi, dseg = (folder / f"{name}.nii.gz" for name in ("chi", "dseg"))
    return mni.normalize_files(chi, dseg, None, {}, output_space=f"{MNI}:res-2", folder=folder)


def test_left_stays_left(tmp_path):
    axes = "PIR"
    volume = tilted(standard_labels())
    chi = np.where(volume.array > 0, 0.1, 0.01).astype(np.float32)
    chi[np.isin(volume.array, [structure.index for structure in STRUCTURES if structure.hemisphere == "L"])] = 0.2
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(axes)))
    affine = volume.affine @ orientations.inv_ornt_aff(turn, volume.shape)
    for name, array in (("chi", chi), ("dseg", volume.array)):
        stored = orientations.apply_orientation(array, turn)
        nib.Nifti1Image(stored, affine).to_filename(tmp_path / f"{name}.nii.gz")
    _, report, _ = normalize(tmp_path)
    dseg, mapped = (nib.Nifti1Image.from_filename(tmp_path / f"standard_{name}.nii.gz") for name in ("dseg", "chi"))
    assert dseg.shape == mapped.shape == (97, 115, 97)
    assert np.array_equal(dseg.affine, standard_grid(2).affine)
    labels = np.asarray(dseg.dataobj)
    for structure in STRUCTURES:
        x = nib.affines.apply_affine(dseg.affine, np.argwhere(labels == structure.index))[:, 0].mean()
        assert (x < 0) == (structure.hemisphere == "L")
    assert np.asarray(mapped.dataobj)[labels == STRUCTURES.named("PUT_L").index].mean() > 0.17
    assert np.asarray(mapped.dataobj)[labels == STRUCTURES.named("PUT_R").index].mean() < 0.11
    assert report["jacobian_min"] > 0


def test_too_few_nuclei_are_an_input_error():
    labels = tilted(np.where(standard_labels() <= 2, standard_labels(), 0))
    with pytest.raises(InputError, match="only 2 nuclei are labelled, at least 4"):
        mni.register(labels, {})


def test_same_input_gives_the_same_bits(aligned):
    labels, first = aligned
    second = mni.register(labels, {})
    assert np.array_equal(first.to_scan, second.to_scan)
    np.testing.assert_array_equal(first.field_mm(NEAR), second.field_mm(NEAR))


def test_doubtful_alignment_is_reported(monkeypatch, aligned, tmp_path):
    labels, normalization = aligned
    monkeypatch.setattr(mni, "overlap", lambda normalization, labels: {"DN_L": 0.2})
    monkeypatch.setattr(mni, "register", lambda *args: normalization)
    for name in ("chi", "dseg"):
        nib.Nifti1Image(labels.array, labels.affine).to_filename(tmp_path / f"{name}.nii.gz")
    _, _, (warning,) = normalize(tmp_path)
    assert "alignment with MNI152NLin2009cAsym is doubtful (median Dice of the nuclei 0.20" in warning


def test_ventricles_are_those_of_the_template():
    mask = head_masks()["ventricles"]
    centre = nib.affines.apply_affine(mask.affine, np.argwhere(mask.array > 0).mean(axis=0))
    # Symmetric template; the bodies lie above the third ventricle.
    assert abs(centre[0]) < 1.5
    assert 10 < centre[2] < 25
    assert 8 < mask.array.sum() * 8 / 1000 < 40  # mL


def test_unknown_space_is_an_input_error():
    with pytest.raises(InputError, match="output_space MNI152Lin: unknown; use MNI152NLin2009cAsym"):
        parse_output_space("MNI152Lin")


def test_shapes_are_those_of_structures_tsv():
    for structure in STRUCTURES:
        share = nucleus_shape(structure.abbreviation, NEAR)
        centre = np.average(NEAR.centres_mm().reshape(-1, 3), axis=0, weights=share.ravel())
        # The caudate's first point is the centre of its head, not of the whole nucleus.
        assert np.linalg.norm(centre - structure.mni_mm) < 5, structure.abbreviation


def test_grid_is_that_of_templateflow():
    assert standard_grid().shape == (193, 229, 193)
    assert standard_grid(2).affine[:3, 3].tolist() == [-96, -132, -78]
