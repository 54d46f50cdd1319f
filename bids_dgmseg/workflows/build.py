"""Workflows of a scan (reconstruction, segmentation with measures and figures, derivatives) and of the group level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nipype import Node, Workflow
from nipype.interfaces.base import BaseInterface
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.bids.derivatives import MAP_SIDECAR
from bids_dgmseg.config import ReconstructionOptions, ReferenceRegion, SegmentationOptions, parse_output_space
from bids_dgmseg.interfaces.label_nuclei import LocalizeNuclei, SegmentNuclei
from bids_dgmseg.interfaces.measure_nuclei import MeasureNuclei
from bids_dgmseg.interfaces.reconstruct_qsm import ReconstructQSM
from bids_dgmseg.interfaces.step import StepNode, check_absolute
from bids_dgmseg.interfaces.write_results import AnalyseGroup, PlotNuclei, SaveDerivatives

MEMORY_GB: Mapping[str, float] = {
    "reconstruct": 4.0,
    "collect": 0.5,
    "align": 2.0,
    "localize": 2.0,
    "segment": 2.0,
    "measure": 2.0,
    "plot": 1.5,
    "save": 1.0,
}
"""Memory planned for each step, for images of at most 256 voxels along each axis; steps in the order of the data.

Only scans with echoes have ``reconstruct``. Sessions that are labelled together share ``collect`` and ``align``."""

ECHO_INPUTS = (
    "in_phase in_magnitude parts echo_times_s field_strength_t phase_units acquisition_type in_mask title".split()
)

_MAP_INPUTS = (
    "in_chi metadata in_session in_correction in_r2star in_changes reconstruction_report reference_mask in_lesion_masks"
    " in_maps map_names map_units age title"
).split()

RECONSTRUCTED = {
    "chi": "in_chi",
    "r2star": "in_r2star",
    "changes": "in_changes",
    "figure": "in_reconstruction_figure",
    "fields": "in_fields",
    "report": "reconstruction_report",
}
"""Output of `init_reconstruct_wf` → input of `init_participant_wf`."""


def init_reconstruct_wf(
    reconstruction: ReconstructionOptions | None = None,
    *,
    name: str = "reconstruct_wf",
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
) -> Workflow:
    """Build the workflow that reconstructs a chi map from gradient echoes.

    Parameters
    ----------
    reconstruction : ReconstructionOptions, optional
        ``brain_masks`` has no effect: the mask is an input.
    name : str
    n_threads : int
        Threads of Fourier transforms and networks.
    mem_gb : mapping of str to float
        Memory in GB planned for each step.

    Returns
    -------
    Workflow

    Inputs
    ------
    - ``in_phase``, ``in_magnitude``, ``parts``, ``echo_times_s``, ``field_strength_t``, ``phase_units``,
      ``acquisition_type``, ``in_mask``, ``title``: As the inputs of `bids_dgmseg.interfaces.ReconstructQSM`.

    Outputs
    -------
    - ``chi``, ``r2star``, ``changes``, ``figure``, ``fields``, ``report``: Its outputs: map in ppm, R2* in 1/s and
      changes of the map with other choices (not with a single echo), PNG of the steps, parts of the map and fields,
      report.
    """
    workflow = Workflow(name=name)
    inputs, outputs = identity_node("inputnode", ECHO_INPUTS), identity_node("outputnode", RECONSTRUCTED)
    options = asdict(reconstruction or ReconstructionOptions())
    options.pop("brain_masks")
    step = step_node(ReconstructQSM(), "reconstruct", mem_gb, n_threads, n_threads=n_threads, **options)
    workflow.connect(
        [
            (inputs, step, same(ECHO_INPUTS)),
            (step, outputs, [(f"out_{field}", field) for field in RECONSTRUCTED]),
        ]
    )
    return workflow


def init_dgmseg_wf(
    segmentation: SegmentationOptions | None = None,
    reference: ReferenceRegion | None = None,
    *,
    name: str = "dgmseg_wf",
    device: str = "auto",
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
) -> Workflow:
    """Build the workflow that labels, measures and draws the nuclei of a chi map.

    Parameters
    ----------
    segmentation : SegmentationOptions, optional
        Model, weights and what is written.
    reference : ReferenceRegion, optional
        Region whose mean susceptibility is subtracted; with ``masks``, it is n/a without ``reference_mask``.
    name : str
    device : {"auto", "cpu", "cuda", "mps"}
        Where the networks run.
    n_threads : int
        Threads of the networks.
    mem_gb : mapping of str to float
        Memory in GB planned for each step.

    Returns
    -------
    Workflow

    Inputs
    ------
    All but the first are optional.

    - ``in_chi``: Susceptibility map in ppm or ppb, in any orientation.
    - ``metadata``: Dict, such as ``{"Units": "ppm"}``; by default the JSON file next to the map.
    - ``in_session``: One of ``out_sessions`` of `bids_dgmseg.interfaces.AlignSessions`.
    - ``in_correction``: Labels drawn by a person on the grid of the map.
    - ``in_r2star``, ``in_changes``: R2* in 1/s, changes of the map with other choices, on the grid of the map.
    - ``reconstruction_report``: ``report`` of `init_reconstruct_wf`.
    - ``reference_mask``: Mask for the reference ``csf``.
    - ``in_lesion_masks``: Masks of voxels that are not measured.
    - ``in_maps``, ``map_names``, ``map_units``: Further maps, their names in columns, and their units.
    - ``age``: Age in years.
    - ``title``: Name of the scan in figures.

    Outputs
    -------
    - ``chi``: The map in ppm, NaN where not valid.
    - ``location``: Box of the nuclei, midplane and regions of the head.
    - ``dseg``, ``probseg``: Labels and probabilities on the grid of the map.
    - ``automatic``: Labels before the correction, if there is one.
    - ``stats``: Table with one row per nucleus.
    - ``figures``, ``map_figures``: Figures of the planes and of further maps.
    - ``standard``: Files in standard space, if asked for.
    - ``map_report``, ``segmentation_report``, ``measures_report``: Reports of the steps (JSON).
    """
    segmentation, reference = segmentation or SegmentationOptions(), reference or ReferenceRegion()
    if segmentation.output_space:
        parse_output_space(segmentation.output_space)
    find_ventricles = bool(segmentation.output_space) or (reference.region == "csf" and reference.masks is None)
    network: dict[str, Any] = {
        "model": segmentation.model or "default",
        "weights": segmentation.weights,
        "device": device,
        "n_threads": n_threads,
    }
    planned = {**MEMORY_GB, **mem_gb}
    if find_ventricles:  # by the network that segments
        planned["localize"] = max(planned["localize"], planned["segment"])
    inputs = identity_node("inputnode", _MAP_INPUTS)
    localize = step_node(LocalizeNuclei(), "localize", planned, n_threads, **network, find_ventricles=find_ventricles)
    prove = segmentation.prove or None
    segment = step_node(SegmentNuclei(), "segment", planned, n_threads, **network, prove=prove)
    measure = step_node(
        MeasureNuclei(),
        "measure",
        planned,
        reference=reference.region,
        needs_reference_mask=reference.masks is not None,
        bilateral=segmentation.bilateral,
        output_space=segmentation.output_space or None,
    )
    plot = step_node(PlotNuclei(), "plot", planned, viewer=segmentation.viewer)
    outputs = {
        localize: [("out_chi", "chi"), ("out_location", "location"), ("out_report", "map_report")],
        segment: [(f"out_{field}", field) for field in ("dseg", "probseg", "automatic")]
        + [("out_report", "segmentation_report")],
        measure: [(f"out_{field}", field) for field in ("stats", "map_figures", "standard")]
        + [("out_report", "measures_report")],
        plot: [("out_figures", "figures")],
    }
    outputnode = identity_node("outputnode", [field for fields in outputs.values() for _, field in fields])
    located, labels = [("out_chi", "in_chi"), ("out_location", "in_location")], [("out_dseg", "in_dseg")]
    measured = (
        "in_r2star in_changes reconstruction_report reference_mask in_lesion_masks in_maps map_names map_units age"
    ).split()
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputs, localize, same(("in_chi", "metadata", "in_session"))),
            (inputs, segment, [("in_chi", "in_source"), ("in_correction", "in_correction")]),
            (inputs, measure, same(measured)),
            (inputs, plot, same(("title", "in_lesion_masks"))),
            (localize, segment, located),
            (localize, measure, [*located, ("out_report", "map_report")]),
            (localize, plot, located[:1]),
            (segment, measure, [*labels, ("out_probseg_box", "in_probseg"), ("out_report", "segmentation_report")]),
            (segment, plot, [*labels, ("out_automatic", "in_automatic"), ("out_report", "segmentation_report")]),
            *((node, outputnode, fields) for node, fields in outputs.items()),
        ]
    )
    return workflow


def init_participant_wf(
    out_dir: Path | str,
    segmentation: SegmentationOptions | None = None,
    reference: ReferenceRegion | None = None,
    reconstruction: ReconstructionOptions | None = None,
    *,
    name: str = "participant_wf",
    device: str = "auto",
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
) -> Workflow:
    """Build the workflow of a scan from a map, or the echoes to reconstruct it from, to BIDS derivatives.

    Parameters
    ----------
    out_dir : path
        The derivative dataset, absolute.
    segmentation, reference, device, n_threads, mem_gb
        As those of `init_dgmseg_wf`.
    reconstruction : ReconstructionOptions, optional
        Reconstruct the map; by default it is an input.
    name : str

    Returns
    -------
    Workflow

    Raises
    ------
    InputError
        If an option is invalid.

    Inputs
    ------
    - ``in_chi``, ``metadata``, ``in_session``, ``in_correction``, ``in_r2star``, ``in_changes``,
      ``reconstruction_report``, ``reference_mask``, ``in_lesion_masks``, ``in_maps``, ``map_names``, ``map_units``,
      ``age``, ``title``: As the inputs of `init_dgmseg_wf`.
    - ``in_phase``, ``in_magnitude``, ``parts``, ``echo_times_s``, ``field_strength_t``, ``phase_units``,
      ``acquisition_type``, ``in_mask``: As the inputs of `init_reconstruct_wf`, if the map is reconstructed here.
    - ``in_fields``, ``in_reconstruction_figure``: Other outputs of `init_reconstruct_wf`, if that ran before.
    - ``entities``, ``provenance``: As the inputs of `bids_dgmseg.interfaces.SaveDerivatives`.

    Outputs
    -------
    - ``dseg``, ``probseg``, ``stats``: Labels, probabilities and table of the measures.
    - ``files``: The derivatives in the dataset.
    """
    check_absolute(out_dir)
    options: dict[str, Any] = {"n_threads": n_threads, "mem_gb": mem_gb}
    dgmseg = init_dgmseg_wf(segmentation, reference, device=device, **options)
    masks = (segmentation or SegmentationOptions()).masks
    save = step_node(SaveDerivatives(), "save", mem_gb, out_dir=out_dir, masks=masks)
    saved = ("entities", "provenance")
    fields = dict.fromkeys([*_MAP_INPUTS, *ECHO_INPUTS, *RECONSTRUCTED.values(), *saved])
    inputs, outputs = (
        identity_node("inputnode", fields),
        identity_node("outputnode", ("dseg", "probseg", "stats", "files")),
    )
    workflow = Workflow(name=name)
    source, renamed = inputs, {field: field for field in RECONSTRUCTED.values()}
    if reconstruction is not None:
        source = init_reconstruct_wf(reconstruction, **options)
        renamed = {field: f"outputnode.{output}" for output, field in RECONSTRUCTED.items()}
        inputs.inputs.metadata = dict(MAP_SIDECAR)
        workflow.connect([(inputs, source, [(field, f"inputnode.{field}") for field in ECHO_INPUTS])])
    same_inputs = [field for field in _MAP_INPUTS if field not in renamed]
    results = "location dseg automatic probseg stats figures map_figures standard".split()
    reports = "map_report segmentation_report measures_report".split()
    workflow.connect(
        [
            (inputs, dgmseg, [(field, f"inputnode.{field}") for field in same_inputs]),
            (source, dgmseg, [(out, f"inputnode.{field}") for field, out in renamed.items() if field in _MAP_INPUTS]),
            (source, save, [(out, field) for field, out in renamed.items() if field != "in_changes"]),
            (inputs, save, same(saved)),
            (dgmseg, save, [(f"outputnode.{field}", f"in_{field}") for field in results]),
            (dgmseg, save, [(f"outputnode.{field}", field) for field in reports]),
            (dgmseg, outputs, [(f"outputnode.{field}", field) for field in ("dseg", "probseg", "stats")]),
            (save, outputs, [("out_files", "files")]),
        ]
    )
    return workflow


def init_group_wf(name: str = "group_wf") -> Workflow:
    """Build the workflow of the group level, from results of many scans to group tables and a page.

    Its ``inputnode`` has the inputs of `AnalyseGroup`, its ``outputnode`` the outputs.
    """
    analyse = Node(AnalyseGroup(), name="analyse")
    inputs, outputs = analyse.inputs.copyable_trait_names(), list(analyse.outputs.copyable_trait_names())
    inputnode, outputnode = identity_node("inputnode", inputs), identity_node("outputnode", outputs)
    workflow = Workflow(name=name)
    workflow.connect([(inputnode, analyse, same(inputs)), (analyse, outputnode, same(outputs))])
    return workflow


def identity_node(name: str, fields: Iterable[str]) -> Node:
    """Return a node that passes fields on, set or not."""
    return Node(IdentityInterface(fields=list(fields), mandatory_inputs=False), name=name)


def step_node(
    interface: BaseInterface, name: str, mem_gb: Mapping[str, float], n_procs: int = 1, **inputs: Any
) -> StepNode:
    """Return the node of a step; inputs that are None are not set. `ValueError` if `mem_gb` has other names."""
    if unknown := sorted(mem_gb.keys() - MEMORY_GB.keys()):
        raise ValueError(f"mem_gb: no step {', '.join(unknown)}; choose from {', '.join(MEMORY_GB)}")
    values = {key: str(value) if isinstance(value, Path) else value for key, value in inputs.items()}
    interface.inputs.trait_set(**{key: value for key, value in values.items() if value is not None})
    return StepNode(interface, name=name, n_procs=n_procs, mem_gb=mem_gb.get(name, MEMORY_GB[name]))


def same(fields: Iterable[str]) -> list[tuple[str, str]]:
    """Return the connections between fields of the same names."""
    return [(field, field) for field in fields]
