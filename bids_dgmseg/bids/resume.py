"""Resuming: whether the derivatives of a scan are complete and up to date, by hashes of all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.arguments import settings_of
from bids_dgmseg.bids.derivatives import (
    CHECKSUMS,
    MAP_CHECKSUM,
    MAP_FINGERPRINT,
    RECONSTRUCTED,
    SOURCE_FINGERPRINT,
    TOGETHER,
    find_results,
    hash_sources,
    map_paths,
)
from bids_dgmseg.bids.entities import map_sidecar, output_path
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import MeasurementOptions, ReconstructionOptions, ReferenceRegion, SegmentationOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    MISSING,
    is_broken_symlink,
    is_pointer_file,
    is_unfetched,
    read_json,
    read_optional_json,
    sha256,
    sha256_of,
    write_json,
)
from bids_dgmseg.models.registry import Model

_FAILED_SINCE = "FailedSince"
"""Key in the sidecars of results: why a later run with another map or other options failed."""

CHANGED = "the images of the scan have changed since"
"""Why results are out of date."""

GONE = "the image is not in the dataset any more"
"""Beginning of the reason why results without an input are out of date."""


def fingerprint(scan: Scan, model: Model, segmentation: SegmentationOptions, reference: ReferenceRegion) -> str:
    """Hash everything that the derivatives of a scan with a map depend on, its image included."""
    return combine_hashes(hash_settings(scan, model, segmentation, reference), hash_sources(scan))


def combine_hashes(settings: str, sources: str) -> str:
    """Combine the hash of settings with that of images to a fingerprint."""
    return sha256_of({"settings": settings, "sources": sources})


def hash_settings(
    scan: Scan,
    model: Model,
    segmentation: SegmentationOptions,
    reference: ReferenceRegion,
    *,
    reference_mask: str | None = None,
    map_settings: str = "",
    correction: str = "",
    measurement: MeasurementOptions | None = None,
    weights: Mapping[str, str] | None = None,
    measured: Mapping[str, str] | None = None,
) -> str:
    """Hash everything that the derivatives of a scan depend on, except its images.

    These are the metadata, the model with its weights and postprocessing, the options that change files, the settings
    of a reconstruction (`hash_map_settings`), the hashes of the user's reference mask and manual correction, those of
    further maps and masks (`measured`), and the program's version. A file that cannot be read has a hash, too; the step
    that reads it reports the error. With `weights` from `hash_weights`, these files are not read again.
    """
    return sha256_of(
        {
            "map": map_settings,
            "sidecar": scan.problem or scan.sidecar,
            "uri": scan.uri,
            "model": [
                model.name,
                model.labels,
                str(model.input),
                str(model.localizer),
                str(dict(model.label_numbers) or model.arch),
                str(model.postprocessing),
                model.mirrored,
                segmentation.ensemble,
            ],
            "weights": hash_weights(segmentation.weights, model) if weights is None else weights,
            "options": _hashed(segmentation) | _hashed(reference) | _hashed(measurement or MeasurementOptions()),
            **({"correction": correction} if correction else {}),
            **({"measured": dict(measured)} if measured else {}),
            "reference_mask": reference_mask,
            "version": bids_dgmseg.__version__,
        }
    )


def _hashed(options: Any) -> dict[str, Any]:
    """Return the options that change results without folders, of whose files the content is hashed."""
    return {name: value for name, value in settings_of(options).items() if not isinstance(value, Path)}


def hash_weights(folder: Path | None, model: Model) -> Mapping[str, str]:
    """Hash the files of the user's weights, or return the checksums of the model's own.

    Raises
    ------
    InputError
        If the user's weights cannot be read.
    """
    if folder is None:
        return model.weights.files if model.weights else {}
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        # training/ contains what training needs, not prediction.
        used = [path for path in paths if path.relative_to(folder).parts[:1] != ("training",)]
        return {path.relative_to(folder).as_posix(): sha256(path) for path in used}
    except OSError as error:
        raise InputError(f"{folder}: the weights cannot be read ({error}); check `weights`") from error


def hash_map_settings(scan: Scan, options: ReconstructionOptions, brain_mask: str | None) -> str:
    """Hash everything that a reconstruction depends on, except the echoes; empty if the scan has a map.

    These are the names, times and units of the echoes, the metadata of the first, the hash of the user's brain mask,
    the sign of the phase, the methods with their weights, and the program's version.
    """
    if not scan.from_echoes:
        return ""
    units = [echo.units for echo in scan.echoes]
    return sha256_of(
        {
            "echoes": scan.uris,
            "echo_times_s": [echo.time_s for echo in scan.echoes],
            "sidecar": scan.problem or scan.sidecar,
            **({"units": units} if len(set(units)) > 1 else {}),  # else those of the first echo
            "options": _hashed(options),
            "brain_mask": brain_mask,
            "version": bids_dgmseg.__version__,
        }
    )


def is_done(output_dir: Path, scan: Scan, model_name: str, fingerprint: str | None) -> bool:
    """Return whether a scan's derivatives are complete and have this fingerprint; None: any."""
    try:
        sidecar = read_json(output_path(output_dir, scan, "dseg", ".json", seg=model_name))
        files = [output_dir / name for name in sidecar["OutputFiles"]]
        current_map = read_optional_json(map_paths(output_dir, scan)[1])
        return (
            sidecar["Fingerprint"] in (fingerprint, fingerprint or sidecar["Fingerprint"])
            and _FAILED_SINCE not in sidecar
            and all(map(_is_whole, files))
            and (not scan.from_echoes or sidecar.get(MAP_FINGERPRINT) == current_map.get(MAP_FINGERPRINT))
        )
    except (OSError, InputError, KeyError, TypeError):
        return False


def _is_whole(file: Path) -> bool:
    """Return whether a file is neither missing, empty nor broken JSON; one that is not fetched counts as whole."""
    if is_broken_symlink(file):
        return True
    return file.stat().st_size > 0 and (file.suffix != ".json" or is_pointer_file(file) or bool(read_json(file)))


def find_edited(output_dir: Path, scan: Scan, model_name: str, *, quick: bool = False) -> list[Path]:
    """List the results of a scan that have changed since they were written, as labels that a person has corrected.

    Others depend on these results: labels, probabilities, table, QC record and a reconstructed map. Empty and damaged
    files and those not fetched are not listed. With `quick`, files that are older than the sidecar are not read.
    """
    sidecar = output_path(output_dir, scan, "dseg", ".json", seg=model_name)
    edited = _edited_results(sidecar, quick=quick)
    return edited + (_edited_maps(sidecar, quick=quick) if scan.from_echoes else [])


def _edited_results(sidecar: Path, *, quick: bool) -> list[Path]:
    """List the edited results of one model, from the sidecar of its labels."""
    checksums = read_optional_json(sidecar).get(CHECKSUMS)
    stem = sidecar.name.removesuffix("dseg.json")
    recorded = checksums.items() if isinstance(checksums, Mapping) else ()
    paths = {sidecar.with_name(f"{stem}{end}"): str(checksum) for end, checksum in recorded}
    return [path for path, checksum in paths.items() if _is_edited(path, checksum, since=sidecar if quick else None)]


def _edited_maps(sidecar: Path, *, quick: bool) -> list[Path]:
    """List the edited maps that were reconstructed for results."""
    edited = []
    for suffix, description in RECONSTRUCTED.items():
        path = map_sidecar(sidecar, suffix)
        content = read_optional_json(path)
        image = path.with_suffix(".nii.gz")
        is_own = content.get("Description") == description and MAP_CHECKSUM in content
        if is_own and _is_edited(image, str(content[MAP_CHECKSUM]), since=sidecar if quick else None):
            edited.append(image)
    return edited


def _is_edited(path: Path, checksum: str, *, since: Path | None) -> bool:
    """Return whether a file has another checksum; it is not read if it is older than `since`."""
    try:
        status = path.stat()
        is_older = since is not None and max(status.st_mtime, status.st_ctime) < since.stat().st_mtime
        if is_older or not status.st_size or is_pointer_file(path):
            return False
        return sha256(path) != checksum and (path.suffix != ".json" or bool(read_optional_json(path)))
    except (OSError, InputError):
        return False


def mark_outdated(
    output_dir: Path, scan: Scan, model_name: str, fingerprint: Callable[[], str], *, failure: str
) -> bool:
    """Record in the sidecar of earlier results that a run with another fingerprint failed; return if there are any.

    The fingerprint is computed only if there are results.
    """
    path = output_path(output_dir, scan, "dseg", ".json", seg=model_name)
    sidecar = read_optional_json(path)
    if "Fingerprint" not in sidecar or sidecar["Fingerprint"] == fingerprint():
        return False
    write_json({**sidecar, _FAILED_SINCE: failure}, path)
    return True


def explain_outdated(sidecar: Path) -> str | None:
    """Return why results are out of date as far as their folder shows, from their ``_dseg.json``; None if they are not.

    They were edited, a later run failed, or another reconstruction replaced the map. Files that are older than the
    sidecar are not read.
    """
    dseg = read_optional_json(sidecar)
    edited = _edited_results(sidecar, quick=True)
    if MAP_FINGERPRINT in dseg:
        edited += _edited_maps(sidecar, quick=True)
    if edited:
        names = list_some(path.name for path in edited)
        return f"{names} {'has' if len(edited) == 1 else 'have'} changed since the scan was measured"
    if failure := dseg.get(_FAILED_SINCE):
        return f"a later run failed ({' '.join(str(failure).split())})"
    if MAP_FINGERPRINT in dseg:
        current = read_optional_json(map_sidecar(sidecar)).get(MAP_FINGERPRINT)
        if current not in (None, dseg[MAP_FINGERPRINT]):  # None: tables without the map, as sites share them
            return "another reconstruction has replaced the map"
    return None


def is_of_scan(dseg: Mapping[str, Any], scan: Scan) -> bool:
    """Return whether the results with this ``_dseg.json`` depend on the images of a scan.

    Not if they were measured on another map: the scans of a search that was not told of its dataset may have the same
    names. Results from echoes depend on any map of the scan, which replaces them.
    """
    return MAP_FINGERPRINT in dseg or dseg.get("SpatialReference", MISSING) in (MISSING, scan.uri)


def find_changed(output_dir: Path, scan: Scan) -> list[str]:
    """List the ``_stats.tsv`` of a scan whose map, or echoes, have changed since.

    Files are hashed only if they are more recent than the results.
    """
    if any(map(is_unfetched, scan.files)):
        return []
    try:
        latest = last_change(scan.files)
        sidecars = [path for path in find_results(output_dir, scan) if path.stat().st_mtime <= latest]
    except OSError:
        return []
    contents = {path: read_optional_json(path) for path in sidecars}
    recorded = {path: dseg.get(SOURCE_FINGERPRINT) for path, dseg in contents.items() if is_of_scan(dseg, scan)}
    current = hash_sources(scan) if any(recorded.values()) else None
    return [
        path.name.replace("_dseg.json", "_stats.tsv") for path, mark in recorded.items() if mark not in (None, current)
    ]


def find_changed_sessions(output_dir: Path, scans: Sequence[Scan], changed: Collection[str]) -> list[str]:
    """List the ``_stats.tsv`` of scans that were labelled with other sessions whose maps (BIDS URIs) have changed."""
    sidecars = [path for scan in scans for path in find_results(output_dir, scan)] if changed else []
    return [
        path.name.replace("_dseg.json", "_stats.tsv")
        for path in sidecars
        if not set(changed).isdisjoint(read_optional_json(path).get(TOGETHER, ()))
    ]


def hash_current_sources(scan: Scan, results: Path, *, quick: bool = False) -> str:
    """Hash the images of a scan, or return the hash in the ``_dseg.json`` of its results if they are not fetched.

    With `quick`, images that are older than the results are not read either.
    """
    try:
        unchanged = quick and last_change(scan.files) < results.stat().st_mtime
    except OSError:
        unchanged = False
    known = unchanged or (results.is_file() and any(map(is_unfetched, scan.files)))
    recorded = read_optional_json(results).get(SOURCE_FINGERPRINT) if known else None
    return str(recorded) if recorded else hash_sources(scan)


def last_change(paths: Iterable[Path]) -> float:
    """Return when files, or links to them, have changed; the time of the status shows those replaced by older ones."""
    files = [status for path in paths for status in (path.stat(), path.lstat())]
    return max(time for file in files for time in (file.st_mtime, file.st_ctime))
