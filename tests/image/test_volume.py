import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image, write_like

opened = nib.Nifti1Image.from_filename


def ramp_of(volume: Volume) -> np.ndarray:
    indices = np.moveaxis(np.indices(volume.shape), 0, -1)
    world = indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return world @ (1.0, 10.0, 100.0)


def geometry(path) -> dict[str, bytes]:
    header = opened(path).header
    fields = [
        "qform_code",
        "sform_code",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "qoffset_y",
        "qoffset_z",
        "srow_x",
        "srow_y",
        "srow_z",
    ]
    return {field: header[field].tobytes() for field in fields} | {"pixdim": header["pixdim"][:4].tobytes()}


def test_axes_run_to_right_front_and_top(store, affine):
    volume = Volume.read(store(affine))
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")


def test_every_value_keeps_its_place_in_the_world(store, affine):
    volume = Volume.read(store(affine))
    np.testing.assert_allclose(volume.array, ramp_of(volume), atol=1e-3)  # float32 at 1500


@pytest.mark.parametrize(
    "codes",
    [{"qform": 1, "sform": 0}, {"qform": 0, "sform": 2}, {"qform": 1, "sform": 4}],
    ids=["qform only", "sform only", "both"],
)
def test_either_form_is_enough(store, affine, codes):
    volume = Volume.read(store(affine, **codes))
    np.testing.assert_allclose(volume.array, ramp_of(volume), atol=1e-3)  # float32 at 1500


def test_scaling_in_the_header_is_applied(store, tmp_path, affine):
    image = nib.Nifti1Image(np.full((6, 7, 8), 300, np.int16), affine)
    image.header.set_slope_inter(0.001, -0.1)
    image.to_filename(tmp_path / "scaled.nii")
    volume = Volume.read(tmp_path / "scaled.nii")
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, 0.2, rtol=1e-6)  # 300 / 1000 - 0.1


def test_voxel_sizes_follow_the_turned_axes(store):
    # Stored as inferior, right, front with 3, 0.5 and 1 mm; turned: right 0.5, front 1, top 3.
    affine = np.array([[0.0, 0.5, 0, 0], [0, 0, 1, 0], [-3, 0, 0, 0], [0, 0, 0, 1]])
    assert Volume.read(store(affine)).voxel_size_mm == pytest.approx((0.5, 1.0, 3.0))


def test_a_fourth_axis_of_one_is_dropped(store, affine):
    assert Volume.read(store(affine, np.ones((6, 7, 8, 1)))).array.ndim == 3


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (0, 0), (3, 4)])
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_the_way_back_is_exact(store, tmp_path, affine, codes, name):
    stored = store(affine, name=name, qform=codes[0], sform=codes[1])
    out = write_like(Volume.read(stored).array, stored, tmp_path / f"out_{name}")
    assert geometry(out) == geometry(stored)
    np.testing.assert_array_equal(opened(out).affine, opened(stored).affine)
    np.testing.assert_array_equal(opened(out).get_fdata(), opened(stored).get_fdata())


def test_channels_go_back_to_their_voxels(store, tmp_path, affine):
    stored = store(affine)
    turned = Volume.read(stored).array
    out = write_like(np.stack([turned, -turned], axis=-1), stored, tmp_path / "channels.nii.gz")
    original = opened(stored).get_fdata()
    np.testing.assert_array_equal(opened(out).get_fdata(), np.stack([original, -original], axis=-1))


def test_a_scale_is_stored_for_the_reader(store, tmp_path, affine):
    stored = store(affine)
    out = write_like(np.full(Volume.read(stored).shape, 51, np.uint8), stored, tmp_path / "p.nii.gz", scale=1 / 255)
    assert opened(out).get_data_dtype() == np.uint8
    np.testing.assert_allclose(opened(out).get_fdata(), 0.2, rtol=1e-6)  # 51 / 255, the scale in float32


def test_labels_keep_their_type_and_unit(store, tmp_path, affine):
    stored = store(affine)
    out = write_like(np.ones(Volume.read(stored).shape, np.uint8), stored, tmp_path / "dseg.nii.gz")
    assert opened(out).get_data_dtype() == np.uint8
    assert opened(out).header.get_xyzt_units()[0] == "mm"


@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    sizes=st.tuples(*[st.floats(0.3, 5)] * 3),
)
def test_any_grid_reads_in_place_and_goes_back(tmp_path_factory, angles, flips, sizes):
    folder = tmp_path_factory.mktemp("grid")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * flips * sizes
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nib.Nifti1Image(array, affine).to_filename(folder / "in.nii")
    volume = Volume.read(folder / "in.nii")
    place = opened(folder / "in.nii").affine @ (1, 2, 3, 1)
    index = np.rint(np.linalg.solve(volume.affine, place)[:3]).astype(int)
    assert volume.array[tuple(index)] == array[1, 2, 3]
    assert np.linalg.det(volume.affine[:3, :3]) > 0
    out = write_like(volume.array, folder / "in.nii", folder / "out.nii")
    np.testing.assert_array_equal(opened(out).get_fdata(), array)


def test_another_grid_is_not_written(store, tmp_path, affine):
    with pytest.raises(ValueError, match=r"array has shape \(1, 1, 1\) in the axes of the image, expected"):
        write_like(np.zeros((1, 1, 1)), store(affine), tmp_path / "out.nii")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.nii: no such file; check the path"):
        Volume.read(tmp_path / "none.nii")


@pytest.mark.parametrize(
    "pointer",
    [
        "/annex/objects/MD5E-s1--aa.nii.gz\n",
        "../../.git/annex/objects/x/y/MD5E-s1--aa.nii.gz",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n",
    ],
)
def test_content_that_was_not_fetched_is_recognised(tmp_path, pointer):
    (tmp_path / "map.nii.gz").write_text(pointer)
    with pytest.raises(
        InputError, match=r"^map.nii.gz: content not fetched \(the file is only a pointer\); fetch it first"
    ):
        Volume.read(tmp_path / "map.nii.gz")


def test_a_link_that_leads_nowhere_is_recognised(tmp_path):
    (tmp_path / "map.nii.gz").symlink_to("../.git/annex/objects/x")  # as DataLad leaves files that were not fetched
    with pytest.raises(InputError, match=r"^map.nii.gz: content not fetched \(broken symlink\); fetch"):
        Volume.read(tmp_path / "map.nii.gz")


def test_a_file_without_permission_is_recognised(tmp_path, monkeypatch):
    (tmp_path / "map.nii.gz").touch(mode=0)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(InputError, match=r"^map.nii.gz: cannot be read \(Permission denied\); correct its "):
        Volume.read(tmp_path / "map.nii.gz")


def test_a_reason_of_nibabel_names_the_file_without_its_folders(tmp_path):
    (tmp_path / "map.nii.gz").write_text("no image")
    with pytest.raises(InputError, match=r"^map.nii.gz: cannot be read as NIfTI \(File map.nii.gz is not a "):
        Volume.read(tmp_path / "map.nii.gz")


def test_a_reason_of_nibabel_is_one_line(store, affine):
    path = store(affine, name="map.nii")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match=r"^map.nii: the data are damaged or truncated \([^\n/]*\); copy "):
        Volume.read(path)


def test_several_volumes_are_refused(store, affine):
    with pytest.raises(InputError, match=r"map.nii.gz: has 4 dimensions \(6, 7, 8, 2\), expected 3; provide one"):
        Volume.read(store(affine, np.ones((6, 7, 8, 2))))


def test_complex_values_are_refused(store, affine):
    with pytest.raises(InputError, match=r"map.nii.gz: contains complex64 values, expected one real number per voxel"):
        Volume.read(store(affine, dtype=np.complex64))


@pytest.mark.parametrize("kept", [0, 10, 100, 500])
def test_a_truncated_file_is_refused(store, affine, kept):
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
def test_a_damaged_header_is_refused(store, affine, start, bytes_written, name):
    path = store(affine, name=name)
    packed = name.endswith(".gz")
    data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    data[start : start + len(bytes_written)] = bytes_written
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(InputError, match=r"^map.nii(.gz)?: (cannot be read as NIfTI|the data are damaged)"):
        Volume.read(path)


@pytest.mark.parametrize(("kind", "first"), [(nib.Nifti1Image, 352), (nib.Nifti2Image, 544)])
def test_voxels_that_begin_at_the_files_first_byte_are_refused(tmp_path, kind, first):
    path = tmp_path / "map.nii"
    kind(np.ones((4, 4, 4), np.float32), np.eye(4)).to_filename(path)
    data = bytearray(path.read_bytes())
    where = {352: slice(108, 112), 544: slice(168, 176)}[first]
    data[where] = bytes(where.stop - where.start)
    path.write_bytes(data)
    said = rf"^map.nii: the data start inside the header \(vox_offset 0, expected at least {first}\); correct"
    with pytest.raises(InputError, match=said):
        Volume.read(path)


@pytest.mark.parametrize("row", [(0, 0, 0, 0), (0, 1, 0, 0), (np.nan, 0, 1, 0)])
def test_an_affine_without_sizes_is_refused(store, row):
    path = store(np.eye(4), name="map.nii")
    data = bytearray(path.read_bytes())
    data[312:328] = np.array(row, "<f4").tobytes()  # srow_z
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"map.nii: the affine is not invertible"):
        load_image(path)


def test_other_formats_are_refused(tmp_path):
    nib.MGHImage(np.ones((2, 2, 2), np.float32), np.eye(4)).to_filename(tmp_path / "map.mgz")
    with pytest.raises(InputError, match=r"map.mgz: MGHImage is not NIfTI; convert it to .nii.gz"):
        Volume.read(tmp_path / "map.mgz")


def test_a_volume_has_three_axes():
    with pytest.raises(ValueError, match=r"a Volume has 3 axes, got shape \(2, 2\)"):
        Volume(np.zeros((2, 2)), np.eye(4))


def test_an_affine_has_four_rows():
    with pytest.raises(ValueError, match=r"an affine has shape \(4, 4\), got \(3, 3\)"):
        Volume(np.zeros((2, 2, 2)), np.eye(3))


def test_another_array_must_lie_on_the_grid():
    with pytest.raises(ValueError, match=r"array has shape \(2, 2, 3\), expected \(2, 2, 2\)"):
        Volume(np.zeros((2, 2, 2)), np.eye(4)).with_array(np.zeros((2, 2, 3)))
