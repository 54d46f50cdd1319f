"""Figures of the group page with their captions and alternative texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.figures import (
    INK,
    MAX_LEVELS,
    Band,
    Panel,
    draw_panels,
    draw_violins,
    group_colour,
)
from bids_dgmseg.report.group_data import GroupData, is_true
from bids_dgmseg.report.html import (
    NO_VALUE,
    PlotFile,
    format_number,
    format_p,
    natural_key,
    quantity,
    save_plot,
    slug,
)
from bids_dgmseg.study.study import ResultTable

FOLDER = "group/figures"


@dataclass(frozen=True)
class PageFigure:
    """A plot with its texts."""

    plot: PlotFile
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

    def violins(self, factor: str) -> Iterator[PageFigure]:
        """Draw each measure by site or group, if there are several, or over all ``scans``, per model.

        For sites, harmonized values are drawn beside them, if there are any.
        """
        stats, levels = self.data.used, self.data.levels(factor)
        if factor == "scans":
            stats, levels = stats.assign(scans="all"), ["all"]
        elif len(levels) < 2:
            return
        shown, by = (
            sorted(levels[:MAX_LEVELS], key=natural_key),
            f"by {factor}" if len(levels) > 1 else "over all scans",
        )
        for model, measure in product(self.data.models, self.data.quantities):
            rows, harmonized = stats[stats["model"] == model], self._harmonized_rows(measure, model)
            is_harmonized, name = factor == "site" and len(harmonized) > 0, quantity(measure).name
            drawing = draw_violins(
                rows,
                measure=measure,
                levels=shown,
                factor=factor,
                harmonized=harmonized if is_harmonized else None,
            )
            yield self._save(
                drawing,
                f"{measure}_by-{factor}",
                model,
                title=f"{name.capitalize()} {by}" + ", raw and harmonized" * is_harmonized,
                alt=f"Violin plots of the {name} of each nucleus {by}; the left half is the patient's left.",
                caption="Left half of a violin: patient's left; right half: right. Points are scans; violins (from "
                "five values on) and medians (bars) are of participants, whose scans are averaged; n is left/right if "
                "they differ."
                + " Left panel of a nucleus: raw values; right: harmonized over sites (ComBat)." * is_harmonized
                + f" The {MAX_LEVELS} most frequent of {len(levels)} are shown." * (len(levels) > len(shown)),
            )

    def ageing(self) -> Iterator[PageFigure]:
        """Draw the age curves of each measure and model, of harmonized values if there are any."""
        curves = self._best_curves()
        if curves.empty or "age_years" not in self.data.stats:
            return
        for measure, model in product(self.data.quantities, self.data.models):
            points, prefix, name = self._harmonized_rows(measure, model), "harmonized ", f"{measure}_harmonized"
            if points.empty or not (curves["measure"] == name).any():
                points, prefix, name = self.data.used[self.data.used["model"] == model], "", measure
            rows = curves[(curves["model"] == model) & (curves["measure"] == name)]
            if rows.empty:
                continue
            about = self.data.scans.drop_duplicates("scan").set_index("scan")
            ages = pd.to_numeric(points["scan"].map(about["age_years"]), errors="coerce")
            groups = points["scan"].map(about["group"]) if "group" in about else NO_VALUE
            shown = quantity(measure)
            label, factor = shown.label, shown.factor
            points = points.assign(x=ages, y=points[measure] * factor, group=groups)
            panels = []
            for nucleus in _nuclei(rows):
                curve = rows[rows["abbreviation"] == nucleus]
                fit, low, high = (factor * curve[column].to_numpy(float) for column in ("fit", "low", "high"))
                band = Band(curve["age"].to_numpy(float), fit, low, high)
                text = ", ".join(curve["curve"].unique())
                panels.append(Panel(nucleus, points[points["abbreviation"] == nucleus], [band], text))
            fitted = str(rows["scans"].iloc[0]) if "scans" in rows else "all"
            drawing = draw_panels(panels, xlabel="age (years)", ylabel=prefix + label, groups=self.groups)
            yield self._save(
                drawing,
                f"{measure}_age{'_harmonized' * bool(prefix)}",
                model,
                title=f"{(prefix + quantity(measure).name).capitalize()} over age",
                alt=f"Scatter plots of the {prefix}{quantity(measure).name} of each nucleus over age, with a curve and "
                "its confidence band.",
                caption="Points are scans of all sites and groups."
                + " Values are harmonized over sites (ComBat)." * bool(prefix)
                + f" Curves are of the scans of {fitted}." * (fitted != "all")
                + " Curves have the lowest AICc; bands are 95 % confidence bands. _L is the patient's left.",
            )

    def changes(self) -> Iterator[PageFigure]:
        """Draw the values of each person with repeated scans over time, with the mean change of each group."""
        if "years_since_first" not in self.data.stats:
            return
        used = self.data.used
        used = used.assign(x=pd.to_numeric(used["years_since_first"], errors="coerce")).dropna(subset=["x"])
        used = used[used.groupby("person")["x"].transform("nunique") > 1]
        for model, measure in product(self.data.models, self.data.quantities):
            rows = used[used["model"] == model]
            if rows.empty:
                continue
            label, factor = quantity(measure).label, quantity(measure).factor
            estimates = _select(self.data.tables.get("group_change"), measure=measure, model=model)
            panels = []
            for name in _nuclei(rows):
                points = rows[rows["abbreviation"] == name].sort_values("x", kind="stable")
                points = points.assign(y=points[measure] * factor, group=points.get("group", NO_VALUE))
                panels.append(Panel(name, points, self._mean_changes(estimates, name, points, factor)))
            drawing = draw_panels(
                panels, xlabel="years since the first scan", ylabel=label, groups=self.groups, joined=True
            )
            yield self._save(
                drawing,
                f"{measure}_change",
                model,
                title=f"Change of {quantity(measure).name} per person",
                alt=f"Line plots of the {quantity(measure).name} of each nucleus over the years since the first scan, "
                f"one line per person with repeated scans ({rows['person'].nunique()}).",
                caption="One line per person; thick lines have the mean change per year"
                f"{' of each group' if self.groups else ''}, through the mean of the values. _L is the patient's left.",
            )

    def correlations(self) -> Iterator[PageFigure]:
        """Draw the adjusted values over each clinical variable with the regression line."""
        relations, values = (self.data.tables.get(name) for name in ("group_correlations", "group_correlation_values"))
        if relations is None or values is None or values.rows.empty or "variable" not in values.rows:
            return
        shown = values.rows[values.rows["measure"].isin(self.data.quantities)]
        for (variable, model, measure), rows in shown.groupby(["variable", "model", "measure"], sort=False):
            name, unit, _, factor = quantity(str(measure))
            of_variable = _select(relations, variable=variable, model=model, measure=measure)
            results = of_variable.set_index("abbreviation").to_dict("index")
            rows = rows.assign(y=rows["value_adjusted"] * factor, group=rows["group"].astype(object).fillna(NO_VALUE))
            panels = []
            for nucleus in _nuclei(rows):
                points, result = rows[rows["abbreviation"] == nucleus], results[nucleus]
                text = f"r {format_number(result['r'], 2)}, p {format_p(float(result['p']))}"
                bands = [_regression(points, result["slope"] * factor, result["t"], result["df"])]
                panels.append(Panel(nucleus, points, bands, text))
            label = f"{name}\nadjusted ({unit})"
            covariates = ", ".join(relations.facts.get("Covariates") or []) or "nothing"
            strongest = of_variable.sort_values("r", key=abs, na_position="first").iloc[-1]
            yield self._save(
                draw_panels(panels, xlabel=str(variable), ylabel=label, groups=self.groups),
                f"{measure}_variable_{variable}",
                str(model),
                title=f"{name.capitalize()} and {variable}",
                alt=f"Scatter plots of the {name} of each nucleus over {variable}. The partial correlation is largest "
                f"in {strongest['abbreviation']}: {format_number(strongest['r'], 2)}.",
                caption=f"Points are participants, at the means of {covariates}; line: regression with its 95 % "
                "confidence band; r: partial correlation, p not adjusted for the number of nuclei. _L is the "
                "patient's left.",
            )

    @property
    def groups(self) -> list[str]:
        """Groups with colours, if there are several."""
        levels = self.data.levels("group")
        return levels if len(levels) > 1 else []

    def _save(self, png: bytes, name: str, model: str, *, title: str, alt: str, caption: str) -> PageFigure:
        several = len(self.data.models) > 1
        name = slug(f"group_{name}{f'_{model}' * several}")
        plot = save_plot(png, self.out_dir, name, folder=FOLDER)
        return PageFigure(plot, f"{title}{f', {model}' * several}", alt, caption)

    def _harmonized_rows(self, measure: str, model: str) -> pd.DataFrame:
        """Return the harmonized values of a measure under its own name, with the columns that plots need."""
        rows = _select(self.data.tables.get("group_harmonized"), measure=measure, model=model)
        if rows.empty or not {"site", "harmonized"} <= set(rows):
            return pd.DataFrame()
        rows, keys = rows.dropna(subset=["harmonized", "site"]), ["scan", "model", "abbreviation"]
        facts = self.data.stats.set_index(keys)[["nucleus", "side"]]
        return rows.assign(**{measure: rows["harmonized"]}).join(facts, on=keys, how="inner")

    def _best_curves(self) -> pd.DataFrame:
        """Select the best curve of each nucleus, of the controls or, without groups, of all."""
        curves, fits = self.data.tables.get("group_ageing_curves"), self.data.tables.get("group_ageing")
        if curves is None or fits is None or curves.rows.empty:
            return pd.DataFrame()
        keys = ["measure", "scans", "model", "abbreviation", "curve"]
        keys = [key for key in keys if key in curves.rows and key in fits.rows]
        rows = curves.rows.merge(fits.rows.loc[is_true(fits.rows["best"]), keys], on=keys)
        first: pd.DataFrame = rows[rows["scans"] == fits.rows["scans"].iloc[0]]  # the controls or the reference group
        return first

    def _mean_changes(self, estimates: pd.DataFrame, name: str, points: pd.DataFrame, factor: float) -> list[Band]:
        """Return the lines with the estimated change of each group, or of all if there are no groups."""
        bands: list[Band] = []
        for row in estimates.to_dict("records"):
            group, change = row.get("group"), float(row.get("change_per_year", np.nan))
            of_group = points[points["group"] == group] if self.groups else points
            if row["abbreviation"] == name and np.isfinite(change) and len(of_group) > 1:
                x = np.array([of_group["x"].min(), of_group["x"].max()])
                y = of_group["y"].mean() + factor * change * (x - of_group["x"].mean())
                colour = group_colour(self.groups, str(group)) if self.groups else INK
                bands.append(Band(x, y, colour=colour, width=3))
        return bands


def _regression(points: pd.DataFrame, slope: float, t: float, df: float) -> Band:
    """Return the regression line through adjusted values, with the confidence band of its mean."""
    x, y = points["x"].to_numpy(float), points["y"].to_numpy(float)
    at = np.linspace(x.min(), x.max(), 60)
    line = y.mean() + slope * (at - x.mean())
    residuals = y - y.mean() - slope * (x - x.mean())
    error = slope / t if t else 0.0
    half = student.ppf(0.975, df) * np.sqrt((residuals**2).sum() / df / len(y) + error**2 * (at - x.mean()) ** 2)
    return Band(at, line, line - half, line + half)


def _nuclei(rows: pd.DataFrame) -> list[str]:
    """Return the abbreviations in a table, in the order of structures.tsv."""
    return [name for structure in ALL_STRUCTURES if (rows["abbreviation"] == (name := structure.abbreviation)).any()]


def _select(table: ResultTable | None, **values: Any) -> pd.DataFrame:
    """Return the rows that have these values; none if the table lacks a column."""
    if table is None or not {*values} <= set(table.rows):
        return pd.DataFrame()
    return table.rows[np.logical_and.reduce([table.rows[column] == value for column, value in values.items()])]
