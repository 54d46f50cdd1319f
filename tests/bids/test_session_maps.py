import json
from pathlib import Path

import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.bids.session_maps import find_exclusion_masks, find_session_maps
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError


def dataset(root: Path, *files: str) -> Path:
    """Dataset with empty images, and a derivative dataset for those below ``derivatives``."""
    for folder in (root, root / "derivatives" / "qsmxt"):
        folder.mkdir(parents=True, exist_ok=True)
        about = {"Name": "x", "BIDSVersion": "1.10.0", "GeneratedBy": [{"Name": "QSMxT"}]}
        (folder / "dataset_description.json").write_text(json.dumps(about), encoding="utf-8")
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def find(root: Path, *wanted: str):
    inputs = open_inputs(root, Selection())
    maps, warnings = find_session_maps(inputs, find_scans(inputs), wanted)
    names = {scan: {name: one.path.name for name, one in own.items()} for scan, own in maps.items()}
    return names, warnings, maps


def test_maps_of_the_same_session_are_found(tmp_path):
    root = dataset(
        tmp_path,
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_Chimap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_R2starmap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-2_R2starmap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_desc-smooth_R2starmap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-mp2rage_T1map.nii",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-mp2rage_T1map.nii",
        "derivatives/qsmxt/sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_desc-paramagnetic_Chimap.nii",
    )
    (root / "T1map.json").write_text(json.dumps({"Units": "ms"}), encoding="utf-8")
    names, warnings, maps = find(root, "R2starmap", "T1map", "desc-paramagnetic_Chimap")
    assert names == {
        "sub-01_ses-1_acq-gre_run-1": {
            "R2starmap": "sub-01_ses-1_acq-gre_run-1_R2starmap.nii.gz",
            "T1map": "sub-01_ses-1_acq-mp2rage_T1map.nii",
            "paramagnetic_Chimap": "sub-01_ses-1_acq-gre_run-1_desc-paramagnetic_Chimap.nii",
        }
    }
    assert not warnings
    found = maps["sub-01_ses-1_acq-gre_run-1"]
    assert found["T1map"].units == "ms"
    assert found["paramagnetic_Chimap"].uri.startswith("bids:qsmxt:sub-01/ses-1/anat/")


def test_absent_and_ambiguous_maps_are_one_line_each(tmp_path):
    root = dataset(
        tmp_path,
        "sub-01/anat/sub-01_Chimap.nii",
        "sub-01/anat/sub-01_acq-a_T1map.nii",
        "sub-01/anat/sub-01_acq-b_T1map.nii",
        "sub-02/anat/sub-02_Chimap.nii",
    )
    names, warnings, _ = find(root, "T1map")
    assert names == {"sub-01": {}, "sub-02": {}}
    assert warnings == [
        "sub-01: several maps for `sample` T1map (sub-01_acq-a_T1map.nii, sub-01_acq-b_T1map.nii); name one by its "
        "entities",
        "sub-02: no T1map in its session; measures of it are n/a",
    ]
    assert find(root, "acq-b_T1map")[0]["sub-01"] == {"b_T1map": "sub-01_acq-b_T1map.nii"}


def test_names_that_name_nothing_are_refused(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_Chimap.nii")
    with pytest.raises(InputError, match="`sample` Chimap: the chi map of each scan is measured anyway"):
        find(root, "Chimap")
    with pytest.raises(InputError, match="x_T1map would name two maps"):
        find(root, "acq-x_T1map", "desc-x_T1map")


def test_masks_are_matched_by_scan_or_session(tmp_path):
    root = dataset(tmp_path / "ds", "sub-01/anat/sub-01_acq-a_Chimap.nii", "sub-01/anat/sub-01_acq-b_Chimap.nii")
    scans = find_scans(open_inputs(root, Selection()))
    masks = dataset(
        tmp_path / "masks",
        "sub-01/anat/sub-01_label-lesion_mask.nii.gz",
        "sub-01/anat/sub-01_acq-a_space-orig_desc-haemorrhage_mask.nii.gz",
        "sub-01/anat/sub-01_acq-c_label-lesion_mask.nii.gz",
        "sub-01/anat/sub-01_label-brain_mask.nii.gz",
        "sub-02/anat/sub-02_label-lesion_mask.nii.gz",
    )
    found, warnings = find_exclusion_masks(masks, scans)
    assert {scan: [path.name for path in paths] for scan, paths in found.items()} == {
        "sub-01_acq-a": [
            "sub-01_acq-a_space-orig_desc-haemorrhage_mask.nii.gz",
            "sub-01_label-lesion_mask.nii.gz",
        ],
        "sub-01_acq-b": ["sub-01_label-lesion_mask.nii.gz"],
    }
    assert warnings == [
        "sub-01_acq-c_label-lesion_mask.nii.gz: of no scan in the dataset (`exclude_mask` masks); ignored"
    ]
    with pytest.raises(InputError, match=r"no _mask\.nii"):
        find_exclusion_masks(root, scans)


def test_number_of_a_run_may_have_zeros(tmp_path):
    root = dataset(
        tmp_path,
        "sub-01/anat/sub-01_run-02_Chimap.nii",
        *(f"sub-01/anat/sub-01_run-0{n}_T2starmap.nii" for n in (1, 2)),
    )
    (root / "run-02_T2starmap.json").write_text(json.dumps({"Units": "ms"}), encoding="utf-8")
    names, warnings, maps = find(root, "run-02_T2starmap")
    assert names == {"sub-01_run-02": {"02_T2starmap": "sub-01_run-02_T2starmap.nii"}}
    assert maps["sub-01_run-02"]["02_T2starmap"].units == "ms"
    assert not warnings


def test_map_in_the_folder_of_another_participant_is_not_measured(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_Chimap.nii", "sub-01/anat/sub-02_R2starmap.nii")
    names, warnings, _ = find(root, "R2starmap")
    assert names == {"sub-01": {}}
    assert warnings == ["sub-01: no R2starmap in its session; measures of it are n/a"]


def test_mask_without_session_is_reported(tmp_path):
    root = dataset(tmp_path / "ds", "sub-01/ses-1/anat/sub-01_ses-1_Chimap.nii")
    scans = find_scans(open_inputs(root, Selection()))
    names = ("sub-01_label-lesion", "sub-01_acq-a_label-lesion", "sub-01_ses-2_label-lesion", "sub-02_label-lesion")
    masks = dataset(tmp_path / "masks", *(f"{name[:6]}/anat/{name}_mask.nii.gz" for name in names))
    found, warnings = find_exclusion_masks(masks, scans)
    assert not found
    assert warnings == [
        "sub-01_acq-a_label-lesion_mask.nii.gz, sub-01_label-lesion_mask.nii.gz: of no scan in the dataset "
        "(`exclude_mask` masks); ignored"
    ]
