from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.models.registry import MODELS, Localizer, Postprocessing
from bids_dgmseg.registration.midplane import Midplane
from bids_dgmseg.segmentation.postprocess import label_grid
from bids_dgmseg.segmentation.predict import Location
from bids_dgmseg.segmentation.segment import check_ready, localize, segment_map
from tests.conftest import coarse_chi
from tests.oracle import oracle_model

pytestmark = pytest.mark.usefixtures("coarse_midplane")


def test_location_can_be_reused():
    chi, model = coarse_chi(), oracle_model()
    result, location = segment_map(chi, model), localize(chi, model)
    assert result.location == location
    again = segment_map(chi, model, location=location)
    assert again.location is location
    np.testing.assert_array_equal(result.block.probabilities, again.block.probabilities)
    np.testing.assert_array_equal(result.labels, label_grid(again.block, model, chi.array))


class Sideless:
    """Certain of DN everywhere."""

    def __init__(self, model, options):
        pass

    def __call__(self, volume):
        return np.stack([np.zeros(volume.shape, np.float32), np.ones(volume.shape, np.float32)])


SIDELESS = replace(oracle_model(), labels=("DN_L", "DN_R"), heads=(("DN",),), predictor=Sideless)


def test_midplane_is_found_only_if_needed():
    chi = coarse_chi()
    assert localize(chi, oracle_model()).plane is None
    plane = localize(chi, SIDELESS).plane
    assert plane is not None
    assert plane.distance_mm(np.array([30.0, -20.0, 0.0])) == pytest.approx(30, abs=2)
    assert localize(chi, oracle_model(), midplane=True).plane is not None


def test_given_midplane_splits_nuclei():
    chi = coarse_chi()
    location = replace(localize(chi, SIDELESS), plane=Midplane(np.array([1.0, 0.0, 0.0]), 20.0))
    result = segment_map(
        chi, replace(SIDELESS, postprocessing=Postprocessing(min_component_fraction=0)), location=location
    )
    x_mm = Grid(chi.shape, chi.affine).centres_mm()[..., 0]
    assert x_mm[result.labels == 1].max() < 20 <= x_mm[result.labels == 2].min()


def test_missing_values_count_as_background():
    chi, model = coarse_chi(), oracle_model()
    holes = chi.with_array(np.where(chi.array == 0, np.nan, chi.array))
    np.testing.assert_array_equal(segment_map(holes, model).labels, segment_map(chi, model).labels)


def test_given_location_is_used():
    chi, model = coarse_chi(), oracle_model()
    box = localize(chi, model).box
    left = Location(replace(box, high_mm=(0.0, *box.high_mm[1:])))
    result = segment_map(chi, model, location=left)
    assert result.location is left
    assert set(np.unique(result.labels)) == {0, *range(1, 17, 2)}  # odd numbers are on the left


@pytest.mark.parametrize("model", [MODELS["dgm16"], replace(MODELS["dgm16"], localizer=Localizer(kind="centre"))])
def test_missing_weights_are_found_early(model, tmp_path):
    with pytest.raises(
        InputError, match=r"^dgm16: no weights in .*; pass another folder as `weights` or choose another `model`"
    ):
        check_ready(model, weights=tmp_path, device="cpu")


@pytest.mark.parametrize(("device", "kind"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_missing_device_is_found_early(monkeypatch, device, kind):
    monkeypatch.setattr(kind, "is_available", lambda: False)
    with pytest.raises(InputError, match=rf"^`device` {device}: no .* is available.*; use `device` cpu$"):
        check_ready(MODELS["dgm16"], weights=None, device=device)
