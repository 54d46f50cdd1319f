"""The data of a study as files: collected from output folders of the participant level, and read back for analyses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, read_json, read_tsv, write_json, write_tsv
from bids_dgmseg.study.cohort import ENTITY_COLUMNS, Cohort, load_cohort
from bids_dgmseg.study.results_folders import ResultsFolder, ResultsSelection
from bids_dgmseg.study.tabular_files import ScanTable, scan_tables, write_scan_table

_DEMOGRAPHICS = {
    "participant_id": "person",
    "age": "age_years",
    "years": "years",
    "sex": "sex",
    "group": "group",
}
"""Column of `Cohort.demographics` → column of ``scans.tsv``."""

_NUMBERS = ("age_years", "years")

COHORT_KEYS = {
    "keys": "First columns of all tables, which identify a scan and model",
    "strata": "Columns of the keys that are never pooled",
    "stats_columns": "Columns of the _stats.tsv",
    "participants_columns": "Columns of participants.tsv and sessions.tsv, the last columns of the tables",
    "descriptions": "Data dictionary of these columns",
    "dictionaries": "Table → data dictionary",
    "settings": "What was asked for and found",
    "spellings": "Warnings about values of site and group that differ only in a separator",
    "folders": "Output folders that the tables were collected from",
    "decisions": "Raters' decisions, one record each",
    "warnings": "Everything unusual in the files",
    "n_damaged": "Tables that cannot be used",
    "n_outdated": "Scans whose results are out of date",
}
"""Content of ``cohort.json``."""


@dataclass(frozen=True, kw_only=True)
class CollectedStats:
    """Files with the data of a study. Ages are in years, volumes in mm³, susceptibilities in ppm."""

    stats: Path
    """Long table, one row per scan, model and nucleus, in the order of `scans`: keys of the scan, age, the columns of
    ``_stats.tsv``, why the value enters no statistics (``excluded``), columns of participants.tsv and sessions.tsv."""
    volumes: Path
    """One row per scan and model, one column per nucleus."""
    susceptibility: Path
    """One row per scan and model, one column per nucleus."""
    qc: Path
    """One row per scan and model: keys, age, values of ``_qc.json``, columns of participants.tsv and sessions.tsv."""
    maps: Path | None = None
    """One row per scan and model, one column per nucleus and further map; None if none was measured."""
    scans: Path
    """One row per scan and model: keys; ``person``, unique for each participant; ``age_years``; ``years``, the
    participant's time axis; ``sex`` and ``group`` without codes of missing values; ``n_rows``, rows in `stats`."""
    cohort: Path
    """JSON with `COHORT_KEYS`."""

    @property
    def tables(self) -> dict[str, Path]:
        """Return the tables that are part of the results, by name."""
        paths = (self.stats, self.volumes, self.susceptibility, self.qc, self.maps)
        return {path.stem: path for path in paths if path}


def collect_stats(
    folders: Sequence[ResultsFolder],
    out_dir: Path,
    *,
    selection: ResultsSelection | None = None,
    site_column: str | None = None,
    group_column: str | None = None,
    age_column: str | None = None,
    include_failed: bool = False,
    qc: Sequence[Path] = (),
) -> CollectedStats:
    """Collect the results of all or the selected scans, and write them to a folder with what analyses need.

    Parameters
    ----------
    folders : sequence of ResultsFolder
        Output folders of the participant level, see `find_results_folders`.
    out_dir : Path
        Existing folder for the files.
    selection, site_column, group_column, age_column, include_failed, qc
        See `load_cohort`.

    Raises
    ------
    InputError
        If there are no results or none is selected, a named column does not exist, or a table cannot be read or joined.
    """
    cohort = load_cohort(
        folders,
        selection=selection,
        site_column=site_column,
        group_column=group_column,
        age_column=age_column,
        include_failed=include_failed,
        qc=qc,
    )
    tables = scan_tables(cohort)
    paths = [write_scan_table(table, out_dir / f"{table.name}.tsv") for table in tables]
    demographics = cohort.demographics[[*_DEMOGRAPHICS]].rename(columns=_DEMOGRAPHICS)
    n_rows = cohort.stats.groupby("scan").size().reindex(range(len(cohort.scans)), fill_value=0)
    scans = pd.concat([cohort.keys, demographics, n_rows.rename("n_rows")], axis=1)
    content = {
        "keys": list(cohort.keys),
        "strata": cohort.strata,
        "stats_columns": cohort.stats_columns,
        "participants_columns": list(cohort.participants),
        "descriptions": cohort.descriptions,
        "dictionaries": {table.name: table.dictionary for table in tables},
        "settings": cohort.settings,
        "spellings": cohort.spellings,
        "folders": [folder.path for folder in folders],
        "decisions": cohort.decisions.astype(object).where(cohort.decisions.notna(), None).to_dict("records"),
        "warnings": cohort.warnings,
        "n_damaged": cohort.n_damaged,
        "n_outdated": cohort.n_outdated,
    }
    stats, volumes, susceptibility, quality, *maps = paths
    return CollectedStats(
        stats=stats,
        volumes=volumes,
        susceptibility=susceptibility,
        qc=quality,
        maps=maps[0] if maps else None,
        scans=write_tsv(scans, out_dir / "scans.tsv"),
        cohort=write_json(content, out_dir / "cohort.json"),
    )


def read_cohort(files: CollectedStats, *, measures: Sequence[str]) -> Cohort:
    """Read the files of `collect_stats`; of ``_stats.tsv``, only the measures that exist are read.

    Raises
    ------
    InputError
        If a file cannot be read, or is not of `collect_stats`.
    """
    content = read_json(files.cohort)
    if missing := sorted(COHORT_KEYS.keys() - content.keys()):
        raise InputError(f"{files.cohort.name}: has no {list_some(missing)}; use out_cohort of CollectStats")
    table = read_tsv(files.scans, dtype=object)
    keys = table[content["keys"]].fillna(MISSING)
    persons = table[[*_DEMOGRAPHICS.values()]].astype(dict.fromkeys(_NUMBERS, float))
    demographics = persons.set_axis([*_DEMOGRAPHICS], axis=1).assign(site=keys["site"].where(keys["site"] != MISSING))
    qc = read_tsv(files.qc, dtype=object)
    names = content["participants_columns"]
    front = len(content["keys"]) + 2  # keys, age and time
    wanted = {"abbreviation", "excluded", *measures}
    places = [front + n for n, name in enumerate([*content["stats_columns"], "excluded"]) if name in wanted]
    stats = read_tsv(files.stats, dtype=object, usecols=places)
    scan = np.repeat(np.arange(len(table)), table["n_rows"].astype(int))
    return Cohort(
        scans=_find_entities(keys),
        keys=keys,
        stats=stats.assign(scan=scan),
        stats_columns=tuple(content["stats_columns"]),
        qc=qc.iloc[:, front : len(qc.columns) - len(names)],
        participants=qc.iloc[:, len(qc.columns) - len(names) :].set_axis(names, axis=1),
        descriptions=content["descriptions"],
        demographics=demographics,
        strata=tuple(content["strata"]),
        settings=content["settings"],
        spellings=content["spellings"],
        decisions=pd.DataFrame(content["decisions"], dtype=object),
        warnings=tuple(content["warnings"]),
        n_damaged=content["n_damaged"],
        n_outdated=content["n_outdated"],
    )


def read_scan_tables(files: CollectedStats) -> list[ScanTable]:
    """Return the tables that are part of the results, as files."""
    dictionaries = read_json(files.cohort)["dictionaries"]
    return [ScanTable(name, path, dictionaries[name]) for name, path in files.tables.items()]


def _find_entities(keys: pd.DataFrame) -> pd.DataFrame:
    """Return the BIDS entities of each scan by their keys, NaN where there is none."""
    entity_of = {column: entity for entity, column in ENTITY_COLUMNS.items()}
    names = {column: entity_of.get(column, column) for column in map(str, keys) if column not in ("dataset", "site")}
    entities = keys[[*names]].rename(columns=names)
    entities = entities.where(entities != MISSING)
    return entities.assign(
        **{
            key: entities[key].map(lambda label, prefix=f"{key}-": label.removeprefix(prefix), na_action="ignore")
            for key in ("sub", "ses")
        }
    )
