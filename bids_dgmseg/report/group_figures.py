"""Figures of the group page with their captions and alternative texts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, product
from multiprocessing import get_context, parent_process
from pathlib import Path

import pandas as pd

from bids_dgmseg.report.agreement_plots import draw_agreement
from bids_dgmseg.report.figures import PRINT_ENDINGS, shorten_labels, write_prints
from bids_dgmseg.report.group_data import GroupData, GroupTable, is_true, person_names
from bids_dgmseg.report.group_plots import (
    MAX_LEVELS,
    MAX_POINTS,
    Drawing,
    Marks,
    draw_ageing,
    draw_asymmetry,
    draw_violins,
)
from bids_dgmseg.report.group_summaries import medians_table
from bids_dgmseg.report.group_tables import PageTable, make_table
from bids_dgmseg.report.html import PlotFile, format_significant, natural_key, quantity, save_plot, slug
from bids_dgmseg.resources import HAS_FORKSERVER
from bids_dgmseg.stats.ageing import NOT_IDENTIFIED
from bids_dgmseg.stats.agreement import agree

MAX_PAIRS = 3  # pairs of models that are compared
_MIN_SCANS = 3  # that both models of a pair must have

_AGREEMENT_COLUMNS = {
    "abbreviation": "Nucleus",
    "n": "Scans",
    "bias": "Bias",
    "bias_low": "Bias: lower limit",
    "bias_high": "Bias: upper limit",
    "loa_lower": "Lower limit of agreement",
    "loa_upper": "Upper limit of agreement",
    "icc21": "ICC(2,1)",
    "pearson_r": "r",
}


@dataclass(frozen=True)
class PageFigure:
    """A plot in ``figures/`` with its texts."""

    plot: PlotFile
    title: str
    alt: str
    caption: str
    tables: Sequence[PageTable] = ()
    """The same numbers as tables."""
    svg: str = ""
    """The plot as markup, if its points open the scans."""


def violin_figures(
    data: GroupData, figures: FigureFolder, *, factor: str, marks: Marks | None = None
) -> Iterator[PageFigure]:
    """Draw volume and mean susceptibility of each model by site or group, if there are several, or over all ``scans``.

    For sites, the harmonized values in ``group_harmonized.tsv`` are drawn beside them, if there are any.
    """
    stats, levels = data.stats, data.levels(factor)
    if factor == "scans":
        stats, levels = stats.assign(scans="all"), ["all"]
    elif len(levels) < 2:
        return
    table = data.tables.get("group_harmonized") if factor == "site" else None
    has_harmonized = table is not None and {"site", "measure", "harmonized"} <= set(table.rows)
    for model, measure in product(data.models, data.quantities):
        rows, harmonized = stats[stats["model"] == model], None
        if table is not None and has_harmonized:
            values = _harmonized_rows(data, table, measure).dropna(subset=["harmonized", "site"])
            values = values[values["model"] == model]
            harmonized = values if len(values) else None
        name = _name_if_several(data, model)
        yield _violins(
            rows, harmonized, figures, measure=measure, factor=factor, levels=levels, model=name, marks=marks
        )


def _harmonized_rows(data: GroupData, table: GroupTable, measure: str) -> pd.DataFrame:
    """Return the harmonized values of a measure under its own name, with the columns that plots need."""
    rows = table.rows[table.rows["measure"] == measure]
    parts = {name: (*name.split("_", 1), None)[:2] for name in rows["abbreviation"].dropna().unique()}
    nucleus, side = (rows["abbreviation"].map({name: part[place] for name, part in parts.items()}) for place in (0, 1))
    keys = ["scan", "model", "abbreviation"]
    red = pd.MultiIndex.from_frame(data.stats.loc[data.stats["is_red"], keys])
    is_red = pd.MultiIndex.from_frame(rows[keys]).isin(red)
    names = {measure: rows["harmonized"], "nucleus": nucleus, "side": side, "person": person_names(rows)}
    return rows.assign(**names, is_red=is_red, excluded=None)


def _violins(
    rows: pd.DataFrame,
    harmonized: pd.DataFrame | None,
    figures: FigureFolder,
    *,
    measure: str,
    factor: str,
    levels: Sequence[str],
    model: str,
    marks: Marks | None,
) -> PageFigure:
    """Draw the most frequent levels, in natural order."""
    shown = sorted(levels[:MAX_LEVELS], key=natural_key)
    name, used = quantity(measure).name, rows[rows["excluded"].isna()]
    file = f"{measure}_by-{factor}{model and f'_{model}'}"
    by = ("by " + factor if len(levels) > 1 else "over all scans") + (model and f", {model}")
    left_out = f" The {MAX_LEVELS} most frequent of {len(levels)} are shown." if len(levels) > len(shown) else ""
    key = shorten_labels(shown).key
    drawn = draw_violins(rows, measure=measure, levels=shown, factor=factor, harmonized=harmonized, marks=marks)
    beside = (
        "" if harmonized is None else " Left panel of a nucleus: raw values; right: harmonized over sites (ComBat)."
    )
    both = [(used, "")] + ([] if harmonized is None else [(harmonized, "_harmonized")])
    return PageFigure(
        figures.save(drawn, f"group_{file}"),
        title=f"{name.capitalize()} {by}" + ("" if harmonized is None else ", raw and harmonized"),
        alt=f"Violin plots of the {name} of each nucleus {by}; the left half of a violin is the "
        f"patient's left. {_describe_medians(used, measure=measure, factor=factor, levels=shown)}",
        caption="Left half of a violin: patient's left; right half: right. Points are scans; violins (from five values "
        "on) and medians (bars) are of participants, whose scans are averaged; n is left/right if they differ."
        f"{beside}{left_out}{f' {key}.' if key else ''}{_describe_red(rows)}"
        f"{_describe_thinning(rows, [measure], ['abbreviation', factor])}",
        tables=[
            medians_table(part, anchor=f"medians-{slug(file)}{ending}", measure=measure, levels=shown, factor=factor)
            for part, ending in both
        ],
        svg=drawn.svg,
    )


def _describe_red(values: pd.DataFrame) -> str:
    """Explain the marks of red scans, if there are any."""
    if not values["is_red"].any():
        return ""
    text = " Crosses are values rated red; triangles at the end of an axis are red values beyond it."
    if "excluded" in values and values["excluded"].notna().any():
        text += " Red values are in no violin, median or statistic."
    return text


def _describe_thinning(values: pd.DataFrame, measures: Sequence[str], panel: Sequence[str]) -> str:
    """Write that not all points are drawn, if there are too many."""
    counts = values.groupby(list(panel), sort=False)[list(measures)].count().to_numpy(int)
    if counts.max(initial=0) <= MAX_POINTS:
        return ""
    return f" At most {MAX_POINTS} points are drawn, evenly over the ranks; everything else is computed from all scans."


def _describe_medians(rows: pd.DataFrame, *, measure: str, factor: str, levels: Sequence[str]) -> str:
    """Find the nucleus whose medians differ most between levels, relative to its overall median."""
    if len(levels) == 1:
        return "The medians are in the table below."
    people = rows.groupby(["abbreviation", factor, "person"])[measure].mean()
    medians = people.groupby(level=["abbreviation", factor]).median().unstack(factor).reindex(columns=list(levels))
    spread = ((medians.max(axis=1) - medians.min(axis=1)) / medians.median(axis=1).abs()).dropna()
    if spread.empty:
        return "No nucleus has values."
    name = str(spread.idxmax())
    ordered = medians.loc[[name]].iloc[0].dropna().sort_values()
    low, high = (
        f"{format_significant(ordered.iloc[end])} {quantity(measure).unit} ({ordered.index[end]})" for end in (0, -1)
    )
    return f"Medians differ most in {name}: from {low} to {high}."


def ageing_figures(data: GroupData, figures: FigureFolder, *, marks: Marks | None = None) -> Iterator[PageFigure]:
    """Draw the age curves of each measure and model, of harmonized values if there are any."""
    curves = _best_curves(data)
    if curves.empty or "age_years" not in data.stats:
        return
    for measure, model in product(data.quantities, data.models):
        of_model = curves[curves["model"] == model]
        harmonized = of_model[of_model["measure"] == f"{measure}_harmonized"]
        rows = harmonized if len(harmonized) else of_model[of_model["measure"] == measure]
        if len(rows):
            is_harmonized = len(harmonized) > 0
            yield _ageing(data, figures, rows, measure=measure, model=model, harmonized=is_harmonized, marks=marks)


def _ageing(
    data: GroupData,
    figures: FigureFolder,
    curves: pd.DataFrame,
    *,
    measure: str,
    model: str,
    harmonized: bool,
    marks: Marks | None,
) -> PageFigure:
    points = data.stats
    if harmonized:
        points = _harmonized_rows(data, data.tables["group_harmonized"], measure)
        about = data.scans.drop_duplicates("scan").set_index("scan")
        own = {name: points["scan"].map(about[name]) for name in ("age_years", "group") if name in about}
        points = points.assign(**own)
    points = points[points["model"] == model].dropna(subset=["age_years"])
    prefix, model = "harmonized " if harmonized else "", _name_if_several(data, model)
    label = f"{prefix}\n{quantity(measure).label}".strip()
    groups = data.levels("group") if len(data.levels("group")) > 1 else []
    drawn = draw_ageing(points, curves, measure=measure, label=label, marks=marks, groups=groups)
    name = prefix + quantity(measure).name
    file = f"{measure}_age{'_harmonized' if harmonized else ''}{model and f'_{model}'}"
    fitted = str(curves["scans"].iloc[0]) if "scans" in curves else "all"
    factors = ("site", "group") if fitted == "all" else ("site",)
    pooled = [f"{factor}s" for factor in factors if len(data.levels(factor)) > 1]
    pooled = [factor for factor in pooled if not (harmonized and factor == "sites")]
    notes = " Values are harmonized over sites (ComBat)." if harmonized else ""
    notes += f" {' and '.join(pooled).capitalize()} are pooled." if pooled else ""
    notes += "" if fitted == "all" else f" Curves are of the scans of {fitted}, points of all."
    identified = ", of those with identifiable parameters" if curves["not_best"].any() else ""
    return PageFigure(
        figures.save(drawn, f"group_{file}"),
        title=f"{name.capitalize()} over age{model and f', {model}'}",
        alt=f"Scatter plots of the {name} of each nucleus over age, with a curve and its 95 % confidence band per side."
        f" {_describe_trend(curves)}",
        caption=f"Points are scans.{notes} Curves have the lowest AICc{identified}; bands are 95 % confidence bands, "
        f"cut at the range of the points.{_describe_red(points)}"
        f"{_describe_thinning(points, [measure], ['abbreviation'])}",
        svg=drawn.svg,
    )


def _best_curves(data: GroupData) -> pd.DataFrame:
    """Select the best curve of each nucleus, fitted to the predicted labels of the controls or, without groups, of all.

    Curves whose parameters are not identified come after all others; ``not_best`` marks curves chosen for that reason.
    """
    curves, fits = data.tables.get("group_ageing_curves"), data.tables.get("group_ageing")
    if curves is None or fits is None or curves.rows.empty:
        return pd.DataFrame()
    keys = ["measure", "labels", "scans", "model", "abbreviation"]
    keys = [key for key in keys if key in curves.rows and key in fits.rows]
    unidentified = fits.rows["note"].astype(str).str.contains(NOT_IDENTIFIED)
    fitted = fits.rows.assign(unidentified=unidentified).dropna(subset=["aicc"])
    best = fitted.sort_values(["unidentified", "aicc"], kind="stable").drop_duplicates(keys)
    best = best.assign(not_best=~is_true(best["best"]))
    rows = curves.rows.merge(best[[*keys, "curve", "not_best"]], on=[*keys, "curve"])
    for column in ("labels", "scans"):  # predicted labels and the controls, otherwise the reference group, come first
        rows = rows[rows[column] == fits.rows[column].iloc[0]] if column in rows else rows
    if "group_harmonized" not in data.tables:
        rows = rows[~rows["measure"].str.endswith("_harmonized")]
    return rows


def _describe_trend(curves: pd.DataFrame) -> str:
    """List the nuclei whose curves rise and fall from the youngest to the oldest."""
    ordered = curves.sort_values("age", kind="stable").groupby("abbreviation", sort=False)["fit"]
    change = ordered.last() - ordered.first()
    parts = [
        f"{verb} in {', '.join(map(str, names))}"
        for verb, names in (("rises", change[change > 0].index), ("falls", change[change < 0].index))
        if len(names)
    ]
    youngest, oldest = curves["age"].min(), curves["age"].max()
    return f"From {youngest:.0f} to {oldest:.0f} years the curve {' and '.join(parts) or 'does not change'}."


def asymmetry_figures(data: GroupData, figures: FigureFolder, *, marks: Marks | None = None) -> Iterator[PageFigure]:
    """Draw the asymmetry indices of ``group_asymmetry.tsv``, one figure per model."""
    table = data.tables.get("group_asymmetry")
    if table is None or table.rows.empty:
        return
    red = pd.MultiIndex.from_frame(data.stats.loc[data.stats["is_red"], ["scan", "model", "nucleus"]])
    is_red = pd.MultiIndex.from_frame(table.rows[["scan", "model", "nucleus"]]).isin(red)
    table_rows = table.rows.assign(is_red=is_red, person=person_names(table.rows))
    for key, rows in table_rows.groupby("model", sort=False):
        model = _name_if_several(data, str(key))
        measures = [measure for measure in data.quantities if (rows["measure"] == measure).any()]
        if not measures:
            continue
        medians = []
        for measure in measures:
            people = rows[rows["measure"] == measure].groupby(["nucleus", "person"], sort=False)["asymmetry"].mean()
            values = people.groupby(level="nucleus", sort=False).median().dropna()
            text = ", ".join(f"{nucleus} {format_significant(value)}" for nucleus, value in values.items())
            medians.append(f"Median asymmetry of {quantity(measure).name}: {text or 'none'}.")
        drawn = draw_asymmetry(rows, measures=measures, marks=marks)
        yield PageFigure(
            figures.save(drawn, f"group_asymmetry{model and f'_{model}'}"),
            title=f"Asymmetry{model and f', {model}'}",
            alt=f"Violin plots of the asymmetry index of each nucleus. {' '.join(medians)}",
            caption="(left − right) / mean of both, where left is the patient's left: 0 means equal, 0.2 that the left "
            "side is larger by 20 % of the mean. Points are scans; violins and medians (bars) are of participants, "
            f"whose scans are averaged.{_describe_red(rows)}"
            f"{_describe_thinning(rows, ['asymmetry'], ['measure', 'nucleus'])}",
            svg=drawn.svg,
        )


def model_figures(data: GroupData, figures: FigureFolder) -> Iterator[PageFigure]:
    """Compare models that segmented the same scans, one figure per measure and pair."""
    for (first, second), measure in product(list(combinations(data.models, 2))[:MAX_PAIRS], data.quantities):
        values = _shared_values(data, measure, (first, second))
        pair = {"reference": first, "prediction": second}
        records = [
            {"abbreviation": name, **pair, **agree(group[first].to_numpy(float), group[second].to_numpy(float))}
            for name, group in values.groupby("abbreviation", sort=False)
            if len(group) >= _MIN_SCANS
        ]
        if not records:
            continue
        rows, (name, unit, _) = pd.DataFrame(records), quantity(measure)
        against = f"{second} against {first}"
        title = f"{name.capitalize()}, {against}"
        anchor = f"agreement-{slug(f'{measure}-{first}-{second}')}"
        largest = rows.sort_values("bias", key=abs, kind="stable").iloc[-1]
        png = draw_agreement(values, rows, title=title, unit=unit)
        yield PageFigure(
            save_plot(png, figures.page_dir, slug(f"group_{measure}_{first}_{second}")),
            title=title,
            alt=f"Scatter and Bland-Altman plots of the {name} by nucleus, {against}. The largest bias is "
            f"{format_significant(largest['bias'])} {unit}, in {largest['abbreviation']}; see the table below.",
            caption="Left of each pair: both models with the line of equality (dashed) and the regression line "
            f"(least squares). Right: difference ({second} minus {first}) over the mean, with bias, limits of "
            "agreement and their 95 % confidence bands.",
            tables=[
                make_table(GroupTable("", rows), anchor=anchor, caption=f"{title} ({unit})", columns=_AGREEMENT_COLUMNS)
            ],
        )


def explain_missing_pairs(data: GroupData) -> Iterator[str]:
    """Explain which pairs of models have no figure."""
    pairs = list(combinations(data.models, 2))
    for first, second in pairs[:MAX_PAIRS]:
        shared = [_shared_values(data, measure, (first, second))["abbreviation"] for measure in data.quantities]
        n_shared = max(names.value_counts().to_numpy().max(initial=0) for names in shared)
        if n_shared < _MIN_SCANS:
            yield f"{first} and {second} have {n_shared} scans in common, {_MIN_SCANS} are needed"
    if len(pairs) > MAX_PAIRS:
        yield f"only the first {MAX_PAIRS} of {len(pairs)} pairs of models are compared"


def _shared_values(data: GroupData, measure: str, pair: tuple[str, str]) -> pd.DataFrame:
    """Return a measure of the scans and nuclei that two models share, one column per model."""
    wide = data.used.pivot_table(index=["abbreviation", "scan"], columns="model", values=measure, sort=False)
    return wide.reindex(columns=[*pair]).dropna().reset_index()


class FigureFolder:
    """The folder ``figures/`` of the group page. As a context it ends when all files for print are written.

    Parameters
    ----------
    page_dir : Path
        Folder of the page.
    nprocs : int
        With 2 or more, a second process renders figures for print while the next ones are drawn, which takes as long.
    """

    def __init__(self, page_dir: Path, *, nprocs: int = 1) -> None:
        self.page_dir = page_dir
        self._printed: list[Future[None]] = []
        self._executor: ProcessPoolExecutor | None = None
        if nprocs > 1 and HAS_FORKSERVER:  # starting processes was not seen to work on Windows
            self._executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)

    def save(self, drawn: Drawing, name: str) -> PlotFile:
        """Write a figure of the page, also for print."""
        name = slug(name)
        plot = save_plot(drawn.png, self.page_dir, name)
        if drawn.figure is None:
            return plot
        stem = self.page_dir / "figures" / name
        if self._executor:
            self._printed.append(self._executor.submit(write_prints, drawn.figure, stem))
        else:
            write_prints(drawn.figure, stem)
        return replace(plot, prints=[f"figures/{name}{ending}" for ending in PRINT_ENDINGS])

    def __enter__(self) -> FigureFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=kind is not None)
        for printed in self._printed if kind is None else ():
            printed.result()


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent of this process, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _name_if_several(data: GroupData, model: str) -> str:
    return model if len(data.models) > 1 else ""
