"""Plan of a run: which scans are processed, because they have no results or those of other images or options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from bids_dgmseg.arguments import settings_of
from bids_dgmseg.bids.corrections import correction_files, find_corrections
from bids_dgmseg.bids.current import InputFile, MadeFrom, describe_model, hash_weights, judge
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, Inputs, generators, is_own, open_inputs
from bids_dgmseg.bids.derivatives import check_standard_names, map_paths
from bids_dgmseg.bids.entities import Sidecars, output_path
from bids_dgmseg.bids.masks_and_maps import (
    FurtherMap,
    find_further_maps,
    find_lesion_masks,
    find_scan_masks,
)
from bids_dgmseg.bids.output_dataset import check_writable
from bids_dgmseg.bids.scans import Scan, find_scans, find_skipped, group_sessions
from bids_dgmseg.config import SHIPPED_WEIGHTS, ReconstructionOptions, RunConfig
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    NOT_FETCHED,
    describe_missing,
    is_broken_symlink,
    read_json,
    read_optional_json,
    sha256,
    sha256_or_error,
)
from bids_dgmseg.models.registry import MODELS, Model, check_shipped_weights, get_model, weights_folder
from bids_dgmseg.segmentation.engines import choose_labels, engine_of


@dataclass(frozen=True)
class Job:
    """A scan to be processed."""

    scan: Scan
    model: Model
    config: RunConfig
    weights: Mapping[str, str] = field(default_factory=dict)
    """Checksums of the weights."""
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
    sessions: tuple[Job, ...] = ()
    """Sessions labelled jointly with this scan; empty if it is processed on its own."""
    edited: str = ""
    """Reason why results are protected (edited by hand)."""
    sidecars: Callable[[str], Sidecars] = Sidecars
    """Sidecars of images with a suffix."""
    reason: str = ""
    """Why the scan is processed although it may have results."""

    @property
    def problem(self) -> str | None:
        """Reason why the scan cannot be processed, in one line."""
        return self.scan.problem or self.edited or self._missing_file or self._session_problem

    @property
    def _missing_file(self) -> str | None:
        """First missing or unfetched input; Nipype would refuse to start any workflow."""
        images = self.scan.files if self.scan.from_echoes or self.sessions else ()  # the step reports a missing map
        others = (file.path for use, file in self._own_inputs.items() if not use.startswith("further map "))
        return _describe_missing([*images, *others])

    @property
    def _session_problem(self) -> str | None:
        """Reason why a session that the scan is labelled with cannot be read."""
        for scan in (job.scan for job in self.sessions):
            if why := scan.problem or (None if scan.from_echoes else _describe_missing(scan.files)):
                reason = why.partition("; ")[0]
                return (
                    f"not labelled, because {scan.name} of the same participant failed ({reason}); correct or remove "
                    "it, or run without `longitudinal`"
                )
        return None

    @property
    def is_unknown(self) -> bool:
        """True if metadata of the scan, or of a session labelled with it, are not fetched: they count as unchanged."""
        return any(NOT_FETCHED in (job.scan.problem or "") for job in (self, *self.sessions))

    @cached_property
    def inputs(self) -> dict[str, InputFile]:
        """All files that the results depend on, by their use; those of other sessions with the name of their scan."""
        others = [job for job in self.sessions if job.scan.name != self.scan.name]
        sessions = {f"{job.scan.name}: {use}": file for job in others for use, file in job._map_inputs.items()}
        return {**self._map_inputs, **self._own_inputs, **sessions}

    @property
    def _map_inputs(self) -> dict[str, InputFile]:
        """The map, or the echoes and the brain mask that it is reconstructed from."""
        scan = self.scan
        uses = [f"echo {n}, {part}" for n, echo in enumerate(scan.echoes, 1) for part in echo.parts] or ["map"]
        files = zip(uses, scan.files, scan.uris, strict=True)
        images = {use: InputFile(path, uri, scan.dataset_root, self.sidecars) for use, path, uri in files}
        return images | ({"brain mask": InputFile(self.brain_mask)} if self.brain_mask else {})

    @property
    def _own_inputs(self) -> dict[str, InputFile]:
        """Masks, further maps and the correction."""
        masks = {"brain mask": self.brain_mask, "reference mask": self.reference_mask}
        paths = {use: path for use, path in masks.items() if path}
        paths |= correction_files(self.correction) if self.correction else {}
        paths |= {f"lesion mask {number}": path for number, path in enumerate(self.excluded, 1)}
        maps = {
            f"further map {name}": InputFile(row.path, row.uri, row.root, self.sidecars)
            for name, row in self.maps.items()
        }
        return {use: InputFile(path) for use, path in paths.items()} | maps

    @property
    def _options(self) -> dict[str, Any]:
        """Options that change the results."""
        parts: list[Any] = [self.config.segmentation, self.config.reference, self.config.measurement]
        parts += [self.config.reconstruction] if self.scan.from_echoes else []
        return {name: value for part in parts for name, value in settings_of(part).items()}

    @property
    def made_from(self) -> MadeFrom:
        """Inputs, options and weights that the results depend on."""
        return MadeFrom(
            inputs=self.inputs,
            options={name: value for name, value in self._options.items() if not isinstance(value, Path)},
            weights={**self.weights, "definition of the model": describe_model(self.model)},
        )

    @property
    def record(self) -> Path:
        """Path of the record of its results."""
        return output_path(self.config.output_dir, self.scan, "qc", ".json", seg=self.model.name)

    @property
    def map_name(self) -> str:
        """File name of the map, with the name of the scan if it lacks that: reconstructed ones, those of SEPIA."""
        name = self.scan.chi.name
        is_named = name.startswith(self.scan.name) and not self.scan.from_echoes
        return name if is_named else map_paths(self.config.output_dir, self.scan)[0].name

    def describe_settings(self) -> dict[str, Any]:
        """Return the options that the QC record shows."""
        config, weights = self.config, self.config.segmentation.weights
        return {
            "model": self.model.name,
            "weights": weights.name if weights else SHIPPED_WEIGHTS,
            "device": config.resources.device,
            "threads": config.resources.omp_nthreads,
            **{name: value.name if isinstance(value, Path) else value for name, value in self._options.items()},
            **({"correction": self.correction.name} if self.correction else {}),
            **({"longitudinal": [job.scan.name for job in self.sessions]} if self.sessions else {}),
        }


def _describe_missing(paths: Iterable[Path]) -> str | None:
    return next((describe_missing(path) for path in paths if not path.is_file()), None)


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
    from bids_dgmseg.measurement.reference_region import check_reference

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
    jobs = _find_jobs(config, model, scans, maps, excluded, sessions)
    warnings = [*warnings, *map_warnings, *mask_warnings, *alone, *(f"{line}; ignored" for line in misplaced)]
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
                f"{folder.name}: {name} inside the input's raw data ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir and work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: `work_dir` inside the output directory, which would not be valid BIDS; choose a folder "
            "outside it"
        )
    if maker := _find_other_maker(output_dir, described=config.level != "participant"):
        raise InputError(f"{output_dir.name}: contains a dataset of {maker}; choose another output directory")
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
        participant = next((item.name for item in sorted(folder.glob("sub-*")) if item.is_dir()), None)
        return (
            f"another program ({participant}, but no {DATASET_DESCRIPTION})" if participant and not described else None
        )
    try:
        read_json(path)
    except InputError as error:
        raise InputError(f"{folder.name}/{error}") from error
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
) -> list[Job]:
    """List the scans without results, or with results of other images or options."""
    masks = find_scan_masks(config.reference.masks, scans, ("csf", "ventricles"), parameter="reference_masks")
    folder, echoes = config.reconstruction.brain_masks, [scan for scan in scans if scan.from_echoes]
    brains = find_scan_masks(folder, echoes, ("brain",), parameter="brain_masks")
    if folder and (missing := [scan.name for scan in echoes if scan.name not in brains]):
        raise InputError(f"{folder.name}: no mask of {list_some(missing)}; add it, or omit `brain_masks`")
    sidecars = cache(Sidecars)
    weights = hash_weights(config.segmentation.weights, model)
    corrections = find_corrections(config.segmentation.corrections, scans, model, selection=config.selection)
    jobs = [
        Job(
            scan,
            model,
            config,
            weights,
            reference_mask=masks.get(scan.name),
            brain_mask=brains.get(scan.name),
            correction=corrections.get(scan.name),
            maps=maps[scan.name],
            excluded=excluded.get(scan.name, ()),
            sidecars=sidecars,
        )
        for scan in scans
    ]
    alone = {job.scan.name: job for job in jobs}
    jobs = [replace(job, sessions=tuple(alone[one.name] for one in sessions.get(job.scan.name, ()))) for job in jobs]
    if config.control.force:
        return [replace(job, reason="`force` is set") for job in jobs]

    def check(job: Job) -> Job | None:
        """Return the job if it must run, with the reason, or which outputs were edited."""
        if not job.record.is_file():
            return replace(job, reason="no results yet")
        now = None if job.is_unknown else job.made_from
        verdict = judge(config.output_dir, job.record, lambda use, file: job.inputs.get(use) if now else None, now)
        edited = list(verdict.edited)
        if job.correction:  # labels edited in place are safe once there is a copy among the corrections
            edited = [path for path in edited if sha256(path) != sha256_or_error(job.correction)]
        if edited:
            return replace(job, edited=_describe_edited(edited, job.scan.name))
        if not config.segmentation.corrections and (lost := _find_lost_correction(job)):
            return replace(job, edited=lost)
        return replace(job, reason=verdict.reason) if verdict.reason else None

    with ThreadPoolExecutor(config.resources.nprocs) as pool:
        return [job for job in pool.map(check, jobs) if job]


def _find_lost_correction(job: Job) -> str:
    """Say that this run would replace results with a manual correction by automatic ones."""
    correction = read_optional_json(job.record).get("correction")
    if not isinstance(correction, Mapping):
        return ""
    return (
        f"{job.scan.name}: its results have manual corrections ({correction.get('file', 'n/a')}); add `corrections` "
        "with their folder (`force` returns to the automatic labels)"
    )


def _describe_edited(paths: Sequence[Path], scan: str) -> str:
    it = "it" if len(paths) == 1 else "them"
    if [path.name.endswith("_dseg.nii.gz") for path in paths] == [True]:
        return (
            f"{paths[0].name}: changed since it was written, so that the other results no longer belong to it; to "
            f"measure it, run dgmseg corrections init OUTPUT_DIR DIR `scans` {scan} and then this command with "
            "`corrections` DIR; or restore it (`force` overwrites it)"
        )
    return (
        f"{list_some(path.name for path in paths)}: changed since {it} {'was' if it == 'it' else 'were'} written, so "
        f"that the other results no longer belong to {it}; restore {it}, or move {it} to another folder and run again "
        f"(`force` overwrites {it})"
    )
