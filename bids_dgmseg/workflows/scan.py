"""Workflows of one scan: reconstruction, segmentation and measures, derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype import Workflow
from nipype.interfaces.base import BaseInterface
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node

from bids_dgmseg.bids.derivatives import MAP_SIDECAR
from bids_dgmseg.interfaces.base import StepNode
from bids_dgmseg.interfaces.corrections import CorrectLabels
from bids_dgmseg.interfaces.derivatives import SaveDerivatives
from bids_dgmseg.interfaces.labels import LocalizeNuclei, SegmentNuclei
from bids_dgmseg.interfaces.maps import ConformChi, ReconstructQSM
from bids_dgmseg.interfaces.measures import MeasureNuclei, PlotNuclei
from bids_dgmseg.interfaces.normalization import NormalizeToMNI

STEPS = ("reconstruct", "conform", "localize", "segment", "correct", "measure", "plot", "normalize", "save")
"""Names of the nodes in the order of the data; only scans with echoes have the first, only those with a manual
correction ``correct``, and only those that are carried to standard space ``normalize``."""

MEMORY_GB: Mapping[str, float] = {
    "reconstruct": 4.0,
    "conform": 1.0,
    "localize": 1.5,
    "segment": 2.0,
    "correct": 1.0,
    "measure": 1.5,
    "plot": 1.5,
    "normalize": 2.0,
    "save": 1.0,
}
"""Memory planned for each step, for images of at most 256 voxels along each axis."""


def init_dgmseg_wf(
    *,
    name: str = "dgmseg_wf",
    model: str = "default",
    weights: Path | str | None = None,
    label_map: Path | str | None = None,
    device: str = "auto",
    ensemble: bool = False,
    find_midplane: bool = False,
    corrected: bool = False,
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
        Average over mirror images and all checkpoints of the weights.
    find_midplane : bool
        Also find the plane between the hemispheres.
    corrected : bool
        Whether labels are replaced by those of a manual correction, ``in_correction``.
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
    - ``in_r2star``: R2* in 1/s on the grid of the map; optional.
    - ``reference_mask``: Mask of cerebrospinal fluid for ``reference="csf"``; optional.
    - ``in_correction``: Corrected labels on the grid of the map, only with `corrected`.
    - ``n_failed_checks``: Number of plausibility checks that a reconstructed map failed; optional.
    - ``title``: Name of the scan in figures.

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
    - ``input_report``, ``input_warnings``, ``segmentation_report``, ``segmentation_warnings``, ``measures_report``,
      ``measures_warnings``: What the steps say about the map.
    - ``source_hash``: Hash of the content of `in_chi`.
    """
    inputs = _identity("inputnode", "in_chi metadata in_r2star in_correction reference_mask n_failed_checks title")
    outputs = _identity(
        "outputnode",
        "chi dseg probseg probseg_box labels detected box regions head_labels midplane stats rating figures "
        "input_report input_warnings segmentation_report segmentation_warnings measures_report measures_warnings "
        "source_hash" + " automatic correction_report correction_warnings" * corrected,
    )
    network = {"model": model, "weights": weights, "label_map": label_map, "device": device, "n_threads": n_threads}
    conform = _step(ConformChi(), "conform", mem_gb)
    localize = _step(LocalizeNuclei(), "localize", mem_gb, n_threads, **network, find_midplane=find_midplane)
    segment = _step(SegmentNuclei(), "segment", mem_gb, n_threads, **network, ensemble=ensemble)
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputs, conform, [("in_chi", "in_chi"), ("metadata", "metadata")]),
            (inputs, segment, [("in_chi", "in_source")]),
            (conform, localize, [("out_chi", "in_chi")]),
            (conform, segment, [("out_chi", "in_chi")]),
            (localize, segment, [("out_box", "in_box"), ("midplane", "in_midplane")]),
            (conform, outputs, [("out_chi", "chi"), ("source_hash", "source_hash"), *_reports("input")]),
            (
                localize,
                outputs,
                [
                    ("out_box", "box"),
                    ("out_regions", "regions"),
                    ("out_head_labels", "head_labels"),
                    ("midplane", "midplane"),
                ],
            ),
            (
                segment,
                outputs,
                [
                    ("out_dseg", "automatic" if corrected else "dseg"),
                    ("out_probseg", "probseg"),
                    ("out_probseg_box", "probseg_box"),
                    ("labels", "labels"),
                    ("detected", "detected"),
                    *_reports("segmentation"),
                ],
            ),
        ]
    )
    labels_from = segment
    if corrected:
        labels_from = correct = _step(CorrectLabels(), "correct", mem_gb, model=model)
        workflow.connect(
            [
                (segment, correct, [("out_dseg", "in_dseg"), ("labels", "labels")]),
                (inputs, correct, [("in_correction", "in_correction")]),
                (correct, outputs, [("out_dseg", "dseg"), *_reports("correction")]),
            ]
        )
    if measures:
        measure = _step(
            MeasureNuclei(),
            "measure",
            mem_gb,
            model=model,
            reference=reference,
            reference_structure=reference_structure,
            needs_reference_mask=needs_reference_mask,
            bilateral=bilateral,
        )
        workflow.connect(
            [
                (conform, measure, [("out_chi", "in_chi"), ("reference", "map_reference")]),
                (localize, measure, [("out_box", "in_box"), ("out_regions", "in_regions")]),
                (labels_from, measure, [("out_dseg", "in_dseg")]),
                (segment, measure, [(one, one) for one in ("labels", "detected")]),
                (segment, measure, [("out_probseg_box", "in_probseg")]),
                (inputs, measure, [(field, field) for field in ("in_r2star", "reference_mask", "n_failed_checks")]),
                (measure, outputs, [("out_stats", "stats"), ("rating", "rating"), *_reports("measures")]),
            ]
        )
        if corrected:
            workflow.connect(correct, "edited", measure, "edited")
    if figures:
        plot = _step(PlotNuclei(), "plot", mem_gb, model=model, viewer=viewer)
        workflow.connect(
            [
                (conform, plot, [("out_chi", "in_chi")]),
                (labels_from, plot, [("out_dseg", "in_dseg")]),
                (segment, plot, [("labels", "labels")]),
                (inputs, plot, [("title", "title")]),
                (plot, outputs, [("out_figures", "figures")]),
            ]
        )
        if corrected:
            workflow.connect(segment, "out_dseg", plot, "in_automatic")
    return workflow


def init_reconstruct_wf(
    *,
    name: str = "reconstruct_wf",
    phase_sign: str = "auto",
    background: str = "auto",
    inversion: str = "star",
    unwrapping: str = "region-growing",
    regularization: float | None = None,
    erosion_mm: float | None = None,
    save_fields: bool = False,
    accept_implausible: bool = False,
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
) -> Workflow:
    """Build the workflow that reconstructs a chi map from gradient echoes.

    Parameters
    ----------
    name : str
    phase_sign : {"auto", "positive", "negative"}
        Whether phase increases (positive) or decreases with the field.
    background : {"auto", "pdf", "vsharp", "lbv"}
        Method of background field removal.
    inversion : {"star", "tv", "medi", "ilsqr", "tkd"}
        Method of dipole inversion.
    unwrapping : {"region-growing", "best-path", "laplacian"}
        Method of phase unwrapping.
    regularization : float, optional
        Weight of the inversion; by default from the noise of the field.
    erosion_mm : float, optional
        Depth below the border of the brain from which the map has values; by default by the background.
    save_fields : bool
        Return the brain mask, the total and the local field.
    accept_implausible : bool
        Return a map that fails the plausibility checks.
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
      ``in_mask``, ``title``: As the inputs of `bids_dgmseg.interfaces.ReconstructQSM`.

    Outputs
    -------
    - ``chi``, ``r2star``, ``figure``: Map in ppm, R2* in 1/s (not with a single echo), PNG of the steps.
    - ``fields``: Brain mask, total and local field, if `save_fields`.
    - ``report``, ``warnings``, ``n_failed_checks``, ``source_hash``: As the outputs of
      `bids_dgmseg.interfaces.ReconstructQSM`.
    """
    fields = "in_phase in_magnitude parts echo_times_s field_strength_t phase_units in_mask title"
    inputs = _identity("inputnode", fields)
    outputs = _identity("outputnode", "chi r2star figure fields report warnings n_failed_checks source_hash")
    reconstruct = _step(
        ReconstructQSM(),
        "reconstruct",
        mem_gb,
        n_threads,
        phase_sign=phase_sign,
        background=background,
        inversion=inversion,
        unwrapping=unwrapping,
        regularization=regularization,
        erosion_mm=erosion_mm,
        save_fields=save_fields,
        accept_implausible=accept_implausible,
        n_threads=n_threads,
    )
    results = [("out_chi", "chi"), ("out_r2star", "r2star"), ("out_figure", "figure"), ("out_fields", "fields")]
    results += [(field, field) for field in ("report", "warnings", "n_failed_checks", "source_hash")]
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputs, reconstruct, [(field, field) for field in fields.split()]),
            (reconstruct, outputs, results),
        ]
    )
    return workflow


def init_participant_wf(
    out_dir: Path | str,
    *,
    name: str = "participant_wf",
    from_echoes: bool = False,
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
        Options of `init_dgmseg_wf`.

    Returns
    -------
    Workflow

    Inputs
    ------
    - ``in_chi``, ``metadata``, ``in_correction``, ``reference_mask``, ``title``: As the inputs of `init_dgmseg_wf`;
      with echoes, neither `in_chi` nor `metadata`.
    - ``in_phase``, ``in_magnitude``, ``parts``, ``echo_times_s``, ``field_strength_t``, ``phase_units``,
      ``in_mask``: As the inputs of `init_reconstruct_wf`, only with echoes.
    - ``entities``, ``sources``, ``source_file``, ``scanner``, ``settings``, ``settings_hash``,
      ``map_settings_hash``: As the inputs of `bids_dgmseg.interfaces.SaveDerivatives`; all but the first are
      optional.

    Outputs
    -------
    - ``dseg``, ``probseg``, ``stats``: Labels, probabilities and table of the measures.
    - ``files``: The derivatives in the dataset.
    """
    map_fields = f"{'' if from_echoes else 'metadata '}in_correction reference_mask title"
    saved = "entities sources source_file scanner settings settings_hash map_settings_hash"
    echo_fields = "in_phase in_magnitude parts echo_times_s field_strength_t phase_units in_mask"
    inputs = _identity("inputnode", f"{echo_fields if from_echoes else 'in_chi'} {map_fields} {saved}")
    outputs = _identity("outputnode", "dseg probseg stats files")
    dgmseg = init_dgmseg_wf(n_threads=n_threads, mem_gb=mem_gb, **options)
    save = _step(SaveDerivatives(), "save", mem_gb, out_dir=out_dir, model=options.get("model", "default"), masks=masks)
    workflow = Workflow(name=name)
    reports = [f"{part}_{kind}" for part in ("input", "segmentation", "measures") for kind in _KINDS]
    workflow.connect(
        [
            (inputs, dgmseg, [(field, f"inputnode.{field}") for field in map_fields.split()]),
            (inputs, save, [(field, field) for field in saved.split()]),
            (
                dgmseg,
                save,
                [
                    *(
                        (f"outputnode.{field}", f"in_{field}")
                        for field in ("dseg", "probseg", "stats", "box", "regions")
                    ),
                    *((f"outputnode.{field}", field) for field in ("labels", *reports)),
                    ("outputnode.figures", "in_figures"),
                ],
            ),
            (dgmseg, outputs, [(f"outputnode.{field}", field) for field in ("dseg", "probseg", "stats")]),
            (save, outputs, [("out_files", "files")]),
        ]
    )
    if options.get("corrected"):
        to_save = {"automatic": "in_automatic"} | {f"correction_{kind}": f"correction_{kind}" for kind in _KINDS}
        workflow.connect([(dgmseg, save, [(f"outputnode.{field}", to) for field, to in to_save.items()])])
    if output_space:
        normalize = _step(NormalizeToMNI(), "normalize", mem_gb, output_space=output_space)
        save.inputs.output_space = output_space
        workflow.connect(
            [
                (
                    dgmseg,
                    normalize,
                    [
                        ("outputnode.chi", "in_chi"),
                        ("outputnode.dseg", "in_dseg"),
                        ("outputnode.probseg_box", "in_probseg"),
                        ("outputnode.regions", "in_regions"),
                    ],
                ),
                (normalize, save, [("out_files", "in_standard"), *_reports("normalization")]),
            ]
        )
    if not from_echoes:
        workflow.connect(inputs, "in_chi", dgmseg, "inputnode.in_chi")
        workflow.connect(dgmseg, "outputnode.source_hash", save, "source_hash")
        return workflow
    dgmseg.inputs.inputnode.metadata = dict(MAP_SIDECAR)
    reconstruct = init_reconstruct_wf(n_threads=n_threads, mem_gb=mem_gb, **(reconstruction or {}))
    to_dgmseg = {"chi": "in_chi", "r2star": "in_r2star", "n_failed_checks": "n_failed_checks"}
    to_save = {
        "chi": "in_chi",
        "r2star": "in_r2star",
        "figure": "in_reconstruction_figure",
        "fields": "in_fields",
        "report": "reconstruction_report",
        "warnings": "reconstruction_warnings",
        "source_hash": "source_hash",
    }
    workflow.connect(
        [
            (inputs, reconstruct, [(field, f"inputnode.{field}") for field in (*echo_fields.split(), "title")]),
            (reconstruct, dgmseg, [(f"outputnode.{out}", f"inputnode.{field}") for out, field in to_dgmseg.items()]),
            (reconstruct, save, [(f"outputnode.{out}", field) for out, field in to_save.items()]),
        ]
    )
    return workflow


def _identity(name: str, fields: str) -> Node:
    """Return a node that passes fields on, set or not."""
    return Node(IdentityInterface(fields=fields.split(), mandatory_inputs=False), name=name)


def _step(
    interface: BaseInterface, name: str, mem_gb: Mapping[str, float], n_procs: int = 1, **inputs: Any
) -> StepNode:
    """Return the node of a step; inputs that are None are not set."""
    interface.inputs.trait_set(
        **{key: str(value) if isinstance(value, Path) else value for key, value in inputs.items() if value is not None}
    )
    return StepNode(interface, name=name, n_procs=n_procs, mem_gb=mem_gb.get(name, MEMORY_GB[name]))


_KINDS = ("report", "warnings")


def _reports(part: str) -> list[tuple[str, str]]:
    return [(kind, f"{part}_{kind}") for kind in _KINDS]
