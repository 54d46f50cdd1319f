from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import box_of_mask, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.registration.align import Atlas, Head
from bids_dgmseg.segmentation.localize import find_by_atlas, read_atlases
from bids_dgmseg.segmentation.predict import InferenceOptions
from tests.conftest import HEAD, coarse_chi

pytestmark = pytest.mark.usefixtures("coarse_midplane")

MODEL = replace(MODELS["dcnnet"], input=replace(MODELS["dcnnet"].input, patch_mm=(20.0, 10.0, 10.0)))
GRID = world_grid(HEAD, (3.0, 3.0, 3.0))


@pytest.fixture(scope="module")
def reference() -> Atlas:
    """Atlas of the phantom, at another position in the world than the maps."""
    shift = nib.affines.from_matvec(np.eye(3), [30, -20, 10])
    chi, labels = PHANTOM.chi(GRID, seed=5, supersampling=1), PHANTOM.dseg(GRID)
    return Atlas("phantom", Volume(chi.array, shift @ chi.affine), Volume(labels.array, shift @ labels.affine))


def turned(pitch, yaw, roll, *, scale=1.0, shift_mm=(4.0, -6.0, 9.0)):
    """Map of the phantom, turned, scaled and shifted in the world, and the true box of its DN and IN."""
    turn = nib.affines.from_matvec(
        scale * Rotation.from_euler("xzy", [pitch, yaw, roll], degrees=True).as_matrix(), shift_mm
    )
    chi = coarse_chi()
    wanted = PHANTOM.dseg(GRID)
    wanted = Volume(np.isin(wanted.array, [1, 2, 3, 4]), turn @ wanted.affine)
    return Volume(chi.array, turn @ chi.affine), box_of_mask(wanted)


def test_atlas_box_follows_the_head(reference):
    chi, truth = turned(-14, 12, -6, scale=0.9)
    box = find_by_atlas(Head(chi), [reference], MODEL)
    # Half a voxel of the map (1.25 mm) and of the affine's grid, with its corners turned.
    np.testing.assert_allclose(box.expanded(-6.25).low_mm, truth.low_mm, atol=2.0)
    np.testing.assert_allclose(box.expanded(-6.25).high_mm, truth.high_mm, atol=2.0)


@pytest.mark.slow
def test_most_similar_atlas_is_used(reference):
    chi, truth = turned(0, 0, 0)
    # The same head, but noise instead of all contrast inside the brain; its labels are elsewhere.
    noise = np.random.default_rng(0).normal(0, 0.05, reference.chi.shape).astype(np.float32)
    noisy = reference.chi.with_array(np.where(reference.chi.array == 0, 0, noise))
    shifted = reference.labels.with_array(np.roll(reference.labels.array, 20, axis=2))
    box = find_by_atlas(Head(chi), [Atlas("noise", noisy, shifted), reference], MODEL)
    np.testing.assert_allclose(box.centre_mm, truth.centre_mm, atol=2.0)


def test_padded_box_is_as_large_as_nuclei_and_margin(reference):
    chi, _ = turned(14, -9, 8)
    wanted = PHANTOM.dseg(GRID)
    turn = chi.affine @ np.linalg.inv(coarse_chi().affine)
    axes = turn[:3, :3]
    truth = box_of_mask(Volume(np.isin(wanted.array, [1, 2, 3, 4]), turn @ wanted.affine), axes=axes)
    padded = replace(MODEL, input=replace(MODEL.input, patch_mm=(90.0, 80.0, 70.0), zero_padding=True))
    box = find_by_atlas(Head(chi), [reference], padded, axes=axes).expanded(-6.25)
    np.testing.assert_allclose(box.frame[1], axes, atol=1e-12)
    np.testing.assert_allclose(box.frame[0], truth.frame[0], atol=3.0)
    np.testing.assert_allclose(box.centre_mm, truth.centre_mm, atol=2.0)


def test_atlases_come_from_the_model_folder(tmp_path):
    folder = tmp_path / "references"
    folder.mkdir()
    nib.Nifti1Image(PHANTOM.chi(GRID, supersampling=1).array, GRID.affine).to_filename(folder / "a_Chimap.nii.gz")
    nib.Nifti1Image(PHANTOM.dseg(GRID).array, GRID.affine).to_filename(folder / "a_dseg.nii.gz")
    assert [atlas.name for atlas in read_atlases(MODEL, InferenceOptions(weights=tmp_path))] == ["a"]


def test_atlas_without_the_nuclei_is_refused(reference):
    empty = replace(reference, labels=reference.labels.with_array(np.zeros_like(reference.labels.array)))
    with pytest.raises(InputError, match=r"^phantom_dseg.nii.gz: no DN_L found; correct the labels of the atlas$"):
        find_by_atlas(Head(turned(0, 0, 0)[0]), [empty], MODEL)
