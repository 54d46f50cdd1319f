import json
from pathlib import Path

import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.masks_and_maps import (
    find_further_maps,
    find_label_table,
    find_lesion_masks,
    find_scan_masks,
    match_scans,
)
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError


def paths(*names: str) -> list[Path]:
    return [Path(f"{name}_dseg.nii.gz") for name in names]


def matched(reference: list[str], other: list[str], *choose: str) -> dict[str, str]:
    """Match images by stem."""
    matches = match_scans(paths(*reference), paths(*other), choose=choose)
    return {a.name.removesuffix("_dseg.nii.gz"): b.name.removesuffix("_dseg.nii.gz") for a, b in matches.items()}


NAMED = ["sub-01_ses-1_acq-x_seg-manual", "sub-01_ses-2_acq-x_seg-manual"]
PREDICTED = ["sub-01_ses-1_acq-x_seg-dgm16", "sub-01_ses-2_acq-y_seg-dgm16", "sub-02_ses-1_acq-x_seg-dgm16"]
DESC = ["sub-01_desc-medi", "sub-01_desc-rts"]


@pytest.mark.parametrize(
    ("reference", "other", "choose", "pairs"),
    [
        pytest.param(NAMED, PREDICTED, [], {NAMED[0]: PREDICTED[0]}, id="segmentation entities differ"),
        (["sub-01_run-1"], ["sub-01_run-01", "sub-01_run-10"], [], {"sub-01_run-1": "sub-01_run-01"}),
        pytest.param(DESC, DESC[::-1], [], {name: name for name in DESC}, id="desc must match if both have it"),
        (["sub-01"], ["sub-01_seg-dgm16_desc-rts"], [], {"sub-01": "sub-01_seg-dgm16_desc-rts"}),
        (["sub-01", "sub-01_desc-x"], ["sub-01_seg-a", "sub-01_seg-b"], ["seg-b"], {"sub-01": "sub-01_seg-b"}),
        (["sub-01"], ["sub-01_seg-a", "sub-01_desc-x"], ["desc-x"], {"sub-01": "sub-01_desc-x"}),
        (["sub-01_seg-a", "sub-01_desc-x"], ["sub-01_seg-b"], ["desc-x"], {"sub-01_desc-x": "sub-01_seg-b"}),
        (
            DESC,
            [f"{name}_seg-{name[-1]}" for name in DESC],
            ["seg-s"],
            {name: f"{name}_seg-{name[-1]}" for name in DESC},
        ),
    ],
)
def test_images_of_the_same_scan_match(reference, other, choose, pairs):
    assert matched(reference, other, *choose) == pairs


def test_ambiguous_segmentations_are_rejected():
    with pytest.raises(
        InputError,
        match=r"sub-01_seg-a_dseg.nii.gz, sub-01_seg-b_dseg.nii.gz are of the same scan; "
        r"select one by its entities, such as `choose` seg-NAME",
    ):
        matched(["sub-01"], ["sub-01_seg-a", "sub-01_seg-b"])


def table(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_nearest_label_table_has_precedence(tmp_path):
    image = tmp_path / "ds/sub-01/anat/sub-01_seg-x_dseg.nii.gz"
    for name, number in (("dseg.tsv", 1), ("seg-x_dseg.tsv", 2), ("sub-01/anat/sub-01_seg-x_dseg.tsv", 3)):
        table(tmp_path / "ds" / name, f"index\tname\tabbreviation\n{number}\tleft dentate\tDN_L\n")
        assert find_label_table(image).abbreviations == {number: "DN_L"}


@pytest.mark.parametrize("name", ["Left-Dentate-Nucleus", "dn_l"])
def test_names_of_other_programs_are_matched(tmp_path, name):
    table(tmp_path / "x_dseg.tsv", f"index\tname\n7\t{name}\n8\tred nucleus\n")
    assert find_label_table(tmp_path / "x_dseg.nii").abbreviations == {7: "DN_L", 8: "RN"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number\tlabel\n1\tx\n", "no column index"),
        ("index\tabbreviation\n1\tDN_L\n2\tDN_L\n", "DN_L is listed twice; keep one row per label"),
    ],
)
def test_invalid_label_table_is_rejected(tmp_path, text, message):
    table(tmp_path / "dseg.tsv", text)
    with pytest.raises(InputError, match=f"dseg.tsv: {message}"):
        find_label_table(tmp_path / "x_dseg.nii")


def find(root: Path, *wanted: str):
    inputs = open_inputs(root, Selection())
    maps, warnings = find_further_maps(inputs, find_scans(inputs), wanted)
    names = {scan: {name: mapped.path.name for name, mapped in by_name.items()} for scan, by_name in maps.items()}
    return names, warnings, maps


def test_maps_of_the_same_session_are_found(dataset):
    root = dataset(
        "ds",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_Chimap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_R2starmap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-2_R2starmap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_desc-smooth_R2starmap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-mp2rage_T1map.nii",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-mp2rage_T1map.nii",
    )
    dataset(
        "ds/derivatives/qsmxt",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-gre_run-1_desc-paramagnetic_Chimap.nii",
        kind="derivative",
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
    matches = maps["sub-01_ses-1_acq-gre_run-1"]
    assert matches["T1map"].units == "ms"
    assert matches["paramagnetic_Chimap"].uri.startswith("bids:qsmxt:sub-01/ses-1/anat/")


def test_absent_and_ambiguous_maps_are_one_line_each(dataset):
    root = dataset(
        "ds",
        "sub-01/anat/sub-01_Chimap.nii",
        "sub-01/anat/sub-01_acq-a_T1map.nii",
        "sub-01/anat/sub-01_acq-b_T1map.nii",
        "sub-02/anat/sub-02_Chimap.nii",
    )
    names, warnings, _ = find(root, "T1map")
    assert names == {"sub-01": {}, "sub-02": {}}
    assert warnings == [
        "sub-01: several maps for `further_maps` T1map (sub-01_acq-a_T1map.nii, sub-01_acq-b_T1map.nii); name one by "
        "its entities",
        "sub-02: T1map missing; its columns are n/a",
    ]
    assert find(root, "acq-b_T1map")[0]["sub-01"] == {"b_T1map": "sub-01_acq-b_T1map.nii"}


def test_masks_are_matched_by_scan_or_session(dataset):
    root = dataset("ds", "sub-01/anat/sub-01_acq-a_Chimap.nii", "sub-01/anat/sub-01_acq-b_Chimap.nii")
    scans = find_scans(open_inputs(root, Selection()))
    masks = dataset(
        "masks",
        "sub-01/anat/sub-01_label-lesion_mask.nii.gz",
        "sub-01/anat/sub-01_acq-a_space-orig_desc-haemorrhage_mask.nii.gz",
        "sub-01/anat/sub-01_acq-c_label-lesion_mask.nii.gz",
        "sub-01/anat/sub-01_label-brain_mask.nii.gz",
        "sub-02/anat/sub-02_label-lesion_mask.nii.gz",
    )
    matches, warnings = find_lesion_masks(masks, scans)
    assert {scan: [path.name for path in paths] for scan, paths in matches.items()} == {
        "sub-01_acq-a": ["sub-01_acq-a_space-orig_desc-haemorrhage_mask.nii.gz", "sub-01_label-lesion_mask.nii.gz"],
        "sub-01_acq-b": ["sub-01_label-lesion_mask.nii.gz"],
    }
    assert warnings == ["sub-01_acq-c_label-lesion_mask.nii.gz: matches no scan (`lesion_masks` masks); ignored"]
    with pytest.raises(InputError, match=r"no _mask\.nii"):
        find_lesion_masks(root, scans)


def test_masks_of_a_scan_precede_those_of_its_other_processing(dataset):
    root = dataset("ds", "sub-01/anat/sub-01_run-1_Chimap.nii", "sub-02/anat/sub-02_Chimap.nii")
    scans = find_scans(open_inputs(root, Selection()))
    names = ("sub-01_run-01_space-orig_label-CSF", "sub-01_run-2_label-CSF", "sub-01_label-CSF")
    masks = dataset("masks", *(f"sub-01/anat/{name}_mask.nii.gz" for name in names))
    matches = find_scan_masks(masks, scans, ("csf",), parameter="reference_mask")
    assert {scan: path.name for scan, path in matches.items()} == {
        "sub-01_run-1": "sub-01_run-01_space-orig_label-CSF_mask.nii.gz"
    }
    (masks / "sub-01/anat/sub-01_run-1_desc-x_label-csf_mask.nii").touch()
    with pytest.raises(InputError, match=r"are of sub-01_run-1; keep one of them in masks"):
        find_scan_masks(masks, scans, ("csf",), parameter="reference_mask")
    with pytest.raises(InputError, match=r"masks: no _label-brain_mask.nii\[.gz\] files; rename the masks"):
        find_scan_masks(masks, scans, ("brain",), parameter="brain_masks")
