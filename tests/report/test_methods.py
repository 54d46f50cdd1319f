import re
from typing import Any

import pytest

from bids_dgmseg.report.methods import parse_bibtex, write_methods
from bids_dgmseg.report.results import Result

VERSIONS = {"bids_dgmseg": "0.1.0", "python": "3.11.9"}


def result(model: str = "dgm16", **quality: Any) -> Result:
    return Result(participant="01", name="sub-01", model=model, quality={"versions": VERSIONS, **quality})


def test_the_text_says_what_was_run():
    (methods,) = write_methods([result(input={"reference": "CSF"}), result(input={"reference": "CSF"})])
    assert re.search(r"with bids_dgmseg 0.1.0 \[\d+\], a BIDS App .* \(Python 3.11.9\)", methods.text)
    assert "relative to the reference of the maps (CSF)" in methods.text
    assert "dgm16" in methods.text
    assert "DN, IN, RN, SN, STN, CN, PUT, GP, left and right" in methods.text


def test_own_weights_are_not_passed_off_as_the_models():
    (methods,) = write_methods([result(settings={"weights": "/data/mine"})])
    assert "weights were given by the user" in methods.text
    assert "/data" not in methods.text


def test_weights_that_ship_are_said_to_be_trained_on_simulated_maps():
    (methods,) = write_methods([result(settings={"weights": "shipped with the program"})])
    assert "Its weights were trained on simulated maps (licence CC-BY-4.0)." in methods.text
    assert "given by the user" not in methods.text


def test_different_references_are_listed():
    (methods,) = write_methods([result(input={"reference": "CSF"}), result(input={"reference": "not stated"})])
    assert "each map's own reference (CSF, not stated)" in methods.text


def test_methods_say_which_network_looked_and_on_which_voxels():
    own, fixed = (write_methods([result(model=model)])[0].text for model in ("dgm16", "dcnnet"))
    assert "at 1 × 1 × 1 mm or on the map's own voxels where these differ from it by at most 10%." in own
    assert "at 1.25 × 1.25 × 1.25 mm." in fixed
    assert "(two-step network" in own
    assert "(DCN-Net: dilated" in fixed


def test_each_model_has_its_paragraph_and_an_unknown_one_is_named():
    assert [methods.model for methods in write_methods([result(), result(model="other")])] == ["dgm16", "other"]
    assert "The model was other." in write_methods([result(model="other")])[0].text


def test_bibliographies_are_read_with_braces_doi_and_many_authors():
    authors = " and ".join(f"{letter}aus, Jos{{\\'e}} P." for letter in "ABCDEFG")
    text = f'@article{{x1,\n  author = {{{authors}}},\n  title = "{{QSM}} at  3 T",\n  journal = {{J}},\n' + (
        "  volume = {5},\n  year = 2020,\n  doi = {10.1/x}\n}\n"
    )
    references = parse_bibtex(text)
    assert references["x1"].authors == "Aaus JP, Baus JP, Caus JP, Daus JP, Eaus JP, Faus JP et al"
    assert (references["x1"].title, references["x1"].source) == ("QSM at 3 T", "J 5 2020")
    assert references["x1"].url == "https://doi.org/10.1/x"


def test_every_citation_has_its_reference():
    (methods,) = write_methods([result()])
    numbers = {int(number) for cited in re.findall(r"\[([\d, ]+)\]", methods.text) for number in cited.split(", ")}
    assert numbers == set(range(1, len(methods.references) + 1))
    assert "@" not in methods.text
    assert {"bids_dgmseg", "nipype", "torch"} <= {reference.key for reference in methods.references}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mirrored": True, "ensemble": False}, "averaged over each map and its mirror image."),
        (
            {"mirrored": True, "ensemble": True},
            "its mirror image, and over two checkpoints where the weights have them.",
        ),
    ],
)
def test_what_is_averaged_is_said(settings, sentence):
    (methods,) = write_methods([result(settings=settings)])
    assert sentence in methods.text


def test_nothing_is_said_of_averages_where_there_are_none():
    (methods,) = write_methods([result(settings={"mirrored": False, "ensemble": False})])
    assert "mirror image" not in methods.text
