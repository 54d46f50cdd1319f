from functools import cache

import numpy as np
import pytest

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import REFERENCE_COLUMNS, STATS_COLUMNS
from bids_dgmseg.measurement.map_quality import MAP_QUALITY
from bids_dgmseg.measurement.scan import Reference, ScanMeasures, SegmentedScan, measure_scan
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.conftest import make_grid

BOX = Box((-50, -90, -60), (50, 45, 40))
CSF = Reference("csf", "mask", 0.012, 0.001, 500)


@cache
def upright() -> tuple[Volume, Volume]:
    return PHANTOM.scan(make_grid("RAS"), seed=3)


def find(
    chi: Volume,
    dseg: Volume,
    *,
    reference: Reference | None = None,
    map_reference: str = "not stated",
) -> ScanMeasures:
    """Measure the phantom with probabilities of 0 or 1."""
    probseg = np.stack([dseg.array == structure.index for structure in STRUCTURES]).astype(np.float32)
    x, y, z = (slice(0, size) for size in chi.shape)
    scan = SegmentedScan(chi, dseg, probseg, (x, y, z), STRUCTURES, labelled=())
    return measure_scan(scan, box=BOX, reference=reference, map_reference=map_reference)


def test_good_scan_has_all_columns_and_is_green():
    found = find(*upright(), reference=CSF)
    assert list(found.stats.columns) == list(STATS_COLUMNS)
    assert found.stats["rating"].tolist() == ["green"] * 16, found.stats["reasons"].tolist()
    assert (found.rating, found.reasons) == ("green", ())
    assert list(found.quality) == [*MAP_QUALITY, "box_margin_mm", "red_nuclei_fraction"]


def test_no_reference_no_referenced_columns():
    assert list(find(*upright()).stats.columns) == [name for name in STATS_COLUMNS if name not in REFERENCE_COLUMNS]


def test_asymmetry_is_in_both_rows():
    stats = find(*upright()).stats.set_index("abbreviation")
    left, right = stats["mean_ppm"].astype(float)[["DN_L", "DN_R"]].tolist()
    # The phantom's dentates have 0.116 and 0.108 ppm: 0.008 / 0.112; partial volume at the edges reduces both.
    there, here = stats["mean_ppm_asymmetry"].astype(float)[["DN_L", "DN_R"]].tolist()
    assert there == pytest.approx(2 * (left - right) / (left + right))
    assert there == pytest.approx(0.008 / 0.112, abs=0.03)
    assert there == here


def test_missing_nucleus_is_red_without_values():
    chi, dseg = upright()
    gone = dseg.with_array(np.where(dseg.array == STRUCTURES.named("STN_R").index, 0, dseg.array))
    found = find(chi, gone, reference=CSF)
    row = found.stats.set_index("abbreviation").loc["STN_R"]
    assert found.warnings == ("STN_R was not found; its values are n/a",)
    assert row["rating"] == "red"
    assert str(row["reasons"]).startswith("not found")
    assert row.drop(["index", "name", "hemisphere", "rating", "reasons"]).isna().all()
    assert found.quality["red_nuclei_fraction"] == 1 / 16
    assert found.rating == "amber"  # a red nucleus shows in the rating of the scan
    assert found.stats.set_index("abbreviation").loc["STN_L", "rating"] == "green"  # there is no asymmetry


@pytest.mark.parametrize(
    ("reference", "map_reference", "shift"),
    [
        pytest.param(CSF, "whole brain", 0.012, id="referenced to CSF here"),
        pytest.param(None, "CSF", 0.0, id="map referenced to CSF"),
        pytest.param(None, "not stated", 0.0, id="unknown: compared"),
        pytest.param(None, "whole brain", None, id="known to differ"),
        pytest.param(Reference("CN", "", 0.045, 0.001, 500), "white matter", None, id="referenced to another region"),
    ],
)
def test_z_scores_need_the_same_reference(reference, map_reference, shift):
    row = find(*upright(), reference=reference, map_reference=map_reference).stats.set_index("abbreviation").loc["RN_L"]
    # norms.tsv: RN 0.082 ± 0.036 ppm, CSF-referenced.
    expected = np.nan if shift is None else (row["mean_ppm"] - shift - 0.082) / 0.036
    assert row["mean_ppm_z"] == pytest.approx(expected, nan_ok=True)
