from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.further_maps import measure_further_maps, measure_map
from bids_dgmseg.models.structures import STRUCTURES, with_wholes
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import make_grid

CAUDATES = [STRUCTURES.named(name) for name in ("CN_L", "CN_R")]


@pytest.fixture(scope="module")
def scan() -> tuple[Volume, Volume]:
    return PHANTOM.scan(make_grid("RAS"), seed=3)


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.Nifti1Image(np.asarray(array, np.float32), affine).to_filename(path)
    return path


def measure(scan, units: dict[str, str] | None = None, **paths: Path):
    chi, dseg = scan
    return measure_further_maps(paths, chi, dseg, CAUDATES, units=units)


def test_map_of_the_session_is_measured(scan, tmp_path):
    chi, dseg = scan
    values = np.where(chi.array != 0, 20 + np.indices(chi.shape)[1], 0)
    result = measure(scan, R2starmap=write(tmp_path / "sub-01_R2starmap.nii", values, chi.affine))
    (row,) = result.measured
    inside = values[dseg.array == CAUDATES[0].index]
    assert row.table.loc[0, "mean_per_s"] == pytest.approx(inside.mean())
    assert result.report["R2starmap"] == {
        "file": "sub-01_R2starmap.nii",
        "unit": "1/s",
        "resampled": False,
        "negated": False,
    }


def test_voxels_without_r2star_are_left_out(scan, tmp_path):
    chi, dseg = scan
    caudate = dseg.array == CAUDATES[0].index
    lower = np.indices(chi.shape)[2] < np.median(np.nonzero(caudate)[2])
    values = np.where(lower & caudate, np.nan, np.where(chi.array != 0, 20.0, 0))
    (item,) = measure(scan, R2starmap=write(tmp_path / "sub-01_R2starmap.nii", values, chi.affine)).measured
    assert item.table.loc[0, "n_valid"] == (caudate & ~lower).sum() < item.table.loc[0, "n_voxels"]
    assert item.table["mean_per_s"].tolist() == [20, 20]


def test_nucleus_with_parts_is_measured_whole(scan, tmp_path):
    chi, dseg = scan
    outer, inner, whole = (STRUCTURES.named(name) for name in ("GPe_L", "GPi_L", "GP_L"))
    lower = np.indices(dseg.shape)[2] < np.argwhere(dseg.array == whole.index)[:, 2].mean()
    labels = np.where(dseg.array == whole.index, np.where(lower, inner.index, outer.index), 0).astype(np.uint8)
    values = np.where(chi.array != 0, 20 + np.indices(chi.shape)[2], 0)
    path = write(tmp_path / "sub-01_R2starmap.nii", values, chi.affine)
    (row,) = measure_further_maps({"R2star": path}, chi, dseg.with_array(labels), with_wholes([outer, inner])).measured
    table = row.table.set_index("abbreviation")
    assert table.index.tolist() == ["GPe_L", "GPi_L", "GP_L"]
    assert table.loc["GP_L", "mean_per_s"] == pytest.approx(values[dseg.array == whole.index].mean())


def test_map_of_another_head_is_refused_and_others_go_on(scan, tmp_path):
    chi, _ = scan
    values, near = np.where(chi.array != 0, 30.0, 0), chi.affine.copy()
    near[:3, 3] += (0, 1, 0)
    result = measure(
        scan,
        R2starmap=write(tmp_path / "sub-01_R2starmap.nii", 30.0 - values, chi.affine),
        R2map=write(tmp_path / "sub-01_R2map.nii", values, near),
    )
    assert [row.name for row in result.measured] == ["R2map"]
    (line,) = result.warnings
    assert line.startswith("sub-01_R2starmap.nii: has values in only 0% of the brain")
    assert result.report["R2starmap"]["problem"] in line


def test_map_in_another_unit_is_refused(scan, tmp_path):
    chi, _ = scan
    path = write(tmp_path / "sub-01_T1map.nii", np.full(chi.shape, 1100.0), chi.affine)
    result = measure(scan, T1map=path)
    assert not result.measured
    assert "the median in the labels is 1.1e+03 s, expected 0.1 to 10" in result.warnings[0]
    in_ms = measure(scan, {"T1map": "ms"}, T1map=path)
    assert in_ms.measured[0].table["mean_s"].tolist() == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize("sign", [1, -1])
def test_diamagnetic_part_is_positive(scan, tmp_path, sign):
    chi, dseg = scan
    part = np.where(chi.array != 0, sign * np.abs(chi.array) - sign * 0.001, 0)
    path = write(tmp_path / "sub-01_desc-diamagnetic_Chimap.nii", part, chi.affine)
    (row,) = measure(scan, diamagnetic_Chimap=path).measured
    inside = np.abs(part[dseg.array == CAUDATES[0].index])
    assert row.table.loc[0, "mean_ppm"] == pytest.approx(inside.mean(), abs=1e-3)
    assert row.negated == (sign < 0)


@pytest.mark.parametrize(("sign", "desc"), [(1, "paramagnetic"), (1, "diamagnetic"), (-1, "diamagnetic")])
def test_zeros_inside_are_values_of_a_map_of_one_sign(tmp_path, sign, desc):
    # Half of the nucleus, 4 x 8 x 8 voxels, has no source of this sign; the other has 0.04 ppm.
    shape, labels = (30, 30, 30), np.zeros((30, 30, 30), np.uint8)
    labels[10:18, 10:18, 10:18] = CAUDATES[0].index
    part = np.zeros(shape)
    part[4:26, 4:26, 4:26] = np.random.default_rng(1).uniform(0.001, 0.1, (22, 22, 22))
    part[10:14, 10:18, 10:18], part[14:18, 10:18, 10:18] = 0, 0.04
    labels[10, 10, 1:4] = CAUDATES[0].index  # outside of the brain mask, where there is no value
    path = write(tmp_path / f"sub-01_desc-{desc}_Chimap.nii", sign * part, np.eye(4))
    row = measure_map(path, Volume(labels, np.eye(4)), CAUDATES[:1], name=desc, labels_name="labels")
    assert row.table[["n_voxels", "n_valid"]].to_numpy().tolist() == [[8**3 + 3, 8**3]]
    assert row.table.loc[0, "mean_ppm"] == pytest.approx(0.02)
