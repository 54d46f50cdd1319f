"""The group level as a Nipype node, used without the app."""

from pathlib import Path

import pandas as pd
import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.write_results import AnalyseGroup
from bids_dgmseg.workflows.build import init_group_wf


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("group*") if path.is_file()}


def test_node_writes_what_the_app_writes(results, tmp_path):
    argv = ["--group-column", "group", "--measures", "mean_ppm", "--participant-label", "01", "04"]
    assert main([str(tmp_path / "ds"), str(results), "group", *argv]) == 0
    expected = read_files(results)
    options = {"group_column": "group", "measures": ["mean_ppm"]}
    analyse = AnalyseGroup(
        results=[str(results)], out_dir=str(results), participant_label=["01", "04"], options=options
    )
    report = analyse.run(cwd=str(tmp_path)).outputs
    assert read_files(results) == expected
    assert report.out_page == str(results / "group.html")
    assert report.out_tables[0] == str(results / "group" / "group_stats.tsv")
    assert report.out_reference_group == "HC (the name of controls)"
    table = pd.read_csv(report.out_tables[0], sep="\t")
    assert table.groupby(["participant_id", "group", "age_years"]).size().to_dict() == {
        ("sub-01", "HC", 30): 4,
        ("sub-04", "PD", 33): 4,
    }


def test_workflow_is_nested(results, tmp_path):
    """In somebody else's workflow, with tables in its own folder."""
    outer = Workflow(name="study", base_dir=str(tmp_path / "work"))
    source = Node(IdentityInterface(fields=["results"]), name="source")
    source.inputs.results = [str(results)]
    group = init_group_wf(name="nuclei")
    group.inputs.inputnode.options = {"measures": ["volume_mm3"]}
    outer.connect(source, "results", group, "inputnode.results")
    nodes = {node.name: node for node in outer.run().nodes()}
    page = Path(nodes["analyse"].result.outputs.out_page)
    assert page.is_relative_to(tmp_path / "work" / "study" / "nuclei")
    measures = pd.read_csv(page.parent / "group" / "group_outliers.tsv", sep="\t")["measure"]
    assert set(measures) == {"volume_mm3"}
    assert not list(results.glob("group*"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"datasets": ["."] * 2}, r"^`datasets`: 2 for 1 folder\(s\) of results; pass one for each"),
        ({"options": {"group_column": "dx"}}, r"^`group_column` dx: no such column"),
        ({"out_dir": "tables"}, r"^`out_dir` tables: is relative"),
    ],
)
def test_inputs_are_checked_as_in_the_app(results, tmp_path, inputs, message):
    interface = AnalyseGroup(**{"results": [str(results)], **inputs})
    with pytest.raises(InputError, match=message):
        interface.run(cwd=str(tmp_path))
    assert not list(tmp_path.glob("group*"))
