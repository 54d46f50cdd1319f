import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS, get_model, read_models, weights_folder
from bids_dgmseg.models.structures import ALL_STRUCTURES

BLOCK = """
[tiny]
title = "A model"
network = "somewhere:Net"
labels = ["RN_R", "RN_L"]
input = { spacing_mm = [1, 1, 2.5], patch_mm = [64, 64, 80] }
localizer = { kind = "centre", margin_mm = 10 }
weights = { files = { segmenter = "00ff" }, licence = "CC-BY-4.0", trained_on = "nothing" }
"""


def test_one_block_adds_a_model():
    model = read_models(BLOCK)["tiny"]
    assert model.name == "tiny"
    assert model.input.spacing_mm == (1.0, 1.0, 2.5)
    assert model.localizer.kind == "centre"
    assert model.weights is not None
    assert model.weights.files == {"segmenter": "00ff"}
    assert [structure.index for structure in model.structures] == [6, 5]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("title", "titel", "unknown key titel"),
        ("patch_mm", "patch", "unknown key input.patch"),
        ('kind = "centre"', 'kind = "center"', "localizer.kind: invalid enum value 'center'"),
        ("[1, 1, 2.5]", "[1, 1]", "input.spacing_mm: expected array of length 3, got 2"),
        ('network = "somewhere:Net"', "network = 1", "network: expected str, got int"),
    ],
)
def test_faults_in_the_registry_are_named(right, wrong, message):
    with pytest.raises(InputError, match=rf"^models.toml: tiny: {message}; correct the registry$"):
        read_models(BLOCK.replace(right, wrong))


@pytest.mark.parametrize("name", list(MODELS))
def test_names_and_nuclei_of_models_are_valid(name):
    assert set(MODELS[name].labels) <= {structure.abbreviation for structure in ALL_STRUCTURES}
    assert len(set(MODELS[name].labels)) == len(MODELS[name].labels)
    assert name.isalnum()  # as BIDS labels must be
    assert weights_folder(MODELS[name]).name == name


def test_unknown_model_is_refused_with_the_choices():
    with pytest.raises(InputError, match=r"^`model` unet: no such model; choose from default, .*dgm16"):
        get_model("unet")
