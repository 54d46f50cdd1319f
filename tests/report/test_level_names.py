"""Names below a plot are short, and no two are alike."""

import pytest

from bids_dgmseg.report.level_names import in_order, name_levels


@pytest.mark.parametrize(
    ("levels", "shown", "key"),
    [
        pytest.param(["HC", "MS"], ("HC", "MS"), "", id="short names stay"),
        pytest.param(
            [f"Site {number}" for number in range(10, 22)],
            tuple(map(str, range(10, 22))),
            "Names without “Site”",
            id="twelve sites that begin alike",
        ),
        pytest.param(
            ["Centre of Bern, its Skyra 3T scanner", "Centre of Graz, its Prisma 3T scanner"],
            ("Bern, its Skyra", "Graz, its Prisma"),
            "Names without “Centre of” and “3T scanner”",
            id="what all begin and end with is left out",
        ),
        pytest.param(
            [
                "Bern imaging centre, Skyra",
                "Bern imaging centre, Prisma",
                "Graz imaging centre, Skyra",
                "Graz imaging centre, Prisma",
            ],
            ("Bern imagin…tre, Skyra", "Bern imagin…re, Prisma", "Graz imagin…tre, Skyra", "Graz imagin…re, Prisma"),
            "Bern imagin…tre, Skyra: Bern imaging centre, Skyra; Bern imagin…re, Prisma: Bern imaging centre, "
            "Prisma; Graz imagin…tre, Skyra: Graz imaging centre, Skyra; Graz imagin…re, Prisma: Graz imaging "
            "centre, Prisma",
            id="the middle is taken out",
        ),
        pytest.param(
            [f"{letter}{'x' * 40}{number}{'y' * 40}" for letter in "ab" for number in "12"],
            ("1", "2", "3", "4"),
            "; ".join(
                f"{place}: {letter}{'x' * 40}{number}{'y' * 40}"
                for place, (letter, number) in enumerate((("a", 1), ("a", 2), ("b", 1), ("b", 2)), start=1)
            ),
            id="numbers where the middle alone tells them apart",
        ),
    ],
)
def test_names_are_shortened_as_far_as_they_stay_different(levels, shown, key):
    names = name_levels(levels)
    assert names.shown == shown
    assert names.key == key
    assert len(set(names.shown)) == len(levels)


def test_control_characters_are_shown_by_their_codes():
    assert name_levels(["A\0B", "A\x85B", "C"]).shown == ("A\\x00B", "A\\x85B", "C")


def test_sites_with_numbers_stand_in_the_order_of_the_numbers():
    assert in_order(["Site 10", "Site 9", "10", "2", "01"]) == ["01", "2", "10", "Site 9", "Site 10"]
