from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import write_model_toml
from bids_dgmseg.models.registry import MODELS, get_model
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.predict import network_grid
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.conftest import HEAD, coarse_chi

UPPER = [body.box for body in PHANTOM.nuclei if body.label > 4]
NUCLEI = Box(
    tuple(np.min([box.low_mm for box in UPPER], axis=0).tolist()),
    tuple(np.max([box.high_mm for box in UPPER], axis=0).tolist()),
)
"""The phantom's nuclei above the cerebellum."""
UNSHIPPED = {name: replace(model, name="unshipped") for name, model in MODELS.items()}
"""Without weights in the package, whose crop would go before the registry's."""


def test_too_small_brain_is_refused_before_prediction():
    chi = np.zeros((30, 30, 30), np.float32)
    chi[5:25, 5:25, 5:25] = 0.05
    with pytest.raises(InputError, match=r"^no brain found \(64 mL\); check that the map shows a head, in ppm$"):
        localize(Volume(chi, np.diag([2.0, 2.0, 2.0, 1.0])), get_model("default"))  # 20³ voxels of 8 mm³


def test_centre_box_without_guard_is_centred_on_the_brain():
    model = replace(UNSHIPPED["deepqsmseg"], localizer=replace(UNSHIPPED["deepqsmseg"].localizer, guard=""))
    box = localize(coarse_chi(), model).box
    middle = np.add(HEAD.low_mm, HEAD.high_mm) / 2  # the phantom fills its box but for 5 mm and a voxel
    np.testing.assert_allclose(box.centre_mm, middle, atol=5.0)
    np.testing.assert_allclose(box.size_mm, (120, 120, 128))


def test_box_has_the_patch_size_of_the_weights(tmp_path):
    model = replace(MODELS["attunet25d"], localizer=replace(MODELS["attunet25d"].localizer, guard=""))
    write_model_toml(replace(model, input=replace(model.input, patch_mm=(53.0, 89.6, 51.0))), tmp_path, about={})
    np.testing.assert_allclose(localize(coarse_chi(), model, weights=tmp_path).box.size_mm, (53.0, 89.6, 51.0))


@pytest.mark.parametrize("name", ["attunet25d", "deepqsmseg"])
def test_centre_box_is_shifted_to_cover_nuclei(name):
    model = UNSHIPPED[name]
    small = replace(model, input=replace(model.input, patch_mm=(80.0, 70.0, 76.8)))
    unguarded = replace(small, localizer=replace(small.localizer, guard=""))
    whole = coarse_chi()
    low = whole.with_array(np.where(np.arange(whole.shape[2]) * 2.5 - 80 < 40, whole.array, 0))  # cut above z = 40 mm
    for chi in (whole, low):
        box = localize(chi, small).box
        assert (np.array(box.low_mm) <= NUCLEI.low_mm).all()
        assert (np.array(box.high_mm) >= NUCLEI.high_mm).all()
        np.testing.assert_allclose(box.size_mm, small.input.patch_mm)
    assert not (np.array(localize(low, unguarded).box.high_mm) >= NUCLEI.high_mm).all()


def test_registered_box_is_shifted_to_cover_nuclei(monkeypatch):
    wrong = Box((-30.0, -20.0, 0.0), (30.0, 30.0, 50.0))  # above the cerebellum
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.read_atlases", lambda *args: [])
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.find_by_atlas", lambda *args: wrong)
    model = UNSHIPPED["dcnnet"]
    box = localize(coarse_chi(), model).box
    lower = [body.box for body in PHANTOM.nuclei if body.label <= 4]
    assert (np.array(box.low_mm) <= np.min([one.low_mm for one in lower], axis=0)).all()
    assert (np.array(box.high_mm) >= np.max([one.high_mm for one in lower], axis=0)).all()
    np.testing.assert_allclose(box.size_mm, wrong.size_mm)
    unguarded = replace(model, localizer=replace(model.localizer, guard=""))
    assert localize(coarse_chi(), unguarded).box == wrong


def labelled_head(pitch_deg: float, cerebellum_mm: float = 45.0) -> Volume:
    """Regions of a nodding head, 3 mm: nuclei as a cube of 27 mm, the cerebellum as a larger one behind and below.

    Its middle lies 75 mm away, 31.3 degrees below the horizon before the head nods, as in the label template.
    """
    angle = np.deg2rad(31.3 + pitch_deg)
    place = -75.0 * np.array([0, np.cos(angle), np.sin(angle)])
    centres = np.stack(np.meshgrid(*[np.arange(-120.0, 121.0, 3.0)] * 3, indexing="ij"), axis=-1)
    labels = np.ones(centres.shape[:3], np.uint8)
    labels[(np.abs(centres - place) < cerebellum_mm / 2).all(axis=-1)] = 2
    labels[(np.abs(centres) < 13.5).all(axis=-1)] = 4
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = -120.0
    return Volume(labels, affine)


@pytest.fixture
def box_of(monkeypatch):
    """The box that is laid where the whole-head network labels regions so."""

    def find(labels: Volume, chi: Volume | None = None) -> Box:
        monkeypatch.setattr("bids_dgmseg.segmentation.localize._label_head", lambda *_: labels)
        return localize(chi or coarse_chi(), get_model("default")).box

    return find


@pytest.mark.parametrize("pitch_deg", [-30.0, -16.0, 16.0, 30.0])
def test_box_follows_the_pitch_of_the_head(box_of, pitch_deg):
    tilt = box_of(labelled_head(pitch_deg)).oriented
    assert tilt is not None
    assert tilt.rotation_deg == pytest.approx((pitch_deg, 0, 0), abs=1.5)  # voxels of 3 mm at 75 mm
    np.testing.assert_allclose(tilt.size_mm, get_model("default").input.patch_mm)


@pytest.mark.parametrize("pitch_deg", [-9.0, 0.0, 9.0])
def test_upright_head_keeps_the_world_axes(box_of, pitch_deg):
    assert box_of(labelled_head(pitch_deg)).oriented is None


def oblique_box(box_of, degrees: float, *, pitch_deg: float = 0.0, voxel_mm: float = 2.0) -> Box:
    """The box in a map whose slices, and the head with them, are turned about the long axis of the body."""
    turn = nib.affines.from_matvec(Rotation.from_euler("z", degrees, degrees=True).as_matrix())
    labels, chi = labelled_head(pitch_deg), PHANTOM.chi(world_grid(HEAD, (voxel_mm,) * 3))
    box: Box = box_of(Volume(labels.array, turn @ labels.affine), Volume(chi.array, turn @ chi.affine))
    return box


def test_box_is_aligned_with_oblique_slices(box_of):
    tilt = oblique_box(box_of, 20.0).oriented
    assert tilt is not None
    assert tilt.rotation_deg == pytest.approx((0, 0, 20), abs=1e-4)


def test_network_sees_native_voxels_of_oblique_slices(box_of):
    grid = world_grid(HEAD, (2.0, 2.0, 2.0))
    turn = nib.affines.from_matvec(Rotation.from_euler("z", 20, degrees=True).as_matrix())
    own = Grid(grid.shape, turn @ grid.affine)
    seen = network_grid(PHANTOM.chi(own), oblique_box(box_of, 20.0), MODELS["dgm16"])
    place = np.linalg.inv(own.affine) @ seen.affine
    np.testing.assert_allclose(place[:3, :3], np.eye(3) / 2, atol=1e-9)  # halves of 2 mm
    corners = 2 * place[:3, 3] + 0.5  # a half's centre lies a quarter of a voxel from the middle of the whole
    np.testing.assert_allclose(corners, corners.round(), atol=1e-4)


def test_pitched_head_in_oblique_slices_uses_world_axes(box_of):
    tilt = oblique_box(box_of, 20.0, pitch_deg=25.0).oriented
    assert tilt is not None
    # Seen from the side, what lies behind by cos 56.3 is cos 20 of that: atan(tan 56.3 / cos 20) - 31.3.
    assert tilt.rotation_deg == pytest.approx((26.6, 0, 0), abs=1.5)


def test_interpolated_slices_do_not_align_the_box(box_of):
    assert oblique_box(box_of, 20.0, voxel_mm=2.5).oriented is None  # neither halves nor thirds of it are about 1 mm


@pytest.mark.parametrize("degrees", [9.0, 31.0])
def test_box_ignores_slight_and_extreme_obliquity(box_of, degrees):
    assert oblique_box(box_of, degrees).oriented is None


@pytest.mark.parametrize("pitch_deg", [-118.0, -60.0, 60.0])
def test_implausible_cerebellum_does_not_rotate_the_box(box_of, pitch_deg):
    assert box_of(labelled_head(pitch_deg)).oriented is None


def test_cut_cerebellum_does_not_rotate_the_box(box_of):
    assert box_of(labelled_head(30.0, cerebellum_mm=30.0)).oriented is None  # under 1.5 times the nuclei's size
