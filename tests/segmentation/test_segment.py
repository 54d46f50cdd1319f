from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.model_folder import limit_threads
from bids_dgmseg.models.registry import MODELS, Localizer
from bids_dgmseg.segmentation.localize import Location, localize
from bids_dgmseg.segmentation.postprocess import label_grid
from bids_dgmseg.segmentation.predict import predict
from bids_dgmseg.segmentation.segment import check_ready, segment_map
from tests.conftest import coarse_chi
from tests.oracle import oracle_model


def test_steps_run_in_order():
    chi, model = coarse_chi(), oracle_model()
    found = segment_map(chi, model)
    location = localize(chi, model)
    block = predict(chi, location.box, model)
    assert found.location == location
    np.testing.assert_array_equal(found.block.probabilities, block.probabilities)
    np.testing.assert_array_equal(found.labels, label_grid(block, model, chi.shape))


def test_missing_values_count_as_background():
    chi, model = coarse_chi(), oracle_model()
    holes = chi.with_array(np.where(chi.array == 0, np.nan, chi.array))
    np.testing.assert_array_equal(segment_map(holes, model).labels, segment_map(chi, model).labels)


def test_given_location_and_ensemble_are_used():
    chi, model = coarse_chi(), oracle_model()
    box = localize(chi, model).box
    left = Location(replace(box, high_mm=(0.0, *box.high_mm[1:])), None)
    found = segment_map(chi, model, location=left, ensemble=True)
    assert found.location is left
    assert found.model.uses_mirroring
    assert set(np.unique(found.labels)) == {0, *range(1, 17, 2)}  # odd numbers are on the left


@pytest.mark.parametrize("model", [MODELS["dgm16"], replace(MODELS["dgm16"], localizer=Localizer(kind="centre"))])
def test_missing_weights_are_found_early(model, tmp_path):
    with pytest.raises(InputError, match=r"^dgm16: no weights in .*; pass --weights FOLDER or choose another --model"):
        check_ready(model, weights=tmp_path, device="cpu")


def test_missing_device_is_found_early(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^--device cuda: no CUDA device is available; use"):
        check_ready(MODELS["dgm16"], weights=None, device="cuda")


def test_number_of_threads_is_limited():
    before = torch.get_num_threads()
    try:
        limit_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
