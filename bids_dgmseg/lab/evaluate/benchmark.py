"""Benchmark of models on a labelled dataset: overlap and agreement, time and memory, tests of the differences."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import bids_dgmseg
from bids_dgmseg.bids.current import describe_model, hash_weights
from bids_dgmseg.bids.entities import output_path, split_entities
from bids_dgmseg.bids.labelled_scans import find_nuclei, labelled_structures, match_labels, read_labelled_maps
from bids_dgmseg.bids.masks_and_maps import name_scan, read_label_table
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    MISSING,
    read_json,
    read_optional_json,
    read_tsv,
    sha256,
    sha256_of,
    write_json,
    write_tsv,
)
from bids_dgmseg.lab.evaluate.compare import Evaluation, EvaluationOptions, evaluate, write_evaluation
from bids_dgmseg.lab.evaluate.summary_tables import BENCHMARK_DICTIONARIES, models_table, nuclei_table
from bids_dgmseg.lab.evaluate.timed_segmentation import BASELINES, JOINT_FUSION, LOCAL_VOTING, SegmentationJob
from bids_dgmseg.lab.train.splits import read_sites, split_by_site
from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import bilateral_names, join_sides
from bids_dgmseg.segmentation.engine import choose_labels, engine_of


@dataclass(frozen=True)
class Candidate:
    """A model to benchmark."""

    name: str
    """Name of its folder in ``predictions``, and its ``seg-`` entity."""
    model: str
    """Key of the registry, or of a baseline."""
    weights: Path | None = None
    """Model folder to use instead of the weights in the package; the labelled dataset of a baseline."""
    label_map: Path | None = None
    """Table that maps the labels of an nnU-Net folder to nuclei."""
    choose: tuple[str, ...] = ()
    """Entities that decide if an atlas of a baseline has several segmentations."""
    holdout: tuple[str, ...] = ()
    """Participants whose maps are not used as atlases of a baseline if they are among the labelled scans."""

    @property
    def registered(self) -> Model:
        """Registry entry with the nuclei of the weights, or that of the baselines."""
        if self.model in BASELINES:
            from bids_dgmseg.lab.evaluate.multi_atlas import MULTI_ATLAS

            return MULTI_ATLAS
        return choose_labels(get_model(self.model), self.weights, self.label_map)[0]


@dataclass(frozen=True)
class TestSet:
    """Labelled scans that the models are compared on."""

    __test__ = False  # not a class of tests

    scans: tuple[Scan, ...]
    reference: Path
    """Dataset of the labels."""
    nuclei: frozenset[str]
    """Abbreviations of the labelled nuclei."""
    choose: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    """Name of a scan → name of its labels, which may have their own ``desc``."""
    images: tuple[Path, ...] = ()
    """Its label images: the dataset may have others, such as those of a model."""
    bilateral: bool = False
    """Whether to add a bilateral row (left and right combined) per nucleus."""


def parse_candidates(
    given: Sequence[str], *, atlases: Path | None = None, label_map: Path | None = None, choose: Sequence[str] = ()
) -> list[Candidate]:
    """Parse the models to compare, which are ``KEY`` or ``KEY=FOLDER``.

    A repeated key is named with its folder (``dgm16=tuned`` becomes dgm16tuned), and so is a folder with another
    network than the model's, such as a U-Net trained by the recipe of ``dcnnet``. `atlases` are the labelled dataset of
    the baselines; `LOCAL_VOTING` is added unless a baseline is among those given. `label_map` maps the labels of
    nnU-Net folders to nuclei, and `choose` are entities that decide if an atlas has several segmentations.

    Raises
    ------
    InputError
        If a model or folder does not exist, a baseline has no atlases, two models have the same name, or the label map
        is not for any of them.
    """
    keys = [text.partition("=")[0] for text in given]
    baseline = [LOCAL_VOTING] if atlases and not set(BASELINES) & set(keys) else []
    candidates: dict[str, Candidate] = {}
    for text in [*given, *baseline]:
        key, _, folder = text.partition("=")
        is_baseline = key in BASELINES
        weights = Path(folder).absolute() if folder else atlases if is_baseline else None
        if weights and not weights.is_dir():
            raise InputError(f"{weights}: no such folder; check the folder passed for {key}")
        if is_baseline and weights is None:
            raise InputError(f"{key}: no atlases; pass a labelled dataset as `atlases`")
        model = name = key if is_baseline else get_model(key).name
        registered = None if is_baseline or not weights else get_model(key)
        has_other_network = registered and read_model_folder(registered, weights).network != registered.network
        if weights and (has_other_network or name in candidates):
            name += re.sub(r"[^0-9a-zA-Z]", "", weights.name)
        if name in candidates:
            raise InputError(f"{text}: two models would be named {name}; rename a folder of weights")
        can_map = not is_baseline and engine_of(get_model(model)).labels_from_folder
        candidates[name] = Candidate(
            name, model, weights, label_map if can_map else None, tuple(choose) if is_baseline else ()
        )
    if label_map and not any(candidate.label_map for candidate in candidates.values()):
        raise InputError(f"`label_map` {label_map.name}: no model uses one; add nnunet2step=FOLDER to `models`")
    return list(candidates.values())


def check_candidates(
    candidates: Sequence[Candidate], *, test_set: TestSet, device: str, warn: Callable[[str], None]
) -> None:
    """Load every model once, so that a benchmark that cannot work ends before its first scan.

    `warn` is called with each line about labels of the atlases that are not used.

    Raises
    ------
    InputError
        If weights, labels of atlases or ANTsPy are missing, or no atlas has a nucleus of the test set.
    """
    from bids_dgmseg.lab.evaluate.multi_atlas import MULTI_ATLAS, import_ants
    from bids_dgmseg.segmentation.segment import check_ready

    for candidate in candidates:
        if candidate.model == JOINT_FUSION:
            import_ants()
        if candidate.model not in BASELINES:
            check_ready(candidate.registered, weights=candidate.weights, device=device)
    for atlases, choose in {(one.weights, one.choose): None for one in candidates if one.model in BASELINES}:
        if not atlases:
            continue
        labelled = read_labelled_maps(atlases, MULTI_ATLAS, choose=choose, warn=lambda line: warn(f"atlases: {line}"))
        names = [structure.abbreviation for structure in labelled_structures(labelled, MULTI_ATLAS)]
        if test_set.nuclei.isdisjoint(names):
            raise InputError(
                f"{atlases.name}: atlases of {list_some(names)}, but the scans have {list_some(test_set.nuclei)}; "
                "use atlases with labels of these nuclei"
            )


def find_test_set(
    dataset: Path,
    *,
    derivatives: Sequence[Path] = (),
    choose: Sequence[str] = (),
    bilateral: bool = False,
    warn: Callable[[str], None],
) -> TestSet:
    """Find the labelled scans of a dataset; `warn` is called with each line about labels that are not nuclei.

    With `bilateral`, a bilateral label (``RN``) is accepted, too, and tables have bilateral rows.

    Raises
    ------
    InputError
        If there are none, no label is a nucleus, or the labels are in several datasets.
    """
    scans, labels = match_labels(dataset, derivatives=derivatives, choose=choose)
    # the dataset of an image is above its highest folder of a participant
    roots = {
        [folder for folder in path.parents if folder.name.startswith("sub-")][-1].parent for path in labels.values()
    }
    if len(roots) > 1:
        some = ", ".join(sorted(root.name for root in roots))
        raise InputError(f"{dataset.name}: labels in several datasets ({some}); move them into one")
    nuclei, lines = find_nuclei(labels.values(), bilateral=bilateral)
    for line in lines:
        warn(line)
    if not nuclei:
        raise InputError(
            f"{dataset.name}: none of the labels that can be read is a nucleus (DN_L, DN_R, …); name them in the "
            "column abbreviation of dseg.tsv"
        )
    labelled = tuple(scan for scan in scans if scan.chi in labels)
    names = {scan.name: name_scan(labels[scan.chi]) for scan in labelled}
    images = tuple(labels[scan.chi] for scan in labelled)
    return TestSet(labelled, roots.pop(), nuclei, tuple(choose), names, images, bilateral)


def select_test_part(test_set: TestSet, dataset: Path, split: str) -> tuple[TestSet, pd.DataFrame]:
    """Return the labelled scans of the test part of a split, and the split (``participant_id``, ``part``, …).

    `split` is a table such as the ``split.tsv`` of ``dgmseg train-nnunet``, or the seed of its stratified split of the
    labelled participants into 70 % for training, 10 % for tuning and 20 % for testing, each site in proportion.

    Raises
    ------
    InputError
        If the table cannot be read, or no labelled scan is in the test part.
    """
    if split.isdecimal():
        sites = read_sites(dataset, {scan.participant for scan in test_set.scans})
        parts = split_by_site(sites, seed=int(split))
        rows = [{"participant_id": f"sub-{one}", "site": sites[one], "part": part} for one, part in parts.items()]
        table = pd.DataFrame(rows).sort_values("participant_id", ignore_index=True)
    else:
        path = Path(split)
        if not path.is_file():
            raise InputError(f"`split` {split}: no such file; pass a split.tsv, or the seed of a split")
        table = read_tsv(path, dtype=str)
        if not {"participant_id", "part"} <= set(table.columns):
            raise InputError(
                f"{path.name}: no columns participant_id and part; pass a split.tsv of dgmseg train-nnunet"
            )
    chosen = set(table.loc[table["part"] == "test", "participant_id"])
    scans = tuple(scan for scan in test_set.scans if f"sub-{scan.participant}" in chosen)
    if not scans:
        raise InputError(f"`split` {split}: no labelled scan of {dataset.name} is in its test part; use another split")
    return replace(test_set, scans=scans), table


def segment_scan(candidate: Candidate, scan: Scan, out: Path, *, device: str, threads: int) -> Path:
    """Segment a scan in its own process, unless that was done with the same map, weights and version.

    Return a JSON file with time and memory; ``problem`` says why there are no labels.
    """
    root = out / "predictions" / candidate.name
    state = [
        sha256(scan.chi),
        sha256_of({"sidecar": scan.sidecar, "weights": hash_weights(candidate.weights, candidate.registered)}),
        describe_model(candidate.registered),
        bids_dgmseg.__version__,
        candidate.model,
        device,
        str(threads),
        *candidate.choose,
        *candidate.holdout,
    ]
    digest = hashlib.sha256(" ".join(state).encode()).hexdigest()
    dseg = output_path(root, scan, "dseg", ".nii.gz", seg=candidate.name)
    cost = output_path(root, scan, "cost", ".json", seg=candidate.name)
    if dseg.is_file() and read_optional_json(cost).get("fingerprint") == digest:
        return cost
    for earlier in (dseg, cost):
        earlier.unlink(missing_ok=True)
    job = SegmentationJob(
        chi=str(scan.chi),
        sidecar=scan.sidecar,
        model=candidate.model,
        weights=str(candidate.weights) if candidate.weights else None,
        out=str(dseg),
        cost=str(cost),
        device=device,
        threads=threads,
        label_map=str(candidate.label_map) if candidate.label_map else None,
        choose=candidate.choose,
        holdout=candidate.holdout,
    )
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        spent = job.run(Path(folder))
    return write_json({"model": candidate.name, "scan": scan.name, **spent, "fingerprint": digest}, cost)


def benchmark(candidates: Sequence[Candidate], test_set: TestSet, costs: Sequence[Path], out: Path) -> list[str]:
    """Compare the segmentations with the labels, and write tables, figures and the page to `out`.

    `costs` are the results of `segment_scan` for each candidate and scan. Return one line per scan that failed.

    Raises
    ------
    InputError
        If no model has a nucleus in common with the labels.
    """
    columns = ["model", "scan", "seconds", "cpu_seconds", "peak_mb", "problem"]
    spent = pd.DataFrame([read_json(path) for path in costs]).reindex(columns=columns).replace(MISSING, np.nan)
    failures = [
        f"{row['model']}: {row['scan']}: {row['problem']}" for row in spent[spent["problem"].notna()].to_dict("records")
    ]
    predictions = {one.name: sorted((out / "predictions" / one.name).rglob("*_dseg.nii.gz")) for one in candidates}
    segmented = [name for name, paths in predictions.items() if paths]
    if not segmented:
        raise InputError(f"no scan could be segmented: {failures[0]}")
    options = EvaluationOptions(
        reference=test_set.reference,
        references=test_set.images,
        predictions=tuple(out / "predictions" / name for name in segmented),
        out=out / "evaluation",
        chi=test_set.scans[0].dataset_root,
        choose=test_set.choose,
        bilateral=test_set.bilateral,
    )
    evaluation = evaluate(options)
    write_evaluation(options, evaluation)
    names = dict(zip(evaluation.raters[1:], segmented, strict=True))
    overlap, summary, agreement = (
        evaluation.tables[name].replace({"prediction": names}) for name in ("overlap", "overlap_summary", "agreement")
    )
    nuclei = {
        name: list(dict.fromkeys(label for path in paths for label in read_label_table(path).abbreviations.values()))
        for name, paths in predictions.items()
    }
    sides = overlap[~overlap["abbreviation"].isin(bilateral_names(overlap["abbreviation"].unique()))]
    both = {name: list(dict.fromkeys(join_sides(labels).values())) for name, labels in nuclei.items()}
    rows = {name: [*labels, *(both[name] if test_set.bilateral else ())] for name, labels in nuclei.items()}
    tables = {
        "models": models_table(sides, spent, models=nuclei),
        "summary": nuclei_table(summary, agreement, models=rows),
        "comparison": _comparison_table(overlap, spent, test_set.labels),
    }
    failures += evaluation.failures
    _write_results(out, tables, evaluation, candidates, failures)
    return failures


def _comparison_table(overlap: pd.DataFrame, spent: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Join measures and cost of each scan; a scan that failed has one row without a nucleus."""
    measures = overlap.rename(columns={"prediction": "model"}).drop(columns="reference")
    front = ["participant_id", "session_id", "scan", "model", "abbreviation"]
    measures = measures[[*front, *(column for column in measures if column not in front)]]
    spent = spent.assign(scan=[labels[scan] for scan in spent["scan"]])
    table = measures.merge(spent, on=["scan", "model"], how="outer", sort=False)
    entities = [split_entities(scan) for scan in table["scan"]]
    for column, key in (("participant_id", "sub"), ("session_id", "ses")):
        table[column] = [f"{key}-{named[key]}" if key in named else None for named in entities]
    return table.sort_values(["model", "scan"], kind="stable").reset_index(drop=True)


def _write_results(
    out: Path,
    tables: Mapping[str, pd.DataFrame],
    evaluation: Evaluation,
    candidates: Sequence[Candidate],
    failures: Sequence[str],
) -> None:
    from bids_dgmseg.lab.evaluate.page import write_benchmark_page

    for name, table in tables.items():
        write_tsv(table, out / f"{name}.tsv", float_format="%.7g")
        write_json({str(column): BENCHMARK_DICTIONARIES[name][str(column)] for column in table}, out / f"{name}.json")
    facts: dict[str, Any] = {
        "models": {
            one.name: {"model": one.model, "weights": str(one.weights) if one.weights else "shipped with the package"}
            for one in candidates
        },
        "reference": evaluation.raters[0],
        "n_scans": evaluation.n_scans,
        "notes": list(evaluation.notes),
        "failures": list(failures),
        "version": bids_dgmseg.__version__,
    }
    write_json(facts, out / "compare.json")
    tables = {**tables, "methods": evaluation.tables.get("methods", pd.DataFrame())}
    write_benchmark_page(out, tables=tables, facts=facts, evaluation="evaluation/evaluate.html")
