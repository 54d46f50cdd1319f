"""Plan of a run: which scans are processed, because they have no results or those of other images or options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.arguments import settings_of
from bids_dgmseg.bids.corrections import correction_files, find_corrections
from bids_dgmseg.bids.current import InputFile, MadeFrom, describe_model, hash_weights, judge
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, Inputs, find_participants, generators, is_own, open_inputs
from bids_dgmseg.bids.derivatives import check_standard_names
from bids_dgmseg.bids.entities import Sidecars, labelled_folders, output_path
from bids_dgmseg.bids.masks_and_maps import FurtherMap, find_further_maps, find_lesion_masks, find_scan_masks
from bids_dgmseg.bids.output_dataset import check_writable
from bids_dgmseg.bids.scans import Scan, find_scans, find_skipped, group_sessions
from bids_dgmseg.config import ReconstructionOptions, RunConfig
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    NOT_FETCHED,
    describe_missing,
    describe_unfetched,
    is_broken_symlink,
    is_pointer_file,
    read_json,
    read_optional_json,
    sha256,
    sha256_or_error,
    value_of,
)
from bids_dgmseg.models.registry import MODELS, Model, check_shipped_weights, get_model, weights_folder
from bids_dgmseg.segmentation.engines import choose_labels, engine_of

_NEW, _FORCED = "no results yet", "`force` is set"
"""Reasons why a scan is processed, apart from results that are not current."""


@dataclass(frozen=True)
class Job:
    """A scan to be processed, with the files and options that it is processed with."""

    scan: Scan
    model: Model
    config: RunConfig
    reference_mask: Path | None = None
    """The user's mask of the reference region."""
    brain_mask: Path | None = None
    """The user's brain mask, if the map is to be reconstructed."""
    correction: Path | None = None
    """The user's correction of the labels."""
    maps: Mapping[str, FurtherMap] = field(default_factory=dict)
    """Further maps of the session, by their names in columns."""
    excluded: Sequence[Path] = ()
    """Masks of voxels that are not measured."""
    age: float | None = None
    """Age in years if the model was not made for it."""
    sessions: tuple[Job, ...] = ()
    """Sessions labelled jointly with this scan; empty if it is processed on its own."""
    made_from: MadeFrom = field(default_factory=MadeFrom)
    """Inputs, options and weights that the results depend on."""
    problem: str = ""
    """Why the scan cannot be processed, in one line."""
    is_edited: bool = False
    """True if its results were edited by hand: they are kept."""
    reason: str = ""
    """Why the scan is processed although it may have results."""


def list_options(job: Job) -> dict[str, Any]:
    """Return the options that change the results of a scan."""
    config = job.config
    parts: list[Any] = [config.segmentation, config.reference, config.measurement]
    parts += [config.reconstruction] if job.scan.from_echoes else []
    age = {} if job.age is None else {"age": job.age}
    return age | {name: value for part in parts for name, value in settings_of(part).items()}


def _list_map_inputs(job: Job, sidecars: Callable[[str], Sidecars]) -> dict[str, InputFile]:
    """Return the map, or the echoes and the brain mask that it is reconstructed from, by their use."""
    scan = job.scan
    uses = [f"echo {n}, {part}" for n, echo in enumerate(scan.echoes, 1) for part in echo.parts] or ["map"]
    files = zip(uses, scan.files, scan.uris, strict=True)
    images = {use: InputFile(path, uri, scan.dataset_root, sidecars) for use, path, uri in files}
    return images | ({"brain mask": InputFile(job.brain_mask)} if job.brain_mask else {})


def _list_inputs(job: Job, sidecars: Callable[[str], Sidecars]) -> dict[str, InputFile]:
    """Return all files that the results depend on; those of other sessions with the name of their scan."""
    paths = {"reference mask": job.reference_mask} if job.reference_mask else {}
    paths |= correction_files(job.correction) if job.correction else {}
    paths |= {f"lesion mask {number}": path for number, path in enumerate(job.excluded, 1)}
    inputs = _list_map_inputs(job, sidecars) | {use: InputFile(path) for use, path in paths.items()}
    for name, row in job.maps.items():
        inputs[f"further map {name}"] = InputFile(row.path, row.uri, row.root, sidecars)
    for session in job.sessions:
        if (name := session.scan.name) != job.scan.name:
            inputs |= {f"{name}: {use}": file for use, file in _list_map_inputs(session, sidecars).items()}
    return inputs


def _find_problem(job: Job) -> str:
    """Return why a scan cannot be processed: Nipype would start no workflow at all if a file was missing."""
    needed = [file.path for use, file in job.made_from.inputs.items() if not use.startswith(("further map ", "sub-"))]
    if problem := job.scan.problem or _describe_missing(needed):
        return problem
    for scan in (session.scan for session in job.sessions):
        if why := scan.problem or ("" if scan.from_echoes else _describe_missing(scan.files)):
            reason = why.partition("; ")[0]
            return (
                f"not labelled, because {scan.name} of the same participant failed ({reason}); correct or remove it, "
                "or run without `longitudinal`"
            )
    return ""


def _describe_missing(paths: Iterable[Path]) -> str:
    """Return why the first of several files cannot be read; empty if all are files."""
    for path in paths:
        if not path.is_file():
            return describe_missing(path)
        if is_pointer_file(path):
            return describe_unfetched(path)
    return ""


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
    """Check the options and directories, and find the scans to process; `InputError` if the run cannot start.

    Writes nothing, except that the output directory is created unless this is a dry run.
    """
    from bids_dgmseg.measurement.segmented_scan import check_reference

    segmentation, device = config.segmentation, config.resources.device
    model, warnings = choose_labels(
        get_model(segmentation.model or "default"),
        segmentation.weights,
    )
    if segmentation.longitudinal:
        engine_of(model, longitudinal=True)
    check_reference(config.reference, model)
    inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
    misplaced: list[str] = []
    scans = find_scans(inputs, echoes=True, misplaced=misplaced)
    check_folders(config)
    if segmentation.output_space:
        check_standard_names(scans, model, segmentation.output_space)
    maps, map_warnings = find_further_maps(inputs, scans, config.measurement.further_maps)
    excluded, mask_warnings = find_lesion_masks(config.measurement.lesion_masks, scans)
    sessions, alone = group_sessions(scans) if segmentation.longitudinal else ({}, [])
    ages, age_warnings = _find_other_ages(config, model, scans)
    jobs = _find_jobs(config, model, scans, maps, excluded, sessions, ages)
    warnings = [*warnings, *map_warnings, *mask_warnings, *age_warnings, *alone]
    warnings += [*(f"{line}; ignored" for line in misplaced), *_describe_outdated(jobs)]
    must_load = bool(segmentation.weights) or device in ("cuda", "mps") or not weights_folder(model).is_dir()
    if jobs and model.weights and not must_load:
        check_shipped_weights(model)  # not loaded, because importing torch would delay the first scan by seconds
        if model.localizer.guard:
            check_shipped_weights(MODELS[model.localizer.guard])
    elif jobs and (must_load or not config.control.dry_run):
        from bids_dgmseg.segmentation.segment import check_ready

        warnings += check_ready(model, weights=segmentation.weights, device=device)
    warnings += find_skipped(inputs, scans)
    if not any(scan.from_echoes for scan in scans):
        options, defaults = config.reconstruction, ReconstructionOptions()
        warnings += [
            f"`{item.name}` has no effect: every selected scan already has a chi map"
            for item in fields(options)
            if getattr(options, item.name) != getattr(defaults, item.name)
        ]
    return Plan(inputs, model, tuple(scans), tuple(jobs), tuple(warnings), bool(misplaced))


def _describe_outdated(jobs: Sequence[Job]) -> list[str]:
    """Return a line about the scans whose results are not current: all of them with the dataset of another study."""
    why = [f"{job.scan.name}: {job.reason}" for job in jobs if job.reason not in (_NEW, _FORCED, "")]
    return [f"{len(why)} scan(s) have outdated results and will be reprocessed ({list_some(why)})"] if why else []


def _find_other_ages(config: RunConfig, model: Model, scans: Sequence[Scan]) -> tuple[dict[str, float], list[str]]:
    """Return the ages of scans that a model was not made for, by the name of the scan, and warnings."""
    dataset = find_participants(config.bids_dir)
    if model.ages is None or not (dataset / "participants.tsv").is_file():
        return {}, []
    from bids_dgmseg.study.participants import AGE, find_column, read_participant_tables

    visits = [(scan.participant, scan.session) for scan in scans]
    try:
        tables, _ = read_participant_tables(dataset, visits)
        ages, _ = tables.ages(visits, find_column(tables.columns, AGE))
    except InputError as error:
        return {}, [f"{error}; ages were not compared with those that {model.name} was made for"]
    by_scan = {scan.name: round(age, 1) for scan, age in zip(scans, ages, strict=True)}
    others = {name: age for name, age in by_scan.items() if model.years_beyond_training(age) > 0}
    named = list_some(f"{name} ({age:g} years)" for name, age in others.items())
    low, high = model.ages
    line = f"{named}: {model.name} was made for ages of {low:g} to {high:g} years; rated amber, check the labels"
    return others, [line] if others else []


def check_folders(config: RunConfig) -> None:
    """Reject an output or working directory that would damage the input or another program's dataset.

    That is one inside the raw data, or an output directory that is read-only or another program's dataset. Writes
    nothing, except that the output directory is created unless this is a dry run.
    """
    root, output_dir, work_dir = config.bids_dir.resolve(), config.output_dir, config.control.work_dir
    for folder, name in ((output_dir, "output directory"), *([(work_dir, "`work_dir`")] if work_dir else [])):
        inside = folder.resolve()
        if inside.is_relative_to(root) and inside.relative_to(root).parts[:1] != ("derivatives",):
            raise InputError(
                f"{folder.name}: {name} is inside the raw dataset ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir and work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: `work_dir` is inside the output directory, which would not be valid BIDS; choose a "
            "folder outside it"
        )
    if maker := _find_other_maker(output_dir, described=config.level != "participant"):
        raise InputError(f"{output_dir.name}: already contains output of {maker}; choose another output directory")
    if not config.control.dry_run:
        check_writable(output_dir)


def _find_other_maker(folder: Path, *, described: bool) -> str | None:
    """Return the program that made the dataset in a folder; None if it is this one or there is no dataset.

    Unless datasets must be described, participants without dataset_description.json are one too, as SEPIA writes them.
    """
    path = folder / DATASET_DESCRIPTION
    if is_broken_symlink(path):
        raise InputError(f"{folder.name}: {describe_missing(path)}")
    if not path.is_file():
        participant = None if described else next(iter(labelled_folders(folder, "sub")), None)
        return f"another program (sub-{participant}, but no {DATASET_DESCRIPTION})" if participant else None
    read_json(path)
    if is_own(folder):
        return None
    return ", ".join(maker["Name"] for maker in generators(folder)) or "another program"


def _find_jobs(
    config: RunConfig,
    model: Model,
    scans: Sequence[Scan],
    maps: Mapping[str, Mapping[str, FurtherMap]],
    excluded: Mapping[str, Sequence[Path]],
    sessions: Mapping[str, tuple[Scan, ...]],
    ages: Mapping[str, float],
) -> list[Job]:
    """List the scans without results, or with results of other images or options."""
    masks = find_scan_masks(config.reference.masks, scans, ("csf", "ventricles"), parameter="reference_masks")
    folder, echoes = config.reconstruction.brain_masks, [scan for scan in scans if scan.from_echoes]
    brains = find_scan_masks(folder, echoes, ("brain",), parameter="brain_masks")
    if folder and (missing := [scan.name for scan in echoes if scan.name not in brains]):
        raise InputError(f"{folder.name}: no mask of {list_some(missing)}; add it, or omit `brain_masks`")
    sidecars = cache(Sidecars)
    weights = {**hash_weights(config.segmentation.weights, model), "definition of the model": describe_model(model)}
    corrections = find_corrections(config.segmentation.corrections, scans, model, selection=config.selection)
    alone = {
        scan.name: Job(
            scan,
            model,
            config,
            reference_mask=masks.get(scan.name),
            brain_mask=brains.get(scan.name),
            correction=corrections.get(scan.name),
            maps=maps[scan.name],
            excluded=excluded.get(scan.name, ()),
            age=ages.get(scan.name),
        )
        for scan in scans
    }

    def complete(job: Job) -> Job:
        """Return the job with the sessions that are labelled with it, all inputs, and the reason if it cannot run."""
        job = replace(job, sessions=tuple(alone[scan.name] for scan in sessions.get(job.scan.name, ())))
        options = {name: value for name, value in list_options(job).items() if not isinstance(value, Path)}
        job = replace(job, made_from=MadeFrom(inputs=_list_inputs(job, sidecars), options=options, weights=weights))
        return replace(job, problem=_find_problem(job))

    jobs = [complete(job) for job in alone.values()]
    if config.control.force:
        return [replace(job, reason=_FORCED) for job in jobs]

    def check(job: Job) -> Job | None:
        """Return the job if it must run, with the reason, or which outputs were edited."""
        record = output_path(config.output_dir, job.scan, "qc", ".json", seg=model.name)
        if not record.is_file():
            return replace(job, reason=_NEW)
        # metadata that are not fetched count as unchanged
        is_unknown = any(NOT_FETCHED in (part.scan.problem or "") for part in (job, *job.sessions))
        now, inputs = (None, {}) if is_unknown else (job.made_from, job.made_from.inputs)
        verdict = judge(config.output_dir, record, lambda use, file: inputs.get(use), now)
        edited = list(verdict.edited)
        if job.correction:  # labels edited in place are safe once there is a copy among the corrections
            edited = [path for path in edited if sha256(path) != sha256_or_error(job.correction)]
        problem = ""
        if edited:
            problem = (
                f"{list_some(path.name for path in edited)}: changed since the run, so that the other results no "
                "longer belong to it; restore it (`force` overwrites it), or, to measure edited labels, run dgmseg "
                f"corrections init OUTPUT_DIR DIR `scans` {job.scan.name} and then this command with `corrections` DIR"
            )
        correction = value_of(read_optional_json(record), "correction", dict)
        if not edited and not config.segmentation.corrections and correction:
            problem = (
                f"{job.scan.name}: its results have manual corrections ({correction.get('file', 'n/a')}); add "
                "`corrections` with their folder (`force` returns to the automatic labels)"
            )
        if problem:
            return replace(job, problem=job.scan.problem or problem, is_edited=True)
        return replace(job, reason=verdict.reason) if verdict.reason else None

    with ThreadPoolExecutor(config.resources.nprocs) as pool:
        return [job for job in pool.map(check, jobs) if job]
