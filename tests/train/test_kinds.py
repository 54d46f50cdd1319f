from collections.abc import Sequence
from typing import Annotated, Literal

import pytest

from bids_dgmseg.train.recipe_values import AnyLength, Limits, fit


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (float, 2, 2.0),
        (float | None, 2, 2.0),
        (Annotated[float, Limits(0, 1)], 1, 1.0),
        (tuple[int, ...], [], ()),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (Annotated[tuple[float, ...], AnyLength()], [1], (1.0,)),
        (Sequence[Sequence[int]], [[1], [1, 2]], ((1,), (1, 2))),
        (Literal["a", "b"], "b", "b"),
        (bool, False, False),
        (str, "word", "word"),
    ],
)
def test_a_value_gets_the_kind_that_is_wanted(kind, given, expected):
    found = fit(kind, given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (int, True, "True is not a whole number from 0"),
        (int, 2.0, "2.0 is not a whole number from 0"),
        (int, -1, "-1 is not a whole number from 0"),
        (float, float("inf"), "inf is not a number from 0"),
        (float | None, "none", "'none' is not a number from 0"),
        (Annotated[float, Limits(0, 1, above=True)], 0, "0 is not a number above 0, up to 1"),
        (Annotated[int, Limits(1)] | None, 0, "0 is not a whole number from 1"),
        (tuple[Annotated[int, Limits(1)], ...], [1, 0], "0 is not a whole number from 1"),
        (tuple[int, int], [1], r"\[1\] is not a list of 2"),
        (Annotated[tuple[float, ...], AnyLength()], [-1], "-1 is not a number from 0"),
        (tuple[int, ...], "12", "'12' is not a list with values"),
        (Sequence[int], [], r"\[\] is not a list with values"),
        (Literal[1, 2], True, "True is not one of 1, 2"),
        (bool, 1, "1 is not true or false"),
        (str, 1, "1 is not a text"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind, given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(kind, given)
