"""What the weights in the package promise: the phantom's nuclei, however the same head is stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.interfaces import LocalizeNuclei
from bids_dgmseg.measurement.segmented_scan import erode_ventricles
from bids_dgmseg.models.model_folder import atlas_files
from bids_dgmseg.models.registry import MODELS, get_model
from bids_dgmseg.models.structures import STRUCTURES, join_parts
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.engines import choose_labels
from bids_dgmseg.segmentation.localize import Localization
from bids_dgmseg.segmentation.segment import SegmentedMap, localize, segment_map
from bids_dgmseg.stats.overlap import dice

pytestmark = pytest.mark.slow

MODEL = get_model("default")
HEAD = Box((-75, -110, -80), (75, 74, 80))
UPRIGHT = world_grid(HEAD, (1.0, 1.0, 1.0))


def _segment(chi: Volume) -> Volume:
    return Volume(segment_map(chi, MODEL).labels, chi.affine)


@cache
def _upright_map() -> Volume:
    return PHANTOM.chi(UPRIGHT, seed=5)


@cache
def _upright() -> SegmentedMap:
    return segment_map(_upright_map(), MODEL)


def _upright_dseg() -> Volume:
    return Volume(_upright().labels, UPRIGHT.affine)


def _volumes_mm3(dseg: Volume) -> np.ndarray:
    return np.bincount(dseg.array.ravel(), minlength=17)[1:17] * np.prod(dseg.voxel_size_mm)


def _store(path: Path, axes: str, kind: str) -> Volume:
    """Write the upright map with other axes and another data type, without resampling, and read it back."""
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(axes)))
    image = nib.Nifti1Image(_upright_map().array, _upright_map().affine).as_reoriented(turn)
    image.set_data_dtype(kind)
    image.to_filename(path)
    return Volume.read(path)


@pytest.mark.parametrize(
    ("axes", "kind", "extension"),
    [("LAS", "float32", ".nii.gz"), ("PIR", "float32", ".nii.gz"), ("LPS", "float64", ".nii")],
)
def test_orientation_and_format_do_not_change_labels(tmp_path, axes, kind, extension):
    chi = _store(tmp_path / f"map{extension}", axes, kind)
    np.testing.assert_array_equal(_segment(chi).array, _upright_dseg().array)


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
def test_ventricles_of_the_phantom_are_found(tmp_path, axes):
    stored = _store(tmp_path / "map.nii.gz", axes, "float32")
    step = LocalizeNuclei(in_chi=tmp_path / "map.nii.gz", model="dgm16")

    def find_regions() -> Mapping[str, np.ndarray]:
        return Localization.read(Path(step.run(cwd=tmp_path).outputs.out_location), stored).regions

    assert set(find_regions()) == {"brain", "cerebellum"}  # ventricles take longer
    step.inputs.find_ventricles = True
    result = find_regions()["ventricles"]
    true = PHANTOM.labels(UPRIGHT.centres_mm()) == 23
    assert 2 * (result & true).sum() / (result.sum() + true.sum()) > 0.9
    inner = erode_ventricles(
        result & (_upright_dseg().array == 0), voxel_size_mm=stored.voxel_size_mm, label_size_mm=(1.0, 1.0, 1.0)
    )
    assert stored.array[inner].mean() == pytest.approx(0.012, abs=0.003)  # white matter has -0.03 ppm


def test_finer_model_finds_the_same_nuclei():
    # It has never seen the phantom: its ellipsoids have no parts.
    result = segment_map(_upright_map(), get_model("dgm24"), location=localize(_upright_map(), MODEL)).labels
    assert dice(_upright_dseg().array, join_parts(result), structures=STRUCTURES)["dice"].mean() > 0.9
    x_mm = UPRIGHT.centres_mm()[..., 0]
    for structure in get_model("dgm24").structures:
        here = x_mm[result == structure.index]
        assert not here.size or (np.median(here) < 0) == (structure.hemisphere == "L")
    present = {STRUCTURES.numbered(int(label)).abbreviation for label in np.unique(result) if label}
    assert {"GPe_L", "GPi_L"} <= present


TILT = nib.affines.from_matvec(Rotation.from_euler("xz", [12, 8], degrees=True).as_matrix())
GRIDS = {
    "oblique": Grid(UPRIGHT.shape, TILT @ UPRIGHT.affine),
    "0.7 mm": world_grid(HEAD, (0.7, 0.7, 0.7)),
    "1 x 1 x 3 mm": world_grid(HEAD, (1, 1, 3)),
}


@pytest.mark.parametrize("axis", ["y", "z"])
def test_oblique_slices_keep_the_nuclei(axis):
    # The same voxels under a header that says that slices, and the head with them, were turned by 20 degrees.
    turn = nib.affines.from_matvec(Rotation.from_euler(axis, 20, degrees=True).as_matrix())
    chi = Volume(_upright_map().array, turn @ UPRIGHT.affine)
    # The localizer's view is interpolated, so the box may lie aside; were the segmenter's, Dice would fall to 0.9.
    assert dice(_upright_dseg().array, _segment(chi).array, structures=STRUCTURES)["dice"].min() > 0.95


@cache
def _dseg_on(name: str) -> Volume:
    """The phantom's labels on one of the grids, found once for the tests of them."""
    # Averaging the points of a voxel hardly changes voxels of 0.7 mm, and takes most of the time there.
    return _segment(PHANTOM.chi(GRIDS[name], seed=5, supersampling=1 if name == "0.7 mm" else 2))


@pytest.mark.parametrize("name", GRIDS)
def test_volumes_agree_between_grids(name):
    dseg = _dseg_on(name)
    # A boundary known to a third of the largest voxel edge h moves the volume of a body of surface S by S h / 3; of a
    # ball of the same volume V, S = 4.84 V^(2/3), and flat nuclei have up to 1.3 times that.
    h_mm = max(1.0, *dseg.voxel_size_mm)
    upright_mm3 = _volumes_mm3(_upright_dseg())
    allowed_mm3 = 1.3 * 4.84 * upright_mm3 ** (2 / 3) * h_mm / 3
    assert (np.abs(_volumes_mm3(dseg) - upright_mm3) <= allowed_mm3).all()


@pytest.mark.parametrize("name", GRIDS)
def test_every_nucleus_is_on_its_side(name):
    dseg = _dseg_on(name)
    for structure in STRUCTURES:
        voxels = np.argwhere(dseg.array == structure.index)
        x_mm = nib.affines.apply_affine(dseg.affine, voxels)[:, 0].mean()
        assert (x_mm < 0) == (structure.hemisphere == "L"), structure.name


def test_phantom_is_segmented_accurately():
    table = dice(PHANTOM.dseg(UPRIGHT).array, _upright_dseg().array, structures=STRUCTURES)
    by_nucleus = table.set_index("abbreviation")["dice"]
    assert by_nucleus.mean() >= 0.8
    assert by_nucleus[["IN_L", "IN_R"]].min() >= 0.6


def test_probabilities_predict_volume_and_dice():
    truth, result = PHANTOM.dseg(UPRIGHT).array, _upright_dseg().array
    overlap = dice(truth, result, structures=STRUCTURES)["dice"].to_numpy()
    block = _upright().block
    probseg, here = block.probabilities[1:], result[block.slices]
    total = probseg.sum(axis=(1, 2, 3), dtype=np.float64)
    volume = np.bincount(result.ravel(), minlength=17)[1:17]
    within = [
        probability[here == structure.index].sum(dtype=np.float64)
        for structure, probability in zip(STRUCTURES, probseg, strict=True)
    ]
    # A tenth of a voxel all over the surface is a sixth of the volume of the smallest nucleus.
    np.testing.assert_allclose(total, volume, rtol=0.15)
    np.testing.assert_allclose(2 * np.array(within) / (total + volume), overlap, atol=0.1)


@pytest.mark.parametrize("name", ["nnunet2step", "dcnnet", "attunet25d", "deepqsmseg"])
def test_papers_models_segment_the_phantom(name, monkeypatch):
    # dcnnet registers all its atlases to find the best; two of them show the same in a fifth of the time.
    monkeypatch.setattr(
        "bids_dgmseg.segmentation.localize.atlas_files",
        lambda *arguments, **options: atlas_files(*arguments, **options)[:2],
    )
    model, _ = choose_labels(MODELS[name])
    labels = segment_map(_upright_map(), model).labels
    table = dice(PHANTOM.dseg(UPRIGHT).array, labels, structures=model.structures)
    nuclei = [structure.nucleus for structure in model.structures]
    assert table["dice"].groupby(nuclei).mean().min() > 0.5
    assert table["dice"].min() > 0.2  # exchanged sides would overlap nowhere


def test_mirrored_head_has_mirrored_nuclei():
    # Mirrored data under the same affine are another head, whose left side is the first one's right.
    mirrored = _segment(_upright_map().with_array(_upright_map().array[::-1].copy()))
    swapped = np.array([0, *(((index - 1) ^ 1) + 1 for index in range(1, 17))], np.uint8)
    expected = swapped[_upright_dseg().array[::-1]]
    assert dice(expected, mirrored.array, structures=STRUCTURES)["dice"].mean() > 0.9
