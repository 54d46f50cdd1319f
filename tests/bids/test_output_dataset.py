from __future__ import annotations

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.output_dataset import check_writable, write_citation, write_dataset_files
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import write_json
from bids_dgmseg.models.registry import MODELS

MODEL = MODELS["dgm16"]


@pytest.fixture
def write(out):
    """Return a function that writes the files at the top level."""

    def call(inputs, scans) -> None:
        write_dataset_files(out, inputs, scans, MODEL)
        write_citation(out, scans, MODEL)

    return call


def test_top_level_files_describe_the_output(inputs, scans, write, out):
    record = output_path(out, scans[0], "qc", ".json", seg="dgm16")
    write_json({"versions": {"bids_dgmseg": "0.1.0"}}, record)
    write(inputs, scans)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"raw": "../ds", "qsmxt": "../qsmxt"}
    assert description["GeneratedBy"][0]["Name"] == "bids_dgmseg"
    with (out / "dseg.tsv").open() as file:
        first = next(csv.DictReader(file, delimiter="\t"))
    assert (first["name"], first["freesurfer"]) == ("left dentate nucleus", "n/a")
    assert [*json.loads((out / "dseg.json").read_text())] == [*first]
    ids = [line.split("\t")[0] for line in (out / "descriptions.tsv").read_text().splitlines()]
    assert ids == ["desc_id", "desc-dgm16", "desc-rts", "desc-rtsDgm16"]
    text, bib = ((out / "logs" / f"CITATION.{kind}").read_text() for kind in ("md", "bib"))
    cited = {word.strip("[]@;.,") for word in text.split() if "@" in word}
    assert "nipype" in cited
    assert all(f"{{{key}," in bib for key in cited)


@pytest.mark.parametrize("name", ["README", "README.md"])
def test_readme_of_the_user_is_kept(inputs, scans, write, out, name):
    out.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    write(inputs, scans)
    assert {path.name: path.read_text() for path in out.glob("README*")} == {name: "mine"}


def test_sources_of_earlier_runs_are_kept(inputs, scans, write, out):
    (inputs.root / "dataset_description.json").write_text(json.dumps({"DatasetDOI": "10.1/2"}))
    write(inputs, scans)
    second = inputs.root.parent / "second"
    shutil.copytree(inputs.root, second)
    (second / "dataset_description.json").write_text("{}")
    for root in (second, second, inputs.root):
        later = open_inputs(root)
        write(later, find_scans(later))
    description = json.loads((out / "dataset_description.json").read_text())
    sources = [{"URL": "../ds", "DOI": "10.1/2"}, {"URL": "../second"}, {"URL": "../qsmxt"}]
    assert description["SourceDatasets"] == sources
    assert description["DatasetLinks"] == {"raw": "../ds", "qsmxt": "../qsmxt"}
    assert "desc-dgm16\t" in (out / "descriptions.tsv").read_text()


def test_parallel_runs_lose_no_entry(inputs, scans, write, out):
    names = [f"map{number}" for number in range(8)]
    different = [replace(scans[0], entities={"desc": name}) for name in names]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda scan: write(inputs, [scan]), different))
    rows = (out / "descriptions.tsv").read_text().splitlines()
    assert {f"desc-{name}" for name in names} <= {row.split("\t")[0] for row in rows}


def test_unwritable_output_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: cannot be written \(File exists\); choose another output folder$"):
        check_writable(tmp_path / "file")
