"""Workflow of the sessions of a participant that are labelled together: aligned once for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nipype import Workflow
from nipype.interfaces.utility import Merge

from bids_dgmseg.interfaces.labels import AlignSessions
from bids_dgmseg.workflows.scan import RECONSTRUCTED
from bids_dgmseg.workflows.steps import MEMORY_GB, step_node


def init_sessions_wf(
    maps: Mapping[str, Path | str | Workflow],
    scans: Mapping[str, Workflow],
    *,
    metadata: Sequence[Mapping[str, Any]],
    name: str = "sessions_wf",
    model: str = "default",
    weights: Path | str | None = None,
    label_map: Path | str | None = None,
    device: str = "auto",
    n_threads: int = 1,
    mem_gb: Mapping[str, float] = MEMORY_GB,
) -> Workflow:
    """Build the workflow that aligns the sessions of a participant, and labels each in their mid-space.

    Parameters
    ----------
    maps : mapping of str to path or Workflow
        Name of each session → its map, or the workflow that reconstructs it (`init_reconstruct_wf`); at least two.
    scans : mapping of str to Workflow
        Name of each session to be labelled → its workflow (`init_participant_wf` with ``longitudinal=True``, and with
        ``from_echoes`` and ``reconstructed`` if its map is reconstructed).
    metadata : sequence of mappings
        Metadata of each map, such as ``{"Units": "ppm"}``.
    name : str
    model, weights, label_map, device, n_threads
        As those of `bids_dgmseg.workflows.init_dgmseg_wf`.
    mem_gb : mapping of str to float
        Memory in GB planned for each step.

    Returns
    -------
    Workflow
        Without inputs and outputs of its own: those of the workflows in it are set before.
    """
    workflow, names = Workflow(name=name), list(maps)
    network = {"model": model, "weights": weights, "label_map": label_map, "device": device, "n_threads": n_threads}
    align = step_node(AlignSessions(), "align", mem_gb, n_threads, **network)
    align.inputs.trait_set(names=names, metadata=[dict(about) for about in metadata])
    if any(isinstance(source, Workflow) for source in maps.values()):
        collect = step_node(Merge(len(names)), "collect", mem_gb)
        workflow.connect(collect, "out", align, "in_sessions")
        for number, source in enumerate(maps.values(), 1):
            if isinstance(source, Workflow):
                workflow.connect(source, "outputnode.chi", collect, f"in{number}")
            else:
                setattr(collect.inputs, f"in{number}", str(source))
    else:
        align.inputs.in_sessions = [str(path) for path in maps.values()]
    for number, (session, source) in enumerate(maps.items()):
        if scan := scans.get(session):
            workflow.connect(align, ("out_spaces", _take, number), scan, "inputnode.in_space")
            if isinstance(source, Workflow):
                fields = [(f"outputnode.{field}", f"reconstructed.{field}") for field in RECONSTRUCTED.split()]
                workflow.connect([(source, scan, fields)])
    return workflow


def _take(spaces, number):  # type: ignore[no-untyped-def]  # Nipype runs its source text, without this module's names
    """Return one of the mid-spaces."""
    return spaces[number]
