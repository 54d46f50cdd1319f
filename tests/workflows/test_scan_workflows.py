"""Workflows of one scan: documented, nestable, cached by Nipype, and those of the app."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import Function, IdentityInterface

from bids_dgmseg.config import ReconstructionOptions, SegmentationOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.workflows import init_dgmseg_wf, init_participant_wf, init_reconstruct_wf
from tests.conftest import coarse_chi, contents, start_dataset, write_map


@pytest.fixture
def chi(tmp_path) -> str:
    return str(write_map(tmp_path / "ds", "sub-01", coarse_chi()))


def documented(text: str, part: str) -> set[str]:
    (section,) = re.findall(rf"{part}\n    -+\n(.*?)(?:\n\n    [A-Z]\w+\n|\Z)", text, re.DOTALL)
    lists = re.findall(r"^    - ((?:``\w+``,?\s*)+):", section, re.MULTILINE)
    return {name for names in lists for name in re.findall(r"\w+", names)}


@pytest.mark.parametrize(
    ("init", "options"),
    [
        (init_dgmseg_wf, {}),
        (init_reconstruct_wf, {}),
        (init_participant_wf, {"out_dir": "/out", "reconstruction": ReconstructionOptions()}),
        (init_participant_wf, {"out_dir": "/out"}),
    ],
)
def test_inputs_and_outputs_are_fixed_and_documented(init, options):
    workflow, text = init(**options), str(init.__doc__)
    for name, part in (("inputnode", "Inputs"), ("outputnode", "Outputs")):
        assert set(workflow.get_node(name).interface._fields) == documented(text, part)
    outputs = workflow.get_node("outputnode")
    edges = [data["connect"] for _, target, data in workflow._graph.edges(data=True) if target is outputs]
    assert {field for connections in edges for _, field in connections} == set(outputs.interface._fields)


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
    ours = init_dgmseg_wf(SegmentationOptions(model="oracle"))
    workflow.connect([(before, ours, [("chi", "inputnode.in_chi")]), (ours, after, [("outputnode.dseg", "in_file")])])
    return workflow


def test_workflow_runs_inside_another_and_is_cached(chi, oracle, tmp_path, monkeypatch):
    nested(chi, tmp_path).run()
    (dseg,) = tmp_path.glob("study/dgmseg_wf/segment/dseg.nii.gz")
    doubled = Volume.read(tmp_path / "study" / "double" / "doubled.nii.gz").array
    np.testing.assert_array_equal(doubled, 2 * Volume.read(dseg).array)
    assert (tmp_path / "study" / "dgmseg_wf" / "measure" / "stats.tsv").is_file()
    monkeypatch.setattr("bids_dgmseg.interfaces.SegmentNuclei.run_step", lambda self, folder: pytest.fail("run again"))
    nested(chi, tmp_path).run()


def test_app_and_workflow_write_the_same(chi, oracle, tmp_path, run):
    start_dataset(tmp_path / "ds")
    assert run(tmp_path / "ds", out=tmp_path / "app") == 0
    workflow = init_participant_wf(tmp_path / "own", SegmentationOptions(model="oracle"))
    workflow.base_dir = str(tmp_path / "own-work")
    workflow.inputs.inputnode.in_chi = chi
    workflow.inputs.inputnode.entities = {"sub": "01"}
    workflow.inputs.inputnode.title = "sub-01"
    workflow.run()
    app, library = contents(tmp_path / "app"), contents(tmp_path / "own")
    data = {name for name in library if name.endswith((".nii.gz", "_stats.tsv", ".png"))}
    assert len(data) > 20
    assert {name: library[name] for name in data} == {name: app[name] for name in data}


def test_workflows_refuse_wrong_options():
    with pytest.raises(ValueError, match=r"^mem_gb: no step segmnt; choose from reconstruct, "):
        init_dgmseg_wf(mem_gb={"segmnt": 4.0})
    with pytest.raises(InputError, match=r"^output_space MNI: unknown"):
        init_participant_wf("/out", SegmentationOptions(output_space="MNI"))
    with pytest.raises(InputError, match=r"^`out_dir` out: is relative"):
        init_participant_wf("out")
