"""Derivatives of a scan: their names, and how they are written."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.corrections import AUTOMATIC, write_automatic
from bids_dgmseg.bids.current import MAP_CHECKSUM, write_record
from bids_dgmseg.bids.entities import ScanName, output_path, split_entities, stem_with
from bids_dgmseg.bids.output_dataset import FIELDS, label_table
from bids_dgmseg.bids.sample_figures import find_sample_figures
from bids_dgmseg.bids.standard_space import find_standard, write_standard
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import (
    atomic_write,
    copy_file,
    read_optional_json,
    sha256,
    write_bytes,
    write_json,
    write_text,
)
from bids_dgmseg.measurement.columns import STATS_COLUMNS, describe_sampled
from bids_dgmseg.models.registry import Model

CORRECTION = "Correction"
"""Key in the sidecars of labels that a person has corrected."""

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
"""Suffix of the maps reconstructed from echoes → description in the sidecar, which distinguishes them."""

REGIONS: Mapping[str, str] = {
    "brain": "Brain within the field of view of the map",
    "cerebellum": "Cerebellum",
    "ventricles": "Lateral ventricles",
}
"""Region of the head → description of its mask."""

_CHECKED = ("_dseg.nii.gz", "_probseg.nii.gz", "_stats.tsv", "_Chimap.nii.gz", "_R2starmap.nii.gz")
"""Ends of the names of results whose content the record states, because other results and tables depend on it."""

MAP_SIDECAR: Mapping[str, Any] = {"Units": "ppm", "SkullStripped": True, "SusceptibilityReference": "whole brain"}
"""Metadata of every reconstructed map."""


def _figure_path(output_dir: Path, scan: ScanName, model: Model, name: str, extension: str) -> Path:
    return output_dir / "figures" / f"{stem_with(scan, seg=model.name, desc=name)}_dseg{extension}"


def _mask_path(output_dir: Path, scan: ScanName, model: Model, label: str, extension: str) -> Path:
    """Return the path of a mask; the model is in ``desc``, because BIDS does not allow ``seg`` for masks."""
    space = {} if "space" in scan.entities else {"space": "orig"}
    return output_path(output_dir, scan, "mask", extension, **space, label=label, desc=model.name)


def map_paths(output_dir: Path, scan: ScanName, suffix: str = "Chimap") -> tuple[Path, Path]:
    """Return the paths of a map reconstructed from the echoes of a scan, one for all models, and of its sidecar."""
    return output_path(output_dir, scan, suffix, ".nii.gz"), output_path(output_dir, scan, suffix, ".json")


def _field_path(output_dir: Path, scan: ScanName, name: str, extension: str) -> Path:
    """Return the path of a step of a reconstruction; the brain mask is named as those that users provide."""
    if name == "brain":
        return output_path(output_dir, scan, "mask", extension, desc="brain")
    path = output_path(output_dir, scan, "fieldmap", extension, desc=name)
    return path.parents[1] / "fmap" / path.name


def find_results(output_dir: Path, scan: ScanName) -> list[Path]:
    """List the ``_dseg.json`` of a scan, one per model with results."""
    own = output_path(output_dir, scan, "dseg", ".json", seg="*")
    return sorted(at for at in own.parent.glob(own.name) if {*split_entities(at.stem)} == {"seg", *scan.named_entities})


def save_scan(
    output_dir: Path,
    scan: ScanName,
    model: Model,
    *,
    out_dseg: Path,
    out_probseg: Path,
    stats: Path,
    record: Mapping[str, Any],
    masks: bool,
    made_from: Mapping[str, Any],
    figures: Mapping[str, Path],
    regions: Mapping[str, Path],
    sources: Sequence[str],
    source_file: Path | None = None,
    chi: Path | None = None,
    r2star: Path | None = None,
    fields: Mapping[str, Path] | None = None,
    automatic: Path | None = None,
    correction: Mapping[str, Any] | None = None,
    standard: Mapping[str, Path] | None = None,
    output_space: str = "",
) -> list[Path]:
    """Write all derivatives of one scan, replacing those of an earlier run.

    The record (``_qc.json``) is written last and lists the others: if it exists, the scan is complete.

    Parameters
    ----------
    output_dir : path
        The derivative dataset.
    scan, model
    out_dseg, out_probseg : path
        NIfTI files on the scan's own grid: labels of ``structures.tsv``, and one volume per nucleus of the model.
    stats : path
        Table of ``measure_nuclei``.
    record : mapping
        Content of ``_qc.json`` (`bids_dgmseg.bids.qc_record.build_qc_record`).
    masks : bool
        Whether to write one binary mask per nucleus and hemisphere, and those of `regions`.
    made_from : mapping
        What the results depend on, from `bids_dgmseg.bids.current.MadeFrom.describe`.
    figures : mapping of str to path
        Plane → PNG, ``viewer`` → HTML unless it is omitted, ``reconstruction`` → PNG if the map was reconstructed,
        `bids_dgmseg.bids.sample_figures.sample_figure` → PNG for each further map.
    regions : mapping of str to path
        Region of the head (``brain``, ``cerebellum``, ``ventricles``) → mask on the scan's own grid.
    sources : sequence of str
        BIDS URIs of the map, or of the echoes that it was reconstructed from; the first defines the grid.
    source_file : path, optional
        File of the first source, which is never removed.
    chi, r2star : path, optional
        The map, if it was reconstructed, and R2* from the same echoes.
    fields : mapping of str to path, optional
        Steps of the reconstruction to write, keys of `FIELDS`: the brain mask, and fields in Hz.
    automatic : path, optional
        The automatic labels, if `out_dseg` has manual corrections; they are kept in `AUTOMATIC`.
    correction : mapping, optional
        Where the corrections come from, and what they changed.
    standard : mapping of str to path, optional
        Files in standard space, outputs of `bids_dgmseg.interfaces.NormalizeToMNI`.
    output_space : str
        Standard space with its resolution, such as ``MNI152NLin2009cAsym:res-2``.

    Returns
    -------
    list of path
        The files written.

    Raises
    ------
    InputError
        If the reconstructed map would replace a map of the user, or an input changed while the scan was processed.
    """
    maps, steps = {"Chimap": chi, "R2starmap": r2star}, record.get("reconstruction", {})
    _remove_earlier_results(output_dir, scan, model, maps, fields=fields or {}, source_file=source_file)
    own_map = f"bids::{map_paths(output_dir, scan)[0].relative_to(output_dir).as_posix()}"
    common = {"Sources": [own_map] if chi else list(sources[:1]), "SpatialReference": next(iter(sources), "n/a")}
    written = [
        copy_file(out_dseg, output_path(output_dir, scan, "dseg", ".nii.gz", seg=model.name)),
        _copy_image(out_probseg, output_path(output_dir, scan, "probseg", ".nii.gz", seg=model.name)),
        copy_file(stats, output_path(output_dir, scan, "stats", ".tsv", seg=model.name)),
        *(copy_file(path, _figure_path(output_dir, scan, model, name, path.suffix)) for name, path in figures.items()),
    ]
    written += _write_maps(output_dir, scan, maps, steps, sources)
    written += _write_fields(output_dir, scan, fields or {}, sources)
    written += _write_texts(output_dir, scan, model, stats, record.get("reference"), common)
    if masks:
        written += _write_masks(output_dir, scan, model, out_dseg, regions, common)
    if automatic is not None:
        written += write_automatic(output_dir, scan, model, automatic)
    labels = _describe_labels(model, record, common, correction)
    if standard:
        written += write_standard(output_dir, scan, model, standard, output_space, labels)
    written.append(write_json(labels, output_path(output_dir, scan, "dseg", ".json", seg=model.name)))
    checksums = {
        path.relative_to(output_dir).as_posix(): sha256(path) if path.name.endswith(_CHECKED) else ""
        for path in written
        if not path.is_relative_to(output_dir / AUTOMATIC)
    }
    path = output_path(output_dir, scan, "qc", ".json", seg=model.name)
    return [*written, write_record(path, record, made_from, checksums, output_dir)]


def _write_maps(
    output_dir: Path,
    scan: ScanName,
    maps: Mapping[str, Path | None],
    steps: Mapping[str, Any],
    sources: Sequence[str],
) -> list[Path]:
    """Write the maps that were reconstructed, each with its sidecar."""
    written = []
    for suffix, source in maps.items():
        if source is not None:
            about = {**MAP_SIDECAR, **steps} if suffix == "Chimap" else _describe_r2star(steps)
            path, path_json = map_paths(output_dir, scan, suffix)
            about = {"Description": RECONSTRUCTED[suffix], "Sources": list(sources), **about}
            # If the next write fails, an earlier map beside the new checksum would look as if a person had edited it.
            path.unlink(missing_ok=True)
            written += [write_json({**about, MAP_CHECKSUM: sha256(source)}, path_json), copy_file(source, path)]
    return written


def _write_fields(output_dir: Path, scan: ScanName, fields: Mapping[str, Path], sources: Sequence[str]) -> list[Path]:
    """Write the brain mask and the fields of a reconstruction, each with its sidecar."""
    written = []
    for name, source in fields.items():
        path, path_json = (_field_path(output_dir, scan, name, extension) for extension in (".nii.gz", ".json"))
        kind = {"Type": "Brain"} if name == "brain" else {"Units": "Hz", "SkullStripped": True}
        about = {"Description": FIELDS[name], "Sources": list(sources), **kind}
        written += [write_json(about, path_json), copy_file(source, path)]
    return written


def _describe_labels(
    model: Model, record: Mapping[str, Any], common: Mapping[str, Any], correction: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the sidecar of the labels states about the model, the box and the map."""
    prepared, box_mm = record.get("input", {}), record["box_mm"]
    return {
        "Description": f"Deep gray nuclei by model {model.name}; labels in the table; left is the patient's left",
        **common,
        "Manual": bool(correction and correction["edited"]),
        **({CORRECTION: dict(correction)} if correction else {}),
        "Model": model.name,
        "ModelTitle": model.title,
        "BoxLow": list(box_mm["low"]),
        "BoxHigh": list(box_mm["high"]),
        "BoxUnits": "mm, RAS+",
        "BoxRotation": list(box_mm.get("rotation_deg", (0.0, 0.0, 0.0))),
        "InputUnits": prepared.get("units", "n/a"),
        "InputUnitsFrom": prepared.get("units_from", "n/a"),
        "InputReference": prepared.get("reference", "n/a"),
    }


def _copy_image(source: Path, path: Path) -> Path:
    """Copy an image, compressed."""
    if source.suffix == ".nii":
        return write_bytes(gzip.compress(source.read_bytes(), compresslevel=6, mtime=0), path)
    return copy_file(source, path)


def _describe_r2star(steps: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: steps[name] for name in ("EchoTime", "MagneticFieldStrength", "BrainMask")}
    return {"Units": "1/s", "SkullStripped": True, **kept, "EstimationAlgorithm": steps["R2starFit"]}


def save_refused(output_dir: Path, scan: ScanName, model: Model, *, figure: Path, record: Mapping[str, Any]) -> None:
    """Write the figure and the record of a reconstruction whose map is not usable, for the page of the participant."""
    copy_file(figure, _figure_path(output_dir, scan, model, "refused", ".png"))
    content = {"scan": scan.name, "model": model.name, **record}
    write_json(content, _figure_path(output_dir, scan, model, "refused", ".json"))


def remove_refused(output_dir: Path, scan: ScanName, model: Model) -> None:
    """Remove what `save_refused` has written in an earlier run."""
    for extension in (".png", ".json"):
        _figure_path(output_dir, scan, model, "refused", extension).unlink(missing_ok=True)


def _remove_earlier_results(
    output_dir: Path,
    scan: ScanName,
    model: Model,
    maps: Mapping[str, Path | None],
    *,
    fields: Mapping[str, Path],
    source_file: Path | None,
) -> None:
    """Remove the completeness marker and stale derivatives; never delete a user's map."""
    own = {}
    for suffix, made in maps.items():
        path, sidecar = map_paths(output_dir, scan, suffix)
        own[suffix] = read_optional_json(sidecar).get("Description") == RECONSTRUCTED[suffix]
        if made and path.exists() and not own[suffix]:
            raise InputError(
                f"{path.name}: exists in {output_dir.name}, but was not reconstructed by this program; move it into "
                "another dataset, or choose another output folder"
            )
    outdated = [output_path(output_dir, scan, suffix, ".json", seg=model.name) for suffix in ("qc", "dseg")]
    outdated += find_sample_figures(output_dir, scan.name, model.name)
    figures = (("viewer", ".html"), ("reconstruction", ".png"))
    outdated += [_figure_path(output_dir, scan, model, name, extension) for name, extension in figures]
    outdated += [output_path(output_dir / AUTOMATIC, scan, "dseg", end, seg=model.name) for end in (".nii.gz", ".tsv")]
    masks = _mask_path(output_dir, scan, model, "*", ".*")  # also of labels that other weights had
    outdated += masks.parent.glob(masks.name)
    is_same_map = maps["Chimap"] is not None and sha256(maps["Chimap"]) == _map_checksum(output_dir, scan)
    outdated += _find_fields(output_dir, scan, fields, keep=is_same_map)
    for path in [*outdated, *find_standard(output_dir, scan, model)]:
        path.unlink(missing_ok=True)
    remove_refused(output_dir, scan, model)
    is_input = source_file is not None and map_paths(output_dir, scan)[0].resolve() == source_file.resolve()
    if not maps["Chimap"] and is_input:
        return
    # Maps that were reconstructed before the scan had one of the user, and R2* before it had a single echo.
    for suffix, made in maps.items():
        if not made and own[suffix]:
            for path in map_paths(output_dir, scan, suffix):
                path.unlink(missing_ok=True)


def _map_checksum(output_dir: Path, scan: ScanName) -> str:
    """Return the checksum of the map that an earlier run reconstructed, if any."""
    return str(read_optional_json(map_paths(output_dir, scan)[1]).get(MAP_CHECKSUM, ""))


def _find_fields(output_dir: Path, scan: ScanName, fields: Mapping[str, Path], *, keep: bool) -> list[Path]:
    """List the files of `FIELDS` of an earlier run, unless they are kept; `InputError` for a file of the user."""
    outdated = []
    for name, description in FIELDS.items():
        path, path_json = (_field_path(output_dir, scan, name, extension) for extension in (".nii.gz", ".json"))
        if read_optional_json(path_json).get("Description") == description:
            outdated += [] if keep else [path, path_json]
        elif name in fields and path.exists():
            raise InputError(
                f"{path.name}: exists in {output_dir.name}, but was not written by this program; choose another output "
                "folder, or omit `save_fields`"
            )
    return outdated


def _write_texts(
    output_dir: Path,
    scan: ScanName,
    model: Model,
    stats: Path,
    reference: Any,
    common: Mapping[str, Any],
) -> list[Path]:
    """Write the label table, the data dictionary and the sidecar of the probabilities."""
    with stats.open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\r\n").split("\t")
    entries = ((column, STATS_COLUMNS.get(column) or describe_sampled(column)) for column in columns)
    dictionary: dict[str, Any] = {column: entry for column, entry in entries if entry}
    if reference:
        dictionary["SusceptibilityReference"] = reference
    about = {"Description": f"Probability of each nucleus, one volume per nucleus, by model {model.name}"}
    contents = {"stats": dictionary, "probseg": {**about, **common, "LabelMap": list(model.labels)}}
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
    scan: ScanName,
    model: Model,
    out_dseg: Path,
    regions: Mapping[str, Path],
    common: Mapping[str, Any],
) -> list[Path]:
    """Write one binary mask per nucleus and hemisphere, and those of the regions; ventricles without nuclei."""
    import numpy as np

    from bids_dgmseg.io.nifti import load_image

    dseg = load_image(out_dseg)
    labels = np.asanyarray(dseg.dataobj)
    written: list[Path] = []

    def write(name: str, mask: Any, description: str, kind: str = "ROI") -> None:
        image = type(dseg)(mask.astype(np.uint8), None, dseg.header)
        image.set_data_dtype(np.uint8)
        path, sidecar = (_mask_path(output_dir, scan, model, name, end) for end in (".nii.gz", ".json"))
        with atomic_write(path) as temporary:
            image.to_filename(temporary)
        written.extend([path, write_json({"Description": description, "Type": kind, **common}, sidecar)])

    for one in model.structures:
        write(one.bids_label, labels == one.index, f"Voxels of the {one.name} by model {model.name}")
    for region, source in regions.items():
        mask = np.asanyarray(load_image(source).dataobj) > 0
        if region == "ventricles":
            mask &= labels == 0
            write(region, mask, f"{REGIONS[region]} by model {model.ventricles or model.name}")
        else:
            kind = "Brain" if region == "brain" else "ROI"
            write(region, mask, f"{REGIONS[region]} by the localizer of model {model.name}", kind)
    return written
