import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.recipe import AttentionUNetObjective, DCNNetObjective, override, read_setting
from bids_dgmseg.lab.train.recipes import RECIPES, get_recipe
from bids_dgmseg.lab.train.schedule import Pace
from bids_dgmseg.models.model_folder import load_object
from bids_dgmseg.models.registry import MODELS, NETWORKS

DCN, ZHAO, GUAN = (get_recipe(name) for name in ("dcnnet", "attunet25d", "deepqsmseg"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_classes_of_its_model(name):
    assert tuple(get_recipe(name).classes) == MODELS[name].classes
    assert {one for kind in get_recipe(name).classes for one in get_recipe(name).structures(kind)} == set(
        MODELS[name].labels
    )


def test_defaults_are_the_papers_values():
    assert (DCN.sampling.size, DCN.sampling.step, DCN.sampling.margin) == ((32, 32, 32), (5, 5, 5), 5)
    assert DCN.pace == Pace(epochs=50, batch=8, learning_rate=1e-3, patience=20)
    assert (ZHAO.sampling.size, ZHAO.sampling.stack_axis, ZHAO.sampling.empty) == ((96, 3, 96), 1, 0.3)
    assert (ZHAO.augmentation.shift, ZHAO.augmentation.rotation_deg, ZHAO.augmentation.scale) == (15, 10, (0.8, 1.2))
    assert ZHAO.pace == Pace(epochs=300, batch=32, learning_rate=1e-4, patience=20)
    assert GUAN.sampling.size == (128, 128, 64)
    assert (GUAN.pace.epochs, GUAN.pace.milestones, GUAN.pace.patience) == (800, (30, 75, 300), None)
    assert {recipe.folds for recipe in (DCN, ZHAO, GUAN)} == {5}


def test_source_variant_has_two_classes():
    source = get_recipe("attunet25d", "source")
    assert source.structures("SN") == ("SN_L", "SN_R", "STN_L", "STN_R")
    assert (source.sampling.size, source.sampling.stack_axis) == ((128, 128, 3), 2)


def test_values_are_changed_by_name():
    recipe = override(DCN, ["sampling.step=[9, 9, 9]", "loss.terms.attention=0", "pace.batch=4", "validation=0.5"])
    assert recipe.sampling.step == (9, 9, 9)
    assert isinstance(recipe.loss, DCNNetObjective)
    assert recipe.loss.terms.attention == 0.0
    assert (recipe.pace.batch, recipe.validation) == (4, 0.5)
    assert recipe.sampling.size == DCN.sampling.size


def test_some_lists_may_change_their_length():
    shallow = override(ZHAO, ["loss.scale_weights=[0.7, 0.3]", "augmentation.axes=[0]"])
    assert isinstance(shallow.loss, AttentionUNetObjective)
    assert (shallow.loss.scale_weights, shallow.loss.class_weights) == ((0.7, 0.3), (0.4, 0.2, 0.4))
    assert shallow.augmentation.axes == (0,)
    assert override(GUAN, ["pace.milestones=[400]"]).pace.milestones == (400,)
    assert override(GUAN, ["pace.milestones=[]"]).pace.milestones == ()


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        (ZHAO, "loss.class_weights=[1, 1]", r": \[1, 1\] has 2 values; give 3, as in \[0.4, 0.2, 0.4\]"),
        (ZHAO, "loss.scale_weights=[0.7, -1]", r": \[0.7, -1\]: expected finite numbers of at least 0"),
        (ZHAO, "loss.scale_weights=1", ": 1: expected array, got int"),
        (ZHAO, "augmentation.axes=[3]", r": \[3\]: expected int <= 2"),
        (DCN, "pace.speed=3", ": unknown value speed; choose from epochs, batch"),
        (DCN, "pace=3", ": not a single value"),
        (DCN, "pace.batch=fast", ": 'fast': expected int, got str; change the value"),
        (DCN, "pace.batch=0", ": 0: expected int >= 1"),
        (DCN, "pace.batch=true", ": True: expected int, got bool"),
        (DCN, "pace.batch=2.0", ": 2.0: expected int, got float"),
        (DCN, "pace.learning_rate=nan", ": nan: expected float > 0"),
        (DCN, "pace.minutes=inf", ": inf: expected finite numbers of at least 0"),
        (DCN, "pace.minutes=soon", ": 'soon': expected float, got str"),
        (DCN, "validation=0.9", ": 0.9: expected float <= 0.5"),
        (DCN, "loss.terms.attention=-1", ": -1: expected finite numbers of at least 0"),
        (DCN, "loss.terms.heads=[1]", r": \[1\] has 1 values; give 2, as in \[1.0, 1.0\]"),
        (DCN, "sampling.size=[16, 16]", r": \[16, 16\] has 2 values; give 3, as in"),
        (DCN, "sampling.size=[16, 16, 1.5]", r": \[16, 16, 1.5\]: expected int, got float"),
        (DCN, "sampling.step=[-5, 5, 5]", r": \[-5, 5, 5\]: expected finite numbers of at least 0"),
        (DCN, "sampling.stack_axis=3", ": 3: expected int <= 2"),
        (DCN, "sampling.region=foo", ": 'foo': choose from labels, localizer"),
        (DCN, "spacing_mm=[1, 1]", r": \[1, 1\]: expected array of length 3, got 2"),
        (DCN, "augmentation.scale=[0, 1]", r": \[0, 1\]: expected float > 0"),
        (DCN, "network=os:system", ": 'os:system' is not one of bids_dgmseg.networks.attention_unet:Attention"),
        (DCN, "pace.batch", ": expected KEY=VALUE"),
    ],
)
def test_invalid_setting_is_refused(recipe, setting, message):
    with pytest.raises(InputError, match=f"`recipe` {setting.partition('=')[0]}{message}"):
        override(recipe, [setting])


def test_networks_exist_and_are_all_listed():
    assert all(callable(load_object(name)) for name in NETWORKS)
    recipes = [recipe for variants in RECIPES.values() for recipe in variants.values()]
    used = {model.network for model in MODELS.values()} | {recipe.network for recipe in recipes}
    assert used - {""} == set(NETWORKS)


def test_setting_is_toml_or_a_word():
    pairs = [read_setting(text, parameter="arch") for text in ("a=true", "b=[1, 2]", "c=batch", "d='x y'")]
    assert pairs == [("a", True), ("b", [1, 2]), ("c", "batch"), ("d", "x y")]


def test_unknown_variant_is_refused():
    with pytest.raises(
        InputError, match="`variant` fast: unknown variant of attunet25d; choose from paper, source, resnet50"
    ):
        get_recipe("attunet25d", "fast")
