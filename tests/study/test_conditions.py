import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.conditions import match_filter

PEOPLE = pd.DataFrame(
    {
        "participant_id": ["sub-1", "sub-2", "sub-3", "sub-4"],
        "group": ["HC", "PD", "n/a", "HC"],
        "age": ["30", "89+", "50", "n/a"],
        "disease status": ["none", "late", "none", "early"],
        "years": ["9", "100", "30.0", "n/a"],
        "visit": ["2020-01-01", "2021-01-01", "n/a", "2019-05-01"],
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
        ('(group == "PD") | (age == 50)', [0, 1, 1, 0]),
        ('group in ["PD", "MSA"]', [0, 1, 0, 0]),
        ('group not in ["PD"]', [1, 0, 0, 1]),
        ("age in [30, 50]", [1, 0, 1, 0]),
        ('`disease status` == "none"', [1, 0, 1, 0]),
        ('years > "50"', [0, 1, 0, 0]),  # as text, 9 and 100 would change places
        ('"50" < years', [0, 1, 0, 0]),
        ('years <= "30"', [1, 0, 1, 0]),
        ('score > "40"', [0, 0, 1, 1]),  # a word among numbers is no number
        ('years == "30"', [0, 0, 1, 0]),
        ('years != "30"', [1, 1, 0, 0]),
        ('years in ["30", "9"]', [1, 0, 1, 0]),
        ('years in ["30", 9]', [1, 0, 1, 0]),
        ('age == "89+"', [0, 1, 0, 0]),  # no plain number: as it is written
        ('score in ["unknown", 9]', [1, 1, 0, 0]),
        ('visit > "2020-06-01"', [0, 1, 0, 0]),  # text is ordered as text
        ('group > "M"', [0, 1, 0, 0]),
        ('age == 30 or group == "HC"', [1, 0, 0, 1]),  # one true part is enough where the other is missing
    ],
)
def test_conditions_are_met_as_pandas_spells_them(condition, met):
    if not any(met):
        with pytest.raises(InputError, match="nobody with measures meets it"):
            match_filter(PEOPLE, condition, option="--control-filter")
    else:
        assert match_filter(PEOPLE, condition, option="--control-filter").tolist() == [bool(value) for value in met]


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
        "group == open('x')",
        "age < [1, 2]",
        "[x for x in (1,)]",
        "age in 3",
    ],
)
def test_what_is_no_comparison_is_refused_and_not_run(condition):
    with pytest.raises(InputError, match=r"cannot be (read|used in it); write it|cannot be used in it"):
        match_filter(PEOPLE, condition, option="--control-filter")


def test_the_message_shows_columns_or_values():
    with pytest.raises(InputError, match=r"no column grp \(columns: participant_id, group, age, disease status"):
        match_filter(PEOPLE, 'grp == "HC"', option="--control-filter")
    with pytest.raises(InputError, match=r"nobody with measures meets it \(group is HC, PD\)"):
        match_filter(PEOPLE, 'group == "hc"', option="--control-filter")


def test_numbers_are_not_ordered_by_a_word():
    with pytest.raises(InputError, match="age has numbers, 'old' is none; compare it with a number"):
        match_filter(PEOPLE, 'age > "old"', option="--control-filter")
