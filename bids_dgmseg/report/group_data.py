"""The group tables of an output dataset, read back for the group page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_optional_json, read_tsv
from bids_dgmseg.measurement.columns import describe_sampled
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import ALL_STRUCTURES, bilateral_names
from bids_dgmseg.report.html import NO_VALUE, QUANTITIES, Quantity, quantity
from bids_dgmseg.study.cohort import ENTITY_COLUMNS, RECONSTRUCTION_COLUMNS
from bids_dgmseg.study.demographics import MISSING_CODES, read_categories, read_sexes

DATASET = "dataset"
"""Column with the output dataset of a scan, if several were merged."""

_SITE = "site"
"""The first column after those of the entities."""

_ENTITIES = {column: entity for entity, column in ENTITY_COLUMNS.items()}
"""Column of the group tables → entity of file names; columns of other entities have the entity's name."""

SCAN_KEYS = ["scan", "model"]
_NO_SCANS = pd.MultiIndex.from_arrays([[], []], names=SCAN_KEYS)
_TEXT_COLUMNS = (DATASET, "model", "abbreviation", "site", "group", "reference")

_TIMES = ("age_years", "years_since_first")

_PLOTTED_BY_SIDE = ("group_harmonized", "group_ageing_curves")
"""Tables whose bilateral rows are not drawn."""

_NUCLEI = {structure.abbreviation: structure for structure in ALL_STRUCTURES}


@dataclass(frozen=True)
class GroupTable:
    """A table of the group level with its data dictionary."""

    file: str
    """Link from the page; empty if it is not a file."""
    rows: pd.DataFrame
    dictionary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupData:
    """The tables that the group page shows."""

    stats: pd.DataFrame
    """``group_stats.tsv``, one row per scan, model and nucleus, with the columns ``scan``, ``nucleus`` and ``side``
    added and ``volume_pv_mm3`` always present (NaN if unknown). Maps of different reconstructions count as different
    models, such as ``dgm16 desc-rts``; ``seg`` has the model alone. ``site`` and ``group`` are ``n/a`` if missing.
    ``person`` distinguishes participants of several datasets,
    ``excluded`` is why a value enters no statistics (None if it does), ``is_red`` whether the nucleus or its scan is
    rated red, ``sex`` that of the participant as text, if known."""
    tables: Mapping[str, GroupTable]
    """All tables that exist, by name; those with one row per scan have the columns ``scan`` and ``name``."""
    quantities: Mapping[str, Quantity] = field(default_factory=lambda: QUANTITIES)
    """Measures that the page plots: volume, mean susceptibility, and those of further maps that were analysed."""
    bilateral: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Bilateral rows of ``group_stats.tsv``, as in `stats`."""

    @cached_property
    def scans(self) -> pd.DataFrame:
        """One row per scan and model: its names, site, group and age."""
        optional = [name for name in (DATASET, "site", "group", "age_years", "sex") if name in self.stats]
        columns = ["scan", "name", "participant_id", "model", "seg", *optional]
        return self.stats[columns].drop_duplicates(SCAN_KEYS).reset_index(drop=True)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the group level, from the data dictionaries of the tables."""
        dictionaries = [table.dictionary for table in self.tables.values()]
        return {key: value for about in dictionaries for key, value in (about.get("Settings") or {}).items()}

    @property
    def unmasked(self) -> pd.DataFrame:
        """Rows of `stats` without nuclei that a mask of excluded voxels covers wholly, which were found."""
        if "excluded_fraction" not in self.stats:
            return self.stats
        return self.stats[pd.to_numeric(self.stats["excluded_fraction"], errors="coerce") != 1]

    @property
    def used(self) -> pd.DataFrame:
        """Rows of `stats` that enter statistics."""
        return self.stats[self.stats["excluded"].isna()]

    @cached_property
    def excluded_scans(self) -> pd.Series:
        """Why scans are excluded, by scan and model: those without a nucleus that enters statistics."""
        by_scan = self.stats.groupby(SCAN_KEYS, sort=False)["excluded"]
        return by_scan.first()[by_scan.count() == by_scan.size()]

    @property
    def models(self) -> list[str]:
        """Models in the order of the table."""
        return [str(model) for model in self.stats["model"].unique()]

    def levels(self, factor: str) -> list[str]:
        """Return the values of ``site`` or ``group``, the most frequent first, without ``n/a``."""
        if factor not in self.stats:
            return []
        values = self.scans[factor]
        return [str(level) for level in values[values != NO_VALUE].value_counts().index]

    def by_nucleus(self, column: str) -> pd.DataFrame:
        """Return ratings or their reasons by scan and model, one column per nucleus; no column if there are none."""
        if column not in self.stats:
            return pd.DataFrame(index=_NO_SCANS)
        keys = [*SCAN_KEYS, "abbreviation"]
        table = self.stats.drop_duplicates(keys).set_index(keys)[column].unstack("abbreviation")
        return table.where(table.isin(RATINGS)).dropna(axis=1, how="all") if column == "rating" else table

    def by_scan(self, column: str) -> pd.Series:
        """Return a column of ``group_qc.tsv`` by scan and model; empty if there is none."""
        table = self.tables.get("group_qc")
        if table is None or column not in table.rows:
            return pd.Series(index=_NO_SCANS, dtype=object)
        values = table.rows.drop_duplicates(SCAN_KEYS).set_index(SCAN_KEYS)[column]
        return values.where(values.isin(RATINGS)) if column == "rating" else values


def read_group_data(output_dir: Path, *, names: Sequence[str]) -> GroupData:
    """Read ``group_stats.tsv`` and those of the other tables (`names`, without ``.tsv``) that exist."""
    about = read_optional_json(output_dir / "group_stats.json")
    settings = about.get("Settings") or {}
    group = str(settings.get("GroupColumn") or "group")
    group = f"participants_{group}" if f"participants_{group}" in about else group  # such as hemisphere
    sex = settings.get("SexColumn")
    asked = [str(name) for name in settings.get("Measures") or () if describe_sampled(str(name))]
    # with --group-column, another column may also be called group
    columns = {
        *_TEXT_COLUMNS,
        "age_years",
        "years_since_first",
        "rating",
        "reasons",
        "excluded",
        *QUANTITIES,
        *asked,
        "volume_pv_mm3",
        "excluded_fraction",
    }
    columns = columns - {"group"} | {group} | ({str(sex)} if sex else set())
    stats = _read_table(output_dir, "group_stats", columns=columns, text=(group, str(sex)))
    if stats is None:
        raise InputError(f"{output_dir.name}: group_stats.tsv not found; run the group level first")
    required = ("participant_id", "model", "abbreviation", *QUANTITIES)
    if missing := [name for name in required if name not in stats.rows]:
        raise InputError(f"group_stats.tsv: column {', '.join(missing)} not found; run the group level again")
    tables = {"group_stats": stats, **{name: _read_table(output_dir, name) for name in names}}
    for name in _PLOTTED_BY_SIDE:
        if (table := tables.get(name)) and "abbreviation" in table.rows:
            of_both = table.rows["abbreviation"].isin(bilateral_names(table.rows["abbreviation"].unique()))
            tables[name] = replace(table, rows=table.rows[~of_both])
    rows = _read_demographics(stats, group=group, sex=sex)
    bilateral = bilateral_names([*_NUCLEI, *rows["abbreviation"].unique()])
    rows = rows[rows["abbreviation"].isin([*_NUCLEI, *bilateral])]
    rows = rows.assign(volume_pv_mm3=rows.get("volume_pv_mm3", np.nan))
    added: dict[str, pd.Series] = {
        "nucleus": rows["abbreviation"].map({name: structure.nucleus for name, structure in _NUCLEI.items()}),
        "side": rows["abbreviation"].map({name: structure.hemisphere for name, structure in _NUCLEI.items()}),
    }
    quantities = {**QUANTITIES, **{name: quantity(name) for name in asked if name in rows}}
    for measure in (*quantities, "volume_pv_mm3"):
        added[measure] = pd.to_numeric(rows[measure], errors="coerce").astype(np.float64)
    for factor in {"site", "group"} & set(rows):
        added[factor] = rows[factor].astype(object).fillna(NO_VALUE)
    added["person"] = person_names(rows)
    added["excluded"] = (rows["excluded"] if "excluded" in rows else pd.Series(index=rows.index)).astype(object)
    rows, of_both = rows.assign(**added), rows["abbreviation"].isin(bilateral)
    data = GroupData(
        rows[~of_both].reset_index(drop=True),
        {name: table for name, table in tables.items() if table},
        quantities,
        rows[of_both].reset_index(drop=True),
    )
    ratings = data.by_scan("rating")
    red = pd.MultiIndex.from_tuples(ratings.index[ratings == "red"], names=SCAN_KEYS)
    is_red = pd.MultiIndex.from_frame(data.stats[SCAN_KEYS]).isin(red) | data.stats["excluded"].notna()
    if "rating" in data.stats:
        is_red |= data.stats["rating"] == "red"
    return replace(data, stats=data.stats.assign(is_red=is_red))


def _read_demographics(stats: GroupTable, *, group: str, sex: Any) -> pd.DataFrame:
    """Add ``sex`` and ``group`` as the analyses read them: without codes of missing values, ``F``, ``M`` and ``O``."""
    rows, read = stats.rows, {}
    who = person_names(rows)
    if sex in rows:
        about = stats.dictionary.get(str(sex))
        levels = about.get("Levels") if isinstance(about, Mapping) else None
        texts = rows[str(sex)].astype(object)
        read["sex"], _ = read_sexes(texts, who, levels if isinstance(levels, Mapping) else {}, where="")
    rows = rows.assign(**read).rename(columns={group: "group"})
    if "group" in rows:
        rows["group"], _ = read_categories(rows["group"].astype(object), who, where="", missing=MISSING_CODES)
    return rows


def _read_table(
    output_dir: Path, name: str, *, columns: set[str] | None = None, text: Sequence[str] = ("group",)
) -> GroupTable | None:
    """Read a table and its data dictionary; None if there is no such file.

    Only `columns` and those of the entities are read, by default all. Columns named in `text` are not numbers.
    """
    path = output_dir / f"{name}.tsv"
    if not path.is_file():
        return None
    header = list(map(str, read_tsv(path, nrows=0)))
    # columns after the site may be participants' columns with the name of an entity
    front = header[: header.index(_SITE)] if _SITE in header else []
    keys = front or header
    entities = [column for column in front if column not in ("model", DATASET)] if "participant_id" in front else []
    text_columns = {*_ENTITIES, *entities, *_TEXT_COLUMNS, *text}  # 01 differs from 1
    rows = read_tsv(
        path,
        low_memory=False,
        usecols=[column for column in header if columns is None or column in columns or column in entities],
        dtype={column: str for column in header if column in text_columns},
    )
    if DATASET in rows and DATASET not in keys:  # of participants.tsv
        rows = rows.drop(columns=DATASET)
    if entities:
        scan = names = scan_names(rows[entities])
        if DATASET in rows and rows[DATASET].nunique() > 1:
            scan = rows[DATASET].astype(object).fillna(NO_VALUE) + ": " + names
        rows = rows.assign(name=names, scan=scan, person=person_names(rows))
    if "model" in rows:
        model = rows["model"].astype(object)
        for column in RECONSTRUCTION_COLUMNS:
            if column in keys:
                values = rows[column].astype(object)
                model = model + (f" {_ENTITIES[column]}-" + values).where(values.notna(), "")
        rows = rows.assign(seg=rows["model"], model=model)
    return GroupTable(path.name, rows, read_optional_json(path.with_suffix(".json")))


def scan_names(keys: pd.DataFrame) -> pd.Series:
    """Return the name of each row's scan, as its files start, from one text column per entity.

    >>> keys = pd.DataFrame({"participant_id": ["sub-01"], "space": ["T1w"], "run": ["2"], "session_id": ["ses-1"]})
    >>> scan_names(keys).tolist()
    ['sub-01_ses-1_run-2_space-T1w']
    """
    entities = [_ENTITIES.get(column, column) for column in map(str, keys)]
    number = keys.groupby(list(keys), sort=False, dropna=False).ngroup()  # rows of one scan are many
    names = []
    for values in keys[~number.duplicated()].astype(object).fillna("").itertuples(index=False, name=None):
        present = {entity: value for entity, value in zip(entities, values, strict=True) if value}
        # participants and sessions have their prefix in every BIDS table
        names.append(join_entities({key: value.removeprefix(f"{key}-") for key, value in present.items()}))
    return pd.Series(np.array(names, dtype=object)[number], keys.index, dtype=object)


def person_names(rows: pd.DataFrame) -> pd.Series:
    """Return the participant of each row; equal labels in two datasets are different persons."""
    names = rows["participant_id"].astype(str)
    return rows[DATASET].astype(str) + ": " + names if DATASET in rows else names


def is_true(values: pd.Series) -> pd.Series:
    """Return where a column of a table is ``true``; missing values are not."""
    return values if values.dtype == bool else values.astype(str).str.lower() == "true"
