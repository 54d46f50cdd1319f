"""Helpers shared by the benchmarks: Markdown tables, and time and memory of a command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

_RUN = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6, done.returncode, done.stderr[-2000:]]))
"""


def markdown(table: pd.DataFrame, digits: int | Mapping[str, int] = 3) -> str:
    """Format a table as Markdown; the index becomes the first column if it has a name.

    Parameters
    ----------
    table : DataFrame
        Text, integers and floats; missing values become an en dash.
    digits : int or mapping of str to int
        Decimals of floats, for all columns or per column; 3 for columns not listed.
    """
    shown = table if table.index.name is None else table.reset_index()
    lines = ["| " + " | ".join(map(str, shown.columns)) + " |", "| --- " * len(shown.columns) + "|"]
    for row in shown.itertuples(index=False):
        decimals = [digits if isinstance(digits, int) else digits.get(str(name), 3) for name in shown.columns]
        lines.append("| " + " | ".join(map(_format_cell, row, decimals)) + " |")
    return "\n".join(lines)


def _format_cell(value: Any, decimals: int) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "–"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def dice_by_nucleus(scores: pd.DataFrame, rows: str | list[str]) -> pd.DataFrame:
    """Average Dice over left and right (and scans): one row per value of `rows`, one column per nucleus, and the mean.

    Parameters
    ----------
    scores : DataFrame
        Columns ``abbreviation``, ``dice`` and `rows`.
    rows : str or list of str
        Columns that become the index.
    """
    nuclei = scores.assign(nucleus=scores["abbreviation"].str.split("_").str[0])
    wide = nuclei.pivot_table(index=rows, columns="nucleus", values="dice", aggfunc="mean", sort=False)
    wide.columns.name = None
    wide["mean"] = wide.mean(axis=1)
    return wide


@dataclass(frozen=True)
class Usage:
    """Resources that a command used."""

    seconds: float
    cpu_seconds: float
    peak_gb: float
    """Of its largest process."""


def measure(command: Sequence[str]) -> Usage:
    """Run a command from a separate process, whose only child it is, and measure it; exit if it fails."""
    done = subprocess.run([sys.executable, "-c", _RUN, *command], capture_output=True, text=True, check=True)
    seconds, cpu_seconds, peak_gb, code, error = json.loads(done.stdout)
    if code:
        sys.exit(f"{command[0]}: exit code {code}\n{error}")
    return Usage(seconds, cpu_seconds, peak_gb)
