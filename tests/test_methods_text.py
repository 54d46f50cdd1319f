import re
from typing import Any

import pytest

from bids_dgmseg.methods_text import describe_methods, read_references
from bids_dgmseg.models.registry import MODELS

VERSIONS = {"bids_dgmseg": "0.1.0", "python": "3.11.9"}


def result(model: str = "dgm16", **qc: Any) -> tuple[str, dict[str, Any]]:
    return model, {"versions": VERSIONS, **qc}


def text_of(*results: tuple[str, dict[str, Any]]) -> str:
    (methods,) = describe_methods(results)
    return methods.text


def test_text_describes_run():
    text = text_of(result(input={"reference": "CSF"}), result(input={"reference": "CSF"}))
    assert re.search(r"with bids_dgmseg 0.1.0 \[\d+\], a BIDS App .* \(Python 3.11.9\)", text)
    assert "relative to the reference region of each map (CSF)" in text
    text = text_of(result(input={"reference": "CSF"}), result(input={"reference": "not stated"}))
    assert "the reference region of each map (CSF, not stated)" in text
    assert "putamen (PUT) and globus pallidus (GP) in both hemispheres" in text


def test_user_weights_are_distinguished_from_shipped():
    trained = text_of(result(settings={"weights": "/data/mine"}))
    shipped = text_of(result(settings={"weights": "shipped with the program"}))
    assert "weights were provided by the user" in trained
    assert "/data" not in trained
    assert "Its weights (licence CC-BY-4.0 AND 3D-Slicer-1.0) were trained on simulated maps" in shipped
    assert "provided by the user" not in shipped


def test_every_citation_has_a_reference():
    (methods,) = describe_methods([result()])
    numbers = {int(number) for cited in re.findall(r"\[([\d, ]+)\]", methods.text) for number in cited.split(", ")}
    assert numbers == set(range(1, len(methods.references) + 1))
    assert "@" not in methods.text
    assert {"bids_dgmseg", "nipype", "torch"} <= {reference.key for reference in methods.references}


@pytest.mark.parametrize(
    ("n_echoes", "present", "absent"),
    [
        pytest.param([4, 4], "temporally", "For some scans", id="several echoes"),
        pytest.param([1, 1], "single-echo gradient-echo", "multi-echo", id="one echo"),
        pytest.param([0, 4], "For some scans, susceptibility maps were provided; the others", "single-echo", id="maps"),
    ],
)
def test_reconstruction_is_described_by_echoes(n_echoes, present, absent):
    settings = {"unwrapping": "region-growing", "background": "auto", "inversion": "star"}
    records: list[dict[str, Any]] = [{"reconstruction": {"EchoTime": [0.005] * n}} if n else {} for n in n_echoes]
    text = text_of(*(result(settings=settings, **record) for record in records))
    assert present in text
    assert absent not in text


def test_cited_models_are_in_the_bibliography():
    cited = {key for model in MODELS.values() for key in model.citation}
    assert cited <= set(read_references())


def test_edited_labels_further_maps_and_masks_are_described_if_used():
    maps = {"R2starmap": {"unit": "1/s", "resampled": True}, "T1map": {"problem": "sub-01_T1map.nii.gz: not a map"}}
    text = text_of(
        result(correction={"edited": ["CN_L"]}, maps=maps, excluded={"files": ["sub-01_label-lesion_mask.nii.gz"]}),
        result(),
    )
    assert "Labels were edited manually (1 of 2 scans): CN_L." in text
    assert "measured in the same labels: R2starmap (1/s)." in text
    assert "interpolated linearly" in text
    assert "Voxels in masks of lesions were left out of all measures (1 of 2 scans)." in text
    assert not re.search("edited manually|Further maps|lesions", text_of(result()))
