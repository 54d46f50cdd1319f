"""Nipype workflow of one scan, or of the sessions that are labelled together, with the options of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Workflow
from nipype.interfaces.utility import Merge

from bids_dgmseg.bids.derivatives import MAP_SIDECAR, SCANNER_FIELDS, map_paths
from bids_dgmseg.bids.scan_results import Provenance
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.localize_nuclei import AlignSessions
from bids_dgmseg.io.nifti import format_shape, load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.run.plan import Job
from bids_dgmseg.workflows.scan_wf import (
    MEMORY_GB,
    RECONSTRUCTED,
    init_participant_wf,
    init_reconstruct_wf,
    step_node,
)

_BYTES_PER_VOXEL = {"localize": 40, "segment": 60, "align": 60, "measure": 60, "plot": 42, "save": 16}
"""Growth of the peak memory of `dgm16` from cubes of 128 to 360 voxels."""

_LIBRARIES_GB, _SMALLEST_GB = 0.6, 1.5
"""Memory of the libraries, and the least that is planned for a step."""


def workflow_name(scan: str) -> str:
    """Return the name of a scan's workflow; Nipype's names have no plus sign, which BIDS labels may have.

    >>> workflow_name("sub-a+b_acq-x")
    'sub-a-plus-b_acq-x'
    """
    return scan.replace("+", "-plus-")


def folder_name(job: Job) -> str:
    """Return the name of the folder for the intermediate files of a scan, or of the sessions labelled with it."""
    return f"{workflow_name(job.sessions[0].scan.name)}_sessions" if job.sessions else workflow_name(job.scan.name)


def build_sessions_workflow(jobs: Sequence[Job], *, mem_gb: Mapping[str, Mapping[str, float]]) -> Workflow:
    """Build the workflow of the sessions of a participant that are labelled together.

    Sessions without a job are labelled already, and their maps exist. Sessions with edited results contribute only
    their map. `mem_gb` has the memory of each step by scan.
    """
    job, sessions, to_process = jobs[0], jobs[0].sessions, {job.scan.name: job for job in jobs}
    network: dict[str, Any] = {
        "model": job.model.name,
        "weights": job.config.segmentation.weights,
        "device": job.config.resources.device,
        "n_threads": _count_threads(job),
    }
    largest_gb = {step: max(planned[step] for planned in mem_gb.values()) for step in MEMORY_GB}
    align = step_node(AlignSessions(), "align", largest_gb, network["n_threads"], **network)
    align.inputs.names = [session.map_name for session in sessions]
    align.inputs.metadata = [_describe_map(session.scan) for session in sessions]
    collect = step_node(Merge(len(sessions)), "collect", largest_gb)
    workflow = Workflow(name=folder_name(job))
    workflow.connect(collect, "out", align, "in_sessions")
    for number, session in enumerate(sessions):
        scan, reconstruct = session.scan, None
        if scan.from_echoes and scan.name in to_process:
            name = f"{workflow_name(scan.name)}_reconstruct"
            options: dict[str, Any] = {"n_threads": _count_threads(session), "mem_gb": mem_gb[scan.name]}
            reconstruct = init_reconstruct_wf(session.config.reconstruction, name=name, **options)
            _set_inputs(reconstruct, _describe_echoes(session))
            workflow.connect(reconstruct, "outputnode.chi", collect, f"in{number + 1}")
        else:
            path = map_paths(session.config.output_dir, scan)[0] if scan.from_echoes else scan.chi
            setattr(collect.inputs, f"in{number + 1}", str(path))
        own = to_process.get(scan.name)
        if own and not own.edited:
            labelled = build_workflow(own, mem_gb=mem_gb[scan.name])
            workflow.connect(align, ("out_sessions", _take, number), labelled, "inputnode.in_session")
            if reconstruct:
                fields = [(f"outputnode.{output}", f"inputnode.{field}") for output, field in RECONSTRUCTED.items()]
                workflow.connect([(reconstruct, labelled, fields)])
    return workflow


def _take(paths, number):  # type: ignore[no-untyped-def]  # Nipype runs its source text, without this module's names
    """Return one of several files."""
    return paths[number]


def build_workflow(job: Job, *, mem_gb: Mapping[str, float]) -> Workflow:
    """Build the workflow of a scan with the options of the run."""
    scan, config = job.scan, job.config
    is_reconstructed_here = scan.from_echoes and not job.sessions
    workflow = init_participant_wf(
        config.output_dir,
        replace(config.segmentation, model=job.model.name),
        config.reference,
        config.reconstruction if is_reconstructed_here else None,
        name=workflow_name(scan.name),
        device=config.resources.device,
        n_threads=_count_threads(job),
        mem_gb=mem_gb,
    )
    provenance = Provenance(
        sources=scan.uris,
        scanner={name: scan.sidecar[name] for name in SCANNER_FIELDS if name in scan.sidecar},
        settings=job.describe_settings(),
        made_from=job.made_from.describe(),
    )
    inputs = {
        "title": scan.name,
        "metadata": _describe_map(scan),
        "reference_mask": job.reference_mask,
        "in_correction": job.correction,
        "in_lesion_masks": [str(path) for path in job.excluded] or None,
        "in_maps": [str(one.path) for one in job.maps.values()] or None,
        "map_names": list(job.maps) or None,
        "map_units": [one.units for one in job.maps.values()] or None,
        "entities": scan.named_entities,
        "provenance": asdict(provenance),
    }
    if is_reconstructed_here:
        inputs |= _describe_echoes(job)
    elif not scan.from_echoes:
        inputs["in_chi"] = scan.chi
    _set_inputs(workflow, inputs)
    return workflow


def _describe_map(scan: Scan) -> dict[str, Any]:
    """Return the metadata of the map of a scan."""
    return dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar)


def _set_inputs(workflow: Workflow, inputs: Mapping[str, Any]) -> None:
    inputnode = workflow.inputs.inputnode  # slow: Nipype builds them anew each time
    for name, value in inputs.items():
        if value is not None:  # Nipype does not accept None for a file that is not provided
            setattr(inputnode, name, str(value) if isinstance(value, Path) else value)


def _count_threads(job: Job) -> int:
    return min(job.config.resources.omp_nthreads, job.config.resources.nprocs)


def _describe_echoes(job: Job) -> dict[str, Any]:
    """Return the inputs of a reconstruction."""
    scan = job.scan
    parts = list(scan.echoes[0].parts)
    fields = ("in_phase", "in_magnitude")[: len(parts)]
    return {
        "title": scan.name,
        "parts": parts,
        **{field: [str(echo.parts[part]) for echo in scan.echoes] for field, part in zip(fields, parts, strict=True)},
        "echo_times_s": [echo.time_s for echo in scan.echoes],
        "field_strength_t": float(scan.sidecar["MagneticFieldStrength"]),
        "phase_units": [echo.units for echo in scan.echoes],
        "in_mask": job.brain_mask,
    }


def plan_memory(scan: Scan, model: Model, *, inversion: str, limit_gb: float) -> dict[str, float]:
    """Estimate the peak memory of each step in GB from the header of the map, or of the first echo.

    If the header cannot be read, the step itself reports why.

    Raises
    ------
    InputError
        If a step needs more than the limit because of the size of the image.
    """
    networks = {"segment": model.memory_gb, "align": model.memory_gb}
    least = {**dict.fromkeys(MEMORY_GB, _SMALLEST_GB), **networks, "reconstruct": _LIBRARIES_GB}
    try:
        image = load_image(scan.chi)
    except InputError:
        return least
    if len(image.shape) < 3:
        return least
    shape = image.shape[:3]
    needed = {step: _LIBRARIES_GB + n * math.prod(shape) / 1e9 for step, n in _BYTES_PER_VOXEL.items()}
    if scan.echoes:
        from bids_dgmseg.qsm.reconstruct import estimate_memory_gb  # with torch

        sizes_mm = voxel_sizes(image.affine).tolist()
        needed["reconstruct"] = estimate_memory_gb(shape, sizes_mm, n_echoes=len(scan.echoes), inversion=inversion)
    if too_large := {step: gb for step, gb in needed.items() if gb > max(limit_gb, least[step])}:
        step = max(too_large, key=lambda name: too_large[name])
        raise InputError(
            f"{scan.chi.name}: {step} needs about {too_large[step]:.1f} GB of memory for {format_shape(shape)} voxels, "
            f"`mem_gb` is {limit_gb:g}; raise `mem_gb`, or crop or resample the image"
        )
    return least | {step: max(gb, least[step]) for step, gb in needed.items()}
