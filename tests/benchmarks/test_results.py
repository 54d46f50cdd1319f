"""Computations and tables of the benchmarks, without networks."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine, from_matvec

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.qsm.field import dipole_field

AFFINE = np.array([[1.5, 0, 0, -20], [0, 1.5, 0, -30], [0, 0, 3, -10], [0, 0, 0, 1.0]])
CAUDATE, WHITE = 11, 22


def test_command_is_measured(script):
    usage = script("reporting").measure([sys.executable, "-c", "x = bytearray(200_000_000)"])
    assert usage.seconds > 0
    assert usage.peak_gb > 0.2
    with pytest.raises(SystemExit, match="exit code 3"):
        script("reporting").measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_thick_slices_average_values_and_vote_on_labels(script):
    thick = script("conditions").Condition("", None, slice_factor=3)
    chi, labels = thick.thicken(np.array([[[1.0, 2, 6, 3, 3, 3, 9]]], np.float32), np.array([[[0, 2, 2, 1, 0, 0, 5]]]))
    assert chi.tolist() == [[[3.0, 3.0]]]  # the seventh slice is incomplete
    assert labels.tolist() == [[[2, 0]]]


@pytest.fixture
def spot():
    """A bright spot at (10, 0, 14) mm in a map that is 0 at its faces."""
    points = apply_affine(AFFINE, np.moveaxis(np.indices((36, 40, 16)), 0, -1))
    distance = np.linalg.norm(points - (10, 0, 14), axis=-1)
    return Volume(np.exp(-((distance / 6) ** 2)).astype(np.float32), AFFINE)


def centre_mm(volume):
    weights = volume.array / volume.array.sum()
    return apply_affine(volume.affine, [(weights * index).sum() for index in np.indices(volume.shape)])


@pytest.mark.parametrize("rotation_deg", [(0, 0, 0), (20, 0, 0), (0, 15, 0), (20, -20, 20)])
def test_regridding_does_not_move_structures(script, spot, rotation_deg):
    other = script("robustness").regrid(spot, (1.0, 1.0, 1.0), rotation_deg)
    np.testing.assert_allclose(centre_mm(other), (10, 0, 14), atol=0.1)
    np.testing.assert_allclose(other.array.sum() * 1.0, spot.array.sum() * 1.5 * 1.5 * 3, rtol=0.02)
    np.testing.assert_allclose(np.linalg.norm(other.affine[:3, :3], axis=0), 1)


def test_moved_labels_are_those_that_fill_most_of_a_voxel(script):
    fine = np.zeros((18, 18, 18), np.uint8)
    fine[3:10], fine[10:15] = CAUDATE, 13  # the fourth voxel of 3 mm has one slice of the caudate
    thick = Volume(np.zeros((6, 6, 6), np.float32), from_matvec(3 * np.eye(3), (1, 1, 1)))
    moved = script("robustness").move_labels(Volume(fine, np.eye(4)), thick)
    assert moved.array[:, 3, 3].tolist() == [0, CAUDATE, CAUDATE, 13, 13, 0]


def test_border_lies_at_half_maximum(script):
    """A cube of 8 voxels at 0.1 ppm in tissue at 0, whose label is a voxel too wide in each direction."""
    labels, chi = np.zeros((24, 24, 8), np.uint8), np.zeros((24, 24, 8), np.float32)
    labels[7:17, 7:17, 2:6], chi[8:16, 8:16, 2:6] = 5, 0.1  # RN_L
    chi += np.float32(1e-3)  # tissue, not missing
    (row,) = script("borders").score_borders(Volume(chi, np.diag([1.0, 1, 2, 1])), labels).to_dict("records")
    assert (row["volume_mm3"], row["half_maximum_mm3"]) == pytest.approx((800, 512))
    assert row["dice"] == pytest.approx(2 * 256 / (400 + 256))


@pytest.mark.parametrize(("end_ppm", "compared"), [(0.06, 656 + 164), (0.04, 656), (0.02, 656 + 100)])
def test_slice_at_the_limit_of_contrast_is_not_compared(script, end_ppm, compared):
    """Label and region have 100 and 64 voxels in each of four slices; the fifth ends the nucleus."""
    labels, chi = np.zeros((24, 24, 9), np.uint8), np.full((24, 24, 9), 1e-3, np.float32)
    labels[7:17, 7:17, 2:7] = 5
    chi[8:16, 8:16, 2:6] += 0.1
    chi[8:16, 8:16, 6] += end_ppm
    (row,) = script("borders").score_borders(Volume(chi, np.eye(4)), labels).to_dict("records")
    assert row["volume_mm3"] + row["half_maximum_mm3"] == pytest.approx(compared)


def test_pieces_are_counted_in_the_three_lowest_slices(script):
    """A left putamen with a lone voxel in its third slice; a right one that is in two halves in its fourth."""
    labels = np.zeros((16, 9, 6), np.uint8)
    labels[1:5, 1:5, 1:], labels[6, 7, 3] = 13, 13
    labels[9:12, 1:6, 1:], labels[9:12, 3, 4] = 14, 0
    pieces = script("borders").lowest_pieces(labels)
    assert pieces[["pieces", "small"]].to_numpy().tolist() == [[True, True], [False, False]]


def test_inversions_of_papers_recover_a_nucleus(script):
    # A ball of 0.1 ppm; regularization takes some of its contrast, least of MEDI, which knows its border.
    x, y, z = np.ogrid[-17.5:18, -17.5:18, -17.5:18]
    ball, brain = (x - 6) ** 2 + y**2 + z**2 < 25, x**2 + y**2 + z**2 < 256
    noise = 0.002 * np.random.default_rng(1).standard_normal(ball.shape, np.float32)
    field_ppm = dipole_field(torch.from_numpy(0.1 * ball), voxel_size_mm=(1, 1, 1), padding=2.0).numpy() + noise
    invivo, field = script("invivo"), Volume(field_ppm.astype(np.float32), np.eye(4))
    maps = invivo.invert_measured_field(invivo.RealHead(field, 1 - 0.3 * ball, brain, {}, ball))
    for name, chi in maps.items():
        assert (0.085 if name == "MEDI" else 0.065) < chi[ball].mean() - chi[brain & ~ball].mean() < 0.11
        assert np.corrcoef(chi[brain], ball[brain])[0, 1] > 0.8


def test_contrast_is_to_tissue_within_4_mm(script):
    truth = np.full((24, 24, 24), WHITE, np.uint8)
    truth[10:14, 10:14, 10:14] = CAUDATE
    chi = np.where(truth == CAUDATE, 0.07, -0.03)
    chi[:4] = 5.0  # 6 mm away
    other = np.where(truth == CAUDATE, 0.05, -0.01)
    (contrast,) = script("reconstruction").contrasts_ppm(Volume(truth, np.eye(4)), (chi, other)).values()
    assert contrast == pytest.approx((0.10, 0.06))


def test_nucleus_with_one_side_has_its_own_mean(script):
    """The other side may be cut off, or too small once it is eroded."""
    labels = np.zeros((40, 40, 24), np.uint8)
    labels[8:16, 16:24, 9:15] = 5  # RN_L
    chi = np.where(labels == 5, np.float32(0.08), np.float32(-0.02))
    row = script("contrasts").measure_scan(Volume(chi, np.eye(4)), labels)
    assert row["RN, ppm"] == pytest.approx(0.08)
    labels[24:32, 16:24, 9:15], chi[24:32, 16:24, 9:15] = 6, 0.12
    row = script("contrasts").measure_scan(Volume(chi, np.eye(4)), labels)
    assert row["RN, ppm"] == pytest.approx(0.10)


def test_dataset_of_qsm_forward_is_read(script, tmp_path):
    anat, truth = (tmp_path.joinpath(*folder, "sub-1", "anat") for folder in ((), ("derivatives", "qsm-forward")))
    for folder in (anat, truth):
        folder.mkdir(parents=True)
    images = {truth / f"sub-1_{name}": 3 for name in ("Chimap", "dseg", "mask")}
    for n in (1, 2):
        images |= {anat / f"sub-1_echo-{n}_part-{part}_MEGRE": n + (part == "mag") for part in ("mag", "phase")}
    for path, value in images.items():
        nib.Nifti1Image(np.full((2, 2, 2), value, np.float32), np.eye(4)).to_filename(f"{path}.nii")
        Path(f"{path}.json").write_text(json.dumps({"EchoTime": 0.01 * value, "MagneticFieldStrength": 3}))
    # Twice as fine: 5 ppm, alternating by ±1, which voxels of the double size average out.
    fine = np.full((4, 4, 4), 5, np.float32)
    fine[::2] += 1
    fine[1::2] -= 1
    for name, image in {"masks/BrainMask.nii.gz": np.ones((4, 4, 4)), "chimodel/ChiModelMIX.nii": fine}.items():
        path = tmp_path / "tissues" / "1" / name
        path.parent.mkdir(parents=True)
        nib.Nifti1Image(image, np.eye(4)).to_filename(path)
    ((averaged, _),) = script("reconstruction").read_cases(tmp_path, tmp_path / "tissues")
    np.testing.assert_allclose(averaged.chi, 5, rtol=1e-6)
    ((echoes, labels),) = script("reconstruction").read_cases(tmp_path)
    assert (echoes.phase[:, 0, 0, 0].tolist(), echoes.magnitude[:, 0, 0, 0].tolist()) == ([1, 2], [2, 3])
    assert (echoes.echo_times_s, echoes.b0_tesla) == ((0.01, 0.02), 3.0)
    assert (echoes.chi == 3).all()
    assert (labels.array == 3).all()


def test_parts_are_recovered_from_magnetised_spheres(script):
    """The forward model, exact static dephasing with R2 of the tissue, is not the one that is inverted."""
    assert min(script("parts").correlate_parts(1)) > 0.8
