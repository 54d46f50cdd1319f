"""Name and write the derivatives of a scan, and tell whether they are there."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.paths import output_path, output_stem
from bids_dgmseg.bids.reconstructed import (
    check_map,
    drop_map,
    is_made_from,
    map_fingerprint,
    map_uri,
    note_map,
    place_map,
)
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.bids.top_level import check_output, label_table, write_dataset_files
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import copy_file, read_json, sha256, sha256_of, sha256_or_error, write_json, write_text
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.registry import Model

__all__ = [
    "check_output",
    "fingerprint",
    "is_done",
    "label_table",
    "map_fingerprint",
    "output_path",
    "save_scan",
    "write_dataset_files",
    "write_json",
    "write_text",
]

REGIONS: Mapping[str, str] = {
    "brain": "Brain, as far as the map shows it",
    "cerebellum": "Cerebellum",
    "ventricles": "Lateral ventricles",
}
"""Region of the head → what its mask holds."""


def fingerprint(
    scan: Scan, settings: Settings, model: Model, *, reference_mask: Path | None = None, reconstruction: str = ""
) -> str:
    """Hash all that the derivatives of a scan depend on.

    These are the content of the map or its reconstruction (`map_fingerprint`) and of the user's mask, the metadata, the
    model with its weights and the cleaning of its labels, the options that change files, and the program's version. A
    file that cannot be read has a fingerprint too: the step that reads it says what is wrong.

    Raises
    ------
    InputError
        If ``settings.weights`` cannot be read.
    """
    parts = {
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
        "weights": _hash_weights(settings, model),
        "masks": settings.masks,
        "viewer": settings.viewer,
        "reference": [settings.reference, settings.reference_structure, settings.reference_mask is not None],
        "reference_mask": sha256_or_error(reference_mask) if reference_mask else None,
        "version": bids_dgmseg.__version__,
    }
    return sha256_of(parts)


def _hash_weights(settings: Settings, model: Model) -> Mapping[str, str]:
    if settings.weights is None:
        return model.weights.files if model.weights else {}
    folder = settings.weights
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        paths = [path for path in paths if path.relative_to(folder).parts[:1] != ("training",)]  # what learning needs
        return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    except OSError as error:
        raise InputError(f"{folder}: the weights cannot be read ({error}); check --weights") from error


def is_done(output_dir: Path, scan: Scan, model_name: str, fingerprint: str) -> bool:
    """Tell whether a scan's derivatives are complete and belong to this fingerprint."""
    try:
        sidecar = read_json(output_path(output_dir, scan, "dseg", ".json", seg=model_name))
        files = [output_dir / name for name in sidecar["OutputFiles"]]
        whole = sidecar["Fingerprint"] == fingerprint and all(map(_is_whole, files))
        return bool(whole and (not scan.from_echoes or is_made_from(output_dir, scan, sidecar)))
    except (OSError, InputError, KeyError, TypeError):
        return False


def _is_whole(file: Path) -> bool:
    """Tell whether a file is there and not empty, and holds an object if it is JSON."""
    return file.is_file() and file.stat().st_size > 0 and (file.suffix != ".json" or bool(read_json(file)))


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

    The sidecar of the dseg is written last and names the others: where it lies, the scan is complete.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset.
    scan, model
        What was segmented, and with what.
    out_dseg, out_probseg : Path
        NIfTI files on the scan's own grid: numbers of ``structures.tsv``, and one volume a nucleus of the model.
    stats : Path
        Table of ``measure_nuclei``.
    quality : mapping
        Content of ``_qc.json``; ``quality["input"]`` says how the map was understood.
    box_mm : mapping
        Opposite corners ``low`` and ``high`` of the localizer's box, RAS+ mm.
    masks : bool
        Whether to write one binary mask a nucleus and side, and those of `regions`.
    fingerprint : str
        From `fingerprint`.
    figures : mapping of str to Path
        Plane → PNG, and ``viewer`` → HTML unless it is omitted.
    regions : mapping of str to Path
        Region of the head (``brain``, ``cerebellum``, ``ventricles``) → mask on the scan's own grid.
    chi : Path, optional
        The map, where it was reconstructed here; ``quality["reconstruction"]`` says how.
    reconstruction : str
        From `map_fingerprint`.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError
        If a map that was not made here has the name of the one to be written.
    """
    if chi:
        check_map(output_dir, scan)
    mark = output_path(output_dir, scan, "dseg", ".json", seg=model.name)
    common = {"Sources": [map_uri(output_dir, scan) if chi else scan.uri], "SpatialReference": scan.uri}
    _remove_earlier(output_dir, mark, scan, model)
    if not chi:
        drop_map(output_dir, scan)
    written = _place_files(output_dir, scan, model, {"dseg": out_dseg, "probseg": out_probseg, "stats": stats})
    written += _place_figures(output_dir, scan, model, figures)
    if chi:
        written += place_map(chi, output_dir, scan, about=quality["reconstruction"], fingerprint=reconstruction)
    written += _write_texts(output_dir, scan, model, _dictionary(stats, quality), quality, common)
    if masks:
        written += _write_masks(output_dir, scan, model, out_dseg, common)
        written += _place_regions(output_dir, scan, model, regions, common)
    sidecar = {
        "Description": f"Deep nuclei by model {model.name}; numbers as in the table beside; left is the patient's left",
        **common,
        **_describe(quality, box_mm, model),
        "Fingerprint": fingerprint,
        **note_map(reconstruction),
        "OutputFiles": [file.relative_to(output_dir).as_posix() for file in written],
    }
    write_json(sidecar, mark)
    return [*written, mark]


def _remove_earlier(output_dir: Path, mark: Path, scan: Scan, model: Model) -> None:
    """Remove the mark of completeness first, then masks and viewer, which this run may not write."""
    mark.unlink(missing_ok=True)
    _figure_path(output_dir, scan, model, "viewer", ".html").unlink(missing_ok=True)
    for structure in model.structures:
        for extension in (".json", ".nii.gz"):
            _mask_path(output_dir, scan, model, structure.bids_label, extension).unlink(missing_ok=True)
    for region in REGIONS:
        for extension in (".json", ".nii.gz"):
            _mask_path(output_dir, scan, model, region, extension).unlink(missing_ok=True)


def _place_files(output_dir: Path, scan: Scan, model: Model, sources: Mapping[str, Path]) -> list[Path]:
    """Place images as ``.nii.gz`` and tables as ``.tsv``, by suffix."""
    written = []
    for suffix, source in sources.items():
        extension = ".tsv" if source.suffix == ".tsv" else ".nii.gz"
        written.append(output_path(output_dir, scan, suffix, extension, seg=model.name))
        if source.suffix != ".nii":
            copy_file(source, written[-1])
            continue
        with tempfile.TemporaryDirectory() as folder:
            compressed = Path(folder) / written[-1].name
            compressed.write_bytes(gzip.compress(source.read_bytes(), compresslevel=6, mtime=0))
            copy_file(compressed, written[-1])
    return written


def _place_figures(output_dir: Path, scan: Scan, model: Model, figures: Mapping[str, Path]) -> list[Path]:
    written = []
    for name, figure in figures.items():
        written.append(_figure_path(output_dir, scan, model, name, figure.suffix))
        copy_file(figure, written[-1])
    return written


def _figure_path(output_dir: Path, scan: Scan, model: Model, name: str, extension: str) -> Path:
    return output_dir / "figures" / f"{output_stem(scan, seg=model.name, desc=name)}_dseg{extension}"


def _write_texts(
    output_dir: Path,
    scan: Scan,
    model: Model,
    dictionary: Mapping[str, Any],
    quality: Mapping[str, Any],
    common: Mapping[str, Any],
) -> list[Path]:
    """Write the label table, the data dictionary, the quality record and the sidecar of the probabilities."""
    about = {"Description": f"Probability of each nucleus, one volume a nucleus, by model {model.name}"}
    table = output_path(output_dir, scan, "dseg", ".tsv", seg=model.name)
    write_text(label_table(model.structures), table)
    written = [table]
    for suffix, content in {
        "stats": dictionary,
        "qc": quality,
        "probseg": {**about, **common, "LabelMap": list(model.labels)},
    }.items():
        written.append(output_path(output_dir, scan, suffix, ".json", seg=model.name))
        write_json(content, written[-1])
    return written


def _mask_path(output_dir: Path, scan: Scan, model: Model, label: str, extension: str) -> Path:
    """Name a mask after its model, by ``desc``: BIDS has no ``seg`` on masks, and models share output folders."""
    return output_path(output_dir, scan, "mask", extension, label=label, desc=model.name)


def _write_masks(output_dir: Path, scan: Scan, model: Model, out_dseg: Path, common: Mapping[str, Any]) -> list[Path]:
    """Write one binary mask a nucleus and side on the grid of the dseg."""
    import numpy as np

    from bids_dgmseg.io.nifti import load_image

    dseg = load_image(out_dseg)
    labels = np.asanyarray(dseg.dataobj)
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for structure in model.structures:
            final = _mask_path(output_dir, scan, model, structure.bids_label, ".nii.gz")
            image = type(dseg)((labels == structure.index).astype(np.uint8), None, dseg.header)
            image.set_data_dtype(np.uint8)
            image.to_filename(Path(folder) / final.name)
            copy_file(Path(folder) / final.name, final)
            sidecar = _mask_path(output_dir, scan, model, structure.bids_label, ".json")
            about = {"Description": f"Voxels of the {structure.name} by model {model.name}", "Type": "ROI"}
            write_json({**about, **common}, sidecar)
            written += [final, sidecar]
    return written


def _place_regions(
    output_dir: Path, scan: Scan, model: Model, regions: Mapping[str, Path], common: Mapping[str, Any]
) -> list[Path]:
    """Place the masks of the whole-head step."""
    written = []
    for region, source in regions.items():
        final, sidecar = (_mask_path(output_dir, scan, model, region, end) for end in (".nii.gz", ".json"))
        copy_file(source, final)
        about = {"Description": f"{REGIONS[region]} by the whole-head step of model {model.name}"}
        write_json({**about, "Type": "Brain" if region == "brain" else "ROI", **common}, sidecar)
        written += [final, sidecar]
    return written


def _dictionary(stats: Path, quality: Mapping[str, Any]) -> dict[str, Any]:
    """Explain the columns that the table has, and what referenced ones are relative to."""
    with stats.open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\r\n").split("\t")
    explained: dict[str, Any] = {column: STATS_COLUMNS[column] for column in columns if column in STATS_COLUMNS}
    return explained | ({"SusceptibilityReference": quality["reference"]} if quality.get("reference") else {})


def _describe(quality: Mapping[str, Any], box_mm: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Say in the dseg's sidecar how it was made."""
    given = quality.get("input", {})
    return {
        "Manual": False,
        "Model": model.name,
        "ModelTitle": model.title,
        "BoxLow": list(box_mm["low"]),
        "BoxHigh": list(box_mm["high"]),
        "BoxUnits": "mm, RAS+",
        "BoxRotation": list(box_mm.get("rotation_deg", (0.0, 0.0, 0.0))),
        "InputUnits": given.get("units", "n/a"),
        "InputUnitsFrom": given.get("units_from", "n/a"),
        "InputReference": given.get("reference", "n/a"),
        "ProgramVersion": bids_dgmseg.__version__,
    }
