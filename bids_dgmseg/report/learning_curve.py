"""The learning curve of a training as a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.report.drawing import DPI, INK, SOFT, TEXT, WIDTH_IN, colour_of, plain, to_png


def draw_curve(table: Path) -> Path | None:
    """Draw the curve of a training that counts steps beside its table, ``PART_curve.tsv``.

    Where ``PART_validation.tsv`` lies there too, the Dice of the averaged weights are dots.

    Returns
    -------
    path or None
        ``PART_curve.png``; None where the table has no row yet.
    """
    steps, curves = _read(table)
    if not steps:
        return None
    part = table.stem.removesuffix("_curve")
    loss = {"training": curves.pop("loss")}
    fixed = table.with_name(f"{part}_validation.tsv")
    checked = _read(fixed) if fixed.is_file() else None
    picture = draw_learning(
        loss,
        curves,
        best=None,
        title=part,
        places=("step", steps),
        checked=checked,
        samples="the maps learned from" + (" (dots: fixed maps)" if checked else ""),
    )
    return write_bytes(picture, table.with_suffix(".png"))


def _read(table: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Read the steps of a table, and its columns but the seconds."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "seconds")]
    return [int(row["step"]) for row in rows], {name: [float(row[name]) for row in rows] for name in names}


def draw_learning(
    loss: Mapping[str, Sequence[float]],
    dice: Mapping[str, Sequence[float]],
    *,
    best: int | None,
    title: str,
    places: tuple[str, Sequence[int]] | None = None,
    samples: str = "the validation samples",
    checked: tuple[Sequence[int], Mapping[str, Sequence[float]]] | None = None,
) -> bytes:
    """Draw the losses and the Dice of each class over a training, as a PNG.

    Parameters
    ----------
    loss : mapping of str to sequence of float
        Name of a curve → its values; NaN is not drawn.
    dice : mapping of str to sequence of float
        Class → as many values.
    best : int or None
        Epoch, counted from 1, whose weights are kept.
    title : str
        Printed above.
    places : tuple of str and sequence of int, optional
        What is counted, and where each value lies; by default epochs, one a value.
    samples : str
        Whose Dice it is.
    checked : tuple of sequence of int and mapping of str to sequence of float, optional
        Places and the Dice of each class there on other samples: dots.
    """
    unit, at = places or ("epoch", range(1, 1 + len(next(iter(loss.values())))))
    figure = Figure(figsize=(WIDTH_IN, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for (name, values), style in zip(loss.items(), ("-", "--", ":"), strict=False):
        left.plot(at, values, color=INK, linewidth=1.3, linestyle=style, label=name)
    for name, values in dice.items():
        right.plot(at, values, color=_colour(name), linewidth=1.3, label=name)
    where, others = checked or ((), {})
    for name, values in others.items():
        right.plot(where, values, color=_colour(name), linestyle="", marker="o", markersize=3)
    right.set_ylim(-0.03, 1.03)
    for axes, label in ((left, "loss"), (right, f"Dice of {samples}")):
        if best is not None:
            axes.axvline(best, color=SOFT, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(unit, color=INK, fontsize=8, **TEXT)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.legend(fontsize=7, frameon=False, ncols=2)
        plain(axes)
    return to_png(figure)


def _colour(name: str) -> str:
    return colour_of(name if "_" in name else f"{name.split('-')[0]}_L")
