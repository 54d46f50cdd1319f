import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.demographics import match_condition

PEOPLE = pd.DataFrame(
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
            match_condition(PEOPLE, condition, option="--control-filter")
    else:
        assert match_condition(PEOPLE, condition, option="--control-filter").tolist() == [bool(value) for value in met]


@pytest.mark.parametrize(
    "condition",
    [
        "group.str.startswith('H')",
        "group == __import__('os')",
        "@secret == 1",
        "group",
        "'HC'",
        "",
        "group ==",
        "group == []",
        "age + 1 > 3",
        "age < [1, 2]",
        "age in 3",
        "group is 'HC'",
    ],
)
def test_other_expressions_are_not_evaluated(condition):
    with pytest.raises(InputError, match=r"(cannot be parsed|is not allowed); write it like group"):
        match_condition(PEOPLE, condition, option="--control-filter")


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
        match_condition(PEOPLE, condition, option="--control-filter")
