"""Write the derivatives of a scan."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.derivatives import (
    MAP_DESCRIPTION,
    MAP_FINGERPRINT,
    is_own_map,
    map_paths,
    models_using_map,
    output_path,
    output_stem,
)
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import atomic_write, copy_file, write_bytes, write_json, write_text
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.registry import Model

REGIONS: Mapping[str, str] = {
    "brain": "Brain within the field of view of the map",
    "cerebellum": "Cerebellum",
    "ventricles": "Lateral ventricles",
}
"""Region of the head → description of its mask."""

MAP_SIDECAR: Mapping[str, Any] = {"Units": "ppm", "SkullStripped": True, "SusceptibilityReference": "whole brain"}
"""Metadata of every reconstructed map."""


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
        From `derivatives.fingerprint`.
    figures : mapping of str to path
        Plane → PNG, and ``viewer`` → HTML unless it is omitted.
    regions : mapping of str to path
        Region of the head (``brain``, ``cerebellum``, ``ventricles``) → mask on the scan's own grid.
    chi : path, optional
        The map, if it was reconstructed.
    reconstruction : str
        From `derivatives.map_fingerprint`.

    Returns
    -------
    list of path
        The files written.

    Raises
    ------
    InputError
        If the reconstructed map would replace a map of the user.
    """
    map_path, map_sidecar = map_paths(output_dir, scan)
    if chi and map_path.exists() and not is_own_map(map_sidecar):
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
    if not chi:
        _remove_map(output_dir, scan)
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
    sidecar = {
        "Description": f"Deep gray nuclei by model {model.name}; labels in the table; left is the patient's left",
        **common,
        **_describe(quality, box_mm, model),
        "Fingerprint": fingerprint,
        **made_from,
        "OutputFiles": [file.relative_to(output_dir).as_posix() for file in written],
    }
    return [*written, write_json(sidecar, dseg_sidecar)]


def _remove_map(output_dir: Path, scan: Scan) -> None:
    """Remove a map that was reconstructed before the scan had one, unless results of another model refer to it."""
    path, sidecar = map_paths(output_dir, scan)
    if path.resolve() != scan.chi.resolve() and is_own_map(sidecar) and not models_using_map(output_dir, scan):
        path.unlink(missing_ok=True)
        sidecar.unlink(missing_ok=True)


def _figure_path(output_dir: Path, scan: Scan, model: Model, name: str, extension: str) -> Path:
    return output_dir / "figures" / f"{output_stem(scan, seg=model.name, desc=name)}_dseg{extension}"


def _mask_path(output_dir: Path, scan: Scan, model: Model, label: str, extension: str) -> Path:
    """Return the path of a mask; the model is in ``desc``, because BIDS does not allow ``seg`` for masks."""
    return output_path(output_dir, scan, "mask", extension, label=label, desc=model.name)


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


def _describe(quality: Mapping[str, Any], box_mm: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Describe the segmentation in the sidecar of the dseg."""
    source = quality.get("input", {})
    return {
        "Manual": False,
        "Model": model.name,
        "ModelTitle": model.title,
        "BoxLow": list(box_mm["low"]),
        "BoxHigh": list(box_mm["high"]),
        "BoxUnits": "mm, RAS+",
        "BoxRotation": list(box_mm.get("rotation_deg", (0.0, 0.0, 0.0))),
        "InputUnits": source.get("units", "n/a"),
        "InputUnitsFrom": source.get("units_from", "n/a"),
        "InputReference": source.get("reference", "n/a"),
        "ProgramVersion": bids_dgmseg.__version__,
    }
