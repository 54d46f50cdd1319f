"""Ages and numbers as spelled in participants.tsv, and conditions on participants' columns."""

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.ages import find_age_unit, read_ages
from bids_dgmseg.study.demographics import (
    AGE,
    find_column,
    match_condition,
    parse_numbers,
    read_categories,
    read_sexes,
    without_codes,
)


def ages(*values: object) -> pd.DataFrame:
    return pd.DataFrame({"participant_id": [f"sub-{row}" for row in range(len(values))], "age": list(values)})


YEARS = dict.fromkeys((None, "n/a", "year", "Years", "a", "age in years (at scan)"), "years")


@pytest.mark.parametrize(("units", "unit"), [*YEARS.items(), ("months", "months"), ("mo", "months"), ("d", "days")])
def test_common_spellings_of_age_units_are_read(units, unit):
    found, line = find_age_unit({} if units is None else {"Units": units}, "age", source="participants.json")
    assert found == unit
    assert line == ("" if unit == "years" else f"participants.json: age is in {unit}; age_years has it in years")


@pytest.mark.parametrize("units", ["Jahre", "months or years", 12, ["years", "months"]])
def test_unknown_age_unit_is_a_warning(units):
    unit, line = find_age_unit({"Units": units}, "Age", source="participants.json")
    assert unit == "years"
    assert line == (
        f"participants.json: unknown Units {str(units)!r} of Age, assuming years; use one of years, months, weeks, days"
    )


@pytest.mark.parametrize(
    ("text", "unit", "years"),
    [
        ("30", "years", 30.0),
        ("366", "months", 30.5),
        ("1461", "weeks", 1461 * 7 / 365.25),
        ("1461", "days", 4.0),
        ("018M", "months", 1.5),
        ("018M", "years", 1.5),
        ("030Y", "days", 30.0),
    ],
)
def test_ages_are_converted_to_years(text, unit, years):
    found, _ = read_ages(ages(text), "age", pd.Series([unit]))
    assert found.tolist() == pytest.approx([years])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((name, True) for name in ("age", "AGE", "Age (years)", "age_at_scan", "Age at MRI [y]", "AgeAtBaseline")),
        *((name, False) for name in ("age_months", "stage", "age_group", "age_of_onset")),
    ],
)
def test_common_names_of_age_are_found(name, found):
    assert find_column(["sex", name], AGE) == (name if found else None)


def test_name_of_a_column_gives_the_unit():
    line = "age_months: in months by its name; age_years has it in years"
    assert find_age_unit({}, "age_months", source="participants.json") == ("months", line)
    assert find_age_unit({"Units": "years"}, "age_months", source="participants.json") == ("years", "")
    assert find_age_unit({}, "Age (years)", source="participants.json") == ("years", "")


WHO = pd.Series([f"sub-{row}" for row in range(8)])


def categories(*values):
    return pd.Series([*values, *[None] * (len(WHO) - len(values))], dtype=object)


SITE = "participants.tsv: site"


@pytest.mark.parametrize(
    ("values", "kept", "lines"),
    [
        ("A A B B", "A A B B", []),
        ("A A none -999", "A A", [f"{SITE} of sub-2, sub-3 is '-999' or 'none', which counts as missing"]),
        ("A B C", "A B C", []),  # a small study
        (
            "A A A A A O",
            "A A A A A O",
            [f"{SITE} is 'O' for sub-5 only; correct it if it is misspelled, write n/a if it means missing"],
        ),
        ("PD pd PD Pd", "PD PD PD PD", [f"{SITE} 'Pd' and 'pd' are taken as 'PD'"]),
        ("a_b A-B a_b A1 A-1", "a_b a_b a_b A1 A-1", [f"{SITE} 'A-B' is taken as 'a_b'"]),  # A1 may be another site
    ],
)
def test_codes_and_odd_categories_are_reported(values, kept, lines):
    found, warnings = read_categories(categories(*values.split()), WHO, where=SITE)
    assert found.dropna().tolist() == kept.split()
    assert warnings == lines


SEX = "participants.tsv: sex"


@pytest.mark.parametrize(
    ("values", "levels", "sexes", "lines"),
    [
        ("F f Female M male m", {}, "F F F M M M", []),
        (
            "F M O x",
            {},
            "F M O",
            [
                f"{SEX} of sub-3 is 'x', not F, M or O; it counts as missing",
                f"{SEX} of sub-2 is 'O', a separate category (other)",
            ],
        ),
        (
            "1 2 1 999",
            {},
            "1 2 1",
            [
                f"{SEX} of sub-3 is '999', which counts as missing",
                f"{SEX} is coded as '1' and '2', used as they are; write F and M to have them named",
            ],
        ),
        ("1 2 1", {"1": "male", "2": {"Description": "Female participants"}}, "M F M", []),
        ("F M 1 2", {}, "F M", [f"{SEX} of sub-2, sub-3 is '1' or '2', not F, M or O; it counts as missing"]),
    ],
)
def test_sexes_are_understood_or_reported(values, levels, sexes, lines):
    found, warnings = read_sexes(categories(*values.split()), WHO, levels, where=SEX)
    assert found.dropna().tolist() == sexes.split()
    assert warnings == lines


def test_age_with_its_own_unit_keeps_it():
    found, _ = read_ages(ages("67 years", "804", "804 months"), "age", pd.Series(["months"] * 3))
    assert found.tolist() == [67.0, 67.0, 67.0]


def test_impossible_age_is_a_warning():
    found, lines = read_ages(ages("1600", "1200"), "age", pd.Series(["months"] * 2))
    assert found.tolist() == pytest.approx([float("nan"), 100.0], nan_ok=True)
    assert lines[0] == "participants.tsv: age of sub-0 is 1600 months, not an age in years; treated as missing"


@pytest.mark.parametrize(
    ("text", "value", "warning"),
    [
        ("30", 30.0, None),
        (" 30.5 ", 30.5, None),
        ("n/a", np.nan, None),
        (None, np.nan, None),
        ("89+", 89.0, "is '89+', taken as 89"),
        (">89", 89.0, "is '>89', taken as 89"),
        ("034Y", 34.0, "is '034Y', taken as 34"),
        ("018M", 1.5, "is '018M', taken as 1.5"),
        ("67 y", 67.0, None),
        ("67 years", 67.0, None),
        ("67.5yrs", 67.5, None),
        ("67 years old", 67.0, None),
        ("18 months", 1.5, "is '18 months', taken as 1.5"),
        ("67 apples", np.nan, "is '67 apples', not a number; it counts as missing"),
        ("thirty", np.nan, "is 'thirty', not a number; it counts as missing"),
    ],
)
def test_common_spellings_of_ages_are_parsed(text, value, warning):
    values, warnings = parse_numbers(ages(text, "x").head(1), "age")
    assert values.tolist() == pytest.approx([value], nan_ok=True)
    assert warnings == (() if warning is None else (f"participants.tsv: age of sub-0 {warning}",))


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ([0.0, 30.0, -9.0], [2]),
        ([0.0, 30.0, 999.0], [2]),
        ([-20.0, 30.0, -9.0], []),  # a score that may be negative
        ([600.0, 30.0, 999.0], []),  # a dose within the range of the others
        ([-9.0, -9.0, np.nan], []),
        ([-3.0, -2.0, 999.0], [2]),
    ],
)
def test_codes_of_missing_values_are_those_unlike_the_other_numbers(values, missing):
    who = pd.Series([f"sub-{number}" for number in range(3)])
    found, lines = without_codes(pd.Series(values), who, where="participants.tsv: score")
    assert list(np.flatnonzero(found.isna() & ~np.isnan(values))) == missing
    assert len(lines) == bool(missing)


def test_each_participant_is_reported_once():
    table = pd.concat([ages("89+", "30")] * 16)
    values, warnings = parse_numbers(table, "age")
    assert values.index.equals(table.index)
    assert warnings == ("participants.tsv: age of sub-0 is '89+', taken as 89",)


TABLE = pd.DataFrame(
    {
        "participant_id": ["sub-1", "sub-2", "sub-3", "sub-4"],
        "group": ["HC", "PD", None, "HC"],
        "age": ["30", "89+", "50", None],
        "disease status": ["none", "late", "none", "early"],
        "years": ["9", "100", "30.0", None],
        "visit": ["2020-01-01", "2021-01-01", None, "2019-05-01"],
        "score": ["9", "unknown", "100", "50"],
    }
)


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        ('group == "HC"', [1, 0, 0, 1]),
        ("group != 'PD'", [1, 0, 0, 1]),  # a missing group is not known to differ
        ("not group == 'PD'", [1, 0, 0, 1]),
        ("age > 40", [0, 1, 1, 0]),
        ("40 < age", [0, 1, 1, 0]),
        ("30 <= age < 60", [1, 0, 1, 0]),
        ('group == "HC" and age > 20', [1, 0, 0, 0]),
        ('(group == "HC") & ~(age > 20)', [0, 0, 0, 0]),
        ('group == "PD" or age == 50', [0, 1, 1, 0]),
        ('group in ["PD", "MSA"]', [0, 1, 0, 0]),
        ('group not in ["PD"]', [1, 0, 0, 1]),
        ("age in [30, 50]", [1, 0, 1, 0]),
        ('`disease status` == "none"', [1, 0, 1, 0]),
        ('years > "50"', [0, 1, 0, 0]),  # as text, 9 and 100 would change places
        ('"50" < years', [0, 1, 0, 0]),
        ('score > "40"', [0, 0, 1, 1]),  # a word among numbers is missing
        ('years == "30"', [0, 0, 1, 0]),
        ('years != "30"', [1, 1, 0, 0]),
        ('years in ["30", "9"]', [1, 0, 1, 0]),
        ('years in ["30", 9]', [1, 0, 1, 0]),
        ('age == "89+"', [0, 1, 0, 0]),  # not a plain number: compared as text
        ('score in ["unknown", 9]', [1, 1, 0, 0]),
        ('visit > "2020-06-01"', [0, 1, 0, 0]),  # text is ordered as text
        ('age == 30 or group == "HC"', [1, 0, 0, 1]),  # one true part is enough where the other is missing
    ],
)
def test_conditions_match_as_pandas_queries(condition, met):
    if not any(met):
        with pytest.raises(InputError, match="matches no participant with results"):
            match_condition(TABLE, condition, parameter="control_filter")
    else:
        assert match_condition(TABLE, condition, parameter="control_filter").tolist() == [bool(value) for value in met]


@pytest.mark.parametrize(
    "condition",
    [
        *("group.str.startswith('H')", "group == __import__('os')", "@secret == 1", "group", "'HC'", "", "group =="),
        *("group == []", "age + 1 > 3", "age < [1, 2]", "age in 3", "group is 'HC'"),
    ],
)
def test_other_expressions_are_not_evaluated(condition):
    with pytest.raises(InputError, match=r"(cannot be parsed|is not allowed); write it like group"):
        match_condition(TABLE, condition, parameter="control_filter")


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ('grp == "HC"', r"no column grp \(columns: participant_id, group, age, disease status"),
        ('group == "hc"', r"matches no participant with results \(group is HC, PD\)"),
        ('age > "old"', "age has numbers, 'old' is not one; compare it with a number"),
    ],
)
def test_message_names_the_problem(condition, message):
    with pytest.raises(InputError, match=message):
        match_condition(TABLE, condition, parameter="control_filter")
