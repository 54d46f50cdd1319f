"""Nipype workflows: what the app runs, and what other pipelines embed."""

from bids_dgmseg.workflows.build import init_dgmseg_wf, init_group_wf, init_participant_wf, init_reconstruct_wf

__all__ = ["init_dgmseg_wf", "init_group_wf", "init_participant_wf", "init_reconstruct_wf"]
