from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nipype import Workflow

from bids_dgmseg.bids.echoes import Echo
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import ReconstructionOptions, Resources, RunConfig, Segmentation
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.workflow.interfaces import STEPS, Prepare
from bids_dgmseg.workflow.participant import Job, plan_run
from bids_dgmseg.workflow.runner import init_scan_wf
from tests.oracle import oracle_model


@pytest.fixture
def workflow(tmp_path) -> Workflow:
    chi = tmp_path / "sub-01_Chimap.nii.gz"
    chi.touch()
    scan = Scan("01", "a", {"run": "2"}, chi, {"Units": "ppm"}, None, tmp_path, "raw")
    config = RunConfig(
        tmp_path,
        tmp_path / "out",
        segmentation=Segmentation(weights=Path("/weights")),
        resources=Resources(omp_nthreads=4, nprocs=3),
    )
    return init_scan_wf(Job(scan, oracle_model(), config))


def workflow_of(folder: Path, *echoes: Echo) -> Workflow:
    """Workflow of a scan with echoes whose phase decreases with the field."""
    scan = Scan("01", None, {}, echoes[0].files[0], {}, None, folder, "raw", echoes=echoes)
    config = RunConfig(folder, folder / "out", reconstruction=ReconstructionOptions(phase_sign="negative"))
    return init_scan_wf(Job(scan, oracle_model(), config))


def documented(part: str) -> set[str]:
    (section,) = re.findall(rf"{part}\n    -+\n(.*?)(?:\n\n|\Z)", str(init_scan_wf.__doc__), re.DOTALL)
    return set(re.findall(r"^    (\w+)$", section, re.MULTILINE))


def test_documented_outputs_are_connected(workflow):
    assert set(workflow.get_node("inputs").interface._fields) == documented("Inputs")
    assert set(workflow.get_node("outputs").interface._fields) == documented("Outputs")
    outputs = workflow.get_node("outputs")
    edges = [data["connect"] for _, target, data in workflow._graph.edges(data=True) if target is outputs]
    assert {field for connections in edges for _, field in connections} == documented("Outputs")


def test_steps_are_in_the_order_of_the_data(workflow):
    assert set(workflow.list_node_names()) == {"inputs", "outputs", *STEPS[1:]}
    for source, target in workflow._graph.edges():
        if {source.name, target.name} <= set(STEPS):
            assert STEPS.index(source.name) < STEPS.index(target.name)


def test_scan_with_echoes_is_reconstructed_first(tmp_path):
    phase = tmp_path / "sub-01_echo-1_part-phase_MEGRE.nii.gz"
    phase.touch()
    workflow = workflow_of(tmp_path, Echo({"phase": phase, "mag": phase}, 0.005))
    assert set(workflow.list_node_names()) == {"inputs", "outputs", *STEPS}
    assert workflow.get_node("reconstruct").inputs.job.config.reconstruction.phase_sign == "negative"
    edges = {(source.name, target.name) for source, target in workflow._graph.edges()}
    assert {("reconstruct", "inputs"), ("reconstruct", "save")} <= edges


def test_unusable_reconstruction_names_the_files_of_the_user(tmp_path):
    phase = tmp_path / "sub-01_part-phase_T2starw.nii.gz"
    phase.touch()
    job = workflow_of(tmp_path, Echo({"phase": phase, "mag": phase}, 0.02)).get_node("prepare").inputs.job
    made = tmp_path / "sub-01_Chimap.nii.gz"
    values = np.random.default_rng(0).normal(scale=100, size=(8, 8, 8)).astype(np.float32)
    nib.Nifti1Image(values, np.eye(4)).to_filename(made)
    step = Prepare(in_chi=str(made), in_reconstruction="x", job=job, sidecar={"Units": "ppm"})
    message = r"^the reconstructed map of sub-01 is not usable: values reach -?\d+, expected ppm .*\); check EchoTime, "
    with pytest.raises(
        InputError, match=message + r"MagneticFieldStrength and the values of sub-01_part-phase_T2starw"
    ):
        step.run_step(tmp_path)


def test_building_workflows_loads_no_slow_library():
    code = "import sys, bids_dgmseg.workflow.runner; print({'torch', 'matplotlib', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"  # they take seconds, and the first scan would wait for them


def test_new_scan_is_planned_without_reading_it(bids_dataset, oracle, monkeypatch, tmp_path):
    config = RunConfig(bids_dataset("sub-01", "sub-02"), tmp_path / "out", segmentation=Segmentation(oracle.name))
    monkeypatch.setattr("bids_dgmseg.bids.derivatives.sha256_or_error", lambda path: pytest.fail(f"{path} is read"))
    assert [job.scan.name for job in plan_run(config).jobs] == ["sub-01", "sub-02"]


@pytest.mark.parametrize(
    ("voxels", "edge_mm", "n_echoes", "with_20_mm_margin"),
    [(40, 2.0, 1, 60), (40, 2.0, 5, 60), (40, 1.0, 1, 80), (200, 1.0, 8, 240)],
)
def test_memory_grows_with_size_and_echoes(tmp_path, voxels, edge_mm, n_echoes, with_20_mm_margin):
    image = tmp_path / "sub-01_echo-1_part-mag_MEGRE.nii"
    empty = np.broadcast_to(np.uint8(0), (voxels,) * 3)
    nib.Nifti1Image(empty, np.diag([-edge_mm, edge_mm, edge_mm, 1])).to_filename(image)
    workflow = workflow_of(
        tmp_path, *(Echo({"phase": image, "mag": image}, 0.005 * number) for number in range(1, n_echoes + 1))
    )
    planned = 0.9e9 + 5 * 4 * n_echoes * voxels**3 + 135 * with_20_mm_margin**3
    assert workflow.get_node("reconstruct").mem_gb == pytest.approx(planned / 1e9)


def large_map(path: Path, voxels: int) -> Path:
    """Write a float32 map whose voxels take no space on the disk."""
    nib.Nifti1Image(np.zeros((1, 1, 1), np.float32), np.eye(4)).to_filename(path)
    with path.open("r+b") as file:
        file.seek(42)  # dim[1:4]
        file.write(np.array([voxels] * 3, np.int16).tobytes())
        file.truncate(352 + 4 * voxels**3)
    return path


@pytest.mark.parametrize(
    ("voxels", "mem_gb", "planned_gb", "problem"),
    [
        # Bytes per voxel as measured; below, the minimum of each step, whatever --mem-gb is.
        (164, 0.5, {"prepare": 1.0, "segment": 2.0, "measure": 1.5, "save": 1.0}, ""),
        (512, 10, {"prepare": 3.82, "segment": 8.65, "measure": 6.24, "save": 1.67}, ""),
        (
            512,
            2,
            {"segment": 8.65},
            "sub-01_Chimap.nii: segment needs about 8.7 GB of memory for 512 x 512 x 512 voxels, --mem-gb is 2; "
            "raise --mem-gb, or crop or resample the image",
        ),
    ],
)
def test_memory_of_a_map_is_planned_from_its_header(tmp_path, voxels, mem_gb, planned_gb, problem):
    chi = large_map(tmp_path / "sub-01_Chimap.nii", voxels)
    config = RunConfig(tmp_path, tmp_path / "out", resources=Resources(mem_gb=mem_gb))
    scan = Scan("01", None, {}, chi, {}, None, tmp_path, "raw")
    workflow = init_scan_wf(Job(scan, get_model("dgm16"), config))
    for step, expected in planned_gb.items():
        assert workflow.get_node(step).mem_gb == pytest.approx(expected, abs=0.01)
    assert workflow.get_node("prepare").inputs.problem == problem


def test_unreadable_echoes_are_planned_too(tmp_path):
    missing = tmp_path / "sub-01_echo-1_part-mag_MEGRE.nii"
    assert (
        0 < workflow_of(tmp_path, Echo({"phase": missing, "mag": missing}, 0.005)).get_node("reconstruct").mem_gb <= 1
    )


def test_options_reach_the_segmentation(workflow):
    assert workflow.name == "sub-01_ses-a_run-2"
    assert workflow.get_node("segment").n_procs == 3  # not more than the CPUs
    assert workflow.get_node("segment").inputs.weights == "/weights"
