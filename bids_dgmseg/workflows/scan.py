"""Workflows of one scan: reconstruction, segmentation and measures, derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nipype import Node, Workflow

from bids_dgmseg.bids.derivatives import MAP_SIDECAR
from bids_dgmseg.config import parse_output_space
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.base import StepNode, check_absolute
from bids_dgmseg.interfaces.corrections import CorrectLabels
from bids_dgmseg.interfaces.derivatives import SaveDerivatives
from bids_dgmseg.interfaces.labels import LocalizeNuclei, SegmentNuclei
from bids_dgmseg.interfaces.maps import ConformChi
from bids_dgmseg.interfaces.measures import MeasureNuclei, PlotNuclei
from bids_dgmseg.interfaces.normalization import NormalizeToMNI
from bids_dgmseg.interfaces.session_maps import SampleMaps
from bids_dgmseg.workflows.reconstruct import init_reconstruct_wf
from bids_dgmseg.workflows.steps import KINDS, MEMORY_GB, OpenWorkflow, fields_of, identity_node, reports, step_node

RECONSTRUCTED = "chi r2star n_failed_checks figure fields report warnings"
"""Outputs of a reconstruction that labels, measures and derivatives depend on."""


def init_dgmseg_wf(
    *,
    name: str = "dgmseg_wf",
    model: str = "default",
    weights: Path | str | None = None,
    label_map: Path | str | None = None,
    device: str = "auto",
    ensemble: bool = False,
    find_midplane: bool = False,
    find_ventricles: bool = False,
    corrected: bool = False,
    sampled: bool = False,
    longitudinal: bool = False,
    measures: bool = True,
    reference: str = "none",
    reference_structure: str | None = None,
    needs_reference_mask: bool = False,
    bilateral: bool = False,
    figures: bool = True,
    viewer: bool = False,
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
) -> Workflow:
    """Build the workflow that labels and measures the nuclei of a chi map.

    An input exists only with the option that uses it; without, setting or connecting it is an error.

    Parameters
    ----------
    name : str
    model : str
        One of `bids_dgmseg.list_models`.
    weights, label_map : path, optional
        Folder with other weights than the model's own; table that maps the labels of an nnU-Net folder to nuclei.
    device : {"auto", "cpu", "cuda", "mps"}
        Where the networks run.
    ensemble : bool
        Average over each map and its mirror image, which dgm16 and dgm24 always do.
    find_midplane : bool
        Also find the plane between the hemispheres.
    find_ventricles : bool
        Also find the lateral ventricles, as for the reference ``csf`` without `needs_reference_mask`.
    corrected : bool
        Whether labels are replaced by those of a manual correction, ``in_correction``.
    sampled : bool
        Whether further maps, ``in_maps``, are measured in the nuclei.
    longitudinal : bool
        Whether the map is labelled in the mid-space of the participant's sessions, ``in_space``.
    measures, figures : bool
        Whether to measure the nuclei, and to draw them.
    reference : {"none", "whole-brain", "csf", "structure"}
        Region whose mean susceptibility is subtracted.
    reference_structure : str, optional
        Nucleus for the reference structure, such as ``CN`` or ``CN_L``.
    needs_reference_mask : bool
        Whether the reference is n/a without ``reference_mask``.
    bilateral : bool
        Add a bilateral row (left and right combined) per nucleus.
    viewer : bool
        Also write an interactive viewer.
    n_threads : int
        Threads of the networks.
    mem_gb : mapping of str to float
        Memory in GB planned for each step.

    Returns
    -------
    Workflow

    Inputs
    ------
    - ``in_chi``: Susceptibility map in ppm or ppb, in any orientation.
    - ``metadata``: Dict, such as ``{"Units": "ppm"}``; by default the JSON file next to the map.
    - ``in_r2star``: R2* in 1/s on the grid of the map; optional, only with `measures`.
    - ``reference_mask``: Mask of cerebrospinal fluid; optional, only with `measures` and ``reference="csf"``.
    - ``in_correction``: Corrected labels on the grid of the map, only with `corrected`.
    - ``in_maps``, ``map_names``, ``map_units``: Further maps, their names in columns, and their units, only with
      `measures` and `sampled`.
    - ``in_space``: One of ``out_spaces`` of `bids_dgmseg.interfaces.AlignSessions`, only with `longitudinal`.
    - ``in_exclude``: Masks of voxels that are not measured; optional, only with `measures` or `figures`.
    - ``n_failed_checks``: Number of plausibility checks that a reconstructed map failed; optional, only with
      `measures`.
    - ``title``: Name of the scan in figures, only with `figures`.

    Outputs
    -------
    - ``chi``: The map in ppm, NaN where not valid.
    - ``dseg``, ``probseg``, ``probseg_box``: Labels and probabilities on the grid of the map; the last only inside
      the box.
    - ``labels``, ``detected``: Nuclei in the order of the probabilities; those that the network found.
    - ``box``, ``regions``, ``head_labels``, ``midplane``: Results of the localizer.
    - ``stats``, ``rating``: Table with one row per nucleus; rating of the scan.
    - ``figures``: Plane → PNG, viewer → HTML.
    - ``automatic``, ``correction_report``, ``correction_warnings``: With `corrected`, the labels before the correction,
      and what it changed.
    - ``map_figures``, ``sampling_report``, ``sampling_warnings``: With `sampled`, name of each map → PNG, what was
      measured and refused.
    - ``input_report``, ``input_warnings``, ``segmentation_report``, ``segmentation_warnings``, ``measures_report``,
      ``measures_warnings``: What the steps say about the map.
    """
    inputs = identity_node(
        "inputnode",
        "in_chi metadata"
        + " in_r2star n_failed_checks" * measures
        + " reference_mask" * (measures and reference == "csf")
        + " in_maps map_names map_units" * (measures and sampled)
        + " in_correction" * corrected
        + " in_space" * longitudinal
        + " in_exclude" * (measures or figures)
        + " title" * figures,
    )
    outputs = identity_node(
        "outputnode",
        "chi dseg probseg probseg_box labels detected box regions head_labels midplane stats rating figures "
        "input_report input_warnings segmentation_report segmentation_warnings measures_report measures_warnings "
        "source_hash"
        + " automatic correction_report correction_warnings" * corrected
        + " map_figures sampling_report sampling_warnings" * (sampled and measures),
    )
    find_ventricles |= measures and reference == "csf" and not needs_reference_mask
    network = {"model": model, "weights": weights, "label_map": label_map, "device": device, "n_threads": n_threads}
    nodes = _Nodes(
        OpenWorkflow(name=name),
        inputs,
        outputs,
        conform=step_node(ConformChi(), "conform", mem_gb),
        localize=step_node(
            LocalizeNuclei(),
            "localize",
            {**mem_gb, "localize": mem_gb.get("segment", MEMORY_GB["segment"])} if find_ventricles else mem_gb,
            n_threads,
            **network,
            find_midplane=find_midplane,
            find_ventricles=find_ventricles,
        ),
        segment=step_node(
            SegmentNuclei(), "segment", mem_gb, n_threads, **network, ensemble=ensemble, needs_space=longitudinal
        ),
        correct=step_node(CorrectLabels(), "correct", mem_gb, model=model) if corrected else None,
    )
    _connect_labelling(nodes)
    if longitudinal:
        nodes.workflow.connect(inputs, "in_space", nodes.segment, "in_space")
    if nodes.correct:
        _connect_correction(nodes, nodes.correct)
    if measures:
        measure = step_node(
            MeasureNuclei(),
            "measure",
            mem_gb,
            model=model,
            reference=reference,
            reference_structure=reference_structure,
            needs_reference_mask=needs_reference_mask,
            bilateral=bilateral,
        )
        _connect_measures(nodes, measure)
        if longitudinal:
            nodes.workflow.connect(inputs, "in_space", measure, "in_space")
        stats_from = measure
        if sampled:
            stats_from = step_node(SampleMaps(), "sample", mem_gb, model=model, bilateral=bilateral, figures=figures)
            _connect_maps(nodes, measure, stats_from)
        nodes.workflow.connect(stats_from, "out_stats", outputs, "stats")
    if figures:
        _connect_figures(nodes, step_node(PlotNuclei(), "plot", mem_gb, model=model, viewer=viewer))
    return nodes.workflow


@dataclass(frozen=True)
class _Nodes:
    """Workflow of a map, with the nodes from which others get their inputs."""

    workflow: Workflow
    inputs: Node
    outputs: Node
    conform: StepNode
    localize: StepNode
    segment: StepNode
    correct: StepNode | None
    """Manual correction, if there is one."""

    @property
    def labels_from(self) -> StepNode:
        """Return the node with the final labels."""
        return self.correct or self.segment


def _connect_labelling(nodes: _Nodes) -> None:
    """Connect the steps from the map to labels and probabilities."""
    conform, localize, segment = nodes.conform, nodes.localize, nodes.segment
    located = [("out_box", "box"), ("out_regions", "regions"), ("out_head_labels", "head_labels")]
    labelled = [("out_dseg", "automatic" if nodes.correct else "dseg"), ("out_probseg", "probseg")]
    labelled += [("out_probseg_box", "probseg_box"), ("labels", "labels"), ("detected", "detected")]
    nodes.workflow.connect(
        [
            (nodes.inputs, conform, [("in_chi", "in_chi"), ("metadata", "metadata")]),
            (nodes.inputs, segment, [("in_chi", "in_source")]),
            (conform, localize, [("out_chi", "in_chi")]),
            (conform, segment, [("out_chi", "in_chi")]),
            (localize, segment, [("out_box", "in_box"), ("midplane", "in_midplane")]),
            (conform, nodes.outputs, [("out_chi", "chi"), *reports("input")]),
            (localize, nodes.outputs, [*located, ("midplane", "midplane")]),
            (segment, nodes.outputs, [*labelled, *reports("segmentation")]),
        ]
    )


def _connect_correction(nodes: _Nodes, correct: StepNode) -> None:
    """Replace the labels by corrected ones."""
    nodes.workflow.connect(
        [
            (nodes.segment, correct, [("out_dseg", "in_dseg"), ("labels", "labels")]),
            (nodes.inputs, correct, [("in_correction", "in_correction")]),
            (correct, nodes.outputs, [("out_dseg", "dseg"), *reports("correction")]),
        ]
    )


def _connect_measures(nodes: _Nodes, measure: StepNode) -> None:
    """Measure the nuclei in the map and, if there is one, R2*."""
    provided = {"in_r2star", "reference_mask", "in_exclude", "n_failed_checks"}.intersection(fields_of(nodes.inputs))
    segmented = [("labels", "labels"), ("detected", "detected"), ("out_probseg_box", "in_probseg")]
    nodes.workflow.connect(
        [
            (nodes.conform, measure, [("out_chi", "in_chi"), ("reference", "map_reference")]),
            (nodes.localize, measure, [("out_box", "in_box"), ("out_regions", "in_regions")]),
            (nodes.labels_from, measure, [("out_dseg", "in_dseg")]),
            (nodes.segment, measure, segmented),
            (nodes.inputs, measure, [(field, field) for field in sorted(provided)]),
            (measure, nodes.outputs, [("rating", "rating"), *reports("measures")]),
        ]
    )
    if nodes.correct:
        nodes.workflow.connect(nodes.correct, "edited", measure, "edited")


def _connect_maps(nodes: _Nodes, measure: StepNode, sample: StepNode) -> None:
    """Add columns of further maps to the measures."""
    maps = [("in_maps", "in_maps"), ("map_names", "names"), ("map_units", "units"), ("in_exclude", "in_exclude")]
    nodes.workflow.connect(
        [
            (nodes.conform, sample, [("out_chi", "in_chi")]),
            (nodes.localize, sample, [("out_regions", "in_regions")]),
            (nodes.labels_from, sample, [("out_dseg", "in_dseg")]),
            (nodes.segment, sample, [("labels", "labels")]),
            (measure, sample, [("out_stats", "in_stats")]),
            (nodes.inputs, sample, maps),
            (sample, nodes.outputs, [("out_figures", "map_figures"), *reports("sampling")]),
        ]
    )


def _connect_figures(nodes: _Nodes, plot: StepNode) -> None:
    """Draw the labels on the map, with those before a correction."""
    nodes.workflow.connect(
        [
            (nodes.conform, plot, [("out_chi", "in_chi")]),
            (nodes.labels_from, plot, [("out_dseg", "in_dseg")]),
            (nodes.segment, plot, [("labels", "labels")]),
            (nodes.inputs, plot, [("title", "title"), ("in_exclude", "in_exclude")]),
            (plot, nodes.outputs, [("out_figures", "figures")]),
        ]
    )
    if nodes.correct:
        nodes.workflow.connect(nodes.segment, "out_dseg", plot, "in_automatic")


def init_participant_wf(
    out_dir: Path | str,
    *,
    name: str = "participant_wf",
    from_echoes: bool = False,
    reconstructed: bool = False,
    masks: bool = True,
    reconstruction: Mapping[str, Any] | None = None,
    output_space: str = "",
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
    **options: Any,
) -> Workflow:
    """Build the workflow of a scan from a map, or the echoes to reconstruct it from, to BIDS derivatives.

    Parameters
    ----------
    out_dir : path
        The derivative dataset, absolute.
    name : str
    from_echoes : bool
        Whether the map is reconstructed.
    reconstructed : bool
        Whether that is done by another workflow (`init_reconstruct_wf`), whose outputs are connected to the node
        ``reconstructed``: ``chi``, ``r2star``, ``n_failed_checks``, ``figure``, ``fields``, ``report``, ``warnings``
        and ``source_hash``.
    masks : bool
        Write one binary mask per nucleus and hemisphere, and per region.
    reconstruction : mapping, optional
        Options of `init_reconstruct_wf`.
    output_space : str
        Standard space to resample to, such as ``MNI152NLin2009cAsym:res-2``; by default none.
    n_threads : int
        Threads of networks and Fourier transforms.
    mem_gb : mapping of str to float
        Memory in GB planned for each step.
    **options
        Options of `init_dgmseg_wf`; derivatives include the measures.

    Returns
    -------
    Workflow

    Raises
    ------
    InputError
        If an option is invalid, or the nuclei are not measured.

    Inputs
    ------
    - ``in_chi``, ``metadata``, ``in_correction``, ``reference_mask``, ``in_exclude``, ``in_maps``, ``map_names``,
      ``map_units``, ``in_space``, ``title``: As the inputs of `init_dgmseg_wf`, with the same options; with echoes,
      neither `in_chi` nor `metadata`.
    - ``in_phase``, ``in_magnitude``, ``parts``, ``echo_times_s``, ``field_strength_t``, ``phase_units``,
      ``in_mask``: As the inputs of `init_reconstruct_wf`, only with echoes that are reconstructed here.
    - ``entities``, ``sources``, ``source_file``, ``scanner``, ``settings``, ``made_from``: As the inputs of
      `bids_dgmseg.interfaces.SaveDerivatives`; all but the first are optional.

    Outputs
    -------
    - ``dseg``, ``probseg``, ``stats``: Labels, probabilities and table of the measures.
    - ``files``: The derivatives in the dataset.
    """
    check_absolute(out_dir)
    if not options.get("measures", True):
        raise InputError("`measures`: derivatives include them; for labels alone use init_dgmseg_wf")
    if output_space:
        parse_output_space(output_space)
        options["find_ventricles"] = True
    dgmseg = init_dgmseg_wf(n_threads=n_threads, mem_gb=mem_gb, **options)
    not_given = {"in_r2star", "n_failed_checks", *(("in_chi", "metadata") if from_echoes else ())}
    map_fields = [field for field in fields_of(dgmseg.get_node("inputnode")) if field not in not_given]
    saved = "entities sources source_file scanner settings made_from"
    echo_fields = "in_phase in_magnitude parts echo_times_s field_strength_t phase_units in_mask"
    image_fields = f"{echo_fields} title" if from_echoes and not reconstructed else ""
    inputs = identity_node("inputnode", f"{image_fields} {' '.join(map_fields)} {saved}")
    outputs = identity_node("outputnode", "dseg probseg stats files")
    save = step_node(
        SaveDerivatives(), "save", mem_gb, out_dir=out_dir, model=options.get("model", "default"), masks=masks
    )
    workflow = OpenWorkflow(name=name)
    workflow.connect(
        [
            (inputs, dgmseg, [(field, f"inputnode.{field}") for field in map_fields]),
            (inputs, save, [(field, field) for field in saved.split()]),
            (dgmseg, save, _results_to_save(options)),
            (dgmseg, outputs, [(f"outputnode.{field}", field) for field in ("dseg", "probseg", "stats")]),
            (save, outputs, [("out_files", "files")]),
        ]
    )
    if output_space:
        normalize = step_node(NormalizeToMNI(), "normalize", mem_gb, output_space=output_space)
        save.inputs.output_space = output_space
        _connect_standard_space(workflow, dgmseg, normalize, save)
    if from_echoes and reconstructed:
        _connect_reconstruction(workflow, identity_node("reconstructed", RECONSTRUCTED), dgmseg, save)
    elif from_echoes:
        reconstruct = init_reconstruct_wf(n_threads=n_threads, mem_gb=mem_gb, **(reconstruction or {}))
        fields = [(field, f"inputnode.{field}") for field in (*echo_fields.split(), "title")]
        workflow.connect([(inputs, reconstruct, fields)])
        _connect_reconstruction(workflow, reconstruct, dgmseg, save, prefix="outputnode.")
    return workflow


def _results_to_save(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the connections from the workflow of a map with these options to the node that saves its results."""
    parts = ["input", "segmentation", "measures", *(["correction"] if options.get("corrected") else [])]
    parts += ["sampling"] if options.get("sampled") else []
    renamed = {field: f"in_{field}" for field in ("dseg", "probseg", "stats", "box", "regions", "figures")}
    renamed |= {"automatic": "in_automatic"} if options.get("corrected") else {}
    renamed |= {"map_figures": "in_map_figures"} if options.get("sampled") else {}
    same = ["labels", *(f"{part}_{kind}" for part in parts for kind in KINDS)]
    return [(f"outputnode.{field}", to) for field, to in (*renamed.items(), *zip(same, same, strict=True))]


def _connect_standard_space(workflow: Workflow, dgmseg: Workflow, normalize: StepNode, save: StepNode) -> None:
    """Resample the results of a map to standard space, and save them."""
    fields = {"chi": "in_chi", "dseg": "in_dseg", "probseg_box": "in_probseg", "regions": "in_regions"}
    workflow.connect(
        [
            (dgmseg, normalize, [(f"outputnode.{out}", field) for out, field in fields.items()]),
            (normalize, save, [("out_files", "in_standard"), *reports("normalization")]),
        ]
    )


def _connect_reconstruction(
    workflow: Workflow, made: Workflow | Node, dgmseg: Workflow, save: StepNode, *, prefix: str = ""
) -> None:
    """Label the map that a workflow or node reconstructs, and save it; `prefix` precedes the names of its outputs."""
    dgmseg.inputs.inputnode.metadata = dict(MAP_SIDECAR)
    to_dgmseg = {"chi": "in_chi", "r2star": "in_r2star", "n_failed_checks": "n_failed_checks"}
    to_save = {
        "chi": "in_chi",
        "r2star": "in_r2star",
        "figure": "in_reconstruction_figure",
        "fields": "in_fields",
        "report": "reconstruction_report",
        "warnings": "reconstruction_warnings",
    }
    workflow.connect(
        [
            (made, dgmseg, [(f"{prefix}{out}", f"inputnode.{field}") for out, field in to_dgmseg.items()]),
            (made, save, [(f"{prefix}{out}", field) for out, field in to_save.items()]),
        ]
    )
