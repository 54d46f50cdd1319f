import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.simulate.simulated_dataset import DEMO_SCANS, head_grid, scan_phantom, write_demo
from tests.test_promise import VALIDATOR, validate

COARSE = tuple(dataclasses.replace(scan, spacing_mm=(3.0, 3.0, 4.0)) for scan in DEMO_SCANS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "ds"
    assert list(write_demo(root, COARSE)) == ["sub-01_ses-1", "sub-01_ses-2", "sub-02"]
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_demo_is_reproducible_to_the_byte(demo, tmp_path):
    list(write_demo(tmp_path / "again", COARSE))
    assert contents(tmp_path / "again") == contents(demo)


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
@pytest.mark.parametrize("part", [".", "derivatives/truth"])
def test_demo_is_valid_bids(demo, part, tmp_path):
    validate(demo / part, tmp_path)


def test_true_labels_share_grid_with_map(demo):
    maps = sorted(demo.glob("sub-*/**/*_Chimap.nii.gz"))
    assert len(maps) == 3
    for path in maps:
        relative = path.relative_to(demo)
        truth = demo / "derivatives" / "truth" / relative.with_name(relative.name.replace("_Chimap", "_seg-truth_dseg"))
        chi, dseg = load_image(path), load_image(truth)
        np.testing.assert_array_equal(chi.affine, dseg.affine)
        assert chi.shape == dseg.shape
        x, y, z = chi.shape
        expected = PHANTOM.dseg(Grid((x, y, z), chi.affine))
        np.testing.assert_array_equal(np.asanyarray(dseg.dataobj), expected.array)


def test_units_are_read_back(demo):
    units = {}
    for path in demo.glob("sub-*/**/*_Chimap.nii.gz"):
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))
        checked = check_chi(path, sidecar)
        units[path.name.removesuffix("_Chimap.nii.gz")] = checked.units
        assert np.nanmax(checked.chi_ppm.array) == pytest.approx(max(PHANTOM.chi_ppm.values()), abs=0.03)  # 5 SD
    assert units == {"sub-01_ses-1": "ppm", "sub-01_ses-2": "ppb", "sub-02": "ppm"}


def test_grids_match_readme():
    upright, oblique, other = (head_grid(scan) for scan in DEMO_SCANS)
    assert nib.aff2axcodes(upright.affine) == ("R", "A", "S")
    assert nib.aff2axcodes(other.affine) == ("L", "P", "S")
    assert nib.affines.voxel_sizes(other.affine) == pytest.approx([0.9, 0.9, 1.5])
    assert np.rad2deg(nib.affines.obliquity(oblique.affine)).max() > 10


@pytest.mark.parametrize("scan", COARSE, ids=lambda scan: scan.axes + str(scan.tilt_deg))
def test_field_of_view_contains_whole_head(scan):
    chi = scan_phantom(scan, seed=1).images[0].array
    faces = [np.take(chi, index, axis) for axis in range(3) for index in (0, -1)]
    assert not any(face.any() for face in faces)


def test_non_empty_folder_is_rejected(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists and is not an empty folder; choose a new one"):
        list(write_demo(tmp_path))
    assert contents(tmp_path) == {"notes.txt": b"mine"}
