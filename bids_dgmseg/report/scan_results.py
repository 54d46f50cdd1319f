"""Results of one participant, read back from the output dataset for the page."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from bids_dgmseg.bids.entities import join_entities, split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import path_to_url, read_json
from bids_dgmseg.io.tables import read_tsv
from bids_dgmseg.measurement.rating import RATINGS, Rating
from bids_dgmseg.report.figures import natural_key
from bids_dgmseg.report.html import NO_VALUE, format_number, scan_anchor
from bids_dgmseg.report.mosaic import PLANES


@dataclass(frozen=True)
class Mosaic:
    """A PNG in ``figures/``."""

    plane: str
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
    qc: Mapping[str, Any] = field(default_factory=dict)
    """Content of ``_qc.json``."""
    rows: tuple[Mapping[str, str], ...] = ()
    """Rows of ``_stats.tsv`` as text, one per nucleus."""
    mosaics: tuple[Mosaic, ...] = ()
    viewer: str = ""
    """Link to the interactive viewer; empty if there is none."""
    files: tuple[tuple[str, str], ...] = ()
    """Names and links of all files except figures and masks."""
    n_masks: int = 0

    @property
    def anchor(self) -> str:
        """Identifier on the page."""
        return scan_anchor(self.name, self.model)

    @property
    def title(self) -> str:
        """Return the name within the participant, such as ``ses-1 · run-1``."""
        parts = self.name.split("_")
        return " · ".join(parts[1:]) if len(parts) > 1 else self.name

    @property
    def nuclei(self) -> list[list[Mapping[str, str]]]:
        """Rows by nucleus, both hemispheres together."""
        rows = groupby(self.rows, key=lambda row: row["abbreviation"].rpartition("_")[0])
        return [list(members) for _, members in rows]

    @property
    def session(self) -> str | None:
        """Label without ``ses-``."""
        return split_entities(self.name).get("ses")

    @property
    def found(self) -> tuple[str, ...]:
        """Abbreviations of the nuclei that were found."""
        return tuple(row["abbreviation"] for row in self.rows if is_found(row))

    @property
    def without_voxel(self) -> tuple[str, ...]:
        """Abbreviations of nuclei that were found but are too small to fill a voxel; no figure shows them."""
        return tuple(row["abbreviation"] for row in self.rows if is_without_voxel(row))

    @property
    def not_found(self) -> tuple[str, ...]:
        """Abbreviations of the nuclei that were not found."""
        return tuple(row["abbreviation"] for row in self.rows if not is_found(row))

    @property
    def rating(self) -> str:
        """Rating of the scan: ``green``, ``amber`` or ``red``; empty if it has none."""
        rating = str(self.qc.get("rating") or "")
        return rating if rating in RATINGS else ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the scan is not rated green."""
        return tuple(str(reason) for reason in self.qc.get("reasons") or ())

    @property
    def flagged(self) -> tuple[Mapping[str, str], ...]:
        """Rows of the nuclei rated red, then amber."""
        rows = [row for row in self.rows if row.get("rating") in RATINGS[1:]]
        return tuple(sorted(rows, key=lambda row: -RATINGS.index(cast(Rating, row["rating"]))))

    @property
    def flag_counts(self) -> str:
        """Numbers of flagged nuclei, such as ``1 red, 3 amber``; empty if all are green."""
        counts = {rating: sum(row["rating"] == rating for row in self.flagged) for rating in reversed(RATINGS[1:])}
        return ", ".join(f"{count} {rating}" for rating, count in counts.items() if count)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the run about this scan."""
        return tuple(str(warning) for warning in self.qc.get("warnings") or ())


def is_found(row: Mapping[str, str]) -> bool:
    """Return whether a nucleus has a voxel, or at least a probability-weighted volume."""
    return _is_positive(row, "n_voxels") or is_without_voxel(row)


def is_without_voxel(row: Mapping[str, str]) -> bool:
    """Return whether a nucleus was found but is too small to fill a voxel of the map."""
    return not _is_positive(row, "n_voxels") and _is_positive(row, "volume_pv_mm3")


def _is_positive(row: Mapping[str, str], column: str) -> bool:
    return format_number(row.get(column)) != NO_VALUE and float(row[column]) > 0


def read_results(output_dir: Path, participant: str, *, models: Sequence[str] | None = None) -> tuple[ScanResult, ...]:
    """Read the results of a participant, in the order of sessions and runs.

    A scan is complete if it has a ``_dseg.json``, which lists the files that belong to it.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset.
    participant : str
        Label without ``sub-``.
    models : sequence of str, optional
        Only these models; by default all.

    Raises
    ------
    InputError
        If a table, JSON file or figure cannot be read.
    """
    sidecars = (output_dir / f"sub-{participant}").rglob(f"sub-{participant}*_dseg.json")
    results = (_read_result(sidecar, output_dir) for sidecar in sidecars)
    chosen = (result for result in results if models is None or result.model in models)
    return tuple(sorted(chosen, key=lambda result: (natural_key(result.name), result.model)))


def _read_result(sidecar: Path, output_dir: Path) -> ScanResult:
    names = [*map(str, read_json(sidecar).get("OutputFiles") or ()), sidecar.relative_to(output_dir).as_posix()]
    paths = [output_dir / name for name in sorted(names) if (output_dir / name).is_file()]
    qc = next((read_json(path) for path in paths if path.name.endswith("_qc.json")), {})
    stats = [path for path in paths if path.name.endswith("_stats.tsv")]
    figures = [path for path in paths if path.parent.name == "figures"]
    others = [path for path in paths if path not in figures and not path.name.endswith(("_mask.nii.gz", "_mask.json"))]
    entities = split_entities(sidecar.name.partition(".")[0])
    model = str(qc.get("model") or entities.pop("seg", NO_VALUE))
    return ScanResult(
        name=str(qc.get("scan") or join_entities(entities)),
        model=model,
        qc=qc,
        rows=_read_rows(stats[0]) if stats else (),
        mosaics=tuple(
            Mosaic(plane, _href(path, output_dir), *_read_png_size(path))
            for plane in PLANES
            for path in figures
            if _figure_kind(path).endswith(plane) and path.suffix == ".png"
        ),
        viewer=next((_href(path, output_dir) for path in figures if _figure_kind(path).endswith("viewer")), ""),
        files=tuple((path.name, _href(path, output_dir)) for path in others),
        n_masks=sum(path.name.endswith("_mask.nii.gz") for path in paths),
    )


def _figure_kind(path: Path) -> str:
    """Read plane or viewer from ``desc``; the scan's own ``desc`` may come before it, as in ``rtsAxial``."""
    return split_entities(path.stem).get("desc", "").lower()


def _read_rows(path: Path) -> tuple[Mapping[str, str], ...]:
    table = read_tsv(path, dtype=str, na_values=[])
    if "abbreviation" not in table:
        raise InputError(f"{path.name}: column abbreviation not found; delete the file and rerun with --force")
    return tuple(cast(Sequence[Mapping[str, str]], table.to_dict("records")))


def _href(path: Path, output_dir: Path) -> str:
    return path_to_url(path.relative_to(output_dir))


def _read_png_size(path: Path) -> tuple[int, int]:
    """Read the size from the header; decoding a mosaic takes much longer."""
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or not header.startswith(b"\x89PNG"):
        raise InputError(f"{path.name}: not a PNG file; delete it and rerun with --force")
    width, height = struct.unpack(">II", header[16:24])
    return int(width), int(height)
