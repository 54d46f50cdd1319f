from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.bids import dataset as module
from bids_dgmseg.bids.dataset import (
    find_source,
    generators,
    is_own,
    linked_datasets,
    open_inputs,
    source_datasets,
    validate,
)

CHI = "sub-01/anat/sub-01_Chimap.nii.gz"


@pytest.fixture
def dseg(tmp_path) -> Path:
    """A dseg in the dataset ``out`` of a map in the dataset ``raw data``."""
    for root, name in (("raw data", CHI), ("out", "sub-01/anat/sub-01_seg-x_dseg.nii.gz")):
        (tmp_path / root / name).parent.mkdir(parents=True)
        (tmp_path / root / name).touch()
    return Path(tmp_path / "out/sub-01/anat/sub-01_seg-x_dseg.nii.gz")


def write_sources(dseg: Path, sources: Any, links: Any = None) -> None:
    """Write the sidecar and the dataset's description."""
    dseg.with_name("sub-01_seg-x_dseg.json").write_text(json.dumps({"Sources": sources}))
    described = {"DatasetLinks": links} if links is not None else {}
    (dseg.parents[2] / "dataset_description.json").write_text(json.dumps(described))


@pytest.mark.parametrize("link", ["../raw%20data", "../raw data/", "file://{}/raw%20data"])
def test_uri_is_resolved_by_dataset_links(dseg, tmp_path, link):
    assert find_source(dseg, "Chimap") is None  # not in a dataset yet
    write_sources(dseg, [f"bids:raw:{CHI}"], {"raw": link.format(tmp_path)})
    assert find_source(dseg, "Chimap") == tmp_path / "raw data" / CHI


@pytest.mark.parametrize("source", ["bids::sub-01/anat/sub-01_Chimap.nii", "sub-01/anat/sub-01_Chimap.nii"])
def test_source_in_same_dataset_needs_no_link(dseg, source):
    own = dseg.with_name("sub-01_Chimap.nii")
    own.touch()
    write_sources(dseg, ["bids::sub-01/anat/sub-01_T1w.nii.gz", source])
    assert find_source(dseg, "Chimap") == own


@pytest.mark.parametrize(
    ("sources", "links"),
    [
        pytest.param([f"bids:raw:{CHI}"], None, id="no links"),
        pytest.param([f"bids:raw:{CHI}"], {"raw": "https://example.org/raw"}, id="far away"),
        pytest.param([f"bids:raw:{CHI}"], {"raw": "../moved"}, id="no longer there"),
        pytest.param(["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"], {"raw": "../raw data"}, id="no map among them"),
    ],
)
def test_unresolvable_sources_are_ignored(dseg, sources, links):
    write_sources(dseg, sources, links)
    assert find_source(dseg, "Chimap") is None


@pytest.fixture
def describe(tmp_path):
    """Return a function that writes dataset_description.json."""

    def write(description):
        text = description if isinstance(description, str) else json.dumps(description)
        (tmp_path / "dataset_description.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_description_lists_generators_links_and_sources(describe):
    dataset = describe(
        {
            "GeneratedBy": [{"Name": "QSMxT", "Version": "8"}, {"Name": "bids_dgmseg"}],
            "DatasetLinks": {"raw": "../ds"},
            "SourceDatasets": [{"URL": "../a"}, {"DOI": "10.1/2"}],
        }
    )
    assert [program["Name"] for program in generators(dataset)] == ["QSMxT", "bids_dgmseg"]
    assert is_own(dataset)
    assert linked_datasets(dataset) == {"raw": "../ds"}
    assert source_datasets(dataset) == ["../a"]


@pytest.mark.parametrize(
    "description",
    [
        "broken",
        {"GeneratedBy": "bids_dgmseg", "DatasetLinks": ["../ds"], "SourceDatasets": {"URL": "../a"}},
        {"GeneratedBy": [{"Name": None}], "DatasetLinks": {"raw": None}, "SourceDatasets": [{"URL": None}]},
    ],
)
def test_malformed_description_is_empty(describe, description):
    dataset = describe(description)
    assert not generators(dataset)
    assert not is_own(dataset)
    assert not linked_datasets(dataset)
    assert not source_datasets(dataset)


def test_files_are_listed_once_per_run(dataset, monkeypatch):
    inputs = open_inputs(dataset("ds", "sub-01/anat/sub-01_Chimap.nii.gz"))
    assert [path.name for path in inputs.sources[0].images["01"]] == ["sub-01_Chimap.nii.gz"]

    def fail(folder):
        raise AssertionError(f"{folder} is listed again")

    monkeypatch.setattr(os, "scandir", fail)
    assert len(inputs.sources[0].images["01"]) == 1


@pytest.fixture
def root(dataset) -> Path:
    root: Path = dataset("ds", "README")
    (root / "README").write_text("A dataset without a scan, for tests. " * 5)
    return root


def test_validation_errors_are_summarized_in_one_line(root, tmp_path):
    if not (
        shutil.which("bids-validator-deno") or shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
    ):
        pytest.skip("bids-validator-deno is not installed")
    (root / "not_bids.txt").touch()
    summary = validate(root, tmp_path)
    assert summary is not None
    assert summary.startswith("ds: the BIDS validator reports ")
    assert "NOT_INCLUDED (1)" in summary
    assert "\n" not in summary


@pytest.mark.parametrize("script", [None, "exit 3", "sleep 5"])
def test_missing_or_failing_validator_is_ignored(root, monkeypatch, tmp_path, script):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else "")
    if script:
        fake = tmp_path / "bids-validator-deno"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    monkeypatch.setattr(module, "VALIDATOR_TIMEOUT_S", 0.5)
    assert validate(root, tmp_path) is None
