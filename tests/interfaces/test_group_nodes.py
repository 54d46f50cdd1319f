"""The group level as Nipype nodes, used without the app."""

import json
from pathlib import Path

import pandas as pd
import pytest
from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.group import COLLECTED, AnalyseGroup, CollectStats
from bids_dgmseg.workflows.group import init_group_wf
from tests.run.test_group import NUCLEI, add_scan

GROUPS = dict(zip(("01", "02", "03", "04", "05", "06"), "HC HC HC PD PD PD".split(), strict=True))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of six participants in two groups, below ``derivatives/`` of their dataset."""
    out = tmp_path / "ds" / "derivatives" / "dgmseg"
    rows = ["participant_id\tage\tgroup"]
    for place, (label, group) in enumerate(GROUPS.items()):
        values = {name: (700.0 + place, 0.1 + 0.01 * place + 0.001 * place**2) for name in NUCLEI}
        add_scan(out, f"sub-{label}", values)
        rows.append(f"sub-{label}\t{30 + place}\t{group}")
    (tmp_path / "ds" / "participants.tsv").write_text("\n".join(rows) + "\n")
    return out


def files_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_long_table_has_participants_and_measures(results, tmp_path):
    outputs = CollectStats(results=[str(results)], participant_label=["01", "04"]).run(cwd=str(tmp_path)).outputs
    table = pd.read_csv(outputs.out_stats, sep="\t")
    assert table.groupby(["participant_id", "group", "age_years"]).size().to_dict() == {
        ("sub-01", "HC", 30): 4,
        ("sub-04", "PD", 33): 4,
    }
    assert table["volume_mm3"].tolist() == [700.0] * 4 + [703.0] * 4
    scans = pd.read_csv(outputs.out_scans, sep="\t")
    assert scans[["person", "age_years", "group", "n_rows"]].to_numpy().tolist() == [
        ["sub-01", 30, "HC", 4],
        ["sub-04", 33, "PD", 4],
    ]
    content = json.loads(Path(outputs.out_cohort).read_text())
    assert content["settings"]["Selected"] == {"participant-label": ["01", "04"]}
    assert all(Path(getattr(outputs, f"out_{name}")).parent == tmp_path for name in COLLECTED)


def test_analysis_refuses_other_files_and_relative_folders(results, tmp_path):
    collected = CollectStats(results=[str(results)]).run(cwd=str(tmp_path)).outputs
    inputs = {f"in_{name}": getattr(collected, f"out_{name}") for name in COLLECTED}
    with pytest.raises(InputError, match=r"^`out_dir` tables: is relative"):
        AnalyseGroup(**inputs, out_dir="tables").run(cwd=str(tmp_path))
    (other := tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"^other.json: has no decisions, .* use out_cohort of CollectStats$"):
        AnalyseGroup(**inputs | {"in_cohort": str(other)}).run(cwd=str(tmp_path))


def test_nodes_write_what_the_app_writes(results, tmp_path):
    options = ["--control-filter", 'group == "HC"', "--measures", "mean_ppm"]
    assert main([str(tmp_path / "ds"), str(results), "group", *options]) == 0
    expected = files_of(results, "group*")
    for path in results.glob("group*"):
        path.unlink()
    (tmp_path / "work").mkdir()
    collected = CollectStats(results=[str(results)]).run(cwd=str(tmp_path / "work")).outputs
    inputs = {f"in_{name}": getattr(collected, f"out_{name}") for name in COLLECTED}
    analyse = AnalyseGroup(**inputs, out_dir=str(results), control_filter='group == "HC"', measures=["mean_ppm"])
    report = analyse.run(cwd=str(tmp_path / "work")).outputs
    assert files_of(results, "group*") == expected
    assert report.out_page == str(results / "group.html")
    assert report.out_tables[0] == str(results / "group_stats.tsv")
    assert report.out_reference_group == "HC (the group of `control_filter`)"
    assert "`control_filter` matches 3 participants, at least 5 are needed for a slope" in report.out_warnings[0]


def test_workflow_is_nested_and_cached(results, tmp_path):
    """In somebody else's workflow, with tables in its own folder; a second run analyses nothing again."""

    def run() -> tuple[Path, int]:
        outer = Workflow(name="study", base_dir=str(tmp_path / "work"))
        source = Node(IdentityInterface(fields=["results"]), name="source")
        source.inputs.results = [str(results)]
        group = init_group_wf(name="nuclei")
        group.inputs.inputnode.measures = ["volume_mm3"]
        outer.connect(source, "results", group, "inputnode.results")
        nodes = {node.name: node for node in outer.run().nodes()}
        page = Path(nodes["analyse"].result.outputs.out_page)
        return page, page.stat().st_mtime_ns

    page, written = run()
    assert page.is_relative_to(tmp_path / "work" / "study" / "nuclei")
    measures = pd.read_csv(page.with_name("group_differences.tsv"), sep="\t")["measure"]
    assert set(measures) == {"volume_mm3"}
    description = json.loads(page.with_name("dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert run() == (page, written)
    assert not list(results.glob("group*"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"results": ["nowhere"]}, r"^nowhere: no such folder"),
        ({"datasets": []}, None),
        ({"datasets": ["."] * 2}, r"^`datasets`: 2 for 1 folder of results; pass one for each"),
        ({"participant_label": ["07"]}, r"dgmseg: no results of sub-07; check `participant_label`"),
        ({"group_column": "dx"}, r"^`group_column` dx: no such column"),
    ],
)
def test_inputs_are_checked_as_in_the_app(results, tmp_path, inputs, message):
    interface = CollectStats(**{"results": [str(results)], **inputs})
    if message is None:
        interface.run(cwd=str(tmp_path))
        return
    with pytest.raises(InputError, match=message):
        interface.run(cwd=str(tmp_path))
    assert not list(tmp_path.glob("*.tsv"))


def test_option_that_does_not_fit_writes_nothing(results, tmp_path):
    collected = CollectStats(results=[str(results)]).run(cwd=str(tmp_path)).outputs
    inputs = {f"in_{name}": getattr(collected, f"out_{name}") for name in COLLECTED}
    analyse = AnalyseGroup(**inputs, out_dir=str(tmp_path / "tables"), control_filter='group == "MSA"')
    with pytest.raises(InputError, match=r"^`control_filter` group == \"MSA\": matches no participant"):
        analyse.run(cwd=str(tmp_path))
    assert not (tmp_path / "tables").exists()
