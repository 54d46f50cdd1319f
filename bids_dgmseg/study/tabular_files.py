"""Group tables: measures of all scans and results of the analyses, each with its data dictionary."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from bids_dgmseg.errors import InputError, as_options
from bids_dgmseg.io.files import DataDictionary, read_data_dictionaries, temporary_name, write_json, write_tsv
from bids_dgmseg.measurement.columns import STATS_COLUMNS, describe_sampled
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.study.cohort import Cohort

FOLDER = "group"
"""Folder of the tables and figures, beside the page."""

_WIDE = ("volume_mm3", "mean_ppm")
"""Measures that have a table with one column per nucleus."""

_MAP_MEAN = re.compile("_mean(_|$)")

_FLOAT_FORMAT = "%.7g"

_GROUP_COLUMNS = read_data_dictionaries("group")["group"]

_COLUMNS = {**_GROUP_COLUMNS, **STATS_COLUMNS}


@dataclass(frozen=True)
class ResultTable:
    """A table of the group level."""

    name: str
    """File name without ``.tsv``."""
    rows: pd.DataFrame
    """A column ``scan``, a row of the cohort, is replaced by the keys of that scan in the file."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further content of the data dictionary, such as coefficients."""
    notes: tuple[str, ...] = ()
    not_computed: str = ""
    """Why the table is empty."""
    fits: tuple[Any, ...] = ()
    """What was fitted, to be saved for other scans; not part of the table."""
    dictionary: DataDictionary = field(default_factory=dict)
    """Entries of columns that are not those of the program."""

    def describe(self) -> dict[str, Any]:
        """Return the data dictionary, with the facts, notes and reason."""
        about: dict[str, Any] = {"Notes": list(map(as_options, self.notes)), **self.facts}
        columns = {column: self.dictionary.get(column) or describe(column) for column in map(str, self.rows)}
        return {**columns, **about}


@dataclass(frozen=True)
class Analysis:
    """Results of one analysis."""

    tables: tuple[ResultTable, ...]
    warnings: tuple[str, ...] = ()
    measures: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Measures for later analyses, with the index of the study's table."""


def empty_table(name: str, by: Sequence[str], why: str, facts: Mapping[str, Any] | None = None) -> ResultTable:
    """Return a table that was not computed."""
    return ResultTable(name, pd.DataFrame(columns=["measure", *by]), facts or {}, not_computed=why)


def not_computed_line(name: str, error: InputError, stratum: str = "") -> str:
    """Return a warning about a table."""
    return f"{name}.tsv: not computed{f' for {stratum}' if stratum else ''}: {error}"


def add_constants(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Add constant columns in front of a table."""
    return table.assign(**values)[[*values, *table.columns]]


def scan_tables(cohort: Cohort) -> list[ResultTable]:
    """Return the measures of all scans, followed by the participants' columns.

    These are ``group_stats`` (one row per nucleus), ``group_volumes``, ``group_susceptibility``, ``group_qc`` and
    ``group_maps``, the further maps (one row per scan and model). Unknown columns of ``_stats.tsv`` and ``_qc.json``
    are included.
    """
    scans = pd.Series(range(len(cohort.scans)), name="scan")
    volumes, susceptibilities = (_widen(cohort, measure, scans) for measure in _WIDE)
    means = [str(name) for name in cohort.stats if _MAP_MEAN.search(str(name)) and describe_sampled(str(name))]
    reference = cohort.qc.reindex(columns=["input_reference"]).set_axis(["reference"], axis=1)
    excluded = cohort.qc["excluded"]
    tables = {
        "group_stats": cohort.stats,
        "group_volumes": pd.concat([scans, excluded, volumes], axis=1),
        "group_susceptibility": pd.concat([scans, excluded, reference, susceptibilities], axis=1),
        "group_qc": pd.concat([scans, cohort.qc], axis=1),
        "group_maps": pd.concat([scans, excluded, *(_widen(cohort, name, scans) for name in means)], axis=1),
    }
    return [_with_participants(name, rows, cohort) for name, rows in tables.items() if means or name != "group_maps"]


def _widen(cohort: Cohort, measure: str, scans: pd.Series) -> pd.DataFrame:
    """Return a measure with one row per scan and one column per nucleus."""
    table = cohort.stats.pivot(index="scan", columns="abbreviation", values=measure)
    names = (structure.abbreviation for structure in ALL_STRUCTURES)
    bilateral = dict.fromkeys(structure.nucleus for structure in ALL_STRUCTURES)
    nuclei = [name for name in (*names, *bilateral) if name in table]
    return table.reindex(index=scans, columns=nuclei).reset_index(drop=True).add_suffix(f"_{measure}")


def _with_participants(name: str, rows: pd.DataFrame, cohort: Cohort) -> ResultTable:
    """Add age and participants' columns; one of these with the name of another column is renamed."""
    scan = rows["scan"].to_numpy()
    times = cohort.demographics
    since = times["years"] - times.groupby("participant_id")["years"].transform("min")
    front = pd.DataFrame(
        {"scan": scan, "age_years": times["age"].to_numpy()[scan], "years_since_first": since.to_numpy()[scan]}
    )
    taken = {*cohort.keys, *front, *rows}
    names = {
        column: f"participants_{column}" if column in taken else column for column in map(str, cohort.participants)
    }
    participants = cohort.participants.iloc[scan].rename(columns=names).reset_index(drop=True)
    dictionary = {
        shown: cohort.descriptions.get(column, {"Description": f"Column {column} of participants.tsv or sessions.tsv"})
        for column, shown in names.items()
    }
    complete = pd.concat([front, rows.drop(columns="scan").reset_index(drop=True), participants], axis=1)
    return ResultTable(name, complete, dictionary=dictionary)


def with_keys(table: ResultTable, keys: pd.DataFrame) -> ResultTable:
    """Replace a column ``scan`` by the keys of the scan; `keys` has one row per scan of the cohort."""
    if "scan" not in table.rows:
        return table
    front = keys.iloc[table.rows["scan"].to_numpy(int)].set_axis(table.rows.index)
    return replace(table, rows=pd.concat([front, table.rows.drop(columns="scan")], axis=1))


def write_tables(folder: Path, tables: Sequence[ResultTable], *, settings: Mapping[str, Any]) -> list[Path]:
    """Write the tables that have rows and their data dictionaries: all, or none if one cannot be written.

    They replace all tables of an earlier run. Numbers have seven digits; parameters in notes are named as options of
    the command line. `settings` are what the run was asked for and found. Return the paths of the tables.

    Raises
    ------
    InputError
        If a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=temporary_name(folder / "group-").name) as staging:
            paths = []
            for table in tables:
                if len(table.rows):
                    write_json({**table.describe(), "Settings": settings}, Path(staging, f"{table.name}.json"))
                    paths.append(write_tsv(table.rows, Path(staging, f"{table.name}.tsv"), float_format=_FLOAT_FORMAT))
            for earlier in folder.glob("group_*.*"):
                earlier.unlink()
            for path in Path(staging).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        name = Path(error.filename or folder).name
        raise InputError(f"{name}: cannot be written ({error.strerror}); check the output folder") from error
    return [folder / path.name for path in paths]


def describe(column: str) -> Mapping[str, str]:
    """Return the data dictionary entry of a column of a group table.

    >>> describe("DN_L_volume_mm3")["Description"].partition(":")[0]
    'left dentate nucleus'
    """
    if column in _COLUMNS:
        return _COLUMNS[column]
    unadjusted = column.removeprefix("ancova_")
    if unadjusted != column and unadjusted in _GROUP_COLUMNS:
        return {"Description": f"At equal covariates (ANCOVA): {_GROUP_COLUMNS[unadjusted]['Description']}"}
    for structure in ALL_STRUCTURES:
        names = {structure.abbreviation: structure.name}
        names[structure.nucleus] = f"{structure.name.partition(' ')[2]}, bilateral"
        for name, meaning in names.items():
            measure = column.removeprefix(f"{name}_")
            entry = STATS_COLUMNS.get(measure) if measure in _WIDE else describe_sampled(measure)
            if measure != column and entry:
                return {**entry, "Description": f"{meaning}: {entry['Description']}"}
    if sampled := describe_sampled(column):
        return sampled
    return {"Description": f"Value of {column} in the scan's files or file name"}


def list_empty_tables(tables: Sequence[ResultTable], warnings: Sequence[str]) -> list[str]:
    """Return one line per reason for tables that are not written, without reasons that are warnings already."""
    reasons: dict[str, list[str]] = {}
    for table in tables:
        if table.not_computed and not any(table.not_computed in line for line in warnings):
            reasons.setdefault(table.not_computed, []).append(f"{table.name}.tsv")
    return [f"{', '.join(names)}: not written, {why}" for why, names in reasons.items()]
