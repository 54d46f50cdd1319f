import re
from typing import Any

import pytest

from bids_dgmseg.report.methods import describe_methods, parse_bibtex

VERSIONS = {"bids_dgmseg": "0.1.0", "python": "3.11.9"}


def result(model: str = "dgm16", **qc: Any) -> tuple[str, dict[str, Any]]:
    return model, {"versions": VERSIONS, **qc}


def text_of(*results: tuple[str, dict[str, Any]]) -> str:
    (methods,) = describe_methods(results)
    return methods.text


def test_text_describes_run():
    text = text_of(result(input={"reference": "CSF"}), result(input={"reference": "CSF"}))
    assert re.search(r"with bids_dgmseg 0.1.0 \[\d+\], a BIDS App .* \(Python 3.11.9\)", text)
    assert "relative to the reference region of the maps (CSF)" in text
    text = text_of(result(input={"reference": "CSF"}), result(input={"reference": "not stated"}))
    assert "the reference region of each map (CSF, not stated)" in text
    assert "putamen (PUT) and globus pallidus (GP) in both hemispheres" in text


def test_user_weights_are_distinguished_from_shipped():
    own = text_of(result(settings={"weights": "/data/mine"}))
    shipped = text_of(result(settings={"weights": "shipped with the program"}))
    assert "weights were provided by the user" in own
    assert "/data" not in own
    assert "Its weights (licence CC-BY-4.0) were trained on simulated maps" in shipped
    assert "provided by the user" not in shipped


def test_voxel_size_of_network_is_described():
    own, fixed = (text_of(result(model=model)) for model in ("dgm16", "dcnnet"))
    assert "at 1 × 1 × 1 mm, or at the voxel size of the map where it differs by at most 10 %." in own
    assert "at 1.25 × 1.25 × 1.25 mm." in fixed
    assert "(two-step 3D U-Net" in own
    assert "(DCN-Net: dilated" in fixed


def test_weights_of_inversions_are_given():
    made = [{"EchoTime": [0.01], "RegularizationWeight": weight, "FieldNoise": 0.0012} for weight in (0.0004, 0.0006)]
    text = text_of(*(result(reconstruction=record) for record in made), result())
    assert "λ was 0.0004 to 0.0006, in proportion to the noise of the field (1.2 ppb)." in text
    assert "λ" not in text_of(result(), result(reconstruction={"EchoTime": [0.01], "FieldNoise": 0.001}))


def test_each_model_has_a_paragraph():
    assert [methods.model for methods in describe_methods([result(), result(model="other")])] == ["dgm16", "other"]
    assert "The model was other." in text_of(result(model="other"))


def test_bibtex_with_braces_doi_and_many_authors():
    authors = " and ".join(f"{letter}aus, Jos{{\\'e}} P." for letter in "ABCDEFG")
    text = f'@article{{x1,\n  author = {{{authors}}},\n  title = "{{QSM}} at  3 T",\n  journal = {{J}},\n' + (
        "  volume = {5},\n  year = 2020,\n  doi = {10.1/x}\n}\n"
    )
    references = parse_bibtex(text)
    assert references["x1"].authors == "Aaus JP, Baus JP, Caus JP, Daus JP, Eaus JP, Faus JP et al"
    assert (references["x1"].title, references["x1"].source) == ("QSM at 3 T", "J 5 2020")
    assert references["x1"].url == "https://doi.org/10.1/x"


def test_every_citation_has_a_reference():
    (methods,) = describe_methods([result()])
    numbers = {int(number) for cited in re.findall(r"\[([\d, ]+)\]", methods.text) for number in cited.split(", ")}
    assert numbers == set(range(1, len(methods.references) + 1))
    assert "@" not in methods.text
    assert {"bids_dgmseg", "nipype", "torch"} <= {reference.key for reference in methods.references}


@pytest.mark.parametrize(
    ("mirrored", "ensemble", "sentence"),
    [
        (True, False, "averaged over each map and its mirror image."),
        (True, True, "its mirror image, and over two checkpoints if available."),
        (False, False, ""),
    ],
)
def test_averaging_is_described(mirrored, ensemble, sentence):
    text = text_of(result(settings={"mirrored": mirrored, "ensemble": ensemble}))
    assert sentence in text
    assert ("mirror image" in text) == mirrored
