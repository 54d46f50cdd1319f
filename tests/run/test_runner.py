from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.scans import Echo, Scan
from bids_dgmseg.config import MeasurementOptions, ReconstructionOptions, RunConfig, SegmentationOptions
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.run.plan import Job, plan_run
from bids_dgmseg.run.runner import build_workflow, plan_memory
from bids_dgmseg.workflows.build import MEMORY_GB
from tests.oracle import oracle_model

SIZES = {"mem_gb": MEMORY_GB}


def job_of(folder: Path, *echoes: Echo) -> Job:
    """Job of a scan with echoes whose phase decreases with the field."""
    sidecar = {"MagneticFieldStrength": 3}
    scan = Scan("01", None, {}, echoes[0].files[0], sidecar, folder, "raw", echoes=echoes)
    options = ReconstructionOptions(phase_sign="negative")
    config = RunConfig(bids_dir=folder, output_dir=folder / "out", reconstruction=options)
    return Job(scan, oracle_model(), config)


def test_scan_with_echoes_is_reconstructed_first(tmp_path, oracle):
    phase = tmp_path / "sub-01_echo-1_part-phase_MEGRE.nii.gz"
    phase.touch()
    workflow = build_workflow(job_of(tmp_path, Echo({"phase": phase, "mag": phase}, 0.005)), **SIZES)
    node = workflow.get_node("reconstruct_wf.reconstruct")
    assert node.inputs.phase_sign == "negative"
    inputs = workflow.inputs.inputnode
    assert (inputs.in_phase, inputs.echo_times_s, inputs.field_strength_t) == ([str(phase)], [0.005], 3)
    assert inputs.metadata["Units"] == "ppm"


@pytest.mark.parametrize("damaged", ["echoes", "sessions", "lesion_mask"])
def test_file_that_is_not_fetched_stops_its_scan_only(bids_dataset, oracle, tmp_path, damaged):
    """Nipype refuses a workflow with a missing file, and with it those of all other scans."""
    folder, unfetched = tmp_path / "given", Path("../../.git/annex/objects/x")
    dataset = bids_dataset("sub-01_ses-1", "sub-01_ses-2", "sub-02")
    (chi,) = dataset.rglob("sub-01_ses-1_Chimap.nii.gz")
    path = folder / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_label-lesion_mask.nii.gz"
    if damaged == "echoes":
        chi.unlink()
        path = chi.with_name("sub-01_ses-1_part-phase_MEGRE.nii.gz")
        path.with_name("sub-01_ses-1_part-mag_MEGRE.nii.gz").symlink_to(unfetched)
        (dataset / "MEGRE.json").write_text('{"EchoTime": 0.005, "MagneticFieldStrength": 3}')
    elif damaged == "sessions":
        (path := chi).unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(unfetched)
    config = RunConfig(
        bids_dir=dataset,
        output_dir=tmp_path / "out",
        segmentation=SegmentationOptions(model=oracle.name, longitudinal=damaged == "sessions"),
        measurement=MeasurementOptions(lesion_masks=folder if damaged == "lesion_mask" else None),
    )
    first, second, other = (job.problem for job in plan_run(config).jobs)
    line = f"{path.name}: content not fetched (broken symlink)"
    assert first == f"{line}; fetch it first (datalad get, git annex get or git lfs pull)"
    assert second == (
        f"not labelled, because sub-01_ses-1 of the same participant failed ({line}); correct or remove it, or run "
        "without `longitudinal`"
        if damaged == "sessions"
        else ""
    )
    assert other == ""


def test_building_workflows_loads_no_slow_library():
    code = "import sys, bids_dgmseg.run.runner; print({'torch', 'matplotlib', 'pandas'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == "set()\n"  # they take seconds, and the first scan would wait for them


def large_map(path: Path, voxels: int) -> Path:
    """Write a float32 map whose voxels take no space on the disk."""
    nib.Nifti1Image(np.zeros((1, 1, 1), np.float32), np.eye(4)).to_filename(path)
    with path.open("r+b") as file:
        file.seek(42)  # dim[1:4]
        file.write(np.array([voxels] * 3, np.int16).tobytes())
        file.truncate(352 + 4 * voxels**3)
    return path


@pytest.mark.parametrize(
    ("voxels", "mem_gb", "planned_gb"),
    [
        # Bytes per voxel as measured; below, the minimum of each step, whatever the limit is.
        (164, 0.5, {"localize": 1.5, "segment": 2.0, "measure": 1.5, "save": 1.5}),
        (512, 10, {"localize": 5.97, "segment": 8.65, "measure": 8.65, "save": 2.75}),
    ],
)
def test_memory_of_a_map_is_planned_from_its_header(tmp_path, voxels, mem_gb, planned_gb):
    scan = Scan("01", None, {}, large_map(tmp_path / "sub-01_Chimap.nii", voxels), {}, tmp_path, "raw")
    planned = plan_memory(scan, get_model("dgm16"), limit_gb=mem_gb)
    for step, expected in planned_gb.items():
        assert planned[step] == pytest.approx(expected, abs=0.01)
