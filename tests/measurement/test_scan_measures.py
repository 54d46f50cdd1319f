from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.map_quality import MAP_QUALITY
from bids_dgmseg.measurement.nuclei import (
    EXCLUSION_COLUMNS,
    PROOF_COLUMNS,
    R2STAR_COLUMNS,
    REFERENCE_COLUMNS,
    SESSION_COLUMNS,
    STATS_COLUMNS,
    UNCERTAINTY_COLUMNS,
    measure_nuclei,
)
from bids_dgmseg.measurement.scan_measures import ScanMeasures, measure_scan
from bids_dgmseg.measurement.segmented_scan import (
    Reference,
    SegmentedScan,
    add_referenced_columns,
    erode_ventricles,
    find_reference,
    measure_reference,
)
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES, Structure, with_pairs, with_wholes
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import make_grid

CSF = Reference("csf", "mask", 0.012, 0.001, 500)


@cache
def baseline() -> ScanMeasures:
    return find(*upright(), reference=CSF)


@cache
def upright() -> tuple[Volume, Volume]:
    return PHANTOM.scan(make_grid("RAS"), seed=3)


def certain(chi: Volume, dseg: Volume, structures: Sequence[Structure], **more: Any) -> SegmentedScan:
    """Return a scan with probabilities of 0 or 1."""
    probseg = np.stack([dseg.array == structure.index for structure in structures]).astype(np.float32)
    x, y, z = (slice(0, size) for size in chi.shape)
    return SegmentedScan(
        chi=chi, dseg=dseg, probseg=probseg, block=(x, y, z), structures=structures, labelled=(), **more
    )


def find(
    chi: Volume, dseg: Volume, *, r2star: Any = None, lesions: Any = None, bilateral: bool = False, **options: Any
) -> ScanMeasures:
    """Measure the phantom."""
    scan = certain(chi, dseg, STRUCTURES, r2star_per_s=r2star, lesions=lesions)
    rows = with_pairs(STRUCTURES) if bilateral else STRUCTURES
    return measure_scan(scan, rows, **options)


def test_good_scan_has_all_columns_and_green_nuclei():
    result = find(*upright(), reference=CSF, r2star=np.full(upright()[0].shape, 30, np.float32))
    absent = {"edited", "automatic_dice", *EXCLUSION_COLUMNS, *PROOF_COLUMNS, *SESSION_COLUMNS, *UNCERTAINTY_COLUMNS}
    absent |= {"mean_paramagnetic_ppm", "mean_diamagnetic_ppm"}  # of a reconstruction
    assert list(result.stats.columns) == [name for name in STATS_COLUMNS if name not in absent]
    assert result.stats["r2star_mean_per_s"].tolist() == [30.0] * 16
    assert result.stats["rating"].tolist() == ["green"] * 16, result.stats["reasons"].tolist()
    assert result.rating == "amber"  # its voxels have edges of 2 mm
    assert [reason.partition(" (")[0] for reason in result.reasons] == ["partial volume of large voxels"]
    fractions = [f"{kind}_nuclei_fraction" for kind in ("atypical", "flagged", "red")]
    assert list(result.quality) == [
        *MAP_QUALITY,
        *("head_size", "slice_scale", "longest_edge_mm", "shortest_edge_mm"),
        *fractions,
        "n_blobs",
    ]
    assert result.quality["noise_sd_ppm"] == pytest.approx(0.005, rel=0.2)  # edges add a little
    absent |= {*REFERENCE_COLUMNS, *R2STAR_COLUMNS}
    without_csf = find(*upright()).stats
    assert list(without_csf) == [name for name in STATS_COLUMNS if name not in absent]


@pytest.mark.parametrize(("is_noise", "failed_checks"), [(False, 0), (False, 1), (True, 0)])
def test_header_is_blamed_only_for_plausible_nuclei(is_noise, failed_checks):
    chi, dseg = upright()
    noise = np.random.default_rng(1).normal(0, 0.1, chi.shape).astype(np.float32)
    swapped = np.where((dseg.array == 1) | (dseg.array == 2), 3 - dseg.array, dseg.array)  # 1 DN_L, 2 DN_R
    shown = chi.with_array(noise) if is_noise else chi
    measures = find(shown, dseg.with_array(swapped), facts={"failed_checks": failed_checks})
    (warning,) = [warning for warning in measures.warnings if "DN_L lies to the right of DN_R" in warning]
    assert ("check the map's header" in warning) == (not is_noise and not failed_checks)


def test_missing_nucleus_is_red_without_values():
    chi, dseg = upright()
    gone = dseg.with_array(np.where(dseg.array == STRUCTURES.named("STN_R").index, 0, dseg.array))
    measures = find(chi, gone, reference=CSF, bilateral=True)
    stats = measures.stats.set_index("abbreviation")
    assert measures.warnings == ("STN_R was not found; its values are n/a",)
    for name, reason in (("STN_R", "not found"), ("STN", "STN_R: not found")):
        assert stats.loc[name, "rating"] == "red"
        assert str(stats.loc[name, "reasons"]).startswith(reason)
        assert stats.loc[name].drop(["index", "name", "hemisphere", "rating", "reasons"]).isna().all()
    assert measures.rating == "amber"  # a red nucleus shows in the rating of the scan
    assert stats.loc["STN_L", "rating"] == "green"  # there is no asymmetry


def test_both_sides_are_measured_together():
    chi, dseg = upright()
    alone, result = baseline(), find(chi, dseg, reference=CSF, bilateral=True)
    stats = result.stats.set_index("abbreviation")
    assert stats.index[:6].tolist() == ["DN_L", "DN_R", "DN", "IN_L", "IN_R", "IN"]
    single = result.stats[result.stats["hemisphere"].notna()].reset_index(drop=True)
    pd.testing.assert_frame_equal(single, alone.stats, check_dtype=False)
    assert (result.quality, result.rating, result.warnings) == (alone.quality, alone.rating, alone.warnings)
    row, voxel_mm3 = stats.loc["RN"], float(np.prod(chi.voxel_size_mm))
    labels = [structure.index for structure in STRUCTURES.both_sides(["RN"])]
    values = chi.array[np.isin(dseg.array, labels)].astype(float)
    assert (row["name"], row["n_voxels"]) == ("red nucleus", len(values))
    assert row["volume_mm3"] == row["volume_pv_mm3"] == pytest.approx(len(values) * voxel_mm3)
    expected = [values.mean(), np.median(values), values.std(ddof=1), values.sum() * voxel_mm3]
    assert list(row[["mean_ppm", "median_ppm", "std_ppm", "mass_ppm_mm3"]]) == pytest.approx(expected)
    assert row["mean_ref_ppm"] == pytest.approx(values.mean() - CSF.mean_ppm)
    assert row["n_components"] == 2
    assert row["high_iron_threshold_ppm"] == pytest.approx(values.mean() + values.std(ddof=1))
    assert row[["index", "hemisphere", "volume_asymmetry", "mean_ppm_asymmetry", "volume_z", "mean_ppm_z"]].isna().all()


def test_parts_are_followed_by_the_whole_nucleus():
    chi, dseg = upright()
    structures = [nucleus for nucleus in get_model("dgm24").structures if nucleus.nucleus not in ("NAC", "THA")]
    halves = dseg.array.copy()
    for whole, first, second in (("GP", "GPe", "GPi"), ("SN", "SNr", "SNc")):
        for side in "LR":
            names = (f"{name}_{side}" for name in (whole, first, second))
            number, nucleus, other = (STRUCTURES.named(name).index for name in names)
            x, y, z = np.nonzero(dseg.array == number)
            halves[x, y, z] = np.where(y < np.median(y), nucleus, other)
    scan = certain(chi, dseg.with_array(halves), structures)
    result = measure_scan(scan, with_wholes(structures), reference=CSF).stats
    assert result["abbreviation"].tolist()[-4:] == ["SN_L", "SN_R", "GP_L", "GP_R"]
    assert result["index"].isna().tolist() == [False] * 20 + [True] * 4
    wholes = baseline().stats  # that of the labels before they were divided
    expected = wholes[wholes["abbreviation"].isin(result["abbreviation"][-4:])]
    columns = [name for name in wholes if name not in ("index", "rating", "reasons")]
    pd.testing.assert_frame_equal(
        result[columns].tail(4).reset_index(drop=True), expected[columns].reset_index(drop=True), check_dtype=False
    )
    part = result.set_index("abbreviation").loc[["GPe_L", "GPi_L", "GP_L"], "volume_mm3"]
    assert part["GPe_L"] + part["GPi_L"] == pytest.approx(part["GP_L"])


def test_nucleus_without_one_of_its_parts_is_red():
    """Of three voxels of GPe_L and none of GPi_L, GP_L has three; GP_R has five of each."""
    numbers = {"GPe_L": 3, "GPi_L": 0, "GPe_R": 5, "GPi_R": 5, "CN_L": 4}
    structures = [STRUCTURES.named(name) for name in numbers]
    chi, dseg = np.full((12, 12, 12), 0.1, np.float32), np.zeros((12, 12, 12), np.uint8)
    for place, nucleus in enumerate(structures):
        dseg[2 + 2 * place, 5, 2 : 2 + numbers[nucleus.abbreviation]] = nucleus.index
    scan = certain(Volume(chi, np.eye(4)), Volume(dseg, np.eye(4)), structures)
    table = measure_scan(scan, with_pairs(with_wholes(structures))).stats.set_index("abbreviation")
    assert table["volume_mm3"].reindex(["GP_L", "GP_R"]).tolist() == [3, 10]
    reason = "GPi_L not found, so that these are values of the rest"
    assert table.at["GP_L", "rating"] == "red"
    first = table["reasons"].astype(str).str.split("; ").str[0]
    assert first[["GP_L", "GP"]].tolist() == [reason, f"GP_L: {reason}"]
    assert not str(table.at["GP_R", "reasons"]).startswith("GP")


def test_missing_voxels_are_excluded_and_rated():
    chi, dseg = upright()
    putamen = dseg.array == STRUCTURES.named("PUT_R").index
    level = int(np.median(np.argwhere(putamen)[:, 2]))
    holes = chi.array.copy()
    holes[:, :, level] = np.nan
    result = find(chi.with_array(holes), dseg)
    row = result.stats.set_index("abbreviation").loc["PUT_R"]
    assert row["n_voxels"] - row["n_valid"] == putamen[:, :, level].sum()
    rest = putamen.copy()
    rest[:, :, level] = False
    assert row["mean_ppm"] == pytest.approx(chi.array[rest].mean(), rel=1e-5)
    assert row["rating"] == "amber"
    assert "voxels without data" in row["reasons"]
    (warning,) = (each for each in result.warnings if "missing data" in each)
    assert f"PUT_R {1 - row['n_valid'] / row['n_voxels']:.0%}" in warning


def test_z_scores_need_the_same_reference():
    referenced, other = baseline().stats.iloc[4], find(*upright(), map_reference="whole brain").stats.iloc[4]
    assert referenced["abbreviation"] == "RN_L"
    # norms.tsv: RN 0.082 ± 0.036 ppm, CSF-referenced.
    assert referenced["mean_ppm_z"] == pytest.approx((referenced["mean_ppm"] - CSF.mean_ppm - 0.082) / 0.036)
    assert np.isnan(other["mean_ppm_z"])


def test_oblique_phantom_is_green():
    """Nuclei are 0.03 ppm (white matter) to 0.1 ppm brighter than their surroundings; DN is 18 mm from the edge."""
    stats = find(*PHANTOM.scan(make_grid("oblique"), seed=3)).stats
    assert stats["rating"].tolist() == ["green"] * 16, stats["reasons"].tolist()
    assert stats["rim_contrast_ppm"].between(0.03, 0.2).all()
    assert stats["edge_distance_mm"].min() > 15


def test_wrong_maps_and_labels_are_not_green():
    chi, dseg = upright()
    assert (find(chi.with_array(1000 * chi.array), dseg).stats["rating"] == "red").all()  # ppb read as ppm
    inverted = find(chi.with_array(-chi.array), dseg).stats
    assert (inverted["rating"] == "red").all()
    assert inverted["reasons"].str.contains("hardly brighter").all()
    displaced = find(chi, dseg.with_array(np.roll(dseg.array, 10, axis=1))).stats  # 20 mm towards the front
    assert (displaced["rating"] != "green").mean() > 0.5


def test_nucleus_cut_by_field_of_view_is_red():
    chi, dseg = upright()
    first = int(np.argwhere(dseg.array == STRUCTURES.named("DN_L").index)[:, 2].min()) + 2
    empty = chi.array.copy()
    empty[:, :, :first] = 0
    stats = find(chi.with_array(empty), dseg.with_array(np.where(empty != 0, dseg.array, 0))).stats
    stats = stats.set_index("abbreviation")
    assert stats.loc["DN_L", "rating"] == "red"
    assert "edge of the field of view" in str(stats.loc["DN_L", "reasons"])
    assert stats.loc["GP_L", "rating"] == "green"


UNIT = (1.0, 1.0, 1.0)


def measure(chi: np.ndarray, size_mm: tuple[float, float, float] = UNIT) -> Reference:
    """Measure the whole array as the region."""
    return measure_reference(chi, np.ones(chi.shape, bool), name="csf", source="mask x", voxel_size_mm=size_mm)


def test_reference_averages_the_valid_voxels():
    # 50 voxels of 0.01, 50 of 0.03: mean 0.02; the sum of squares is 100 x 0.01^2, over 99. Ten more are NaN.
    chi = np.repeat([0.01, 0.03], 50).reshape(10, 10, 1)
    result = measure(np.concatenate([chi, np.full((10, 1, 1), np.nan)], axis=1))
    assert result.mean_ppm == pytest.approx(0.02)
    assert (result.n_voxels, result.problem) == (100, "")
    assert result.std_ppm == pytest.approx(np.sqrt(100 * 1e-4 / 99))
    assert result.sem_ppm == pytest.approx(result.std_ppm / 10)


def test_parts_are_the_reference_of_their_nucleus():
    outer, inner, other = (STRUCTURES.named(name) for name in ("GPe_L", "GPi_L", "CN_L"))
    chi, dseg = np.zeros((12, 12, 12), np.float32), np.zeros((12, 12, 12), np.uint8)
    for place, (structure, ppm) in enumerate(((outer, 0.1), (inner, 0.2), (other, 0.9))):
        chi[:, :, 4 * place : 4 * place + 4], dseg[:, :, 4 * place : 4 * place + 4] = ppm, structure.index
    scan = certain(Volume(chi, np.eye(4)), Volume(dseg, np.eye(4)), (outer, inner, other))
    wanted = ReferenceRegion(region="GP")
    result = find_reference(wanted, scan, mask=None, regions={}, model=get_model("dgm24"))
    assert result is not None
    assert result.mean_ppm == pytest.approx(0.15)
    assert result.n_voxels == 2 * 4 * 144


@pytest.mark.parametrize(
    ("size_mm", "label_mm", "layers"), [((1.0, 1.0, 3.0), 3.0, 1), ((1.5,) * 3, 3.0, 1), ((0.7,) * 3, 3.0, 2)]
)
def test_ventricles_are_eroded_by_half_a_label_and_one_layer_at_least(size_mm, label_mm, layers):
    # Of labels of 3 mm, 1.5 mm cover one voxel of 1 or 1.5 mm, two of 0.7 mm, none of 2 or 3 mm.
    ventricles, core = np.zeros((2, 11, 11, 11), bool)
    ventricles[2:9, 2:9, 2:9] = True
    core[(slice(2 + layers, 9 - layers),) * 3] = True
    result = erode_ventricles(ventricles, voxel_size_mm=size_mm, label_size_mm=(label_mm,) * 3)
    np.testing.assert_array_equal(result, core)


def test_referenced_columns_equal_a_shifted_map():
    rng = np.random.default_rng(0)
    chi, dseg = rng.normal(0.1, 0.03, (9, 9, 9)), np.zeros((9, 9, 9), np.uint8)
    dseg[2:7, 2:7, 2:7] = 1
    chi[4, 4, 4] = np.nan
    measure_dentates = partial(measure_nuclei, structures=STRUCTURES.both_sides(["DN"]), voxel_size_mm=(1.0, 1.0, 2.0))
    probseg = np.stack([0.8 * (dseg == 1), 0 * dseg]).astype(np.float32)
    raw = measure_dentates(chi, dseg, probseg).assign(high_iron_mean_ppm=[0.15, np.nan])
    shifted = measure_dentates(chi - 0.02, dseg, probseg)
    table = add_referenced_columns(raw, Reference("csf", "", 0.02, 0.01, 99), voxel_size_mm=(1.0, 1.0, 2.0))
    assert list(table.columns) == [*raw.columns, *REFERENCE_COLUMNS]
    for column in ("mean", "median", "p05", "p25", "p75", "p95", "mean_pv", "core_mean"):
        assert table[f"{column}_ref_ppm"][0] == pytest.approx(shifted[f"{column}_ppm"][0], abs=1e-9), column
    assert table["mass_ref_ppm_mm3"][0] == pytest.approx(shifted["mass_ppm_mm3"][0])
    assert table["high_iron_mean_ref_ppm"][0] == pytest.approx(0.13)
    assert table["mean_ppm"][0] == raw["mean_ppm"][0]
    assert table.loc[1, list(REFERENCE_COLUMNS)].isna().all()  # DN_R has no voxel


@pytest.mark.parametrize(("zoom", "reasons"), [(0.9, []), (1.25, ["head", "brain"])])
def test_wrong_voxel_size_is_amber(zoom, reasons):
    chi, dseg = (Volume(nucleus.array, nucleus.affine @ np.diag([zoom, zoom, zoom, 1])) for nucleus in upright())
    result = find(chi, dseg, facts={"brain_volume_ml": 1500 * zoom**3})
    sizes = [reason for reason in result.reasons if "so that the voxel size may be wrong" in reason]
    assert [reason.partition(" ")[0] for reason in sizes] == reasons
    assert result.rating != "red"


def test_excluded_voxels_are_left_out_of_all_measures():
    chi, dseg = upright()
    putamen, nucleus = STRUCTURES.named("PUT_L").index, STRUCTURES.named("RN_R").index
    front = np.indices(chi.shape)[1] > np.median(np.nonzero(dseg.array == putamen)[1])
    exclude = ((dseg.array == putamen) & front) | (dseg.array == nucleus)
    result = find(chi, dseg, lesions=exclude, bilateral=True)
    rows, whole = (measures.stats.set_index("abbreviation") for measures in (result, baseline()))
    rest = (dseg.array == putamen) & ~front
    assert rows.loc["PUT_L", "n_voxels"] == rest.sum()
    assert rows.loc["PUT_L", "mean_ppm"] == pytest.approx(chi.array[rest].mean(dtype=np.float64))
    assert rows.loc["PUT_L", "volume_pv_mm3"] == pytest.approx(rest.sum() * np.prod(chi.voxel_size_mm))
    assert rows.loc["PUT_L", "excluded_fraction"] == pytest.approx(1 - rest.sum() / whole.loc["PUT_L", "n_voxels"])
    assert rows.loc[["PUT_L", "PUT_R"], "volume_asymmetry"].isna().all()
    assert rows.loc["RN_R", "excluded_fraction"] == 1
    assert rows.loc["RN_R", ["n_voxels", "volume_mm3", "mean_ppm"]].isna().all()
    assert rows.loc["RN_R", "rating"] == "amber"
    assert rows["mean_ppm"]["GP_L"] == pytest.approx(whole["mean_ppm"]["GP_L"])
    share = int(((dseg.array == putamen) & front).sum()) / int(whole["n_voxels"][["PUT_L", "PUT_R"]].sum())
    assert rows.loc["PUT", "excluded_fraction"] == pytest.approx(share)
    assert rows.loc["GP", "excluded_fraction"] == 0


def test_haemorrhage_beside_a_nucleus_is_named_and_amber():
    chi, dseg = upright()
    pallidum = np.argwhere(dseg.array == STRUCTURES.named("GP_L").index).mean(axis=0)
    place_mm = (pallidum - np.array([-6, 4, 0])) * chi.voxel_size_mm  # medial and posterior of it: the thalamus
    distance_mm = np.linalg.norm((np.indices(chi.shape).T * chi.voxel_size_mm - place_mm).T, axis=0)
    bleeding = (distance_mm < 5) & (dseg.array == 0)
    result = find(chi.with_array(np.where(bleeding, np.float32(0.8), chi.array)), dseg)
    (named,) = [line for line in result.warnings if "paramagnetic region" in line]
    volume_mm3 = bleeding.sum() * np.prod(chi.voxel_size_mm)
    assert f"of {volume_mm3:.0f} mm3 (to 0.80 ppm) beside" in named
    rows = result.stats.set_index("abbreviation")
    (nucleus,) = rows.index[rows["paramagnetic_blob_mm3"] > 0]
    assert rows.loc[nucleus, "rating"] == "amber"
    assert "strongly paramagnetic region" in rows.loc[nucleus, "reasons"]
    assert result.rating == "amber"
    masked = find(chi.with_array(np.where(bleeding, np.float32(0.8), chi.array)), dseg, lesions=bleeding)
    assert masked.quality["n_blobs"] == 0
