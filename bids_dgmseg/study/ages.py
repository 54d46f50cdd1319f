"""Ages at the scans: their column and unit, the time since the first session, ages that contradict the dates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bids_dgmseg.errors import list_some
from bids_dgmseg.study.dates import OLDEST_YEARS
from bids_dgmseg.study.demographics import AGE, PER_YEAR, UNIT_NAMES, find_column, parse_numbers, unit_of_value
from bids_dgmseg.study.results_folders import FolderScans

_CONTRADICTION_YEARS = 10
"""Between the ages of a session in participants.tsv and sessions.tsv."""

_MOST_YEARS_APART = 2
"""Between differences of ages, which may be whole years, and of dates."""


def find_ages(
    parts: Sequence[FolderScans], participants: pd.DataFrame, since_first: pd.Series, *, column: str | None
) -> tuple[pd.Series, list[str]]:
    """Return the ages at the scans in years, NaN where unknown, and warnings.

    `participants` has one row per scan, `since_first` the time since the participant's first session in years; an age
    at the first session grows with it.
    """
    if column is None:
        return pd.Series(float("nan"), index=participants.index), []
    warnings: list[str] = []
    tables = []
    for part in parts:
        table, lines = _age_table(part, column)
        tables.append(table)
        warnings += [f"{part.folder.name}: {line}" if len(parts) > 1 else line for line in dict.fromkeys(lines)]
    known = pd.concat(tables, ignore_index=True)
    ages, lines = read_ages(participants, column, known["unit"], known["file"])
    general, _ = read_ages(participants.assign(**{column: known["general"]}), column, known["general_unit"])
    if undated := {name for names in known["undated"][known["at_first"] & ages.notna()] for name in names}:
        lines.append(
            f"sessions.tsv: no acq_time of {list_some(undated)}; the age there is that of the first session, from "
            "which on time is counted if it has a date"
        )
    ages += since_first.where(known["at_first"]).fillna(0)
    person = participants["participant_id"]
    ages, more = check_ages(ages, known.assign(person=person, general=general), since_first)
    return ages, [*warnings, *lines, *more]


def _age_table(part: FolderScans, column: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the sources of the ages of a folder's scans, and warnings about their units.

    The columns are ``session``; ``own``, whether the age is that of the session, and ``at_first``, whether it is that
    of the first session; its ``file`` and ``unit``; ``general`` and ``general_unit``, the one of participants.tsv;
    ``undated``, the participant's sessions without a date.
    """
    tables, visits = part.tables, part.results.visits
    own = tables.is_session_value(visits, column)
    units = [
        find_age_unit(entry, column, source=source)
        for visit, is_own in [*zip(visits, own, strict=True), (("", None), False)]
        for entry, source in [tables.dictionary_entry(visit, column, own=is_own)]
    ]
    labels = [participant for participant, _ in visits]
    undated: dict[str, list[str]] = {participant: [] for participant in labels}
    for participant, session in tables.undated_sessions(visits):
        undated[participant].append(f"sub-{participant} ses-{session}")
    table = {
        "session": [f" ses-{session}" if session else "" for _, session in visits],
        "own": own,
        "at_first": tables.is_first_sessions_value(visits, column),
        "file": [
            f"sub-{label}_sessions.tsv" if is_own else "participants.tsv"
            for label, is_own in zip(labels, own, strict=True)
        ],
        "unit": pd.Series([unit for unit, _ in units[:-1]], dtype=object),
        "general": tables.participants.reindex(index=labels, columns=[column])[column].to_numpy(object),
        "general_unit": units[-1][0],
        "undated": pd.Series([undated[label] for label in labels], dtype=object),
    }
    return pd.DataFrame(table), [line for _, line in units[:-1] if line]


def find_age_unit(entry: Mapping[str, Any], column: str, *, source: str) -> tuple[str, str]:
    """Return the unit of a column of ages from its entry in the data dictionary `source`, and a warning unless years.

    >>> find_age_unit({"Units": "Months"}, "age", source="participants.json")
    ('months', 'participants.json: age is in months; age_years has it in years')
    """
    text = str(entry.get("Units") or "").strip()
    folded = text.casefold()
    if folded in ("", "n/a"):  # years, as BIDS has them, unless the name has another unit
        words = [word for word in re.findall("[a-z]+", column.casefold()) if len(word) > 1]
        named = {UNIT_NAMES[word] for word in words if word in UNIT_NAMES} - {"years"}
        unit = named.pop() if len(named) == 1 else "years"
        return unit, "" if unit == "years" else f"{column}: in {unit} by its name; age_years has it in years"
    # a single letter is a unit only if nothing else is written
    words = [folded] if folded in UNIT_NAMES else [word for word in re.findall("[a-z]+", folded) if len(word) > 1]
    units = {UNIT_NAMES[word] for word in words if word in UNIT_NAMES}
    if len(units) != 1:
        known = ", ".join(PER_YEAR)
        return "years", f"{source}: unknown Units {text!r} of {column}, assuming years; use one of {known}"
    (unit,) = units
    return unit, "" if unit == "years" else f"{source}: {column} is in {unit}; age_years has it in years"


def read_ages(
    values: pd.DataFrame, column: str, units: pd.Series, files: pd.Series | None = None
) -> tuple[pd.Series, list[str]]:
    """Convert the ages in a column to years, NaN where missing or impossible, with warnings about these.

    `units` are ``years``, ``months``, ``weeks`` or ``days`` per row; a value with its own (``67 y``, in DICOM
    ``018M``) keeps it. `files` are the names of the tables that the values are from, by default participants.tsv.
    """
    files = pd.Series("participants.tsv", values.index) if files is None else files
    numbers, warnings = parse_numbers(values, column, files)
    own_unit = values[column].map(lambda text: unit_of_value(str(text)) is not None).astype(bool)
    ages = numbers / units.map(PER_YEAR).astype(float).mask(own_unit, 1.0)
    impossible = (ages < 0) | (ages > OLDEST_YEARS)
    shown = numbers.map("{:g}".format) + units.map(lambda unit: "" if unit == "years" else f" {unit}")
    participants = values["participant_id"]
    lines = [
        f"{file}: {column} of {participant} is {age}, not an age in years; treated as missing"
        for file, participant, age in dict.fromkeys(
            zip(files[impossible], participants[impossible], shown[impossible], strict=True)
        )
    ]
    ages = ages.mask(impossible)
    if missing := list(dict.fromkeys(participants[ages.isna()])):
        lines.append(
            f"participants.tsv: no age of {list_some(missing)}; {len(missing)} of {participants.nunique()} "
            f"participants {'is' if len(missing) == 1 else 'are'} left out of analyses with age"
        )
    return ages, [*warnings, *lines]


def check_ages(ages: pd.Series, known: pd.DataFrame, since_first: pd.Series) -> tuple[pd.Series, list[str]]:
    """Mask ages at the scan above 130 years; warnings name these and ages that contradict others or the dates.

    `known` has ``person``, ``session`` (its name), ``own`` (whether the age is from sessions.tsv) and ``general`` (the
    age in participants.tsv, in years); `since_first` are years.
    """
    scans = known["person"] + known["session"]
    too_old = ages > OLDEST_YEARS
    lines = [
        f"{scan}: age {age:.1f} from the age at the first session and acq_time; treated as missing; correct one of them"
        for scan, age in dict(zip(scans[too_old], ages[too_old], strict=True)).items()
    ]
    ages = ages.mask(too_old)
    expected = known["general"] + since_first.fillna(0)
    contradictory = known["own"] & ((ages - expected).abs() > _CONTRADICTION_YEARS)
    if contradictory.any():
        first = int(contradictory.to_numpy().argmax())
        n_more = scans[contradictory].nunique() - 1
        lines.append(
            f"sessions.tsv: age of {scans[first]} is {ages[first]:g}, but {expected[first]:g} by participants.tsv"
            f"{f' (and {n_more} more such ages)' if n_more else ''}; that of the session is used"
        )
    offset = (ages - since_first).groupby(known["person"])
    spread = (offset.max() - offset.min()).drop(known["person"][contradictory].unique())
    if (apart := spread > _MOST_YEARS_APART).any():
        lines.append(
            f"sessions.tsv: ages and acq_time of {list_some(spread.index[apart])} disagree by up to {spread.max():.1f} "
            "years; each is used as it is; correct one of them"
        )
    return ages, lines


def describe_age_column(columns: pd.Index, age: str | None) -> list[str]:
    """Warn if there is no column of ages, several, or one with another name than ``age``."""
    candidates = [name for name in columns if find_column([name], AGE)]
    if age is None and len(columns):
        return [
            f"participants.tsv: no column of ages (columns: {', '.join(columns)}); age curves and the adjustment for "
            "age are omitted; name it with `age_column`"
        ]
    others = f" and not from {', '.join(name for name in candidates if name != age)}" if len(candidates) > 1 else ""
    if age and (others or age.casefold() != "age"):
        return [f"participants.tsv: ages are from column {age}{others}; `age_column` selects another"]
    return []
