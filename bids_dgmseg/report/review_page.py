"""The review page: one montage per nucleus over all scans, on which raters decide by keyboard.

The page is a file; decisions are kept by the browser and saved as ``qc_decisions.tsv`` from there.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion, map_coordinates

from bids_dgmseg.bids.current import judge_stored
from bids_dgmseg.bids.dataset import dataset_roots, find_map
from bids_dgmseg.bids.entities import is_in_standard_space, join_entities, split_entities
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.io.files import (
    list_folders,
    path_to_url,
    read_optional_json,
    read_tsv,
    sha256_of,
    sha256_or_error,
    sidecar_path,
    write_bytes,
)
from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES, Structure
from bids_dgmseg.report.html import render, scan_anchor
from bids_dgmseg.report.mosaic import WINDOW_PPM

PAGE = "review.html"

TILE = 116
"""Pixels of a slice; a tile is an axial and a coronal one side by side."""

COLUMNS = 5
"""Tiles per row of a montage."""

PER_MONTAGE = 500
"""Scans per montage; browsers do not draw images that are much higher than 16,000 pixels."""

_EXTENT_MM = 44.0
_PLANES = ((2, 0, 1), (1, 0, 2))  # axis across the slice, to the right, up

_SHADES = 64

OUTLINE = (255, 214, 10)

PALETTE = np.array(
    [*([round(255 * shade / (_SHADES - 1))] * 3 for shade in range(_SHADES)), (125, 135, 148), OUTLINE], np.uint8
)
"""Colours of a montage: greys, the outlines of the other nuclei, that of the nucleus."""


@dataclass(frozen=True)
class ReviewScan:
    """A scan on the review page."""

    name: str
    model: str
    labels: Path
    chi: Path | None
    """None if the map is not found."""
    page: str
    """Link to the participant's page; empty if there is none."""
    ratings: Mapping[str, str]
    """Nucleus → automatic rating; ``all`` is the scan."""
    checksum: str = ""
    """SHA-256 of the labels."""
    problem: str = ""
    """Why the results are out of date or edited; empty if they are current."""


def find_review_scans(output_dir: Path, *, bids_dir: Path | None = None, model: str | None = None) -> list[ReviewScan]:
    """Find the complete results of one model in an output folder, with their maps.

    Raises
    ------
    InputError
        If there are no results, or several models and none is chosen.
    """
    sidecars = [
        sidecar
        for folder in sorted(list_folders(output_dir, "sub-"))
        for parent in (folder, *sorted(list_folders(folder, "ses-")))
        for sidecar in sorted((parent / "anat").glob("*_dseg.json"))
        if sidecar.with_name(f"{sidecar.stem}.nii.gz").is_file() and not is_in_standard_space(sidecar.name)
    ]
    named = [(sidecar, _split(sidecar)) for sidecar in sidecars]
    models = sorted({its_model for _, (_, its_model) in named if its_model})
    if not models:
        raise InputError(f"{output_dir.name}: no *_dseg.nii.gz with its .json found; run the participant level first")
    if model is None and len(models) > 1:
        raise InputError(f"{output_dir.name}: results of several models ({', '.join(models)}); choose one with `model`")
    if model is not None and model not in models:
        raise InputError(f"{output_dir.name}: no results of {model} (found {', '.join(models)}); check `model`")
    model = model or models[0]
    chosen = [(sidecar, name) for sidecar, (name, its_model) in named if its_model == (model or models[0])]
    roots = dataset_roots(output_dir, bids_dir)
    return [_describe(output_dir, sidecar, name, model, roots) for sidecar, name in chosen]


def rated_nuclei(scans: Sequence[ReviewScan]) -> list[Structure]:
    """Return the nuclei that have a rating in any scan; if there are no ratings, the sixteen of the default model."""
    rated = {name for scan in scans for name in scan.ratings}
    return [structure for structure in ALL_STRUCTURES if structure.abbreviation in rated] or list(STRUCTURES)


def _split(sidecar: Path) -> tuple[str, str]:
    """Return the name of a scan, as the group level has it, and the model."""
    entities = split_entities(sidecar.name.removesuffix("_dseg.json"))
    model = entities.pop("seg", "")
    return join_entities(entities), model


def _describe(output_dir: Path, sidecar: Path, name: str, model: str, roots: Mapping[str, list[Path]]) -> ReviewScan:
    stem = sidecar.name.removesuffix("_dseg.json")
    ratings: dict[str, str] = {}
    stats = sidecar.with_name(f"{stem}_stats.tsv")
    if stats.is_file():
        table = read_tsv(stats, dtype=object)
        if {"abbreviation", "rating"} <= set(table):
            ratings = dict(table[["abbreviation", "rating"]].dropna().itertuples(index=False, name=None))
    record = sidecar.with_name(f"{stem}_qc.json")
    whole = read_optional_json(record).get("rating")
    page = f"{name.partition('_')[0]}.html"
    link = f"{path_to_url(page)}#{scan_anchor(name, model)}" if (output_dir / page).is_file() else ""
    labels = sidecar.with_name(f"{stem}_dseg.nii.gz")
    return ReviewScan(
        name,
        model,
        labels,
        find_map(sidecar, roots),
        link,
        ratings | ({"all": whole} if whole else {}),
        sha256_or_error(labels),
        judge_stored(output_dir, record, roots).reason,
    )


def draw_tile(chi: NDArray[Any] | None, dseg: Volume, structure: Structure) -> NDArray[np.uint8] | None:
    """Draw a nucleus on the axial and the coronal slice with its largest area; None if it has no voxel.

    The patient's left is on the left. Its outline is yellow, those of the others are grey. Without a map
    the slices are black.

    Returns
    -------
    ndarray of shape (TILE, 2 * TILE)
        Indices into `PALETTE`.
    """
    mask = dseg.array == structure.index
    if not mask.any():
        return None
    where = np.argwhere(mask)
    centre, sizes = where.mean(axis=0), np.asarray(dseg.voxel_size_mm)
    halves = []
    for axis, across, up in _PLANES:
        place = int(np.bincount(where[:, axis]).argmax())
        steps = (np.arange(TILE) - (TILE - 1) / 2) * _EXTENT_MM / TILE
        grid = np.empty((3, TILE, TILE))
        grid[axis] = place
        grid[across] = (centre[across] + steps / sizes[across])[None, :]
        grid[up] = (centre[up] - steps / sizes[up])[:, None]
        shade = np.zeros((TILE, TILE))
        if chi is not None:
            low, high = WINDOW_PPM
            values = map_coordinates(np.nan_to_num(chi), grid, order=1, cval=0.0, mode="constant")
            shade = np.clip((values - low) / (high - low), 0, 1)
        pixels = np.round((_SHADES - 1) * shade).astype(np.uint8)
        labels = map_coordinates(dseg.array, grid, order=0, cval=0, mode="constant")
        for index in np.unique(labels[labels > 0]):
            inside = labels == index
            edge = inside & ~binary_erosion(inside)
            pixels[edge] = len(PALETTE) - (1 if index == structure.index else 2)
        halves.append(pixels)
    return np.hstack(halves)


def write_review_page(
    output_dir: Path, scans: Sequence[ReviewScan], *, report: Callable[[str], None] = lambda line: None
) -> tuple[Path, list[str]]:
    """Write ``review.html`` and montages of each nucleus (``figures/review_CN_L.png``, from 501 scans on ``…_2.png``).

    Parameters
    ----------
    output_dir : Path
    scans : sequence of ReviewScan
        Results of one model.
    report : callable
        Called with one progress line per scan.

    Returns
    -------
    page : Path
    warnings : list of str
    """
    nuclei = rated_nuclei(scans)
    shown: dict[str, list[bool]] = {structure.abbreviation: [] for structure in nuclei}
    outdated = [f"{scan.name} ({scan.problem})" for scan in scans if scan.problem]
    warnings = [f"out of date or edited: {list_some(outdated)}; run the participant level again"] if outdated else []
    for start in range(0, len(scans), PER_MONTAGE):
        part = scans[start : start + PER_MONTAGE]
        height = math.ceil(len(part) / COLUMNS) * TILE
        montages = {name: np.zeros((height, COLUMNS * 2 * TILE), np.uint8) for name in shown}
        for number, scan in enumerate(part):
            for structure, tile in _draw_scan(scan, nuclei, warnings):
                shown[structure.abbreviation].append(tile is not None)
                if tile is not None:
                    row, column = divmod(number, COLUMNS)
                    area = np.s_[row * TILE : (row + 1) * TILE, column * 2 * TILE : (column + 1) * 2 * TILE]
                    montages[structure.abbreviation][area] = tile
            report(f"{start + number + 1} of {len(scans)} scans drawn")
        ending = f"_{start // PER_MONTAGE + 1}" if start else ""
        for name, montage in montages.items():
            if any(shown[name][start:]):
                _save_montage(montage, output_dir / "figures" / f"review_{name}{ending}.png")
    kept = [name for name, places in shown.items() if any(places)]
    page = render_review_page(output_dir, scans, kept, shown)
    return write_bytes(page, output_dir / PAGE), warnings


def _save_montage(montage: NDArray[np.uint8], path: Path) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(montage, mode="P")
    image.putpalette(PALETTE.tobytes())
    image.save(buffer, format="PNG", optimize=True)
    write_bytes(buffer.getvalue(), path)


def _draw_scan(
    scan: ReviewScan, nuclei: Sequence[Structure], warnings: list[str]
) -> Iterator[tuple[Structure, NDArray[np.uint8] | None]]:
    chi = None
    dseg = read_labels(scan.labels)
    if scan.chi is None:
        warnings.append(f"{scan.name}: chi map not found; outlines are shown on black (pass `bids_dir`)")
    else:
        volume = Volume.read(scan.chi)
        if volume.shape == dseg.shape:
            chi = _in_ppm(volume.array, scan)
        else:
            warnings.append(f"{scan.name}: the map has shape {volume.shape}, the labels {dseg.shape}; drawn on black")
    for structure in nuclei:
        yield structure, draw_tile(chi, dseg, structure)


def _in_ppm(array: NDArray[Any], scan: ReviewScan) -> NDArray[Any]:
    """Return the map in ppm, as its results state its unit."""
    sidecar = read_optional_json(sidecar_path(scan.labels))
    return np.asarray(array / 1000 if sidecar.get("InputUnits") == "ppb" else array)


def render_review_page(
    output_dir: Path, scans: Sequence[ReviewScan], nuclei: Sequence[str], shown: Mapping[str, Sequence[bool]]
) -> bytes:
    """Render the page; names of files are data, never markup."""
    content = {
        "results": sha256_of({"labels": [scan.checksum for scan in scans]}),  # the browser keeps decisions by labels
        "model": scans[0].model,
        "tile": TILE,
        "columns": COLUMNS,
        "scansPerMontage": PER_MONTAGE,
        "nuclei": list(nuclei),
        "scans": [
            {
                "name": scan.name,
                "page": scan.page,
                "ratings": scan.ratings,
                "labels": scan.checksum,
                "problem": scan.problem,
                "shown": {name: shown[name][number] for name in nuclei},
            }
            for number, scan in enumerate(scans)
        ],
    }
    text = json.dumps(content, ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")
    return render("review.html.j2", study=output_dir.name, n_scans=len(scans), nuclei=nuclei, data=Markup(text))
