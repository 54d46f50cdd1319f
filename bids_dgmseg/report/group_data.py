"""The group tables of an output tree, read back for their page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.bids.names import join_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_optional_json
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.formatting import NO_VALUE

MEASURES = ("volume_mm3", "mean_ppm")

_WEIGHTED = "volume_pv_mm3"

KEYS = ("dataset", "model", "abbreviation")

_ENTITIES = {
    "participant_id": "sub",
    "session_id": "ses",
    "acquisition": "acq",
    "ceagent": "ce",
    "reconstruction": "rec",
    "direction": "dir",
    "resolution": "res",
    "description": "desc",
}
"""Column of the group tables → entity of the file names; the columns of others are called as they are."""

_NO_ENTITIES = ("model", "dataset")
"""Columns among those of the entities; of the model's entity, ``seg``, a scan's name knows nothing."""

_SITE = "site"
"""The first column behind those of the entities."""

_APART = ("reconstruction", "description")

_TEXT = ("site", "group", "reference")

_NUCLEI = {structure.abbreviation: structure for structure in STRUCTURES}


@dataclass(frozen=True)
class GroupTable:
    """A table of the group level and what its columns mean."""

    name: str
    """File name without ``.tsv``."""
    rows: pd.DataFrame
    dictionary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Link from the page."""
        return f"{self.name}.tsv"


@dataclass(frozen=True)
class Cohort:
    """What the page is made from."""

    stats: pd.DataFrame
    """``group_stats.tsv``: a row a scan, model and nucleus, with ``scan``, ``nucleus`` and ``side`` added,
    ``volume_pv_mm3`` in any case (NaN where it is not known), and ``site`` and ``group`` where there is such a column.
    Maps reconstructed in another way are another ``model`` here, such as ``dgm16 desc-rts``; ``seg`` is the model
    alone."""
    tables: Mapping[str, GroupTable]
    """All tables that are there, by name; with ``scan`` where a row is of one."""

    @property
    def scans(self) -> pd.DataFrame:
        """A row a scan and model: the keys, site, group and age."""
        behind = [name for name in ("dataset", "site", "group", "age_years") if name in self.stats]
        keys = ["scan", "name", "participant_id", "model", "seg", *behind]
        return self.stats[keys].drop_duplicates(["scan", "model"]).reset_index(drop=True)

    @property
    def models(self) -> list[str]:
        """In the order of the table."""
        return [str(model) for model in self.stats["model"].unique()]

    def levels(self, factor: str) -> list[str]:
        """Values of ``site`` or ``group``, the most frequent first, without ``n/a``."""
        if factor not in self.stats:
            return []
        values = self.scans[factor]
        return [str(level) for level in values[values != NO_VALUE].value_counts().index]

    def n_without(self, factor: str) -> int:
        """Count the scans without a site or group."""
        return self.n_of(factor, NO_VALUE)

    def n_of(self, factor: str, level: str) -> int:
        """Count the scans of a site or group."""
        return self.scans.loc[self.scans[factor] == level, "scan"].nunique() if factor in self.stats else 0


def read_cohort(output_dir: Path, *, names: Sequence[str]) -> Cohort:
    """Read ``group_stats.tsv`` and those of the other tables that are there.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset.
    names : sequence of str
        The other tables, without ``.tsv``.

    Raises
    ------
    InputError
        If there is no ``group_stats.tsv``, or a table cannot be read.
    """
    tables = {name: _with_scans(table) for name in names if (table := read_table(output_dir, name))}
    settings = read_optional_json(output_dir / "group_stats.json").get("Settings") or {}
    group = str(settings.get("GroupColumn") or "group")
    wanted = {*KEYS, _SITE, "age_years", "rating", "reasons", *MEASURES, _WEIGHTED, group}
    stats = read_table(output_dir, "group_stats", columns=wanted, text=(group,))
    if stats is None:
        raise InputError(f"{output_dir.name}: no group_stats.tsv; run the group level first")
    if missing := [name for name in ("participant_id", "model", "abbreviation", *MEASURES) if name not in stats.rows]:
        raise InputError(f"group_stats.tsv: no column {', '.join(missing)}; run the group level again")
    return Cohort(_complete(stats.rows.rename(columns={group: "group"})), {"group_stats": stats, **tables})


def read_table(
    output_dir: Path, name: str, *, columns: set[str] | None = None, text: Sequence[str] = ()
) -> GroupTable | None:
    """Read a table and its data dictionary; None where there is no such file.

    Numbers are numbers, ``n/a`` is missing; participants, sites and groups stay text, as ``01`` is another than ``1``.
    Where a row is of one scan, ``name`` is added, as `scan_names` makes it.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset.
    name : str
        Of the table, without ``.tsv``.
    columns : set of str, optional
        Those to read beside the entities; by default all.
    text : sequence of str
        Further columns of text.

    Raises
    ------
    InputError
        If it is not a tab-separated table.
    """
    path = output_dir / f"{name}.tsv"
    if not path.is_file():
        return None
    try:
        header = path.read_text(encoding="utf-8").partition("\n")[0].split("\t")
        entities = _entity_columns(header)
        as_text = {*_ENTITIES, *entities, *KEYS, *_TEXT, *text}
        rows = pd.read_csv(
            path,
            sep="\t",
            encoding="utf-8",
            keep_default_na=False,
            na_values=["n/a", ""],
            low_memory=False,
            usecols=[column for column in header if columns is None or column in columns or column in entities],
            dtype={column: str for column in header if column in as_text},
        )
    except ValueError as error:
        raise InputError(f"{path.name}: cannot be read as a table ({error}); run the group level again") from error
    named = rows.assign(name=scan_names(rows[entities])) if "participant_id" in entities else rows
    return GroupTable(name, _tell_apart(named), read_optional_json(path.with_suffix(".json")))


def _entity_columns(header: Sequence[str]) -> list[str]:
    """Columns of the entities of a scan's name: what stands before its site, as a participant may have a column run."""
    front = header[: header.index(_SITE)] if _SITE in header else []
    return [column for column in front if column not in _NO_ENTITIES] if "participant_id" in front else []


def _tell_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Name the reconstruction with the model where maps differ in it: they are never pooled."""
    if "model" not in rows:
        return rows
    return rows.assign(seg=rows["model"], model=rows["model"].astype(object) + _suffixes(rows, _APART, " "))


def _suffixes(rows: pd.DataFrame, columns: Sequence[str], separator: str) -> pd.Series:
    """Write the entities of each row one behind the other, leaving out missing ones."""
    written = pd.Series("", index=rows.index, dtype=object)
    for column in columns:
        if column in rows:
            values = rows[column].astype(object)
            written = written + (f"{separator}{_ENTITIES[column]}-" + values).where(values.notna(), "")
    return written


def scan_names(keys: pd.DataFrame) -> pd.Series:
    """Name the scan of each row as its files begin, without model and without the output tree it came from.

    Parameters
    ----------
    keys : DataFrame
        Text: a column an entity.

    Examples
    --------
    >>> keys = pd.DataFrame({"participant_id": ["sub-01"], "space": ["T1w"], "run": ["2"], "session_id": ["ses-1"]})
    >>> scan_names(keys).tolist()
    ['sub-01_ses-1_run-2_space-T1w']
    """
    entities = [_ENTITIES.get(column, column) for column in map(str, keys)]
    named: dict[tuple[str, ...], str] = {}
    names = []
    for values in keys.astype(object).fillna("").itertuples(index=False, name=None):
        if values not in named:
            there = {entity: value for entity, value in zip(entities, values, strict=True) if value}
            # in every BIDS table participants and sessions have their prefix
            named[values] = join_entities({key: value.removeprefix(f"{key}-") for key, value in there.items()})
        names.append(named[values])
    return pd.Series(names, index=keys.index, dtype=object)


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Add scan, nucleus and side; say where site or group is missing."""
    known = rows[rows["abbreviation"].isin(list(_NUCLEI))]
    known = known.assign(**{_WEIGHTED: known.get(_WEIGHTED, np.nan)})
    added = {
        "scan": _labels(known),
        "nucleus": known["abbreviation"].map({name: structure.nucleus for name, structure in _NUCLEI.items()}),
        "side": known["abbreviation"].map({name: structure.hemisphere for name, structure in _NUCLEI.items()}),
        **{
            measure: pd.to_numeric(known[measure], errors="coerce").astype(np.float64)
            for measure in (*MEASURES, _WEIGHTED)
        },
    }
    for factor in {"site", "group"} & set(known):
        added[factor] = known[factor].astype(object).fillna(NO_VALUE)
    return known.assign(**added).reset_index(drop=True)


def _labels(rows: pd.DataFrame) -> pd.Series:
    """Name the scan of each row so that no two trees share a name."""
    names = rows["name"].astype(object)
    if "dataset" not in rows or rows["dataset"].nunique() < 2:
        return names
    return rows["dataset"].astype(object).fillna(NO_VALUE) + ": " + names


def _with_scans(table: GroupTable) -> GroupTable:
    if "name" not in table.rows or "participant_id" not in table.rows:
        return table
    return replace(table, rows=table.rows.assign(scan=_labels(table.rows)))
