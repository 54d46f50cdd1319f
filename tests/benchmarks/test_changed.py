"""The benchmark of maps that were changed on purpose, as far as it goes without a model."""

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nibabel.affines import apply_affine

from bids_dgmseg.image.volume import Volume

FOLDER = Path(__file__).parents[2] / "benchmarks"
AFFINE = np.array([[1.5, 0, 0, -20], [0, 1.5, 0, -30], [0, 0, 3, -10], [0, 0, 0, 1.0]])


@pytest.fixture
def changed(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("changed")


@pytest.fixture
def spot():
    """A bright ball about (10, 0, 14) mm in a map that is 0 at its faces."""
    places = apply_affine(AFFINE, np.moveaxis(np.indices((36, 40, 16)), 0, -1))
    distance = np.linalg.norm(places - (10, 0, 14), axis=-1)
    return Volume(np.exp(-((distance / 6) ** 2)).astype(np.float32), AFFINE)


def centre_mm(volume):
    weights = volume.array / volume.array.sum()
    return apply_affine(volume.affine, [(weights * place).sum() for place in np.indices(volume.shape)])


@pytest.mark.parametrize("turn_deg", [(0, 0, 0), (20, 0, 0), (0, 15, 0), (20, -20, 20)])
def test_on_another_grid_everything_stays_where_it_is(changed, spot, turn_deg):
    other = changed.regrid(spot, (1.0, 1.0, 1.0), turn_deg)
    np.testing.assert_allclose(centre_mm(other), (10, 0, 14), atol=0.1)
    np.testing.assert_allclose(other.array.sum() * 1.0, spot.array.sum() * 1.5 * 1.5 * 3, rtol=0.02)
    edges = np.linalg.norm(other.affine[:3, :3], axis=0)
    np.testing.assert_allclose(edges, 1)


def test_a_cut_map_keeps_its_places(changed, spot):
    kept = np.zeros((1, 1, 16), bool)
    kept[..., 5:12] = True
    shorter = changed.cut(spot, kept)
    assert shorter.shape == (36, 40, 7)
    np.testing.assert_allclose(shorter.affine[:3, 3], (-20, -30, 5))


def test_labels_come_back_from_a_turned_grid_of_small_voxels(changed, spot):
    labels = spot.with_array((spot.array > 0.5).astype(np.uint8))
    turned = changed.regrid(labels.with_array(labels.array.astype(np.float32)), (0.5, 0.5, 0.5), (20, -20, 20))
    back = changed.carry_back(turned.with_array((turned.array > 0.5).astype(np.uint8)), labels)
    both = np.count_nonzero(back.array & labels.array)
    assert 2 * both / (back.array.sum() + labels.array.sum()) > 0.97


def test_every_change_has_a_row_and_missed_nuclei_are_counted(changed, spot):
    names = [name for name, _ in changed.changes(spot, spot.with_array((spot.array > 0.5).astype(np.uint8)))]
    assert len(names) == len(set(names)) == 17
    scores = pd.DataFrame(
        {"abbreviation": ["RN_L", "RN_R"] * 2, "dice": [0.8, 0.6, 0.5, 0.0], "change": ["as it is"] * 2 + ["cut"] * 2}
    )
    assert changed.as_markdown(scores).splitlines()[2:] == [
        "| as it is | 0.700 | 0.700 | 0 |",
        "| cut | 0.250 | 0.250 | 1 |",
    ]
