"""The file in which box, regions and mid-space travel between steps."""

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, OrientedBox
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.registration.midplane import Midplane
from bids_dgmseg.segmentation.localize import Localization, SharedSpace
from bids_dgmseg.segmentation.predict import Location


@pytest.mark.parametrize("oriented", [None, OrientedBox((-17.5, 2.0, 3.0), (95.0, 120.0, 105.0))])
def test_localization_survives_its_file(tmp_path, oriented):
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])  # stored in LAS
    nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine).to_filename(tmp_path / "chi.nii")
    chi = Volume.read(tmp_path / "chi.nii")
    location = Location(
        Box((-50.0, -80.0, -60.0), (50.0, 40.0, 50.1), oriented), plane=Midplane(np.array([1.0, 0.0, 0.1]), 0.3)
    )
    generator = np.random.default_rng(1)
    regions = {name: generator.random(chi.shape) > 0.5 for name in ("brain", "ventricles")}
    space = SharedSpace(np.eye(4) * 0.1, location, {"ses-1": 0.9}, {"DN_L": {"mean_mm3": 7.0}}, ["voxels differ"])
    path = Localization(location=location, regions=regions, space=space).write(
        tmp_path / "location.nii.gz", chi, like=tmp_path / "chi.nii"
    )
    copy = Localization.read(path, chi)
    assert copy.location.box == location.box
    assert copy.location.plane
    np.testing.assert_array_equal(copy.location.plane.normal, [1.0, 0.0, 0.1])
    assert copy.regions.keys() == regions.keys()
    for name, mask in regions.items():
        np.testing.assert_array_equal(copy.regions[name], mask)
    assert copy.space
    np.testing.assert_array_equal(copy.space.to_map, space.to_map)
    assert (copy.space.volumes, copy.space.warnings) == (space.volumes, space.warnings)


def test_another_file_is_refused(tmp_path):
    nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"^a.nii: is another file \(.*\); pass out_location of LocalizeNuclei$"):
        Localization.read(tmp_path / "a.nii", Volume.read(tmp_path / "a.nii"))
    (tmp_path / "b.json").write_text('{"to_map": []}')
    with pytest.raises(InputError, match=r"^b.json: is another file \(.*`location`\); pass one of out_sessions of Al"):
        SharedSpace.read(tmp_path / "b.json")
