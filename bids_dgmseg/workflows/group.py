"""Workflow of the group level."""

from __future__ import annotations

from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface

from bids_dgmseg.interfaces.group import COLLECTED, AnalyseGroup, CollectStats

_COLLECT = (
    *("results", "datasets", "tables_dir", "participant_label", "session_label", "model"),
    *("site_column", "group_column", "age_column", "include_failed", "qc", "outdated"),
)

_ANALYSE = (
    *("out_dir", "measures", "control_filter", "covariates", "correlate", "combat_age", "evaluation", "bootstrap"),
    *("combat_longitudinal", "harmonization_save", "harmonization_apply", "norms_save", "norms"),
    *("warnings", "n_missing", "nprocs"),
)

_OUTPUTS = ("tables", "page", "reference_group", "warnings", "notes")


def init_group_wf(name: str = "group_wf") -> Workflow:
    """Build the workflow of the group level, from results of many scans to group tables and a page.

    Inputs
    ------
    - ``results``, ``datasets``, ``tables_dir``, ``participant_label``, ``session_label``, ``model``,
      ``site_column``, ``group_column``, ``age_column``, ``include_failed``, ``qc``, ``outdated``: See `CollectStats`;
      only ``results`` is needed.
    - ``out_dir``, ``measures``, ``control_filter``, ``covariates``, ``correlate``, ``combat_age``, ``evaluation``,
      ``bootstrap``, ``combat_longitudinal``, ``harmonization_save``, ``harmonization_apply``, ``norms_save``,
      ``norms``, ``warnings``,
      ``n_missing``, ``nprocs``: See `AnalyseGroup`.

    Outputs
    -------
    - ``out_stats``, ``out_volumes``, ``out_susceptibility``, ``out_qc``, ``out_scans``, ``out_cohort``: See
      `CollectStats`.
    - ``out_tables``, ``out_page``, ``out_reference_group``, ``out_warnings``, ``out_notes``: See `AnalyseGroup`.
    """
    outputs = [f"out_{output}" for output in (*COLLECTED, *_OUTPUTS)]
    inputnode = Node(IdentityInterface(fields=[*_COLLECT, *_ANALYSE], mandatory_inputs=False), name="inputnode")
    outputnode = Node(IdentityInterface(fields=outputs), name="outputnode")
    collect, analyse = Node(CollectStats(), name="collect"), Node(AnalyseGroup(), name="analyse")
    for node, fields in ((collect, _COLLECT), (analyse, _ANALYSE)):
        for field in fields:  # a connection would replace the default of an input by an undefined value
            setattr(inputnode.inputs, field, getattr(node.inputs, field))
    # the tables are collected in each run, but analysed again only if they differ, not if they are newer
    analyse.config = {"execution": {"hash_method": "content"}}
    workflow = Workflow(name=name)
    workflow.connect(
        [
            (inputnode, collect, [(field, field) for field in _COLLECT]),
            (inputnode, analyse, [(field, field) for field in _ANALYSE]),
            (collect, analyse, [(f"out_{file}", f"in_{file}") for file in (*COLLECTED, "maps")]),
            (collect, outputnode, [(f"out_{file}", f"out_{file}") for file in COLLECTED]),
            (analyse, outputnode, [(f"out_{output}", f"out_{output}") for output in _OUTPUTS]),
        ]
    )
    return workflow
