import msgspec
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.core import Pace
from bids_dgmseg.lab.train.losses import AttentionUNetLoss, DCNNetLoss
from bids_dgmseg.lab.train.recipe import RECIPES, NnunetRecipe, choose_some, read_recipe, split_fold
from bids_dgmseg.models.model_folder import load_object
from bids_dgmseg.models.registry import MODELS, NETWORKS
from tests.lab.train.recipe_trainings import read

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
PAPERS = [name for name in NAMES if "-" not in name]


DCN, ZHAO, GUAN = (read(name) for name in ("dcnnet", "attunet25d", "deepqsmseg"))


def test_recipes_have_the_classes_of_their_models():
    for name in ("dcnnet", "attunet25d", "deepqsmseg"):
        recipe = read(name)
        assert tuple(recipe.classes) == MODELS[name].classes
        assert {label for kind in recipe.classes for label in recipe.structures(kind)} == set(MODELS[name].labels)


def test_defaults_are_the_papers_values():
    assert (DCN.sampling.size, DCN.sampling.step, DCN.sampling.margin) == ((32, 32, 32), (5, 5, 5), 5)
    assert DCN.pace == Pace(epochs=50, batch=8, learning_rate=1e-3, patience=20)
    assert DCN.loss == DCNNetLoss()
    assert (ZHAO.sampling.size, ZHAO.sampling.stack_axis, ZHAO.sampling.empty) == ((96, 3, 96), 1, 0.3)
    assert (ZHAO.augmentation.shift, ZHAO.augmentation.rotation_deg, ZHAO.augmentation.scale) == (15, 10, (0.8, 1.2))
    assert ZHAO.pace == Pace(epochs=300, batch=32, learning_rate=1e-4, patience=20)
    assert GUAN.sampling.size == (128, 128, 64)
    assert (GUAN.pace.epochs, GUAN.pace.milestones, GUAN.pace.patience) == (800, (30, 75, 300), None)
    dentate = read_recipe(MODELS["nnunet2step"])
    assert dentate == NnunetRecipe()
    assert (dentate.epochs * 50, dentate.folds) == (250_000, 5)
    assert {recipe.folds for recipe in (DCN, ZHAO, GUAN)} == {5}


@pytest.mark.parametrize(
    ("name", "thousands", "off"),
    [
        ("deepqsmseg", 26_701, 0.5),
        ("deepqsmseg-small", 3_757, 0.5),
        ("deepqsmseg-vnet", 65_178, 0.5),  # 125 f g weights per convolution, by hand
        ("dcnnet", 890, 1),  # Table I of Kim et al., thousands rounded or cut
        ("dcnnet-fc-densenet", 742, 1),
        ("dcnnet-unet", 5_605, 3),
        ("dcnnet-attention-unet", 5_862, 1),
        ("dcnnet-dilated-densenet", 158, 0.5),  # encoder of DCN-Net
    ],
)
def test_networks_have_the_size_of_the_papers(name, thousands, off):
    recipe, model = read(name), MODELS[name.partition("-")[0]]
    network = load_object(recipe.network or model.network)(1, len(recipe.classes) + 1, **recipe.arch_of(model))
    assert sum(weights.numel() for weights in network.parameters()) / 1000 == pytest.approx(thousands, abs=off)


def test_recipe_files_change_single_values():
    source = read("attunet25d-source")
    assert source.structures("SN") == ("SN_L", "SN_R", "STN_L", "STN_R")
    assert (source.sampling.size, source.sampling.stack_axis, source.sampling.empty) == ((128, 128, 3), 2, 0.3)
    assert source.loss == AttentionUNetLoss(class_weights=(0.8, 0.2), scale_weights=(0.6, 0.2, 0.1))
    assert source.pace == ZHAO.pace
    assert read("dcnnet-step9") == msgspec.structs.replace(
        DCN, sampling=msgspec.structs.replace(DCN.sampling, step=(9, 9, 9))
    )
    without = read("dcnnet-no-overlap").loss
    assert isinstance(without, DCNNetLoss)
    assert (without.overlap, without.attention) == (0.0, 0.5)
    assert read("dcnnet-unet").arch_of(MODELS["dcnnet"]) == {}  # the registry's belong to another network


def test_shipped_recipes_name_existing_networks():
    assert all(callable(load_object(name)) for name in NETWORKS)
    used = {model.network for model in MODELS.values()}
    used |= {read(name).network for name in NAMES if not name.startswith("nnunet2step")}
    assert used - {""} == set(NETWORKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pace.batch = 0", "Expected int >= 1 - at pace.batch"),
        ("pace.speed = 3", "Object contains unknown field speed - at pace"),
        ("loss.heads = [1.0]", "loss.heads has 1 values for 2 classes"),
        ("network = 'os:system'", "network os:system is not one of bids_dgmseg.networks.attention_unet"),
        ("pace", "not a TOML file"),
    ],
)
def test_invalid_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=r"^`recipe` mine\.toml: ") as error:
        read_recipe(MODELS["dcnnet"], tmp_path / "mine.toml")
    assert message in str(error.value)


def test_missing_recipe_lists_those_of_the_model():
    with pytest.raises(InputError, match="`recipe` fast: no such file; pass a TOML file, or one of attunet25d-no-gat"):
        read_recipe(MODELS["attunet25d"], "fast")
    with pytest.raises(InputError, match=r"^dgm16: no training recipe; choose from attunet25d, dcnnet, deepqsmseg"):
        read_recipe(MODELS["dgm16"])


SITES = {**{f"a{number}": "A" for number in range(10)}, **{f"b{number}": "B" for number in range(5)}}


def split(fold, *, sites=SITES, folds=5, seed=3, validation):
    recipe = msgspec.structs.replace(NnunetRecipe(folds=folds, split_seed=seed), validation=validation)
    return split_fold(sites, recipe, fold)


def test_folds_are_stratified_by_site():
    folds = [split(fold, validation=0).test for fold in range(5)]
    assert [sum(name[0] == "a" for name in fold) for fold in folds] == [2] * 5
    assert [sum(name[0] == "b" for name in fold) for fold in folds] == [1] * 5
    assert sorted(name for fold in folds for name in fold) == sorted(SITES)
    assert [split(fold, validation=0).test for fold in range(5)] == folds
    assert [split(fold, validation=0, seed=4).test for fold in range(5)] != folds


def test_own_part_validates_or_tests():
    validating = split(2, validation=None)
    assert (len(validating.training), len(validating.validation), validating.test) == (12, 3, ())
    testing = split(2, validation=0.2)
    assert testing.test == validating.validation
    assert (len(testing.training), len(testing.validation)) == (9, 3)  # 20 % of 12, rounded up
    assert set(testing.training) | set(testing.validation) | set(testing.test) == set(SITES)
    unvalidated = split(2, validation=0)
    assert (unvalidated.training, unvalidated.validation) == (validating.training, ())
    assert unvalidated.test == validating.validation


def test_one_fold_has_no_test_set():
    whole = split(0, folds=1, validation=None)
    assert (len(whole.training), len(whole.validation), whole.test) == (12, 3, ())
    assert len(split(0, folds=1, validation=0).training) == 15
    assert split(0, sites={"01": "A"}, folds=1, validation=None).training == ("01",)


@pytest.mark.parametrize(("share", "count"), [(0.1, 5), (0.2, 10), (0.45, 23)])
def test_share_for_validation_is_that_of_the_participants(share, count):
    sites = {f"{number:02d}": "AB"[number % 2] for number in range(50)}
    chosen = split(0, sites=sites, folds=1, validation=share).validation
    assert len(chosen) == count
    assert abs(sum(sites[name] == "A" for name in chosen) - count / 2) <= 1


def test_smaller_choice_is_part_of_larger():
    names = sorted(SITES)
    assert set(choose_some(names, 4, seed=2)) < set(choose_some(names, 9, seed=2)) < set(names)
    assert choose_some(names, None, seed=2) == names
