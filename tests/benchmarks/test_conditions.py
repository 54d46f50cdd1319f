"""The kinds of simulated maps on which the benchmark of accuracy tries a model."""

import importlib
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def conditions(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("conditions")


def test_thick_slices_are_means_and_have_the_label_of_most_of_them(conditions):
    thick = conditions.Condition("", None, slice_factor=3)
    chi, labels = thick.thicken(np.array([[[1.0, 2, 6, 3, 3, 3, 9]]], np.float32), np.array([[[0, 2, 2, 1, 0, 0, 5]]]))
    assert chi.tolist() == [[[3.0, 3.0]]]  # the seventh slice is not a whole one
    assert labels.tolist() == [[[2, 0]]]


def test_a_thick_voxel_of_three_labels_has_the_middle_one_so_that_labels_do_not_move_along_the_slices(conditions):
    thick = conditions.Condition("", None, slice_factor=3)
    labels = np.array([[[4, 2, 0, 0, 2, 4]]], np.uint8)
    assert thick.thicken(labels.astype(np.float32), labels)[1].tolist() == [[[2, 2]]]
    assert all(condition.slice_factor % 2 for condition in conditions.conditions())


def test_only_the_middle_of_all_settings_and_people_as_trained_are_drawn_often(conditions):
    many = {condition.name for condition in conditions.conditions() if condition.many}
    assert many == {"mid-range, 1 mm", "people as trained"}
    values = next(iter(conditions.conditions())).view.values
    assert values.age_years == (45.0, 45.0)  # of 10 to 80
    assert values.mixture == 0
