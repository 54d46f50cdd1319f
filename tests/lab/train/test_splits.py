from collections import Counter

import pytest

from bids_dgmseg.lab.train.splits import choose_some, split_by_site, split_fold, stratified_folds

SITES = {**{f"a{number}": "A" for number in range(10)}, **{f"b{number}": "B" for number in range(5)}}


def test_folds_are_stratified_by_site():
    folds = stratified_folds(SITES, 5, seed=3)
    assert [sum(one[0] == "a" for one in fold) for fold in folds] == [2] * 5
    assert [sum(one[0] == "b" for one in fold) for fold in folds] == [1] * 5
    assert sorted(one for fold in folds for one in fold) == sorted(SITES)
    assert stratified_folds(SITES, 5, seed=3) == folds
    assert stratified_folds(SITES, 5, seed=4) != folds


def test_more_folds_than_participants_are_refused():
    with pytest.raises(ValueError, match="15 participants are too few for 16 folds"):
        stratified_folds(SITES, 16, seed=1)


def test_own_part_validates_or_tests():
    validating = split_fold(SITES, folds=5, fold=2, seed=3, validation=None)
    assert validating.validation == tuple(stratified_folds(SITES, 5, seed=3)[2])
    assert (len(validating.training), validating.test) == (12, ())
    testing = split_fold(SITES, folds=5, fold=2, seed=3, validation=0.2)
    assert testing.test == validating.validation
    assert (len(testing.training), len(testing.validation)) == (9, 3)  # 20 % of 12, rounded up
    assert set(testing.training) | set(testing.validation) | set(testing.test) == set(SITES)
    unvalidated = split_fold(SITES, folds=5, fold=2, seed=3, validation=0)
    assert (unvalidated.training, unvalidated.validation) == (validating.training, ())
    assert unvalidated.test == validating.validation


def test_one_fold_has_no_test_set():
    split = split_fold(SITES, folds=1, fold=0, seed=1, validation=None)
    assert (len(split.training), len(split.validation), split.test) == (12, 3, ())
    assert len(split_fold(SITES, folds=1, fold=0, seed=1, validation=0).training) == 15
    assert split_fold({"01": "A"}, folds=1, fold=0, seed=1, validation=None).training == ("01",)


@pytest.mark.parametrize(("share", "count"), [(0.1, 5), (0.2, 10), (0.3, 15), (0.4, 20), (0.45, 23)])
def test_share_for_validation_is_that_of_the_participants(share, count):
    sites = {f"{number:02d}": "AB"[number % 2] for number in range(50)}
    chosen = split_fold(sites, folds=1, fold=0, seed=1, validation=share).validation
    assert len(chosen) == count
    assert abs(sum(sites[one] == "A" for one in chosen) - count / 2) <= 1


def test_smaller_choice_is_part_of_larger():
    names = sorted(SITES)
    assert set(choose_some(names, 4, seed=2)) < set(choose_some(names, 9, seed=2)) < set(names)
    assert choose_some(names, None, seed=2) == names


def test_each_site_is_split_in_proportion():
    sites = {f"{site}{number}": site for site, count in (("A", 20), ("B", 10)) for number in range(count)}
    parts = split_by_site(sites, seed=1)
    for site, expected in (("A", {"train": 14, "tune": 2, "test": 4}), ("B", {"train": 7, "tune": 1, "test": 2})):
        assert Counter(parts[name] for name in sites if sites[name] == site) == expected
    assert split_by_site(sites, seed=1) == parts
    assert split_by_site(sites, seed=2) != parts


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
def test_no_part_is_empty_from_three_participants(count):
    assert set(split_by_site({str(number): "n/a" for number in range(count)}, seed=1).values()) == {
        "train",
        "tune",
        "test",
    }


def test_others_are_split_if_the_test_set_is_named():
    sites = {f"{number:02}": "A" for number in range(18)}
    parts = split_by_site(sites, seed=1, test=["03", "11"])
    assert [name for name in sites if parts[name] == "test"] == ["03", "11"]
    assert Counter(parts.values()) == {"train": 14, "tune": 2, "test": 2}  # 7 to 1 of sixteen


def test_each_site_validates_if_the_test_set_is_named():
    sites = {f"{site}{number}": site for site in "ABC" for number in range(16)}
    parts = split_by_site(sites, seed=1, test=["A0", "B0"])
    # an eighth of 15, 15 and 16 participants, wherever the remainders of the sites fall
    tuned = Counter(sites[name] for name, part in parts.items() if part == "tune")
    assert set(tuned) == set("ABC")
    assert sorted(tuned.values()) == [2, 2, 2]


def test_the_only_participant_beside_the_test_set_is_for_training():
    assert split_by_site({"a": "n/a", "b": "n/a"}, seed=1, test=["a"]) == {"a": "test", "b": "train"}


def test_two_participants_give_a_training_set():
    assert "train" in split_by_site({"a": "n/a", "b": "n/a"}, seed=1).values()
