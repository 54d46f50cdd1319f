from __future__ import annotations

import pytest

from bids_dgmseg.bids.citation import read_boilerplate, say_reconstruction


def test_maps_that_were_given_need_no_word():
    assert say_reconstruction([]) == say_reconstruction([0, 0]) == ""


@pytest.mark.parametrize("n_echoes", [[4, 4], [1, 4]])
def test_several_echoes_are_unwrapped_from_one_to_the_next(n_echoes):
    said = say_reconstruction(n_echoes)
    assert "from echo to echo" in said.replace("\n", " ")
    assert "Some maps" not in said


def test_one_echo_has_no_next_one_and_keeps_the_offset():
    said = say_reconstruction([1, 1]).replace("\n", " ")
    assert "one gradient echo" in said
    assert "offset" not in said
    assert "@aspire" not in said


def test_maps_of_both_kinds_are_told_apart():
    assert say_reconstruction([0, 4]).startswith("Some maps were given, others made of echoes. Susceptibility was")


@pytest.mark.parametrize("name", ["reconstruction.md", "reconstruction_one_echo.md"])
def test_what_is_cited_is_in_the_bibliography(name):
    cited = {word.strip("[];.,") for word in read_boilerplate(name).split() if "@" in word}
    assert cited
    for key in cited:
        assert "{" + key.removeprefix("@") + "," in read_boilerplate("references.bib")
