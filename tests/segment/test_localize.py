from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.boxes import Box
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import MODELS, get_model
from bids_dgmseg.segment.localize import localize
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.conftest import HEAD, coarse_chi

UPPER = [body.box for body in PHANTOM.nuclei if body.label > 4]
NUCLEI = Box(tuple(np.min([box.low_mm for box in UPPER], axis=0).tolist()),
             tuple(np.max([box.high_mm for box in UPPER], axis=0).tolist()))  # fmt: skip
"""The phantom's nuclei above the cerebellum."""


def test_what_is_too_small_for_a_brain_is_refused_before_any_network_looks():
    chi = np.zeros((30, 30, 30), np.float32)
    chi[5:25, 5:25, 5:25] = 0.05
    with pytest.raises(InputError, match=r"^no brain found \(64 mL\); check that the map shows a head, in ppm$"):
        localize(Volume(chi, np.diag([2.0, 2.0, 2.0, 1.0])), get_model("default"))  # 20³ voxels of 8 mm³


def test_without_a_guard_the_crop_lies_about_the_middle_of_the_brain():
    model = replace(MODELS["deepqsmseg"], localizer=replace(MODELS["deepqsmseg"].localizer, guard=""))
    box = localize(coarse_chi(), model).box
    middle = np.add(HEAD.low_mm, HEAD.high_mm) / 2  # the phantom fills its box but for 5 mm and a voxel
    np.testing.assert_allclose(box.centre_mm, middle, atol=5.0)
    np.testing.assert_allclose(box.size_mm, (120, 120, 128))


@pytest.mark.parametrize("name", ["attunet25d", "deepqsmseg"])
def test_a_centre_crop_moves_where_it_would_cut_a_nucleus(name):
    model = MODELS[name]
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
