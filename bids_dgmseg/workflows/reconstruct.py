"""Workflow that reconstructs a chi map from gradient echoes."""

from __future__ import annotations

from collections.abc import Mapping

from nipype import Workflow

from bids_dgmseg.interfaces.maps import ReconstructQSM
from bids_dgmseg.workflows.steps import MEMORY_GB, identity_node, step_node


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
    background : {"auto", "pdf", "vsharp"}
        Method of background field removal.
    inversion : {"star", "medi", "ilsqr"}
        Method of dipole inversion.
    unwrapping : {"region-growing", "laplacian"}
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
    - ``report``, ``warnings``, ``n_failed_checks``: As the outputs of
      `bids_dgmseg.interfaces.ReconstructQSM`.
    """
    fields = "in_phase in_magnitude parts echo_times_s field_strength_t phase_units in_mask title"
    inputs = identity_node("inputnode", fields)
    outputs = identity_node("outputnode", "chi r2star figure fields report warnings n_failed_checks")
    reconstruct = step_node(
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
    results += [(field, field) for field in ("report", "warnings", "n_failed_checks")]
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputs, reconstruct, [(field, field) for field in fields.split()]),
            (reconstruct, outputs, results),
        ]
    )
    return workflow
