"""Workflow of the group level."""

from __future__ import annotations

from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.interfaces.analyse_group import AnalyseGroup


def init_group_wf(name: str = "group_wf") -> Workflow:
    """Build the workflow of the group level, from results of many scans to group tables and a page.

    Its ``inputnode`` has the inputs of `AnalyseGroup`, its ``outputnode`` the outputs.
    """
    analyse = Node(AnalyseGroup(), name="analyse")
    inputs, outputs = analyse.inputs.copyable_trait_names(), list(analyse.outputs.copyable_trait_names())
    inputnode = Node(IdentityInterface(fields=inputs, mandatory_inputs=False), name="inputnode")
    outputnode = Node(IdentityInterface(fields=outputs), name="outputnode")
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputnode, analyse, [(field, field) for field in inputs]),
            (analyse, outputnode, [(field, field) for field in outputs]),
        ]
    )
    return workflow
