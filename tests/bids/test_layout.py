"""What pybids finds and selects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError

MAPS = [f"sub-0{number}/anat/sub-0{number}_Chimap.nii.gz" for number in (1, 2, 3)]


def names_of(root: Path, **selection) -> list[str]:
    inputs = open_inputs(root, Selection(**selection))
    return [scan.name for scan in find_scans(inputs, echoes=True)]


def add(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


@pytest.mark.parametrize("folder", ["sub-99/ses-9", "garden-x_res-1", "a b#c%20d"])
def test_names_above_the_dataset_do_not_matter(dataset, filter_file, folder):
    root = dataset(f"{folder}/ds", "sub-01/anat/sub-01_acq-a_Chimap.nii", "sub-01/anat/sub-01_acq-b_Chimap.nii")
    wanted = {"subject": "01", "session": None, "acquisition": "a", "res": None, "den": None, "desc": None}
    filter_file.write_text(json.dumps({"chimap": wanted}))
    assert names_of(root, filter_file=filter_file) == ["sub-01_acq-a"]


def test_links_to_folders_are_followed(dataset, tmp_path):
    root = dataset("ds", *MAPS[:1])
    add(tmp_path / "elsewhere", "anat/sub-02_Chimap.nii")
    (root / "sub-02").symlink_to(tmp_path / "elsewhere")
    (root / "sub-01" / "anat" / "loop").symlink_to("..")
    assert names_of(root) == ["sub-01", "sub-02"]


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({"acquisition": ["a", None]}, ["sub-01", "sub-01_acq-a_run-01"]),
        ({"acq": "*", "run": 1}, ["sub-01_acq-a_run-01"]),
        ({"acquisition": "[ab]", "regex_search": True}, ["sub-01_acq-a_run-01", "sub-01_acq-b_run-2"]),
        ({"run": [1, 2]}, ["sub-01_acq-a_run-01", "sub-01_acq-b_run-2"]),
        ({"suffix": "Chimap", "extension": "nii.gz"}, ["sub-01"]),
        ({"scope": "QSMxT"}, ["sub-01", "sub-01_acq-a_run-01", "sub-01_acq-b_run-2"]),
    ],
)
def test_filters_have_the_semantics_of_pybids(dataset, filter_file, block, names):
    maps = ["sub-01_Chimap.nii.gz", "sub-01_acq-a_run-01_Chimap.nii", "sub-01_acq-b_run-2_Chimap.nii"]
    root = dataset("maps", *(f"sub-01/anat/{name}" for name in maps), kind="derivative")
    (root / "dataset_description.json").write_text(
        '{"DatasetType": "derivative", "GeneratedBy": [{"Name": "QSMxT"}, {"Name": "other"}]}'
    )
    filter_file.write_text(json.dumps({"chimap": block}))
    assert names_of(root, filter_file=filter_file) == names


@pytest.mark.parametrize("block", [{"acquisition": {"a": 1}}, {"acquisition": "(", "regex_search": True}])
def test_impossible_filter_is_rejected(dataset, filter_file, block):
    filter_file.write_text(json.dumps({"chimap": block}))
    with pytest.raises(InputError, match=r"^filter.json: the filter cannot be applied \(.*\); correct its"):
        names_of(dataset("ds", "sub-01/anat/sub-01_acq-a_Chimap.nii"), filter_file=filter_file)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ('{"DatasetType": "derivative", "GeneratedBy": null}', r"other: pybids cannot index it \(.+\); check"),
        ("broken", r"dataset_description.json: invalid JSON \(line 1, column 1\)"),
    ],
)
def test_malformed_description_matters_only_with_maps(dataset, description, message):
    root = dataset("ds", *MAPS)
    other = dataset("ds/derivatives/other", "sub-01/anat/sub-01_dseg.nii", kind="derivative")
    (other / "dataset_description.json").write_text(description)
    assert names_of(root) == ["sub-01", "sub-02", "sub-03"]
    add(other, "sub-01/anat/sub-01_acq-x_Chimap.nii")
    with pytest.raises(InputError, match=f"^{message}"):
        names_of(root)
