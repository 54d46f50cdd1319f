"""Folds: participants of each site in proportion."""

import msgspec
import pytest

from bids_dgmseg.lab.train.recipe import NnunetRecipe
from bids_dgmseg.lab.train.splits import choose_some, split_fold

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
