"""Results of the participant level: output folders, their ``_stats.tsv`` and ``_qc.json``, and the scans to use."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.bids.current import judge_stored
from bids_dgmseg.bids.dataset import dataset_roots, linked_datasets
from bids_dgmseg.bids.derivatives import SCANNER_FIELDS
from bids_dgmseg.bids.entities import Sidecars
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    MISSING,
    describe_missing,
    describe_unfetched,
    is_broken_symlink,
    is_file_or_unfetched,
    is_pointer_content,
    list_folders,
    read_optional_json,
    sha256_of,
    url_to_path,
)
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS, describe_sampled
from bids_dgmseg.study.participants import ParticipantTables, Visit, find_column, read_participant_tables

STATS = "_stats.tsv"

IMPORTED = "table"
"""Name of the segmentation (``seg-``) of results that were imported from a table."""

RERUN = "run the participant level again"

_STATS_NAME = re.compile(rf"sub-[^_]+(_[^_-]+-[^_]+)*{re.escape(STATS)}")

_GENERIC_NAMES = ("bids_dgmseg", "derivatives")

_REQUIRED = ("abbreviation", "volume_mm3", "mean_ppm")

_TEXT_COLUMNS = ("name", "abbreviation", "hemisphere", "rating", "reasons")

SCAN_FACTS = ("page", "scanner", "outdated", "is_unchecked", "images", "labels", "origin")
"""Columns of `FolderResults.scans` that are not entities."""

_ONLY_OUTPUTS = {"masks", "viewer", "bilateral", "further_maps", "lesion_masks", "output_space", "save_fields", "age"}
"""Options that add or leave out results, or differ between scans as their inputs do."""

_NOT_IN_QC_TABLE = (
    *("scan", "model", "scanner", "normalization", "settings", "versions"),
    *("made_from", "outputs", "checksum"),
)

_RECONSTRUCTION = (
    *("PhaseSign", "PhaseSignFrom", "BrainMask", "BrainVolume", "MagneticFieldStrength"),
    *("FieldNoise", "LocalFieldFraction", "FieldMisfit", "MisfitOverNoise"),
)
"""What may differ between the maps of a study; the steps of a reconstruction are in ``_qc.json`` only."""


@dataclass(frozen=True)
class ResultsFolder:
    """An output folder of the participant level."""

    path: Path
    name: str
    dataset: Path | None
    """Dataset with its participants.tsv and sessions.tsv."""
    link: str = "."
    """Relative path of the folder from the one of the group page."""


@dataclass(frozen=True)
class ResultsSelection:
    """Labels of the scans to use; empty means all."""

    participants: tuple[str, ...] = ()
    """Without ``sub-``."""
    sessions: tuple[str, ...] = ()
    """Without ``ses-``."""
    models: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.participants or self.sessions or self.models)

    def includes(self, entities: Mapping[Any, Any]) -> bool:
        """Return whether a scan with these entities is selected."""
        return all(not labels or entities.get(key) in labels for key, _, _, labels in self._criteria())

    def check(self, scans: Sequence[Mapping[Any, Any]], *, where: str) -> None:
        """Raise an `InputError` if a label does not exist, with the existing ones, or no scan is selected."""
        for key, prefix, parameter, labels in self._criteria():
            existing = {str(entities[key]) for entities in scans if not pd.isna(entities.get(key))}
            if unknown := [label for label in labels if label not in existing]:
                some = list_some(f"{prefix}{label}" for label in existing) or "none"
                raise InputError(f"{where}: no results of {prefix}{unknown[0]}; check `{parameter}` (found {some})")
        if not any(map(self.includes, scans)):
            parameters = ", ".join(f"`{parameter}`" for _, _, parameter, labels in self._criteria() if labels)
            raise InputError(f"{where}: no scan matches all of {parameters}; check them")

    def describe(self) -> dict[str, list[str]]:
        """Return the labels by parameter, for the data dictionaries."""
        return {name.replace("_", "-"): list(labels) for _, _, name, labels in self._criteria() if labels}

    def _criteria(self) -> Sequence[tuple[str, str, str, tuple[str, ...]]]:
        """List entity, prefix of its labels, parameter and labels."""
        return (
            ("sub", "sub-", "participant_label", self.participants),
            ("ses", "ses-", "session_label", self.sessions),
            ("seg", "", "model", self.models),
        )


@dataclass(frozen=True)
class FolderResults:
    """Results of one folder, sorted by file name, and the participants of its dataset."""

    folder: ResultsFolder
    scans: pd.DataFrame
    """One row per scan and model, text: BIDS entities by their keys (``sub``, ``ses``, …, ``seg`` is the model), NaN if
    the name lacks one; ``page``, link to the participant's page; ``scanner``, its name if known; ``outdated``, why the
    results are out of date, otherwise None; ``is_unchecked``, whether inputs are not there; ``images`` and ``labels``,
    checksums of the images and of ``_dseg.nii.gz``; ``origin``, version, weights and options. NaN if unknown."""
    stats: pd.DataFrame
    """One row per scan and nucleus, text: ``scan``, a row of `scans`, and the columns of ``_stats.tsv``."""
    qc: pd.DataFrame
    """Values of ``_qc.json`` as text, one row per scan; names are joined with underscores (``input_units``)."""
    damaged: Mapping[str, str]
    """File name of each table that cannot be used → why, and what to do."""
    tables: ParticipantTables = field(default_factory=ParticipantTables)
    warnings: tuple[str, ...] = ()

    @property
    def visits(self) -> list[Visit]:
        """Labels of participant and session of each scan."""
        scans = self.scans.reindex(columns=["sub", "ses"]).to_numpy(object).tolist()
        return [(participant, None if pd.isna(session) else session) for participant, session in scans]

    @property
    def n_scans(self) -> int:
        """Number of scans, each once for all models."""
        entities = self.scans.drop(columns=["seg", *SCAN_FACTS], errors="ignore")
        return len(entities.drop_duplicates())

    def select(self, selection: ResultsSelection) -> FolderResults:
        """Return the selected scans, renumbered."""
        mask = np.array([selection.includes(record) for record in self.scans.to_dict("records")], dtype=bool)
        row = np.cumsum(mask) - 1
        stats = self.stats[mask[self.stats["scan"]]]
        return replace(
            self,
            scans=self.scans[mask].reset_index(drop=True),
            qc=self.qc[mask].reset_index(drop=True),
            stats=stats.assign(scan=row[stats["scan"]]),
            damaged={name: why for name, why in self.damaged.items() if selection.includes(read_entities(name))},
        )


def read_folders(
    folders: Sequence[ResultsFolder], selection: ResultsSelection, *, roles: Sequence[Sequence[str]]
) -> list[FolderResults]:
    """Read the selected scans of all folders, and the tables of their participants.

    `roles` are the names of the columns of age, sex and so on: each folder's columns are named as in the first folder
    with one.

    Raises
    ------
    InputError
        If there are no results, none is selected, a table of participants is not BIDS, or no results belong to any of
        the participants listed.
    """
    parts = [read_results(folder, selection.sessions) for folder in folders]
    if not any(len(part.scans) for part in parts):
        for part in parts:
            for name, why in part.damaged.items():
                raise InputError(f"{part.folder.path.name}: no table can be used ({name}: {why})")
        where = ", ".join(folder.path.name for folder in folders)
        raise InputError(f"{where}: no *{STATS} found; run the participant level first")
    if selection:
        records = [record for part in parts for record in part.scans.to_dict("records")]
        selection.check(records, where=list_some([folder.name for folder in folders]))
    parts = [_read_participants(part.select(selection), is_all=not selection) for part in parts]
    listed = {label for part in parts for label in part.tables.participants.index}
    measured = {participant for part in parts for participant, _ in part.visits}
    if listed and listed.isdisjoint(measured):
        ids, labels = (list_some(f"sub-{label}" for label in each) for each in (listed, measured))
        raise InputError(f"participants.tsv: none of its ids ({ids}) has results (found {labels}); correct the ids")
    for names in roles:
        columns = [find_column(part.tables.columns, names) for part in parts]
        first = next(filter(None, columns), None)
        parts = [
            replace(part, tables=part.tables.rename({column: first})) if column and first else part
            for part, column in zip(parts, columns, strict=True)
        ]
    return parts


def _read_participants(part: FolderResults, *, is_all: bool) -> FolderResults:
    tables, warnings = read_participant_tables(part.folder.dataset, part.visits, all_scans=is_all)
    left_out = [f"{name}: left out: {why}" for name, why in part.damaged.items()]
    more = [f"{len(left_out) - 5} more tables are left out"] if len(left_out) > 5 else []
    unchecked = part.scans[part.scans["is_unchecked"].astype(bool)] if len(part.scans) else part.scans
    if len(unchecked):
        more.append(f"not checked for changes: {len(unchecked)} scan(s) whose inputs were not found")
        if len(unchecked) < len(part.scans):
            more[-1] += f" ({list_some(set('sub-' + unchecked['sub']))}); delete results of withdrawn or renamed scans"
    return replace(part, tables=tables, warnings=(*left_out[:5], *more, *warnings))


def read_results(folder: ResultsFolder, sessions: Sequence[str] = ()) -> FolderResults:
    """Read the ``_stats.tsv`` and ``_qc.json`` of all scans below the participants' folders.

    If labels lie beside a table, their record must exist too: it marks a complete scan. Tables without images, as
    sites share them, need none. `sessions` are those that are selected.

    Raises
    ------
    InputError
        If images are there, and none is the one that its results were made from.
    """
    pages = {name for name in os.listdir(folder.path) if name.endswith(".html")}  # noqa: PTH208 names only
    paths, damaged = [], {}
    for path, is_complete in sorted(_find_tables(folder.path), key=lambda item: item[0].name):
        if not is_complete:
            damaged[path.name] = f"unfinished (_qc.json is missing); {RERUN}"
        elif "seg" not in read_entities(path.name):
            damaged[path.name] = "no model (seg-) in the name; rename the file"
        else:
            paths.append(path)
    stats, unusable = read_stats(paths, required=_REQUIRED)
    scans, qc, comparisons = [], [], []
    # Images of another site may have the same names.
    dataset = folder.dataset if folder.link == "." else find_dataset(folder.path)
    roots, sidecars = dataset_roots(folder.path, dataset), cache(Sidecars)
    for path in [path for path in paths if path not in unusable]:
        source, labels = (path.with_name(path.name.removesuffix(STATS) + end) for end in ("_qc.json", "_dseg.nii.gz"))
        record = read_optional_json(source)
        page = f"{path.name.partition('_')[0]}.html"
        verdict = judge_stored(folder.path, source, roots, sidecars, sessions)
        recorded, scanner = verdict.record, record.get("scanner")
        comparisons.append(verdict.matches)
        scans.append(
            {
                **read_entities(path.name),
                "page": (PurePosixPath(folder.link) / page).as_posix() if page in pages else None,
                "scanner": name_scanner(scanner) if isinstance(scanner, dict) else None,
                "outdated": verdict.reason or None,
                "is_unchecked": verdict.is_unchecked and read_entities(path.name)["seg"] != IMPORTED,
                "images": (recorded and recorded.images) or None,
                "labels": recorded.outputs.get(labels.relative_to(folder.path).as_posix()) if recorded else None,
                "origin": _describe_origin(recorded.made_from) if recorded else None,
            }
        )
        qc.append(flatten_qc(record))
    if False in comparisons and True not in comparisons:
        raise InputError(
            f"{(dataset or folder.path).name}: all {comparisons.count(False)} results in {folder.path.name} were made "
            f"from different images; pass their dataset, or {RERUN}"
        )
    return FolderResults(
        folder,
        pd.DataFrame(scans, dtype=object),
        stats.rename(columns={"file": "scan"}),
        pd.DataFrame(qc, index=range(len(qc)), dtype=object),
        damaged | {path.name: why for path, why in unusable.items()},
    )


def _describe_origin(made_from: Any) -> dict[str, str]:
    """Return version, weights and options that change numbers, to be compared between scans."""
    options = {name: value for name, value in made_from.options.items() if name not in _ONLY_OUTPUTS}
    return {
        "version": made_from.version,
        "weights": sha256_of(made_from.weights)[:8],
        **{f"`{name}`": str(value) for name, value in options.items()},
    }


def read_stats(paths: Sequence[Path], *, required: Collection[str]) -> tuple[pd.DataFrame, dict[Path, str]]:
    """Read ``_stats.tsv`` files as text: every row is as long as the header, and measures are numbers or missing.

    Returns
    -------
    stats : DataFrame
        ``file``, the place among the usable tables, and the columns of all tables; NaN if a table lacks one.
    damaged : dict
        Path of each other table → why it cannot be used, and what to do.
    """
    damaged: dict[Path, str] = {}
    rows: dict[str, list[tuple[int, list[str]]]] = defaultdict(list)
    for place, path in enumerate(paths):
        try:
            header, lines = _read_lines(path, required)
            rows[header].append((place, lines))
        except InputError as error:
            damaged[path] = str(error).removeprefix(f"{path.name}: ")
    tables = [pd.DataFrame({"file": pd.Series(dtype=int)})]
    for header, files in rows.items():  # one frame per header: much faster than one per file
        text = "\n".join([header, *(line for _, lines in files for line in lines)])
        table = pd.read_csv(io.StringIO(text), sep="\t", dtype=object, keep_default_na=False, quoting=csv.QUOTE_NONE)
        table.insert(0, "file", np.repeat([place for place, _ in files], [len(lines) for _, lines in files]))
        for column in [str(name) for name in table if name in STATS_COLUMNS or describe_sampled(str(name))]:
            is_number = np.isfinite(pd.to_numeric(table[column], errors="coerce")) | (column in _TEXT_COLUMNS)
            for row in np.flatnonzero(~is_number & ~table[column].isin([MISSING, "", "nan"])):
                nucleus, value = table["abbreviation"].iloc[row], table[column].iloc[row]
                problem = f"damaged ({column} of {nucleus} is {value!r}); {RERUN} with `force`"
                damaged.setdefault(paths[table["file"].iloc[row]], problem)
        tables.append(table)
    usable = [place for place, path in enumerate(paths) if path not in damaged]
    stats = pd.concat(tables)
    stats = stats[stats["file"].isin(usable)].sort_values("file", kind="stable", ignore_index=True)
    return stats.assign(file=np.searchsorted(usable, stats["file"])), damaged


def _read_lines(path: Path, required: Collection[str]) -> tuple[str, list[str]]:
    """Return the header and the lines of a complete table."""
    try:
        content = path.read_bytes()
    except OSError as error:
        why = describe_missing(path) if is_broken_symlink(path) else f"cannot be read ({error.strerror}); check it"
        raise InputError(why) from error
    if is_pointer_content(content):
        raise InputError(describe_unfetched(path))
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    is_whole = lines and text.endswith("\n") and all(line.count("\t") == len(columns) - 1 for line in lines)
    if not is_whole or not {*required} <= {*columns}:
        raise InputError(f"cut short; {RERUN} with `force`")
    nuclei = Counter(line.split("\t")[columns.index("abbreviation")] for line in lines)
    if repeated := [name for name, n in nuclei.items() if n > 1]:
        raise InputError(f"damaged ({repeated[0]!r} appears twice); {RERUN} with `force`")
    return header, lines


def find_results_folders(
    paths: Sequence[Path], *, datasets: Sequence[Path | None] = (), tables_dir: Path | None = None
) -> list[ResultsFolder]:
    """Return output folders of the participant level with their names and the datasets of their participants.

    Parameters
    ----------
    paths : sequence of Path
    datasets : sequence of Path, optional
        Dataset with the participants.tsv of each folder; by default that of `find_dataset`.
    tables_dir : Path, optional
        Folder of the group page, from which pages of participants are linked; by default the first folder.

    Raises
    ------
    InputError
        If a folder does not exist, or there is not one dataset per folder.
    """
    if missing := [path for path in (*paths, *filter(None, datasets)) if not path.is_dir()]:
        raise InputError(f"{missing[0]}: no such folder; check the path")
    if datasets and len(datasets) != len(paths):
        raise InputError(f"`datasets`: {len(datasets)} for {len(paths)} folder(s) of results; pass one for each")
    start = tables_dir or paths[0]
    names = [path.name for path in paths] if list(paths) == [start] else name_folders(paths)
    return [
        ResultsFolder(path, name, dataset or find_dataset(path), link=Path(os.path.relpath(path, start)).as_posix())
        for path, name, dataset in zip(paths, names, datasets or [None] * len(paths), strict=True)
    ]


def find_dataset(folder: Path) -> Path | None:
    """Find the dataset with the participants.tsv of an output folder; None if there is none.

    This is the folder itself, otherwise a dataset among its ``DatasetLinks``, otherwise the one around its
    ``derivatives``.
    """
    linked = [Path(os.path.normpath(url_to_path(link, folder))) for link in linked_datasets(folder).values()]
    around = [folder.parent.parent] if folder.parent.name == "derivatives" else []
    described = (root for root in (folder, *linked, *around) if is_file_or_unfetched(root / "participants.tsv"))
    return next(described, None)


def has_results(folder: Path) -> bool:
    """Return whether there is any ``_stats.tsv`` below the participants' folders."""
    return next(_find_tables(folder), None) is not None


def read_entities(name: str) -> dict[str, str]:
    """Split the name of a table into BIDS entities.

    >>> read_entities("sub-01_ses-1_seg-dgm16_stats.tsv")
    {'sub': '01', 'ses': '1', 'seg': 'dgm16'}
    """
    pairs = (part.split("-", 1) for part in name.removesuffix(STATS).split("_"))
    return {key: value for key, value in pairs}


def _find_tables(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Find the tables, and whether each scan is complete."""
    for participant in list_folders(folder, "sub-"):
        for parent in (participant, *list_folders(participant, "ses-")):
            anat = parent / "anat"
            if anat.is_dir():
                names = set(os.listdir(anat))  # noqa: PTH208 3 x faster
                for name in filter(_STATS_NAME.fullmatch, names):
                    labels = f"{name.removesuffix(STATS)}_dseg"
                    yield anat / name, f"{labels}.nii.gz" not in names or f"{name.removesuffix(STATS)}_qc.json" in names


def name_folders(paths: Sequence[Path]) -> list[str]:
    """Return names of folders that distinguish them, without parts that say nothing, such as ``derivatives``.

    >>> name_folders([Path("/data/bern/derivatives/bids_dgmseg"), Path("/data/graz/derivatives/bids_dgmseg")])
    ['bern', 'graz']
    >>> name_folders([Path("/a/study"), Path("/b/study")])
    ['a/study', 'b/study']
    """
    parts = [[part for part in path.parts[1:] if part not in _GENERIC_NAMES] or [path.name] for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        # a name that is not valid UTF-8 could not be written to a table
        names = ["/".join(part[-depth:]).encode(errors="replace").decode() for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def name_scanner(fields: Mapping[str, Any]) -> str | None:
    """Return the name of a scanner from sidecar fields; None if they do not identify one.

    The field strength alone is not enough: scanners of many sites share it.

    >>> name_scanner({"Manufacturer": "Siemens", "ManufacturersModelName": "Prisma", "MagneticFieldStrength": 2.89})
    'Siemens Prisma 3T'
    """
    *texts, strength = (fields.get(name) for name in SCANNER_FIELDS)
    # serial numbers may be written as numbers
    words = [" ".join(str(text).split()) for text in texts if isinstance(text, str | int)]
    words = [word for word in words if word]
    if not words:
        return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        words.append(f"{round(2 * float(strength)) / 2:g}T")  # type: ignore[arg-type]  # 2.89 and 3 are the same strength
    return " ".join(words)


def flatten_qc(record: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Convert a nested record to text by names joined with underscores.

    Lists of numbers or words are joined, ``warnings`` are also counted, and only the number of echo times is kept.
    Settings, versions, tables and the steps of a reconstruction are left out.

    >>> flatten_qc({"input": {"units": "ppm", "shape": [64, 64]}, "warnings": ["a", "b"], "scan": "sub-01"})
    {'input_units': 'ppm', 'input_shape': '64 x 64', 'n_warnings': '2', 'warnings': 'a; b'}
    """
    flat: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if name in _NOT_IN_QC_TABLE:
            continue
        if name == "reconstruction" and isinstance(value, Mapping):
            if isinstance(times := value.get("EchoTime"), list):
                flat["reconstruction_n_echoes"] = str(len(times))
            flat |= {f"reconstruction_{key}": _to_text(value[key]) for key in _RECONSTRUCTION if key in value}
        elif isinstance(value, Mapping):
            flat |= flatten_qc(value, prefix=f"{name}_")
        elif isinstance(value, list):
            if any(isinstance(item, Mapping | list) for item in value):
                continue
            if name == "warnings":
                flat["n_warnings"] = str(len(value))
            are_numbers = all(isinstance(item, int | float) for item in value)
            flat[name] = _to_text((" x " if are_numbers else "; ").join(map(str, value)))
        else:
            flat[name] = _to_text(value)
    return flat


def _to_text(value: Any) -> str:
    if value is None:
        return MISSING
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return " ".join(text.split()) or MISSING
