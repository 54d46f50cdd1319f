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
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.predict import network_grid
from bids_dgmseg.segmentation.segment import localize
from tests.conftest import HEAD, coarse_chi

pytestmark = pytest.mark.usefixtures("coarse_midplane")


def covers_nuclei(box, *, cerebellar):
    """Check whether a box contains the phantom's nuclei above or in the cerebellum."""
    boxes = [body.box for body in PHANTOM.nuclei if (body.label <= 4) == cerebellar]
    below = np.array(box.low_mm) <= np.min([inner.low_mm for inner in boxes], axis=0)
    return bool(below.all() and (np.array(box.high_mm) >= np.max([inner.high_mm for inner in boxes], axis=0)).all())


def unguarded(model):
    return replace(model, localizer=replace(model.localizer, guard=""))


UNSHIPPED = {name: replace(model, name="unshipped") for name, model in MODELS.items()}
"""Models without weights in the package, whose patch would override the registry's."""


def test_too_small_brain_is_refused_before_prediction():
    chi = np.zeros((30, 30, 30), np.float32)
    chi[5:25, 5:25, 5:25] = 0.05
    with pytest.raises(InputError, match=r"^no brain found \(64 mL\); check that the map shows a head, in ppm$"):
        localize(Volume(chi, np.diag([2.0, 2.0, 2.0, 1.0])), get_model("default"))  # 20³ voxels of 8 mm³


def test_centre_box_without_guard_is_centred_on_the_brain():
    box = localize(coarse_chi(), unguarded(UNSHIPPED["deepqsmseg"])).box
    middle = np.add(HEAD.low_mm, HEAD.high_mm) / 2  # the phantom fills its box up to 5 mm and a voxel
    np.testing.assert_allclose(box.centre_mm, middle, atol=5.0)
    np.testing.assert_allclose(box.size_mm, (120, 120, 128))


def test_box_has_the_patch_size_of_the_weights(tmp_path):
    model = unguarded(MODELS["deepqsmseg"])
    write_model_toml(replace(model, input=replace(model.input, patch_mm=(53.0, 89.6, 51.0))), tmp_path, about={})
    np.testing.assert_allclose(localize(coarse_chi(), model, weights=tmp_path).box.size_mm, (53.0, 89.6, 51.0))


def test_centre_box_is_shifted_to_cover_nuclei():
    model = UNSHIPPED["deepqsmseg"]
    model = replace(model, input=replace(model.input, patch_mm=(80.0, 70.0, 76.8)))
    whole = coarse_chi()
    low = whole.with_array(np.where(np.arange(whole.shape[2]) * 2.5 - 80 < 40, whole.array, 0))  # cut above z = 40 mm
    box = localize(low, model).box
    assert covers_nuclei(box, cerebellar=False)
    np.testing.assert_allclose(box.size_mm, model.input.patch_mm)
    assert not covers_nuclei(localize(low, unguarded(model)).box, cerebellar=False)


def test_registered_box_is_shifted_to_cover_nuclei(monkeypatch):
    wrong = Box((-30.0, -20.0, 0.0), (30.0, 30.0, 50.0))  # above the cerebellum
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.read_atlases", lambda *args: [])
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.find_by_atlas", lambda *args, **kwargs: wrong)
    box = localize(coarse_chi(), UNSHIPPED["dcnnet"]).box
    assert covers_nuclei(box, cerebellar=True)
    np.testing.assert_allclose(box.size_mm, wrong.size_mm)
    assert localize(coarse_chi(), unguarded(UNSHIPPED["dcnnet"])).box == wrong


def labelled_head(pitch_deg: float, cerebellum_mm: float = 45.0) -> Volume:
    """Regions of a pitched head, 3 mm: nuclei as a cube of 27 mm, the cerebellum as a larger one behind and below.

    Its centre is 75 mm away, 31.3 degrees below the horizontal in an upright head, as in the label template.
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
    """Return the box if the whole-head network finds given regions."""

    def find(labels: Volume, chi: Volume | None = None) -> Box:
        monkeypatch.setattr("bids_dgmseg.segmentation.localize._label_head", lambda *_: labels)
        return localize(chi or coarse_chi(), get_model("default")).box

    return find


@pytest.mark.parametrize("pitch_deg", [-30.0, 16.0])
def test_box_follows_the_pitch_of_the_head(box_of, pitch_deg):
    tilt = box_of(labelled_head(pitch_deg)).oriented
    assert tilt is not None
    assert tilt.rotation_deg == pytest.approx((pitch_deg, 0, 0), abs=1.5)  # voxels of 3 mm at 75 mm
    np.testing.assert_allclose(tilt.size_mm, get_model("default").input.patch_mm)


@pytest.mark.parametrize(
    ("pitch_deg", "cerebellum_mm"),
    [
        (-9.0, 45.0),  # almost upright
        (60.0, 45.0),  # implausible
        (30.0, 30.0),  # cut cerebellum, less than 1.5 times the size of the nuclei
    ],
)
def test_slight_and_implausible_pitch_keeps_the_world_axes(box_of, pitch_deg, cerebellum_mm):
    assert box_of(labelled_head(pitch_deg, cerebellum_mm)).oriented is None


@pytest.fixture
def oblique_box(box_of):
    """Return the box in a map whose slices, and the head with them, are rotated about the long axis of the body."""

    def find(degrees: float, *, voxel_mm: float = 2.0) -> Box:
        turn = nib.affines.from_matvec(Rotation.from_euler("z", degrees, degrees=True).as_matrix())
        grid = world_grid(HEAD, (voxel_mm,) * 3)
        labels, chi = (labelled_head(0), Volume(np.full(grid.shape, np.float32(0.05)), grid.affine))
        box: Box = box_of(Volume(labels.array, turn @ labels.affine), Volume(chi.array, turn @ chi.affine))
        return box

    return find


def test_network_sees_native_voxels_of_oblique_slices(oblique_box):
    box = oblique_box(20.0)
    assert box.oriented.rotation_deg == pytest.approx((0, 0, 20), abs=1e-4)
    grid = world_grid(HEAD, (2.0, 2.0, 2.0))
    turn = nib.affines.from_matvec(Rotation.from_euler("z", 20, degrees=True).as_matrix())
    tilted = Grid(grid.shape, turn @ grid.affine)
    network_affine = (
        np.linalg.inv(tilted.affine)
        @ network_grid(Volume(np.zeros(tilted.shape), tilted.affine), box, MODELS["dgm16"]).affine
    )
    np.testing.assert_allclose(network_affine[:3, :3], np.eye(3) / 2, atol=1e-9)  # halves of 2 mm
    corners = 2 * network_affine[:3, 3] + 0.5  # the centre of a half is a quarter of a voxel from that of the whole
    np.testing.assert_allclose(corners, corners.round(), atol=1e-4)


@pytest.mark.parametrize(
    ("degrees", "voxel_mm", "rotation_deg"), [(20.0, 2.0, 20.0), (20.0, 2.1, 0.0), (9.0, 2.0, 0.0)]
)
def test_centre_box_follows_oblique_slices_of_the_papers_voxels(degrees, voxel_mm, rotation_deg):
    attunet = unguarded(UNSHIPPED["attunet25d"])
    model = replace(attunet, input=replace(attunet.input, spacing_mm=(2.0, 2.0, 2.0)))
    grid = world_grid(HEAD, (voxel_mm,) * 3)
    turn = nib.affines.from_matvec(Rotation.from_euler("x", degrees, degrees=True).as_matrix())
    box = localize(Volume(PHANTOM.chi(grid, supersampling=1).array, turn @ grid.affine), model).box
    size_mm, axes = box.frame
    np.testing.assert_allclose(size_mm, model.input.patch_mm)
    expected = Rotation.from_euler("x", rotation_deg, degrees=True).as_matrix()
    np.testing.assert_allclose(axes, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("degrees", "voxel_mm"),
    [
        (20.0, 2.5),  # interpolated: neither halves nor thirds are about 1 mm
        (9.0, 2.0),
        (31.0, 2.0),
    ],
)
def test_box_ignores_interpolated_slight_and_extreme_obliquity(oblique_box, degrees, voxel_mm):
    assert oblique_box(degrees, voxel_mm=voxel_mm).oriented is None
