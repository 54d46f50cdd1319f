"""The benchmark of maps that are made of echoes, as far as it goes without a model."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bids_dgmseg.image.volume import Volume

FOLDER = Path(__file__).parents[2] / "benchmarks"
CAUDATE, WHITE = 11, 22


@pytest.fixture
def reconstruction(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("reconstruction")


def test_a_nucleus_stands_out_from_what_lies_around_it_within_4_mm(reconstruction):
    truth = np.full((24, 24, 24), WHITE, np.uint8)
    truth[10:14, 10:14, 10:14] = CAUDATE
    chi = np.where(truth == CAUDATE, 0.07, -0.03)
    chi[:4] = 5.0  # 6 mm away
    other = np.where(truth == CAUDATE, 0.05, -0.01)
    (contrast,) = reconstruction.contrasts_ppm(Volume(truth, np.eye(4)), (chi, other))
    assert contrast == pytest.approx((0.10, 0.06))


def test_a_nucleus_at_the_rim_of_the_head_has_no_contrast(reconstruction):
    truth = np.zeros((24, 24, 24), np.uint8)
    truth[10:14, 10:14, 10:14] = CAUDATE
    truth[10:14, 10:14, 14:18] = WHITE
    assert list(reconstruction.contrasts_ppm(Volume(truth, np.eye(4)), (truth,))) == []


def test_one_way_takes_the_last_echo_alone_and_one_the_true_mask(reconstruction):
    stacked = torch.arange(3.0).view(3, 1, 1, 1)
    echoes = SimpleNamespace(phase=stacked, magnitude=10 + stacked, echo_times_s=(0.01, 0.02, 0.03), b0_tesla=3.0)
    last = reconstruction.WAYS["the last echo alone"](echoes, None)
    assert (last["phase"].item(), last["magnitude"].item(), last["echo_times_s"]) == (2.0, 12.0, [0.03])
    brain = np.ones((1, 1, 1), bool)
    masked = reconstruction.WAYS["with the true mask of the brain"](echoes, brain)
    assert masked["mask"] is brain
    assert len(masked["phase"]) == 3


def test_the_table_has_means_of_the_heads(reconstruction):
    rows = [
        {
            "head": n,
            "way": "x",
            "correlation": 0.8 + 0.2 * n,
            "slope": 0.7 + 0.2 * n,
            "largest_error_ppm": 0.01,
            "dice": 0.9,
            "seconds": 3.0 + n,
        }
        for n in (0, 1)
    ]
    assert reconstruction.as_markdown(pd.DataFrame(rows)).splitlines()[-1] == (
        "| x | 0.900 | 0.80 | 0.010 | 0.900 | 4 |"
    )
