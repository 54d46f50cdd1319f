"""What all analyses of a study share: the table of measures, controls, reference group, covariates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.config import GroupAnalysis
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.tables import MISSING
from bids_dgmseg.study.cohort import Cohort
from bids_dgmseg.study.conditions import match_condition
from bids_dgmseg.study.demographics import parse_numbers

REFERENCE_GROUPS = ("hc", "control", "controls", "healthy", "healthy control", "con", "ctrl", "cn", "nc", "hv")
"""Names of a reference group, in lower case."""

NO_COVARIATES = "none"

VOLUME = "volume_mm3"
"""Measure that susceptibility is adjusted for."""


@dataclass(frozen=True)
class Study:
    """A cohort with the measures to analyse. Analyses return new tables and leave it unchanged."""

    cohort: Cohort
    options: GroupAnalysis
    table: pd.DataFrame
    """One row per scan and nucleus: ``scan`` (row of the cohort), ``abbreviation``, the measures and the volume,
    demographics, strata and covariates."""
    measures: tuple[str, ...]
    """Columns of `table` that are analysed."""
    covariates: tuple[str, ...]
    """Columns of `table`, without the group."""
    controls: NDArray[np.bool_] | None
    """Whether each scan of the cohort is of a control; None without a filter."""
    reference: str | None
    """Group that the others are compared with."""
    warnings: tuple[str, ...] = ()

    @property
    def by(self) -> tuple[str, ...]:
        """Columns that are never pooled."""
        return (*self.cohort.strata, "abbreviation")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the run was asked for and found, for the data dictionaries."""
        return {
            **self.cohort.settings,
            "Measures": list(self.options.measures),
            "ControlFilter": self.options.control_filter,
            "ReferenceGroup": self.reference,
            "Covariates": list(self.covariates),
            "Evaluation": self.options.evaluation.name if self.options.evaluation else None,
            "Bootstrap": self.options.bootstrap,
        }

    def strata(self) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Iterate over the rows of each model (and reconstruction), with the values of the cohort's strata."""
        columns = list(self.cohort.strata)
        for key, rows in self.table.groupby(columns, sort=False, observed=True):
            yield dict(zip(columns, key, strict=True)), rows

    def stratum_name(self, key: Mapping[str, Any]) -> str:
        """Return a name for one of several models or reconstructions; empty if there is only one."""
        varying = [str(value) for column, value in key.items() if self.cohort.keys[column].nunique() > 1]
        return " ".join(value for value in varying if value != MISSING) or " ".join(varying)

    def with_measures(self, columns: pd.DataFrame) -> Study:
        """Return the study with further measures to analyse, which have the index of `table`."""
        table = self.table.assign(**{str(name): values for name, values in columns.items()})
        return replace(self, table=table, measures=(*self.measures, *map(str, columns)))


def build_study(cohort: Cohort, options: GroupAnalysis) -> Study:
    """Parse the measures and find controls, reference group and covariates.

    Raises
    ------
    InputError
        If a measure or covariate does not exist, or the control filter is not valid or matches no participant.
    """
    controls = None
    if options.control_filter:
        keys = cohort.keys[["participant_id", "site"]]
        participants = cohort.participants.assign(**keys.where(keys != MISSING))
        controls = match_condition(participants, options.control_filter, option="--control-filter")
    covariates, warnings = _find_covariates(cohort, options.covariates)
    table = measures_table(cohort, list(dict.fromkeys([*options.measures, VOLUME])))
    table = table.assign(**{name: values.to_numpy()[table["scan"]] for name, values in covariates.items()})
    return Study(
        cohort=cohort,
        options=options,
        table=table,
        measures=options.measures,
        covariates=tuple(covariates),
        controls=controls,
        reference=_find_reference_group(cohort.demographics["group"], controls),
        warnings=tuple(warnings),
    )


def measures_table(cohort: Cohort, measures: Sequence[str]) -> pd.DataFrame:
    """Parse measures of all scans.

    Parameters
    ----------
    cohort : Cohort
        All scans.
    measures : sequence of str
        Columns of ``_stats.tsv``; NaN where a scan lacks one.

    Returns
    -------
    DataFrame
        One row per scan and nucleus: ``scan``, ``abbreviation``, the measures, the demographics and the strata.

    Raises
    ------
    InputError
        If no scan has a measure, or a value of it is not a number.
    """
    if unknown := [measure for measure in measures if measure not in cohort.stats]:
        shown = ", ".join(sorted(str(column) for column in cohort.stats if column != "scan"))
        raise InputError(f"--measures {unknown[0]}: no such column in _stats.tsv (columns: {shown}); fix the name")
    scan = cohort.stats["scan"].to_numpy()
    table = cohort.stats[["scan", "abbreviation"]].copy()
    for measure in measures:
        cells = cohort.stats[measure]
        missing = cells.isna() | cells.isin([MISSING, ""])
        values = pd.to_numeric(cells.where(~missing), errors="coerce")
        invalid = values.isna() & ~missing & (cells != "nan")
        if invalid.any():
            first = int(invalid.to_numpy().argmax())
            participant = cohort.keys["participant_id"].iloc[scan[first]]
            raise InputError(
                f"{participant}: {measure} is {cells.iloc[first]!r}, expected a number; run the participant level "
                "again, or choose other --measures"
            )
        table[measure] = values.astype(np.float64)
    for columns in (cohort.demographics, cohort.keys[list(cohort.strata)]):
        for column in columns:
            table[column] = columns[column].to_numpy()[scan]
    return table


def _find_covariates(cohort: Cohort, wanted: Sequence[str]) -> tuple[dict[str, pd.Series], list[str]]:
    """Return the values of each covariate that varies, by default of age and sex."""
    if wanted == (NO_COVARIATES,):
        return {}, []
    covariates, warnings = {}, []
    for name in wanted or ("age", "sex"):
        demographic = name.casefold() if name.casefold() in ("age", "sex") else None
        if demographic:
            values = cohort.demographics[demographic]
        elif name in cohort.participants:
            texts = cohort.participants[name]
            numbers, _ = parse_numbers(pd.DataFrame({"participant_id": "", "value": texts}), "value")
            values = numbers if (numbers.notna() == texts.notna()).all() else texts
        else:
            shown = ", ".join(cohort.participants.columns) or "none"
            raise InputError(f"--covariates {name}: no such column in participants.tsv (columns: {shown}); fix it")
        if values.nunique() > 1:
            covariates[demographic or name] = values
        elif wanted:
            warnings.append(f"--covariates {name}: constant or missing, so it is not used")
    return covariates, warnings


def _find_reference_group(groups: pd.Series, controls: NDArray[np.bool_] | None) -> str | None:
    """Return the group of the controls, otherwise one with a name of `REFERENCE_GROUPS`, otherwise the largest."""
    if controls is not None and (matched := groups[controls].dropna()).nunique() == 1:
        return str(matched.iloc[0])
    counts = groups.value_counts()
    named = [str(group) for group in counts.index if str(group).casefold() in REFERENCE_GROUPS]
    return named[0] if named else str(counts.index[0]) if len(counts) else None
