"""Plots of losses and Dice over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bids_dgmseg.io.files import read_tsv, write_bytes
from bids_dgmseg.models.structures import color_of
from bids_dgmseg.report.figures import DPI, INK, SOFT, TEXT, WIDTH_IN, style_axes, to_png, with_default_settings


def write_learning_curve(table: Path) -> Path | None:
    """Plot ``PART_curve.tsv`` of a training that counts steps, beside the table.

    The Dice of the averaged weights on fixed maps is added as dots if there is a ``PART_validation.tsv``.

    Returns
    -------
    path or None
        ``PART_curve.png``; None if the table has no rows yet.
    """
    part = table.stem.removesuffix("_curve")
    fixed = table.with_name(f"{part}_validation.tsv")
    curves, *others = (
        read_tsv(path, index_col="step").drop(columns="seconds", errors="ignore").astype(float)
        for path in ([table, fixed] if fixed.is_file() else [table])
    )
    if curves.empty:
        return None
    validation = others[0] if others else None
    losses = {"training": curves.pop("loss").tolist()}
    png = draw_learning_curve(
        losses,
        {str(name): curves[name].tolist() for name in curves},
        best=None,
        title=part,
        x=("step", curves.index.tolist()),
        validation=validation,
        samples="training maps" + ("" if validation is None else " (dots: fixed maps)"),
    )
    return write_bytes(png, table.with_suffix(".png"))


@with_default_settings
def draw_learning_curve(
    loss: Mapping[str, Sequence[float]],
    dice: Mapping[str, Sequence[float]],
    *,
    best: int | None,
    title: str,
    x: tuple[str, Sequence[int]] | None = None,
    samples: str = "validation samples",
    validation: pd.DataFrame | None = None,
) -> bytes:
    """Plot losses, and the Dice of each class, over a training as a PNG.

    Parameters
    ----------
    loss, dice : mapping of str to sequence of float
        Name of the curve or class → values; NaN is not drawn.
    best : int or None
        Epoch, from 1, whose weights are kept.
    title : str
        Title of the figure.
    x : tuple of str and sequence of int, optional
        Label and values of the horizontal axis; by default epochs from 1.
    samples : str
        Samples whose Dice it is.
    validation : DataFrame, optional
        Dice on other samples, drawn as dots: one column per class, indexed like `x`.
    """
    unit, steps = x or ("epoch", range(1, 1 + len(next(iter(loss.values())))))
    figure = Figure(figsize=(WIDTH_IN, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for (name, values), line in zip(loss.items(), ("-", "--", ":"), strict=False):
        left.plot(steps, values, color=INK, linewidth=1.3, linestyle=line, label=name)
    for name, values in dice.items():
        right.plot(steps, values, color=_class_colour(name), linewidth=1.3, label=name)
    if validation is not None:
        for name in map(str, validation):
            dots = {"color": _class_colour(name), "linestyle": "", "marker": "o", "markersize": 3}
            right.plot(validation.index, validation[name], **dots)
    right.set_ylim(-0.03, 1.03)
    for axes, label in ((left, "loss"), (right, f"Dice of {samples}")):
        if best is not None:
            axes.axvline(best, color=SOFT, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(unit, color=INK, fontsize=8, **TEXT)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.legend(fontsize=7, frameon=False, ncols=2)
        style_axes(axes)
    return to_png(figure)


def _class_colour(name: str) -> str:
    """Return the colour of a class, which may have no side, such as ``DN`` or ``CN-PUT``."""
    return color_of(name if "_" in name else f"{name.split('-')[0]}_L")
