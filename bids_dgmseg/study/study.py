"""What all statistics of a study share: the table of measures, controls, groups, covariates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import to_numbers
from bids_dgmseg.study.conditions import match_filter
from bids_dgmseg.study.load import Cohort
from bids_dgmseg.study.long_table import long_table
from bids_dgmseg.study.participants import MISSING

MEASURES = ("mean_ppm", "volume_mm3")

CONTROLS = ("hc", "control", "controls", "healthy", "healthy control", "con", "ctrl", "cn", "nc", "hv")
"""Names that a reference group has, in small letters."""

NO_COVARIATES = "none"

VOLUME = "volume_mm3"
"""What susceptibilities are adjusted for."""

_OPTION = "--control-filter"


@dataclass(frozen=True)
class StudyOptions:
    """What the user asked for."""

    measures: tuple[str, ...] = MEASURES
    """Columns of ``_stats.tsv``."""
    control_filter: str | None = None
    covariates: tuple[str, ...] | None = None
    """By default age, sex and, where sites are harmonized, the group."""
    evaluation: Path | None = None
    """Output of ``dgmseg evaluate``."""
    n_bootstrap: int = 0
    """Refits for the limits of ageing curves; 0: limits by profile."""


@dataclass
class Study:
    """The table that the statistics read; adjusting and harmonizing add measures to it."""

    cohort: Cohort
    options: StudyOptions
    table: pd.DataFrame
    """As `long_table`, with the covariates; all measures of `measures` and the volumes."""
    measures: list[str]
    covariates: tuple[str, ...]
    """Columns of `table` without the group."""
    controls: np.ndarray | None
    """Whether each scan is of a control; None without a filter."""
    reference: str | None
    """The group that others are compared with."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def by(self) -> tuple[str, ...]:
        """Columns whose values are never pooled."""
        return (*self.cohort.apart, "abbreviation")

    def apart(self) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Rows of each model (and reconstruction), with its columns' values."""
        columns = list(self.cohort.apart)
        for key, rows in self.table.groupby(columns, sort=False, observed=True):
            yield dict(zip(columns, key, strict=True)), rows

    def name_part(self, key: Mapping[str, Any]) -> str:
        """Name one of several models or reconstructions as in `apart`; empty where there is one only."""
        telling = [str(value) for column, value in key.items() if self.cohort.keys[column].nunique() > 1]
        return " ".join(value for value in telling if value != MISSING) or " ".join(telling)

    def attempt(self, name: str, work: Callable[[], Any], *, part: str = "") -> Any:
        """Do what the data may not allow, for all or a part of the scans; then None, and why is a warning."""
        try:
            return work()
        except InputError as error:
            self.warnings.append(f"{name}.tsv: not computed{f' for {part}' if part else ''}: {error}")
            return None


def begin_study(cohort: Cohort, options: StudyOptions) -> Study:
    """Parse the measures and find controls, reference group and covariates.

    Raises
    ------
    InputError
        If a measure or a covariate does not exist, or the filter of the controls cannot be used or nobody meets it.
    """
    table = long_table(cohort, [*dict.fromkeys([*options.measures, VOLUME])])
    people = cohort.people.assign(participant_id=cohort.keys["participant_id"], site=cohort.keys["site"])
    controls = match_filter(people, options.control_filter, option=_OPTION) if options.control_filter else None
    covariates, warnings = _covariates(cohort, options)
    for column, values in covariates.items():
        table[column] = values.to_numpy()[table["scan"].to_numpy()]
    reference = _reference_group(cohort.facts["group"], controls)
    settings = {
        **cohort.settings,
        "Measures": list(options.measures),
        "ControlFilter": options.control_filter,
        "ReferenceGroup": reference,
        "Covariates": list(covariates),
        "Evaluation": options.evaluation.name if options.evaluation else None,
        "Bootstrap": options.n_bootstrap,
    }
    return Study(
        cohort, options, table, list(options.measures), tuple(covariates), controls, reference, settings, warnings
    )


def _covariates(cohort: Cohort, options: StudyOptions) -> tuple[dict[str, pd.Series], list[str]]:
    """Values of each covariate that differ between scans."""
    wanted = options.covariates
    if wanted == (NO_COVARIATES,):
        return {}, []
    known, warnings = {}, []
    for name in wanted or ("age", "sex"):
        column = name.casefold()
        if column in ("age", "sex"):
            values = cohort.facts[column]
        elif name in cohort.people:
            values = _as_numbers(cohort.people[name])
        else:
            there = ", ".join(cohort.people.columns) or "none"
            raise InputError(f"--covariates {name}: no such column in participants.tsv (columns: {there}); correct it")
        if values.nunique() > 1:
            known[column if column in ("age", "sex") else name] = values
        elif wanted:
            warnings.append(f"--covariates {name}: the same for all, or missing; left out")
    return known, warnings


def _as_numbers(texts: pd.Series) -> pd.Series:
    """Numbers where all values are; else text, NaN where missing."""
    there = texts.where(texts != MISSING)
    numbers, _ = to_numbers(pd.DataFrame({"participant_id": "", "value": texts}), "value")
    return numbers if (numbers.notna() == there.notna()).all() else there


def _reference_group(groups: pd.Series, controls: np.ndarray | None) -> str | None:
    """Group of the controls, else one that is called so, else the largest."""
    if controls is not None and (matched := groups[controls].dropna()).nunique() == 1:
        return str(matched.iloc[0])
    counts = groups.value_counts()
    named = [str(group) for group in counts.index if str(group).casefold() in CONTROLS]
    return named[0] if named else str(counts.index[0]) if len(counts) else None
