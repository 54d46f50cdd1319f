import numpy as np
import pytest
import torch

from bids_dgmseg.networks.attention_unet import AttentionUNet25D
from bids_dgmseg.train.schemes import choose_some, majority_vote, split_fold, stratified_folds, transfer

SITES = {**{f"a{number}": "A" for number in range(10)}, **{f"b{number}": "B" for number in range(5)}}


def unet(classes):
    return AttentionUNet25D(1, classes, features=(2, 4, 8), scales=2)


def test_each_fold_has_each_sites_share():
    folds = stratified_folds(SITES, 5, seed=3)
    assert [sum(one[0] == "a" for one in fold) for fold in folds] == [2] * 5
    assert [sum(one[0] == "b" for one in fold) for fold in folds] == [1] * 5
    assert sorted(one for fold in folds for one in fold) == sorted(SITES)
    assert stratified_folds(SITES, 5, seed=3) == folds
    assert stratified_folds(SITES, 5, seed=4) != folds


def test_fewer_participants_than_folds_are_refused():
    with pytest.raises(ValueError, match="15 participants do not fill 16 folds"):
        stratified_folds(SITES, 16, seed=1)


def test_a_fold_watches_its_own_part_or_keeps_it_unseen():
    watched = split_fold(SITES, folds=5, fold=2, seed=3, validation=None)
    assert watched.validation == tuple(stratified_folds(SITES, 5, seed=3)[2])
    assert (len(watched.training), watched.test) == (12, ())
    unseen = split_fold(SITES, folds=5, fold=2, seed=3, validation=0.2)
    assert unseen.test == watched.validation
    assert (len(unseen.training), len(unseen.validation)) == (9, 3)  # 20 % of 12, rounded up
    assert set(unseen.training) | set(unseen.validation) | set(unseen.test) == set(SITES)


def test_without_folds_nobody_is_unseen_and_one_alone_is_learned_from():
    split = split_fold(SITES, folds=1, fold=0, seed=1, validation=None)
    assert (len(split.training), len(split.validation), split.test) == (12, 3, ())
    assert split_fold({"01": "A"}, folds=1, fold=0, seed=1, validation=None).training == ("01",)


def test_a_smaller_choice_is_part_of_a_larger_one():
    names = sorted(SITES)
    assert set(choose_some(names, 4, seed=2)) < set(choose_some(names, 9, seed=2)) < set(names)
    assert choose_some(names, None, seed=2) == names


def test_transfer_takes_all_but_the_output_layers_and_leaves_all_trainable():
    torch.manual_seed(0)
    source, target = unet(3), unet(4)
    before = target.state_dict()["heads.0.weight"].clone()
    kept = transfer(target, source.state_dict(), new_heads=True)
    assert kept == [f"heads.{scale}.{part}" for scale in (0, 1) for part in ("weight", "bias")]
    state = target.state_dict()
    assert torch.equal(state["heads.0.weight"], before)
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items() if name not in kept)
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_weights_of_another_network_or_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"first difference: heads\.0\.weight"):
        transfer(unet(4), unet(3).state_dict(), new_heads=False)
    with pytest.raises(ValueError, match=r"weights of another network \(first difference: image"):
        transfer(
            unet(4),
            {name: value for name, value in unet(4).state_dict().items() if "image" not in name},
            new_heads=True,
        )


def test_the_vote_goes_to_the_majority_and_ties_to_the_background():
    votes = [np.array(row, np.uint8) for row in ([1, 2, 0, 1], [1, 2, 2, 2], [0, 1, 1, 0])]
    assert majority_vote(votes).tolist() == [1, 2, 0, 0]
