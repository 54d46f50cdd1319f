"""Labels, boxes, asymmetry and learning curves, read from the figure before it becomes a PNG."""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.evaluate import page
from bids_dgmseg.lab.train import frame
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report import figures
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.report.scan_figures import write_viewer
from bids_dgmseg.stats.agreement import agree

LOUD: Any = {
    **{"axes.facecolor": "yellow", "axes.grid": True, "axes.unicode_minus": False, "figure.facecolor": "red"},
    **{"font.size": 20, "image.cmap": "jet", "image.interpolation": "bicubic", "image.origin": "lower"},
    **{"lines.linewidth": 9, "lines.antialiased": False, "path.sketch": (1, 100, 2), "xtick.major.size": 20},
}
SCANS = pd.DataFrame({"abbreviation": "DN_L", "r1": range(6), "r2": range(6)})
AGREEMENT = pd.DataFrame(
    [{"abbreviation": "DN_L", "reference": "r1", "prediction": "r2", **agree(*[np.arange(6.0)] * 2)}]
)
SAMPLES = {"DN": [figures.Sample(np.linspace(0.1, 0.2, 6), "#1f77b4"), figures.Sample(np.ones(3), "#e6842a", False)]}
CHI = Volume(np.linspace(-0.1, 0.2, 4096, dtype=np.float32).reshape(16, 16, 16), np.eye(4))
LABELS = CHI.with_array(np.pad(np.ones((4, 4, 4), np.uint8), 6))
FIGURES = {
    "boxes": lambda _: figures.draw_boxes(SAMPLES, ylabel="mean", labels=["A", "B"]),
    "agreement": lambda _: figures.draw_agreement(SCANS, AGREEMENT, title="a", unit="ppm"),
    "mosaic": lambda out: draw_mosaic(CHI, LABELS, out, plane="axial", structures=STRUCTURES[:1]).read_bytes(),
    "viewer": lambda out: write_viewer(CHI, LABELS, out, structures=STRUCTURES[:2], scan="a", model="b").read_bytes(),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_do_not_depend_on_settings(name, tmp_path):
    """A matplotlibrc, or a theme of another library, changes no figure."""
    usual = FIGURES[name](tmp_path / "usual")
    with matplotlib.rc_context(LOUD):
        assert FIGURES[name](tmp_path / "loud") == usual
        assert matplotlib.rcParams["font.size"] == 20


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures that were drawn."""
    kept: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        kept.append(figure)
        return b""

    for module in (page, figures, frame):
        monkeypatch.setattr(module, "to_png", keep)
    return kept


def test_boxes_are_quartiles(drawn):
    values = pd.DataFrame({"abbreviation": "DN_L", "model": "a", "dice": [0.5, 0.6, 0.7, 0.8, 0.9, 0.1]})
    values = values.assign(hd95_mm=1.0, mean_surface_distance_mm=1.0, centre_distance_mm=1.0)
    page.draw_overlap(values, title="a")
    heights = {round(float(y), 4) for line in drawn[0].axes[0].lines for y in np.asarray(line.get_ydata())}
    # Quartiles at the ranks 2.25, 3.5 and 4.75; 0.1 is more than 1.5 · 0.25 below the lower one.
    assert heights == {0.5, 0.525, 0.65, 0.775, 0.9}


def test_learning_curve_shows_columns_over_steps(drawn):
    rows = [
        {"step": 50, "loss": 2.0, "DN_L": 0.25, "DN_R": math.nan},
        {"step": 100, "loss": 1.5, "DN_L": 0.5, "DN_R": 0.75},
    ]
    frame.draw_curve(rows, ["DN_L", "DN_R"], best=None, title="segmenter")
    left, right = drawn[0].axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in (*left.lines, *right.lines)}
    assert lines["loss"].tolist() == [[50, 2.0], [100, 1.5]]
    assert lines["DN_L"].tolist() == [[50, 0.25], [100, 0.5]]
    np.testing.assert_equal(lines["DN_R"], [[50, math.nan], [100, 0.75]])
    assert left.get_xlabel() == "step"
