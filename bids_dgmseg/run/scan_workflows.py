"""Nipype workflow of one scan, or of the sessions that are labelled together, with the options of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Workflow

from bids_dgmseg.bids.derivatives import MAP_SIDECAR, SCANNER_FIELDS, map_paths
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import format_shape, load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.run.plan import Job
from bids_dgmseg.workflows.reconstruct import init_reconstruct_wf
from bids_dgmseg.workflows.scan import init_participant_wf
from bids_dgmseg.workflows.sessions import init_sessions_wf
from bids_dgmseg.workflows.steps import MEMORY_GB

_LEAST_GB = {
    "reconstruct": 0.6,
    "conform": 1.0,
    "localize": 1.0,
    "align": 1.5,
    "correct": 1.0,
    "measure": 1.5,
    "sample": 1.5,
    "plot": 1.5,
    "normalize": 2.0,
    "save": 1.0,
}
"""Memory planned for steps of small images, libraries included."""

_BYTES_PER_VOXEL = {
    "conform": 24,
    "localize": 40,
    "segment": 60,
    "align": 60,
    "measure": 42,
    "sample": 60,
    "plot": 42,
    "normalize": 42,
    "save": 8,
}
"""Growth of the peak memory of `dgm16` from cubes of 128 to 360 voxels; ``conform`` for values of 8 bytes."""

_LIBRARIES_GB = 0.6


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

    Sessions without a job are labelled already, and their maps exist. Those whose results are edited give their map
    only. `mem_gb` has the memory of each step by scan.
    """
    job, to_process = jobs[0], {job.scan.name for job in jobs}
    maps: dict[str, Path | Workflow] = {one.map_name: one.scan.chi for one in job.sessions}
    for one in job.sessions:
        scan = one.scan
        if scan.from_echoes and scan.name not in to_process:
            maps[one.map_name] = map_paths(one.config.output_dir, scan)[0]
        elif scan.from_echoes:
            maps[one.map_name] = reconstruct = init_reconstruct_wf(
                name=f"{workflow_name(scan.name)}_reconstruct",
                n_threads=_count_threads(one.config),
                mem_gb=mem_gb[scan.name],
                **_reconstruction_options(one.config),
            )
            _set_inputs(reconstruct, {**_describe_echoes(one), "title": scan.name})
    return init_sessions_wf(
        maps,
        {one.map_name: build_workflow(one, mem_gb=mem_gb[one.scan.name]) for one in jobs if not one.edited},
        metadata=[MAP_SIDECAR if one.scan.from_echoes else one.scan.sidecar for one in job.sessions],
        name=folder_name(job),
        model=job.model.name,
        weights=job.config.segmentation.weights,
        label_map=job.config.segmentation.label_map,
        device=job.config.resources.device,
        n_threads=_count_threads(job.config),
        mem_gb={step: max(one[step] for one in mem_gb.values()) for step in MEMORY_GB},
    )


def build_workflow(job: Job, *, mem_gb: Mapping[str, float]) -> Workflow:
    """Build the workflow of a scan with the options of the run."""
    scan, config = job.scan, job.config
    segmentation, reference = config.segmentation, config.reference
    workflow = init_participant_wf(
        config.output_dir,
        name=workflow_name(scan.name),
        from_echoes=scan.from_echoes,
        masks=segmentation.masks,
        reconstructed=bool(job.sessions),
        reconstruction=_reconstruction_options(config),
        n_threads=_count_threads(config),
        mem_gb=mem_gb,
        model=job.model.name,
        weights=segmentation.weights,
        label_map=segmentation.label_map,
        device=config.resources.device,
        ensemble=segmentation.ensemble,
        reference=reference.kind,
        reference_structure=reference.structure,
        needs_reference_mask=reference.masks is not None,
        bilateral=segmentation.bilateral,
        corrected=job.correction is not None,
        sampled=bool(job.maps),
        longitudinal=bool(job.sessions),
        viewer=segmentation.viewer,
        output_space=segmentation.output_space,
    )
    inputs = {
        "title": scan.name,
        "reference_mask": job.reference_mask,
        "in_correction": job.correction,
        "in_exclude": [str(path) for path in job.excluded],
        "entities": scan.named_entities,
        "sources": scan.uris,
        "source_file": scan.chi,
        "scanner": {name: scan.sidecar[name] for name in SCANNER_FIELDS if name in scan.sidecar},
        "settings": job.describe_settings(),
        "made_from": job.made_from.describe(),
    }
    if job.maps:
        inputs |= {
            "in_maps": [str(one.path) for one in job.maps.values()],
            "map_names": list(job.maps),
            "map_units": [one.units for one in job.maps.values()],
        }
    if not scan.from_echoes:
        inputs |= {"in_chi": scan.chi, "metadata": dict(scan.sidecar)}
    elif not job.sessions:
        inputs |= _describe_echoes(job)
    _set_inputs(workflow, inputs)
    return workflow


def _set_inputs(workflow: Workflow, inputs: Mapping[str, Any]) -> None:
    inputnode = workflow.inputs.inputnode  # slow: Nipype builds them anew each time
    for name, value in inputs.items():
        if value is not None:  # Nipype does not accept None for a file that is not provided
            setattr(inputnode, name, str(value) if isinstance(value, Path) else value)


def _count_threads(config: RunConfig) -> int:
    return min(config.resources.omp_nthreads, config.resources.nprocs)


def _reconstruction_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of a reconstruction by the names of `init_reconstruct_wf`; brain masks are found per scan."""
    return {key: value for key, value in vars(config.reconstruction).items() if key != "brain_masks"}


def _describe_echoes(job: Job) -> dict[str, Any]:
    """Return the inputs of a reconstruction."""
    scan = job.scan
    parts = list(scan.echoes[0].parts)
    fields = ("in_phase", "in_magnitude")[: len(parts)]
    return {
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
    least = {**MEMORY_GB, **_LEAST_GB, "segment": model.memory_gb}
    least["align"] = max(least["align"], model.memory_gb)  # it also runs the networks
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
    too_large = {step: gb for step, gb in needed.items() if gb > max(limit_gb, least[step])}
    if too_large:
        step, gb = max(too_large.items(), key=lambda item: item[1])
        raise InputError(
            f"{scan.chi.name}: {step} needs about {gb:.1f} GB of memory for {format_shape(shape)} voxels, `mem_gb` is "
            f"{limit_gb:g}; raise `mem_gb`, or crop or resample the image"
        )
    return least | {step: max(gb, least[step]) for step, gb in needed.items()}
