from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_header, load_image, write_image, write_like

opened = nib.Nifti1Image.from_filename

UPRIGHT = np.diag([2.0, 2.0, 2.0, 1.0])
MIRRORED = np.diag([-2.0, 2.0, 2.0, 1.0])


def geometry(path) -> dict[str, bytes]:
    header = opened(path).header
    fields = "qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z"
    return {field: header[field].tobytes() for field in fields.split()} | {"pixdim": header["pixdim"][:4].tobytes()}


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (0, 0), (3, 4)])
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_written_grid_equals_the_original(store, tmp_path, affine, codes, name):
    stored = store(affine, name=name, qform=codes[0], sform=codes[1])
    out = write_like(Volume.read(stored).array, stored, tmp_path / f"out_{name}")
    assert geometry(out) == geometry(stored)
    np.testing.assert_array_equal(opened(out).affine, opened(stored).affine)
    np.testing.assert_array_equal(opened(out).get_fdata(), opened(stored).get_fdata())


def test_channels_are_written_to_their_voxels(store, tmp_path, affine):
    stored = store(affine)
    ras = Volume.read(stored).array
    out = write_like(np.stack([ras, -ras], axis=-1), stored, tmp_path / "channels.nii.gz")
    original = opened(stored).get_fdata()
    np.testing.assert_array_equal(opened(out).get_fdata(), np.stack([original, -original], axis=-1))
    assert opened(out).header.get_xyzt_units() == ("mm", "sec")  # BIDS demands a unit of any fourth axis


@pytest.mark.parametrize(("scale", "value"), [(None, 51), (1 / 255, 0.2)])
def test_type_scale_and_unit_are_in_the_header(store, tmp_path, affine, scale, value):
    stored = store(affine)
    out = write_like(np.full(Volume.read(stored).shape, 51, np.uint8), stored, tmp_path / "p.nii.gz", scale=scale)
    assert opened(out).get_data_dtype() == np.uint8
    assert opened(out).header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(opened(out).get_fdata(), value, rtol=1e-6)  # the scale is float32


@settings(max_examples=20)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    sizes=st.tuples(*[st.floats(0.3, 5)] * 3),
)
def test_any_grid_survives_a_round_trip(tmp_path_factory, angles, flips, sizes):
    folder = tmp_path_factory.mktemp("grid")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * flips * sizes
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nib.Nifti1Image(array, affine).to_filename(folder / "in.nii")
    volume = Volume.read(folder / "in.nii")
    position_mm = opened(folder / "in.nii").affine @ (1, 2, 3, 1)
    index = np.rint(np.linalg.solve(volume.affine, position_mm)[:3]).astype(int)
    assert volume.array[tuple(index)] == array[1, 2, 3]
    assert np.linalg.det(volume.affine[:3, :3]) > 0
    out = write_like(volume.array, folder / "in.nii", folder / "out.nii")
    np.testing.assert_array_equal(opened(out).get_fdata(), array)


UNFETCHED = r"^map.nii.gz: content not fetched \(the file is only a pointer\); fetch it first"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"map.nii.gz: no such file; check the path"),
        ("/annex/objects/MD5E-s1--aa.nii.gz\n", UNFETCHED),
        ("../../.git/annex/objects/x/y/MD5E-s1--aa.nii.gz", UNFETCHED),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", UNFETCHED),
        ("no image", r"^map.nii.gz: cannot be read as NIfTI \(File map.nii.gz is not a "),
    ],
)
def test_missing_or_unfetched_file_is_reported(tmp_path, content, message):
    if content is not None:
        (tmp_path / "map.nii.gz").write_text(content)
    with pytest.raises(InputError, match=message):
        Volume.read(tmp_path / "map.nii.gz")


def test_broken_symlink_is_reported(tmp_path):
    (tmp_path / "map.nii.gz").symlink_to("../.git/annex/objects/x")  # as DataLad leaves files that were not fetched
    with pytest.raises(InputError, match=r"^map.nii.gz: content not fetched \(broken symlink\); fetch"):
        Volume.read(tmp_path / "map.nii.gz")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"array": np.ones((6, 7, 8, 2))}, r"has 4 dimensions \(6, 7, 8, 2\), expected 3; provide one"),
        ({"dtype": np.complex64}, r"contains complex64 values, expected one real number per voxel"),
    ],
)
def test_4d_and_complex_images_are_rejected(store, affine, stored, message):
    with pytest.raises(InputError, match=f"map.nii.gz: {message}"):
        Volume.read(store(affine, **stored))


@pytest.mark.parametrize("kept", [0, 10, 100, 500])
def test_truncated_file_is_rejected(store, affine, kept):
    path = store(affine)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"^map.nii.gz: (cannot be read as NIfTI|the data are damaged or truncated)"):
        Volume.read(path)


@pytest.mark.parametrize(
    ("start", "bytes_written"),
    [
        pytest.param(70, b"\x00\x10", id="data type that does not exist"),
        pytest.param(40, b"\x03\x00\xff\x7f\xff\x7f\xff\x7f", id="size of 35 terabytes"),
        pytest.param(108, b"\x00\x00\xc8\x42", id="data from byte 100, inside the header"),
    ],
)
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_damaged_header_is_rejected(store, affine, start, bytes_written, name):
    path = store(affine, name=name)
    packed = name.endswith(".gz")
    data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    data[start : start + len(bytes_written)] = bytes_written
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(
        InputError, match=r"^map.nii(.gz)?: (cannot be read as NIfTI|the data are damaged|.* GB of memory)"
    ):
        Volume.read(path)


@pytest.mark.parametrize("row", [(0, 0, 0, 0), (0, 1, 0, 0), (np.nan, 0, 1, 0)])
def test_singular_affine_is_rejected(store, row):
    path = store(np.eye(4), name="map.nii")
    data = bytearray(path.read_bytes())
    data[312:328] = np.array(row, "<f4").tobytes()  # srow_z
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"map.nii: the affine is not invertible"):
        load_image(path)


def image(*, qform=(UPRIGHT, 1), sform=(UPRIGHT, 1)) -> nib.Nifti1Image:
    """Ten voxels along each axis; each form is an affine and its code."""
    made = nib.Nifti1Image(np.zeros((10, 10, 10), np.float32), UPRIGHT)
    made.set_qform(*qform)
    made.set_sform(*sform)
    return made


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (1, 4)])
def test_consistent_forms_have_no_warning(codes):
    assert check_header(image(qform=(UPRIGHT, codes[0]), sform=(UPRIGHT, codes[1])), "a.nii") == ()


def test_missing_orientation_is_a_warning():
    unoriented = image(qform=(None, 0), sform=(None, 0))
    (warning,) = check_header(unoriented, "a.nii")
    assert warning.startswith("a.nii: no orientation in the header (qform and sform codes are 0); the first axis is")
    assert nib.aff2axcodes(unoriented.affine) == ("L", "A", "S")  # as the warning states


def test_different_forms_are_a_warning():
    (warning,) = check_header(image(sform=(MIRRORED, 1)), "a.nii")
    # Voxel 9 of the first axis lies at 18 mm in one and at -18 mm in the other.
    assert warning == "a.nii: qform and sform differ by up to 36 mm; the sform is used, check left and right"


def test_different_voxel_sizes_are_a_warning():
    strange = image(qform=(None, 0))
    strange.header["pixdim"][1:4] = [2.0, 2.0, 3.0]
    (warning,) = check_header(strange, "a.nii")
    assert warning == (
        "a.nii: voxel size is 2 x 2 x 3 mm in pixdim but 2 x 2 x 2 mm in the affine; the affine is used, "
        "check the voxel size"
    )


@pytest.mark.parametrize(("edge", "shown"), [(2500, "2.5e.03"), (0.0025, "0.0025")])  # in micrometres, in metres
def test_implausible_voxel_size_is_rejected(edge, shown):
    strange = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.diag([1, edge, edge, 1]))
    with pytest.raises(InputError, match=rf"^a.nii: voxel size 1 x {shown} x {shown} mm, expected 0.05 to 20 mm"):
        check_header(strange, "a.nii")


@pytest.mark.parametrize(("shear", "refused"), [(0.02, False), (0.1, True)])  # tan 1.1 and tan 5.7 degrees
def test_sheared_affine_is_rejected(shear, refused):
    sheared = UPRIGHT.copy()
    sheared[0, 1] = 2 * shear
    rotation = np.array([[0.8, 0, 0.6, 0], [0, 1, 0, 0], [-0.6, 0, 0.8, 0], [0, 0, 0, 1]])
    slanted = nib.Nifti1Image(np.zeros((10, 10, 10), np.float32), rotation @ sheared)
    if not refused:
        check_header(slanted, "a.nii")
        return
    with pytest.raises(InputError, match=r"^a.nii: the axes deviate from right angles by 5.7 degrees \(.*; resample"):
        check_header(slanted, "a.nii")


def edit_header(path, **fields):
    """Overwrite fields of a stored header without nibabel's corrections."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.tobytes() + content[348:])
    return path


NO_SIZE = {"pixdim": [1, 0, 2, 2, 1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("sform", "fields", "message"),
    [
        (0, NO_SIZE, r"^map.nii: pixdim is 0 x 2 x 2 mm and there is no sform, so the voxel size is unknown; correct"),
        (0, {"quatern_b": 5}, r"^map.nii: invalid quaternion in its qform and no sform, so the"),
        (
            1,
            {"srow_x": [2, 0, 0, 1e30]},
            r"^map.nii: the image is 1e\+30 mm from the origin of its coordinates \(srow\)",
        ),
        (0, {"qoffset_x": -1e30}, r"^map.nii: the image is 1e\+30 mm from the origin of its coordinates \(qoffset\), "),
    ],
)
def test_unknown_grid_is_refused(store, sform, fields, message):
    path = edit_header(store(UPRIGHT, name="map.nii", sform=sform), **fields)
    with pytest.raises(InputError, match=message):
        load_image(path)


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        (NO_SIZE, "map.nii: voxel size is 0 x 2 x 2 mm in pixdim but 2 x 2 x 2 mm in the affine; the affine is used"),
        ({"quatern_b": 5}, "map.nii: the quaternion or offset of its qform is invalid; the sform is used"),
        ({"quatern_b": np.nan}, "map.nii: the quaternion or offset of its qform is invalid; the sform is used"),
        ({"qoffset_x": 1e30}, "map.nii: qform and sform differ by up to 1e+30 mm; the sform is used, check left"),
    ],
)
def test_valid_sform_replaces_a_damaged_qform(store, tmp_path, fields, warning):
    path = edit_header(store(UPRIGHT, name="map.nii"), **fields)
    volume = Volume.read(path)
    np.testing.assert_array_equal(volume.affine, UPRIGHT)
    assert check_header(load_image(path), "map.nii")[0].startswith(warning)
    out = write_like(volume.array, path, tmp_path / "out.nii")
    np.testing.assert_array_equal(Volume.read(out).array, volume.array)


def test_image_larger_than_the_memory_is_not_read(store, monkeypatch):
    path = store(UPRIGHT)  # 336 voxels of 4 bytes, which become 8
    monkeypatch.setattr("bids_dgmseg.io.nifti.available_memory_gb", lambda: 336 * 12 / 1e9)
    Volume.read(path, np.float64)
    monkeypatch.setattr("bids_dgmseg.io.nifti.available_memory_gb", lambda: 336 * 11 / 1e9)
    with pytest.raises(
        InputError, match=r"^map.nii.gz: 6 x 7 x 8 voxels need 0.0 GB of memory, 0.0 GB are available; "
    ):
        Volume.read(path, np.float64)


def test_affine_changed_in_place_is_that_of_the_file(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), MIRRORED)
    image.affine[:] = UPRIGHT  # the header is not updated
    np.testing.assert_array_equal(opened(write_image(image, tmp_path, "map")).affine, UPRIGHT)
