"""Compare models on a labelled dataset: what each gives, what a scan costs, which differences are more than chance."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import bids_dgmseg
from bids_dgmseg.bids.derivatives import fingerprint, output_path
from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.bids.segmentations import name_scan, read_label_table
from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.config import Segmentation as SegmentationOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.evaluate.isolated_run import JOINT, VOTES, Segmentation
from bids_dgmseg.evaluate.ranking import COST_COLUMNS, MODELS_COLUMNS, NUCLEI_COLUMNS, models_table, nuclei_table
from bids_dgmseg.evaluate.run import OVERLAP_TABLE, Evaluation, Request, evaluate, write_evaluation
from bids_dgmseg.io.files import write_json, write_text
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.train.data import drawn_structures, find_nuclei, match_labels, read_labelled_maps

_BASELINES = (VOTES, JOINT)

EVALUATION, PREDICTIONS = "evaluation", "predictions"


@dataclass(frozen=True)
class Contender:
    """A model that takes part."""

    name: str
    """Of its folder below ``predictions``, and its ``seg-`` entity."""
    model: str
    """Key of the registry, or of a baseline."""
    weights: Path | None = None
    """Folder in place of the model's own weights; the labelled dataset of a baseline."""
    label_map: Path | None = None
    """Says which label of an nnU-Net folder is which nucleus."""
    choose: tuple[str, ...] = ()
    """Entities that decide where a baseline's atlas has several segmentations."""

    @property
    def registered(self) -> Model:
        """The registry's entry with the nuclei of its weights, or the baseline's."""
        if self.model in _BASELINES:
            from bids_dgmseg.segmentation.multi_atlas import MULTI_ATLAS

            return MULTI_ATLAS
        return choose_labels(get_model(self.model), self.weights, self.label_map)[0]


@dataclass(frozen=True)
class Field:
    """What the models are compared on."""

    scans: tuple[Scan, ...]
    """Those with labels."""
    reference: Path
    """Dataset of the labels."""
    nuclei: frozenset[str]
    """Abbreviations of those that are labelled."""
    choose: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    """Name of a scan → the one that its labels have, by which they are evaluated: they may have a ``desc`` alone."""


@dataclass
class Outcome:
    """Everything that the page tells."""

    tables: Mapping[str, pd.DataFrame]
    evaluation: Evaluation
    contenders: Sequence[Contender]
    failures: list[str] = field(default_factory=list)


def name_contenders(
    given: Sequence[str], *, atlases: Path | None = None, label_map: Path | None = None, choose: Sequence[str] = ()
) -> list[Contender]:
    """Read which models take part.

    Parameters
    ----------
    given : sequence of str
        ``KEY`` or ``KEY=FOLDER``. A key that is there before is named with its folder: ``dgm16=tuned`` is dgm16tuned.
    atlases : path, optional
        Labelled dataset of the baselines; `VOTES` takes part unless a baseline is among those given.
    label_map : path, optional
        Which labels of the nnU-Net folders are which nuclei.
    choose : sequence of str
        Entities that decide where a scan of the atlases has several segmentations.

    Raises
    ------
    InputError
        If there is no such model or folder, a baseline has no atlases, two models would have one name, or there is no
        nnU-Net folder for the label map.
    """
    keys = [one.partition("=")[0] for one in given]
    baseline = [VOTES] if atlases and not set(_BASELINES) & set(keys) else []
    contenders: dict[str, Contender] = {}
    for one in [*given, *baseline]:
        model, weights = _read_contender(one, atlases)
        name = model
        if name in contenders and weights:
            name += re.sub(r"[^0-9a-zA-Z]", "", weights.name)
        if name in contenders:
            raise InputError(f"{one}: two models would be named {name}; rename a folder of weights")
        foreign = model not in _BASELINES and get_model(model).localizer.kind == "nnunet"
        chosen = tuple(choose) if model in _BASELINES else ()
        contenders[name] = Contender(name, model, weights, label_map if foreign else None, chosen)
    if label_map and not any(one.label_map for one in contenders.values()):
        raise InputError(f"--label-map {label_map.name}: no model here takes one; give --models nnunet2step=FOLDER too")
    return list(contenders.values())


def _read_contender(text: str, atlases: Path | None) -> tuple[str, Path | None]:
    """Split ``KEY=FOLDER`` and check both."""
    key, _, folder = text.partition("=")
    weights = Path(folder).absolute() if folder else atlases if key in _BASELINES else None
    if weights and not weights.is_dir():
        raise InputError(f"{weights}: no such folder; check the one given for {key}")
    if key not in _BASELINES:
        return get_model(key).name, weights
    if weights is None:
        raise InputError(f"{key}: has no atlases; give a labelled dataset to --atlases")
    return key, weights


def check_contenders(
    contenders: Sequence[Contender], *, ground: Field, device: str, say: Callable[[str], None]
) -> None:
    """Load what each needs once, so that what cannot work ends before the first scan.

    Parameters
    ----------
    contenders : sequence of Contender
        The models.
    ground : Field
        The scans.
    device : str
        Where networks run.
    say : callable
        Gets a line on labels of atlases that are no nuclei, and whatever else is left out of them.

    Raises
    ------
    InputError
        If weights, labels of atlases or ANTsPy are missing, or no atlas has a nucleus that the scans have.
    """
    from bids_dgmseg.segmentation.multi_atlas import import_ants
    from bids_dgmseg.segmentation.segment import check_ready

    for one in contenders:
        if one.model == JOINT:
            import_ants()
        if one.model not in _BASELINES:
            check_ready(one.registered, weights=one.weights, device=device)
    libraries = {(one.weights, one.choose): None for one in contenders if one.model in _BASELINES}
    for atlases, choose in libraries:
        if atlases:
            _check_atlases(atlases, choose, ground, say)


def _check_atlases(atlases: Path, choose: Sequence[str], ground: Field, say: Callable[[str], None]) -> None:
    from bids_dgmseg.segmentation.multi_atlas import MULTI_ATLAS

    labelled = read_labelled_maps(atlases, MULTI_ATLAS, choose=choose, say=lambda line: say(f"atlases: {line}"))
    names = [structure.abbreviation for structure in drawn_structures(labelled, MULTI_ATLAS)]
    if ground.nuclei.isdisjoint(names):
        raise InputError(
            f"{atlases.name}: atlases of {list_some(names)}, but the scans have {list_some(ground.nuclei)}; "
            "give atlases with labels of these"
        )


def find_field(dataset: Path, *, choose: Sequence[str] = (), say: Callable[[str], None]) -> Field:
    """Find the labelled scans of a dataset; `say` gets a line on labels that are no nuclei.

    Raises
    ------
    InputError
        If there is none, no label is a nucleus, or their labels lie in several datasets.
    """
    scans, partners = match_labels(dataset, choose=choose)
    roots = {_root_of(path) for path in partners.values()}
    if len(roots) > 1:
        some = ", ".join(sorted(root.name for root in roots))
        raise InputError(f"{dataset.name}: labels in several datasets ({some}); say which with --choose")
    nuclei, notes = find_nuclei(partners.values())
    for line in notes:
        say(line)
    if not nuclei:
        raise InputError(
            f"{dataset.name}: no label that can be read is a nucleus (DN_L, DN_R, …); "
            "name them so in the column abbreviation of dseg.tsv"
        )
    labelled = tuple(scan for scan in scans if scan.chi in partners)
    labels = {scan.name: name_scan(partners[scan.chi]) for scan in labelled}
    return Field(labelled, roots.pop(), nuclei, tuple(choose), labels)


def _root_of(path: Path) -> Path:
    """Find the dataset of an image: above the highest folder that is a participant's."""
    return [parent for parent in path.parents if parent.name.startswith("sub-")][-1].parent


def segment_scan(contender: Contender, scan: Scan, out: Path, *, device: str, threads: int) -> Path:
    """Segment a scan in a process of its own, unless that was done with the same map, weights and version.

    Returns
    -------
    path
        JSON of what it cost; ``problem`` says why there are no labels.
    """
    root, model = out / PREDICTIONS / contender.name, contender.registered
    options = SegmentationOptions(weights=contender.weights)
    made_of = [
        fingerprint(scan, model, options, ReferenceRegion()),
        contender.model,
        device,
        str(threads),
        *contender.choose,
    ]
    mark = hashlib.sha256(" ".join(made_of).encode())
    dseg = output_path(root, scan, "dseg", ".nii.gz", seg=contender.name)
    cost = output_path(root, scan, "cost", ".json", seg=contender.name)
    if dseg.is_file() and cost.is_file() and _read(cost).get("fingerprint") == mark.hexdigest():
        return cost
    for earlier in (dseg, cost):
        earlier.unlink(missing_ok=True)
    weights = str(contender.weights) if contender.weights else None
    with tempfile.TemporaryDirectory(prefix="compare_") as folder:
        spent = Segmentation(
            str(scan.chi),
            scan.sidecar,
            contender.model,
            weights,
            str(dseg),
            str(cost),
            device,
            threads,
            str(contender.label_map) if contender.label_map else None,
            contender.choose,
        ).run(Path(folder))
    write_json({"model": contender.name, "scan": scan.name, **spent, "fingerprint": mark.hexdigest()}, cost)
    return cost


def compare(contenders: Sequence[Contender], ground: Field, costs: Sequence[Path], out: Path) -> Outcome:
    """Measure what the models made, and write tables, figures and the page.

    Parameters
    ----------
    contenders : sequence of Contender
        The models.
    ground : Field
        The scans.
    costs : sequence of path
        What `segment_scan` gave for each model and scan.
    out : path
        Folder of the results.

    Raises
    ------
    InputError
        If no model has a nucleus that the labels have.
    """
    spent = (
        pd.DataFrame([_read(path) for path in costs])
        .reindex(columns=["model", "scan", *COST_COLUMNS, "problem"])
        .replace("n/a", np.nan)
    )
    there = [one for one in contenders if any((out / PREDICTIONS / one.name).rglob("*_dseg.nii.gz"))]
    failures = [
        f"{row['model']}: {row['scan']}: {row['problem']}" for row in spent[spent["problem"].notna()].to_dict("records")
    ]
    if not there:
        raise InputError(f"no scan could be segmented: {failures[0]}")
    predictions = tuple(out / PREDICTIONS / one.name for one in there)
    request = Request(ground.reference, predictions, out / EVALUATION, ground.scans[0].dataset_root, ground.choose)
    evaluation = evaluate(request)
    write_evaluation(request, evaluation)
    names = dict(zip(evaluation.raters[1:], (one.name for one in there), strict=True))
    overlap, summary, agreement = (
        evaluation.tables[name].replace({"prediction": names}) for name in ("overlap", "overlap_summary", "agreement")
    )
    models = {one.name: _labels_of(out / PREDICTIONS / one.name) for one in contenders}
    tables = {
        "models": models_table(overlap, spent, models=models),
        "summary": nuclei_table(summary, agreement, models=models),
        "comparison": _long(overlap, spent, ground.labels),
    }
    outcome = Outcome(tables, evaluation, contenders, [*failures, *evaluation.failures])
    _write(outcome, out)
    return outcome


def _labels_of(root: Path) -> list[str]:
    """List the nuclei of a model by the label tables of what it segmented."""
    known: dict[str, None] = {}
    for path in sorted(root.rglob("*_dseg.nii.gz")):
        known |= dict.fromkeys(read_label_table(path).abbreviations.values())
    return list(known)


def _long(overlap: pd.DataFrame, spent: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Put what a scan cost behind what was measured of it; a scan that failed has a row without a nucleus."""
    named = overlap.rename(columns={"prediction": "model"}).drop(columns="reference")
    front = ["participant_id", "session_id", "scan", "model", "abbreviation"]
    named = named[[*front, *(column for column in named if column not in front)]]
    matched = spent.assign(scan=[labels[scan] for scan in spent["scan"]])
    long = named.merge(matched, on=["scan", "model"], how="outer", sort=False)
    entities = [split_entities(scan) for scan in long["scan"]]
    for column, key in (("participant_id", "sub"), ("session_id", "ses")):
        long[column] = [f"{key}-{there[key]}" if key in there else None for there in entities]
    return long.sort_values(["model", "scan"], kind="stable").reset_index(drop=True)


_LONG_COLUMNS = {
    **{key: entry for key, entry in OVERLAP_TABLE.items() if key not in ("reference", "prediction")},
    "model": MODELS_COLUMNS["model"],
    **COST_COLUMNS,
    "problem": {"Description": "Why the model could not segment the scan"},
}


def _write(outcome: Outcome, out: Path) -> None:
    from bids_dgmseg.report.benchmark import write_benchmark_page

    dictionaries = {"models": MODELS_COLUMNS, "summary": NUCLEI_COLUMNS, "comparison": _LONG_COLUMNS}
    for name, table in outcome.tables.items():
        write_text(table.to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.7g"), out / f"{name}.tsv")
        write_json({str(column): dictionaries[name][str(column)] for column in table}, out / f"{name}.json")
    facts: dict[str, Any] = {
        "models": {
            one.name: {"model": one.model, "weights": str(one.weights) if one.weights else "the package's own"}
            for one in outcome.contenders
        },
        "reference": outcome.evaluation.raters[0],
        "n_scans": outcome.evaluation.n_scans,
        "notes": outcome.evaluation.notes,
        "failures": outcome.failures,
        "version": bids_dgmseg.__version__,
    }
    write_json(facts, out / "compare.json")
    tables = {**outcome.tables, "methods": outcome.evaluation.tables.get("methods", pd.DataFrame())}
    write_benchmark_page(out, tables=tables, facts=facts, evaluation=f"{EVALUATION}/evaluate.html")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
