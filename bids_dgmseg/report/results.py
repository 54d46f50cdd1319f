"""What the output tree holds of one participant, read back for its page."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from bids_dgmseg.bids.names import split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import path_to_url
from bids_dgmseg.measurement.rating import RATINGS, Rating
from bids_dgmseg.report.formatting import anchor_of
from bids_dgmseg.report.slices import PLANES

_STATS, _QUALITY = "_stats.tsv", "_qc.json"


@dataclass(frozen=True)
class Picture:
    """A mosaic that lies in ``figures/``."""

    plane: str
    href: str
    """Relative to the page."""
    width: int
    height: int


@dataclass(frozen=True)
class Result:
    """One scan segmented by one model."""

    participant: str
    name: str
    """Entities of the scan without suffix, such as ``sub-01_ses-1_run-1``."""
    model: str
    quality: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Mapping[str, str], ...] = ()
    """Rows of ``_stats.tsv`` as they are written."""
    pictures: tuple[Picture, ...] = ()
    viewer: str = ""
    """Link to the interactive viewer; empty if there is none."""
    files: tuple[tuple[str, str], ...] = ()
    """Name and link of each file written but the masks."""
    n_masks: int = 0
    """Masks of nuclei and regions of the head beside them."""

    @property
    def anchor(self) -> str:
        """Identifier on the page."""
        return anchor_of(self.name, self.model)

    @property
    def title(self) -> str:
        """The scan within its participant, such as ``ses-1 · run-1``."""
        parts = self.name.split("_")
        return " · ".join(parts[1:]) if len(parts) > 1 else self.name

    @property
    def session(self) -> str | None:
        """Without ``ses-``."""
        found = re.search(r"(?:^|_)ses-([^_]+)", self.name)
        return found[1] if found else None

    @property
    def found(self) -> tuple[str, ...]:
        """Abbreviations of the nuclei that were found."""
        return tuple(row["abbreviation"] for row in self.rows if is_found(row))

    @property
    def unfilled(self) -> tuple[str, ...]:
        """Abbreviations of those that were found and fill no voxel: no picture shows them."""
        return tuple(row["abbreviation"] for row in self.rows if is_unfilled(row))

    @property
    def absent(self) -> tuple[str, ...]:
        """Abbreviations of the nuclei that were not found."""
        return tuple(row["abbreviation"] for row in self.rows if not is_found(row))

    @property
    def rating(self) -> str:
        """Rating of the scan: ``green``, ``amber`` or ``red``; empty where nobody gave one."""
        rating = str(self.quality.get("rating") or "")
        return rating if rating in RATINGS else ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not green."""
        return tuple(str(reason) for reason in self.quality.get("reasons") or ())

    @property
    def doubtful(self) -> tuple[Mapping[str, str], ...]:
        """Rows of the nuclei whose rating is not green, the red ones first."""
        rows = [row for row in self.rows if row.get("rating") in RATINGS[1:]]
        return tuple(sorted(rows, key=lambda row: -RATINGS.index(cast(Rating, row["rating"]))))

    @property
    def doubts(self) -> str:
        """How many nuclei have which rating but green, such as ``1 red, 3 amber``; empty where none."""
        counts = {rating: sum(row["rating"] == rating for row in self.doubtful) for rating in reversed(RATINGS[1:])}
        return ", ".join(f"{count} {rating}" for rating, count in counts.items() if count)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run said about this scan."""
        return tuple(str(warning) for warning in self.quality.get("warnings") or ())


def is_found(row: Mapping[str, str]) -> bool:
    """Whether the row of a nucleus has a voxel, or a weighted volume without one."""
    return _is_positive(row, "n_voxels") or is_unfilled(row)


def is_unfilled(row: Mapping[str, str]) -> bool:
    """Whether a nucleus was found and is too small to fill a voxel of the map."""
    return not _is_positive(row, "n_voxels") and _is_positive(row, "volume_pv_mm3")


def _is_positive(row: Mapping[str, str], column: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(row.get(column) or "nan") > 0
    return False


def read_results(output_dir: Path, participant: str, *, model_names: Sequence[str] | None = None) -> tuple[Result, ...]:
    """Read the tables and pictures of a participant, in the order of sessions and runs.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset.
    participant : str
        Without ``sub-``.
    model_names : sequence of str, optional
        Only these models; by default all.

    Raises
    ------
    InputError
        If a table or JSON file cannot be read.
    """
    folder = output_dir / f"sub-{participant}"
    stems = {
        path.with_name(path.name.removesuffix(ending))
        for ending in (_STATS, _QUALITY)
        for path in folder.rglob(f"sub-{participant}*{ending}")
    }
    results = (_read_result(stem, output_dir=output_dir, participant=participant) for stem in stems)
    chosen = (result for result in results if model_names is None or result.model in model_names)
    return tuple(sorted(chosen, key=lambda result: (_natural(result.name), result.model)))


def _read_result(stem: Path, *, output_dir: Path, participant: str) -> Result:
    quality_path, stats_path = (stem.with_name(stem.name + ending) for ending in (_QUALITY, _STATS))
    quality = _read_json(quality_path) if quality_path.exists() else {}
    rows = _read_table(stats_path) if stats_path.exists() else ()
    seg = re.search(r"_seg-([^_]+)", stem.name)
    bare = re.sub(r"_seg-[^_]+", "", stem.name)
    starts = (f"{stem.name}_", f"{bare}_Chimap.") if quality.get("reconstruction") else (f"{stem.name}_",)
    paths = sorted(path for path in stem.parent.glob("*") if path.name.startswith(starts))
    model = str(quality.get("model") or (seg[1] if seg else "n/a"))
    return Result(
        participant=participant,
        name=str(quality.get("scan") or bare),
        model=model,
        quality=quality,
        rows=rows,
        pictures=_find_pictures(stem.name, output_dir),
        viewer=_find_viewer(stem.name, output_dir),
        files=tuple((path.name, link(path, output_dir)) for path in paths if path.is_file()),
        n_masks=_count_masks(stem.parent, bare, model),
    )


def _count_masks(folder: Path, name: str, model: str) -> int:
    """Count the masks of a scan and model; a ``desc`` of the scan stands in front of the model's name."""
    own = split_entities(name)
    desc = own.get("desc", "")
    wanted = {**own, "desc": desc + model[:1].upper() + model[1:] if desc else model}
    masks = (split_entities(path.name.partition(".")[0]) for path in folder.glob("*_label-*_mask.nii.gz"))
    return sum({key: value for key, value in mask.items() if key != "label"} == wanted for mask in masks)


def _find_pictures(stem: str, output_dir: Path) -> tuple[Picture, ...]:
    """Find the mosaics; a scan that has its own ``desc-`` carries it before the plane's name."""
    bare = re.sub(r"_desc-[^_]+", "", stem)
    own = re.search(r"_desc-([^_]+)", stem)
    pictures = []
    for plane in PLANES:
        for label in dict.fromkeys([f"{own[1] if own else ''}{plane}", f"{own[1] if own else ''}{plane.capitalize()}"]):
            path = output_dir / "figures" / f"{bare}_desc-{label}_dseg.png"
            if path.exists():
                pictures.append(Picture(plane, link(path, output_dir), *_read_png_size(path)))
                break
    return tuple(pictures)


def _find_viewer(stem: str, output_dir: Path) -> str:
    """Find the interactive viewer, which is named as the mosaics are."""
    bare, own = re.sub(r"_desc-[^_]+", "", stem), re.search(r"_desc-([^_]+)", stem)
    label = f"{own[1]}Viewer" if own else "viewer"
    path = output_dir / "figures" / f"{bare}_desc-{label}_dseg.html"
    return link(path, output_dir) if path.exists() else ""


def link(path: Path, output_dir: Path) -> str:
    """Write a path as a link from the page, which lies at the top of the output."""
    return path_to_url(path.relative_to(output_dir))


def _read_png_size(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(b"\x89PNG"):
        raise InputError(f"{path.name}: not a PNG picture; delete it and run again with --force")
    width, height = struct.unpack(">II", head[16:24])
    return int(width), int(height)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name}: not valid JSON ({error}); delete it and run again with --force") from error
    return content if isinstance(content, dict) else {}


def _read_table(path: Path) -> tuple[Mapping[str, str], ...]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = tuple(csv.DictReader(file, delimiter="\t"))
    if not rows or "abbreviation" not in rows[0]:
        raise InputError(f"{path.name}: has no column abbreviation; delete it and run again with --force")
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts run-2 before run-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
