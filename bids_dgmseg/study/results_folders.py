"""Output folders of the participant level: their names, the scans to use with their results, and the participants."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.bids.dataset import linked_datasets
from bids_dgmseg.bids.resume import explain_outdated
from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.io.files import is_file_or_unfetched, list_folders, read_optional_json, url_to_path
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.study.demographics import find_column
from bids_dgmseg.study.participants import ParticipantTables, Visit, read_participant_tables
from bids_dgmseg.study.qc_fields import flatten_qc, name_scanner
from bids_dgmseg.study.stats_files import RERUN, STATS, DamagedTableError, read_stats

_STATS_NAME = re.compile(rf"sub-[^_]+(_[^_-]+-[^_]+)*{re.escape(STATS)}")

_GENERIC_NAMES = ("bids_dgmseg", "derivatives")


@dataclass(frozen=True)
class ResultsFolder:
    """An output folder of the participant level."""

    path: Path
    name: str
    dataset: Path | None
    """Dataset with its participants.tsv and sessions.tsv."""
    link: str = "."
    """Relative path of the folder from the one of the group tables."""
    outdated: Mapping[str, str] = field(default_factory=dict)
    """File name of a ``_stats.tsv`` → why its results are out of date, as far as the input dataset shows."""


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
        return all(not wanted or entities.get(key) in wanted for key, _, _, wanted in self._criteria())

    def check(self, scans: Sequence[Mapping[Any, Any]], *, where: str) -> None:
        """Raise an `InputError` if a label does not exist, with the existing ones, or no scan is selected."""
        for key, prefix, parameter, wanted in self._criteria():
            known = {str(entities[key]) for entities in scans if not pd.isna(entities.get(key))}
            if unknown := [label for label in wanted if label not in known]:
                some = list_some(f"{prefix}{label}" for label in known) or "none"
                raise InputError(f"{where}: no results of {prefix}{unknown[0]}; check `{parameter}` (found {some})")
        if not any(map(self.includes, scans)):
            parameters = ", ".join(f"`{parameter}`" for _, _, parameter, wanted in self._criteria() if wanted)
            raise InputError(f"{where}: no scan matches all of {parameters}; check them")

    def describe(self) -> dict[str, list[str]]:
        """Return the labels by parameter, for the data dictionaries."""
        return {name.replace("_", "-"): list(wanted) for _, _, name, wanted in self._criteria() if wanted}

    def _criteria(self) -> Sequence[tuple[str, str, str, tuple[str, ...]]]:
        """List entity, prefix of its labels, parameter and labels."""
        return (
            ("sub", "sub-", "participant_label", self.participants),
            ("ses", "ses-", "session_label", self.sessions),
            ("seg", "", "model", self.models),
        )


@dataclass(frozen=True)
class Results:
    """Tables of a results folder, sorted by file name."""

    scans: pd.DataFrame
    """One row per scan and model, text: BIDS entities by their keys (``sub``, ``ses``, …, ``seg`` is the model), NaN if
    the name lacks one; ``page``, link to the participant's page; ``scanner``, its name if known; ``outdated``, why the
    results are out of date, otherwise None."""
    stats: pd.DataFrame
    """One row per scan and nucleus: ``scan``, a row of `scans`, and the other columns of `read_stats`."""
    qc: pd.DataFrame
    """Values of ``_qc.json`` as text, one row per scan; names are joined with underscores (``input_units``)."""
    damaged: Mapping[str, DamagedTableError]
    """File name of each table that cannot be used."""
    unfinished: tuple[str, ...]
    """File names of tables that lie beside labels without a sidecar, which is written last."""

    @property
    def visits(self) -> list[Visit]:
        """Labels of participant and session of each scan."""
        scans = self.scans.reindex(columns=["sub", "ses"]).to_numpy(object).tolist()
        return [(participant, None if pd.isna(session) else session) for participant, session in scans]

    @property
    def left_out(self) -> dict[tuple[str, str], list[str]]:
        """Names of the tables that are not used, by problem and remedy."""
        names: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, error in self.damaged.items():
            names[error.problem, error.remedy].append(name)
        if self.unfinished:
            names["unfinished (_dseg.json is missing)", RERUN] += self.unfinished
        return names

    @property
    def n_scans(self) -> int:
        """Number of scans, each once for all models."""
        entities = self.scans.drop(columns=["seg", "page", "scanner", "outdated"], errors="ignore")
        return len(entities.drop_duplicates())

    def select(self, chosen: Sequence[bool]) -> Results:
        """Return the results of some scans, renumbered."""
        mask = np.array(chosen, dtype=bool)
        row = np.cumsum(mask) - 1
        stats = self.stats[mask[self.stats["scan"]]]
        return replace(
            self,
            scans=self.scans[mask].reset_index(drop=True),
            qc=self.qc[mask].reset_index(drop=True),
            stats=stats.assign(scan=row[stats["scan"]]),
        )


@dataclass(frozen=True)
class FolderScans:
    """Selected scans of one folder."""

    folder: ResultsFolder
    results: Results
    tables: ParticipantTables
    warnings: Sequence[str]
    n_damaged: int


def read_folders(
    folders: Sequence[ResultsFolder], selection: ResultsSelection, *, roles: Iterable[Sequence[str]]
) -> list[FolderScans]:
    """Read the selected scans of all folders.

    `roles` are the names of the columns of age, sex and so on: each folder's columns are named as in the first folder
    with one.

    Raises
    ------
    InputError
        If there are no results, none is selected, a table of participants cannot be read, or no results belong to any
        of the participants listed.
    """
    found = [read_results(folder.path, link=folder.link, outdated=folder.outdated) for folder in folders]
    if not any(len(results.scans) for results in found):
        for folder, results in zip(folders, found, strict=True):
            for (problem, remedy), names in results.left_out.items():
                raise InputError(f"{folder.path.name}: all tables are {problem} ({names[0]}); {remedy}")
        where = ", ".join(folder.path.name for folder in folders)
        raise InputError(f"{where}: no *_stats.tsv found; run the participant level first")
    if selection:
        records = [record for results in found for record in results.scans.to_dict("records")]
        selection.check(records, where=list_some([folder.name for folder in folders]))
    scans = [_select_scans(folder, results, selection) for folder, results in zip(folders, found, strict=True)]
    listed = [set(part.tables.participants.index) for part in scans]
    measured = [{participant for participant, _ in results.visits} for results in found]
    if any(listed) and all(map(set.isdisjoint, listed, measured)):
        ids, labels = (list_some(f"sub-{label}" for label in set().union(*part)) for part in (listed, measured))
        raise InputError(f"participants.tsv: none of its ids ({ids}) has results (found {labels}); correct the ids")
    return _align_columns(scans, roles)


def _select_scans(folder: ResultsFolder, results: Results, selection: ResultsSelection) -> FolderScans:
    warnings = []
    for (problem, remedy), names in results.left_out.items():
        if selected := [name for name in names if selection.includes(read_entities(name))]:
            them = " for them" if remedy.startswith(RERUN) else ""
            warnings.append(f"{list_some(selected)}: {problem} and left out; {remedy}{them}")
    if lost := _lost_participants(results, selection):
        wanted = " or ".join(f"ses-{label}" for label in selection.sessions)
        warnings.append(
            f"`session_label`: {count(len(lost), 'participant')} without {wanted} left out: {list_some(lost)}"
        )
    n_damaged = sum(selection.includes(read_entities(name)) for name in results.damaged)
    chosen = results.select([selection.includes(record) for record in results.scans.to_dict("records")])
    # labels are matched among all scans with results: an id such as 3 may stand for sub-03 or for sub-3
    tables, more = read_participant_tables(
        folder.dataset, results.visits, selected=chosen.visits if selection else None
    )
    return FolderScans(folder, chosen, tables, [*warnings, *more], n_damaged)


def _lost_participants(results: Results, selection: ResultsSelection) -> list[str]:
    """Return the participants that only the choice of sessions leaves out."""
    anywhere = replace(selection, sessions=())
    records = results.scans.to_dict("records")
    found, kept = ({str(r["sub"]) for r in records if chosen.includes(r)} for chosen in (anywhere, selection))
    return sorted(f"sub-{label}" for label in found - kept)


def _align_columns(parts: Sequence[FolderScans], roles: Iterable[Sequence[str]]) -> list[FolderScans]:
    """Rename the age, sex, group and site columns of each folder as in the first folder that has them."""
    aligned = list(parts)
    for names in roles:
        aligned = [_align_sessions(part, names) for part in aligned]
        columns = [find_column(part.tables.columns, names) for part in aligned]
        first = next(filter(None, columns), None)
        for place, column in enumerate(columns):
            part = aligned[place]
            if column and first and column != first and first not in part.tables.columns:
                warning = f"participants.tsv: using its column {column} as {first}"
                tables = part.tables.rename({column: first})
                aligned[place] = replace(part, tables=tables, warnings=[*part.warnings, warning])
    return aligned


def _align_sessions(part: FolderScans, names: Sequence[str]) -> FolderScans:
    """Rename a column of sessions.tsv as in participants.tsv, if they name it differently."""
    tables = part.tables
    general, own = (find_column(table.columns, names) for table in (tables.participants, tables.sessions))
    if not general or not own or general in tables.sessions or own in tables.participants:
        return part
    warning = f"sessions.tsv: using its column {own} as {general}"
    return replace(part, tables=tables.rename({own: general}), warnings=[*part.warnings, warning])


def read_results(folder: Path, *, link: str = ".", outdated: Mapping[str, str] | None = None) -> Results:
    """Read the ``_stats.tsv`` and ``_qc.json`` of all scans below the participants' folders.

    `link` is the path of the folder that links to the participants' pages start with, `outdated` that of a
    `ResultsFolder`.

    If labels lie beside a table, their sidecar must exist too: it marks a complete scan. Tables without images, as
    sites share them, need none.
    """
    pages = {name for name in os.listdir(folder) if name.endswith(".html")}  # noqa: PTH208 names only
    found = sorted(_find_tables(folder), key=lambda item: item[0].name)
    unfinished = tuple(path.name for path, complete in found if not complete)
    complete = [path for path, is_complete in found if is_complete]
    no_model = DamagedTableError("without a model (seg-) in the name", "rename the file")
    without_model = dict.fromkeys((path for path in complete if "seg" not in read_entities(path.name)), no_model)
    paths = [path for path in complete if path not in without_model]
    known = [structure.abbreviation for structure in ALL_STRUCTURES]
    stats, damaged = read_stats(paths, numbers=STATS_COLUMNS, required=("volume_mm3", "mean_ppm"), known=known)
    whole = [path for path in paths if path not in damaged]
    scans, qc = [], []
    for path in whole:
        stem = path.name.removesuffix(STATS)
        record = read_optional_json(path.with_name(f"{stem}_qc.json"))
        scanner = record.pop("scanner", None)
        page = f"{path.name.partition('_')[0]}.html"
        scans.append(
            {
                **read_entities(path.name),
                "page": (PurePosixPath(link) / page).as_posix() if page in pages else None,
                "scanner": name_scanner(scanner) if isinstance(scanner, dict) else None,
                "outdated": (outdated or {}).get(path.name) or explain_outdated(path.with_name(f"{stem}_dseg.json")),
            }
        )
        qc.append(flatten_qc(record))
    return Results(
        pd.DataFrame(scans, dtype=object),
        stats.rename(columns={"file": "scan"}),
        pd.DataFrame(qc, index=range(len(qc)), dtype=object),
        {path.name: error for path, error in sorted((without_model | damaged).items(), key=lambda item: item[0].name)},
        unfinished,
    )


def find_results_folders(
    paths: Sequence[Path],
    *,
    datasets: Sequence[Path | None] = (),
    tables_dir: Path | None = None,
    outdated: Mapping[str, str] | None = None,
) -> list[ResultsFolder]:
    """Return output folders of the participant level with their names and the datasets of their participants.

    Parameters
    ----------
    paths : sequence of Path
    datasets : sequence of Path, optional
        Dataset with the participants.tsv of each folder; by default that of `find_dataset`.
    tables_dir : Path, optional
        Folder in which the group tables will be written, from which pages of participants are linked; by default the
        first folder.
    outdated : mapping of str to str, optional
        File name of a ``_stats.tsv`` in the first folder → why its results are out of date.

    Raises
    ------
    InputError
        If a folder does not exist, or there is not one dataset per folder.
    """
    if missing := [path for path in (*paths, *filter(None, datasets)) if not path.is_dir()]:
        raise InputError(f"{missing[0]}: no such folder; check the path")
    if datasets and len(datasets) != len(paths):
        raise InputError(f"`datasets`: {len(datasets)} for {count(len(paths), 'folder')} of results; pass one for each")
    start = tables_dir or paths[0]
    names = [path.name for path in paths] if list(paths) == [start] else name_folders(paths)
    return [
        ResultsFolder(
            path,
            name,
            dataset or find_dataset(path),
            link=Path(os.path.relpath(path, start)).as_posix(),
            outdated=(outdated or {}) if path == paths[0] else {},
        )
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
                    yield anat / name, f"{labels}.nii.gz" not in names or f"{labels}.json" in names


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
