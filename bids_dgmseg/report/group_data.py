"""What the group page shows: scans, their measures, and the results of the analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from bids_dgmseg.io.files import MISSING
from bids_dgmseg.measurement.nuclei import PROOF_COLUMNS, describe_sampled
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.html import QUANTITIES, Quantity, quantity
from bids_dgmseg.study.cohort import ENTITY_COLUMNS, RECONSTRUCTION_COLUMNS, Cohort
from bids_dgmseg.study.study import ResultTable

DATASET = "dataset"
"""Column with the output dataset of a scan, if several were merged."""

_ENTITIES = {column: entity for entity, column in ENTITY_COLUMNS.items()}
"""Column of the group tables → entity of file names."""

SCAN_KEYS = ["scan", "model"]

_NO_SCANS = pd.MultiIndex.from_arrays([[], []], names=SCAN_KEYS)

_NUCLEI = {structure.abbreviation: structure for structure in ALL_STRUCTURES}


@dataclass(frozen=True)
class GroupData:
    """The tables that the group page shows."""

    stats: pd.DataFrame
    """One row per scan, model and nucleus: columns of `scan_facts`, measures that the page shows (``volume_pv_mm3`` is
    NaN if unknown), ``nucleus`` and ``side`` (NaN if not of one side), ratings, ``excluded``, why a value enters no
    statistics (NaN if it does)."""
    tables: Mapping[str, ResultTable]
    """Tables by name; those with a row per scan start with the columns of `scan_facts`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run was asked for and found."""
    quantities: Mapping[str, Quantity] = field(default_factory=lambda: QUANTITIES)
    """Measures that the page shows: volume, mean susceptibility, and those of further maps that were analysed."""

    @property
    def drawn(self) -> list[str]:
        """Those of them that figures show."""
        named = self.settings.get("MeasuresDrawn", [*self.quantities])
        return [name for name in self.quantities if name in named]

    @cached_property
    def scans(self) -> pd.DataFrame:
        """One row per scan and model: its names, site, group and age."""
        optional = [name for name in (DATASET, "site", "group", "age_years", "sex") if name in self.stats]
        columns = ["scan", "name", "participant_id", "model", "seg", *optional]
        return self.stats[columns].drop_duplicates(SCAN_KEYS).reset_index(drop=True)

    @property
    def missing(self) -> pd.DataFrame:
        """Rows of `stats` of nuclei of one side that were not found; a mask of excluded voxels covers none of them."""
        stats = self.stats[self.stats["side"].isin(["L", "R"])]
        if "excluded_fraction" in stats:
            stats = stats[pd.to_numeric(stats["excluded_fraction"], errors="coerce") != 1]
        return stats[~(stats["volume_mm3"] > 0) & ~(stats["volume_pv_mm3"] > 0)]

    @property
    def used(self) -> pd.DataFrame:
        """Rows of `stats` that enter statistics and figures."""
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
        return [str(level) for level in values[values != MISSING].value_counts().index]

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


def scan_facts(cohort: Cohort) -> pd.DataFrame:
    """Return what the page shows of each scan of the cohort.

    The columns are those of the entities (NaN if missing), ``name`` (as the files start), ``scan`` (with the dataset if
    there are several), ``seg`` (the model), ``model`` (with what distinguishes reconstructions, such as
    ``dgm16 desc-rts``), ``person``, ``site`` and ``group`` (``n/a`` if missing), ``sex``, ``age_years`` and
    ``years_since_first``.
    """
    keys, people = cohort.keys.where(cohort.keys != MISSING), cohort.demographics
    names, person = cohort.names, people["participant_id"]
    years = people["years"] - people.groupby("participant_id")["years"].transform("min")
    facts = keys.assign(
        name=names,
        scan=keys[DATASET] + ": " + names if DATASET in keys and keys[DATASET].nunique() > 1 else names,
        seg=keys["model"],
        model=_stratum_names(keys),
        person=person,
        site=people["site"].fillna(MISSING),
        sex=people["sex"],
        age_years=people["age"],
        years_since_first=years,
    )
    return facts.assign(group=people["group"].fillna(MISSING)) if cohort.settings["GroupColumn"] else facts


def _stratum_names(rows: pd.DataFrame) -> pd.Series:
    """Return the model with what distinguishes reconstructions."""
    model = rows["model"].astype(object)
    for column in RECONSTRUCTION_COLUMNS:
        if column in rows:
            values = rows[column].astype(object).where(rows[column] != MISSING)
            model = model + (f" {_ENTITIES[column]}-" + values).where(values.notna(), "")
    return model


def collect_group_data(
    cohort: Cohort, analysed: Cohort, tables: Sequence[ResultTable], settings: Mapping[str, Any]
) -> GroupData:
    """Collect what the page shows: the cohort, and results with the scans of those `analysed`."""
    facts = scan_facts(cohort)
    measures = [str(name) for name in settings["Measures"] if describe_sampled(str(name)) and name in cohort.stats]
    quantities = {**QUANTITIES, **{name: quantity(name) for name in measures}}
    proof = [name for name in PROOF_COLUMNS if name in cohort.stats]
    numbers = [*quantities, "volume_pv_mm3", "excluded_fraction", *proof]
    optional = [name for name in ("rating", "reasons", "excluded_fraction") if name in cohort.stats]
    rows = cohort.stats.reindex(columns=list(dict.fromkeys(["scan", "abbreviation", *numbers, *optional, "excluded"])))
    rows = rows.assign(**{name: pd.to_numeric(rows[name], errors="coerce") for name in numbers})
    rows = _with_facts(rows, facts)
    rows["nucleus"] = rows["abbreviation"].map({name: structure.nucleus for name, structure in _NUCLEI.items()})
    rows["side"] = rows["abbreviation"].map({name: structure.hemisphere for name, structure in _NUCLEI.items()})
    quality = cohort.qc.where(cohort.qc != MISSING)
    shown = {"group_qc": ResultTable("group_qc", pd.concat([facts, quality], axis=1))}
    results = scan_facts(analysed)
    for table in tables:
        content = table.rows
        if "scan" in content:
            content = _with_facts(content, results)
        elif "model" in content:
            content = content.assign(model=_stratum_names(content))
        shown[table.name] = replace(table, rows=content.infer_objects())
    return GroupData(rows, shown, settings, quantities)


def _with_facts(rows: pd.DataFrame, facts: pd.DataFrame) -> pd.DataFrame:
    """Replace the column ``scan`` by the columns of `scan_facts`."""
    front = facts.iloc[rows["scan"].to_numpy(int)].set_axis(rows.index)
    return pd.concat(
        [front[[name for name in front if name not in rows or name == "scan"]], rows.drop(columns="scan")], axis=1
    )


def is_true(values: pd.Series) -> pd.Series:
    """Return where a column of a table is ``true``; missing values are not."""
    return values if values.dtype == bool else values.astype(str).str.lower() == "true"
