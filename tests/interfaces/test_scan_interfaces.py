"""Interfaces of the steps: each runs alone, in a MapNode and with iterables, from files to files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nipype import MapNode, Node, Workflow
from nipype.pipeline.engine.utils import generate_expanded_graph

from bids_dgmseg import interfaces
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.interfaces import (
    AlignSessions,
    AnalyseGroup,
    ImplausibleMapError,
    LocalizeNuclei,
    MeasureNuclei,
    ReconstructQSM,
    SaveDerivatives,
    SegmentNuclei,
)
from bids_dgmseg.interfaces.step import FileInterface
from bids_dgmseg.io.nifti import load_image, write_like
from bids_dgmseg.models.structures import STRUCTURES
from tests.conftest import coarse_chi, coarsen_sessions, write_map
from tests.interfaces.conftest import run_in
from tests.run.test_multi_echo_scans import write_echoes

INTERFACES = [item for item in vars(interfaces).values() if isinstance(item, type) and issubclass(item, FileInterface)]


def report_of(outputs):
    return json.loads(Path(outputs.out_report).read_text())


def read_stats(outputs) -> pd.DataFrame:
    return pd.read_csv(outputs.out_stats, sep="\t", na_values="n/a").set_index("abbreviation")


def test_map_is_converted_to_ppm(tmp_path, work):
    ppb = coarse_chi().with_array(coarse_chi().array * 1000)
    path = write_map(tmp_path / "ds", "sub-01", ppb, sidecar={"Units": "ppb", "ReferenceRegion": "CSF"})
    outputs = LocalizeNuclei(in_chi=str(path), model="oracle").run().outputs
    about = report_of(outputs)["input"]
    assert (about["units"], about["reference"]) == ("ppb", "CSF")
    values = Volume.read(outputs.out_chi).array
    np.testing.assert_allclose(values[np.isfinite(values)], coarse_chi().array[np.isfinite(values)], atol=1e-6)


def test_labels_and_probabilities_are_on_the_grid_of_the_map(chi, segmented):
    image, dseg, probseg = (load_image(path) for path in (chi, segmented.out_dseg, segmented.out_probseg))
    assert dseg.shape == image.shape == probseg.shape[:3]
    np.testing.assert_array_equal(dseg.affine, image.affine)
    assert set(np.unique(np.asanyarray(dseg.dataobj))) == {0, *(structure.index for structure in STRUCTURES)}
    assert report_of(segmented)["labels"] == [structure.abbreviation for structure in STRUCTURES]
    box = load_image(segmented.out_probseg_box)
    start = np.rint((np.linalg.inv(probseg.affine) @ box.affine)[:3, 3]).astype(int)
    x, y, z = (slice(low, low + size) for low, size in zip(start, box.shape[:3], strict=True))
    np.testing.assert_array_equal(probseg.get_fdata()[x, y, z], box.get_fdata())
    assert probseg.get_fdata().sum() == pytest.approx(box.get_fdata().sum())  # 0 elsewhere


def test_further_maps_have_no_value_of_a_missing_nucleus(measurable, segmented, tmp_path):
    dseg = Volume.read(segmented.out_dseg, np.uint8)
    lost = np.where(dseg.array == STRUCTURES.named("RN_L").index, 0, dseg.array)
    in_dseg = str(write_like(lost, segmented.out_dseg, tmp_path / "lost.nii.gz"))
    report = report_of(segmented)
    report["detected"].remove("RN_L")
    Path(segmented.out_report).write_text(json.dumps(report))
    path = tmp_path / "sub-01_R2starmap.nii"
    nib.Nifti1Image(np.full(dseg.shape, 25, np.float32), dseg.affine).to_filename(path)
    outputs = MeasureNuclei(**{**measurable, "in_dseg": in_dseg}, in_maps=[str(path)], bilateral=True).run().outputs
    table = read_stats(outputs)
    assert table.loc[["RN_L", "RN"], ["mean_ppm", "R2starmap_n_valid", "R2starmap_mean_per_s"]].isna().all(axis=None)
    assert table.loc[["RN_R", "DN"], "R2starmap_mean_per_s"].tolist() == [25, 25]
    assert report_of(outputs)["maps"]["R2starmap"]["unit"] == "1/s"
    assert [Path(figure).name for figure in outputs.out_map_figures] == ["R2starmap.png"]


@pytest.fixture
def saved(measurable, localized, segmented, work) -> dict[str, str]:
    """Inputs of SaveDerivatives."""
    measured = run_in(work / "measure", MeasureNuclei(**measurable))
    return {
        "in_chi": localized.out_chi,
        "in_location": localized.out_location,
        "in_dseg": segmented.out_dseg,
        "in_probseg": segmented.out_probseg,
        "in_stats": measured.out_stats,
        "map_report": localized.out_report,
        "segmentation_report": segmented.out_report,
        "measures_report": measured.out_report,
    }


def test_derivatives_are_named_by_entities(tmp_path, saved):
    entities = {"sub": "01", "ses": "b", "acq": "x"}
    files = SaveDerivatives(out_dir=str(tmp_path / "out"), entities=entities, **saved, masks=False).run()
    names = {Path(path).relative_to(tmp_path / "out").as_posix() for path in files.outputs.out_files}
    stem = "sub-01/ses-b/anat/sub-01_ses-b_acq-x_seg-oracle"
    ends = "dseg.nii.gz dseg.tsv dseg.json probseg.nii.gz probseg.json stats.tsv stats.json qc.json".split()
    assert names == {f"{stem}_{end}" for end in ends}


@pytest.fixture
def echoes(tmp_path, work) -> dict[str, list[str]]:
    """Files of the phantom's echoes."""
    folder = write_echoes(tmp_path / "echoes")
    parts = {"in_phase": "phase", "in_magnitude": "mag"}
    return {name: sorted(map(str, folder.glob(f"*_part-{part}_*.nii.gz"))) for name, part in parts.items()}


ACQUISITION = {"echo_times_s": [0.004, 0.012, 0.02, 0.028], "field_strength_t": 3.0}


def test_echoes_become_a_map(echoes):
    step = ReconstructQSM(**echoes, **ACQUISITION, phase_sign="positive", accept_implausible=True, save_fields=True)
    outputs = step.run().outputs
    made, first = load_image(outputs.out_chi), load_image(echoes["in_phase"][0])
    np.testing.assert_array_equal(made.affine, first.affine)
    assert made.shape == first.shape
    assert report_of(outputs)["reconstruction"]["PhaseSignFrom"] == "stated by the user"
    names = [Path(path).name.partition(".")[0] for path in outputs.out_fields]
    assert names == ["paramagnetic", "diamagnetic", "brain", "total", "local"]


def test_implausible_map_travels_with_its_figure(tmp_path):
    error = ImplausibleMapError(["spread 9 ppm"], report={"a": 1}, warnings=["b"], figure=tmp_path / "c.png")
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_changed_file_next_to_an_input_counts_as_changed(tmp_path):
    """Nipype runs a node again if the hash of its inputs changes."""
    chi, dseg = (str(tmp_path / f"sub-01_{name}.nii.gz") for name in ("Chimap", "dseg"))
    for path in (chi, dseg):
        Path(path).touch()
    steps = {
        LocalizeNuclei(in_chi=chi): "sub-01_Chimap.json",
        AlignSessions(in_sessions=[chi, chi]): "sub-01_Chimap.json",
        MeasureNuclei(in_chi=dseg, in_maps=[chi]): "sub-01_Chimap.json",
        SegmentNuclei(in_chi=chi, in_correction=dseg): "sub-01_dseg.tsv",
    }
    for step, name in steps.items():
        (tmp_path / name).unlink(missing_ok=True)
        hashes = [step.inputs.get_hashval()[1]]
        for nucleus in ("DN_L", "DN_R"):
            (tmp_path / name).write_text(f"index\tabbreviation\n1\t{nucleus}\n")
            hashes.append(step.inputs.get_hashval()[1])
        assert len(set(hashes)) == 3, name


@pytest.fixture
def inputs_of(request, tmp_path, monkeypatch):
    """Function that returns an interface's inputs, and the input that is repeated."""

    def call(interface):
        chi = request.getfixturevalue("chi")
        if interface is LocalizeNuclei:
            return {"model": "oracle"}, {"in_chi": [chi, chi]}
        if interface is AnalyseGroup:
            return {"options": {"group_column": "group"}}, {"results": [[str(request.getfixturevalue("results"))]]}
        if interface is AlignSessions:
            # two sessions of one phantom; the network of the oracle segments their mean
            coarsen_sessions(monkeypatch)
            return {"model": "oracle"}, {"in_sessions": [[chi, chi]]}
        if interface is ReconstructQSM:
            echoes = request.getfixturevalue("echoes")
            fixed = {**ACQUISITION, "phase_sign": "positive", "accept_implausible": True}
            return {**fixed, "in_magnitude": echoes["in_magnitude"]}, {"in_phase": [echoes["in_phase"]]}
        if interface is SegmentNuclei:
            localized = request.getfixturevalue("localized")
            return {"model": "oracle", "in_location": localized.out_location}, {"in_chi": [localized.out_chi] * 2}
        if interface is SaveDerivatives:
            fixed = {**request.getfixturevalue("saved"), "out_dir": str(tmp_path / "out"), "masks": False}
            return fixed, {"entities": [{"sub": "01"}, {"sub": "02"}]}
        fixed = request.getfixturevalue("measurable" if interface is MeasureNuclei else "labelled")
        return fixed, {"in_dseg": [fixed.pop("in_dseg")] * 2}

    return call


@pytest.mark.parametrize("interface", INTERFACES)
def test_interface_runs_in_a_mapnode_and_with_iterables(interface, work, inputs_of, tmp_path):
    fixed, repeated = inputs_of(interface)
    ((name, values),) = repeated.items()
    mapped = MapNode(interface(**fixed), iterfield=[name], name="mapped", base_dir=str(tmp_path / "nipype"))
    setattr(mapped.inputs, name, values)
    outputs = vars(mapped.run().outputs)
    assert all(len(value) == len(values) for value in outputs.values() if isinstance(value, list))
    workflow = Workflow(name="repeated", base_dir=str(tmp_path / "nipype"))
    node = Node(interface(**fixed), name="node")
    node.iterables = (name, values)
    workflow.add_nodes([node])
    nodes = list(generate_expanded_graph(workflow._create_flat_graph()).nodes())
    assert len(nodes) == len(values)
    if len(values) > 1:  # the others take seconds
        nodes[0].run()


def test_interfaces_have_few_and_described_traits():
    for interface in INTERFACES:
        inputs, outputs = (spec().traits(transient=None) for spec in (interface.input_spec, interface.output_spec))
        assert len(inputs) <= 20, interface.__name__
        undescribed = [name for name, trait in {**inputs, **outputs}.items() if not trait.desc]
        assert not undescribed, f"{interface.__name__}: {undescribed}"
