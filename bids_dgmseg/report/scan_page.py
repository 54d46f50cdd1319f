"""Page of one participant: figures, tables and warnings of all scans, read back from the output dataset."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from bids_dgmseg.bids.entities import is_in_standard_space, join_entities, split_entities
from bids_dgmseg.bids.sample_figures import sample_figure
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import path_to_url, read_json, read_tsv
from bids_dgmseg.measurement.columns import STATS_COLUMNS, describe_sampled
from bids_dgmseg.measurement.map_quality import MAP_QUALITY
from bids_dgmseg.measurement.rating import RATINGS, Rating
from bids_dgmseg.methods_text import describe_methods
from bids_dgmseg.models.structures import bilateral_names, wholes_among
from bids_dgmseg.report.html import (
    NO_VALUE,
    format_box,
    format_number,
    format_size,
    format_value,
    natural_key,
    scan_anchor,
    write_page,
)
from bids_dgmseg.report.scan_columns import (
    MAPS,
    MEASURES,
    QC_MEASURES,
    MeasureColumn,
    Row,
    describe_map,
    map_columns,
)
from bids_dgmseg.report.slices import PLANES, WINDOW_PPM

_NORM_MEASURES: Mapping[str, Sequence[MeasureColumn]] = {
    title: (MeasureColumn(f"norm_{measure}_z", "z", 2), MeasureColumn(f"norm_{measure}_centile", "centile", 0))
    for title, measure in (("Volume", "volume_mm3"), ("Susceptibility", "mean_ppm"))
}
"""Columns of `Scores`."""

_NORM_TIPS = {
    "z": "distance from what is expected at this age and sex, in standard deviations of the controls",
    "centile": "percentage of controls of this age and sex with smaller values",
}

Scores = Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]
"""Name of a scan and model → nucleus → column → value: comparison with saved norms."""

_MAP_QUALITY = {
    **MAP_QUALITY,
    "box_margin_mm": ("Margin of the box", "mm"),
    "head_size": ("Size of the head relative to MNI152", ""),
    "slice_scale": ("Distances of the nuclei along the slice axis relative to the others and MNI152", ""),
    "brain_volume_ml": ("Volume of the brain", "ml"),
}
"""Key of ``_qc.json`` → name and unit."""

_HOLES = ("n_replaced", "n_empty")
"""Keys of ``input``: voxels inside the brain without data."""

_PHASE_FACTS = {
    "PhaseConversion": "Stored values",
    "HeadFieldCorrelation": "Correlation with the field of the head",
    "ExtremesRatio": "Positive / negative extremes",
}
"""Key of the record → name: how the phase was read, and what its sign was judged from."""

_EXCLUDED = "excluded by the mask"

_NOT_FOUND, _WITHOUT_VOXEL = "not found", "smaller than a voxel"


@dataclass(frozen=True)
class Mosaic:
    """A PNG in ``figures/``."""

    plane: str
    """Or ``reconstruction``, ``refused``."""
    href: str
    """Relative to the page."""
    width: int
    height: int


@dataclass(frozen=True)
class ScanResult:
    """One scan segmented by one model."""

    name: str
    """Entities of the scan without suffix, such as ``sub-01_ses-1_run-1``."""
    model: str
    anchor: str
    """Identifier on the page."""
    title: str
    """Name within the participant, such as ``ses-1 · run-1``."""
    qc: Mapping[str, Any]
    """Content of ``_qc.json``."""
    rows: Sequence[Row]
    """Rows of single hemispheres."""
    nuclei: Sequence[Sequence[Row]]
    """Rows by nucleus: both hemispheres and, if measured, the row of both together."""
    n_nuclei: int
    """Labelled nuclei: those with parts are counted by them."""
    not_found: Sequence[str]
    without_voxel: Sequence[str]
    """Abbreviations of nuclei that were found but are too small to fill a voxel; no figure shows them."""
    rating: str
    """``green``, ``amber`` or ``red``; empty if the scan has none."""
    flagged: Sequence[Row]
    """Rows of the nuclei rated red, then amber."""
    flag_counts: str
    """Numbers of these, such as ``1 red, 3 amber``; empty if all are green."""
    mosaics: Sequence[Mosaic]
    reconstruction: Mosaic | None
    """Images of the steps, if the map was reconstructed here."""
    map_figures: Sequence[tuple[str, Mosaic]]
    """Further maps with their figures."""
    viewer: str
    """Link to the interactive viewer; empty if there is none."""
    files: Sequence[tuple[str, str]]
    """Names and links of all files except figures and masks."""
    n_masks: int


@dataclass(frozen=True)
class RefusedMap:
    """A reconstruction whose map is not usable and was not segmented."""

    anchor: str
    title: str
    model: str
    record: Mapping[str, Any]
    """As ``reconstruction`` of ``_qc.json``."""
    figure: Mosaic | None


def write_participant_page(
    output_dir: Path,
    participant: str,
    *,
    models: Sequence[str] | None = None,
    failures: Sequence[str] = (),
    outdated: Collection[tuple[str, str]] = (),
    scores: Scores | None = None,
    norms: str = "",
) -> Path:
    """Write ``sub-X.html`` from the tables and figures of the output dataset.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset; the page is written to its root and links to ``figures/``.
    participant : str
        Label without ``sub-``.
    models : sequence of str, optional
        Only these models; by default all.
    failures : sequence of str
        Error messages of failed scans, printed first.
    outdated : collection of (str, str)
        Scans and models that failed in the last run; results of an earlier run are marked as such.
    scores : Scores, optional
        Comparison of the scans with saved norms.
    norms : str
        Name of the file with the norms.

    Returns
    -------
    Path
        The page, which is also written without any result.

    Raises
    ------
    InputError
        If a table or figure cannot be read.
    """
    # A scan is complete if it has a _dseg.json, which lists the files that belong to it.
    sidecars = (output_dir / f"sub-{participant}").rglob(f"sub-{participant}*_dseg.json")
    results = [_read_result(path, output_dir) for path in sidecars if not is_in_standard_space(path.name)]
    results = [result for result in results if models is None or result.model in models]
    results = [_with_scores(result, (scores or {}).get((result.name, result.model), {})) for result in results]
    results.sort(key=lambda result: (natural_key(result.name), result.model))
    records = sorted((output_dir / "figures").glob(f"sub-{participant}_*efused_dseg.json"))
    refused = sorted((_read_refused(path, output_dir) for path in records), key=lambda one: natural_key(one.title))
    return write_page(
        "participant.html.j2",
        output_dir / f"sub-{participant}.html",
        participant=f"sub-{participant}",
        results=results,
        refused=[one for one in refused if models is None or one.model in models],
        sessions={session for result in results if (session := split_entities(result.name).get("ses"))},
        models=sorted({result.model for result in results}),
        failures=failures,
        outdated=outdated,
        methods=describe_methods([(result.model, result.qc) for result in results]),
        window=WINDOW_PPM,
        measures=MEASURES,
        qc_measures=QC_MEASURES,
        maps=MAPS,
        norm_measures=_NORM_MEASURES,
        norms=norms,
        descriptions={
            **_describe_columns(results),
            **{column.key: _NORM_TIPS[column.title] for columns in _NORM_MEASURES.values() for column in columns},
        },
        column_groups=_column_groups,
        facts=_facts,
        reconstruction_facts=_reconstruction_facts,
        state=_state,
    )


def _describe_columns(results: Sequence[ScanResult]) -> dict[str, str]:
    """Return the descriptions of the columns of all tables."""
    columns = {*STATS_COLUMNS, *(column for result in results for row in result.rows[:1] for column in row)}
    entries = {column: STATS_COLUMNS.get(column) or describe_sampled(column) or {} for column in columns}
    return {column: entry.get("Description", "") for column, entry in entries.items()}


def _read_result(sidecar: Path, output_dir: Path) -> ScanResult:
    """Read what belongs to a ``_dseg.json``."""
    names = [*map(str, read_json(sidecar).get("OutputFiles") or ()), sidecar.relative_to(output_dir).as_posix()]
    paths = [output_dir / name for name in sorted(names) if (output_dir / name).is_file()]
    qc = next((read_json(path) for path in paths if path.name.endswith("_qc.json")), {})
    hrefs = {path: path_to_url(path.relative_to(output_dir)) for path in paths}
    # the plane or viewer in desc, which may come after the scan's own, as in rtsAxial
    figures = {
        path: split_entities(path.stem).get("desc", "").lower() for path in paths if path.parent.name == "figures"
    }
    others = [path for path in paths if path not in figures and not path.name.endswith(("_mask.nii.gz", "_mask.json"))]
    entities = split_entities(sidecar.name.partition(".")[0])
    model = str(qc.get("model") or entities.pop("seg", NO_VALUE))
    name = str(qc.get("scan") or join_entities(entities))
    rows = next((_read_rows(path) for path in paths if path.name.endswith("_stats.tsv")), [])
    bilateral = bilateral_names([row["abbreviation"] for row in rows])
    sided = [row for row in rows if row["abbreviation"] not in bilateral]
    wholes = wholes_among(row["abbreviation"] for row in sided)
    counted = [row for row in sided if row["abbreviation"] not in wholes]
    flagged = [row for row in sided if row.get("rating") in RATINGS[1:]]
    wholes = wholes_among(row["abbreviation"] for row in flagged)
    flagged = [row for row in flagged if row["abbreviation"] not in wholes]
    flagged.sort(key=lambda row: -RATINGS.index(cast(Rating, row["rating"])))
    return ScanResult(
        name,
        model,
        anchor=scan_anchor(name, model),
        title=_title(name),
        qc=qc,
        rows=sided,
        nuclei=[list(same) for _, same in groupby(rows, key=lambda row: row["abbreviation"].partition("_")[0])],
        n_nuclei=len(counted),
        not_found=[row["abbreviation"] for row in counted if _state(row) == _NOT_FOUND],
        without_voxel=[row["abbreviation"] for row in counted if _state(row) == _WITHOUT_VOXEL],
        rating=str(qc.get("rating")) if qc.get("rating") in RATINGS else "",
        flagged=flagged,
        flag_counts=", ".join(f"{n} {rating}" for rating, n in Counter(row["rating"] for row in flagged).items()),
        mosaics=[mosaic for plane in PLANES if (mosaic := _find_mosaic(plane, figures, output_dir))],
        reconstruction=_find_mosaic("reconstruction", figures, output_dir),
        map_figures=_find_map_figures(qc.get("maps") or {}, entities.get("desc", ""), figures, output_dir),
        viewer=next((hrefs[path] for path, desc in figures.items() if desc.endswith("viewer")), ""),
        files=[(path.name, hrefs[path]) for path in others],
        n_masks=sum(path.name.endswith("_mask.nii.gz") for path in paths),
    )


def _with_scores(result: ScanResult, scores: Mapping[str, Mapping[str, Any]]) -> ScanResult:
    """Add the comparison with norms to the rows of a scan."""
    if not scores:
        return result

    def add(row: Row) -> Row:
        own = scores.get(row["abbreviation"], {})
        return {**row, **{key: NO_VALUE if math.isnan(value) else str(value) for key, value in own.items()}}

    nuclei = [[add(row) for row in same] for same in result.nuclei]
    return replace(result, rows=[add(row) for row in result.rows], nuclei=nuclei)


def _read_refused(record: Path, output_dir: Path) -> RefusedMap:
    content = read_json(record)
    name, model = str(content.pop("scan", NO_VALUE)), str(content.pop("model", NO_VALUE))
    figure = _find_mosaic("refused", {record.with_suffix(".png"): "refused"}, output_dir)
    return RefusedMap(f"{scan_anchor(name, model)}-refused", _title(name), model, content, figure)


def _title(scan: str) -> str:
    return " · ".join(scan.split("_")[1:]) or scan


def _find_map_figures(
    maps: Mapping[str, Mapping[str, Any]], own: str, figures: Mapping[Path, str], output_dir: Path
) -> list[tuple[str, Mosaic]]:
    """Find the figures of further maps that were measured; `own` is the ``desc`` of the scan."""
    found = []
    for name in (name for name, about in maps.items() if "problem" not in about):
        whole = f"{own}{sample_figure(name)}".lower()  # one name may end with another
        same = {path: desc for path, desc in figures.items() if desc == whole}
        if mosaic := _find_mosaic(sample_figure(name).lower(), same, output_dir):
            found.append((name, mosaic))
    return found


def _find_mosaic(name: str, figures: Mapping[Path, str], output_dir: Path) -> Mosaic | None:
    """Find a figure by the end of its ``desc`` among paths → ``desc``."""
    for path, desc in figures.items():
        if desc.endswith(name) and path.suffix == ".png" and path.is_file():
            with path.open("rb") as file:  # decoding an image takes much longer
                header = file.read(24)
            if len(header) < 24 or not header.startswith(b"\x89PNG"):
                raise InputError(f"{path.name}: not a PNG file; delete it and rerun with `force`")
            width, height = struct.unpack(">II", header[16:24])
            return Mosaic(name, path_to_url(path.relative_to(output_dir)), int(width), int(height))
    return None


def _read_rows(path: Path) -> Sequence[Row]:
    table = read_tsv(path, dtype=str, na_values=[])
    if "abbreviation" not in table:
        raise InputError(f"{path.name}: column abbreviation not found; delete the file and rerun with `force`")
    return cast(Sequence[Row], table.to_dict("records"))


def _state(row: Row) -> str:
    """Return ``not found``, ``smaller than a voxel`` (found, but without filling one), excluded, or nothing."""
    n_voxels, volume_mm3 = (
        0.0 if format_number(row.get(column)) == NO_VALUE else float(row[column])
        for column in ("n_voxels", "volume_pv_mm3")
    )
    if n_voxels > 0:
        return ""
    if format_number(row.get("excluded_fraction"), 3) == "1.000":
        return _EXCLUDED
    return _WITHOUT_VOXEL if volume_mm3 > 0 else _NOT_FOUND


def _column_groups(
    result: ScanResult, groups: Mapping[str, Sequence[MeasureColumn]]
) -> Sequence[tuple[str, Sequence[MeasureColumn]]]:
    """Select the columns that the table has, by their shared headings."""
    present = dict.fromkeys((key for row in result.rows for key in row), "")
    if groups is MAPS:
        groups = map_columns(present)
    selected = {group: [column for column in columns if column.key in present] for group, columns in groups.items()}
    return [(group, columns) for group, columns in selected.items() if columns]


def _facts(result: ScanResult) -> dict[str, dict[str, str]]:
    """Return input, settings and versions as headings → names → values."""
    qc = result.qc
    given: Mapping[str, Any] = qc.get("input") or {}
    reference: Mapping[str, Any] = qc.get("reference") or {}
    excluded: Mapping[str, Any] = qc.get("excluded") or {}
    units_from = f" (from the {given['units_from']})" if given.get("units_from") else ""
    not_finite, empty = ("none" if given.get(key) == 0 else format_value(given.get(key)) for key in _HOLES)
    return {
        "Input": {
            "Map": format_value(given.get("file")),
            "Units": format_value(given.get("units")) + units_from,
            "Reference region": format_value(given.get("reference")),
            "Voxel size": format_size(given.get("voxel_size_mm")),
            "Matrix": format_size(given.get("shape"), unit=""),
            "Stored as": format_value(given.get("orientation")),
            "NaN inside the brain": not_finite,
            "Missing zeros inside the brain": empty,
        },
        "Map quality": {name: format_value(qc[key], unit) for key, (name, unit) in _MAP_QUALITY.items() if key in qc},
        "Reference region": {
            "Region": format_value(reference.get("region")),
            "Source": format_value(reference.get("source")),
            "Mean": format_value(reference.get("mean_ppm"), "ppm"),
            "SD": format_value(reference.get("std_ppm"), "ppm"),
            "Voxels": format_value(reference.get("n_voxels")),
        }
        if reference
        else {},
        "Further maps": {
            str(name): describe_map(about)
            for name, about in (qc.get("maps") or {}).items()
            if isinstance(about, Mapping)
        },
        "Excluded voxels": {
            "Masks": format_value(", ".join(excluded.get("files") or [])),
            "Volume": f"{format_number(excluded.get('volume_mm3'), 0)} mm³",
        }
        if excluded
        else {},
        "Run": {
            "Model": result.model,
            "Box of the localizer": format_box(qc.get("box_mm")),
            **{f"Time, {step}": format_value(seconds, "s") for step, seconds in (qc.get("seconds") or {}).items()},
        },
        "Settings": {
            str(key): "default" if value is None else format_value(value)
            for key, value in (qc.get("settings") or {}).items()
        },
        "Versions": {str(key): format_value(value) for key, value in (qc.get("versions") or {}).items()},
    }


def _reconstruction_facts(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the steps of a reconstruction with their numbers, from its record: headings → names → values."""
    times_ms = [f"{1000 * float(time_s):g}" for time_s in record.get("EchoTime") or []]
    sign = {1: "increases with the field", -1: "decreases with the field"}.get(record.get("PhaseSign", 0), NO_VALUE)
    b0 = record.get("B0Direction")
    tilt = f", {math.degrees(math.acos(min(abs(b0[2]), 1))):.0f}° from the z axis of the image" if b0 else ""
    fit, thermal = record.get("R2starFit"), "ThermalFieldNoise"

    def ppb(key: str) -> str:
        value = record.get(key)
        return NO_VALUE if value is None else format_value(1000 * float(value), "ppb")

    return {
        "Echoes": {
            "Echo times": f"{', '.join(times_ms)} ms" if times_ms else NO_VALUE,
            "Main field": format_value(record.get("MagneticFieldStrength"), "T"),
            "Direction of B0": (format_value(b0) + tilt) if b0 else NO_VALUE,
            "Readout": format_value(record.get("ReadoutCorrection")),
        },
        "Brain mask": {
            "Found": format_value(record.get("BrainMask")),
            "Volume": _millilitres(record.get("BrainVolume")),
            "With a value": _millilitres(record.get("MapVolume")) + _percentage(record.get("MapBrainFraction")),
        },
        "Field": {
            "Phase": f"{sign} (from {format_value(record.get('PhaseSignFrom'))})",
            **{name: format_value(record[key]) for key, name in _PHASE_FACTS.items() if key in record},
            "Unwrapping": format_value(record.get("Unwrapping")),
            "Field fit": format_value(record.get("FieldFit")),
            "Noise": ppb("FieldNoise") + (f", thermal {ppb(thermal)}" if record.get(thermal) is not None else ""),
        },
        "Local field and maps": {
            "Background field": format_value(record.get("BackgroundFieldRemoval")),
            "Local / total field": format_value(record.get("LocalFieldFraction")),
            "Inversion": format_value(record.get("DipoleInversion")),
            "Regularization λ": format_value(record.get("RegularizationWeight")),
            "Not explained": ppb("FieldMisfit") + _times_noise(record.get("MisfitOverNoise")),
            **({"R2*": f"{fit}, median {format_value(record.get('R2starMedian'), '1/s')}"} if fit else {}),
            "Failed checks": f"{len(record['Problems'])}, see above" if record.get("Problems") else "none",
        },
    }


def _percentage(fraction: Any) -> str:
    return "" if fraction is None else f" ({100 * float(fraction):.0f} % of the mask)"


def _times_noise(ratio: Any) -> str:
    return "" if ratio is None else f" ({format_value(ratio)} times the noise)"


def _millilitres(value: Any) -> str:
    return NO_VALUE if value is None else f"{format_number(value, 0)} ml"
