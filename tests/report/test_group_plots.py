"""What the plots of a cohort show, read from the figure before it becomes a PNG."""

import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from bids_dgmseg.report import group_plots


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures that were drawn."""
    figures: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(group_plots, "to_png", keep)
    return figures


def test_tick_labels_of_many_sites_with_long_names_are_unique(drawn):
    levels = [f"University Hospital of Town {number:02}, scanner A" for number in range(12)]
    values = pd.DataFrame({"scan": levels, "nucleus": "DN", "side": "L", "site": levels, "mean_ppm": range(12)})
    group_plots.draw_violins(values, measure="mean_ppm", levels=levels, factor="site")
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert labels == [f"{number:02}\nn 1" for number in range(12)]


@pytest.mark.parametrize("level", ["A\0B", "\u7d44"])
def test_what_the_font_lacks_is_drawn_without_a_warning(level):
    values = pd.DataFrame({"scan": ["x"], "nucleus": "DN", "side": "L", "group": [level], "mean_ppm": [0.1]})
    assert group_plots.draw_violins(values, measure="mean_ppm", levels=[level], factor="group").startswith(b"\x89PNG")


def test_a_violin_is_the_density_of_all_values_not_of_the_points_drawn(drawn, monkeypatch):
    sizes = []

    def count(values):
        sizes.append(len(values))
        return gaussian_kde(values)

    monkeypatch.setattr(group_plots, "gaussian_kde", count)
    n = 2 * group_plots.N_POINTS
    values = pd.DataFrame({"scan": range(n), "nucleus": "DN", "side": "L", "mean_ppm": range(n)})
    group_plots.draw_violins(values, measure="mean_ppm", levels=["all"], factor=None)
    assert sizes == [n]


@pytest.mark.parametrize("asymmetry", [0.3, -0.3], ids=["left larger", "right larger"])
def test_the_zero_line_strikes_neither_word_of_an_asymmetry(drawn, asymmetry):
    values = pd.DataFrame({"nucleus": "DN", "measure": "mean_ppm", "asymmetry": [asymmetry, 1.2 * asymmetry]})
    group_plots.draw_asymmetry(values, measures=["mean_ppm"])
    low, high = drawn[0].axes[0].get_ylim()
    words = 0.02 + 9 / 72 / (3.2 * 0.8)  # share of the height: 9 points, 2 % from the end, in 80 % of 3.2 inches
    assert words < -low / (high - low) < 1 - words
