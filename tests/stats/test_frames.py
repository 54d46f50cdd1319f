import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import numbers, to_numbers


def ages(*values: object) -> pd.DataFrame:
    return pd.DataFrame({"participant_id": [f"sub-{row}" for row in range(len(values))], "age": list(values)})


@pytest.mark.parametrize(
    ("text", "value", "warning"),
    [
        ("30", 30.0, None),
        (" 30.5 ", 30.5, None),
        ("n/a", np.nan, None),
        ("", np.nan, None),
        (None, np.nan, None),
        ("89+", 89.0, "is '89+', taken as 89"),
        (">89", 89.0, "is '>89', taken as 89"),
        ("034Y", 34.0, "is '034Y', taken as 34"),
        ("018M", 1.5, "is '018M', taken as 1.5"),
        ("thirty", np.nan, "is 'thirty', not a number; it counts as missing"),
        ("30-35", np.nan, "is '30-35', not a number; it counts as missing"),
    ],
)
def test_ages_are_read_as_people_write_them(text, value, warning):
    values, warnings = to_numbers(ages(text, "x").head(1), "age")
    assert values.tolist() == pytest.approx([value], nan_ok=True)
    assert warnings == (() if warning is None else (f"participants.tsv: age of sub-0 {warning}",))


def test_a_participant_with_many_rows_is_named_once():
    table = pd.concat([ages("89+", "30")] * 16)
    values, warnings = to_numbers(table, "age")
    assert values.index.equals(table.index)
    assert warnings == ("participants.tsv: age of sub-0 is '89+', taken as 89",)


def test_numbers_are_taken_as_they_are():
    values, warnings = to_numbers(ages(30, np.nan), "age")
    assert values.tolist() == pytest.approx([30, np.nan], nan_ok=True)
    assert not warnings


def test_text_where_numbers_are_needed_is_refused():
    with pytest.raises(ValueError, match=r"column age holds .*, expected numbers"):
        numbers(ages("30"), "age")


def test_a_missing_column_is_refused():
    with pytest.raises(InputError, match=r"^group table: no column sex \(columns: participant_id, age\); add it"):
        to_numbers(ages("30"), "sex")
