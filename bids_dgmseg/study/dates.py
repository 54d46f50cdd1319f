"""Dates of sessions (acq_time of sessions.tsv and scans.tsv, also as spreadsheets write them); ages against them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime

import pandas as pd

from bids_dgmseg.errors import list_some

_DATES = {
    "year/month/day": re.compile(r"(?P<year>\d{4})[/.](?P<month>\d{1,2})[/.](?P<day>\d{1,2})([T ].*)?"),
    "day.month.year": re.compile(r"(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>\d{4})([T ].*)?"),
}
"""Name of a format that has one meaning → its pattern."""

_AMBIGUOUS = {
    "day/month/year": re.compile(r"(?P<day>\d{1,2})[/-](?P<month>\d{1,2})[/-](?P<year>\d{4})([T ].*)?"),
    "month/day/year": re.compile(r"(?P<month>\d{1,2})[/-](?P<day>\d{1,2})[/-](?P<year>\d{4})([T ].*)?"),
}
"""Formats that are understood if only one of them fits all dates of this kind."""

_EXAMPLE = "2020-10-15T10:12:00"

DAYS_PER_YEAR = 365.25

OLDEST_YEARS = 130

_LONGEST_YEARS = 40
"""Between the sessions of a participant; more is a typing error."""

_MOST_DAYS_APART = 31
"""Between the dates of a session in sessions.tsv and scans.tsv."""


def parse_days(texts: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Convert dates to days (ordinals), NaN if not understood; also return their format, empty for ISO 8601.

    ``15.10.2020`` and ``2020/10/15`` are understood, and ``10/15/2020`` if all such dates fit only one order of day and
    month.

    >>> days, formats = parse_days(pd.Series(["2020-10-15T10:12:00", "15.10.2020", "10/15/2020", "15.13.2020"]))
    >>> days.tolist(), formats.tolist()
    ([737713.0, 737713.0, 737713.0, nan], ['', 'day.month.year', 'month/day/year', ''])
    """
    patterns = dict(_DATES)
    unclear = [text for text in texts if _AMBIGUOUS["day/month/year"].fullmatch(text)]
    fitting = {
        name: pattern
        for name, pattern in _AMBIGUOUS.items()
        if not any(pd.isna(_day(text, pattern)) for text in unclear)
    }
    if len(fitting) == 1:
        patterns |= fitting
    days = texts.map(_iso_day).astype(float)
    formats = pd.Series("", texts.index)
    for name, pattern in patterns.items():
        parsed = texts.map(lambda text, pattern=pattern: _day(text, pattern)).astype(float)
        formats = formats.mask(parsed.notna() & days.isna(), name)
        days = days.fillna(parsed)
    return days, formats


def find_days(times: Mapping[str, pd.Series]) -> tuple[pd.Series, list[str]]:
    """Return the day of each session, from the first of several tables that has one, and warnings.

    `times` are ``acq_time`` by table; their index has the labels of participant and session. Of several times of a
    session in one table, the first is used. Dates of a participant that are more than 40 years apart are not used.
    """
    warnings: list[str] = []
    tables: list[pd.Series] = []
    for where, texts in times.items():
        days, formats = parse_days(texts)
        if (unknown := texts[days.isna()]).size:
            warnings.append(
                f"{where}: acq_time of {_list_sessions(unknown.index)} is not understood ({unknown.iloc[0]!r}); it "
                f"counts as missing; write it like {_EXAMPLE}"
            )
        warnings += [
            f"{where}: acq_time of {_list_sessions(texts.index[formats == name])} is written like "
            f"{texts[formats == name].iloc[0]!r}, read as {name}; BIDS expects {_EXAMPLE}"
            for name in formats[formats != ""].unique()
        ]
        tables.append(days.dropna().groupby(level=[0, 1]).min())
    days = tables[0]
    for other in tables[1:]:
        apart = (days - other).abs()
        if (apart > _MOST_DAYS_APART).any():
            sessions = _list_sessions(apart.index[apart > _MOST_DAYS_APART])
            first, second = times
            warnings.append(
                f"{second}: acq_time of {sessions} differs from {first} by up to {apart.max():g} days; that of {first} "
                "is used"
            )
        days = days.combine_first(other)
    participants = days.groupby(level=0)
    span = (participants.transform("max") - participants.transform("min")) / DAYS_PER_YEAR
    if (far := span > _LONGEST_YEARS).any():
        who = list_some({f"sub-{participant}" for participant, _ in days.index[far]})
        warnings.append(
            f"{' and '.join(times)}: acq_time of {who} spans up to {span.max():.1f} years; the dates are not used; "
            "correct them"
        )
    return days[~far], warnings


def _list_sessions(index: pd.Index) -> str:
    return list_some({f"sub-{labels[0]} ses-{labels[1]}" for labels in index.tolist()})


def _iso_day(text: str) -> float:
    try:
        return float(datetime.fromisoformat(text).toordinal())
    except ValueError:
        return float("nan")


def _day(text: str, pattern: re.Pattern[str]) -> float:
    found = pattern.fullmatch(text)
    try:
        parts = {part: int(number) for part, number in found.groupdict().items()} if found else {}
        return float(date(**parts).toordinal()) if parts else float("nan")
    except ValueError:
        return float("nan")
