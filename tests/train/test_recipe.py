from typing import get_args

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.weights import load_object
from bids_dgmseg.train.objectives import AttentionUNetObjective, DCNNetObjective
from bids_dgmseg.train.recipe import Network, Pace, changed, read_setting
from bids_dgmseg.train.recipes import RECIPES, get_recipe

DCN, ZHAO, GUAN = (get_recipe(name) for name in ("dcnnet", "attunet25d", "deepqsmseg"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_teaches_the_classes_that_its_model_gives_out(name):
    assert tuple(get_recipe(name).classes) == MODELS[name].classes
    assert {one for kind in get_recipe(name).classes for one in get_recipe(name).structures(kind)} == set(
        MODELS[name].labels
    )


def test_the_papers_numbers_are_the_defaults():
    assert (DCN.sampling.size, DCN.sampling.step, DCN.sampling.margin) == ((32, 32, 32), (5, 5, 5), 5)
    assert DCN.pace == Pace(epochs=50, batch=8, learning_rate=1e-3, patience=20)
    assert (ZHAO.sampling.size, ZHAO.sampling.stack_axis, ZHAO.sampling.empty) == ((96, 3, 96), 1, 0.3)
    assert (ZHAO.augmentation.shift, ZHAO.augmentation.rotation_deg, ZHAO.augmentation.scale) == (15, 10, (0.8, 1.2))
    assert ZHAO.pace == Pace(epochs=300, batch=32, learning_rate=1e-4, patience=20)
    assert GUAN.sampling.size == (128, 128, 64)
    assert (GUAN.pace.epochs, GUAN.pace.milestones, GUAN.pace.patience) == (800, (30, 75, 300), None)
    assert {recipe.folds for recipe in (DCN, ZHAO, GUAN)} == {5}


def test_the_source_network_tells_two_classes_on_transverse_slices():
    source = get_recipe("attunet25d", "source")
    assert source.structures("SN-STN") == ("SN_L", "SN_R", "STN_L", "STN_R")
    assert (source.sampling.size, source.sampling.stack_axis) == ((128, 128, 3), 2)


def test_the_rate_falls_to_a_tenth_at_each_milestone():
    rates = [GUAN.pace.rate(epoch) for epoch in (0, 29, 30, 74, 75, 300, 799)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5, 1e-5])


def test_a_milestone_falls_in_its_own_epoch_whatever_the_number_of_epochs():
    for epochs in range(1, 200):  # 15 / 22 * 22 is below 15 in floating point
        pace = Pace(epochs=epochs, batch=1, learning_rate=1.0, milestones=tuple(range(1, epochs)))
        assert [pace.rate(epoch) for epoch in range(epochs)] == [0.1**epoch for epoch in range(epochs)]


def test_a_shorter_training_has_its_milestones_at_the_same_part():
    assert GUAN.pace.shortened(80).milestones == (3, 8, 30)  # a tenth of 30, 75 (7.5, to even) and 300
    assert GUAN.pace.shortened(5).rate(0) == GUAN.pace.learning_rate  # 30 of 800 are less than half of one of 5
    timed = Pace(epochs=800, batch=1, learning_rate=1.0, milestones=(400,), minutes=2)
    assert (timed.rate(1, 59.0), timed.rate(1, 60.0)) == (1.0, 0.1)


def test_every_value_can_be_changed_by_name():
    recipe = changed(DCN, ["sampling.step=[9, 9, 9]", "loss.terms.attention=0", "pace.batch=4", "validation=0.5"])
    assert recipe.sampling.step == (9, 9, 9)
    assert isinstance(recipe.loss, DCNNetObjective)
    assert recipe.loss.terms.attention == 0.0
    assert (recipe.pace.batch, recipe.validation) == (4, 0.5)
    assert recipe.sampling.size == DCN.sampling.size


def test_lists_that_follow_the_network_or_the_length_have_any_number_of_values():
    shallow = changed(ZHAO, ["loss.scale_weights=[0.7, 0.3]", "augmentation.axes=[0]"])
    assert isinstance(shallow.loss, AttentionUNetObjective)
    assert (shallow.loss.scale_weights, shallow.loss.class_weights) == ((0.7, 0.3), (0.4, 0.2, 0.4))
    assert shallow.augmentation.axes == (0,)
    assert changed(GUAN, ["pace.milestones=[400]"]).pace.milestones == (400,)
    assert changed(GUAN, ["pace.milestones=[]"]).pace.milestones == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "loss.class_weights=[1, 1]",
            r"--recipe loss.class_weights: \[1, 1\] has not as many values as \[0.4, 0.2, 0.4\]",
        ),
        ("loss.scale_weights=[0.7, -1]", "--recipe loss.scale_weights: -1 is not a number from 0"),
        ("loss.scale_weights=1", "--recipe loss.scale_weights: 1 is not a list with values"),
        ("augmentation.axes=[3]", "--recipe augmentation.axes: 3 is not a whole number from 0, up to 2"),
    ],
)
def test_lists_of_any_length_are_held_against_their_values_all_the_same(setting, message):
    with pytest.raises(InputError, match=message):
        changed(ZHAO, [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pace.speed=3", "--recipe pace.speed: there is no speed; choose from epochs, batch"),
        ("pace=3", "--recipe pace: is not a single value"),
        ("pace.batch=fast", "--recipe pace.batch: 'fast' is not a whole number from 1; give such a value"),
        ("pace.batch=0", "--recipe pace.batch: 0 is not a whole number from 1"),
        ("pace.learning_rate=nan", "--recipe pace.learning_rate: nan is not a number above 0"),
        ("pace.minutes=soon", "--recipe pace.minutes: 'soon' is not a number above 0"),
        ("validation=0.9", "--recipe validation: 0.9 is not a number above 0, up to 0.5"),
        ("loss.terms.attention=-1", "--recipe loss.terms.attention: -1 is not a number from 0"),
        ("loss.terms.heads=[1]", r"--recipe loss.terms.heads: \[1\] has not as many values as \[1.0, 1.0\]; give 2"),
        (
            "sampling.size=[16, 16]",
            r"--recipe sampling.size: \[16, 16\] has not as many values as \[32, 32, 32\]; give 3",
        ),
        ("sampling.size=[16, 16, 1.5]", "--recipe sampling.size: 1.5 is not a whole number from 1"),
        ("sampling.step=[-5, 5, 5]", "--recipe sampling.step: -5 is not a whole number from 0"),
        ("sampling.stack_axis=3", "--recipe sampling.stack_axis: 3 is not a whole number from 0, up to 2"),
        ("sampling.region=foo", "--recipe sampling.region: 'foo' is not one of labels, localizer"),
        ("sampling.normalization=foo", "--recipe sampling.normalization: 'foo' is not one of ppm, zscore, minmax"),
        ("spacing_mm=[1, 1]", r"--recipe spacing_mm: \[1, 1\] is not a list of 3"),
        ("augmentation.scale=[0, 1]", "--recipe augmentation.scale: 0 is not a number above 0"),
        (
            "network=os:system",
            "--recipe network: 'os:system' is not one of bids_dgmseg.networks.attention_unet:Attention",
        ),
        ("pace.batch", "--recipe pace.batch: is not KEY=VALUE"),
    ],
)
def test_what_cannot_be_changed_is_said(setting, message):
    with pytest.raises(InputError, match=message):
        changed(DCN, [setting])


def test_the_networks_to_choose_from_are_there_and_are_those_of_models_and_recipes():
    choices = {name for name in get_args(Network) if name}
    assert all(callable(load_object(name)) for name in choices)
    recipes = [recipe for variants in RECIPES.values() for recipe in variants.values()]
    used = {model.network for model in MODELS.values()} | {recipe.network for recipe in recipes}
    assert used - {""} == choices


def test_a_setting_is_toml_or_a_word():
    pairs = [read_setting(text, option="--arch") for text in ("a=true", "b=[1, 2]", "c=batch", "d='x y'")]
    assert pairs == [("a", True), ("b", [1, 2]), ("c", "batch"), ("d", "x y")]


def test_an_unknown_variant_is_said():
    with pytest.raises(InputError, match="--variant fast: attunet25d has paper, source, resnet50; choose one of them"):
        get_recipe("attunet25d", "fast")
