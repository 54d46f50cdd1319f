"""Pages with measures per nucleus: of one participant, read back from the output dataset, and of `dgmseg measure`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from bids_dgmseg.bids.derivatives import contents_of_page, further_map_figure
from bids_dgmseg.bids.entities import is_in_standard_space, join_entities, split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import MISSING, path_to_url, read_json, read_optional_json, read_tsv
from bids_dgmseg.measurement.further_maps import MeasuredMap
from bids_dgmseg.measurement.map_quality import MAP_QUALITY
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS, describe_sampled, spell_unit
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.methods_text import describe_methods
from bids_dgmseg.models.structures import GRAY, Structure, wholes_among
from bids_dgmseg.report.html import (
    format_number,
    format_significant,
    format_size,
    format_value,
    natural_key,
    scan_anchor,
    slug,
    write_page,
)
from bids_dgmseg.report.mosaic import LAYOUTS, PLANES, WINDOW_PPM, draw_map

Row = Mapping[str, str]
"""Row of ``_stats.tsv`` as text."""

Columns = Mapping[str, Mapping[str, str]]
"""Heading that neighbouring columns share → column of ``_stats.tsv`` → title."""

MEASURES: Columns = {
    "Voxels": {"n_voxels": "count"},
    "Volume (mm³)": {"volume_mm3": "label", "volume_pv_mm3": "weighted"},
    "Between sessions": {"volume_longitudinal_mm3": "volume (mm³)", "volume_change_percent": "from their mean (%)"},
    "Susceptibility (ppb)": {
        **{"mean_ppm": "mean", "median_ppm": "median", "std_ppm": "SD", "p05_ppm": "5th %", "p95_ppm": "95th %"},
        **{"mean_pv_ppm": "weighted", "core_mean_ppm": "core"},
    },
    "Relative to the reference region (ppb)": {"mean_ref_ppm": "mean", "core_mean_ref_ppm": "core"},
    "Probability": {"mean_probability": "mean"},
}

QC_MEASURES: Columns = {
    "Segmentation": {
        **{"n_components": "components", "mean_entropy_bits": "entropy (bit)", "mass_outside_fraction": "outside"},
        **{"expected_dice": "expected Dice", "detached_volume_mm3": "detached (mm³)"},
        **{"caudate_ratio": "caudate ratio", "caudate_height": "caudate height"},
    },
    "Excluded": {"excluded_fraction": "fraction"},
    "Strong sources (mm³)": {"paramagnetic_blob_mm3": "paramagnetic", "diamagnetic_blob_mm3": "diamagnetic"},
    "Manual correction": {"automatic_dice": "Dice with automatic"},
    "Surrounding map": {
        "rim_contrast_ppm": "contrast (ppb)",
        "edge_distance_mm": "to the edge (mm)",
    },
    "Literature norms (SD)": {"volume_z": "volume", "mean_ppm_z": "susceptibility"},
    "(Left − right) / mean": {"volume_asymmetry": "volume", "mean_ppm_asymmetry": "susceptibility"},
}
"""Measures of quality."""

_MAP_QUALITY = {
    **MAP_QUALITY,
    "head_size": ("Size of the head relative to MNI152", ""),
    "slice_scale": ("Distances of the nuclei along the slice axis relative to the others and MNI152", ""),
    "brain_volume_ml": ("Volume of the brain", "ml"),
}
"""Key of ``_qc.json`` → name and unit."""

_UNITS = {
    **{"EchoTime": "s", "MagneticFieldStrength": "T", "BrainVolume": "ml", "MapVolume": "ml", "R2starMedian": "1/s"},
    **{"FieldNoise": "ppm", "ThermalFieldNoise": "ppm", "FieldMisfit": "ppm"},
}
"""Key of the record of a reconstruction → unit."""

_LISTS = ("Problems", "Warnings")
"""Keys of the record of a reconstruction that are shown above."""

_MAP_STATISTICS = {
    "mean": "mean",
    "median": "median",
    "std": "SD",
    "p05": "5th %",
    "p95": "95th %",
    "core_mean": "core",
}
"""Statistic of a map measured by `dgmseg measure` → title."""

_EXCLUDED, _NOT_FOUND, _WITHOUT_VOXEL = "excluded by the mask", "not found", "smaller than a voxel"


class Mosaic(NamedTuple):
    """A PNG in ``figures/``."""

    plane: str
    """Plane of the slices; ``reconstruction`` or ``refused`` for the steps of a reconstruction."""
    href: str
    """Link relative to the page."""
    width: int
    height: int
    columns: int = 6
    """Slices per row, unless there are fewer."""


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
    files: Sequence[Path]
    figures: Mapping[Path, str]
    """Figure → plane, map or viewer that it shows, after the scan's ``desc`` and in lower case."""
    desc: str
    """Entity ``desc`` of the scan."""
    output_dir: Path

    @property
    def nuclei(self) -> list[list[Row]]:
        """Rows by nucleus: the hemispheres and, if measured, the row of both together."""
        return [list(same) for _, same in groupby(self.rows, key=lambda row: row["abbreviation"].partition("_")[0])]

    @property
    def counted(self) -> list[Row]:
        """Rows of single hemispheres; nuclei with parts are counted by these."""
        return _without_wholes([row for row in self.rows if "_" in row["abbreviation"]])

    @property
    def proved(self) -> list[Row]:
        """Rows with what a proof recovered; n/a where nothing was planted."""
        return [row for row in self.counted if "recovered_ppb" in row]

    @property
    def not_found(self) -> list[str]:
        """Abbreviations of nuclei that were not found."""
        return [row["abbreviation"] for row in self.counted if _state(row) == _NOT_FOUND]

    @property
    def without_voxel(self) -> list[str]:
        """Abbreviations of nuclei that were found but are too small to fill a voxel; no figure shows them."""
        return [row["abbreviation"] for row in self.counted if _state(row) == _WITHOUT_VOXEL]

    @property
    def warnings(self) -> list[str]:
        """Warnings of the scan, each once for all nuclei that it is about, and nuclei that none says are missing."""
        merged: dict[str, list[str]] = {}
        for text in self.qc.get("warnings") or []:
            words = str(text).removeprefix(f"{self.name}: ").split(" ", 1)
            is_nucleus = any(words[0] == row["abbreviation"] for row in self.rows)
            merged.setdefault(words[-1] if is_nucleus else str(text), []).extend(words[:1] if is_nucleus else [])
        named = {name for names in merged.values() for name in names}
        if missing := [name for name in self.not_found if name not in named]:
            merged[_NOT_FOUND] = missing
        return [f"{', '.join(names)}: {text}" if names else text for text, names in merged.items()]

    @property
    def rating(self) -> str:
        """Rating of the scan; empty if it has none."""
        return str(self.qc.get("rating")) if self.qc.get("rating") in RATINGS else ""

    @property
    def flagged(self) -> list[Row]:
        """Rows of the nuclei rated red, then amber."""
        sided = [row for row in self.rows if "_" in row["abbreviation"]]
        return _without_wholes([row for rating in ("red", "amber") for row in sided if row.get("rating") == rating])

    @property
    def explained(self) -> list[Row]:
        """Flagged rows of nuclei that were found; a warning names the others."""
        return [row for row in self.flagged if _state(row) != _NOT_FOUND]

    @property
    def flag_counts(self) -> str:
        """Numbers of these, such as ``1 red, 3 amber``; empty if all are green."""
        return ", ".join(f"{n} {rating}" for rating, n in Counter(row["rating"] for row in self.flagged).items())

    @property
    def mosaics(self) -> list[Mosaic]:
        """Figures of the planes."""
        return [mosaic for plane in PLANES if (mosaic := self.mosaic(plane))]

    @property
    def map_figures(self) -> list[tuple[str, Mosaic]]:
        """Further maps with their figures."""
        names = [name for name, about in (self.qc.get("maps") or {}).items() if "problem" not in about]
        return [(name, mosaic) for name in names if (mosaic := self.mosaic(further_map_figure(name)))]

    @property
    def viewer(self) -> str:
        """Link to the interactive viewer; empty if there is none."""
        return next((self.link(path) for path, shown in self.figures.items() if shown == "viewer"), "")

    def link(self, path: Path) -> str:
        """Return the link to a file."""
        return path_to_url(path.relative_to(self.output_dir))

    def mosaic(self, shown: str) -> Mosaic | None:
        """Return the figure of a plane, a map or the reconstruction; None if there is none."""
        path = next((path for path, name in self.figures.items() if name == shown.lower()), None)
        return _read_mosaic(shown, path, self.output_dir) if path else None


def _without_wholes(rows: Sequence[Row]) -> list[Row]:
    """Return rows without those of nuclei whose parts are among them."""
    wholes = wholes_among(row["abbreviation"] for row in rows)
    return [row for row in rows if row["abbreviation"] not in wholes]


class RefusedMap(NamedTuple):
    """A reconstruction whose map is not usable and was not segmented."""

    anchor: str
    title: str
    model: str
    record: Mapping[str, Any]
    """Record as ``reconstruction`` of ``_qc.json``."""
    figure: Mosaic | None


def write_participant_page(
    output_dir: Path,
    participant: str,
    *,
    failures: Sequence[str] = (),
    outdated: Collection[tuple[str, str]] = (),
) -> Path:
    """Write ``sub-X.html`` from the tables and figures of the output dataset.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset; the page is written to its root and links to ``figures/``.
    participant : str
        Label without ``sub-``.
    failures : sequence of str
        Error messages of failed scans, printed first.
    outdated : collection of (str, str)
        Scans and models that failed in the last run; results of an earlier run are marked as such.

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
    results.sort(key=lambda result: (natural_key(result.name), result.model))
    records = sorted((output_dir / "figures").glob(f"sub-{participant}_*efused_dseg.json"))
    refused = sorted((_read_refused(path, output_dir) for path in records), key=lambda item: natural_key(item.title))
    page = output_dir / f"sub-{participant}.html"
    return write_page(
        "participant.html.j2",
        page,
        contents=contents_of_page(page, failures),
        participant=f"sub-{participant}",
        results=results,
        refused=refused,
        sessions={session for result in results if (session := split_entities(result.name).get("ses"))},
        models=sorted({result.model for result in results}),
        has_reconstruction=bool(refused) or any("reconstruction" in result.qc for result in results),
        failures=failures,
        outdated=outdated,
        methods=describe_methods([(result.model, result.qc) for result in results]),
        window=[1000 * value for value in WINDOW_PPM],
        measures=MEASURES,
        qc_measures=QC_MEASURES,
        map_columns=_map_columns,
        column_groups=_column_groups,
        describe=_describe_column,
        show=_show,
        facts=_facts,
        list_facts=_list_facts,
        state=_state,
    )


def _read_result(sidecar: Path, output_dir: Path) -> ScanResult:
    """Read what belongs to a ``_dseg.json``."""
    record = sidecar.with_name(sidecar.name.replace("_dseg.json", "_qc.json"))
    qc = read_optional_json(record)
    written = {output_dir / str(name) for name in qc.get("outputs") or ()} | {record, sidecar}
    paths = sorted(path for path in written if path.is_file())
    rows = next((_read_rows(path) for path in paths if path.name.endswith("_stats.tsv")), [])
    entities = split_entities(sidecar.name.partition(".")[0])
    model = str(qc.get("model") or entities.pop("seg", MISSING))
    name, desc = str(qc.get("scan") or join_entities(entities)), entities.get("desc", "")
    return ScanResult(
        name,
        model,
        anchor=scan_anchor(name, model),
        title=_title(name),
        qc=qc,
        rows=rows,
        files=[path for path in paths if path.parent.name != "figures"],
        # the desc of a figure starts with that of the scan, as in rtsAxial
        figures={
            path: split_entities(path.stem).get("desc", "").removeprefix(desc).lower()
            for path in paths
            if path.parent.name == "figures"
        },
        desc=desc,
        output_dir=output_dir,
    )


def _read_refused(record: Path, output_dir: Path) -> RefusedMap:
    content, image = read_json(record), record.with_suffix(".png")
    name, model = str(content.pop("scan", MISSING)), str(content.pop("model", MISSING))
    figure = _read_mosaic("refused", image, output_dir) if image.is_file() else None
    return RefusedMap(f"{scan_anchor(name, model)}-refused", _title(name), model, content, figure)


def _title(scan: str) -> str:
    return " · ".join(scan.split("_")[1:]) or scan


def _read_mosaic(shown: str, path: Path, output_dir: Path) -> Mosaic:
    try:
        with Image.open(path) as image:  # reads the header only
            columns = LAYOUTS[shown].columns if shown in LAYOUTS else LAYOUTS["axial"].columns
            return Mosaic(shown, path_to_url(path.relative_to(output_dir)), *image.size, columns)
    except UnidentifiedImageError as error:
        raise InputError(f"{path.name}: not a PNG file; delete it and rerun with `force`") from error


def _read_rows(path: Path) -> list[Row]:
    table = read_tsv(path, dtype=str, na_values=[])
    if "abbreviation" not in table:
        raise InputError(f"{path.name}: column abbreviation not found; delete the file and rerun with `force`")
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


def _state(row: Row) -> str:
    """Return ``not found``, ``smaller than a voxel`` (found, but without filling one), excluded, or nothing."""
    n_voxels, volume_mm3, excluded = (
        0.0 if format_number(row.get(column)) == MISSING else float(row[column])
        for column in ("n_voxels", "volume_pv_mm3", "excluded_fraction")
    )
    if n_voxels > 0:
        return ""
    return _EXCLUDED if excluded > 0.9995 else _WITHOUT_VOXEL if volume_mm3 > 0 else _NOT_FOUND


def _column_groups(result: ScanResult, groups: Columns) -> list[tuple[str, dict[str, str]]]:
    """Select the columns that the table has, by their shared headings."""
    present = {key for row in result.rows for key in row}
    selected = {group: {key: columns[key] for key in columns if key in present} for group, columns in groups.items()}
    return [(group, columns) for group, columns in selected.items() if columns]


def _map_columns(result: ScanResult) -> Columns:
    """Return the measures of further maps in a table, by map and unit."""
    groups: dict[str, dict[str, str]] = {}
    for column in result.rows[0] if result.rows else ():
        entry, match = describe_sampled(column), re.fullmatch(r"(.+)_(mean|median|std)(?:_.*)?", column)
        if entry and match:
            unit = f" ({entry['Units'].replace('ppm', 'ppb')})" if "Units" in entry else ""
            groups.setdefault(f"{match[1].replace('_', ' ')}{unit}", {})[column] = _MAP_STATISTICS[match[2]]
    return groups


def _describe_column(column: str) -> str:
    """Return the description of a column for its tooltip."""
    entry = STATS_COLUMNS.get(column) or describe_sampled(column) or {}
    return entry.get("Description", "")


def _show(row: Row, column: str) -> str:
    """Format a value: susceptibilities in ppb; the tooltip has the full value in the unit of the file."""
    about = STATS_COLUMNS.get(column) or describe_sampled(column) or {}
    if about.get("Units", "").startswith("ppm") and format_number(row.get(column)) != MISSING:
        return format_number(1000 * float(row[column]), 1)
    return format_number(row.get(column), _digits(column))


def _digits(column: str) -> int:
    """Return the number of decimals of a column."""
    if column.startswith("n_") or column.endswith(("blob_mm3", "detached_volume_mm3")):
        return 0
    if column.endswith(("_mm3", "distance_mm", "percent", "_ppb")):
        return 1
    return 3 if describe_sampled(column) else 2


def _facts(result: ScanResult) -> dict[str, dict[str, str]]:
    """Return input, settings and versions as headings → names → values."""
    qc, source = result.qc, dict(result.qc.get("input") or {})
    settings = {key: "default" if value is None else value for key, value in (qc.get("settings") or {}).items()}
    return {
        "Input": {"Voxel size": format_size(source.pop("voxel_size_mm", None)), **_list_facts(source)},
        "Map quality": {name: format_value(qc[key], unit) for key, (name, unit) in _MAP_QUALITY.items() if key in qc},
        "Reference region": _list_facts(qc.get("reference") or {}),
        "Further maps": {str(name): format_value(about) for name, about in (qc.get("maps") or {}).items()},
        "Excluded voxels": _list_facts(qc.get("excluded") or {}),
        "Time": {str(step): format_value(seconds, "s") for step, seconds in (qc.get("seconds") or {}).items()},
        "Settings": {str(key): format_value(value) for key, value in settings.items()},
        "Versions": {str(key): format_value(value) for key, value in (qc.get("versions") or {}).items()},
    }


def _list_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of a record with their names as words.

    >>> _list_facts({"FieldNoise": 0.00112, "units_from": "sidecar"})
    {'Field noise': '0.00112 ppm', 'Units from': 'sidecar'}
    """
    names = {key: re.sub("(?<=[a-z0-9])(?=[A-Z])|_", " ", key).capitalize() for key in record if key not in _LISTS}
    return {name: format_value(record[key], _UNITS.get(key, "")) for key, name in names.items()}


def write_measures_page(
    out: Path,
    measured: Sequence[MeasuredMap],
    labels: Volume,
    structures: Sequence[Structure],
    *,
    labels_name: str,
    notes: Sequence[str] = (),
) -> Path:
    """Draw each map with the outlines of the labels and write ``index.html`` with figures and tables."""
    sections, colours = [], {structure.abbreviation: structure.color for structure in structures}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for item in measured:
        figure = draw_map(item, labels, out / "figures" / f"{slug(item.name)}.png", structures=structures)
        unit = f"_{item.unit}" if item.unit else ""
        rows = [
            {
                "name": row["name"],
                "abbreviation": row["abbreviation"],
                "color": colours.get(row["abbreviation"], GRAY),
                "n_voxels": row["n_voxels"],
                "n_valid": row["n_valid"],
                "volume": format_significant(float(row["volume_mm3"])),
                "values": [format_significant(float(row[f"{name}{unit}"])) for name in _MAP_STATISTICS],
            }
            for row in item.table.to_dict("records")
        ]
        sections.append({"map": item, "unit": spell_unit(item.unit), "figure": f"figures/{figure.name}", "rows": rows})
    return write_page(
        "measures.html.j2",
        out / "index.html",
        labels=labels_name,
        sections=sections,
        notes=notes,
        titles=list(_MAP_STATISTICS.values()),
    )
