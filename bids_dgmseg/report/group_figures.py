"""Figures of the page of a cohort: what is drawn of which table, and the same in words."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import pandas as pd
from PIL import Image

from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.report.evaluation import draw_agreement
from bids_dgmseg.report.formatting import say_short
from bids_dgmseg.report.group_data import MEASURES, Cohort, GroupTable
from bids_dgmseg.report.group_plots import LABELS, N_LEVELS, N_POINTS, draw_ageing, draw_asymmetry, draw_violins
from bids_dgmseg.report.group_statistics import UNTOLD
from bids_dgmseg.report.group_tables import PageTable, make_table, medians_table
from bids_dgmseg.report.level_names import in_order, name_levels
from bids_dgmseg.stats.agreement import agree

N_PAIRS = 3
"""Most pairs of models that are compared."""

_ENOUGH = 3

_AGREEMENT = {
    "abbreviation": "Nucleus",
    "n": "Scans",
    "bias": "Bias",
    "bias_low": "Bias: low",
    "bias_high": "Bias: high",
    "loa_lower": "Lower limit",
    "loa_upper": "Upper limit",
    "icc21": "ICC(2,1)",
    "pearson_r": "r",
}


@dataclass(frozen=True)
class PageFigure:
    """A picture in ``figures/`` and what it shows in words."""

    href: str
    width: int
    height: int
    alt: str
    title: str
    caption: str
    table: PageTable | None = None


def violin_figures(cohort: Cohort, output_dir: Path, *, factor: str) -> Iterator[PageFigure]:
    """Draw volume and mean susceptibility of each model by site or group; nothing where there is one level only.

    Yields also the harmonized susceptibility by site where ``group_harmonized.tsv`` holds it.
    """
    levels = cohort.levels(factor)
    if len(levels) < 2:
        return
    for model in cohort.models:
        rows = cohort.stats[cohort.stats["model"] == model]
        for measure in MEASURES:
            yield _violins(rows, output_dir, measure=measure, factor=factor, levels=levels, model=_of(cohort, model))
    if factor == "site":
        for model, rows in _harmonized(cohort):
            yield _violins(
                rows,
                output_dir,
                measure="mean_ppm",
                factor=factor,
                levels=levels,
                model=_of(cohort, model),
                what="harmonized ",
            )


def _harmonized(cohort: Cohort) -> Iterator[tuple[str, pd.DataFrame]]:
    table = cohort.tables.get("group_harmonized")
    if table is None or table.rows.empty or not {"site", "measure", "harmonized"} <= set(table.rows):
        return
    rows = table.rows[table.rows["measure"] == "mean_ppm"].dropna(subset=["harmonized", "site"])
    sides = rows["abbreviation"].str.split("_", expand=True)
    rows = rows.assign(nucleus=sides[0], side=sides[1], mean_ppm=rows["harmonized"], site=rows["site"].astype(str))
    for model, of_model in rows.groupby("model", sort=False):
        yield str(model), of_model


def overall_figures(cohort: Cohort, output_dir: Path) -> Iterator[PageFigure]:
    """Draw volume and mean susceptibility of each model, all scans together."""
    for model in cohort.models:
        rows = cohort.stats[cohort.stats["model"] == model].assign(scans="all")
        for measure in MEASURES:
            yield _violins(rows, output_dir, measure=measure, factor="scans", levels=["all"], model=_of(cohort, model))


def _violins(
    rows: pd.DataFrame,
    output_dir: Path,
    *,
    measure: str,
    factor: str,
    levels: Sequence[str],
    model: str,
    what: str = "",
) -> PageFigure:
    """Draw the most frequent levels, in the order of their names."""
    shown = in_order(levels[:N_LEVELS])
    name = what + LABELS[measure].partition(" (")[0]
    file = f"{measure}_by-{factor}{'_harmonized' if what else ''}{model and f'_{model}'}"
    medians = medians_table(rows, anchor=f"medians-{_slug(file)}", measure=measure, levels=shown, factor=factor)
    png = draw_violins(rows, measure=measure, levels=shown, factor=factor)
    left_out = f" The {N_LEVELS} most frequent of {len(levels)} are drawn." if len(levels) > len(shown) else ""
    return _keep(
        output_dir,
        png,
        file,
        title=f"{name.capitalize()} by {factor}{_in(model)}",
        alt=f"Violins of the {name} of each nucleus by {factor}{_in(model)}, the left half of a violin for the "
        f"patient's left. {_say_spread(rows, measure=measure, factor=factor, levels=shown)}",
        caption=f"Left half: the patient's left; right half: right. The bars are medians, a point is a scan.{left_out}"
        f"{_say_names(shown)}{_say_points(rows, [measure], ['abbreviation', factor])}",
        table=medians,
    )


def _say_names(levels: Sequence[str]) -> str:
    key = name_levels(levels).key
    return f" {key}." if key else ""


def _say_points(values: pd.DataFrame, measures: Sequence[str], together: Sequence[str]) -> str:
    """Say that points were left out, where so many lie together that they were."""
    counts = values.groupby(list(together), sort=False)[list(measures)].count().to_numpy(int)
    if counts.max(initial=0) <= N_POINTS:
        return ""
    return f" Of more than {N_POINTS} scans {N_POINTS} points are drawn, evenly over the ranks; all else is of all."


def _say_spread(rows: pd.DataFrame, *, measure: str, factor: str, levels: Sequence[str]) -> str:
    """Name the nucleus whose medians differ most between levels, relative to its overall median."""
    if len(levels) == 1:
        return "The medians are in the table below."
    medians = rows.groupby(["abbreviation", factor])[measure].median().unstack(factor).reindex(columns=list(levels))
    spread = ((medians.max(axis=1) - medians.min(axis=1)) / medians.median(axis=1).abs()).dropna()
    if spread.empty:
        return "No nucleus has values."
    name = str(spread.idxmax())
    ordered = medians.loc[[name]].iloc[0].dropna().sort_values()
    unit = LABELS[measure].partition("(")[2].rstrip(")")
    low, high = (f"{say_short(ordered.iloc[end])} {unit} ({ordered.index[end]})" for end in (0, -1))
    return f"Medians differ most in {name}: from {low} to {high}."


def ageing_figures(cohort: Cohort, output_dir: Path) -> Iterator[PageFigure]:
    """Draw a curve of each nucleus with its band over the scans, by measure and model; harmonized where that is."""
    curves = _best_curves(cohort)
    if curves.empty or "age_years" not in cohort.stats:
        return
    for measure, model in product(MEASURES, cohort.models):
        of_model = curves[curves["model"] == model]
        harmonized = of_model[of_model["measure"] == f"{measure}_harmonized"]
        rows = harmonized if len(harmonized) else of_model[of_model["measure"] == measure]
        if len(rows):
            yield _ageing(cohort, output_dir, rows, measure=measure, model=model, is_harmonized=len(harmonized) > 0)


def _ageing(
    cohort: Cohort, output_dir: Path, curves: pd.DataFrame, *, measure: str, model: str, is_harmonized: bool
) -> PageFigure:
    points = _harmonized_points(cohort, measure) if is_harmonized else cohort.stats
    points = points[points["model"] == model].dropna(subset=["age_years"])
    what = "harmonized " if is_harmonized else ""
    name = what + LABELS[measure].partition(" (")[0]
    file = f"{measure}_age{'_harmonized' if what else ''}{_suffix(cohort, model)}"
    untold = ", of those whose parameters the ages tell apart" if curves["not_best"].any() else ""
    return _keep(
        output_dir,
        draw_ageing(points, curves, measure=measure, label=f"{what}\n{LABELS[measure]}".strip()),
        file,
        title=f"{name.capitalize()} over age{_in(_of(cohort, model))}",
        alt=f"Scatter of the {name} of each nucleus over age, with a curve and its 95 % band for each side. "
        f"{_say_trend(curves)}",
        caption=f"A point is a scan.{_say_pooled(cohort, is_harmonized=is_harmonized)} The curve is the one of the "
        f"lowest AICc{untold}; the band holds its 95 % confidence."
        f"{_say_points(points, [measure], ['abbreviation'])}",
    )


def _harmonized_points(cohort: Cohort, measure: str) -> pd.DataFrame:
    """Harmonized values with the ages of their scans, under the name of the measure."""
    table = cohort.tables["group_harmonized"].rows
    ages = cohort.scans.drop_duplicates("scan").set_index("scan")["age_years"]
    rows = table[table["measure"] == measure]
    return rows.assign(**{measure: rows["harmonized"]}, age_years=rows["scan"].map(ages))


def _say_pooled(cohort: Cohort, *, is_harmonized: bool) -> str:
    """Say what the curves do not tell apart."""
    factors = [factor for factor in ("site", "group") if len(cohort.levels(factor)) > 1]
    pooled = " and ".join(f"{factor}s" for factor in factors if not (is_harmonized and factor == "site"))
    harmonized = " Values are harmonized over sites (ComBat)." if is_harmonized else ""
    return harmonized + (f" {pooled.capitalize()} are pooled." if pooled else "")


def _best_curves(cohort: Cohort) -> pd.DataFrame:
    """Rows of ``group_ageing_curves.tsv`` of the curves that fit best, to the predicted labels of all scans.

    A curve whose parameters the ages do not tell apart gives way to the next best; then ``not_best`` is true.
    """
    curves, fits = cohort.tables.get("group_ageing_curves"), cohort.tables.get("group_ageing")
    if curves is None or fits is None or curves.rows.empty:
        return pd.DataFrame()
    keys = ["measure", "labels", "scans", "model", "abbreviation"]
    keys = [key for key in keys if key in curves.rows and key in fits.rows]
    untold = fits.rows["note"].astype(str).str.contains(UNTOLD)
    fitted = fits.rows.assign(untold=untold).dropna(subset=["aicc"]).sort_values(["untold", "aicc"], kind="stable")
    drawn = fitted.drop_duplicates(keys)
    drawn = drawn.assign(not_best=drawn["best"].astype(str).str.lower() != "true")
    rows = curves.rows.merge(drawn[[*keys, "curve", "not_best"]], on=[*keys, "curve"])
    for column, value in (("labels", "predicted"), ("scans", "all")):
        rows = rows[rows[column] == value] if column in rows else rows
    if "group_harmonized" not in cohort.tables:
        rows = rows[~rows["measure"].str.endswith("_harmonized")]
    return rows


def _say_trend(curves: pd.DataFrame) -> str:
    """Say which nuclei rise and which fall from the youngest to the oldest."""
    ordered = curves.sort_values("age", kind="stable").groupby("abbreviation", sort=False)["fit"]
    change = ordered.last() - ordered.first()
    parts = [
        f"{word} in {', '.join(map(str, names))}"
        for word, names in (("rises", change[change > 0].index), ("falls", change[change < 0].index))
        if len(names)
    ]
    youngest, oldest = curves["age"].min(), curves["age"].max()
    return f"From {youngest:.0f} to {oldest:.0f} years the curve {' and '.join(parts) or 'does not change'}."


def asymmetry_figures(cohort: Cohort, output_dir: Path) -> Iterator[PageFigure]:
    """Draw the asymmetry indices of ``group_asymmetry.tsv``, a figure a model."""
    table = cohort.tables.get("group_asymmetry")
    if table is None or table.rows.empty:
        return
    for model, rows in table.rows.groupby("model", sort=False):
        measures = [measure for measure in MEASURES if (rows["measure"] == measure).any()]
        if not measures:
            continue
        yield _keep(
            output_dir,
            draw_asymmetry(rows, measures=measures),
            f"asymmetry{_suffix(cohort, str(model))}",
            title=f"Asymmetry{_in(_of(cohort, str(model)))}",
            alt="Violins of the asymmetry index of each nucleus. "
            + " ".join(_say_medians(rows[rows["measure"] == measure], measure) for measure in measures),
            caption="(left − right) / mean of both, where left is the patient's left: 0 is equal, 0.2 is a left side "
            f"a fifth of the mean larger.{_say_points(rows, ['asymmetry'], ['measure', 'nucleus'])}",
        )


def _say_medians(rows: pd.DataFrame, measure: str) -> str:
    medians = rows.groupby("nucleus", sort=False)["asymmetry"].median().dropna()
    said = ", ".join(f"{nucleus} {say_short(value)}" for nucleus, value in medians.items())
    return f"Median asymmetry of {LABELS[measure].partition(' (')[0]}: {said or 'none'}."


def model_figures(cohort: Cohort, output_dir: Path) -> Iterator[PageFigure]:
    """Compare models that segmented the same scans, a figure a measure and pair."""
    for first, second in list(combinations(cohort.models, 2))[:N_PAIRS]:
        for measure in MEASURES:
            values = _side_by_side(cohort, measure, (first, second))
            rows = pd.DataFrame(
                [
                    {
                        "abbreviation": name,
                        "reference": first,
                        "prediction": second,
                        **agree(group[first].to_numpy(float), group[second].to_numpy(float)),
                    }
                    for name, group in values.groupby("abbreviation", sort=False)
                    if len(group) >= _ENOUGH
                ]
            )
            if len(rows):
                yield _agreement(values, rows, output_dir, measure=measure, pair=(first, second))


def say_not_compared(cohort: Cohort) -> Iterator[str]:
    """Say which of several models have no figure of their own."""
    pairs = list(combinations(cohort.models, 2))
    for first, second in pairs[:N_PAIRS]:
        shared = [_side_by_side(cohort, measure, (first, second))["abbreviation"] for measure in MEASURES]
        n_shared = max(names.value_counts().to_numpy().max(initial=0) for names in shared)
        if n_shared < _ENOUGH:
            yield f"{first} and {second} share the values of {n_shared} scans, {_ENOUGH} are needed"
    if len(pairs) > N_PAIRS:
        yield f"the first {N_PAIRS} of {len(pairs)} pairs of models are compared"


def _side_by_side(cohort: Cohort, measure: str, pair: tuple[str, str]) -> pd.DataFrame:
    """Put a measure of the nuclei and scans that both of two models have into a column a model."""
    wide = cohort.stats.pivot_table(index=["abbreviation", "scan"], columns="model", values=measure, sort=False)
    return wide.reindex(columns=[*pair]).dropna().reset_index()


def _agreement(
    values: pd.DataFrame, rows: pd.DataFrame, output_dir: Path, *, measure: str, pair: tuple[str, str]
) -> PageFigure:
    first, second = pair
    name, _, unit = LABELS[measure].rstrip(")").partition(" (")
    title = f"{name.capitalize()}, {second} against {first}"
    anchor = f"agreement-{_slug(f'{measure}-{first}-{second}')}"
    table = make_table(GroupTable("", rows), anchor=anchor, caption=f"{title} ({unit})", columns=_AGREEMENT)
    largest = rows.sort_values("bias", key=abs, kind="stable").iloc[-1]
    return _keep(
        output_dir,
        draw_agreement(values, rows, title=title, unit=unit),
        f"{measure}_{first}_{second}",
        title=title,
        alt=f"Scatter and Bland-Altman plots of the {name} by nucleus, {second} against {first}. The largest bias is "
        f"{say_short(largest['bias'])} {unit}, in {largest['abbreviation']}; the numbers are in the table below.",
        caption=f"Left of each pair: both models with the line of equality. Right: the difference ({second} minus "
        f"{first}) over the mean, with bias, limits of agreement and their 95 % confidence bands.",
        table=table,
    )


def _of(cohort: Cohort, model: str) -> str:
    """Name a model where there are several."""
    return model if len(cohort.models) > 1 else ""


def _in(model: str) -> str:
    return f", {model}" if model else ""


def _suffix(cohort: Cohort, model: str) -> str:
    return f"_{model}" if len(cohort.models) > 1 else ""


def _slug(text: str) -> str:
    """Write a name without what a file or an identifier cannot have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)


def _keep(
    output_dir: Path, png: bytes, name: str, *, title: str, alt: str, caption: str, table: PageTable | None = None
) -> PageFigure:
    path = write_bytes(png, output_dir / "figures" / f"group_{_slug(name)}.png")
    return PageFigure(f"figures/{path.name}", *Image.open(io.BytesIO(png)).size, alt, title, caption, table)
