import re

import pytest

from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES


def test_finer_nuclei_follow_the_sixteen():
    assert [structure.index for structure in ALL_STRUCTURES] == list(range(1, 29))
    finer = {structure.nucleus: structure.part_of for structure in ALL_STRUCTURES[16::2]}
    assert finer == {"GPe": "GP_L", "GPi": "GP_L", "SNr": "SN_L", "SNc": "SN_L", "NAC": "", "THA": ""}
    assert {structure.part_of[-2:] or "_L" for structure in ALL_STRUCTURES[16::2]} == {"_L"}
    assert {structure.part_of[-2:] or "_R" for structure in ALL_STRUCTURES[17::2]} == {"_R"}


def test_names_and_labels_agree_on_the_side():
    for left, right in zip(ALL_STRUCTURES[::2], ALL_STRUCTURES[1::2], strict=True):
        assert (left.nucleus, left.mapping) == (right.nucleus, right.mapping)
        assert [(-x, y, z) for x, y, z in left.mni_course_mm] == list(right.mni_course_mm)
        assert left.mni_mm[0] < 0
    for structure in ALL_STRUCTURES:
        side = {"L": "left", "R": "right"}[structure.hemisphere]
        assert structure.name.startswith(f"{side} ")
        assert structure.abbreviation.endswith(f"_{structure.hemisphere}")
        assert structure.bids_label.endswith(side)
        assert structure.bids_label.isalnum()  # as BIDS names require


def test_abbreviations_and_colours_are_unique():
    assert len({structure.abbreviation for structure in ALL_STRUCTURES}) == len(ALL_STRUCTURES)
    assert len({structure.color for structure in ALL_STRUCTURES}) == len(ALL_STRUCTURES)
    assert all(re.fullmatch("#[0-9a-f]{6}", structure.color) for structure in ALL_STRUCTURES)


def test_structures_are_found_by_name_and_label():
    assert STRUCTURES.named("SN_R").index == 8
    assert STRUCTURES.numbered(8).abbreviation == "SN_R"
    both = STRUCTURES.both_sides(["GP", "DN"])
    assert [structure.abbreviation for structure in both] == ["GP_L", "GP_R", "DN_L", "DN_R"]


def test_unknown_structures_are_refused():
    with pytest.raises(ValueError, match=r"unknown structure 'DN'; expected one of DN_L, DN_R, IN_L"):
        STRUCTURES.named("DN")
    with pytest.raises(ValueError, match="no structure has the label 0"):
        STRUCTURES.numbered(0)
