import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume, read_labels


def ramp_of(volume: Volume) -> np.ndarray:
    indices = np.moveaxis(np.indices(volume.shape), 0, -1)
    world = indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return world @ (1.0, 10.0, 100.0)


def test_axes_are_ras(store, affine):
    volume = Volume.read(store(affine))
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")


def test_values_keep_their_world_position(store, affine):
    volume = Volume.read(store(affine))
    np.testing.assert_allclose(volume.array, ramp_of(volume), atol=1e-3)  # float32 at 1500


@pytest.mark.parametrize(
    "codes",
    [{"qform": 1, "sform": 0}, {"qform": 0, "sform": 2}, {"qform": 1, "sform": 4}],
    ids=["qform only", "sform only", "both"],
)
def test_either_form_defines_the_grid(store, affine, codes):
    volume = Volume.read(store(affine, **codes))
    np.testing.assert_allclose(volume.array, ramp_of(volume), atol=1e-3)  # float32 at 1500


def test_voxel_sizes_follow_the_axes(store):
    # Stored as inferior, right, anterior with 3, 0.5 and 1 mm; in RAS+: 0.5, 1 and 3 mm.
    affine = np.array([[0.0, 0.5, 0, 0], [0, 0, 1, 0], [-3, 0, 0, 0], [0, 0, 0, 1]])
    assert Volume.read(store(affine)).voxel_size_mm == pytest.approx((0.5, 1.0, 3.0))


def test_trailing_axis_of_one_is_dropped(store, affine):
    assert Volume.read(store(affine, np.ones((6, 7, 8, 1)))).array.ndim == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"^map.nii.gz: contains 1.5, expected integers; provide a label image \(dseg\)$"),
        (1e12, r"^map.nii.gz: contains 1e\+12, expected labels up to 2147483647; provide a label image"),
    ],
)
def test_non_label_image_is_rejected(store, value, message):
    with pytest.raises(InputError, match=message):
        read_labels(store(np.eye(4), np.full((6, 7, 8), value)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_labels_of_get_fdata_with_their_own_header_are_read(tmp_path, dtype):
    array = np.arange(17, dtype=dtype).repeat(4).reshape(17, 2, 2)
    image, path = nib.Nifti1Image(array, np.eye(4)), tmp_path / "edited.nii.gz"
    nib.Nifti1Image(image.get_fdata(), image.affine, image.header).to_filename(path)
    assert (
        np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)[11, 0, 0] != 11
    )  # in steps of 16 / 255 or 16 / 65535
    np.testing.assert_array_equal(read_labels(path).array, array)


def test_scaled_probabilities_are_no_labels(tmp_path):
    image = nib.Nifti1Image(np.arange(256, dtype=np.uint8).reshape(16, 4, 4), np.eye(4))
    image.header.set_slope_inter(1 / 255, 0)
    image.to_filename(tmp_path / "probseg.nii.gz")
    with pytest.raises(InputError, match=r"^probseg.nii.gz: contains 0.0039215\d*, expected integers"):
        read_labels(tmp_path / "probseg.nii.gz")
