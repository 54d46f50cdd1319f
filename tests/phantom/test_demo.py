import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.phantom.demo import DEMO_PARTICIPANTS, DEMO_SCANS, scan_phantom, write_demo
from bids_dgmseg.phantom.head import PHANTOM
from tests.test_promise import VALIDATOR, validate

COARSE = tuple(dataclasses.replace(scan, spacing_mm=(3.0, 3.0, 4.0)) for scan in DEMO_SCANS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "ds"
    assert list(write_demo(root, COARSE)) == [scan.name for scan in DEMO_SCANS]
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_demo_is_reproducible_to_the_byte(demo, tmp_path):
    list(write_demo(tmp_path / "again", COARSE))
    assert list(write_demo(tmp_path / "again", COARSE)) == []  # it is there
    assert contents(tmp_path / "again") == contents(demo)


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
@pytest.mark.parametrize("part", [".", "derivatives/truth"])
def test_demo_is_valid_bids(demo, part, tmp_path):
    validate(demo / part, tmp_path)


def test_study_has_what_the_group_page_shows():
    people = pd.DataFrame(list(DEMO_PARTICIPANTS.values()))
    usable = [scan.participant for scan in DEMO_SCANS if scan.lowest_mm is None]
    counts = people.set_index("label").assign(scans=pd.Series(usable).value_counts())
    assert counts.groupby("site")["scans"].count().min() >= 3  # harmonization
    assert counts.groupby("site")["scans"].sum().max() >= 5  # outliers
    assert counts.groupby("group")["scans"].count().min() >= 2  # group differences
    assert counts.loc[counts["group"] == "HC", "scans"].sum() >= 6  # age curve of the controls
    assert len(DEMO_SCANS) - len(usable) == 1  # excluded


def test_true_labels_share_grid_with_map(demo):
    for scan in COARSE:
        folder = Path(*scan.name.split("_"), "anat")
        chi = load_image(demo / folder / f"{scan.name}_Chimap.nii.gz")
        dseg = load_image(demo / "derivatives" / "truth" / folder / f"{scan.name}_seg-truth_dseg.nii.gz")
        np.testing.assert_array_equal(chi.affine, dseg.affine)
        x, y, z = chi.shape
        expected = scan.phantom.dseg(Grid((x, y, z), chi.affine))
        np.testing.assert_array_equal(np.asanyarray(dseg.dataobj), expected.array)


def test_units_are_read_back(demo):
    for scan in COARSE:
        path = demo / Path(*scan.name.split("_"), "anat", f"{scan.name}_Chimap.nii.gz")
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))
        checked = check_chi(path, sidecar)
        assert checked.units == ("ppb" if scan.name == "sub-01_ses-2" else "ppm")
        highest = max(scan.phantom.chi_ppm.values())
        assert np.nanmax(checked.chi_ppm.array) == pytest.approx(highest, abs=0.04)  # partial volume, 5 SD of noise


def test_true_values_are_those_of_the_readme(demo):
    table = pd.read_csv(demo / "derivatives" / "truth" / "truth.tsv", sep="\t").set_index(["scan", "abbreviation"])
    phantom = PHANTOM.chi_ppm
    expected_ppm = {
        ("sub-01_ses-1", "GP_L"): phantom["GP_L"] * (0.7 + 0.005 * 34),
        ("sub-01_ses-2", "GP_L"): phantom["GP_L"] * (0.7 + 0.005 * 36),
        ("sub-03", "SN_R"): phantom["SN_R"] * (0.7 + 0.005 * 58) + 0.03,
        ("sub-03", "PUT_L"): phantom["PUT_L"] * (0.7 + 0.005 * 58) + 0.06,
        ("sub-05", "CN_L"): phantom["CN_L"] * (0.7 + 0.005 * 76) + 0.008,
        ("sub-06_ses-2", "SN_L"): phantom["SN_L"] * (0.7 + 0.005 * (63 + 7 / 365.25)) + 0.03 + 0.008,
    }
    for key, value in expected_ppm.items():
        assert table["mean_ppm"][key] == pytest.approx(value, abs=5e-5), key  # rounded to 4 digits
    assert table["volume_mm3"]["sub-05", "GP_L"] == pytest.approx(PHANTOM.volumes_mm3["GP_L"] * 1.02**3, abs=0.05)


@pytest.mark.parametrize("scan", COARSE, ids=lambda scan: scan.name)
def test_field_of_view_contains_whole_head(scan):
    chi = scan_phantom(scan, seed=1).images[0].array
    faces = [np.take(chi, index, axis).any() for axis in range(3) for index in (0, -1)]
    assert faces == [False] * 4 + [scan.lowest_mm is not None, False]


def test_bad_scan_lacks_the_dentate_nuclei():
    (scan,) = (scan for scan in COARSE if scan.lowest_mm is not None)
    assert set(np.unique(scan_phantom(scan, seed=1).dseg)) == {0, *range(5, 17)}


def test_non_empty_folder_is_rejected(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists and is not an empty folder; choose a new one"):
        list(write_demo(tmp_path))
    assert contents(tmp_path) == {"notes.txt": b"mine"}
