"""Figures of the group page with their captions and alternative texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from bids_dgmseg.io.files import MISSING
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.figures import (
    GROUP_COLOURS,
    INK,
    MAX_LEVELS,
    PRINT_DPI,
    Band,
    Panel,
    Sample,
    draw_boxes,
    draw_panels,
    group_colour,
    shorten_labels,
)
from bids_dgmseg.report.group_data import SCAN_KEYS, GroupData
from bids_dgmseg.report.group_tables import TEXTS
from bids_dgmseg.report.html import (
    SCREEN_DPI,
    PlotFile,
    format_number,
    format_p,
    natural_key,
    quantity,
    save_plot,
    slug,
)
from bids_dgmseg.study.reliability import detectable_difference
from bids_dgmseg.study.study import ResultTable, mean_of_sides

FOLDER = "group/figures"

_RECOVERED = ("recovered_ppb", "recovered_percent")

_ENLARGED = 1.6
"""Size on the page of figures for print, in their size in print."""


@dataclass(frozen=True)
class PageFigure:
    """A plot with its texts."""

    plot: PlotFile
    measure: str
    title: str
    alt: str
    caption: str


@dataclass(frozen=True)
class GroupFigures:
    """Figures of a study, written to ``group/figures/`` of the output folder.

    With several models, the model is in the names and titles.
    """

    data: GroupData
    out_dir: Path

    def sites(self) -> Iterator[PageFigure]:
        """Draw each measure by site, beside the values harmonized over sites, and what proofs recovered, per model."""
        levels = sorted(self.data.levels("site")[:MAX_LEVELS], key=natural_key)
        measures = [*self.data.drawn * (len(levels) > 1), *_RECOVERED[: int(_RECOVERED[0] in self.data.stats)]]
        for model, measure in product(self.data.models, measures) if levels else ():
            rows, keys = self.data.used[self.data.used["model"] == model], [*SCAN_KEYS, "abbreviation"]
            harmonized = _select(self.data.tables.get("group_harmonized"), measure=measure, model=model)
            columns = [measure, *(["harmonized"] if len(harmonized) else [])]
            kind, ends, texts = "sites", ("", ", harmonized"), {"measure": measure}
            if measure in _RECOVERED:
                columns, kind, ends = [*_RECOVERED], "proof", (", susceptibility", ", volume")
                texts["label"] = "recovered of 10 (ppb, %)"
            rows = rows.join(harmonized.set_index(keys)["harmonized"], on=keys) if len(harmonized) else rows
            scans, shown = mean_of_sides(rows, columns, SCAN_KEYS), quantity(measure)
            people = scans.groupby(["site", "person", "abbreviation"], sort=False)[columns].mean().reset_index()
            panels = {
                nucleus: [
                    Sample(values[column].to_numpy(float) * shown.factor, colour, column == columns[-1])
                    for level, colour in zip(levels, 2 * GROUP_COLOURS, strict=False)
                    for values in [people[(people["abbreviation"] == nucleus) & (people["site"] == level)]]
                    for column in columns
                ]
                for nucleus in _nuclei(people)
            }
            labels = [f"{level}{end}" for level in shorten_labels(levels) for end in ends[: len(columns)]]
            filled = "; filled: harmonized over sites (ComBat), for plots and norms, tests use raw values"
            texts["harmonized"] = filled * bool(len(harmonized))
            yield self._save_boxes(panels, labels, f"{measure}_by-site", model, kind, **texts)

    def differences(self) -> Iterator[PageFigure]:
        """Draw the adjusted values that the groups are compared by, per measure and model."""
        name = "group_difference_values"
        values = self.data.tables.get(name)
        for model, measure in product(self.data.models, self.data.drawn):
            rows = _select(values, measure=measure, model=model)
            if values is None or rows.empty:
                continue
            shown, groups = quantity(measure), [name for name in self.groups if (rows["group"] == name).any()]
            panels = {
                nucleus: [
                    Sample(part.loc[part["group"] == group, "value_adjusted"].to_numpy(float) * shown.factor, colour)
                    for group, colour in ((group, group_colour(self.groups, group)) for group in groups)
                ]
                for nucleus in _nuclei(rows)
                for part in [rows[rows["abbreviation"] == nucleus]]
            }
            sizes = rows.groupby("group")["participant_id"].nunique()
            labels = [
                f"{label} (n {sizes[group]})" for label, group in zip(shorten_labels(groups), groups, strict=True)
            ]
            name, texts = f"{measure}_by-group", {"covariates": covariates_of(values)}
            yield self._save_boxes(panels, labels, name, model, "differences", measure=measure, **texts)

    def ageing(self) -> Iterator[PageFigure]:
        """Draw both age curves of each measure and model, of the controls, the reference group or all."""
        fits, curves, values = (self.data.tables.get(f"group_ageing{end}") for end in ("", "_curves", "_values"))
        if fits is None or fits.rows.empty or curves is None or values is None:
            return
        scans = fits.rows["scans"].iloc[0]
        for measure, model in product(self.data.drawn, self.data.models):
            keys = {"measure": measure, "model": model, "scans": scans}
            lines, points, results = (_select(table, **keys) for table in (curves, values, fits))
            if lines.empty:
                continue
            shown, panels = quantity(measure), []
            for nucleus in _nuclei(lines):
                bands, best = [], ""
                for record in results[results["abbreviation"] == nucleus].to_dict("records"):
                    line = lines[(lines["abbreviation"] == nucleus) & (lines["curve"] == record["curve"])]
                    if line.empty:
                        continue
                    fit, low, high = (shown.factor * line[column].to_numpy(float) for column in ("fit", "low", "high"))
                    band = Band(line["age"].to_numpy(float), fit, style="--")
                    if record["best"]:
                        best, band = str(record["curve"]), band._replace(low=low, high=high, style="-")
                    bands.append(band)
                other = results[(results["abbreviation"] == nucleus) & (results["curve"] != best)]["delta_aicc"].max()
                text = f"{best}, ΔAICc {format_number(other, 1)}" if np.isfinite(other) else best
                part = points[points["abbreviation"] == nucleus]
                part = part.assign(x=part["age"], y=part["value_adjusted"] * shown.factor, group=MISSING)
                panels.append(Panel(nucleus, part, bands, text))
            drawing = draw_panels(panels, xlabel="age (years)", ylabel=shown.label)
            texts = {"scans": scans, "covariates": covariates_of(fits)}
            yield self._save(drawing, f"{measure}_age", model, "ageing", measure=measure, **texts)

    def changes(self) -> Iterator[PageFigure]:
        """Draw the values of each person with repeated scans over time, with the mean change of each group."""
        if "years_since_first" not in self.data.stats:
            return
        used = self.data.used
        used = used.assign(x=pd.to_numeric(used["years_since_first"], errors="coerce")).dropna(subset=["x"])
        people = used.groupby("person")
        used = used[(people["x"].transform("nunique") > 1) & (people["site"].transform("nunique") == 1)]
        used = mean_of_sides(used, self.data.drawn, SCAN_KEYS)
        for model, measure in product(self.data.models, self.data.drawn):
            rows = used[used["model"] == model]
            if rows.empty:
                continue
            label, factor = quantity(measure).label, quantity(measure).factor
            estimates = _select(self.data.tables.get("group_change"), measure=measure, model=model)
            panels = []
            for name in _nuclei(rows):
                points = rows[rows["abbreviation"] == name].sort_values("x", kind="stable")
                points = points.assign(y=points[measure] * factor, group=points.get("group", MISSING))
                panels.append(Panel(name, points, self._mean_changes(estimates, name, points, factor)))
            drawing = draw_panels(
                panels, xlabel="years since the first scan", ylabel=label, groups=self.groups, joined=True
            )
            n = str(rows["person"].nunique())
            yield self._save(drawing, f"{measure}_change", model, "changes", measure=measure, n=n)

    def correlations(self) -> Iterator[PageFigure]:
        """Draw the adjusted values over each clinical variable with the regression line."""
        relations, values = (self.data.tables.get(name) for name in ("group_correlations", "group_correlation_values"))
        if relations is None or values is None or values.rows.empty or "variable" not in values.rows:
            return
        shown = values.rows[values.rows["measure"].isin(self.data.drawn)]
        for (variable, model, measure), rows in shown.groupby(["variable", "model", "measure"], sort=False):
            name, unit, _, factor = quantity(str(measure))
            of_variable = _select(relations, variable=variable, model=model, measure=measure)
            results = of_variable.set_index("abbreviation").to_dict("index")
            rows = rows.assign(y=rows["value_adjusted"] * factor, group=rows["group"].astype(object).fillna(MISSING))
            panels = []
            for nucleus in _nuclei(rows):
                points, result = rows[rows["abbreviation"] == nucleus], results[nucleus]
                text = f"r {format_number(result['r'], 2)}, p {format_p(float(result['p']))}"
                bands = [_regression(points, result["slope"] * factor, result["t"], result["df"])]
                panels.append(Panel(nucleus, points, bands, text))
            label = f"{name}\nadjusted ({unit})"
            strongest = of_variable.sort_values("r", key=abs, na_position="first").iloc[-1]
            texts: Any = {"variable": str(variable), "covariates": covariates_of(relations)}
            texts |= {"nucleus": strongest["abbreviation"], "r": format_number(strongest["r"], 2)}
            drawing = draw_panels(panels, xlabel=str(variable), ylabel=label, groups=self.groups)
            name = f"{measure}_variable_{variable}"
            yield self._save(drawing, name, str(model), "correlations", measure=str(measure), **texts)

    def planning(self) -> Iterator[PageFigure]:
        """Draw the difference that participants per group can find over their number, per measure and model."""
        sizes = np.geomspace(5, 500, 60)
        for model, measure in product(self.data.models, self.data.drawn):
            rows, shown = _select(self.data.tables.get("group_power"), measure=measure, model=model), quantity(measure)
            rows = rows.drop_duplicates("abbreviation") if len(rows) else rows
            panels = []
            for row in rows.to_dict("records"):
                band = Band(sizes, shown.factor * detectable_difference(sizes, row["between_sd"]))
                now = {"x": [row["n_now"]], "y": [shown.factor * row["detectable_now"]], "group": [MISSING]}
                text = f"n {row['n_now']:.0f}: {format_number(now['y'][0], shown.digits)} {shown.unit}"
                panels.append(Panel(str(row["abbreviation"]), pd.DataFrame(now), [band], text))
            if panels:
                label = f"difference ({shown.unit})"
                drawing = draw_panels(panels, xlabel="participants per group", ylabel=label, logarithmic=True)
                yield self._save(drawing, f"{measure}_power", model, "planning", measure=measure)

    @property
    def groups(self) -> list[str]:
        """Groups with colours, if there are several."""
        levels = self.data.levels("group")
        return levels if len(levels) > 1 else []

    def _save_boxes(
        self, panels: Mapping[str, Sequence[Sample]], labels: Sequence[str], *names: str, measure: str, **texts: str
    ) -> PageFigure:
        label = texts.get("label") or "adjusted " * ("covariates" in texts) + quantity(measure).label
        png, pdf = draw_boxes(panels, labels=labels, ylabel=label)
        return self._save(png, *names, pdf=pdf, measure=measure, **texts)

    def _save(
        self, png: bytes, name: str, model: str, kind: str, *, measure: str, pdf: bytes = b"", **texts: str
    ) -> PageFigure:
        several, shown = len(self.data.models) > 1, quantity(measure).name
        name = slug(f"group_{name}{f'_{model}' * several}")
        dpi = PRINT_DPI / _ENLARGED if pdf else SCREEN_DPI
        plot = save_plot(png, self.out_dir, name, folder=FOLDER, dpi=dpi, pdf=pdf)
        title, alt, caption = (text.format(measure=shown, **texts) for text in TEXTS["figures"][kind].values())
        return PageFigure(plot, measure, f"{title[0].upper()}{title[1:]}{f', {model}' * several}", alt, caption)

    def _mean_changes(self, estimates: pd.DataFrame, name: str, points: pd.DataFrame, factor: float) -> list[Band]:
        """Return the lines with the estimated change of each group, or of all if there are no groups."""
        bands: list[Band] = []
        for row in estimates.to_dict("records"):
            group, change = row.get("group"), float(row.get("change_per_year", np.nan))
            of_group = points[points["group"] == group] if group in self.groups else points
            if row["abbreviation"] == name and np.isfinite(change) and len(of_group) > 1:
                x = np.array([of_group["x"].min(), of_group["x"].max()])
                y = of_group["y"].mean() + factor * change * (x - of_group["x"].mean())
                colour = group_colour(self.groups, str(group)) if group in self.groups else INK
                bands.append(Band(x, y, colour=colour, width=3))
        return bands


def _regression(points: pd.DataFrame, slope: float, t: float, df: float) -> Band:
    """Return the regression line through adjusted values, with the confidence band of its mean."""
    x, y = points["x"].to_numpy(float), points["y"].to_numpy(float)
    at = np.linspace(x.min(), x.max(), 60)
    line = y.mean() + slope * (at - x.mean())
    residuals = y - y.mean() - slope * (x - x.mean())
    error = slope / t if t else 0.0
    half = student.ppf(0.975, df) * np.sqrt(residuals.var(ddof=2) / len(y) + error**2 * (at - x.mean()) ** 2)
    return Band(at, line, line - half, line + half)


def covariates_of(table: ResultTable) -> str:
    """Return the names of the covariates."""
    return ", ".join(table.facts.get("Covariates") or []) or "nothing"


def _nuclei(rows: pd.DataFrame) -> list[str]:
    """Return the abbreviations in a table, in the order of structures.tsv."""
    names = dict.fromkeys(name for row in ALL_STRUCTURES for name in (row.nucleus, row.abbreviation))
    present = set(rows["abbreviation"])
    return [name for name in names if name in present]


def _select(table: ResultTable | None, **values: Any) -> pd.DataFrame:
    """Return the rows that have these values; none if the table lacks a column."""
    if table is None or not {*values} <= set(table.rows):
        return pd.DataFrame()
    return table.rows[np.logical_and.reduce([table.rows[column] == value for column, value in values.items()])]
