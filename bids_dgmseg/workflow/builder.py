"""Nipype workflow of one scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.bids.derivatives import MAP_SIDECAR
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.qsm.reconstruct import estimate_memory_gb
from bids_dgmseg.workflow.interfaces import Measure, Prepare, Reconstruct, Save, Segment, Step, StepNode
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
    scan = job.scan
    inputs = Node(IdentityInterface(fields=["in_chi"]), name="inputs")
    outputs = Node(IdentityInterface(fields=["out_dseg", "out_probseg", "out_stats", "out_files"]), name="outputs")
    *reconstruct, prepare, segment, measure, save = _steps(job, model, config)
    workflow = Workflow(name=workflow_name(scan.name))
    if not reconstruct:
        inputs.inputs.in_chi = str(scan.chi)
    for node in reconstruct:
        workflow.connect(node, "out_chi", inputs, "in_chi")
        workflow.connect(node, "out_chi", save, "in_chi")
        workflow.connect(node, "out_report", save, "in_reconstructed")
    workflow.connect(
        [
            (inputs, prepare, [("in_chi", "in_chi")]),
            (prepare, segment, [("out_chi", "in_chi")]),
            (prepare, measure, [("out_chi", "in_chi"), ("out_report", "in_report")]),
            (prepare, save, [("out_report", "in_prepared")]),
            (segment, measure, [(f"out_{name}", f"in_{name}") for name in ("dseg", "block", "box", "seen", "regions")]),
            (segment, save, [(f"out_{name}", f"in_{name}") for name in ("dseg", "probseg", "box", "regions")]),
            (segment, outputs, [("out_dseg", "out_dseg"), ("out_probseg", "out_probseg")]),
            (measure, save, [("out_stats", "in_stats"), ("out_figures", "in_figures"), ("out_report", "in_measured")]),
            (measure, outputs, [("out_stats", "out_stats")]),
            (save, outputs, [("out_files", "out_files")]),
        ]
    )
    return workflow


def _steps(job: Job, model: Model, config: RunConfig) -> list[StepNode]:
    """Return the nodes of `STEPS`, not yet connected; the first only for a scan with echoes."""
    scan, resources, segmentation = job.scan, config.resources, config.segmentation
    threads = min(resources.omp_nthreads, resources.nprocs)

    def node(step: type[Step], mem_gb: float, *, n_procs: int = 1, **inputs: Any) -> StepNode:
        # Nipype does not accept None for a file that is not given.
        given = {name: str(one) if isinstance(one, Path) else one for name, one in inputs.items() if one is not None}
        return StepNode(step(**given), name=step.__name__.lower(), n_procs=n_procs, mem_gb=mem_gb)

    sidecar = dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar)
    hashes: dict[str, Any] = {"fingerprint": job.fingerprint, "reconstruction": job.reconstruction}
    nodes = [
        node(Prepare, 1.0, sidecar=sidecar, problem=scan.problem or ""),
        node(
            Segment,
            model.memory_gb,
            n_procs=threads,
            model=model,
            device=resources.device,
            n_threads=resources.omp_nthreads,
            weights=segmentation.weights,
        ),
        node(
            Measure,
            1.5,
            model=model,
            reference=config.reference,
            reference_mask=job.reference_mask,
            title=scan.name,
            viewer=segmentation.viewer,
        ),
        node(Save, 1.0, scan=scan, model=model, config=config, **hashes),
    ]
    if scan.from_echoes:
        options = {"phase_sign": config.reconstruction.phase_sign, "n_threads": threads, "mask": job.brain_mask}
        nodes.insert(0, node(Reconstruct, _plan_memory_gb(scan), n_procs=threads, scan=scan, **options))
    return nodes


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
