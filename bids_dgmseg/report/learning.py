"""The learning curve of a training as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bids_dgmseg.report.drawing import DPI, INK, SOFT, TEXT, WIDTH_IN, colour_of, plain, to_png


def draw_learning(
    loss: Mapping[str, Sequence[float]], dice: Mapping[str, Sequence[float]], *, best: int | None, title: str
) -> bytes:
    """Draw the losses and the Dice of each class over the epochs, as a PNG.

    Parameters
    ----------
    loss : mapping of str to sequence of float
        Name of a curve → a value an epoch; NaN is not drawn.
    dice : mapping of str to sequence of float
        Class → a value an epoch.
    best : int or None
        Epoch, counted from 1, whose weights are kept.
    title : str
        Printed above.
    """
    figure = Figure(figsize=(WIDTH_IN, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for (name, values), style in zip(loss.items(), ("-", "--", ":"), strict=False):
        left.plot(range(1, len(values) + 1), values, color=INK, linewidth=1.3, linestyle=style, label=name)
    for name, values in dice.items():
        colour = colour_of(name if "_" in name else f"{name.split('-')[0]}_L")
        right.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.3, label=name)
    right.set_ylim(-0.03, 1.03)
    for axes, label in ((left, "loss"), (right, "Dice of the validation samples")):
        if best is not None:
            axes.axvline(best, color=SOFT, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch", color=INK, fontsize=8, **TEXT)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.legend(fontsize=7, frameon=False, ncols=2)
        plain(axes)
    return to_png(figure)
