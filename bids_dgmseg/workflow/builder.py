"""Nipype workflow of one scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.bids.save import MAP_SIDECAR
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.qsm.reconstruct import estimate_memory_gb
from bids_dgmseg.workflow.interfaces import Measure, Prepare, Reconstruct, Save, Segment, StepNode
from bids_dgmseg.workflow.plan import Job

STEPS = ("reconstruct", "prepare", "segment", "measure", "save")
"""Nodes in the order of the data; only scans with echoes have the first."""


def workflow_name(scan: str) -> str:
    """Return the name of a scan's workflow; Nipype's names have no plus sign, which BIDS labels may have.

    >>> workflow_name("sub-a+b_acq-x")
    'sub-a-plus-b_acq-x'
    """
    return scan.replace("+", "-plus-")


def init_scan_wf(job: Job, model: Model, config: RunConfig) -> Workflow:
    """Build the workflow from one susceptibility map, or the echoes to reconstruct it from, to its derivatives.

    Parameters
    ----------
    job : Job
        Scan with its masks and fingerprints.
    model : Model
        Registry entry.
    config : RunConfig
        Options of the run.

    Returns
    -------
    Workflow
        Named after the scan.

    Inputs
    ------
    in_chi
        The scan's susceptibility map, in any orientation, in ppm or ppb; set to ``scan.chi`` or to the output of
        ``reconstruct``.

    Outputs
    -------
    out_dseg
        Labels on the grid of ``in_chi``, indices of structures.tsv.
    out_probseg
        Probabilities on the same grid, one volume per nucleus.
    out_stats
        Tab-separated table, one row per nucleus.
    out_files
        The derivatives in the output directory.
    """
    scan, resources, weights = job.scan, config.resources, config.segmentation.weights
    threads = min(resources.omp_nthreads, resources.nprocs)
    inputs = Node(IdentityInterface(fields=["in_chi"]), name="inputs")
    outputs = Node(IdentityInterface(fields=["out_dseg", "out_probseg", "out_stats", "out_files"]), name="outputs")
    sidecar = dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar)
    prepare = StepNode(Prepare(sidecar=sidecar, problem=scan.problem or ""), name="prepare", mem_gb=1.0)
    segment = StepNode(
        Segment(
            model=model,
            device=resources.device,
            n_threads=resources.omp_nthreads,
            **_if_given(weights=weights),
        ),
        name="segment",
        n_procs=threads,
        mem_gb=model.memory_gb,
    )
    measure = StepNode(
        Measure(
            model=model,
            reference=config.reference,
            title=scan.name,
            viewer=config.segmentation.viewer,
            **_if_given(reference_mask=job.reference_mask),
        ),
        name="measure",
        mem_gb=1.5,
    )
    save = StepNode(
        Save(scan=scan, model=model, config=config, fingerprint=job.fingerprint, reconstruction=job.reconstruction),
        name="save",
        mem_gb=1.0,
    )
    workflow = Workflow(name=workflow_name(scan.name))
    if scan.from_echoes:
        reconstruct = StepNode(
            Reconstruct(
                scan=scan,
                phase_sign=config.reconstruction.phase_sign,
                n_threads=threads,
                **_if_given(mask=job.brain_mask),
            ),
            name="reconstruct",
            n_procs=threads,
            mem_gb=_plan_memory_gb(scan),
        )
        workflow.connect(reconstruct, "out_chi", inputs, "in_chi")
        workflow.connect(reconstruct, "out_chi", save, "in_chi")
        workflow.connect(reconstruct, "out_report", save, "in_reconstructed")
    else:
        inputs.inputs.in_chi = str(scan.chi)
    workflow.connect(
        [
            (inputs, prepare, [("in_chi", "in_chi")]),
            (prepare, segment, [("out_chi", "in_chi")]),
            (prepare, measure, [("out_chi", "in_chi"), ("out_report", "in_report")]),
            (prepare, save, [("out_report", "in_prepared")]),
            (segment, measure, [(f"out_{name}", f"in_{name}") for name in ("dseg", "block", "box", "seen", "regions")]),
            (segment, save, [(f"out_{name}", f"in_{name}") for name in ("dseg", "probseg", "box", "regions")]),
            (segment, outputs, [("out_dseg", "out_dseg"), ("out_probseg", "out_probseg")]),
            (
                measure,
                save,
                [("out_stats", "in_stats"), ("out_figures", "in_figures"), ("out_report", "in_measured")],
            ),
            (measure, outputs, [("out_stats", "out_stats")]),
            (save, outputs, [("out_files", "out_files")]),
        ]
    )
    return workflow


def _if_given(**paths: Path | None) -> dict[str, Any]:
    """Return the inputs that have a value; Nipype does not accept None for a file."""
    return {name: str(path) for name, path in paths.items() if path}


def _plan_memory_gb(scan: Scan) -> float:
    """Estimate the memory of a reconstruction from the header of the first echo.

    Returns 1 GB if it cannot be read: the step itself then reports why.
    """
    try:
        image = load_image(scan.echoes[0].magnitude) if scan.echoes else None
    except InputError:
        image = None
    if image is None or len(image.shape) < 3:
        return 1.0
    return estimate_memory_gb(image.shape[:3], voxel_sizes(image.affine).tolist(), n_echoes=len(scan.echoes))
