"""Derivatives of a scan: their names, when they are complete and up to date, and how they are written."""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import ReferenceRegion, Segmentation
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import (
    atomic_write,
    copy_file,
    read_json,
    read_optional_json,
    sha256,
    sha256_of,
    sha256_or_error,
    write_bytes,
    write_json,
    write_text,
)
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.registry import Model

MAP_FINGERPRINT = "MapFingerprint"
"""Key in the sidecars of a reconstructed map and of the results from it."""

_SOURCE_FINGERPRINT = "SourceFingerprint"
"""Key in the sidecars of results: the content of the map or of the echoes that they were computed from."""

_FAILED_SINCE = "FailedSince"
"""Key in the sidecars of results: why a later run with another map or other options failed."""

MAP_DESCRIPTION = "Magnetic susceptibility, reconstructed by bids_dgmseg"

REGIONS: Mapping[str, str] = {
    "brain": "Brain within the field of view of the map",
    "cerebellum": "Cerebellum",
    "ventricles": "Lateral ventricles",
}
"""Region of the head → description of its mask."""

MAP_SIDECAR: Mapping[str, Any] = {"Units": "ppm", "SkullStripped": True, "SusceptibilityReference": "whole brain"}
"""Metadata of every reconstructed map."""


def output_path(output_dir: Path, scan: Scan, suffix: str, extension: str, **entities: str) -> Path:
    """Return the path of a derivative, such as its ``dseg`` ``.nii.gz`` with ``seg="dgm16"``.

    The scan provides the first entities. If both it and `entities` have ``desc``, the values are joined: ``rts`` and
    ``dgm16`` become ``desc-rtsDgm16``.
    """
    session = [f"ses-{scan.session}"] if scan.session else []
    folder = output_dir.joinpath(f"sub-{scan.participant}", *session, "anat")
    return folder / f"{_stem(scan, **entities)}_{suffix}{extension}"


def _stem(scan: Scan, **entities: str) -> str:
    own, given = scan.entities.get("desc", ""), entities.get("desc", "")
    joined = {"desc": own + given[:1].upper() + given[1:]} if own and given else {}
    return join_entities({**scan.named_entities, **entities, **joined})


def _figure_path(output_dir: Path, scan: Scan, model: Model, name: str, extension: str) -> Path:
    return output_dir / "figures" / f"{_stem(scan, seg=model.name, desc=name)}_dseg{extension}"


def _mask_path(output_dir: Path, scan: Scan, model: Model, label: str, extension: str) -> Path:
    """Return the path of a mask; the model is in ``desc``, because BIDS does not allow ``seg`` for masks."""
    return output_path(output_dir, scan, "mask", extension, label=label, desc=model.name)


def _map_paths(output_dir: Path, scan: Scan) -> tuple[Path, Path]:
    """Return the paths of the reconstructed map of a scan, one for all models, and of its sidecar."""
    return output_path(output_dir, scan, "Chimap", ".nii.gz"), output_path(output_dir, scan, "Chimap", ".json")


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
            and _FAILED_SINCE not in sidecar
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


def mark_outdated(output_dir: Path, scan: Scan, model_name: str, fingerprint: str, *, failure: str) -> bool:
    """Record in the sidecar of earlier results that a run with another fingerprint failed; return if there are any."""
    path = output_path(output_dir, scan, "dseg", ".json", seg=model_name)
    sidecar = read_optional_json(path)
    if sidecar.get("Fingerprint") in (None, fingerprint):
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
    pattern = output_path(output_dir, scan, "dseg", ".json", seg="*")
    try:
        files = [path.stat() for path in scan.files]
        # the time of the status also changes if a file is replaced by an older one
        latest = max(time for file in files for time in (file.st_mtime, file.st_ctime))
        sidecars = [path for path in pattern.parent.glob(pattern.name) if path.stat().st_mtime <= latest]
    except OSError:  # not fetched
        return []
    recorded = {path: read_optional_json(path).get(_SOURCE_FINGERPRINT) for path in sorted(sidecars)}
    current = _hash_sources(scan) if any(recorded.values()) else None
    return [
        path.name.replace("_dseg.json", "_stats.tsv") for path, mark in recorded.items() if mark not in (None, current)
    ]


def _hash_sources(scan: Scan) -> str:
    return sha256_of({"files": [sha256_or_error(path) for path in scan.files]})


def _is_from_current_map(output_dir: Path, scan: Scan, dseg: Mapping[str, Any]) -> bool:
    current = read_optional_json(_map_paths(output_dir, scan)[1])
    return bool(dseg.get(MAP_FINGERPRINT) == current.get(MAP_FINGERPRINT))


def models_using_map(output_dir: Path, scan: Scan, *, other_than: str | None = None) -> list[str]:
    """List the models with results from a reconstructed map of a scan, except from the map with one fingerprint."""
    pattern = output_path(output_dir, scan, "dseg", ".json", seg="*")
    found = (read_optional_json(path) for path in sorted(pattern.parent.glob(pattern.name)))
    return [str(dseg.get("Model")) for dseg in found if dseg.get(MAP_FINGERPRINT, other_than) != other_than]


def save_scan(
    output_dir: Path,
    scan: Scan,
    model: Model,
    *,
    out_dseg: Path,
    out_probseg: Path,
    stats: Path,
    quality: Mapping[str, Any],
    box_mm: Mapping[str, Any],
    masks: bool,
    fingerprint: str,
    figures: Mapping[str, Path],
    regions: Mapping[str, Path],
    chi: Path | None = None,
    reconstruction: str = "",
) -> list[Path]:
    """Write all derivatives of one scan, replacing those of an earlier run.

    The sidecar of the dseg is written last and lists the others: if it exists, the scan is complete.

    Parameters
    ----------
    output_dir : path
        The derivative dataset.
    scan : Scan
    model : Model
    out_dseg, out_probseg : path
        NIfTI files on the scan's own grid: labels of ``structures.tsv``, and one volume per nucleus of the model.
    stats : path
        Table of ``measure_nuclei``.
    quality : mapping
        Content of ``_qc.json``, with ``input`` and, if the map was reconstructed, ``reconstruction``.
    box_mm : mapping
        Corners ``low`` and ``high`` of the localizer's box, RAS+ mm.
    masks : bool
        Whether to write one binary mask per nucleus and hemisphere, and those of `regions`.
    fingerprint : str
        From `fingerprint`.
    figures : mapping of str to path
        Plane → PNG, and ``viewer`` → HTML unless it is omitted.
    regions : mapping of str to path
        Region of the head (``brain``, ``cerebellum``, ``ventricles``) → mask on the scan's own grid.
    chi : path, optional
        The map, if it was reconstructed.
    reconstruction : str
        From `map_fingerprint`.

    Returns
    -------
    list of path
        The files written.

    Raises
    ------
    InputError
        If the reconstructed map would replace a map of the user.
    """
    map_path, map_sidecar = _map_paths(output_dir, scan)
    is_own_map = read_optional_json(map_sidecar).get("Description") == MAP_DESCRIPTION
    if chi and map_path.exists() and not is_own_map:
        raise InputError(
            f"{map_path.name}: exists in {output_dir.name}, but was not reconstructed by this program; move it into "
            "another dataset, or choose another output folder"
        )
    uri = f"bids::{map_path.relative_to(output_dir).as_posix()}" if chi else scan.uri
    common = {"Sources": [uri], "SpatialReference": scan.uri}
    dseg_sidecar = output_path(output_dir, scan, "dseg", ".json", seg=model.name)
    # The sidecar marks completeness; this run may not write masks and viewer.
    dseg_sidecar.unlink(missing_ok=True)
    _figure_path(output_dir, scan, model, "viewer", ".html").unlink(missing_ok=True)
    for label in [*(structure.bids_label for structure in model.structures), *REGIONS]:
        for extension in (".json", ".nii.gz"):
            _mask_path(output_dir, scan, model, label, extension).unlink(missing_ok=True)
    if not chi and map_path.resolve() != scan.chi.resolve() and is_own_map and not models_using_map(output_dir, scan):
        map_path.unlink(missing_ok=True)  # it was reconstructed before the scan had a map of the user
        map_sidecar.unlink(missing_ok=True)
    written = []
    for suffix, source in {"dseg": out_dseg, "probseg": out_probseg, "stats": stats}.items():
        extension = ".tsv" if source.suffix == ".tsv" else ".nii.gz"
        written.append(output_path(output_dir, scan, suffix, extension, seg=model.name))
        if source.suffix == ".nii":
            write_bytes(gzip.compress(source.read_bytes(), compresslevel=6, mtime=0), written[-1])
        else:
            copy_file(source, written[-1])
    for name, figure in figures.items():
        written.append(copy_file(figure, _figure_path(output_dir, scan, model, name, figure.suffix)))
    made_from = {MAP_FINGERPRINT: reconstruction} if reconstruction else {}
    if chi:
        about = {"Description": MAP_DESCRIPTION, **MAP_SIDECAR, "Sources": scan.uris, **quality["reconstruction"]}
        written += [copy_file(chi, map_path), write_json({**about, **made_from}, map_sidecar)]
    written += _write_texts(output_dir, scan, model, stats, quality, common)
    if masks:
        written += _write_masks(output_dir, scan, model, out_dseg, regions, common)
    prepared = quality.get("input", {})
    sidecar = {
        "Description": f"Deep gray nuclei by model {model.name}; labels in the table; left is the patient's left",
        **common,
        "Manual": False,
        "Model": model.name,
        "ModelTitle": model.title,
        "BoxLow": list(box_mm["low"]),
        "BoxHigh": list(box_mm["high"]),
        "BoxUnits": "mm, RAS+",
        "BoxRotation": list(box_mm.get("rotation_deg", (0.0, 0.0, 0.0))),
        "InputUnits": prepared.get("units", "n/a"),
        "InputUnitsFrom": prepared.get("units_from", "n/a"),
        "InputReference": prepared.get("reference", "n/a"),
        "ProgramVersion": bids_dgmseg.__version__,
        "Fingerprint": fingerprint,
        _SOURCE_FINGERPRINT: _hash_sources(scan),
        **made_from,
        "OutputFiles": [file.relative_to(output_dir).as_posix() for file in written],
    }
    return [*written, write_json(sidecar, dseg_sidecar)]


def _write_texts(
    output_dir: Path, scan: Scan, model: Model, stats: Path, quality: Mapping[str, Any], common: Mapping[str, Any]
) -> list[Path]:
    """Write the label table, the data dictionary, the QC record and the sidecar of the probabilities."""
    with stats.open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\r\n").split("\t")
    dictionary: dict[str, Any] = {column: STATS_COLUMNS[column] for column in columns if column in STATS_COLUMNS}
    if quality.get("reference"):
        dictionary["SusceptibilityReference"] = quality["reference"]
    about = {"Description": f"Probability of each nucleus, one volume per nucleus, by model {model.name}"}
    contents = {"stats": dictionary, "qc": quality, "probseg": {**about, **common, "LabelMap": list(model.labels)}}
    table = output_path(output_dir, scan, "dseg", ".tsv", seg=model.name)
    return [
        write_text(label_table(model.structures), table),
        *(
            write_json(content, output_path(output_dir, scan, suffix, ".json", seg=model.name))
            for suffix, content in contents.items()
        ),
    ]


def _write_masks(
    output_dir: Path,
    scan: Scan,
    model: Model,
    out_dseg: Path,
    regions: Mapping[str, Path],
    common: Mapping[str, Any],
) -> list[Path]:
    """Write one binary mask per nucleus and hemisphere on the grid of the dseg, and those of the regions."""
    import numpy as np

    from bids_dgmseg.io.nifti import load_image

    dseg = load_image(out_dseg)
    labels = np.asanyarray(dseg.dataobj)
    written = []
    for structure in model.structures:
        image = type(dseg)((labels == structure.index).astype(np.uint8), None, dseg.header)
        image.set_data_dtype(np.uint8)
        path, sidecar = (_mask_path(output_dir, scan, model, structure.bids_label, end) for end in (".nii.gz", ".json"))
        with atomic_write(path) as temporary:
            image.to_filename(temporary)
        about = {"Description": f"Voxels of the {structure.name} by model {model.name}", "Type": "ROI"}
        written += [path, write_json({**about, **common}, sidecar)]
    for region, source in regions.items():
        path, sidecar = (_mask_path(output_dir, scan, model, region, end) for end in (".nii.gz", ".json"))
        about = {"Description": f"{REGIONS[region]} by the localizer of model {model.name}"}
        kind = {"Type": "Brain" if region == "brain" else "ROI"}
        written += [copy_file(source, path), write_json({**about, **kind, **common}, sidecar)]
    return written
