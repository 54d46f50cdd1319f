"""Small runs of the simulations of the group statistics; all designs are in the benchmark."""

import numpy as np
import pytest


@pytest.fixture
def statistics(script):
    return script("group_statistics")


def test_groups_keep_their_level(statistics, monkeypatch):
    """Of 150 studies without an effect, 5 % have p < 0.05: 99.9 % of samples have at most 11.4 %."""
    name = "45, 15 of twice the SD"
    monkeypatch.setattr(statistics, "GROUPS", {name: statistics.GROUPS[name]})
    (row,) = statistics.differences(150, np.random.default_rng(7))
    assert row["HC3"] < 11.4 < row["equal variances"] + 2  # why variances must not be pooled: 14 %
    for row in statistics.correlations(150, np.random.default_rng(7)):
        assert row["p < 0.05 (%)"] < 11.4
        assert row["coverage of r (%)"] > 88.6


def test_limits_of_age_curves_hold(statistics, monkeypatch):
    """Of 40 cohorts, 93 % hold: 99.9 % of samples have at least 78 %."""
    monkeypatch.setattr(statistics, "DESIGNS", {"60 at three sites": ([30, 20, 10], 10)})
    for row in statistics.ageing(40, np.random.default_rng(7)):
        assert min(map(int, row["coverage at 30, 45, 60, 75 years (%)"].split(", "))) >= 78


def test_norms_and_residuals_warn_when_they_fail(statistics, monkeypatch):
    monkeypatch.setattr(statistics, "NORMS", ((12, 1), (100, 1), (100, 3)))
    few, many, growing = statistics.norms(30, np.random.default_rng(7))
    assert 2 < few["controls beyond ±1.96 (%)"] < 9  # of 360 values
    assert many["growth noticed, per nucleus (%)"] < 10 < 70 < growing["growth noticed, per nucleus (%)"]
    rows = {
        (row["spread"], row["HC, PD"]): row["warned (%)"] for row in statistics.residuals(2, np.random.default_rng(7))
    }
    assert rows["group of twice the SD", "30, 30"] == 100
