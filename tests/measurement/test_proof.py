import numpy as np
import pytest
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.proof import PlantedMap, Planting, prove
from bids_dgmseg.models.structures import STRUCTURES

NUCLEI = [STRUCTURES.named(name) for name in ("PUT_L", "PUT_R", "GP_L")]
CENTRES = [(16.3, 20.4, 19.7), (46.1, 20.2, 20.4), (29.4, 19.6, 20.3)]
GRID, AFFINE = np.indices((62, 40, 40)), np.diag([1.0, 1.0, 1.0, 1.0])


def scan(centres=CENTRES, *, radius_mm=6.0, noise_ppm=0.002) -> Volume:
    """Return spheres of 0.1 ppm; the outermost of PUT_L and GP_L are 1 mm apart."""
    distance = np.min([np.linalg.norm(GRID.T - centre, axis=-1).T for centre in centres], axis=0)
    chi = 0.1 * np.clip(radius_mm + 0.5 - distance, 0, 1) - 0.02  # partial volume over one voxel
    noise = np.random.default_rng(1).normal(0, noise_ppm, chi.shape)
    return Volume((chi + noise).astype(np.float32), AFFINE)


def segment(chi: Volume, centres=CENTRES) -> np.ndarray:
    """Label the voxels above half of the contrast by the closest centre."""
    nearest = np.argmin([np.linalg.norm(GRID.T - centre, axis=-1).T for centre in centres], axis=0)
    above = ndimage.gaussian_filter(np.nan_to_num(chi.array), 0.4) > 0.03
    return np.where(above, np.array([row.index for row in NUCLEI])[nearest], 0)


def follow(planted: PlantedMap) -> np.ndarray:
    return segment(planted.chi)


def labelled(chi: Volume) -> Volume:
    return chi.with_array(segment(chi))


def test_segmentation_that_follows_the_map_recovers_what_was_planted():
    chi = scan()
    proof = prove(chi, labelled(chi), NUCLEI, follow, full=True)
    table = proof.table
    assert proof.warnings == ()
    # 5 ppb at the rim widen the outline at a fixed level by 0.05 mm, 2.5 % of the volume, 40 ppb below the mean
    assert table["recovered_ppb"].between(8.5, 10).all()
    # a shell of 0.2 mm contains 10 % of a sphere, but one or two per cent more or fewer centres of voxels
    losses, growth, small = (table[f"recovered_{part}percent"] for part in ("", "growth_", "small_"))
    assert np.abs([losses - 10, growth - 10, small - 5]).max() < 2.5
    np.testing.assert_allclose((losses + growth) / 2, 10, atol=1)
    assert table["repeat_dice"].between(0.95, 1).all()
    assert table["repeat_volume_percent"].between(0, 2.5).all()
    again = prove(chi, labelled(chi), NUCLEI, follow, full=True).table
    assert again.equals(table)


def test_labels_that_ignore_the_map_recover_no_volume():
    chi = scan()
    fixed = labelled(chi)
    proof = prove(chi, fixed, NUCLEI, lambda planted: fixed.array)
    assert "recovered_growth_percent" not in proof.table
    np.testing.assert_allclose(proof.table["recovered_ppb"], 10, atol=0.3)  # neighbours move the rim
    assert proof.table["recovered_percent"].tolist() == [0, 0, 0]
    assert proof.table["repeat_volume_percent"].tolist() == [0, 0, 0]
    assert (proof.table["repeat_dice"] < 0.97).all()  # the map moved, they did not


def test_planted_volume_is_that_of_the_moved_labels():
    chi = scan()
    planting = Planting.of(chi, labelled(chi), NUCLEI)
    assert [set(part) for part in planting.sets] in ([{"PUT_L", "PUT_R"}, {"GP_L"}], [{"PUT_L"}, {"GP_L", "PUT_R"}])
    for planted in planting.maps():
        for name, percent in planted.percent.get("recovered_percent", {}).items():
            row = STRUCTURES.named(name)
            truth = planted.true_fractions(NUCLEI)[NUCLEI.index(row)]
            n_voxels = np.count_nonzero(labelled(chi).array == row.index)
            assert percent == pytest.approx(-10, abs=0.3)
            assert truth.sum() / n_voxels - 1 == pytest.approx(percent / 100, abs=1e-4)
        assert np.isfinite(planted.chi.array).all()
        assert (planted.chi.array != chi.array).any()


def test_nuclei_in_which_nothing_can_be_planted_are_named():
    chi = scan()
    array = chi.array.copy()
    array[..., 26:] = np.nan  # the spheres are cut, or touch the edge
    clipped = chi.with_array(np.minimum(chi.array, 0.075).astype(np.float32))
    for image, reason in (
        (chi.with_array(array), "closer than 1 mm to the edge of the field of view"),
        (clipped, "the map is clipped at 0.075 ppm, which planted values would exceed"),
    ):
        proof = prove(image, labelled(image), NUCLEI, follow)
        assert proof.warnings == (f"PUT_L, PUT_R, GP_L: not tested, {reason}",)
        assert proof.table.isna().all(axis=None)
    without = labelled(chi)
    without.array[without.array == NUCLEI[2].index] = 0
    proof = prove(chi, without, NUCLEI, follow, edited=["PUT_R"])
    assert proof.warnings == ("PUT_R: not tested, edited by hand", "GP_L: not tested, not found")
    assert proof.table.notna().all(axis=1).to_dict() == {"PUT_L": True, "PUT_R": False, "GP_L": False}


def test_segmentation_that_fails_leaves_one_line():
    chi = scan()

    def fail(planted):
        raise InputError("cmd: ended with exit code 3")

    proof = prove(chi, labelled(chi), NUCLEI, fail)
    assert proof.warnings == ("PUT_L, PUT_R, GP_L: not tested, cmd: ended with exit code 3",)
    assert proof.table.isna().all(axis=None)
