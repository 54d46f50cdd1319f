"""Nodes of the workflows of a scan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import BaseInterface
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from bids_dgmseg.interfaces.base import StepNode

STEPS = (
    "reconstruct",
    "conform",
    "localize",
    "collect",
    "align",
    "segment",
    "correct",
    "measure",
    "sample",
    "plot",
    "normalize",
    "save",
)
"""Names of the nodes in the order of the data.

Only scans with echoes have the first, only those with a manual correction ``correct``, only those with further maps
``sample``, and only those that are carried to standard space ``normalize``. Sessions that are labelled together share
``align``, and ``collect`` if some of their maps are reconstructed."""

MEMORY_GB: Mapping[str, float] = {
    "reconstruct": 4.0,
    "conform": 1.0,
    "localize": 1.5,
    "collect": 0.5,
    "align": 2.0,
    "segment": 2.0,
    "correct": 1.0,
    "measure": 1.5,
    "sample": 2.0,
    "plot": 1.5,
    "normalize": 2.0,
    "save": 1.0,
}
"""Memory planned for each step, for images of at most 256 voxels along each axis."""

KINDS = ("report", "warnings")
"""What steps say about a scan."""


class OpenWorkflow(Workflow):
    """Workflow whose inputs depend on its options: to set one that it does not have is a `TraitError`."""

    def _set_input(self, objekt: Any, name: str, newvalue: Any) -> None:
        # Nipype 1.11 ends here with an AttributeError about None, before traits refuses the name
        if name != "trait_added":
            super()._set_input(objekt, name, newvalue)


def identity_node(name: str, fields: str) -> Node:
    """Return a node that passes fields on, set or not."""
    return Node(IdentityInterface(fields=list(dict.fromkeys(fields.split())), mandatory_inputs=False), name=name)


def fields_of(node: Node) -> list[str]:
    """Return the fields of an `identity_node`."""
    return list(node.inputs.get())


def step_node(
    interface: BaseInterface, name: str, mem_gb: Mapping[str, float], n_procs: int = 1, **inputs: Any
) -> StepNode:
    """Return the node of a step; inputs that are None are not set. `ValueError` if `mem_gb` has other names."""
    if unknown := sorted(mem_gb.keys() - set(STEPS)):
        raise ValueError(f"mem_gb: no step {', '.join(unknown)}; choose from {', '.join(STEPS)}")
    interface.inputs.trait_set(
        **{key: str(value) if isinstance(value, Path) else value for key, value in inputs.items() if value is not None}
    )
    return StepNode(interface, name=name, n_procs=n_procs, mem_gb=mem_gb.get(name, MEMORY_GB[name]))


def reports(part: str) -> list[tuple[str, str]]:
    """Return the connections of what a step says: ``report`` to ``PART_report``."""
    return [(kind, f"{part}_{kind}") for kind in KINDS]
