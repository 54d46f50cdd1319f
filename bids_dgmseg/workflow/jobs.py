"""Scans that a run has to process; imports nothing heavy, so that a dry run is fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.bids.derivatives import fingerprint, is_done, map_fingerprint, models_using_map
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.bids.segmentations import find_brain_masks, find_reference_masks
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import list_some
from bids_dgmseg.models.registry import Model


@dataclass(frozen=True)
class Job:
    """A scan to be processed."""

    scan: Scan
    fingerprint: str
    """Hash of everything that its results depend on."""
    reference_mask: Path | None = None
    """The user's mask of the reference region."""
    brain_mask: Path | None = None
    """The user's brain mask, if the map is to be reconstructed."""
    reconstruction: str = ""
    """Hash of everything that a reconstructed map depends on."""


def plan_jobs(config: RunConfig, model: Model, scans: Sequence[Scan]) -> list[Job]:
    """Return the scans without results, or with results of another map, model or option.

    Raises
    ------
    InputError
        If the masks or the weights cannot be used.
    """
    masks = find_reference_masks(config.reference.masks, scans)
    brains = find_brain_masks(config.reconstruction.brain_masks, scans)
    jobs = []
    for scan in scans:
        mask, brain = masks.get(scan.name), brains.get(scan.name)
        made = map_fingerprint(scan, config.reconstruction.phase_sign, brain)
        mark = fingerprint(scan, model, config.segmentation, config.reference, reference_mask=mask, reconstruction=made)
        if config.control.force or not is_done(config.output_dir, scan, model.name, mark):
            jobs.append(Job(scan, mark, mask, brain, made))
    return jobs


def find_outdated_results(output_dir: Path, model: Model, jobs: Sequence[Job]) -> list[str]:
    """Return warnings about results of other models whose reconstructed map this run replaces."""
    outdated: dict[str, list[str]] = {}
    for job in jobs:
        if not job.reconstruction:
            continue
        for other in models_using_map(output_dir, job.scan, other_than=job.reconstruction):
            if other != model.name:
                outdated.setdefault(other, []).append(job.scan.name)
    return [
        f"{list_some(scans)}: results of {other} belong to another reconstruction, which this run replaces; run "
        f"--model {other} again with the same --phase-sign and --brain-mask"
        for other, scans in outdated.items()
    ]
