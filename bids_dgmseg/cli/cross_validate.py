"""``dgmseg cross-validate``: train folds, segment with each the participants that it has not seen, evaluate all."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.arguments import non_negative_int, positive_int
from bids_dgmseg.cli.bids_app import read_config
from bids_dgmseg.cli.options import CHECKPOINT, PLAN, RECIPE, RUNTIME, Verb, option
from bids_dgmseg.cli.train import (
    NNUNET,
    PAPER_MODELS,
    RESUME,
    check_dataset,
    check_folds,
    find_model,
    find_start,
    make_nnunet_training,
    make_training,
)
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import FAILED, OK, InputError, for_terminal, list_some, run_command
from bids_dgmseg.io.files import read_json, sha256_or_error
from bids_dgmseg.io.locks import sole_writer
from bids_dgmseg.models.registry import Model

if TYPE_CHECKING:
    from bids_dgmseg.lab.evaluate.benchmark import TestSet
    from bids_dgmseg.lab.train.nnunet.run import NnunetRequest
    from bids_dgmseg.lab.train.splits import Part

VALIDATION = 0.2
"""Fraction of the training participants that select the epoch, where a paper uses the fold's own part for it."""

NNUNET_VALIDATION = 0.125
"""Of four fifths: with five folds 70, 10 and 20 % of all, as in DentateSeg's study."""


def cross_validate(args: argparse.Namespace) -> int:
    """Train and segment each fold, and evaluate all of them; the exit code is 1 if some scans failed."""
    nnunet = args.model == NNUNET
    model = find_model(args.model, "train-nnunet" if nnunet else "train")
    dataset = check_dataset(args.dataset, args.out)
    n_folds, out = args.folds or 5, args.out.absolute()
    if args.plan != "paper" and not nnunet:
        raise InputError(f"--plan {args.plan}: only available for {NNUNET}; omit it")
    if n_folds < 2:
        raise InputError(f"--folds {n_folds}: cross-validation needs 2 or more")
    args.folds, code = n_folds, OK
    folds = check_folds(args.fold, n_folds)
    find_labels(dataset, args, warn=lambda line: None)  # labels that cannot be compared end it before the first fold
    for fold in folds:
        weights = out / "models" / f"fold-{fold}"
        with StatusLine() as line, sole_writer(weights):
            train = train_nnunet_fold if nnunet else train_recipe_fold
            test = train(model, dataset, weights, fold, args, line)
        code = max(code, segment(model, dataset, weights, out / f"fold-{fold}", test, args))
    if args.fold:
        if not (args.pretrain_on or args.distill):  # pseudo-labels may differ between folds
            print("run the same command without --fold to evaluate when all folds are done")
        return code
    return max(code, evaluate_folds(dataset, out, args))


def train_recipe_fold(
    model: Model, dataset: Path, weights: Path, fold: int, args: argparse.Namespace, line: StatusLine
) -> Sequence[str]:
    """Train a fold of a paper's network into its own model folder; return its test participants."""
    from bids_dgmseg.lab.train.folds import list_start_maps, train_folds

    training = replace(make_training(model, args), out=weights)
    if not set(training.recipe.classes) <= set(model.classes):
        raise InputError(f"--variant {args.variant}: its classes cannot be used for segmentation; choose another one")
    if training.recipe.validation is None:
        line.log(f"fold {fold}: {VALIDATION:.0%} of the training participants validate, not the test participants")
        training = replace(training, recipe=replace(training.recipe, validation=VALIDATION))
    check_unseen(list_start_maps(training), dataset, args)
    train_folds(training, [fold], log=line)
    test: Sequence[str] = read_json(weights / "training.json")["folds"][fold]["test"]
    return test


def check_unseen(start_maps: Sequence[Sequence[str]], dataset: Path, args: argparse.Namespace) -> None:
    """Refuse initial weights that were trained on a scan of the dataset; by fold, the checksums of their maps."""
    from bids_dgmseg.bids.labelled_scans import match_labels

    maps = set().union(*start_maps)
    if not maps:
        return
    scans, _ = match_labels(dataset, derivatives=tuple(args.derivatives), choose=tuple(args.choose))
    if learned := [one.name for one in scans if sha256_or_error(one.chi) in maps]:
        raise InputError(
            f"--from {args.start}: these weights were trained on {list_some(learned)}; use weights "
            "trained on other scans"
        )


def train_nnunet_fold(
    model: Model, dataset: Path, weights: Path, fold: int, args: argparse.Namespace, line: StatusLine
) -> Sequence[str]:
    """Train both nnU-Nets of a fold into its own model folder; return its test participants."""
    from bids_dgmseg.io.files import read_tsv
    from bids_dgmseg.lab.train.nnunet.run import NnunetRequest, list_start_maps
    from bids_dgmseg.models.nnunet_folder import STEPS

    given = {"--arch": args.arch, "--recipe": args.recipe, "--scans": args.scans}
    given |= {"--pretrain-on": args.pretrain_on, "--distill": args.distill, "--learning-rate": args.learning_rate}
    given |= {"--holdout": args.holdout, "--variant": args.variant != "paper"}
    if wrong := [name for name, value in given.items() if value]:
        raise InputError(f"{wrong[0]}: not available for {NNUNET}; omit it")
    request = NnunetRequest(
        model=model,
        dataset=dataset,
        out=weights,
        steps=STEPS,
        training=make_nnunet_training(args, n_nets=len(STEPS)),
        derivatives=tuple(args.derivatives),
        choose=tuple(args.choose),
        split=partial(_split_sites, folds=args.folds, fold=fold),
        start=find_start(model, args.start),
    )
    check_unseen(list_start_maps(request), dataset, args)
    train_in_new_process(request)
    table = read_tsv(weights / "split.tsv")
    return [name.removeprefix("sub-") for name in table.loc[table["part"] == "test", "participant_id"]]


def _split_sites(sites: Mapping[str, str], *, folds: int, fold: int) -> dict[str, Part]:
    """Return the part of each participant (→ site); folds are the same as those of the other models."""
    from bids_dgmseg.lab.train.recipe import Recipe
    from bids_dgmseg.lab.train.splits import split_fold

    try:
        split = split_fold(sites, folds=folds, fold=fold, seed=Recipe.split_seed, validation=NNUNET_VALIDATION)
    except ValueError as error:
        raise InputError(f"--folds {folds}: {error}; use fewer folds") from error
    named: dict[Part, Sequence[str]] = {"train": split.training, "tune": split.validation, "test": split.test}
    return {participant: part for part, participants in named.items() for participant in participants}


def train_in_new_process(request: NnunetRequest) -> None:
    """Train both nnU-Nets in a new process; nnU-Net forks, which hangs once this process has segmented scans."""
    process = multiprocessing.get_context("spawn").Process(target=_train_nnunet, args=(request,))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()
    if (code := process.exitcode) is not None and code < 0:
        raise InputError(f"{request.out.name}: the training was killed (signal {-code}); run the same command again")
    if code:
        raise SystemExit(code)  # the process has printed why


def _train_nnunet(request: NnunetRequest) -> None:
    from bids_dgmseg.lab.train.nnunet.run import run_nnunet_training
    from bids_dgmseg.run.environment import terminate_as_interrupt

    def train() -> int:
        with StatusLine() as line:
            run_nnunet_training(request, log=line)
        return OK

    with terminate_as_interrupt():
        raise SystemExit(run_command("dgmseg cross-validate", train))


def segment(
    model: Model, dataset: Path, weights: Path, out: Path, participants: Sequence[str], args: argparse.Namespace
) -> int:
    """Segment participants as ``bids_dgmseg`` does, without masks and viewers; return its exit code."""
    from bids_dgmseg.run.participant import run_participant

    if others := {path.name.removeprefix("sub-") for path in out.glob("sub-*/")} - set(participants):
        raise InputError(
            f"{out}: has results of sub-{min(others)}, not in the test set of the fold; delete this folder and run the "
            "same command again"
        )
    command = [str(dataset), str(out), "participant", "--model", model.name, "--weights", str(weights)]
    command += ["--participant-label", *participants, "--device", args.device]
    command += ["--skip-bids-validation", "--no-masks", "--no-viewer"]
    if args.derivatives:
        command += ["--derivatives", *map(str, args.derivatives)]
    return run_participant(read_config(command))


def find_labels(dataset: Path, args: argparse.Namespace, *, warn: Callable[[str], None]) -> TestSet:
    """Find the labels that all folds are compared with."""
    from bids_dgmseg.lab.evaluate.benchmark import find_test_set

    return find_test_set(dataset, derivatives=args.derivatives, choose=args.choose, bilateral=True, warn=warn)


def evaluate_folds(dataset: Path, out: Path, args: argparse.Namespace) -> int:
    """Compare the segmentations of all folds with the labels, and print the mean Dice of each nucleus."""
    from bids_dgmseg.lab.evaluate.compare import EvaluationOptions, evaluate, write_evaluation

    if not any(out.glob("fold-*/sub-*/**/*_dseg.nii.gz")):
        raise InputError(f"{out}: no scan could be segmented, for the reasons above; train for longer")
    lines: list[str] = []
    found = find_labels(dataset, args, warn=lines.append)
    options = EvaluationOptions(
        reference=found.reference,
        references=found.images,
        predictions=(out,),
        out=out / "evaluation",
        chi=found.scans[0].dataset_root,
        choose=tuple(args.choose),
        bilateral=True,
    )
    evaluation = evaluate(options)
    write_evaluation(options, evaluation)
    lines += [f"note: {line}" for line in evaluation.notes] + [f"failed: {line}" for line in evaluation.failures]
    lines = list(map(for_terminal, lines))
    summary = evaluation.tables["overlap_summary"].query("measure == 'dice'")
    lines += [f"{row.abbreviation}: Dice {row.mean:.3f} ± {row.sd:.3f} (n = {row.n})" for row in summary.itertuples()]
    print("\n".join([*lines, f"open {out / 'evaluation' / 'evaluate.html'}"]), flush=True)
    return FAILED if evaluation.failures else OK


VERBS = (
    Verb(
        "cross-validate",
        "train the folds of a published model, segment each participant with the fold that has not seen it, and "
        "evaluate all segmentations",
        cross_validate,
        [
            option("MODEL", ", ".join([*PAPER_MODELS, NNUNET])),
            option("DATASET", "BIDS dataset of maps with labels (_dseg)", Path),
            option("OUT", "folder for models, segmentations and evaluation; an unfinished run in it is resumed", Path),
            option(
                "--folds K",
                "number of folds, stratified by the column site of participants.tsv (default: 5)",
                positive_int,
            ),
            option(
                "--fold N ...",
                "only train these folds, counted from 0, and segment with them, without evaluation (default: all)",
                non_negative_int,
            ),
            *RECIPE,
            PLAN,
            CHECKPOINT,
            *RUNTIME,
        ],
        RESUME,
    ),
)
