from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.model_folder import load_object
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.train.losses import AttentionUNetObjective, DCNNetObjective
from bids_dgmseg.train.recipe import Network, override, read_setting
from bids_dgmseg.train.recipe_values import AnyLength, Limits, convert
from bids_dgmseg.train.recipes import RECIPES, get_recipe
from bids_dgmseg.train.schedule import Pace

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
    assert source.structures("SN-STN") == ("SN_L", "SN_R", "STN_L", "STN_R")
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
    ("setting", "message"),
    [
        (
            "loss.class_weights=[1, 1]",
            r"--recipe loss.class_weights: \[1, 1\] has 2 values; give 3, as in \[0.4, 0.2, 0.4\]",
        ),
        ("loss.scale_weights=[0.7, -1]", "--recipe loss.scale_weights: -1 is not a number of at least 0"),
        ("loss.scale_weights=1", "--recipe loss.scale_weights: 1 is not a non-empty list"),
        ("augmentation.axes=[3]", "--recipe augmentation.axes: 3 is not an integer of at least 0 and at most 2"),
    ],
)
def test_invalid_list_is_refused(setting, message):
    with pytest.raises(InputError, match=message):
        override(ZHAO, [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pace.speed=3", "--recipe pace.speed: unknown value speed; choose from epochs, batch"),
        ("pace=3", "--recipe pace: not a single value"),
        ("pace.batch=fast", "--recipe pace.batch: 'fast' is not an integer of at least 1; change the value"),
        ("pace.batch=0", "--recipe pace.batch: 0 is not an integer of at least 1"),
        ("pace.learning_rate=nan", "--recipe pace.learning_rate: nan is not a number above 0"),
        ("pace.minutes=soon", "--recipe pace.minutes: 'soon' is not a number above 0"),
        ("validation=0.9", "--recipe validation: 0.9 is not a number above 0 and at most 0.5"),
        ("loss.terms.attention=-1", "--recipe loss.terms.attention: -1 is not a number of at least 0"),
        ("loss.terms.heads=[1]", r"--recipe loss.terms.heads: \[1\] has 1 values; give 2, as in \[1.0, 1.0\]"),
        (
            "sampling.size=[16, 16]",
            r"--recipe sampling.size: \[16, 16\] has 2 values; give 3, as in",
        ),
        ("sampling.size=[16, 16, 1.5]", "--recipe sampling.size: 1.5 is not an integer of at least 1"),
        ("sampling.step=[-5, 5, 5]", "--recipe sampling.step: -5 is not an integer of at least 0"),
        ("sampling.stack_axis=3", "--recipe sampling.stack_axis: 3 is not an integer of at least 0 and at most 2"),
        ("sampling.region=foo", "--recipe sampling.region: 'foo' is not one of labels, localizer"),
        ("sampling.normalization=foo", "--recipe sampling.normalization: 'foo' is not one of ppm, zscore, minmax"),
        ("spacing_mm=[1, 1]", r"--recipe spacing_mm: \[1, 1\] is not a list of 3 values"),
        ("augmentation.scale=[0, 1]", "--recipe augmentation.scale: 0 is not a number above 0"),
        (
            "network=os:system",
            "--recipe network: 'os:system' is not one of bids_dgmseg.networks.attention_unet:Attention",
        ),
        ("pace.batch", "--recipe pace.batch: expected KEY=VALUE"),
    ],
)
def test_invalid_setting_is_refused(setting, message):
    with pytest.raises(InputError, match=message):
        override(DCN, [setting])


def test_networks_exist_and_are_all_listed():
    choices = {name for name in get_args(Network) if name}
    assert all(callable(load_object(name)) for name in choices)
    recipes = [recipe for variants in RECIPES.values() for recipe in variants.values()]
    used = {model.network for model in MODELS.values()} | {recipe.network for recipe in recipes}
    assert used - {""} == choices


def test_setting_is_toml_or_a_word():
    pairs = [read_setting(text, option="--arch") for text in ("a=true", "b=[1, 2]", "c=batch", "d='x y'")]
    assert pairs == [("a", True), ("b", [1, 2]), ("c", "batch"), ("d", "x y")]


def test_unknown_variant_is_refused():
    with pytest.raises(
        InputError, match="--variant fast: unknown variant of attunet25d; choose from paper, source, resnet50"
    ):
        get_recipe("attunet25d", "fast")


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (float, 2, 2.0),
        (float | None, 2, 2.0),
        (Annotated[float, Limits(0, 1)], 1, 1.0),
        (tuple[int, ...], [], ()),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (Annotated[tuple[float, ...], AnyLength()], [1], (1.0,)),
        (Sequence[Sequence[int]], [[1], [1, 2]], ((1,), (1, 2))),
        (Literal["a", "b"], "b", "b"),
        (bool, False, False),
        (str, "word", "word"),
    ],
)
def test_value_is_converted(kind, given, expected):
    found = convert(kind, given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (int, True, "True is not an integer of at least 0"),
        (int, 2.0, "2.0 is not an integer of at least 0"),
        (int, -1, "-1 is not an integer of at least 0"),
        (float, float("inf"), "inf is not a number of at least 0"),
        (float | None, "none", "'none' is not a number of at least 0"),
        (Annotated[float, Limits(0, 1, above=True)], 0, "0 is not a number above 0 and at most 1"),
        (Annotated[int, Limits(1)] | None, 0, "0 is not an integer of at least 1"),
        (tuple[Annotated[int, Limits(1)], ...], [1, 0], "0 is not an integer of at least 1"),
        (tuple[int, int], [1], r"\[1\] is not a list of 2 values"),
        (Annotated[tuple[float, ...], AnyLength()], [-1], "-1 is not a number of at least 0"),
        (tuple[int, ...], "12", "'12' is not a non-empty list"),
        (Sequence[int], [], r"\[\] is not a non-empty list"),
        (Literal[1, 2], True, "True is not one of 1, 2"),
        (bool, 1, "1 is not true or false"),
        (str, 1, "1 is not text"),
    ],
)
def test_invalid_value_is_refused(kind, given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        convert(kind, given)
