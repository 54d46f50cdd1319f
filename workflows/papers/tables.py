"""Frame of the scripts of this folder: from a labelled dataset to the tables and figures of a paper.

    python workflows/papers/PAPER.py DATASET OUT [--labels-of NAME=FOLDER ...] [--quick] [--minutes M] [--device cuda]

DATASET is a BIDS dataset of maps with manual labels; maps without labels are those for self-training. OUT gets
index.html with everything, and a TSV and PNG per table, named after the table or figure of the paper; missing.txt says
what was not made, and why. Labels of other programs, such as `suit=FOLDER`, are rows. The same command continues an
interrupted one. With --quick trainings last seconds, from the shipped weights where the network is that, and DATASET is
simulated if it does not exist: a proof that everything runs, not of accuracy.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from compare_models import Candidate, Settings, segment_scan

from bids_dgmseg.arguments import absolute_path, entity, positive_float
from bids_dgmseg.bids.labelled_scans import find_nuclei, match_labels
from bids_dgmseg.cli.main import main as dgmseg
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.io.files import read_json, write_bytes, write_text, write_tsv
from bids_dgmseg.lab.evaluate.compare import Evaluation, EvaluationOptions, evaluate, find_test_set
from bids_dgmseg.lab.evaluate.page import _OVERLAP_COLUMNS
from bids_dgmseg.lab.train.recipe import RECIPES, _merge
from bids_dgmseg.report.figures import DPI, WIDTH_IN, draw_agreement, label_axes, style_axes, to_png
from bids_dgmseg.resources import count_cpus
from bids_dgmseg.stats.agreement import adjust_p_values, bland_altman, paired_t, pearson, tukey, wilcoxon

TRUTH, VOLUME = "reference", "volume_mm3"

MEASURES = {**_OVERLAP_COLUMNS, VOLUME: ("Volume (mm³)", 0)}
"""Measure → heading and decimals."""

TESTS = {"t": "paired t", "previous": "paired t with the row above", "tukey": "ANOVA with Tukey's test"}


@dataclass
class Study:
    """Dataset, options, and what was made so far."""

    args: argparse.Namespace
    dataset: Path
    out: Path
    paper: Mapping[str, Any]
    """Content of PAPER.toml."""
    rows: dict[str, Path] = field(default_factory=dict)
    """Method → dataset of its labels."""
    sections: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    located: dict[Any, Any] = field(default_factory=dict)
    test: dict[int, Sequence[str]] = field(default_factory=dict)
    """Fold → its test set."""

    def __post_init__(self) -> None:
        """Find the labelled scans and the others."""
        self.labels = find_test_set(self.dataset, choose=self.args.choose)
        scans, labels = match_labels(self.dataset, choose=self.args.choose)
        self.unlabelled = [scan for scan in scans if scan.chi not in labels]
        self.folds, self.changes = (2, dict(self.paper["quick"])) if self.args.quick else (5, {})
        if self.args.contrast != "chi":
            self.changes["contrast"] = self.args.contrast

    def lack(self, what: str) -> None:
        """Name what is missing."""
        self.missing.append(what)
        print(f"missing: {what}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Name what cannot be made, and go on."""
        try:
            yield
        except InputError as error:
            self.lack(f"{name}: {error}")

    def train(self, name: str, model: str, *recipes: str, options: Sequence[Any] = ()) -> Path:
        """Train with the changes of some recipes, unless that was done; return the model folder."""
        folder, content = self.out / "models" / name, dict[str, Any]()
        if (folder / "done").is_file():
            return folder
        for recipe in recipes:
            content = _merge(content, tomllib.loads((RECIPES / f"{recipe}.toml").read_text()))
        is_shipped = not {"network", "arch", "classes"} & content.keys() and model != "nnunet2step"
        path = write_text("\n".join(_flatten(_merge(content, self.changes))), folder.with_name(f"{name}.toml"))
        command = ["train", model, self.dataset, folder, "--device", self.args.device, "--recipe", path, *options]
        command += ["--choose", *self.args.choose] if self.args.choose and "--choose" not in options else []
        command += ["--from", "default"] if self.args.quick and is_shipped and "--from" not in options else []
        minutes = self.args.minutes or (0.05 if self.args.quick else None)
        start = time.perf_counter()
        if dgmseg([str(word) for word in (*command, *(["--minutes", minutes] if minutes else []))]):
            raise InputError("training failed, for the reason above; run the same command again")
        write_text(f"{(time.perf_counter() - start) / 60:.3g}", folder / "done")
        return folder

    def segment(self, name: str, candidate: Candidate, participants: Sequence[str] | None, **settings: Any) -> Path:
        """Segment labelled scans (None: those without labels), unless that was done; return the dataset of the labels.

        InputError if none can be segmented.
        """
        scans = [scan for scan in self.labels.scans if participants and scan.participant in participants]
        candidate = replace(candidate, name=candidate.name.replace("-", ""))  # part of file names
        place = Settings(self.out / "labels" / name, self.args.device, count_cpus(), (), frozenset(), **settings)
        costs = [segment_scan(candidate, scan, place, self.located) for scan in scans or self.unlabelled]
        self.costs += [{**cost, "method": name} for cost in costs if "problem" not in cost]
        if problems := [cost["problem"] for cost in costs if "problem" in cost]:
            self.lack(f"{name}: {problems[0]} ({len(problems)} of {len(costs)} scans)")
            if len(problems) == len(costs):
                raise InputError("no scan could be segmented")
        return place.out / "predictions" / candidate.name

    def cross_validate(
        self, name: str, model: str, *recipes: str, options: Callable[[int], Sequence[Any]] = lambda fold: ()
    ) -> None:
        """Train folds, and segment the participants of each by the network that has not seen them: a row.

        With ``--folds`` in the `options` of a fold, it is trained on other labels than those of the dataset.
        """
        with self.attempt(name):
            for fold in range(self.folds):
                extra = options(fold)
                split = [] if "--folds" in extra else ["--folds", self.folds, "--fold", fold]
                weights = self.train(f"{name}-{fold}", model, *recipes, options=[*split, *extra])
                if split:
                    self.test[fold] = read_json(weights / "training.json")["folds"][fold]["test"]
                folder = self.segment(name, Candidate(name, model, weights), self.test[fold])
            self.rows[name] = folder

    def cross_validate_all(self) -> None:
        """Cross-validate each training of the paper."""
        for name, training in self.paper["trainings"].items():
            self.cross_validate(name, self.paper["model"], *training)

    def compare(self, predictions: Sequence[Path] = (), reference: Path | None = None, **options: Any) -> Evaluation:
        """Compare all rows, or some predictions, with the labels, or with those of another rater."""
        options |= {"references": () if reference else self.labels.images, "chi": self.dataset, "bilateral": True}
        paths, truth = tuple(predictions or self.rows.values()), reference or self.labels.reference
        if not paths:
            raise InputError("nothing to compare with the labels")
        return evaluate(EvaluationOptions(reference=truth, predictions=paths, out=self.out, **options))

    def section(self, stem: str, title: str, table: pd.DataFrame, *, png: bytes = b"", shown: Any = None) -> None:
        """Write a table and its figure, and show both on the page."""
        write_tsv(table, self.out / f"{stem}.tsv", float_format="%.6g")
        figure = f'<img src="{write_bytes(png, self.out / f"{stem}.png").name}">' if png else ""
        shown = (table if shown is None else shown).rename_axis(columns=None)
        body = shown.to_html(index=False, na_rep="n/a", float_format="{:.4g}".format)
        self.sections.append(f"<h2>{html.escape(title)}</h2>{body}{figure}")

    def finish(self, title: str) -> None:
        """Write the times, the page and what is missing."""
        if self.costs:
            times = pd.DataFrame(self.costs).groupby("method", sort=False)["seconds"].agg(["count", "mean", "std"])
            self.section("times", f"Seconds per scan ({self.args.device})", times.reset_index())
        done = sorted((self.out / "models").glob("*/done"))
        rows = [{"training": path.parent.name, "minutes": float(path.read_text())} for path in done]
        self.section("training_minutes", "Minutes per training, of its last call", pd.DataFrame(rows))
        quick = "<p><b>--quick: trained for seconds; no accuracy.</b>" if self.args.quick else ""
        items = "".join(f"<li>{html.escape(line)}" for line in self.missing)
        head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>body{{font:14px sans-serif}}</style>"
        page = f"{head}<h1>{title}</h1>{quick}{''.join(self.sections)}<h2>Missing</h2><ul>{items}</ul>"
        write_text(page, self.out / "index.html")
        write_text("\n".join(self.missing), self.out / "missing.txt")
        print(f"{len(self.missing)} item(s) are missing, see missing.txt; open {self.out / 'index.html'}", flush=True)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the lines of a TOML file; JSON and TOML write values alike."""
    for key, value in content.items():
        nested = isinstance(value, Mapping)
        yield from _flatten(value, f"{prefix}{key}.") if nested else [f"{prefix}{key} = {json.dumps(value)}"]


def scores(evaluation: Evaluation, methods: Sequence[str], *, sides: str = "mean") -> pd.DataFrame:
    """Return measures of the predictions `methods`: columns ``method``, ``nucleus``, ``scan``, ``measure``, ``value``.

    `sides` is ``mean`` of left and right, ``union`` of both, or ``each``. The method `TRUTH` has the volumes.
    """
    table, names = evaluation.tables["overlap"], dict(zip(evaluation.raters[1:], methods, strict=True))
    is_side = table["abbreviation"].str.endswith(("_L", "_R"))
    table = table[is_side != (sides == "union")].assign(method=table["prediction"].map(names))
    truth = table.drop_duplicates(["scan", "abbreviation"])[["scan", "abbreviation", "volume_reference_mm3"]]
    truth = truth.rename(columns={"volume_reference_mm3": VOLUME}).assign(method=TRUTH)
    table = pd.concat([table.rename(columns={"volume_prediction_mm3": VOLUME}), truth], ignore_index=True)
    nucleus = table["abbreviation"].str.replace("_[LR]$", "", regex=True) if sides == "mean" else table["abbreviation"]
    keys = ["method", "nucleus", "scan"]
    long = table.assign(nucleus=nucleus).melt(keys, list(MEASURES), "measure").dropna(subset=["value"])
    return long.groupby([*keys, "measure"], sort=False)["value"].mean().reset_index()


def summarize(values: pd.DataFrame, methods: Sequence[str], *, test: str, against: str) -> pd.DataFrame:
    """Compute mean, SD and p value per nucleus, measure and method.

    `test` is ``t`` (paired, with the row `against`), ``previous`` (paired, with the row before), ``tukey`` (after
    one-way analysis of variance) or ``wilcoxon`` (Bonferroni over the nuclei). Volumes are compared by Tukey's test
    with those of the reference, except with ``t``.
    """
    rows: list[dict[str, Any]] = []
    for (nucleus, measure), group in values.groupby(["nucleus", "measure"], sort=False):
        wide, volumes = group.pivot_table("value", "scan", "method"), measure == VOLUME and test != "t"
        columns = [name for name in (*methods, *([TRUTH] if volumes else [])) if name in wide]
        used = "tukey" if volumes else "t" if test == "previous" else test
        among = tukey(wide[columns].to_numpy(float)) if used == "tukey" and len(columns) > 1 else None
        for place, name in enumerate(name for name in columns if name != TRUTH):
            other, p = TRUTH if volumes else columns[max(place - 1, 0)] if test == "previous" else against, float("nan")
            if name != other and other in columns:
                paired = wilcoxon if used == "wilcoxon" else paired_t
                pair = wide[other].to_numpy(float), wide[name].to_numpy(float)
                p = paired(*pair).p if among is None else float(among[place, columns.index(other)])
            row = {"method": name, "nucleus": nucleus, "measure": measure, "n": wide[name].count()}
            rows.append({**row, "mean": wide[name].mean(), "sd": wide[name].std(), "against": other, "p": p})
    table = pd.DataFrame(rows)
    if test == "wilcoxon":
        table["p"] = table.groupby(["method", "measure"])["p"].transform(adjust_p_values, method="bonferroni")
    return table


def write_tables(study: Study, evaluation: Evaluation, *, sides: str = "mean", only: Sequence[str] = ()) -> None:
    """Write the tables of the paper, or some of them; see `scores`."""
    values = scores(evaluation, list(study.rows), sides=sides)
    for name in only or study.paper["tables"]:
        compare_methods(study, name, values)


def compare_methods(study: Study, name: str, values: pd.DataFrame) -> None:
    """Write a table of the paper, of methods by nuclei and measures, with a box plot."""
    about, measures = study.paper["tables"][name], study.paper["measures"]
    methods, test, against = about["rows"], about["test"], about.get("against", "")
    nuclei = values["nucleus"].str.split("_").str[0]
    values = values[values["measure"].isin(measures) & nuclei.isin(study.paper["nuclei"])]
    values = values.sort_values(
        "nucleus", key=lambda names: names.str.split("_").str[0].map(study.paper["nuclei"].index)
    )
    there = [method for method in methods if method in set(values["method"])]
    for method in [method for method in methods if method not in there]:
        study.lack(f"{name}: no row {methods[method]} (its labels: --labels-of {method}=FOLDER)")
    if not there:
        return
    table, stem = summarize(values, there, test=test, against=against), re.sub(r"\W+", "_", name).strip("_").lower()
    stars = table["p"].map(lambda p: "**" if p < 0.001 else "*" if p < 0.05 else "")
    heads = table["nucleus"] + " " + table["measure"].map(lambda measure: MEASURES[measure][0])
    rows = zip(
        table["mean"], table["sd"], table["measure"].map(lambda measure: MEASURES[measure][1]), stars, strict=True
    )
    cells = [f"{mean:.{digits}f} ± {sd:.{digits}f}{star}" for mean, sd, digits, star in rows]
    shown = table.assign(cell=cells, head=heads).pivot(index="method", columns="head", values="cell")
    for nucleus, volumes in values[values["method"] == TRUTH].groupby("nucleus")["value"]:
        shown.loc[TRUTH, f"{nucleus} {MEASURES[VOLUME][0]}"] = f"{volumes.mean():.0f} ± {volumes.std():.0f}"
    shown = shown.loc[[*there, *shown.index.difference(there)], list(dict.fromkeys(heads))].rename(index=methods)
    nuclei = list(dict.fromkeys(table["nucleus"]))
    figure = Figure(figsize=(WIDTH_IN, 2.6 * len(nuclei) + 0.6), dpi=DPI, layout="constrained")
    for nucleus, panels in zip(nuclei, figure.subplots(len(nuclei), len(measures), squeeze=False), strict=True):
        for measure, axes in zip(measures, panels, strict=True):
            part = values.query("nucleus == @nucleus and measure == @measure")
            boxes = [part.loc[part["method"] == method, "value"].to_numpy(float) for method in there]
            axes.boxplot(boxes, positions=range(len(there)))
            for row, star in zip(table.itertuples(), stars, strict=True):
                if (row.nucleus, row.measure) == (nucleus, measure) and len(boxes[there.index(row.method)]):
                    axes.text(there.index(row.method), boxes[there.index(row.method)].max(), star, ha="center")
            axes.set_xticks(range(len(there)), [methods[method] for method in there], rotation=60, ha="right")
            label_axes(axes, nucleus, "", MEASURES[measure][0])
            style_axes(axes, fontsize=6)
    title = f"{name} · * p < 0.05, ** p < 0.001, {TESTS.get(test, test)}"
    study.section(stem, title, table.replace({"method": methods}), png=to_png(figure), shown=shown.reset_index())


def show_agreement(study: Study, name: str, evaluation: Evaluation, method: str, nuclei: Sequence[str]) -> None:
    """Write correlation, means and limits of agreement of volumes and susceptibilities, with scatter plots."""
    rater, reference = evaluation.raters[1 + list(study.rows).index(method)], evaluation.raters[0]
    for quantity, unit in ((VOLUME, "mm³"), ("mean_ppm", "ppm")):
        points = evaluation.values.query("quantity == @quantity and abbreviation in @nuclei")
        rows = evaluation.tables["agreement"].query(
            "quantity == @quantity and prediction == @rater and abbreviation in @nuclei"
        )
        every = pearson(points[reference].to_numpy(float), points[rater].to_numpy(float))
        limits = bland_altman(points[reference].to_numpy(float), points[rater].to_numpy(float))
        bias, low, high = (each.value for each in (limits.bias, limits.lower, limits.upper))
        correlation = {"abbreviation": "all", "pearson_r": every.value, "pearson_r_p": every.p}
        overall = pd.DataFrame([{**correlation, "bias": bias, "loa_lower": low, "loa_upper": high}])
        columns = [f"{end}_{side}" for end in ("mean", "sd") for side in ("reference", "prediction")]
        columns = ["abbreviation", "n", *columns, "pearson_r", "pearson_r_p", "icc21", "bias", "loa_lower", "loa_upper"]
        drawn = rows[rows["n"] > 2]
        png = draw_agreement(points, drawn, title=f"{name}, {quantity}", unit=unit) if len(drawn) else b""
        stem = f"{name.lower().replace(' ', '_')}_{quantity}"
        study.section(stem, f"{name}. {quantity}", pd.concat([rows[columns], overall], ignore_index=True), png=png)


def simulate(dataset: Path, options: str) -> None:
    """Simulate heads, with ages that are made up for the curves; the last two have no labels."""
    dgmseg(["simulate", str(dataset), "--typical", *options.split()])
    table = pd.read_csv(dataset / "participants.tsv", sep="\t")
    write_tsv(table.assign(age=[20 + 50 * (0.618 * place % 1) for place in table.index]), dataset / "participants.tsv")
    for name in table["participant_id"].iloc[-2:]:
        shutil.rmtree(dataset / "derivatives" / "truth" / name)


def run(doc: str | None, make: Callable[[Study], None], **more: Mapping[str, Any]) -> int:
    """Run a script: parse its options (`more`: name → arguments), simulate heads if needed, make the tables."""
    script = Path(sys.argv[0])
    paper = tomllib.loads(script.with_suffix(".toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", type=absolute_path, help="labelled BIDS dataset")
    add("out", type=absolute_path)
    add("--labels-of", nargs="+", default=[], metavar="NAME=FOLDER", help="labels of other programs")
    add("--choose", nargs="+", default=[], type=entity, help="which of several segmentations to use")
    add("--quick", action="store_true", help="trainings of seconds, on simulated heads")
    add("--minutes", type=positive_float, help="limit of each training (default: the paper's length)")
    add("--contrast", default="chi", help="of images that are no chi maps: Contrast in their sidecars, such as b0")
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    for name, arguments in more.items():
        add(f"--{name}", **arguments)
    args = parser.parse_args()

    def work() -> int:
        if args.quick and not args.dataset.exists():
            simulate(args.dataset, paper["heads"])
        study = Study(args, args.dataset, args.out, paper)
        labelled = {name.partition("_")[0] for name in find_nuclei(study.labels.images)[0]}
        if not labelled & set(paper["nuclei"]):
            raise InputError(f"{args.dataset.name}: no labels of {', '.join(paper['nuclei'])}, so no table can be made")
        for name in [name for name in paper["nuclei"] if name not in labelled]:
            study.lack(f"{name} in all tables: not among the labels")
        for text in args.labels_of:
            name, _, folder = text.partition("=")
            if not folder or not Path(folder).is_dir():
                raise InputError(f"--labels-of {text}: no such folder; pass NAME=FOLDER with _dseg files")
            study.rows[name] = Path(folder).absolute()
        make(study)
        study.finish(script.stem)
        return 0

    return run_command(script.stem, work)
