from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.bids.dataset import (
    dataset_roots,
    find_map,
    generators,
    is_own,
    linked_datasets,
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


def map_of(dseg: Path) -> Path | None:
    return find_map(dseg.with_name("sub-01_seg-x_dseg.json"), dataset_roots(dseg.parents[2]))


@pytest.mark.parametrize("link", ["../raw%20data", "../raw data/", "file://{}/raw%20data"])
def test_uri_is_resolved_by_dataset_links(dseg, tmp_path, link):
    write_sources(dseg, [f"bids:raw:{CHI}"], {"raw": link.format(tmp_path)})
    assert map_of(dseg) == tmp_path / "raw data" / CHI


@pytest.mark.parametrize("source", ["bids::sub-01/anat/sub-01_Chimap.nii", "sub-01/anat/sub-01_Chimap.nii"])
def test_source_in_same_dataset_needs_no_link(dseg, source):
    chi = dseg.with_name("sub-01_Chimap.nii")
    chi.touch()
    write_sources(dseg, ["bids::sub-01/anat/sub-01_T1w.nii.gz", source])
    assert map_of(dseg) == chi


@pytest.mark.parametrize(
    ("sources", "links"),
    [
        pytest.param([f"bids:raw:{CHI}"], None, id="no links"),
        pytest.param([f"bids:raw:{CHI}"], {"raw": "https://example.org/raw"}, id="far away"),
        pytest.param(["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"], {"raw": "../raw data"}, id="no map among them"),
    ],
)
def test_unresolvable_sources_are_ignored(dseg, sources, links):
    write_sources(dseg, sources, links)
    assert map_of(dseg) is None


@pytest.fixture
def describe(tmp_path):
    """Return a function that writes dataset_description.json."""

    def write(description):
        text = description if isinstance(description, str) else json.dumps(description)
        (tmp_path / "dataset_description.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize(
    "description",
    ["broken", {"GeneratedBy": [{"Name": None}], "DatasetLinks": {"raw": None}, "SourceDatasets": [{"URL": None}]}],
)
def test_malformed_description_is_empty(describe, description):
    dataset = describe(description)
    assert not generators(dataset)
    assert not is_own(dataset)
    assert not linked_datasets(dataset)
    assert not source_datasets(dataset)


ISSUES = {"issues": {"issues": [{"code": "NOT_INCLUDED", "severity": "error"}, {"code": "x", "severity": "warning"}]}}


@pytest.mark.parametrize(
    ("script", "summary"),
    [
        (
            f"echo '{json.dumps(ISSUES)}'; exit 1",
            "ds: the BIDS validator reports NOT_INCLUDED (1); results were computed",
        ),
        ("exit 3", None),
        (None, None),
    ],
    ids=["errors", "fails", "missing"],
)
def test_validation_errors_are_summarized_in_one_line(dataset, monkeypatch, tmp_path, script, summary):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else "")
    if script:
        program = tmp_path / "bids-validator-deno"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    line = validate(dataset("ds"), tmp_path)
    assert line is None if summary is None else str(line).startswith(summary)
