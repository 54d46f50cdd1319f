import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import numeric_column, parse_numbers


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
def test_common_spellings_of_ages_are_parsed(text, value, warning):
    values, warnings = parse_numbers(ages(text, "x").head(1), "age")
    assert values.tolist() == pytest.approx([value], nan_ok=True)
    assert warnings == (() if warning is None else (f"participants.tsv: age of sub-0 {warning}",))


def test_each_participant_is_reported_once():
    table = pd.concat([ages("89+", "30")] * 16)
    values, warnings = parse_numbers(table, "age")
    assert values.index.equals(table.index)
    assert warnings == ("participants.tsv: age of sub-0 is '89+', taken as 89",)


def test_numeric_columns_are_unchanged():
    values, warnings = parse_numbers(ages(30, np.nan), "age")
    assert values.tolist() == pytest.approx([30, np.nan], nan_ok=True)
    assert not warnings


def test_text_in_numeric_column_is_rejected():
    with pytest.raises(ValueError, match=r"column age holds .*, expected numbers"):
        numeric_column(ages("30"), "age")


def test_missing_column_is_rejected():
    with pytest.raises(InputError, match=r"^group table: no column sex \(columns: participant_id, age\); add it"):
        parse_numbers(ages("30"), "sex")
