"""Figures of the group page with their captions and alternative texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.figures import shorten_labels
from bids_dgmseg.report.group_data import GroupData, GroupTable, is_true
from bids_dgmseg.report.group_plots import (
    MAX_LEVELS,
    Band,
    Drawing,
    Links,
    Panel,
    draw_ageing,
    draw_asymmetry,
    draw_panels,
    draw_violins,
    group_colour,
)
from bids_dgmseg.report.group_tables import PageTable, medians_table
from bids_dgmseg.report.html import (
    NO_VALUE,
    PlotFile,
    format_number,
    format_p,
    format_significant,
    natural_key,
    page_unit,
    quantity,
    save_plot,
    slug,
)

FOLDER = "group/figures"


_SEX_COLOURS = ("#5a6675", "#9c6b30")
"""Colours of the centiles of the sexes, in alphabetical order."""


@dataclass(frozen=True)
class PageFigure:
    """A plot with its texts."""

    plot: PlotFile
    title: str
    alt: str
    caption: str
    tables: Sequence[PageTable] = ()
    """The same numbers as tables."""
    svg: str = ""
    """The plot as markup, if its points open the scans."""


def _make_figure(
    data: GroupData,
    out_dir: Path,
    drawing: Drawing,
    model: str,
    name: str,
    *,
    title: str,
    alt: str,
    caption: str,
    tables: Sequence[PageTable] = (),
) -> PageFigure:
    """Write a drawing as ``group/figures/group_NAME.png``; with several models, the model is in its name and title."""
    several = len(data.models) > 1
    plot = save_plot(drawing.png, out_dir, slug(f"group_{name}{f'_{model}' * several}"), folder=FOLDER)
    return PageFigure(plot, f"{title}{f', {model}' * several}", alt, caption, tables, drawing.svg)


def violin_figures(data: GroupData, out_dir: Path, *, factor: str, links: Links | None = None) -> Iterator[PageFigure]:
    """Draw each measure by site or group, if there are several, or over all ``scans``, per model.

    For sites, harmonized values are drawn beside them, if there are any.
    """
    stats, levels = data.stats, data.levels(factor)
    if factor == "scans":
        stats, levels = stats.assign(scans="all"), ["all"]
    elif len(levels) < 2:
        return
    shown = sorted(levels[:MAX_LEVELS], key=natural_key)
    for model, measure in product(data.models, data.quantities):
        rows = stats[stats["model"] == model]
        harmonized = _harmonized_rows(data, measure) if factor == "site" else pd.DataFrame()
        harmonized = harmonized[harmonized["model"] == model] if len(harmonized) else harmonized
        name, file = quantity(measure).name, f"{measure}_by-{factor}{f'_{model}' * (len(data.models) > 1)}"
        by = f"by {factor}" if len(levels) > 1 else "over all scans"
        key = shorten_labels(shown).key
        drawing = draw_violins(
            rows,
            measure=measure,
            levels=shown,
            factor=factor,
            harmonized=harmonized if len(harmonized) else None,
            links=links,
        )
        used = rows[rows["excluded"].isna()]
        both = {"": used, "_harmonized": harmonized}
        yield _make_figure(
            data,
            out_dir,
            drawing,
            str(model),
            f"{measure}_by-{factor}",
            title=f"{name.capitalize()} {by}" + (", raw and harmonized" if len(harmonized) else ""),
            alt=f"Violin plots of the {name} of each nucleus {by}; the left half of a violin is the patient's left. "
            "The medians are in the table below.",
            caption="Left half of a violin: patient's left; right half: right. Points are scans; violins (from five "
            "values on) and medians (bars) are of participants, whose scans are averaged; n is left/right if they "
            "differ."
            + (" Left panel of a nucleus: raw values; right: harmonized over sites (ComBat)." * bool(len(harmonized)))
            + (f" The {MAX_LEVELS} most frequent of {len(levels)} are shown." * (len(levels) > len(shown)))
            + (f" {key}." if key else "")
            + _describe_red(rows),
            tables=[
                medians_table(
                    part, anchor=f"medians-{slug(file)}{version}", measure=measure, levels=shown, factor=factor
                )
                for version, part in both.items()
                if len(part)
            ],
        )


def _harmonized_rows(data: GroupData, measure: str) -> pd.DataFrame:
    """Return the harmonized values of a measure under its own name, with the columns that plots need."""
    table = data.tables.get("group_harmonized")
    if table is None or not {"site", "measure", "harmonized"} <= set(table.rows):
        return pd.DataFrame()
    rows = table.rows[table.rows["measure"] == measure].dropna(subset=["harmonized", "site"])
    keys = ["scan", "model", "abbreviation"]
    red = pd.MultiIndex.from_frame(data.stats.loc[data.stats["is_red"], keys])
    nucleus, side = (rows["abbreviation"].map(lambda name, place=place: name.partition("_")[place]) for place in (0, 2))
    columns = {measure: rows["harmonized"], "nucleus": nucleus, "side": side}
    return rows.assign(**columns, is_red=pd.MultiIndex.from_frame(rows[keys]).isin(red), excluded=None)


def _describe_red(values: pd.DataFrame) -> str:
    """Explain the marks of red scans, if there are any."""
    if not values["is_red"].any():
        return ""
    text = " Crosses are values rated red; those at the end of an axis lie beyond it."
    if "excluded" in values and values["excluded"].notna().any():
        text += " Red values are in no violin, median or statistic."
    return text


def ageing_figures(data: GroupData, out_dir: Path, *, links: Links | None = None) -> Iterator[PageFigure]:
    """Draw the age curves of each measure and model, of harmonized values if there are any."""
    curves = _best_curves(data)
    if curves.empty or "age_years" not in data.stats:
        return
    groups = _groups(data)
    for measure, model in product(data.quantities, data.models):
        of_model = curves[curves["model"] == model]
        harmonized = _harmonized_rows(data, measure)
        rows = of_model[of_model["measure"] == f"{measure}_harmonized"] if len(harmonized) else pd.DataFrame()
        points, prefix = data.stats, ""
        if len(rows):
            about = data.scans.drop_duplicates("scan").set_index("scan")
            columns = {name: harmonized["scan"].map(about[name]) for name in ("age_years", "group") if name in about}
            points, prefix = harmonized.assign(**columns), "harmonized "
        else:
            rows = of_model[of_model["measure"] == measure]
        if rows.empty:
            continue
        points = points[points["model"] == model].dropna(subset=["age_years"])
        name = prefix + quantity(measure).name
        fitted = str(rows["scans"].iloc[0]) if "scans" in rows else "all"
        factors = ("site", "group") if fitted == "all" else ("site",)
        pooled = [f"{factor}s" for factor in factors if len(data.levels(factor)) > 1]
        pooled = [factor for factor in pooled if not (prefix and factor == "sites")]
        label = f"{prefix}\n{quantity(measure).label}".strip()
        drawing = draw_ageing(points, rows, measure=measure, label=label, links=links, groups=groups)
        yield _make_figure(
            data,
            out_dir,
            drawing,
            str(model),
            f"{measure}_age{'_harmonized' * bool(prefix)}",
            title=f"{name.capitalize()} over age",
            alt=f"Scatter plots of the {name} of each nucleus over age, with a curve and its confidence band per side.",
            caption="Points are scans."
            + " Values are harmonized over sites (ComBat)." * bool(prefix)
            + (f" {' and '.join(pooled).capitalize()} are pooled." if pooled else "")
            + ("" if fitted == "all" else f" Curves are of the scans of {fitted}, points of all.")
            + " Curves have the lowest AICc; bands are 95 % confidence bands, cut at the range of the points."
            + _describe_red(points),
        )


def _best_curves(data: GroupData) -> pd.DataFrame:
    """Select the best curve of each nucleus, of the controls or, without groups, of all."""
    curves, fits = data.tables.get("group_ageing_curves"), data.tables.get("group_ageing")
    if curves is None or fits is None or curves.rows.empty:
        return pd.DataFrame()
    keys = ["measure", "scans", "model", "abbreviation", "curve"]
    keys = [key for key in keys if key in curves.rows and key in fits.rows]
    rows: pd.DataFrame = curves.rows.merge(fits.rows.loc[is_true(fits.rows["best"]), keys], on=keys)
    first = fits.rows["scans"].iloc[0]  # the controls, otherwise the reference group
    return rows.loc[rows["scans"] == first]


def asymmetry_figures(data: GroupData, out_dir: Path, *, links: Links | None = None) -> Iterator[PageFigure]:
    """Draw the asymmetry indices of ``group_asymmetry.tsv``, one figure per model."""
    table = data.tables.get("group_asymmetry")
    if table is None or table.rows.empty:
        return
    keys = ["scan", "model", "nucleus"]
    red = pd.MultiIndex.from_frame(data.stats.loc[data.stats["is_red"], keys])
    is_red = pd.MultiIndex.from_frame(table.rows[keys]).isin(red)
    for model, rows in table.rows.assign(is_red=is_red).groupby("model", sort=False):
        measures = [measure for measure in data.quantities if (rows["measure"] == measure).any()]
        medians = []
        for measure in measures:
            people = rows[rows["measure"] == measure].groupby(["nucleus", "person"], sort=False)["asymmetry"].mean()
            values = people.groupby(level="nucleus", sort=False).median().dropna()
            text = ", ".join(f"{nucleus} {format_significant(value)}" for nucleus, value in values.items())
            medians.append(f"Median asymmetry of {quantity(measure).name}: {text or 'none'}.")
        if not measures:
            continue
        yield _make_figure(
            data,
            out_dir,
            draw_asymmetry(rows, measures=measures, links=links),
            str(model),
            "asymmetry",
            title="Asymmetry",
            alt=f"Violin plots of the asymmetry index of each nucleus. {' '.join(medians)}",
            caption="(left − right) / mean of both, where left is the patient's left: 0 means equal, 0.2 that the left "
            "side is larger by 20 % of the mean. Points are scans; violins and medians (bars) are of participants, "
            f"whose scans are averaged.{_describe_red(rows)}",
        )


def change_figures(data: GroupData, out_dir: Path) -> Iterator[PageFigure]:
    """Draw the values of each person with repeated scans over time, with the mean change of each group."""
    if "years_since_first" not in data.stats:
        return
    used = data.used.assign(x=pd.to_numeric(data.used["years_since_first"], errors="coerce")).dropna(subset=["x"])
    used = used[used.groupby("person")["x"].transform("nunique") > 1]
    changes, groups = data.tables.get("group_longitudinal"), _groups(data)
    for model, measure in product(data.models, data.quantities):
        rows = used[used["model"] == model]
        if rows.empty:
            continue
        label, _, factor = page_unit(measure)
        estimates = _select(changes, measure=measure, model=model)
        panels = []
        for name in _nuclei(rows):
            points = rows[rows["abbreviation"] == name].sort_values("x", kind="stable")
            points = points.assign(y=points[measure] * factor, group=points.get("group", NO_VALUE))
            own = estimates[estimates["abbreviation"] == name] if len(estimates) else estimates
            panels.append(Panel(name, points, _mean_changes(own, points, groups, factor)))
        drawing = draw_panels(panels, xlabel="years since the first scan", ylabel=label, groups=groups, joined=True)
        yield _make_figure(
            data,
            out_dir,
            drawing,
            str(model),
            f"{measure}_change",
            title=f"Change of {quantity(measure).name} per person",
            alt=f"Line plots of the {quantity(measure).name} of each nucleus over the years since the first scan, "
            f"one line per person with repeated scans ({rows['person'].nunique()}).",
            caption="One line per person; thick lines have the mean change per year"
            f"{' of each group' if groups else ''}, through the mean of the values. _L is the patient's left.",
        )


def _mean_changes(rows: pd.DataFrame, points: pd.DataFrame, groups: Sequence[str], factor: float) -> list[Band]:
    """Return the lines with the estimated change of each group."""
    bands: list[Band] = []
    if "change_per_year" not in rows:
        return bands
    for group, colour in (
        {group: group_colour(groups, group) for group in groups}.items() if groups else [("", "#1c2430")]
    ):
        of_group = points[points["group"] == group] if group else points
        change = (rows[rows["group"] == group] if group else rows.head(1))["change_per_year"].dropna()
        if len(change) and len(of_group) > 1:
            x = np.array([of_group["x"].min(), of_group["x"].max()])
            y = of_group["y"].mean() + factor * float(change.iloc[0]) * (x - of_group["x"].mean())
            bands.append(Band(x, y, colour=colour, width=3))
    return bands


def correlation_figures(data: GroupData, out_dir: Path) -> Iterator[PageFigure]:
    """Draw the adjusted values over each clinical variable with the regression line."""
    relations, values = (data.tables.get(name) for name in ("group_correlations", "group_correlation_values"))
    if relations is None or values is None or values.rows.empty or "variable" not in values.rows:
        return
    shown = values.rows[values.rows["measure"].isin(data.quantities)]
    for (variable, model, measure), rows in shown.groupby(["variable", "model", "measure"], sort=False):
        _, unit, factor = page_unit(str(measure))
        of_variable = _select(relations, variable=variable, model=model, measure=measure)
        results = of_variable.set_index("abbreviation").to_dict("index")
        panels = []
        for name in _nuclei(rows):
            points = rows[rows["abbreviation"] == name]
            group = points["group"].astype(object).fillna(NO_VALUE)
            points = points.assign(y=points["value_adjusted"] * factor, group=group)
            result = results[name]
            text = f"r {format_number(result['r'], 2)}, p {format_p(float(result['p']))}"
            bands = [_regression(points, result["slope"] * factor, result["t"], result["df"])]
            panels.append(Panel(name, points, bands, text))
        name = quantity(str(measure)).name
        drawing = draw_panels(panels, xlabel=str(variable), ylabel=f"{name}\nadjusted ({unit})", groups=_groups(data))
        covariates = ", ".join(relations.dictionary.get("CorrelationCovariates") or []) or "nothing"
        strongest = of_variable.sort_values("r", key=abs, na_position="first").iloc[-1]
        yield _make_figure(
            data,
            out_dir,
            drawing,
            str(model),
            f"{measure}_variable_{variable}",
            title=f"{name.capitalize()} and {variable}",
            alt=f"Scatter plots of the {name} of each nucleus over {variable}. The partial correlation is largest in "
            f"{strongest['abbreviation']}: {format_number(strongest['r'], 2)}.",
            caption=f"Points are participants, at the means of {covariates}; line: regression with its 95 % confidence "
            "band; r: partial correlation, p not adjusted for the number of nuclei. _L is the patient's left.",
        )


def _regression(points: pd.DataFrame, slope: float, t: float, df: float) -> Band:
    """Return the regression line through adjusted values, with the confidence band of its mean."""
    x, y = points["x"].to_numpy(float), points["y"].to_numpy(float)
    at = np.linspace(x.min(), x.max(), 60)
    line = y.mean() + slope * (at - x.mean())
    residuals = y - y.mean() - slope * (x - x.mean())
    error = slope / t if t else 0.0
    half = student.ppf(0.975, df) * np.sqrt((residuals**2).sum() / df / len(y) + error**2 * (at - x.mean()) ** 2)
    return Band(at, line, line - half, line + half)


def norm_figures(data: GroupData, out_dir: Path) -> Iterator[PageFigure]:
    """Draw the centiles of the controls over age with all scans."""
    norms = data.tables.get("group_norms")
    if norms is None or norms.rows.empty or "age_years" not in data.stats or "p50" not in norms.rows:
        return
    groups = _groups(data)
    for model, measure in product(data.models, data.quantities):
        curves = _select(norms, model=model, measure=measure)
        if curves.empty:
            continue
        sex = curves["sex"].astype(object) if "sex" in curves else pd.Series(index=curves.index, dtype=object)
        curves = curves.assign(sex=sex.fillna("")).sort_values("age")
        label, _, factor = page_unit(measure)
        rows = data.used[data.used["model"] == model]
        panels = []
        for name in _nuclei(curves):
            points = rows[rows["abbreviation"] == name]
            ages = pd.to_numeric(points["age_years"], errors="coerce")
            points = points.assign(x=ages, y=points[measure] * factor, group=points.get("group", NO_VALUE))
            bands: list[Band] = []
            for colour, (_, curve) in zip(
                _SEX_COLOURS, curves[curves["abbreviation"] == name].groupby("sex"), strict=False
            ):
                x = curve["age"].to_numpy(float)
                p05, p25, p50, p75, p95 = (curve[f"p{p}"].to_numpy(float) * factor for p in ("05", 25, 50, 75, 95))
                bands.append(Band(x, p50, p05, p95, colour=colour))
                bands += [Band(x, line, colour=colour, style="--", width=0.9) for line in (p25, p75)]
            panels.append(Panel(name, points, bands))
        drawing = draw_panels(panels, xlabel="age (years)", ylabel=label, groups=groups)
        sexes = sorted(set(curves["sex"]) - {""})
        yield _make_figure(
            data,
            out_dir,
            drawing,
            str(model),
            f"{measure}_norms",
            title=f"{quantity(measure).name.capitalize()}, centiles of the controls",
            alt=f"Scatter plots of the {quantity(measure).name} of each nucleus over age, with centiles of controls.",
            caption=f"Shaded: 5th to 95th centile of the controls (up to {int(curves['n_controls'].max())} persons); "
            "line: median; dashed: 25th and 75th."
            + (f" Gray: {sexes[0]}; brown: {sexes[1]}." if len(sexes) == 2 else "")
            + " Points are scans. _L is the patient's left.",
        )


def _nuclei(rows: pd.DataFrame) -> list[str]:
    """Return the abbreviations in a table, in the order of structures.tsv."""
    return [name for structure in ALL_STRUCTURES if (rows["abbreviation"] == (name := structure.abbreviation)).any()]


def _groups(data: GroupData) -> list[str]:
    levels = data.levels("group")
    return levels if len(levels) > 1 else []


def _select(table: GroupTable | None, **values: Any) -> pd.DataFrame:
    """Return the rows that have these values; none if the table lacks a column."""
    if table is None or not {*values} <= set(table.rows):
        return pd.DataFrame()
    return table.rows[np.logical_and.reduce([table.rows[column] == value for column, value in values.items()])]
