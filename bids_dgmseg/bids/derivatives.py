"""Derivatives of a scan: their names, and how they are written."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import (
    atomic_write,
    copy_file,
    read_optional_json,
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

SOURCE_FINGERPRINT = "SourceFingerprint"
"""Key in the sidecars of results: the content of the map or of the echoes that they were computed from."""

SCANNER_FIELDS = (
    "InstitutionName",
    "Manufacturer",
    "ManufacturersModelName",
    "DeviceSerialNumber",
    "MagneticFieldStrength",
)
"""Sidecar fields that identify a scanner; the QC record of a scan keeps them."""

RECONSTRUCTED: Mapping[str, str] = {
    "Chimap": "Magnetic susceptibility, reconstructed by bids_dgmseg",
    "R2starmap": "Rate of the decay of the magnitude, R2*, fitted by bids_dgmseg",
}
"""Suffix of the maps made from echoes → description in the sidecar, by which they are told from maps of the user."""

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


def map_paths(output_dir: Path, scan: Scan, suffix: str = "Chimap") -> tuple[Path, Path]:
    """Return the paths of a map made from the echoes of a scan, one for all models, and of its sidecar."""
    return output_path(output_dir, scan, suffix, ".nii.gz"), output_path(output_dir, scan, suffix, ".json")


def find_results(output_dir: Path, scan: Scan) -> list[Path]:
    """List the ``_dseg.json`` of a scan, one per model with results."""
    pattern = output_path(output_dir, scan, "dseg", ".json", seg="*")
    return sorted(pattern.parent.glob(pattern.name))


def hash_sources(scan: Scan) -> str:
    """Hash the content of the map, or of the echoes."""
    return sha256_of({"files": [sha256_or_error(path) for path in scan.files]})


def models_using_map(output_dir: Path, scan: Scan, *, other_than: str | None = None) -> list[str]:
    """List the models with results from a reconstructed map of a scan, except from the map with one fingerprint."""
    found = (read_optional_json(path) for path in find_results(output_dir, scan))
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
    r2star: Path | None = None,
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
        Plane → PNG, ``viewer`` → HTML unless it is omitted, ``reconstruction`` → PNG if the map was reconstructed.
    regions : mapping of str to path
        Region of the head (``brain``, ``cerebellum``, ``ventricles``) → mask on the scan's own grid.
    chi, r2star : path, optional
        The map, if it was reconstructed, and R2* from the same echoes.
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
    _remove_earlier_results(output_dir, scan, model, maps={"Chimap": chi, "R2starmap": r2star})
    uri = f"bids::{map_paths(output_dir, scan)[0].relative_to(output_dir).as_posix()}" if chi else scan.uri
    common = {"Sources": [uri], "SpatialReference": scan.uri}
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
    for suffix, made in {"Chimap": chi, "R2starmap": r2star}.items():
        if made is not None:
            steps = quality["reconstruction"]
            about = {**MAP_SIDECAR, **steps} if suffix == "Chimap" else _describe_r2star(steps)
            path, path_json = map_paths(output_dir, scan, suffix)
            about = {"Description": RECONSTRUCTED[suffix], "Sources": scan.uris, **about, **made_from}
            written += [write_json(about, path_json), copy_file(made, path)]
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
        SOURCE_FINGERPRINT: hash_sources(scan),
        **made_from,
        "OutputFiles": [file.relative_to(output_dir).as_posix() for file in written],
    }
    return [*written, write_json(sidecar, output_path(output_dir, scan, "dseg", ".json", seg=model.name))]


def _describe_r2star(steps: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: steps[name] for name in ("EchoTime", "MagneticFieldStrength", "BrainMask")}
    return {"Units": "1/s", "SkullStripped": True, **kept, "EstimationAlgorithm": steps["R2starFit"]}


def save_refused(output_dir: Path, scan: Scan, model: Model, *, figure: Path, record: Mapping[str, Any]) -> None:
    """Write the figure and the record of a reconstruction whose map is not usable, for the page of the participant."""
    copy_file(figure, _figure_path(output_dir, scan, model, "refused", ".png"))
    write_json(
        {"scan": scan.name, "model": model.name, **record}, _figure_path(output_dir, scan, model, "refused", ".json")
    )


def remove_refused(output_dir: Path, scan: Scan, model: Model) -> None:
    """Remove what `save_refused` has written in an earlier run."""
    for extension in (".png", ".json"):
        _figure_path(output_dir, scan, model, "refused", extension).unlink(missing_ok=True)


def _remove_earlier_results(output_dir: Path, scan: Scan, model: Model, *, maps: Mapping[str, Path | None]) -> None:
    """Remove the mark of completeness and what this run does not replace; never a map of the user."""
    own = {}
    for suffix, made in maps.items():
        path, sidecar = map_paths(output_dir, scan, suffix)
        own[suffix] = read_optional_json(sidecar).get("Description") == RECONSTRUCTED[suffix]
        if made and path.exists() and not own[suffix]:
            raise InputError(
                f"{path.name}: exists in {output_dir.name}, but was not reconstructed by this program; move it into "
                "another dataset, or choose another output folder"
            )
    outdated = [output_path(output_dir, scan, "dseg", ".json", seg=model.name)]
    outdated.append(_figure_path(output_dir, scan, model, "viewer", ".html"))
    outdated.append(_figure_path(output_dir, scan, model, "reconstruction", ".png"))
    for label in [*(structure.bids_label for structure in model.structures), *REGIONS]:
        outdated += [_mask_path(output_dir, scan, model, label, extension) for extension in (".json", ".nii.gz")]
    for path in outdated:
        path.unlink(missing_ok=True)
    remove_refused(output_dir, scan, model)
    is_input = map_paths(output_dir, scan)[0].resolve() == scan.chi.resolve()
    if not maps["Chimap"] and (is_input or models_using_map(output_dir, scan)):
        return
    # Maps that were reconstructed before the scan had one of the user, and R2* before it had a single echo.
    for suffix, made in maps.items():
        if not made and own[suffix]:
            for path in map_paths(output_dir, scan, suffix):
                path.unlink(missing_ok=True)


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
