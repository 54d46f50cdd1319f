"""Whether the derivatives of a scan are complete and up to date."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import bids_dgmseg
from bids_dgmseg.bids.derivatives import (
    MAP_FINGERPRINT,
    SOURCE_FINGERPRINT,
    find_results,
    hash_sources,
    map_paths,
    output_path,
)
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import ReconstructionOptions, ReferenceRegion, Segmentation
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json, read_optional_json, sha256, sha256_of, sha256_or_error, write_json
from bids_dgmseg.models.registry import Model

_FAILED_SINCE = "FailedSince"
"""Key in the sidecars of results: why a later run with another map or other options failed."""


def fingerprint(
    scan: Scan,
    model: Model,
    segmentation: Segmentation,
    reference: ReferenceRegion,
    *,
    reference_mask: Path | None = None,
    reconstruction: str = "",
    sources: str = "",
    weights: Mapping[str, str] | None = None,
) -> str:
    """Hash everything that the derivatives of a scan depend on.

    These are the content of the map or its reconstruction (`map_fingerprint`) and of the user's mask, the metadata, the
    model with its weights and postprocessing, the options that change files, and the program's version. Files that
    cannot be read have a fingerprint, too; the step that reads them reports the error. With `sources` from
    `hash_sources` and `weights` from `hash_weights`, these files are not read again.
    """
    return sha256_of(
        {
            "chi": reconstruction or sources or hash_sources(scan),
            "sidecar": scan.problem or scan.sidecar,
            "uri": scan.uri,
            "model": [
                model.name,
                model.labels,
                str(model.input),
                str(model.localizer),
                str(model.arch),
                str(model.postprocessing),
                model.mirrored,
                model.ensemble,
            ],
            "weights": hash_weights(segmentation.weights, model) if weights is None else weights,
            "masks": segmentation.masks,
            "viewer": segmentation.viewer,
            **({"bilateral": True} if segmentation.bilateral else {}),
            "reference": [reference.kind, reference.structure, reference.masks is not None],
            "reference_mask": sha256_or_error(reference_mask) if reference_mask else None,
            "version": bids_dgmseg.__version__,
        }
    )


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
        raise InputError(f"{folder}: the weights cannot be read ({error}); check --weights") from error


def map_fingerprint(scan: Scan, options: ReconstructionOptions, brain_mask: Path | None, *, sources: str = "") -> str:
    """Hash everything that a reconstruction depends on; empty if the scan has a map.

    These are the content of the echoes and of the user's brain mask, the metadata, the sign of the phase, the methods
    and the program's version.
    """
    if not scan.from_echoes:
        return ""
    return sha256_of(
        {
            "echoes": [scan.uris, sources or hash_sources(scan)],
            "echo_times_s": [echo.time_s for echo in scan.echoes],
            "sidecar": scan.problem or scan.sidecar,
            "phase_sign": options.phase_sign,
            "methods": [options.unwrapping, options.background, options.inversion],
            "brain_mask": brain_mask and sha256_or_error(brain_mask),
            "version": bids_dgmseg.__version__,
        }
    )


def is_done(output_dir: Path, scan: Scan, model_name: str, fingerprint: str) -> bool:
    """Return whether a scan's derivatives are complete and have this fingerprint."""
    try:
        sidecar = read_json(output_path(output_dir, scan, "dseg", ".json", seg=model_name))
        files = [output_dir / name for name in sidecar["OutputFiles"]]
        current_map = read_optional_json(map_paths(output_dir, scan)[1])
        return (
            bool(sidecar["Fingerprint"] == fingerprint)
            and _FAILED_SINCE not in sidecar
            and all(file.stat().st_size > 0 and (file.suffix != ".json" or read_json(file)) for file in files)
            and (not scan.from_echoes or sidecar.get(MAP_FINGERPRINT) == current_map.get(MAP_FINGERPRINT))
        )
    except (OSError, InputError, KeyError, TypeError):
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

    A later run failed, or another reconstruction replaced the map.
    """
    dseg = read_optional_json(sidecar)
    if failure := dseg.get(_FAILED_SINCE):
        return f"a later run failed ({' '.join(str(failure).split())})"
    if MAP_FINGERPRINT in dseg:
        stem = re.sub("_seg-[^_]+", "", sidecar.name.removesuffix("_dseg.json"))
        current = read_optional_json(sidecar.with_name(f"{stem}_Chimap.json")).get(MAP_FINGERPRINT)
        if current not in (None, dseg[MAP_FINGERPRINT]):  # None: tables without the map, as sites share them
            return "another reconstruction has replaced the map"
    return None


def find_changed(output_dir: Path, scan: Scan) -> list[str]:
    """List the ``_stats.tsv`` of a scan whose map, or echoes, have changed since.

    Files are hashed only if they are more recent than the results.
    """
    try:
        latest = _last_change(scan)
        sidecars = [path for path in find_results(output_dir, scan) if path.stat().st_mtime <= latest]
    except OSError:  # not fetched
        return []
    recorded = {path: read_optional_json(path).get(SOURCE_FINGERPRINT) for path in sidecars}
    current = hash_sources(scan) if any(recorded.values()) else None
    return [
        path.name.replace("_dseg.json", "_stats.tsv") for path, mark in recorded.items() if mark not in (None, current)
    ]


def hash_unless_older(scan: Scan, results: Path) -> str:
    """Return the hash in the ``_dseg.json`` of results if the images have not changed since, otherwise hash them."""
    try:
        unchanged = _last_change(scan) < results.stat().st_mtime
    except OSError:
        unchanged = False
    recorded = read_optional_json(results).get(SOURCE_FINGERPRINT) if unchanged else None
    return str(recorded) if recorded else hash_sources(scan)


def _last_change(scan: Scan) -> float:
    """Return when the images of a scan have changed; the time of the status shows files replaced by older ones, too."""
    files = [path.stat() for path in scan.files]
    return max(time for file in files for time in (file.st_mtime, file.st_ctime))
