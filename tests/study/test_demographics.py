import pandas as pd
import pytest

from bids_dgmseg.study.demographics import find_age_unit, read_ages


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        (None, "years"),
        ("", "years"),
        ("n/a", "years"),
        ("year", "years"),
        ("Years", "years"),
        ("a", "years"),
        ("age in years (at scan)", "years"),
        ("months", "months"),
        ("mo", "months"),
        ("Weeks", "weeks"),
        ("d", "days"),
        ("age in days", "days"),
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
