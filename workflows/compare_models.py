"""Compare models on one labelled dataset: overlap, agreement and tests on a page, time and memory in a table.

    python workflows/compare_models.py DATASET OUT --models dgm16 dcnnet=FOLDER attunet25d=FOLDER
                                       [--atlases LABELLED_DATASET] [--participant-label LABEL ...]
                                       [--choose ENTITY ...] [--nprocs N] [--threads N] [--device cpu]

DATASET is a BIDS dataset with `_Chimap` and manual `_dseg` files (or one of `dgmseg simulate`). With --atlases, a
multi-atlas segmentation is added as a baseline: key multiatlas, or multiatlasjoint if ANTsPy is installed. Each map is
segmented in a new process, so that its memory can be measured. Open OUT/evaluation/evaluate.html; OUT/models.tsv has
times. Earlier results with the same map, weights and version are reused.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import bids_dgmseg
from bids_dgmseg.arguments import absolute_path, entity, participant_label, positive_int
from bids_dgmseg.bids.entities import output_path, split_entities
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.masks import fill_holes
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.io.files import read_optional_json, sha256, write_json, write_text, write_tsv
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.lab.evaluate.compare import EvaluationOptions, evaluate, find_test_set, write_evaluation
from bids_dgmseg.models.model_folder import find_folds_trained_on, limit_threads, read_model_folder
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.engines import choose_labels
from bids_dgmseg.segmentation.predict import Location

Located = dict[Any, tuple[Location, float]] | None
"""Where nuclei are by map, localizer and atlases, and the time that finding them took."""

BASELINES = ("multiatlas", "multiatlasjoint")
"""Locally weighted voting and joint label fusion, whose weights are a labelled dataset."""


@dataclass(frozen=True)
class Candidate:
    """A model to compare."""

    name: str
    """Name of its folder in ``predictions``, and its ``seg-`` entity."""
    model: str
    """Key of the registry, or of a baseline."""
    weights: Path | None = None
    """Model folder to use instead of the weights in the package; the labelled dataset of a baseline."""


@dataclass(frozen=True)
class Settings:
    """What all segmentations share."""

    out: Path
    device: str
    threads: int
    choose: tuple[str, ...]
    """Entities that decide if an atlas has several segmentations."""
    test: frozenset[str]
    """Participants whose maps are not used as atlases."""
    atlases: int | None = None
    """Number of atlases, chosen at random; by default all."""


def parse_candidates(models: Sequence[str], *, atlases: Path | None = None) -> list[Candidate]:
    """Parse the models to compare, which are ``KEY`` or ``KEY=FOLDER``.

    A repeated key is named with its folder: ``dgm16=tuned`` becomes dgm16tuned. `atlases` are the labelled dataset of
    the baselines; local voting is added unless a baseline is among the models.

    Raises
    ------
    InputError
        If a model or folder does not exist, a baseline has no atlases, or two models have the same name.
    """
    baselines = set(BASELINES) & {text.partition("=")[0] for text in models}
    candidates: dict[str, Candidate] = {}
    for text in [*models, *([BASELINES[0]] if atlases and not baselines else [])]:
        key, _, folder = text.partition("=")
        weights = Path(folder).absolute() if folder else atlases if key in BASELINES else None
        if weights and not weights.is_dir():
            raise InputError(f"{weights}: no such folder; check the folder passed for {key}")
        if key in BASELINES and weights is None:
            raise InputError(f"{key}: no atlases; pass a labelled dataset as `atlases`")
        name = model = key if key in BASELINES else get_model(key).name
        if weights and name in candidates:
            name += re.sub(r"[^0-9a-zA-Z]", "", weights.name)
        if name in candidates:
            raise InputError(f"{text}: two models would be named {name}; rename a folder of weights")
        candidates[name] = Candidate(name, model, weights)
    return list(candidates.values())


def segment_scan(candidate: Candidate, scan: Scan, settings: Settings, located: Located = None) -> dict[str, Any]:
    """Segment a scan, unless that was done with the same map, weights and version; return time and memory.

    ``problem`` says why there are no labels. The time includes loading weights, but not reading or writing images.
    `located` keeps where the nuclei are for other weights with the same localizer; the time includes finding them.
    """
    root = settings.out / "predictions" / candidate.name
    dseg = output_path(root, scan, "dseg", ".nii.gz", seg=candidate.name)
    cost = output_path(root, scan, "cost", ".json", seg=candidate.name)
    files = sorted(path for path in candidate.weights.rglob("*.[st]*") if path.is_file()) if candidate.weights else []
    made_from = {
        "version": bids_dgmseg.__version__,
        "map": sha256(scan.chi),
        "folder": str(candidate.weights.resolve()) if candidate.weights else "",
        "weights": {str(path): sha256(path) for path in files},
        "choose": list(settings.choose),
        "test": sorted(settings.test),
        "atlases": settings.atlases,
        "machine": [settings.device, settings.threads],
    }
    earlier = read_optional_json(cost)
    if dseg.is_file() and earlier.get("made_from") == made_from:
        return dict(earlier)
    limit_threads(settings.threads)
    result: dict[str, Any] = {"model": candidate.name, "scan": scan.name, "made_from": made_from}
    try:
        folder = None if candidate.model in BASELINES else candidate.weights
        contrast = read_model_folder(get_model(candidate.model), folder).input.contrast if folder else "chi"
        checked = check_chi(str(scan.chi), scan.sidecar, contrast=contrast).chi_ppm
        chi = checked.with_array(fill_holes(checked.array, checked.voxel_size_mm))
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        labels, structures, saved = _segment(chi, candidate, scan, settings, located)
        result |= {"seconds": time.perf_counter() - seconds + saved, "cpu_seconds": time.process_time() - cpu_seconds}
        write_text(label_table(structures), dseg.with_name(dseg.name.replace(".nii.gz", ".tsv")))
        write_like(labels, str(scan.chi), dseg)
    except InputError as error:
        dseg.unlink(missing_ok=True)
        result["problem"] = str(error)
    result["peak_mb"] = _peak_mb()
    write_json(result, cost)
    return result


def _segment(
    chi: Any, candidate: Candidate, scan: Scan, settings: Settings, located: Located
) -> tuple[Any, Any, float]:
    """Return labels and structures of a map by a model, with the folds that were not trained on it, and saved time."""
    if candidate.model in BASELINES:
        return _segment_by_atlases(chi, candidate, scan, settings)
    from bids_dgmseg.segmentation.segment import localize, segment_map

    weights = candidate.weights
    model, _ = choose_labels(get_model(candidate.model), weights)
    learned = find_folds_trained_on(weights, Path(scan.chi)) if weights else {}
    folds = tuple(fold for fold in learned if not learned[fold]) if any(learned.values()) else ()
    if any(learned.values()) and not folds:
        raise InputError(f"{weights}: all of its networks were trained on this map; use dgmseg cross-validate")
    location, saved = None, 0.0
    if located is not None and model.localizer.kind in ("atlas", "centre"):
        atlases = [sha256(path) for path in sorted(weights.glob("references/*"))] if weights else []
        key = (scan.chi, model.name, read_model_folder(model, weights).input, *atlases)
        if key in located:
            location, saved = located[key]
        else:
            start = time.perf_counter()
            location = localize(chi, model, weights=weights, device=settings.device, midplane=True)
            located[key] = location, time.perf_counter() - start
    segmented = segment_map(chi, model, weights=weights, device=settings.device, folds=folds, location=location)
    return segmented.labels, model.structures, saved


def _segment_by_atlases(chi: Any, candidate: Candidate, scan: Scan, settings: Settings) -> tuple[Any, Any, float]:
    from multi_atlas import MULTI_ATLAS, fuse_atlases, join_labels, register_atlases, vote_locally

    from bids_dgmseg.bids.labelled_scans import labelled_structures, read_labelled_maps
    from bids_dgmseg.lab.train.recipe import choose_some
    from bids_dgmseg.registration.align import Atlas

    dataset = Path(str(candidate.weights))
    path = Path(scan.chi)
    # a map of the dataset itself, even if it is a link out of it, is not segmented by atlases of the same participant
    inside = dataset.resolve() in {*path.resolve().parents, *(folder.resolve() for folder in path.absolute().parents)}
    excluded = {scan.participant, *settings.test} if inside else set()
    maps = read_labelled_maps(dataset, MULTI_ATLAS, choose=settings.choose, warn=lambda line: None)
    labelled = [row for row in maps if row.participant not in excluded]
    if not labelled:
        raise InputError(f"{dataset.name}: no labelled map of another participant; add atlases")
    names = choose_some([row.name for row in labelled], settings.atlases, seed=1)
    labelled = [row for row in labelled if row.name in names]
    atlases = [Atlas(row.name, row.chi, row.channel_map) for row in labelled]
    registered = register_atlases(chi, atlases, MULTI_ATLAS, settings.out / "registrations")
    fuse = vote_locally if candidate.model == BASELINES[0] else join_labels
    labels = fuse_atlases(chi, registered, MULTI_ATLAS, fuse=fuse).labels
    return labels, labelled_structures(labelled, MULTI_ATLAS), registered.saved_s


def _peak_mb() -> float:
    """Return the peak memory of this process; on Linux ``ru_maxrss`` would include that of its parent."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / (1024 if sys.platform == "darwin" else 1)


def models_table(overlap: pd.DataFrame, costs: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Summarize each model over its nuclei, both sides, and all scans.

    `overlap` is that of `dgmseg evaluate`, `costs` has a row per result of `segment_scan`, and `names` are the names of
    models in the evaluation.
    """
    rows = []
    for model, cost in costs.groupby("model", sort=False):
        scores = overlap[(overlap["prediction"] == names.get(str(model))) & (overlap["n_reference"] > 0)]
        scores = scores[scores["abbreviation"].str.contains("_")]
        rows.append(
            {
                "model": model,
                "n_compared": scores["abbreviation"].nunique(),
                "n_scans": int(cost["seconds"].notna().sum()),
                "n_failed": int(cost["seconds"].isna().sum()),
                "dice": scores["dice"].mean(),
                "dice_least": scores["dice"].min(),
                "hd95_mm": scores["hd95_mm"].mean(),
                "n_missed": int((scores["n_prediction"] == 0).sum()),
                "seconds": cost["seconds"].median(),
                "cpu_seconds": cost["cpu_seconds"].median(),
                "peak_mb": cost["peak_mb"].max(),
            }
        )
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the models; the exit code is 1 if a scan failed, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", type=absolute_path, help="labelled BIDS dataset")
    add("out", type=absolute_path, help="folder for the tables and the page")
    add("--models", nargs="+", default=["dgm16"], metavar="KEY[=FOLDER]", help="a key may be repeated with a folder")
    add("--atlases", type=absolute_path, metavar="LABELLED_DATASET", help="atlases of the multi-atlas baseline")
    add("--participant-label", nargs="+", type=participant_label, metavar="LABEL", help="compare only these (test set)")
    add("--choose", nargs="+", default=[], metavar="ENTITY", type=entity, help="which of several segmentations to use")
    add("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="default: %(default)s")
    add("--threads", type=positive_int, default=1, help="threads of each process (default: %(default)s)")
    add("--nprocs", type=positive_int, default=1, help="processes at a time; 1 to measure times (default: %(default)s)")
    args = parser.parse_args(argv)
    return run_command("compare_models", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    candidates = parse_candidates(args.models, atlases=args.atlases)
    labels = find_test_set(args.dataset, choose=args.choose)
    chosen = frozenset(args.participant_label or (scan.participant for scan in labels.scans))
    scans = [scan for scan in labels.scans if scan.participant in chosen]
    if not scans:
        raise InputError(f"{args.dataset.name}: no labelled scan of these participants; check --participant-label")
    settings = Settings(
        args.out, args.device, args.threads, tuple(args.choose), frozenset(args.participant_label or ())
    )
    costs = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.nprocs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [
            (candidate, scan, pool.submit(segment_scan, candidate, scan, settings))
            for scan in scans
            for candidate in candidates
        ]
        for candidate, scan, future in futures:
            try:
                costs.append(future.result())
            except BrokenProcessPool as error:
                raise InputError(f"{candidate.name}: {scan.name}: killed, probably out of memory") from error
    spent = pd.DataFrame(costs).reindex(columns=["model", "scan", "seconds", "cpu_seconds", "peak_mb", "problem"])
    failures = [f"{row['model']}: {row['scan']}: {row['problem']}" for row in costs if "problem" in row]
    segmented = [
        candidate.name
        for candidate in candidates
        if spent.loc[spent["model"] == candidate.name, "seconds"].notna().any()
    ]
    if not segmented:
        raise InputError(f"no scan could be segmented: {failures[0]}")
    images = tuple(path for path in labels.images if split_entities(path.name.partition(".")[0]).get("sub") in chosen)
    options = EvaluationOptions(
        reference=labels.reference,
        references=images,
        predictions=tuple(args.out / "predictions" / name for name in segmented),
        out=args.out / "evaluation",
        chi=scans[0].dataset_root,
        choose=tuple(args.choose),
        bilateral=True,
    )
    evaluation = evaluate(options)
    write_evaluation(options, evaluation)
    names = dict(zip(segmented, evaluation.raters[1:], strict=True))
    table = models_table(evaluation.tables["overlap"], spent, names)
    write_tsv(table, args.out / "models.tsv", float_format="%.7g")
    lines = [table.round(3).to_string(index=False, na_rep="n/a"), *labels.notes]
    lines += [f"failed: {line}" for line in (*failures, *evaluation.failures)]
    sys.stdout.write("\n".join([*lines, f"open {args.out / 'evaluation' / 'evaluate.html'}", ""]))
    return 1 if failures or evaluation.failures else 0


if __name__ == "__main__":
    sys.exit(main())
