"""The steps of one scan, connected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.bids.reconstructed import MAP_SIDECAR
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.models.registry import Model
from bids_dgmseg.workflow.interfaces import Check, Figures, Localize, Measure, Save, Segment
from bids_dgmseg.workflow.reconstruct import Reconstruct, plan_memory_gb
from bids_dgmseg.workflow.reference import ReferenceChoice

STEPS = ("reconstruct", "check", "localize", "segment", "measure", "figures", "save")
"""Node names in the order of the data: what progress display and logs show; the first where a scan has echoes."""


def workflow_name(scan: str) -> str:
    """Name the workflow of a scan: BIDS labels may have a plus sign, which Nipype's names and folders have not.

    >>> workflow_name("sub-a+b_acq-x")
    'sub-a-plus-b_acq-x'
    """
    return scan.replace("+", "-plus-")


def init_scan_wf(
    *,
    config: RunConfig,
    model: Model,
    scan: Scan,
    fingerprint: str,
    reference_mask: Path | None = None,
    brain_mask: Path | None = None,
    reconstruction: str = "",
    name: str | None = None,
) -> Workflow:
    """Connect the steps from one susceptibility map, or the echoes that it is made of, to its derivatives.

    Parameters
    ----------
    config : RunConfig
        Output directory, device and threads of this run.
    model : Model
        The registry entry that segments.
    scan : Scan
        Whose map it is.
    fingerprint : str
        What the results depend on; the derivatives carry it.
    reference_mask : Path, optional
        The user's mask of the region that susceptibilities are referred to.
    brain_mask : Path, optional
        The user's mask of the brain, for a map that is reconstructed from echoes.
    reconstruction : str
        What that map depends on; it and the derivatives carry it.
    name : str, optional
        What the logs and the working directory call it; by default the scan's name.

    Inputs
    ------
    in_chi
        The scan's susceptibility map, in any orientation, in ppm or ppb; set to ``scan.chi``, or to what
        ``reconstruct`` makes of its echoes.

    Outputs
    -------
    out_dseg
        Labels on the grid of ``in_chi``, numbered as in structures.tsv.
    out_probseg
        Fractions on the same grid, one volume a nucleus.
    out_stats
        Tab-separated table, one row a nucleus.
    out_files
        The derivatives, in place.
    """
    inputs = Node(IdentityInterface(fields=["in_chi"]), name="inputs")
    if not scan.from_echoes:
        inputs.inputs.in_chi = str(scan.chi)
    outputs = Node(IdentityInterface(fields=["out_dseg", "out_probseg", "out_stats", "out_files"]), name="outputs")
    network: dict[str, Any] = {
        "model": model,
        "device": config.resources.device,
        "n_threads": config.resources.omp_nthreads,
    }
    if config.segmentation.weights:
        network["weights"] = str(config.segmentation.weights)
    threads = min(config.resources.omp_nthreads, config.resources.nprocs)
    sidecar = dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar)
    check = Node(Check(sidecar=sidecar, problem=scan.problem or ""), name="check", mem_gb=1.0)
    localize = Node(Localize(**network), name="localize", n_procs=threads, mem_gb=model.memory_gb)
    segment = Node(Segment(**network), name="segment", n_procs=threads, mem_gb=model.memory_gb)
    choice = ReferenceChoice.of(config, reference_mask)
    measure = Node(Measure(model=model, reference=choice), name="measure", mem_gb=1.5)
    figures = Node(Figures(model=model, title=scan.name, viewer=config.segmentation.viewer), name="figures", mem_gb=1.0)
    marks = {"fingerprint": fingerprint, "reconstruction": reconstruction}
    save = Node(Save(scan=scan, model=model, config=config, **marks), name="save", mem_gb=1.0)
    workflow = Workflow(name=name or workflow_name(scan.name))
    if scan.from_echoes:
        reconstruct = Node(
            Reconstruct(scan=scan, phase_sign=config.reconstruction.phase_sign, n_threads=threads),
            name="reconstruct",
            n_procs=threads,
            mem_gb=plan_memory_gb(scan),
        )
        if brain_mask:
            reconstruct.inputs.mask = str(brain_mask)
        workflow.connect(
            [
                (reconstruct, inputs, [("out_chi", "in_chi")]),
                (reconstruct, save, [("out_chi", "in_chi"), ("out_report", "in_reconstruction")]),
            ]
        )
    workflow.connect(
        [
            (inputs, check, [("in_chi", "in_chi")]),
            (check, localize, [("out_chi", "in_chi")]),
            (check, segment, [("out_chi", "in_chi")]),
            (check, measure, [("out_chi", "in_chi")]),
            (check, figures, [("out_chi", "in_chi")]),
            (check, measure, [("out_report", "in_check")]),
            (check, save, [("out_report", "in_check")]),
            (localize, segment, [("out_box", "in_box")]),
            (localize, measure, [("out_box", "in_box"), ("out_regions", "in_regions")]),
            (localize, save, [("out_box", "in_box"), ("out_regions", "in_regions")]),
            (segment, measure, [("out_dseg", "in_dseg"), ("out_probseg", "in_probseg"), ("out_block", "in_block")]),
            (segment, figures, [("out_dseg", "in_dseg")]),
            (segment, save, [("out_dseg", "in_dseg"), ("out_probseg", "in_probseg")]),
            (segment, outputs, [("out_dseg", "out_dseg"), ("out_probseg", "out_probseg")]),
            (measure, save, [("out_stats", "in_stats"), ("out_report", "in_found")]),
            (measure, outputs, [("out_stats", "out_stats")]),
            (figures, save, [("out_figures", "in_figures")]),
            (save, outputs, [("out_files", "out_files")]),
        ]
    )
    return workflow
