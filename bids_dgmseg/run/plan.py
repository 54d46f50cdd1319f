"""Plan of a run: which scans are processed, because they have no results or those of other images or options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bids_dgmseg.arguments import settings_of
from bids_dgmseg.bids.corrections import find_corrections, hash_correction
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, Inputs, generators, is_own, open_inputs
from bids_dgmseg.bids.derivatives import CORRECTION, INPUT_HASHES, hash_sources, map_paths, models_using_map
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.masks_and_maps import (
    FurtherMap,
    find_further_maps,
    find_lesion_masks,
    find_scan_masks,
    name_columns,
)
from bids_dgmseg.bids.output_dataset import check_writable
from bids_dgmseg.bids.resume import (
    combine_hashes,
    find_edited,
    hash_current_sources,
    hash_map_settings,
    hash_settings,
    hash_weights,
    is_done,
)
from bids_dgmseg.bids.scans import Scan, find_scans, find_skipped, group_sessions
from bids_dgmseg.bids.standard_space import check_standard_names
from bids_dgmseg.config import SHIPPED_WEIGHTS, ReconstructionOptions, RunConfig
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    NOT_FETCHED,
    describe_missing,
    is_broken_symlink,
    is_unfetched,
    read_json,
    read_optional_json,
    sha256_of,
    sha256_or_error,
)
from bids_dgmseg.models.registry import MODELS, Model, check_shipped_weights, get_model, weights_folder
from bids_dgmseg.segmentation.engine import choose_labels, engine_of


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
    """The scans of the participant that are labelled together, each as if it were alone; empty: it alone."""
    edited: str = ""
    """Why existing results must not be replaced: somebody has changed them."""
    recorded: Mapping[str, str] = field(default_factory=dict)
    """The `input_hashes` of earlier results, for files that are not fetched."""

    @property
    def problem(self) -> str | None:
        """Why the scan cannot be processed: one line."""
        return self.scan.problem or self.edited or self._missing_file or self._session_problem

    @property
    def _missing_file(self) -> str | None:
        """Which file is not there, or not fetched: Nipype would not start the workflow, nor those of other scans."""
        images = self.scan.files if self.scan.from_echoes or self.sessions else ()  # the step reports a missing map
        given = (path for name, path in self._inputs.items() if not name.startswith("map "))
        return _describe_missing([*images, *given])

    @property
    def _session_problem(self) -> str | None:
        """Why a session that the scan is labelled with cannot be read."""
        for scan in (one.scan for one in self.sessions):
            if why := scan.problem or (None if scan.from_echoes else _describe_missing(scan.files)):
                reason = why.partition("; ")[0]
                return (
                    f"not labelled, because {scan.name} of the same participant failed ({reason}); correct or remove "
                    "it, or run without `longitudinal`"
                )
        return None

    @property
    def is_unknown(self) -> bool:
        """Whether metadata, also of a session that is labelled together, are not fetched: they count as unchanged."""
        return any(NOT_FETCHED in (one.scan.problem or "") for one in (self, *self.sessions))

    @cached_property
    def as_recorded(self) -> Job:
        """The same with masks, further maps and a correction that are not fetched as they were for earlier results."""
        if not any(map(is_unfetched, self._inputs.values())):
            return self
        recorded = read_optional_json(self._results).get(INPUT_HASHES)
        return replace(self, recorded=recorded if isinstance(recorded, Mapping) else {})

    @property
    def files(self) -> list[Path]:
        """All images that are read: the map or echoes, further maps and masks."""
        return [*self.scan.files, *self._inputs.values()]

    @property
    def _inputs(self) -> dict[str, Path]:
        """Masks, further maps and the correction, by what they are for."""
        given = {"reference mask": self.reference_mask, "brain mask": self.brain_mask, "correction": self.correction}
        inputs = {name: path for name, path in given.items() if path}
        inputs |= {f"map {name}": one.path for name, one in self.maps.items()}
        return inputs | {f"excluded {number}": path for number, path in enumerate(self.excluded)}

    @cached_property
    def input_hashes(self) -> dict[str, str]:
        """Hashes of masks, further maps with their units, and the correction, by what they are for."""
        return {name: self._hash_input(name, path) for name, path in self._inputs.items()}

    def _hash_input(self, name: str, path: Path) -> str:
        if name in self.recorded and is_unfetched(path):
            return str(self.recorded[name])
        units = [f"{one.units} " for one in self.maps.values() if one.path == path]
        return hash_correction(path) if path == self.correction else "".join(units[:1]) + sha256_or_error(path)

    @cached_property
    def map_settings_hash(self) -> str:
        """Hash of everything but the images that a reconstructed map depends on; empty if the scan has a map."""
        return hash_map_settings(self.scan, self.config.reconstruction, self.input_hashes.get("brain mask"))

    @cached_property
    def settings_hash(self) -> str:
        """Hash of everything but the images that the results depend on."""
        return hash_settings(
            self.scan,
            self.model,
            self.config.segmentation,
            self.config.reference,
            weights=self.weights,
            reference_mask=self.input_hashes.get("reference mask"),
            map_settings=self.map_settings_hash,
            correction=self.input_hashes.get("correction", ""),
            measurement=self.config.measurement,
            measured=self._hash_measured() | self._hash_sessions(),
        )

    def _hash_measured(self) -> dict[str, str]:
        """Hash the further maps and the masks of excluded voxels; a map that is absent counts, too."""
        asked = [name_columns(text) for text in self.config.measurement.further_maps]
        hashes = {name: self.input_hashes.get(f"map {name}", "") for name in asked}
        return hashes | {name: one for name, one in self.input_hashes.items() if name.startswith("excluded ")}

    def _hash_sessions(self) -> dict[str, str]:
        """Hash the maps, or echoes, and metadata of the other sessions."""
        others = [one for one in self.sessions if one.scan.name != self.scan.name]
        return {f"session {one.scan.uri}": one.as_recorded._map_hash for one in others}

    @cached_property
    def _map_hash(self) -> str:
        """Hash of all that the map of the scan depends on; images that are not fetched count as unchanged."""
        images = hash_current_sources(self.scan, self._results)
        return sha256_of({"settings": self.map_settings_hash, "sidecar": self.scan.sidecar, "images": images})

    @property
    def _results(self) -> Path:
        """The sidecar of the labels."""
        return output_path(self.config.output_dir, self.scan, "dseg", ".json", seg=self.model.name)

    @property
    def map_name(self) -> str:
        """File name of the map, with the name of the scan if it lacks that: reconstructed ones, those of SEPIA."""
        name = self.scan.chi.name
        is_named = name.startswith(self.scan.name) and not self.scan.from_echoes
        return name if is_named else map_paths(self.config.output_dir, self.scan)[0].name

    def map_fingerprint(self) -> str:
        """Hash everything that a reconstructed map depends on; empty if the scan has a map. The images are read."""
        return combine_hashes(self.map_settings_hash, hash_sources(self.scan)) if self.map_settings_hash else ""

    def fingerprint(self, *, quick: bool = False) -> str:
        """Hash everything that the results depend on.

        Images that are not fetched count as unchanged; with `quick`, those older than their results are not read.
        """
        return combine_hashes(self.settings_hash, hash_current_sources(self.scan, self._results, quick=quick))

    def describe_settings(self) -> dict[str, Any]:
        """Return the options that the QC record shows."""
        config, weights = self.config, self.config.segmentation.weights
        parts = (config.segmentation, config.reference, config.measurement)
        settings = {name: value for part in parts for name, value in settings_of(part).items()}
        settings |= settings_of(config.reconstruction) if self.scan.from_echoes else {}
        return {
            "model": self.model.name,
            "weights": weights.name if weights else SHIPPED_WEIGHTS,
            "device": config.resources.device,
            "threads": config.resources.omp_nthreads,
            **{name: value.name if isinstance(value, Path) else value for name, value in settings.items()},
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


def plan_run(config: RunConfig, *, quick: bool = False) -> Plan:
    """Check the options and directories, and find the scans to process; `InputError` if the run cannot start.

    Writes nothing, except that the output directory is created unless this is a dry run. With `quick`, images that are
    older than their results are taken for unchanged without reading them, and weights and device are not checked.
    """
    from bids_dgmseg.measurement.reference_region import check_reference

    segmentation, device = config.segmentation, config.resources.device
    model, warnings = choose_labels(
        get_model(segmentation.model or "default"),
        segmentation.weights,
        segmentation.label_map,
        ensemble=segmentation.ensemble,
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
    jobs = _find_jobs(config, model, scans, maps, excluded, sessions, quick=quick)
    warnings = [*warnings, *map_warnings, *mask_warnings, *alone, *(f"{line}; ignored" for line in misplaced)]
    must_load = bool(segmentation.weights) or device in ("cuda", "mps") or not weights_folder(model).is_dir()
    if jobs and not quick and model.weights and not must_load:
        check_shipped_weights(model)  # not loaded, because importing torch would delay the first scan by seconds
        if model.localizer.guard:
            check_shipped_weights(MODELS[model.localizer.guard])
    elif jobs and not quick and (must_load or not config.control.dry_run):
        from bids_dgmseg.segmentation.segment import check_ready

        warnings += check_ready(model, weights=segmentation.weights, device=device, ensemble=segmentation.ensemble)
    warnings += _find_outdated_results(config.output_dir, model, jobs)
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
    *,
    quick: bool,
) -> list[Job]:
    """List the scans without results, or with results of other images or options."""
    masks = find_scan_masks(config.reference.masks, scans, ("csf", "ventricles"), parameter="reference_mask")
    folder, echoes = config.reconstruction.brain_masks, [scan for scan in scans if scan.from_echoes]
    brains = find_scan_masks(folder, echoes, ("brain",), parameter="brain_masks")
    if folder and (missing := [scan.name for scan in echoes if scan.name not in brains]):
        raise InputError(f"{folder.name}: no mask of {list_some(missing)}; add it, or omit `brain_masks`")
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
        )
        for scan in scans
    ]
    alone = {job.scan.name: job for job in jobs}
    jobs = [replace(job, sessions=tuple(alone[one.name] for one in sessions.get(job.scan.name, ()))) for job in jobs]
    if config.control.force:
        return jobs

    def check(job: Job) -> Job | None:
        """Return the job if it must run, stating what was edited."""
        edited = find_edited(config.output_dir, job.scan, model.name, quick=quick)
        if job.correction:  # labels edited in place are safe once there is a copy among the corrections
            edited = [path for path in edited if sha256_or_error(path) != sha256_or_error(job.correction)]
        if edited:
            return replace(job, edited=_describe_edited(edited, job.scan.name))
        if not config.segmentation.corrections and (lost := _find_lost_correction(job)):
            return replace(job, edited=lost)
        # Images are read only if there are results to compare with, so that a new study starts at once.
        has_results = output_path(config.output_dir, job.scan, "dseg", ".json", seg=model.name).is_file()
        if not has_results:
            return job
        fingerprint = None if job.is_unknown else job.as_recorded.fingerprint(quick=quick)
        return None if is_done(config.output_dir, job.scan, model.name, fingerprint) else job

    with ThreadPoolExecutor(config.resources.nprocs) as pool:
        return [job for job in pool.map(check, jobs) if job]


def _find_lost_correction(job: Job) -> str:
    """Say that this run would replace results with a manual correction by automatic ones."""
    sidecar = read_optional_json(output_path(job.config.output_dir, job.scan, "dseg", ".json", seg=job.model.name))
    if not isinstance(correction := sidecar.get(CORRECTION), Mapping):
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


def _find_outdated_results(output_dir: Path, model: Model, jobs: Sequence[Job]) -> list[str]:
    """Return warnings about results of other models whose reconstructed map this run replaces."""
    outdated: dict[str, list[str]] = {}
    for job in jobs:
        if job.scan.from_echoes and models_using_map(output_dir, job.scan):
            for other in models_using_map(output_dir, job.scan, other_than=job.map_fingerprint()):
                if other != model.name:
                    outdated.setdefault(other, []).append(job.scan.name)
    return [
        f"{list_some(scans)}: results of {other} belong to another reconstruction, which this run replaces; run "
        f"`model` {other} again with the same reconstruction options"
        for other, scans in outdated.items()
    ]
