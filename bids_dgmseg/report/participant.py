"""Page of one participant: figures, tables and warnings of all scans."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.report.html import NO_VALUE, format_box, format_size, format_value, write_page
from bids_dgmseg.report.methods import describe_methods
from bids_dgmseg.report.mosaic import WINDOW_PPM
from bids_dgmseg.report.scan_results import ScanResult, is_found, is_without_voxel, read_results


@dataclass(frozen=True)
class Column:
    """A column of a table on the page."""

    key: str
    """Column of ``_stats.tsv``."""
    title: str
    group: str
    """Heading shared with neighbouring columns, with the unit."""
    digits: int
    """Decimals shown; the tooltip has the full value."""

    @property
    def description(self) -> str:
        """Text of the data dictionary."""
        return str(STATS_COLUMNS.get(self.key, {}).get("Description", self.title))


MEASURES = (
    Column("n_voxels", "count", "Voxels", 0),
    Column("volume_mm3", "label", "Volume (mm³)", 1),
    Column("volume_pv_mm3", "weighted", "Volume (mm³)", 1),
    Column("mean_ppm", "mean", "Susceptibility (ppm)", 3),
    Column("median_ppm", "median", "Susceptibility (ppm)", 3),
    Column("std_ppm", "SD", "Susceptibility (ppm)", 3),
    Column("p05_ppm", "5th %", "Susceptibility (ppm)", 3),
    Column("p95_ppm", "95th %", "Susceptibility (ppm)", 3),
    Column("mean_pv_ppm", "weighted", "Susceptibility (ppm)", 3),
    Column("core_mean_ppm", "core", "Susceptibility (ppm)", 3),
    Column("mean_ref_ppm", "mean", "Relative to the reference region (ppm)", 3),
    Column("core_mean_ref_ppm", "core", "Relative to the reference region (ppm)", 3),
    Column("mean_probability", "mean", "Probability", 2),
)

QC_MEASURES = (
    Column("n_components", "components", "Segmentation", 0),
    Column("mean_entropy_bits", "entropy (bit)", "Segmentation", 2),
    Column("mass_outside_fraction", "outside", "Segmentation", 2),
    Column("expected_dice", "expected Dice", "Segmentation", 2),
    Column("rim_contrast_ppm", "contrast (ppm)", "Surrounding map", 3),
    Column("boundary_gradient_ppm_per_mm", "gradient (ppm/mm)", "Surrounding map", 3),
    Column("edge_distance_mm", "to the edge (mm)", "Surrounding map", 1),
    Column("volume_z", "volume", "Literature norms (SD)", 1),
    Column("mean_ppm_z", "susceptibility", "Literature norms (SD)", 1),
    Column("volume_asymmetry", "volume", "(Left − right) / mean", 2),
    Column("mean_ppm_asymmetry", "susceptibility", "(Left − right) / mean", 2),
)

_MAP_QUALITY = {
    "noise_sd_ppm": ("Noise SD", "ppm"),
    "streaking_index": ("Streaking index", ""),
    "rim_residual_ppm": ("Residual at the rim", "ppm"),
    "box_margin_mm": ("Margin of the box", "mm"),
}
"""Key of ``_qc.json`` → name and unit."""


def write_participant_page(
    output_dir: Path,
    participant: str,
    *,
    models: Sequence[str] | None = None,
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
    models : sequence of str, optional
        Only these models; by default all.
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
    results = read_results(output_dir, participant, models=models)
    return write_page(
        "participant.html.j2",
        output_dir / f"sub-{participant}.html",
        participant=f"sub-{participant}",
        results=results,
        sessions=sorted({result.session for result in results if result.session}),
        models=sorted({result.model for result in results}),
        failures=failures,
        outdated=outdated,
        methods=describe_methods(results),
        window=WINDOW_PPM,
        measures=MEASURES,
        qc_measures=QC_MEASURES,
        column_groups=_column_groups,
        facts=_facts,
        is_found=is_found,
        is_without_voxel=is_without_voxel,
    )


def _column_groups(result: ScanResult, columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Select the columns that the table has, by their shared headings."""
    present = [column for column in columns if result.rows and column.key in result.rows[0]]
    return [(group, list(members)) for group, members in groupby(present, key=lambda column: column.group)]


def _facts(result: ScanResult) -> dict[str, dict[str, str]]:
    """Return input, settings and versions as headings → names → values."""
    qc = result.qc
    reference: Mapping[str, Any] = qc.get("reference") or {}
    return {
        "Input": _describe_input(qc.get("input") or {}),
        "Reconstruction": _describe_reconstruction(qc.get("reconstruction") or {}),
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


def _describe_input(record: Mapping[str, Any]) -> dict[str, str]:
    units = format_value(record.get("units"))
    if record.get("units_from"):
        units += f" (from the {record['units_from']})"
    n_replaced = record.get("n_replaced")
    return {
        "Map": format_value(record.get("file")),
        "Units": units,
        "Reference region": format_value(record.get("reference")),
        "Voxel size": format_size(record.get("voxel_size_mm")),
        "Matrix": format_size(record.get("shape"), unit=""),
        "Stored as": format_value(record.get("orientation")),
        "Replaced voxels": "none" if n_replaced == 0 else format_value(n_replaced),
    }


def _describe_reconstruction(record: Mapping[str, Any]) -> dict[str, str]:
    """Return how a chi map was reconstructed from multi-echo GRE; empty if it was given."""
    if not record:
        return {}
    times_ms = ", ".join(f"{1000 * float(time_s):g}" for time_s in record.get("EchoTime") or [])
    sign = {1: "increases with the field", -1: "decreases with the field"}.get(record.get("PhaseSign", 0), NO_VALUE)
    return {
        "Echo times": f"{times_ms} ms" if times_ms else NO_VALUE,
        "Main field": format_value(record.get("MagneticFieldStrength"), "T"),
        "Brain mask": format_value(record.get("BrainMask")),
        "Phase": f"{sign} (from {format_value(record.get('PhaseSignFrom'))})",
        "Readout": format_value(record.get("ReadoutCorrection")),
        "Unwrapping": format_value(record.get("Unwrapping")),
        "Field": format_value(record.get("FieldFit")),
        "Background field": format_value(record.get("BackgroundFieldRemoval")),
        "Inversion": format_value(record.get("DipoleInversion")),
    }
