"""What all analyses of a study share: measures, controls, covariates and tables of results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, as_options
from bids_dgmseg.io.files import MISSING, DataDictionary, read_data_dictionaries, temporary_name, write_json, write_tsv
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS, describe_sampled
from bids_dgmseg.models.structures import ALL_STRUCTURES, join_sides
from bids_dgmseg.study.cohort import Cohort, load_cohort
from bids_dgmseg.study.participants import find_controls, read_numbers
from bids_dgmseg.study.results import ResultsFolder, ResultsSelection

_REFERENCE_GROUPS = (
    *("hc", "control", "controls", "healthy", "healthy control", "healthy controls", "healthy_control"),
    *("con", "ctrl", "cn", "nc", "hv"),
)
"""Names of a reference group, in lower case."""

_CONTROL_CODES = (("0", "1"), ("no", "yes"), ("false", "true"))
"""Codes of controls and patients, in lower case."""

_DEMOGRAPHICS = ("age", "sex", "site")
"""Covariates with the same name in every study, and the default."""

VOLUME = "volume_mm3"
"""Measure that susceptibility is adjusted for."""


MEASURES = ("mean_ppm", "volume_mm3")
"""Measures that are analysed by default, of which the first is drawn."""

WITHIN_PARTICIPANTS = frozenset({"volume_change_percent"})
"""Measures whose mean is 0 in each participant: they have slopes over time, but nothing that differs between people."""


@dataclass(frozen=True)
class Study:
    """A cohort with the measures to analyse. Analyses return new tables and leave it unchanged."""

    cohort: Cohort
    """Without the scans that are excluded from all statistics, and without ``stats``, from which `table` is."""
    options: GroupOptions
    table: pd.DataFrame
    """One row per scan and nucleus: ``scan`` (row of the cohort), ``abbreviation``, the measures and the volume (NaN
    for an excluded nucleus), demographics, strata and covariates."""
    measures: tuple[str, ...]
    """Columns of `table` that are analysed."""
    drawn: tuple[str, ...]
    """Those that figures show."""
    covariates: tuple[str, ...]
    """Columns of `table`, without the group; ``site`` is for comparisons of groups, harmonization is across sites."""
    controls: NDArray[np.bool_] | None
    """Whether each scan of the cohort is of a control; None without a filter."""
    reference: str | None
    """Group that the others are compared with."""
    reference_from: str
    """Why it is this group."""
    warnings: tuple[str, ...] = ()

    @property
    def by(self) -> tuple[str, ...]:
        """Columns that are never pooled."""
        return (*self.cohort.strata, "abbreviation")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the run was asked for and found, for the data dictionaries."""
        files = {
            "HarmonizationSaved": self.options.harmonization_save,
            "HarmonizationApplied": self.options.harmonization_apply,
            "NormsSaved": self.options.norms_save,
            "NormsApplied": self.options.norms,
        }
        return {
            **self.cohort.settings,
            "Measures": list(self.options.measures),
            "MeasuresDrawn": list(self.drawn),
            "Controls": list(self.options.controls),
            "ReferenceGroup": self.reference,
            "ReferenceGroupFrom": as_options(self.reference_from) or None,
            "Covariates": list(self.covariates),
            "Correlate": list(self.options.correlate),
            **{name: path.name for name, path in files.items() if path},
        }

    def strata(self) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Iterate over the rows of each model (and reconstruction), with the values of the cohort's strata.

        Structures of both sides are apart: they repeat the values of single sides.
        """
        columns = list(self.cohort.strata)
        for key, rows in self.table.groupby([*columns, is_one_sided(self.table)], sort=False, observed=True):
            yield dict(zip(columns, key[:-1], strict=True)), rows

    def stratum_name(self, key: Mapping[str, Any]) -> str:
        """Return a name for one of several models or reconstructions; empty if there is only one."""
        varying = [str(value) for column, value in key.items() if self.cohort.keys[column].nunique() > 1]
        return " ".join(value for value in varying if value != MISSING) or " ".join(varying)

    @property
    def between_participants(self) -> Study:
        """Return the study without the measures that can only be compared within a participant."""
        measures = tuple(measure for measure in self.measures if measure not in WITHIN_PARTICIPANTS)
        return replace(self, measures=measures, options=replace(self.options, measures=measures))

    @property
    def side_means(self) -> Study:
        """Return the study with the mean of left and right of each nucleus that has sides, NaN if one is missing."""
        rows = mean_of_sides(self.table, list(dict.fromkeys([*self.measures, VOLUME])))
        return replace(self, table=rows.astype({"abbreviation": "category"}))

    def with_measures(self, columns: pd.DataFrame) -> Study:
        """Return the study with further measures to analyse, which have the index of `table`."""
        table = self.table.assign(**{str(name): values for name, values in columns.items()})
        return replace(self, table=table, measures=(*self.measures, *map(str, columns)))


def is_one_sided(table: pd.DataFrame) -> pd.Series:
    """Return which rows are of structures of the left or right side, not of both."""
    return table["abbreviation"].astype(str).str.endswith(("_L", "_R")).rename("one_sided")


def mean_of_sides(table: pd.DataFrame, measures: Sequence[str], keys: Sequence[str] = ("scan",)) -> pd.DataFrame:
    """Average left and right of each nucleus in each scan (`keys`), NaN if one is missing; other rows are kept."""
    names, keys = table["abbreviation"].astype(str), [*keys, "abbreviation"]
    sides = join_sides(names.unique())
    nuclei = names.map({name: sides.get(name, name) for name in names.unique()})
    rows = table.assign(abbreviation=nuclei)[~names.isin(sides.values())]
    groups = rows.groupby(keys, sort=False)[list(measures)]
    means, counts = groups.mean(), groups.count()
    is_complete = counts.gt(means.index.get_level_values("abbreviation").isin(sides.values()).astype(int), axis=0)
    return rows.drop_duplicates(keys).reset_index(drop=True).assign(**means.where(is_complete).reset_index(drop=True))


def load_study(
    folders: Sequence[ResultsFolder], options: GroupOptions, selection: ResultsSelection | None = None
) -> tuple[Cohort, Study]:
    """Read the results of all or the selected scans, and prepare their analysis.

    Raises
    ------
    InputError
        See `load_cohort` and `build_study`.
    """
    cohort = load_cohort(folders, options, selection)
    return cohort, build_study(cohort, options)


def build_study(cohort: Cohort, options: GroupOptions) -> Study:
    """Parse the measures and find controls, reference group and covariates, of the scans that are not excluded.

    Raises
    ------
    InputError
        If a measure or covariate does not exist, or no participant has the group of the controls.
    """
    if options.measures and not set(options.measures) - WITHIN_PARTICIPANTS:
        raise InputError(
            f"`measures` {' '.join(options.measures)}: is relative to the mean of each participant, so that only "
            "slopes can be computed; add another measure, such as volume_longitudinal_mm3"
        )
    for name in ("harmonization_save", "norms_save"):
        if (path := getattr(options, name)) and path.is_dir():
            raise InputError(f"`{name}` {path}: is a folder; pass the name of a file")
    drawn, options = options.measures or MEASURES[:1], replace(options, measures=options.measures or MEASURES)
    cohort = cohort.analysed()
    controls = find_controls(cohort.demographics["group"], options.controls) if options.controls else None
    covariates, warnings = _find_covariates(cohort, options.covariates)
    reference, reference_from, is_guess = _find_reference_group(cohort.demographics, controls)
    if is_guess:
        warnings.append(
            f"participants.tsv: {cohort.settings['GroupColumn']}: reference group is {reference}: {reference_from}; "
            "name the controls with `controls`"
        )
    fractions = cohort.stats.reindex(columns=["excluded_fraction"])["excluded_fraction"]
    is_cut = pd.to_numeric(fractions, errors="coerce") > 0
    if is_cut.any():
        warnings.append(
            f"group_stats.tsv: lesion masks cut {is_cut.sum()} of the nuclei; their volumes are not analysed"
        )
    table = _parse_measures(cohort, list(dict.fromkeys([*options.measures, VOLUME])), is_cut)
    allowed = {*_DEMOGRAPHICS, *(["group"] if cohort.settings["GroupColumn"] in options.covariates else [])}
    if taken := set(covariates) & set(table) - allowed:
        name = min(taken)
        raise InputError(f"`covariates` {name}: the analysis has a column of this name; rename it in participants.tsv")
    table = table.assign(**{name: values.to_numpy()[table["scan"]] for name, values in covariates.items()})
    return Study(
        cohort=replace(cohort, stats=pd.DataFrame()),  # its text takes much memory
        options=options,
        table=table,
        measures=options.measures,
        drawn=drawn,
        covariates=tuple(covariates),
        controls=controls,
        reference=reference,
        reference_from=reference_from,
        warnings=tuple(warnings),
    )


def _parse_measures(cohort: Cohort, measures: Sequence[str], is_cut: pd.Series) -> pd.DataFrame:
    """Parse measures of all scans, NaN where a scan lacks one, and volumes of nuclei that a lesion mask cuts.

    There is one row per scan and nucleus: ``scan``, ``abbreviation``, the measures, the demographics and the strata. It
    is an `InputError` if no scan has a measure, or a value of it is not a number.
    """
    if unknown := [measure for measure in measures if measure not in cohort.stats or measure in ("scan", "excluded")]:
        shown = ", ".join(sorted({*map(str, cohort.stats)} - {"scan", "excluded"}))
        raise InputError(f"`measures` {unknown[0]}: no such column in _stats.tsv (columns: {shown}); check the name")
    scan = cohort.stats["scan"].to_numpy()
    table = cohort.stats[["scan", "abbreviation"]].copy()
    for measure in measures:
        cells = cohort.stats[measure]
        missing = cells.isna() | cells.isin([MISSING, ""])
        values = pd.to_numeric(cells.where(~missing), errors="coerce")
        invalid = values.isna() & ~missing & (cells != "nan")
        if invalid.any():
            place = int(invalid.to_numpy().argmax())
            raise InputError(
                f"{cohort.keys['participant_id'].iloc[scan[place]]}: {measure} is {cells.iloc[place]!r}, expected a "
                "number; run the participant level again, or choose other `measures`"
            )
        hidden = cohort.stats["excluded"].notna() | (is_cut & ("mm3" in measure))
        table[measure] = values.astype(np.float64).mask(hidden)
    for columns in (cohort.demographics, cohort.keys[list(cohort.strata)]):
        for column in columns:
            table[column] = columns[column].to_numpy()[scan]
    # rows are grouped by these many times; never by a column that may be missing, as categories cannot be filled
    return table.astype(dict.fromkeys(("participant_id", "abbreviation", *cohort.strata), "category"))


def _find_covariates(cohort: Cohort, wanted: Sequence[str]) -> tuple[dict[str, pd.Series], list[str]]:
    """Return the values of each covariate that varies, by default of age, sex and site."""
    if wanted == ("none",):
        return {}, []
    covariates, warnings = {}, []
    for name in wanted or _DEMOGRAPHICS:
        values = covariate_values(cohort, name)
        if values.nunique() > 1:
            covariates[covariate_name(cohort, name)] = values
        elif wanted:
            warnings.append(f"`covariates` {name}: ignored (constant or missing)")
    return covariates, warnings


def covariate_name(cohort: Cohort, name: str) -> str:
    """Return ``age``, ``sex``, ``site`` or ``group`` for a column of participants.tsv with it, otherwise the column."""
    settings = cohort.settings
    roles = {settings["AgeColumn"]: "age", settings["SexColumn"]: "sex", settings["GroupColumn"]: "group"}
    roles[str(settings["SiteFrom"]).removeprefix("column ")] = "site"
    return name.casefold() if name.casefold() in _DEMOGRAPHICS else str(roles.get(name, name))


def covariate_values(cohort: Cohort, name: str) -> pd.Series:
    """Return a covariate of each scan, by its name in the demographics or in participants.tsv.

    Raises
    ------
    InputError
        If there is no such column.
    """
    if (role := covariate_name(cohort, name)) in _DEMOGRAPHICS or name == cohort.settings["GroupColumn"]:
        return cohort.demographics[role]
    if name in cohort.participants:
        texts, who = cohort.participants[name], cohort.keys["participant_id"]
        levels = cohort.descriptions.get(name, {}).get("Levels")
        if isinstance(levels, dict) and set(texts.dropna()) <= set(levels):
            return texts  # codes of categories
        is_number = pd.to_numeric(texts, errors="coerce").notna()
        # a few words among numbers are typing errors, which must not make categories of all of them
        return read_numbers(texts, who) if is_number.sum() > texts.notna().sum() / 2 else texts
    shown = ", ".join(cohort.participants.columns) or "none"
    raise InputError(f"`covariates` {name}: no such column in participants.tsv (columns: {shown}); check the name")


def _find_reference_group(
    demographics: pd.DataFrame, controls: NDArray[np.bool_] | None
) -> tuple[str | None, str, bool]:
    """Return the reference group, why it is this one, and whether that is a guess among several groups.

    It is the group of the controls (of several, the largest), otherwise one with a name of `_REFERENCE_GROUPS` or a
    code of `_CONTROL_CODES`, otherwise the one with most participants.
    """
    people = demographics if controls is None else demographics[controls]
    sizes = people.groupby("group", sort=False)["participant_id"].nunique()
    names = [str(group) for group in sizes.sort_values(ascending=False, kind="stable").index]
    if controls is not None:
        return names[0], f"the {'largest ' if len(names) > 1 else ''}group of `controls`", False
    if named := [name for name in names if name.casefold() in _REFERENCE_GROUPS]:
        why = "the name of controls" if len(named) == 1 else "the largest with a name of controls"
        return named[0], why, len(named) > 1
    for codes in _CONTROL_CODES:
        if {name.casefold() for name in names} == set(codes) and len(names) == len(codes):
            control, patient = sorted(names, key=lambda name: codes.index(name.casefold()))
            return control, f"of {control} and {patient}, {control} is taken as the controls", True
    if not names:
        return None, "", False
    return names[0], "the largest group, as none has a name of controls", len(names) > 1


def first_rows(cohort: Cohort) -> NDArray[np.intp]:
    """Return for each row of the cohort the first row of the same scan, which may be of another model."""
    rows = pd.Series(range(len(cohort.scans)))
    first = rows.groupby([cohort.demographics["participant_id"], cohort.names], sort=False, dropna=False)
    return first.transform("first").to_numpy(np.intp)


def count_scans(cohort: Cohort, chosen: pd.Series | NDArray[np.bool_ | np.intp]) -> int:
    """Return the number of scans among the chosen rows of the cohort, or their places, each once for all models."""
    return len(np.unique(first_rows(cohort)[np.asarray(chosen)]))


FOLDER = "group"
"""Folder of the tables and figures, beside the page."""

_WIDE = ("volume_mm3", "mean_ppm")
"""Measures that have a table with one column per nucleus."""

COLUMNS = {**read_data_dictionaries("group")["group"], **STATS_COLUMNS}
"""Data dictionary of the group tables."""


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
    means = [str(name) for name in cohort.stats if re.search("_mean(_|$)", str(name)) and describe_sampled(str(name))]
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
    pairs = dict.fromkeys(structure.nucleus for structure in ALL_STRUCTURES)
    nuclei = [name for name in (*names, *pairs) if name in table]
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


def write_tables(
    folder: Path, tables: Sequence[ResultTable], *, settings: Mapping[str, Any], page: Path | None = None
) -> list[Path]:
    """Write the tables that have rows and their data dictionaries: all, or none if one cannot be written.

    All tables and figures of an earlier run, and its page, are removed before the first new table appears, so that
    files of two runs are never side by side. Numbers have seven digits; parameters in notes are named as options of the
    command line. `settings` are what the run was asked for and found. Return the paths of the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=temporary_name(folder / "group-").name) as staging:
        paths = []
        for table in tables:
            if len(table.rows):
                write_json({**table.describe(), "Settings": settings}, Path(staging, f"{table.name}.json"))
                paths.append(write_tsv(table.rows, Path(staging, f"{table.name}.tsv"), float_format="%.7g"))
        for earlier in (*filter(None, [page]), *folder.rglob("group_*.*")):
            if Path(staging) not in earlier.parents:
                earlier.unlink(missing_ok=True)
        for path in Path(staging).iterdir():
            path.replace(folder / path.name)
    return [folder / path.name for path in paths]


def describe(column: str) -> Mapping[str, str]:
    """Return the data dictionary entry of a column of a group table.

    >>> describe("DN_L_volume_mm3")["Description"].partition(":")[0]
    'left dentate nucleus'
    """
    if column in COLUMNS:
        return COLUMNS[column]
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
