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


def test_of_two_halves_the_upper_one_names_a_voxel_so_that_nuclei_keep_their_volume(conditions):
    labels = np.zeros((1, 1, 12), np.uint8)
    labels[..., 3:8] = 4  # five slices, the first the upper half of a voxel, the last whole
    labels[..., 10] = 2  # one slice, a lower half
    thick = conditions.Condition("", None, slice_factor=2)
    assert thick.thicken(labels.astype(np.float32), labels)[1].tolist() == [[[0, 4, 4, 4, 0, 0]]]


def test_only_the_middle_of_all_settings_and_people_as_trained_are_drawn_often(conditions):
    many = {condition.name for condition in conditions.conditions() if condition.many}
    assert many == {"mid-range, 1 mm", "people as trained"}
    values = next(iter(conditions.conditions())).view.values
    assert values.age_years == (45.0, 45.0)  # of 10 to 80
    assert values.mixture == 0
