"""The ratings on the phantom: green where all is well, and why not where something is wrong."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.image.masks import is_measured
from bids_dgmseg.image.resample import Grid
from bids_dgmseg.measurement.asymmetry import measure_asymmetry
from bids_dgmseg.measurement.confidence import measure_quality
from bids_dgmseg.measurement.field_of_view import View
from bids_dgmseg.measurement.map_quality import measure_scan
from bids_dgmseg.measurement.norms import compare_with_norms
from bids_dgmseg.measurement.nuclei import measure_regions
from bids_dgmseg.measurement.rating import rate_nuclei, rate_scan
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.conftest import make_grid

Triple = tuple[float, float, float]


def describe(chi: np.ndarray, dseg: np.ndarray, size_mm: Triple, view: View) -> pd.DataFrame:
    """All measures that the rules read, from labels that are certain."""
    probseg = np.stack([dseg == structure.index for structure in STRUCTURES]).astype(np.float32)
    stats = measure_regions(chi, dseg, probseg, structures=STRUCTURES, voxel_size_mm=size_mm)
    table = measure_quality(chi, dseg, probseg, structures=STRUCTURES, voxel_size_mm=size_mm, view=view)
    table = table.merge(compare_with_norms(stats), on=["index", "abbreviation"])
    table["nucleus"] = table["abbreviation"].str.split("_").str[0]
    return table.merge(measure_asymmetry(stats), on="nucleus")


def size_of(grid: Grid) -> Triple:
    x, y, z = np.linalg.norm(grid.affine[:3, :3], axis=0).tolist()
    return x, y, z


@cache
def upright() -> tuple[np.ndarray, np.ndarray]:
    """Map with noise and labels at 2 mm."""
    chi, dseg = PHANTOM.scan(make_grid("RAS"), seed=3)
    return chi.array, dseg.array


def ratings_of(chi: np.ndarray, dseg: np.ndarray) -> pd.DataFrame:
    size_mm = size_of(make_grid("RAS"))
    table = describe(chi, dseg, size_mm, View.of(is_measured(chi), voxel_size_mm=size_mm))
    return rate_nuclei(table).set_index("abbreviation")


def test_every_nucleus_is_green_however_the_head_is_stored(grid):
    chi, dseg = PHANTOM.chi(grid).array, PHANTOM.dseg(grid).array
    view = View.of(is_measured(chi), voxel_size_mm=size_of(grid))
    table = describe(chi, dseg, size_of(grid), view)
    ratings = rate_nuclei(table)
    assert ratings["rating"].tolist() == ["green"] * 16, ratings["reasons"].tolist()
    # Nuclei are 0.03 ppm (white matter) to 0.1 ppm brighter than what is around; the nearest, DN, lies 18 mm deep.
    assert table["rim_contrast_ppm"].between(0.03, 0.2).all()
    assert table["edge_distance_mm"].min() > 15


def test_a_good_map_is_green():
    chi, _ = upright()
    view = View.of(is_measured(chi), voxel_size_mm=(2.0, 2.0, 2.0))
    found = measure_scan(chi, view=view, voxel_size_mm=(2.0, 2.0, 2.0))
    assert rate_scan(found, ["green"] * 16) == ("green", ())
    assert found["noise_sd_ppm"] == pytest.approx(0.005, rel=0.2)  # edges add a little


def test_parts_per_billion_taken_for_ppm_are_red():
    chi, dseg = upright()
    assert (ratings_of(1000 * chi, dseg)["rating"] == "red").all()


def test_an_inverted_map_is_red():
    chi, dseg = upright()
    found = ratings_of(-chi, dseg)
    assert (found["rating"] == "red").all()
    assert found["reasons"].str.contains("hardly brighter").all()


def test_labels_on_another_place_are_not_green():
    chi, dseg = upright()
    found = ratings_of(chi, np.roll(dseg, 10, axis=1))  # 20 mm towards the front
    assert (found["rating"] != "green").mean() > 0.5


def test_a_cut_field_of_view_is_red_where_it_cuts():
    chi, dseg = upright()
    first = int(np.argwhere(dseg == STRUCTURES.named("DN_L").index)[:, 2].min()) + 2
    empty = chi.copy()
    empty[:, :, :first] = 0
    labels = np.where(empty != 0, dseg, 0)
    found = ratings_of(empty, labels)
    assert found.loc["DN_L", "rating"] == "red"
    assert "end of what was measured" in str(found.loc["DN_L", "reasons"])
    assert found.loc["GP_L", "rating"] == "green"


def test_a_lost_side_is_red_and_the_other_side_too():
    chi, dseg = upright()
    found = ratings_of(chi, np.where(dseg == STRUCTURES.named("RN_R").index, 0, dseg))
    assert str(found.loc["RN_R", "reasons"]).startswith("not found")
    assert found.loc[["RN_L", "RN_R"], "rating"].tolist() == ["red", "red"]
