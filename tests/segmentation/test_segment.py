from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS, Localizer
from bids_dgmseg.models.weights import limit_threads
from bids_dgmseg.segmentation.segment import check_ready


@pytest.mark.parametrize("model", [MODELS["dgm16"], replace(MODELS["dgm16"], localizer=Localizer(kind="centre"))])
def test_missing_weights_are_seen_before_the_first_scan(model, tmp_path):
    with pytest.raises(InputError, match=r"^dgm16: no weights in .*; pass --weights FOLDER or choose another --model"):
        check_ready(model, weights=tmp_path, device="cpu")


def test_a_missing_device_is_seen_before_the_first_scan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^--device cuda: no CUDA device is available; use"):
        check_ready(MODELS["dgm16"], weights=None, device="cuda")


def test_networks_use_the_threads_they_may():
    before = torch.get_num_threads()
    try:
        limit_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
