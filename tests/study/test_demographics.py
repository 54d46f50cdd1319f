import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.study.demographics import find_age_unit, parse_numbers, read_ages


def ages(*values: object) -> pd.DataFrame:
    return pd.DataFrame({"participant_id": [f"sub-{row}" for row in range(len(values))], "age": list(values)})


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        (None, "years"),
        ("n/a", "years"),
        ("year", "years"),
        ("Years", "years"),
        ("a", "years"),
        ("age in years (at scan)", "years"),
        ("months", "months"),
        ("mo", "months"),
        ("d", "days"),
    ],
)
def test_age_units_are_read_as_people_write_them(units, unit):
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
    people = pd.DataFrame({"participant_id": ["sub-01"], "age": [text]})
    ages, _ = read_ages(people, "age", pd.Series([unit]))
    assert ages.tolist() == pytest.approx([years])


def test_impossible_age_is_a_warning():
    people = pd.DataFrame({"participant_id": ["sub-01", "sub-02"], "age": ["1600", "1200"]})
    ages, lines = read_ages(people, "age", pd.Series(["months"] * 2))
    assert ages.tolist() == pytest.approx([float("nan"), 100.0], nan_ok=True)
    assert lines[0] == "participants.tsv: age of sub-01 is 1600 months, not an age in years; treated as missing"


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
        ("thirty", np.nan, "is 'thirty', not a number; it counts as missing"),
    ],
)
def test_common_spellings_of_ages_are_parsed(text, value, warning):
    values, warnings = parse_numbers(ages(text, "x").head(1), "age")
    assert values.tolist() == pytest.approx([value], nan_ok=True)
    assert warnings == (() if warning is None else (f"participants.tsv: age of sub-0 {warning}",))


def test_each_participant_is_reported_once():
    table = pd.concat([ages("89+", "30")] * 16)
    values, warnings = parse_numbers(table, "age")
    assert values.index.equals(table.index)
    assert warnings == ("participants.tsv: age of sub-0 is '89+', taken as 89",)
