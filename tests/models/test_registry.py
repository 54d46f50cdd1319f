import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import ALIASES, MODELS, get_model, read_models, weights_folder
from bids_dgmseg.models.structures import STRUCTURES

BLOCK = """
[tiny]
title = "A model"
network = "somewhere:Net"
labels = ["RN_R", "RN_L"]
input = { spacing_mm = [1, 1, 2.5], patch_mm = [64, 64, 80] }
localizer = { kind = "centre", margin_mm = 10 }
weights = { files = { segmenter = "00ff" }, licence = "CC-BY-4.0", trained_on = "nothing" }
"""


def test_a_block_is_all_it_takes_to_add_a_model():
    model = read_models(BLOCK)["tiny"]
    assert model.name == "tiny"
    assert model.input.spacing_mm == (1.0, 1.0, 2.5)
    assert model.localizer.kind == "centre"
    assert model.weights is not None
    assert model.weights.files == {"segmenter": "00ff"}


def test_structures_follow_the_order_of_the_channels():
    assert [structure.index for structure in read_models(BLOCK)["tiny"].structures] == [6, 5]


def test_a_misspelled_key_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'titel'"):
        read_models(BLOCK.replace("title", "titel"))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_names_nuclei_that_exist(name):
    assert set(MODELS[name].labels) <= {structure.abbreviation for structure in STRUCTURES}
    assert len(set(MODELS[name].labels)) == len(MODELS[name].labels)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_key_is_valid_as_a_bids_entity(name):
    assert name.isalnum()
    assert weights_folder(MODELS[name]).name == name


def test_the_shipped_model_finds_all_nuclei_and_is_the_default():
    assert get_model("default") is get_model("dgm16")
    assert get_model("dgm16").structures == tuple(STRUCTURES)
    assert set(ALIASES.values()) <= set(MODELS)


def test_an_unknown_model_is_refused_with_those_known():
    with pytest.raises(InputError, match=r"^--model unet: no such model; choose from default, .*dgm16"):
        get_model("unet")
