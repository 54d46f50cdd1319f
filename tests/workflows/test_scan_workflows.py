"""Workflows of one scan: documented, nestable, cached by Nipype, and those of the app."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from nipype import Node, Workflow
from nipype.interfaces.base import TraitError
from nipype.interfaces.utility import Function, IdentityInterface

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.workflows import init_dgmseg_wf, init_participant_wf, init_reconstruct_wf
from tests.conftest import coarse_chi, contents, write_map


@pytest.fixture
def chi(tmp_path) -> str:
    return str(write_map(tmp_path / "ds", "sub-01", coarse_chi()))


def documented(text: str, part: str) -> set[str]:
    (section,) = re.findall(rf"{part}\n    -+\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    lists = re.findall(r"^    - ((?:``\w+``,?\s*)+):", section, re.MULTILINE)
    return {name for names in lists for name in re.findall(r"\w+", names)}


@pytest.mark.parametrize(
    ("init", "options"),
    [
        (init_dgmseg_wf, {"corrected": True, "sampled": True, "longitudinal": True, "reference": "csf"}),
        (init_reconstruct_wf, {}),
        (init_participant_wf, {"out_dir": "/out", "from_echoes": True}),
        (init_participant_wf, {"out_dir": "/out"}),
    ],
)
def test_inputs_and_outputs_are_documented(init, options):
    workflow, text = init(**options), str(init.__doc__)
    fields = {name: set(workflow.get_node(name).interface._fields) for name in ("inputnode", "outputnode")}
    assert fields["inputnode"] <= documented(text, "Inputs")
    assert init is init_participant_wf or fields["inputnode"] == documented(text, "Inputs")
    assert fields["outputnode"] == documented(text, "Outputs")
    sources = [node for node in workflow._get_all_nodes() if node.name == "outputnode"]
    assert sources


@pytest.mark.parametrize("optional", [False, True])
def test_every_output_is_connected(optional):
    workflow = init_dgmseg_wf(corrected=optional, sampled=optional)
    outputs = workflow.get_node("outputnode")
    edges = [data["connect"] for _, target, data in workflow._graph.edges(data=True) if target is outputs]
    assert {field for connections in edges for _, field in connections} == set(outputs.interface._fields)


@pytest.mark.parametrize(
    ("field", "unused", "used"),
    [
        ("in_maps", {}, {"sampled": True}),
        ("in_correction", {}, {"corrected": True}),
        ("in_space", {}, {"longitudinal": True}),
        ("reference_mask", {"reference": "structure", "reference_structure": "CN"}, {"reference": "csf"}),
        ("in_r2star", {"measures": False}, {}),
        ("title", {"figures": False}, {}),
    ],
)
def test_input_without_its_option_is_refused(field, unused, used):
    before = Node(IdentityInterface(fields=["file"]), name="before")
    study = Workflow(name="study")
    with pytest.raises(Exception, match=f"Module without has no input called inputnode.{field}"):
        study.connect(before, "file", init_dgmseg_wf(name="without", **unused), f"inputnode.{field}")
    with pytest.raises(TraitError, match=f"Cannot set the undefined '{field}' attribute"):
        setattr(init_dgmseg_wf(**unused).inputs.inputnode, field, "/a")
    study.connect(before, "file", init_dgmseg_wf(name="with", **used), f"inputnode.{field}")


def double(in_file: str) -> str:
    """Stand for somebody else's processing after ours."""
    from pathlib import Path
    from typing import Any

    import nibabel as nib

    image: Any = nib.load(in_file)
    out = Path("doubled.nii.gz").resolve()
    nib.Nifti1Image(image.get_fdata() * 2, image.affine).to_filename(out)
    return str(out)


def nested(chi: str, folder: Path) -> Workflow:
    """Workflow of somebody else with ours inside."""
    before = Node(IdentityInterface(fields=["chi"]), name="reconstruction")
    before.inputs.chi = chi
    after = Node(Function(function=double, input_names=["in_file"], output_names=["out_file"]), name="double")
    workflow = Workflow(name="study", base_dir=str(folder))
    ours = init_dgmseg_wf(model="oracle")
    workflow.connect(
        [
            (before, ours, [("chi", "inputnode.in_chi")]),
            (ours, after, [("outputnode.dseg", "in_file")]),
        ]
    )
    return workflow


def test_workflow_runs_inside_another(chi, oracle, tmp_path):
    nested(chi, tmp_path).run()
    (dseg,) = tmp_path.glob("study/dgmseg_wf/segment/dseg.nii.gz")
    doubled = Volume.read(tmp_path / "study" / "double" / "doubled.nii.gz").array
    np.testing.assert_array_equal(doubled, 2 * Volume.read(dseg).array)
    assert (tmp_path / "study" / "dgmseg_wf" / "measure" / "stats.tsv").is_file()


def test_nipype_reuses_results_of_unchanged_inputs(chi, oracle, tmp_path, monkeypatch):
    nested(chi, tmp_path).run()
    monkeypatch.setattr("bids_dgmseg.interfaces.SegmentNuclei.run_step", lambda self, folder: pytest.fail("run again"))
    nested(chi, tmp_path).run()


def test_graph_can_be_drawn(tmp_path):
    workflow = init_dgmseg_wf()
    workflow.base_dir = str(tmp_path)
    workflow.write_graph(graph2use="flat", format="dot", dotfilename=str(tmp_path / "graph.dot"))
    text = (tmp_path / "graph_detailed.dot").read_text() + (tmp_path / "graph.dot").read_text()
    assert all(step in text for step in ("conform", "localize", "segment", "measure", "plot"))


def test_app_and_workflow_write_the_same(chi, oracle, tmp_path, run):
    from tests.conftest import start_dataset

    start_dataset(tmp_path / "ds")
    assert run(tmp_path / "ds", out=tmp_path / "app") == 0
    workflow = init_participant_wf(tmp_path / "own", model="oracle")
    workflow.base_dir = str(tmp_path / "own-work")
    workflow.inputs.inputnode.in_chi = chi
    workflow.inputs.inputnode.entities = {"sub": "01"}
    workflow.inputs.inputnode.title = "sub-01"
    workflow.run()
    app, own = contents(tmp_path / "app"), contents(tmp_path / "own")
    data = {name for name in own if name.endswith((".nii.gz", "_stats.tsv", ".png"))}
    assert len(data) > 20
    assert {name: own[name] for name in data} == {name: app[name] for name in data}


def test_measures_and_figures_can_be_left_out():
    names = init_dgmseg_wf(measures=False, figures=False).list_node_names()
    assert set(names) == {"conform", "inputnode", "localize", "outputnode", "segment"}


def test_derivatives_need_measures(tmp_path):
    with pytest.raises(InputError, match="`measures`: derivatives include them"):
        init_participant_wf(tmp_path / "out", measures=False)
