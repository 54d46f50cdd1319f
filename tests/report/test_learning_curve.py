import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from bids_dgmseg.report import learning_curve as learning
from bids_dgmseg.report.learning_curve import draw_curve

HEADER = "step\tseconds\tloss\tDN_L\tDN_R\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "segmenter_curve.tsv"
    path.write_text(HEADER + "50\t9\t2.0\t0.25\tnan\n100\t18\t1.5\t0.5\t0.75\n")
    return path


def test_a_curve_lies_as_a_picture_beside_its_table(table):
    picture = draw_curve(table)
    assert picture is not None
    assert picture == table.with_name("segmenter_curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in table.parent.iterdir()) == ["segmenter_curve.png", "segmenter_curve.tsv"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of their files."""
    kept: list[Figure] = []

    def keep(figure):
        kept.append(figure)
        return b""

    monkeypatch.setattr(learning, "to_png", keep)
    return kept


def test_its_lines_are_the_table_s_columns_at_their_steps(table, figures):
    draw_curve(table)
    left, right = figures[0].axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in (*left.lines, *right.lines)}
    assert lines["training"] == [[50, 2.0], [100, 1.5]]
    assert lines["DN_L"] == [[50, 0.25], [100, 0.5]]
    assert lines["DN_R"][1] == [100, 0.75]
    assert math.isnan(lines["DN_R"][0][1])  # a nucleus that no map showed
    assert left.get_xlabel() == "step"


def test_dots_are_the_dice_of_the_fixed_maps(table, figures):
    table.with_name("segmenter_validation.tsv").write_text("step\tDN_L\tDN_R\n60\t0.4\t0.5\n100\t0.6\t0.7\n")
    draw_curve(table)
    _, right = figures[0].axes
    dots = [np.asarray(line.get_xydata()).tolist() for line in right.lines if line.get_marker() == "o"]
    assert dots == [[[60, 0.4], [100, 0.6]], [[60, 0.5], [100, 0.7]]]
    assert right.get_ylabel().endswith("(dots: fixed maps)")


def test_a_table_without_a_row_is_not_drawn(tmp_path):
    (tmp_path / "segmenter_curve.tsv").write_text(HEADER)
    assert draw_curve(tmp_path / "segmenter_curve.tsv") is None
    assert not (tmp_path / "segmenter_curve.png").exists()
