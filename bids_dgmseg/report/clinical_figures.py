"""Figures and tables of the group page about change per person, clinical variables and norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import t as student

from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.clinical_plots import Band, Panel, draw_panels
from bids_dgmseg.report.group_data import GroupData, GroupTable
from bids_dgmseg.report.group_figures import FigureFolder, PageFigure
from bids_dgmseg.report.group_plots import group_colour
from bids_dgmseg.report.group_tables import Cell, Heading, PageTable
from bids_dgmseg.report.html import NO_VALUE, format_number, format_p, page_unit, quantity, slug

MAX_PEOPLE = 150
"""Persons in a plot of change."""

MAX_SCORED = 100
"""Scans in the table of z-scores."""

FLAGGED = 1.96
"""Absolute z-score that is marked."""

_SEX_COLOURS = ("#5a6675", "#9c6b30")
"""Of the centiles of the sexes, in alphabetical order."""

_ORDER = [structure.abbreviation for structure in ALL_STRUCTURES]


def _nuclei(rows: pd.DataFrame) -> list[str]:
    return [name for name in _ORDER if (rows["abbreviation"] == name).any()]


def _groups(data: GroupData) -> list[str]:
    levels = data.levels("group")
    return levels if len(levels) > 1 else []


def change_figures(data: GroupData, figures: FigureFolder) -> Iterator[PageFigure]:
    """Draw the values of each person with repeated scans over time, with the mean change of each group."""
    if "years_since_first" not in data.stats:
        return
    used = data.used.assign(x=pd.to_numeric(data.used["years_since_first"], errors="coerce")).dropna(subset=["x"])
    several = used.groupby("person")["x"].transform("nunique") > 1
    used = used[several]
    for model, measure in product(data.models, data.quantities):
        rows = used[used["model"] == model]
        if rows.empty:
            continue
        people = list(dict.fromkeys(rows["person"]))
        rows = rows[rows["person"].isin(people[:: max(1, -(-len(people) // MAX_PEOPLE))])]
        label, _, factor = page_unit(measure)
        groups, mixed = _groups(data), _rows_of(data.tables.get("group_mixed"), model, measure)
        panels = []
        for name in _nuclei(rows):
            own = rows[rows["abbreviation"] == name].sort_values("x", kind="stable")
            estimates = mixed[mixed["abbreviation"] == name] if len(mixed) else mixed
            points = own.assign(y=own[measure] * factor, group=own.get("group", NO_VALUE))
            panels.append(Panel(name, points, _mean_changes(estimates, points, groups, factor)))
        drawn = draw_panels(panels, xlabel="years since the first scan", ylabel=label, groups=groups, joined=True)
        ending = f"_{model}" if len(data.models) > 1 else ""
        shown = f" {rows['person'].nunique()} of {len(people)} persons are drawn." if len(people) > MAX_PEOPLE else ""
        yield PageFigure(
            figures.save(drawn, f"group_{measure}_change{ending}"),
            title=f"Change of {quantity(measure).name} per person{ending and f', {model}'}",
            alt=f"Line plots of the {quantity(measure).name} of each nucleus over the years since the first scan, "
            f"one line per person with repeated scans ({len(people)}).",
            caption="One line per person; thick lines have the change per year of the mixed model"
            f"{' of each group' if groups else ''}, through the mean of the values. _L is the patient's left.{shown}",
        )


def _rows_of(table: GroupTable | None, model: str, measure: str) -> pd.DataFrame:
    """Return the rows of a measure and model; none if the table is empty."""
    if table is None or not {"measure", "model", "abbreviation"} <= set(table.rows):
        return pd.DataFrame()
    return table.rows[(table.rows["measure"] == measure) & (table.rows["model"] == model)]


def _mean_changes(rows: pd.DataFrame, points: pd.DataFrame, groups: Sequence[str], factor: float) -> list[Band]:
    """Return the lines with the estimated change of each group."""
    if "change_per_year" not in rows:
        return []
    bands = []
    choices: list[str | None] = [*groups] or [None]
    for group in choices:
        own = points if group is None else points[points["group"] == group]
        found = rows[rows["group"] == group] if group is not None else rows.head(1)
        if found.empty or len(own) < 2 or pd.isna(found["change_per_year"].iloc[0]):
            continue
        x = np.array([own["x"].min(), own["x"].max()])
        y = own["y"].mean() + factor * float(found["change_per_year"].iloc[0]) * (x - own["x"].mean())
        bands.append(Band(x, y, colour=group_colour(groups, group) if group else "#1c2430", width=3))
    return bands


def correlation_figures(data: GroupData, figures: FigureFolder) -> Iterator[PageFigure]:
    """Draw the adjusted values over each clinical variable with the regression line."""
    relations, values = (data.tables.get(name) for name in ("group_correlations", "group_correlation_values"))
    if relations is None or values is None or values.rows.empty or "variable" not in values.rows:
        return
    groups = _groups(data)
    shown = values.rows[values.rows["measure"].isin(data.quantities)]
    for (variable, model, measure), rows in shown.groupby(["variable", "model", "measure"], sort=False):
        _, unit, factor = page_unit(str(measure))
        of = relations.rows
        of = of[(of["variable"] == variable) & (of["model"] == model) & (of["measure"] == measure)]
        results = of.set_index("abbreviation").to_dict("index")
        panels = []
        for name in _nuclei(rows):
            own = rows[rows["abbreviation"] == name]
            points = own.assign(y=own["value_adjusted"] * factor, group=own["group"].astype(object).fillna(NO_VALUE))
            record = results[name]
            text = f"r {format_number(record['r'], 2)}, p {format_p(float(record['p']))}"
            bands = [_regression(points, record["slope"] * factor, record["t"], record["df"])]
            panels.append(Panel(name, points, bands, text))
        adjusted = f"{quantity(str(measure)).name}\nadjusted ({unit})"
        drawn = draw_panels(panels, xlabel=str(variable), ylabel=adjusted, groups=groups)
        ending = f"_{model}" if len(data.models) > 1 else ""
        covariates = ", ".join(relations.dictionary.get("CorrelationCovariates") or []) or "nothing"
        strongest = max(results.items(), key=lambda item: abs(item[1]["r"]) if pd.notna(item[1]["r"]) else -1)
        yield PageFigure(
            figures.save(drawn, f"group_{measure}_variable_{variable}{ending}"),
            title=f"{quantity(str(measure)).name.capitalize()} and {variable}{ending and f', {model}'}",
            alt=f"Scatter plots of the {quantity(str(measure)).name} of each nucleus over {variable}. The partial "
            f"correlation is largest in {strongest[0]}: {format_number(strongest[1]['r'], 2)}.",
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


def norm_figures(data: GroupData, figures: FigureFolder) -> Iterator[PageFigure]:
    """Draw the centiles of the controls over age with all scans."""
    norms = data.tables.get("group_norms")
    if norms is None or norms.rows.empty or "age_years" not in data.stats or "p50" not in norms.rows:
        return
    groups = _groups(data)
    for model, measure in product(data.models, data.quantities):
        curves = norms.rows[(norms.rows["model"] == model) & (norms.rows["measure"] == measure)]
        if curves.empty:
            continue
        label, _, factor = page_unit(measure)
        rows = data.used[data.used["model"] == model]
        panels = []
        for name in _nuclei(curves):
            own, curve = rows[rows["abbreviation"] == name], curves[curves["abbreviation"] == name].sort_values("age")
            ages = pd.to_numeric(own["age_years"], errors="coerce")
            points = own.assign(x=ages, y=own[measure] * factor, group=own.get("group", NO_VALUE))
            sexes = curve["sex"].astype(object).where(curve["sex"].notna(), "") if "sex" in curve else ""
            bands: list[Band] = []
            for number, (_, own_curve) in enumerate(curve.assign(sex=sexes).groupby("sex", sort=True)):
                x, colour = own_curve["age"].to_numpy(float), _SEX_COLOURS[number % len(_SEX_COLOURS)]
                lines = {key: own_curve[key].to_numpy(float) * factor for key in ("p05", "p25", "p50", "p75", "p95")}
                bands += [
                    Band(x, lines["p50"], lines["p05"], lines["p95"], colour=colour),
                    *(Band(x, lines[key], colour=colour, style="--", width=0.9) for key in ("p25", "p75")),
                ]
            panels.append(Panel(name, points, bands))
        drawn = draw_panels(panels, xlabel="age (years)", ylabel=label, groups=groups)
        ending = f"_{model}" if len(data.models) > 1 else ""
        n = int(curves["n_controls"].max())
        levels = sorted(curves["sex"].dropna().astype(str).unique()) if "sex" in curves else []
        of_sexes = f" Gray: {levels[0]}; brown: {levels[1]}." if len(levels) == 2 else ""
        yield PageFigure(
            figures.save(drawn, f"group_{measure}_norms{ending}"),
            title=f"{quantity(measure).name.capitalize()}, centiles of the controls{ending and f', {model}'}",
            alt=f"Scatter plots of the {quantity(measure).name} of each nucleus over age, with centiles of controls.",
            caption=f"Shaded: 5th to 95th centile of the controls (up to {n} persons); line: median; dashed: 25th and "
            f"75th.{of_sexes} Points are scans. _L is the patient's left.",
        )


def score_tables(data: GroupData) -> Iterator[PageTable]:
    """Tabulate the z-scores of each scan, the most unusual first."""
    table = data.tables.get("group_zscores")
    if table is None or table.rows.empty or "z" not in table.rows:
        return
    for (model, measure), rows in table.rows.groupby(["model", "measure"], sort=False):
        base = str(measure).removesuffix("_harmonized")
        if base not in data.quantities or rows["z"].isna().all():
            continue
        known = rows[~rows["abbreviation"].isin(data.bilateral.get("abbreviation", []))]
        wide = known.pivot_table(index="scan", columns="abbreviation", values="z", sort=False)
        names = [name for name in _ORDER if name in wide]
        ranked = wide.loc[wide[names].abs().max(axis=1).sort_values(ascending=False, kind="stable").index, names]
        controls = known.drop_duplicates("scan").set_index("scan")["control"].astype(str).str.lower() == "true"
        cells = []
        for scan, record in ranked.head(MAX_SCORED).iterrows():
            scores = [
                Cell(format_number(z, 1), float(z), flag=abs(z) > FLAGGED) if pd.notna(z) else Cell(NO_VALUE)
                for z in record
            ]
            cells.append([Cell(str(scan)), Cell("yes" if controls[str(scan)] else "no"), *scores])
        headings = [Heading("Scan", kind="text"), Heading("Control", kind="text"), *(Heading(name) for name in names)]
        several = f", {model}" if len(data.models) > 1 else ""
        yield PageTable(
            f"zscores-{slug(f'{measure}-{model}')}",
            f"Z-scores relative to controls of the same age and sex: {quantity(base).name}"
            f"{', harmonized' if base != measure else ''}{several}, the most unusual scans first",
            headings,
            cells,
            len(ranked),
            file=table.file,
            note=f"Bold: beyond ±{FLAGGED}, as 5 % of the controls are. Controls are compared with the other controls; "
            "n/a: no value, age or sex, or an age beyond those of the controls.",
        )
