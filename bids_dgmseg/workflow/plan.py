"""Plan of a run: options that fit together, directories that may be written, scans to process.

Imports nothing heavy, so that a dry run is fast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, Inputs, generators, is_own, open_inputs
from bids_dgmseg.bids.derivatives import fingerprint, is_done, map_fingerprint, models_using_map
from bids_dgmseg.bids.scans import Scan, find_scans, find_skipped
from bids_dgmseg.bids.segmentations import check_reference, find_brain_masks, find_reference_masks
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import describe_missing, describe_unfetched, is_broken_symlink, is_pointer_file, read_json
from bids_dgmseg.models.nnunet_folder import choose_labels
from bids_dgmseg.models.registry import Model, get_model


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


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first scan."""

    inputs: Inputs
    model: Model
    scans: tuple[Scan, ...]
    jobs: tuple[Job, ...]
    """Scans without results, or with results of another map, model or option."""
    warnings: tuple[str, ...]
    misplaced: bool
    """Whether files in the wrong folder were ignored."""


def plan_run(config: RunConfig) -> Plan:
    """Check the options and directories, and find the scans to process.

    Writes nothing, except that the output directory is created unless this is a dry run.

    Raises
    ------
    InputError
        If the run cannot start: no scans, an unknown model, weights, masks or an output directory that cannot be used.
    """
    segmentation, device = config.segmentation, config.resources.device
    chosen = replace(get_model(segmentation.model or "default"), ensemble=segmentation.ensemble)
    if chosen.ensemble and chosen.localizer.kind == "nnunet":
        raise InputError(
            f"--ensemble: not supported by {chosen.name}, whose labels are side-specific, so that mirrored images "
            "cannot be averaged; omit it"
        )
    model, warnings = choose_labels(chosen, segmentation.weights, segmentation.label_map)
    check_reference(config.reference, model)
    inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
    misplaced: list[str] = []
    scans = find_scans(inputs, echoes=True, misplaced=misplaced)
    check_folders(config)
    jobs = _find_jobs(config, model, scans)
    warnings = [*warnings, *(f"{line}; ignored" for line in misplaced)]
    # In a dry run the shipped weights are taken for granted, because importing torch is slow.
    if jobs and (not config.control.dry_run or segmentation.weights or device == "cuda"):
        from bids_dgmseg.segmentation.segment import check_ready

        warnings += check_ready(model, weights=segmentation.weights, device=device)
    warnings += _find_outdated_results(config.output_dir, model, jobs)
    warnings += find_skipped(inputs, scans)
    if not any(scan.from_echoes for scan in scans):
        given = {
            "--brain-mask": config.reconstruction.brain_masks is not None,
            "--phase-sign": config.reconstruction.phase_sign != "auto",
        }
        warnings += [
            f"{option} has no effect: every selected scan already has a chi map"
            for option, is_given in given.items()
            if is_given
        ]
    return Plan(inputs, model, tuple(scans), tuple(jobs), tuple(warnings), bool(misplaced))


def _find_jobs(config: RunConfig, model: Model, scans: Sequence[Scan]) -> list[Job]:
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


def _find_outdated_results(output_dir: Path, model: Model, jobs: Sequence[Job]) -> list[str]:
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


def check_folders(config: RunConfig) -> None:
    """Reject an output or working directory that would damage the input or another program's dataset.

    Writes nothing, except that the output directory is created unless this is a dry run.

    Raises
    ------
    InputError
        If a directory lies inside the raw data, or the output directory is read-only or another program's dataset.
    """
    from bids_dgmseg.bids.output_dataset import check_writable

    root, output_dir, work_dir = config.bids_dir.resolve(), config.output_dir, config.control.work_dir
    for folder, option in ((output_dir, "output directory"), (work_dir, "--work-dir")):
        inside = folder.resolve()
        if inside.is_relative_to(root) and inside.relative_to(root).parts[:1] != ("derivatives",):
            raise InputError(
                f"{folder.name}: {option} inside the input's raw data ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: --work-dir inside the output directory, which would not be valid BIDS; choose a folder "
            "outside it"
        )
    if maker := _find_other_maker(output_dir, described=config.level != "participant"):
        raise InputError(f"{output_dir.name}: contains a dataset of {maker}; choose another output directory")
    if not config.control.dry_run:
        check_writable(output_dir)


def make_run_folder(work_dir: Path) -> Path:
    """Create a folder in the working directory that no other run uses.

    Raises
    ------
    InputError
        If that fails.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="run-", dir=work_dir))
    except OSError as error:
        raise InputError(f"{work_dir}: cannot be written ({error.strerror}); choose another --work-dir") from error


def _find_other_maker(folder: Path, *, described: bool) -> str | None:
    """Return the program that made the dataset in a folder; None if it is this one or there is no dataset.

    Unless datasets must be described, participants without dataset_description.json are one too, as SEPIA writes them.
    """
    path = folder / DATASET_DESCRIPTION
    if is_broken_symlink(path):
        raise InputError(f"{folder.name}: {describe_missing(path)}")
    if is_pointer_file(path):
        raise InputError(f"{folder.name}: {describe_unfetched(path)}")
    if not path.is_file():
        found = next((one.name for one in sorted(folder.glob("sub-*")) if one.is_dir() and any(one.iterdir())), None)
        return f"another program ({found}, but no {DATASET_DESCRIPTION})" if found and not described else None
    try:
        read_json(path)
    except InputError as error:
        raise InputError(f"{folder.name}/{error}") from error
    if is_own(folder):
        return None
    return ", ".join(maker["Name"] for maker in generators(folder)) or "another program"
