"""Names, fingerprints and completeness of the derivatives of a scan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import ReferenceRegion, Segmentation
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json, read_optional_json, sha256, sha256_of, sha256_or_error
from bids_dgmseg.models.registry import Model

MAP_FINGERPRINT = "MapFingerprint"
"""Key in the sidecars of a reconstructed map and of the results from it."""

MAP_DESCRIPTION = "Magnetic susceptibility, reconstructed by bids_dgmseg"


def output_path(output_dir: Path, scan: Scan, suffix: str, extension: str, **entities: str) -> Path:
    """Return the path of a derivative.

    Parameters
    ----------
    output_dir : path
        The derivative dataset.
    scan : Scan
        Provides the first entities. If both it and `entities` have ``desc``, the values are joined: ``rts`` and
        ``dgm16`` become ``desc-rtsDgm16``.
    suffix, extension : str
        For example ``dseg`` and ``.nii.gz``.
    **entities : str
        Further entities, such as ``seg="dgm16"``.
    """
    session = [f"ses-{scan.session}"] if scan.session else []
    folder = output_dir.joinpath(f"sub-{scan.participant}", *session, "anat")
    return folder / f"{output_stem(scan, **entities)}_{suffix}{extension}"


def output_stem(scan: Scan, **entities: str) -> str:
    """Return the name of a derivative without suffix and extension; see `output_path`."""
    own, given = scan.entities.get("desc", ""), entities.get("desc", "")
    joined = {"desc": own + given[:1].upper() + given[1:]} if own and given else {}
    return join_entities({**scan.named_entities, **entities, **joined})


def fingerprint(
    scan: Scan,
    model: Model,
    segmentation: Segmentation,
    reference: ReferenceRegion,
    *,
    reference_mask: Path | None = None,
    reconstruction: str = "",
) -> str:
    """Hash everything that the derivatives of a scan depend on.

    These are the content of the map or its reconstruction (`map_fingerprint`) and of the user's mask, the metadata, the
    model with its weights and postprocessing, the options that change files, and the program's version. Files that
    cannot be read have a fingerprint, too; the step that reads them reports the error.

    Raises
    ------
    InputError
        If the user's weights cannot be read.
    """
    return sha256_of(
        {
            "chi": reconstruction or sha256_or_error(scan.chi),
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
            "weights": _hash_weights(segmentation.weights, model),
            "masks": segmentation.masks,
            "viewer": segmentation.viewer,
            "reference": [reference.kind, reference.structure, reference.masks is not None],
            "reference_mask": sha256_or_error(reference_mask) if reference_mask else None,
            "version": bids_dgmseg.__version__,
        }
    )


def _hash_weights(folder: Path | None, model: Model) -> Mapping[str, str]:
    if folder is None:
        return model.weights.files if model.weights else {}
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        # training/ contains what training needs, not prediction.
        used = [path for path in paths if path.relative_to(folder).parts[:1] != ("training",)]
        return {path.relative_to(folder).as_posix(): sha256(path) for path in used}
    except OSError as error:
        raise InputError(f"{folder}: the weights cannot be read ({error}); check --weights") from error


def is_done(output_dir: Path, scan: Scan, model_name: str, fingerprint: str) -> bool:
    """Return whether a scan's derivatives are complete and have this fingerprint."""
    try:
        sidecar = read_json(output_path(output_dir, scan, "dseg", ".json", seg=model_name))
        files = [output_dir / name for name in sidecar["OutputFiles"]]
        return (
            bool(sidecar["Fingerprint"] == fingerprint)
            and all(file.stat().st_size > 0 and (file.suffix != ".json" or read_json(file)) for file in files)
            and (not scan.from_echoes or _is_from_current_map(output_dir, scan, sidecar))
        )
    except (OSError, InputError, KeyError, TypeError):
        return False


def map_fingerprint(scan: Scan, phase_sign: str, brain_mask: Path | None) -> str:
    """Hash everything that a reconstruction depends on; empty if the scan has a map.

    These are the content of the echoes and of the user's brain mask, the metadata, the sign of the phase and the
    program's version.
    """
    if not scan.from_echoes:
        return ""
    return sha256_of(
        {
            "echoes": [(uri, sha256_or_error(path)) for uri, path in zip(scan.uris, scan.files, strict=True)],
            "echo_times_s": [echo.time_s for echo in scan.echoes],
            "sidecar": scan.problem or scan.sidecar,
            "phase_sign": phase_sign,
            "brain_mask": brain_mask and sha256_or_error(brain_mask),
            "version": bids_dgmseg.__version__,
        }
    )


def map_paths(output_dir: Path, scan: Scan) -> tuple[Path, Path]:
    """Return the paths of the reconstructed map of a scan, one for all models, and of its sidecar."""
    return output_path(output_dir, scan, "Chimap", ".nii.gz"), output_path(output_dir, scan, "Chimap", ".json")


def is_own_map(sidecar: Path) -> bool:
    """Return whether a map was reconstructed by this program."""
    return read_optional_json(sidecar).get("Description") == MAP_DESCRIPTION


def is_outdated(output_dir: Path, scan: Scan, model_name: str) -> bool:
    """Return whether a model's results were computed from another reconstruction than the current map."""
    dseg = read_optional_json(output_path(output_dir, scan, "dseg", ".json", seg=model_name))
    return MAP_FINGERPRINT in dseg and not _is_from_current_map(output_dir, scan, dseg)


def _is_from_current_map(output_dir: Path, scan: Scan, dseg: Mapping[str, Any]) -> bool:
    current = read_optional_json(map_paths(output_dir, scan)[1])
    return bool(dseg.get(MAP_FINGERPRINT) == current.get(MAP_FINGERPRINT))


def models_using_map(output_dir: Path, scan: Scan, *, other_than: str | None = None) -> list[str]:
    """List the models with results from a reconstructed map of a scan, except from the map with one fingerprint."""
    pattern = output_path(output_dir, scan, "dseg", ".json", seg="*")
    found = (read_optional_json(path) for path in sorted(pattern.parent.glob(pattern.name)))
    return [str(dseg.get("Model")) for dseg in found if dseg.get(MAP_FINGERPRINT, other_than) != other_than]
