from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.train.labelled_maps import (
    choose_some,
    majority_vote,
    read_labelled_maps,
    split_by_site,
    split_fold,
    stratified_folds,
)
from tests.conftest import start_dataset, write_map

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


def test_two_participants_give_a_training_set():
    assert "train" in split_by_site({"a": "n/a", "b": "n/a"}, seed=1).values()


def test_majority_vote_prefers_background_in_ties():
    votes = [np.array(row, np.uint8) for row in ([1, 2, 0, 1], [1, 2, 2, 2], [0, 1, 1, 0])]
    assert majority_vote(votes).tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("of_both", ["RN", "red nucleus"])
@pytest.mark.parametrize("angles_deg", [(0, 0, 0), (10, -8, 15)], ids=["upright", "rotated"])
def test_one_label_of_both_sides_is_divided_at_the_midplane(of_both, angles_deg, tmp_path):
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("zyx", angles_deg, degrees=True).as_matrix()  # yaw, roll, pitch
    grid = world_grid(Box((-75, -110, -80), (75, 74, 80)), (2.5, 2.5, 2.5))
    truth = PHANTOM.dseg(grid).array
    names = {one.index: one.nucleus if one.nucleus == "RN" else one.abbreviation for one in STRUCTURES}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()), 1)}
    start_dataset(tmp_path)
    chi = write_map(tmp_path, "sub-1", Volume(PHANTOM.chi(grid, seed=1).array, turn @ grid.affine))
    labels = np.array([0, *(numbers[names[number]] for number in sorted(names))], np.uint8)[truth]
    nib.Nifti1Image(labels, turn @ grid.affine).to_filename(str(chi).replace("Chimap", "dseg"))
    rows = [f"{number}\t{of_both if name == 'RN' else name}" for name, number in numbers.items()]
    (tmp_path / "dseg.tsv").write_text("\n".join(["index\tabbreviation", *rows]) + "\n", encoding="utf-8")
    said: list[str] = []
    model = get_model("attunet25d")
    (read,) = read_labelled_maps(tmp_path, model, warn=said.append)
    expected = np.zeros(truth.shape, np.uint8)
    for channel, structure in enumerate(model.structures, 1):
        expected[truth == structure.index] = channel
    np.testing.assert_array_equal(read.labels.array, expected)
    assert "dseg.tsv: RN of both sides; divided at the midplane of the head" in said
