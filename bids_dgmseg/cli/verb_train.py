"""Training and its data: ``train``, ``train-simulated``, ``finetune``, ``cross-validate``, ``simulate``, ``demo``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.arguments import (
    absolute_path,
    entity,
    non_negative_float,
    non_negative_int,
    number,
    participant_label,
    positive_float,
    positive_int,
    seed,
)
from bids_dgmseg.bids.dataset import check_outside_raw_data
from bids_dgmseg.cli import Option, Verb, option
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import FAILED, OK, InputError, for_terminal, list_some
from bids_dgmseg.io.files import read_json, sha256_or_error, sole_writer
from bids_dgmseg.models.registry import ALIASES, MODELS, Model, get_model, weights_folder

if TYPE_CHECKING:
    from bids_dgmseg.lab.train.frame import TrainingRequest

RESUME = "; run the same command again to resume"

PAPER_MODELS = ("dcnnet", "attunet25d", "deepqsmseg", "nnunet2step")
"""Models with a recipe."""

VALIDATION = 0.2
"""Fraction of the training participants that select the epoch, where a paper uses the fold's own part for it."""


def read_request(args: argparse.Namespace, verb: str) -> TrainingRequest:
    """Return what to train on what; options have the names of its fields.

    Raises
    ------
    InputError
        If the verb does not train the model, or a path does not exist.
    """
    model = get_model(args.model, prefix="")
    pair = ("train", "cross-validate") if model.name in PAPER_MODELS else ("finetune", "train-simulated")
    verbs = pair if model.name in PAPER_MODELS or model.localizer.network else ()
    if verb not in verbs:
        hint = f"use dgmseg {' or dgmseg '.join(verbs)}" if verbs else "choose another one"
        raise InputError(f"{model.name}: not trained by dgmseg {verb}; {hint}")
    check_outside_raw_data(args.out)
    if "dataset" in args and not args.dataset.is_dir():
        raise InputError(f"{args.dataset}: no such folder; pass the root directory of a labelled BIDS dataset")
    from bids_dgmseg.lab.train.frame import TrainingRequest

    options = {field.name: getattr(args, field.name) for field in fields(TrainingRequest) if field.name in args}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    if "dataset" in args:
        values["dataset"] = args.dataset.absolute()
    if "recipe" in args:
        values |= _read_recipe_options(model, args)
    contrast = getattr(values.get("recipe"), "contrast", model.input.contrast)
    values |= {
        "model": model.for_contrast(contrast),
        "out": args.out.absolute(),
        "start": find_start(model, args.start),
    }
    return TrainingRequest(**values)


def _read_recipe_options(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe with the options that change it, and the folds to train."""
    import msgspec

    from bids_dgmseg.lab.train.recipe import NnunetRecipe, read_recipe

    recipe = read_recipe(model, args.recipe)
    if isinstance(recipe, NnunetRecipe):
        if wrong := [name for name in ("start", "scans", "pretrain_on", "distill") if getattr(args, name)]:
            raise InputError(f"`{wrong[0]}`: not available for {model.name}; omit it")
        recipe = msgspec.structs.replace(recipe, epochs=args.epochs or recipe.epochs)
    else:
        pace = recipe.pace.shortened(args.epochs) if args.epochs else recipe.pace
        recipe = msgspec.structs.replace(recipe, pace=msgspec.structs.replace(pace, minutes=args.minutes))
    recipe = msgspec.structs.replace(recipe, folds=args.folds or recipe.folds)
    if wrong := [fold for fold in args.fold if fold >= recipe.folds]:
        raise InputError(f"--fold {wrong[0]}: choose from 0 to {recipe.folds - 1}, or change --folds")
    return {"recipe": recipe, "folds": tuple(sorted(set(args.fold)) or range(recipe.folds))}


def find_start(model: Model, name: str | None) -> Path | None:
    """Return the initial weights: None, a path, or those of the package for ``default`` or the model's name."""
    if name is None:
        return None
    start = absolute_path(name)
    key = ALIASES.get(name, name)
    if name == "default" or (key == model.name and not start.exists()):  # OUT may have the model's name
        return weights_folder(model)
    if start.is_dir() or (model.name in PAPER_MODELS and start.is_file()):
        return start
    if key in MODELS:
        raise InputError(f"--from {name}: its network differs from that of {model.name}; pass default or a folder")
    raise InputError(f"--from {name}: no such folder or file; pass a model folder, or default for the shipped weights")


def train_recipe(args: argparse.Namespace) -> int:
    """Train folds of a published network."""
    request = read_request(args, "train")
    from bids_dgmseg.lab.train.folds import train_folds

    with StatusLine() as line, sole_writer(request.out, *(f"fold_{fold}" for fold in request.folds)):
        train_folds(request, log=line)
    classes, model = getattr(request.recipe, "classes", request.model.classes), request.model
    if set(classes) <= set(model.classes):
        line.log(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    if tuple(classes) != model.classes:
        line.log(f"continue with dgmseg train {model.name} DATASET OUT --from {args.out}")
    return OK


def train_simulated(args: argparse.Namespace) -> int:
    """Train one network on simulated maps for a while."""
    if (template := args.template) is not None and not template.is_file():
        raise InputError(
            f"{template}: no such label template; create one with workflows/make_template, omit it for the phantom, or "
            "train on labelled maps with `dgmseg finetune`"
        )
    request = read_request(args, "train-simulated")
    from bids_dgmseg.lab.train.simulated import train_on_simulations

    with StatusLine() as line, sole_writer(request.out, request.part):
        outcome = train_on_simulations(request, log=line)
    print(f"{request.part}: step {outcome.state.step}, sha256 {outcome.sha256}")
    print("finished" if outcome.done else "run the same command again to continue")
    return OK


def finetune_segmenter(args: argparse.Namespace) -> int:
    """Fine-tune dgm16 or dgm24, and print the Dice before and after."""
    request = read_request(args, "finetune")
    from bids_dgmseg.lab.train.finetune import MINUTES, finetune, summarize

    if request.minutes is None and request.steps is None:
        request = replace(request, minutes=MINUTES)
    if request.start == weights_folder(request.model):
        request = replace(request, start=None)
    with StatusLine() as line, sole_writer(request.out):
        outcome, table = finetune(request, log=line)
    print(summarize(table))
    print(f"step {outcome.state.step}, sha256 {outcome.sha256}; Dice of each scan in {args.out.name}/dice.tsv")
    use = f"use it with bids_dgmseg --model {request.model.name} --weights {args.out}"
    print(use if outcome.done else "run the same command again to continue")
    return OK


def cross_validate(args: argparse.Namespace) -> int:
    """Train and segment each fold, and evaluate all that are finished; the exit code is 1 if some scans failed."""
    request = read_request(args, "cross-validate")
    import msgspec

    from bids_dgmseg.lab.train.folds import train_folds
    from bids_dgmseg.lab.train.recipe import Recipe

    recipe, out, code = request.recipe, request.out, OK
    assert recipe is not None
    if recipe.folds < 2:
        raise InputError(f"--folds {recipe.folds}: cross-validation needs 2 or more")
    if not set(getattr(recipe, "classes", ())) <= set(request.model.classes):
        raise InputError(f"--recipe {args.recipe}: its classes cannot be used for segmentation; choose another one")
    if isinstance(recipe, Recipe) and recipe.validation is None:
        recipe = msgspec.structs.replace(recipe, validation=VALIDATION)  # not the test participants
    check_unseen(request, args)
    find_labels(request)  # labels that cannot be compared end it before the first fold
    for fold in request.folds:
        weights = out / "models" / f"fold-{fold}"
        with StatusLine() as line, sole_writer(weights):
            train_folds(replace(request, recipe=recipe, out=weights, folds=(fold,)), log=line)
        test = read_json(weights / "training.json")["folds"][fold]["test"]
        code = max(code, segment_participants(request, weights, out / f"fold-{fold}", test))
    return max(code, evaluate_folds(request))


def check_unseen(request: TrainingRequest, args: argparse.Namespace) -> None:
    """Refuse initial weights of any fold that were trained on a scan of the dataset.

    Participants with the label of one that they were trained on are a warning: they may be others.
    """
    from bids_dgmseg.bids.labelled_scans import describe_leakage, match_labels
    from bids_dgmseg.lab.train.folds import find_start_weights
    from bids_dgmseg.models.model_folder import list_training_maps, list_training_participants

    starts = find_start_weights(request)
    if maps := {checksum for weights in starts for checksum in list_training_maps(weights)}:
        scans, _ = match_labels(request.dataset, derivatives=request.derivatives, choose=request.choose)
        if seen := [scan.name for scan in scans if sha256_or_error(scan.chi) in maps]:
            raise InputError(
                f"--from {args.start}: these weights were trained on {list_some(seen)}; use weights trained on "
                "other scans"
            )
        participants = set().union(*map(list_training_participants, starts))
        if line := describe_leakage([scan.name for scan in scans if scan.participant in participants]):
            print(line, flush=True)


def segment_participants(request: TrainingRequest, weights: Path, out: Path, participants: Sequence[str]) -> int:
    """Segment participants as ``bids_dgmseg`` does, without masks and viewers; return its exit code."""
    from bids_dgmseg.cli.bids_app import read_config
    from bids_dgmseg.run.participant import run_participant

    if others := {path.name.removeprefix("sub-") for path in out.glob("sub-*/")} - set(participants):
        raise InputError(
            f"{out}: has results of sub-{min(others)}, not in the test set of the fold; delete this folder and run the "
            "same command again"
        )
    command = [str(request.dataset), str(out), "participant", "--model", request.model.name, "--weights", str(weights)]
    command += ["--participant-label", *participants, "--device", request.device]
    command += ["--skip-bids-validation", "--no-masks", "--no-viewer"]
    if request.derivatives:
        command += ["--derivatives", *map(str, request.derivatives)]
    return run_participant(read_config(command))


def find_labels(request: TrainingRequest) -> Any:
    """Find the labels that all folds are compared with."""
    from bids_dgmseg.lab.evaluate.compare import find_test_set

    return find_test_set(request.dataset, derivatives=request.derivatives, choose=request.choose)


def evaluate_folds(request: TrainingRequest) -> int:
    """Compare the segmentations of all folds with the labels, and print the mean Dice of each nucleus."""
    from bids_dgmseg.lab.evaluate.compare import EvaluationOptions, evaluate, write_evaluation

    out = request.out
    if not any(out.glob("fold-*/sub-*/**/*_dseg.nii.gz")):
        raise InputError(f"{out}: no scan could be segmented, for the reasons above; train for longer")
    labels = find_labels(request)
    options = EvaluationOptions(
        reference=labels.reference,
        references=labels.images,
        predictions=(out,),
        out=out / "evaluation",
        chi=labels.scans[0].dataset_root,
        choose=request.choose,
        bilateral=True,
    )
    evaluation = evaluate(options)
    write_evaluation(options, evaluation)
    lines = [*(f"note: {line}" for line in evaluation.notes), *(f"failed: {line}" for line in evaluation.failures)]
    summary = evaluation.tables["overlap_summary"].query("measure == 'dice'")
    lines += [f"{row.abbreviation}: Dice {row.mean:.3f} ± {row.sd:.3f} (n = {row.n})" for row in summary.itertuples()]
    print("\n".join([*map(for_terminal, lines), f"open {out / 'evaluation' / 'evaluate.html'}"]), flush=True)
    return FAILED if evaluation.failures else OK


def write_demo_dataset(args: argparse.Namespace) -> int:
    """Write a small dataset and print how to process it."""
    from bids_dgmseg.phantom.demo import write_demo

    for scan in write_demo(args.dir):
        print(scan, flush=True)
    print(f"next: bids_dgmseg {shlex.join([str(args.dir), f'{args.dir}-out'])} participant")
    return 0


def write_simulated_dataset(args: argparse.Namespace) -> int:
    """Write a dataset of simulated maps."""
    if args.labels is not None and not args.labels.is_file():
        raise InputError(f"{args.labels}: no such label template; build one with workflows/make_template")
    from bids_dgmseg.lab.simulate.simulated_dataset import simulate_dataset

    scans = simulate_dataset(
        args.dir,
        n_scans=args.scans,
        seed=args.seed,
        template=args.labels,
        spacing_mm=args.spacing_mm,
        echoes=args.echoes,
        typical=args.typical,
    )
    for scan in scans:
        print(scan, flush=True)
    return 0


NEW_FOLDER = option("DIR", "folder to create; new or empty", absolute_path)
DATASET = option("DATASET", "BIDS dataset of maps with labels (_dseg, in it or its derivatives)", Path)
OUT = option(
    "OUT",
    "model folder; after an interruption or a kill the same command continues from the last checkpoint in it, to the "
    "same weights (nice -n 19 dgmseg … leaves the processor to others)",
    Path,
)
LABELS: list[Option | list[Option]] = [
    option("--holdout LABEL ...", "participants excluded from training", participant_label),
    option(
        "--derivatives FOLDER ...",
        "derivative datasets with maps or labels (default: all in DATASET/derivatives)",
        absolute_path,
    ),
    option(
        "--choose ENTITY ...",
        "if a scan has several segmentations, use the one with this entity, such as desc-manual",
        entity,
    ),
]
RUNTIME: list[Option | list[Option]] = [
    option(
        "--from FOLDER",
        "initialize with these weights; `default` for the shipped ones (default: random; finetune: shipped)",
        dest="start",
    ),
    option("--minutes M", "time limit (default: none; finetune: 10 minutes)", positive_float),
    option("--seed S", "seed of initial weights and samples (default: %(default)s)", seed, default=1),
    option(
        "--device",
        "device for the network; mps: GPU of a Mac (default: %(default)s, a CUDA GPU if there is one)",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
    ),
    option(
        "--workers N",
        "processes that prepare maps and draw samples (default: %(default)s)",
        non_negative_int,
        default=1,
    ),
    option(
        "--checkpoint-minutes M", "time between checkpoints (default: %(default)g)", non_negative_float, default=2.0
    ),
]
FOLDS: list[Option | list[Option]] = [
    option("MODEL", ", ".join(PAPER_MODELS)),
    DATASET,
    OUT,
    option(
        "--folds K",
        "number of cross-validation folds, stratified by site (column of participants.tsv); with 1 there is no test "
        "set (default: the paper's, 5)",
        positive_int,
    ),
    option("--fold N ...", "train only these folds, counted from 0 (default: all)", non_negative_int),
    option(
        "--recipe FILE",
        "TOML file with what differs from the paper's recipe, or the name of a shipped one: attunet25d-source, "
        "attunet25d-resnet50, attunet25d-no-gates, deepqsmseg-small, deepqsmseg-vnet, nnunet2step-small, dcnnet-joint, "
        "dcnnet-independent, dcnnet-no-attention, dcnnet-no-overlap, dcnnet-dice, dcnnet-step9, dcnnet-patch16, "
        "dcnnet-patch24, dcnnet-patch40, dcnnet-unet, dcnnet-attention-unet, dcnnet-fc-densenet, "
        "dcnnet-dilated-densenet",
    ),
    option("--epochs N", "maximum epochs (default: the paper's)", positive_int),
    option("--scans N", "use only N training participants per fold (default: all)", positive_int),
    *LABELS,
    [
        option(
            "--pretrain-on FOLDER ...",
            "output of bids_dgmseg for maps without manual labels: train on them before the manual labels; "
            "several folders are fused by majority vote",
            absolute_path,
        ),
        option(
            "--distill FOLDER ...",
            "output of bids_dgmseg for maps without manual labels: train on them together with the manual "
            "labels; one folder per model",
            absolute_path,
        ),
    ],
    *RUNTIME,
]
STEPS = option("--steps N", "length of the whole training in steps (default: by time, or 4500)", positive_int)
LEARNING_RATE = option(
    "--learning-rate RATE", "maximum learning rate (default: 0.002; finetune: 0.0005)", positive_float
)

VERBS = (
    Verb(
        "train",
        f"train a published network ({', '.join(PAPER_MODELS)}) on labelled maps; OUT is a folder for --weights",
        train_recipe,
        FOLDS,
        RESUME,
    ),
    Verb(
        "cross-validate",
        "train the folds of a published model, segment each participant with the fold that has not seen it, and "
        "evaluate all segmentations",
        cross_validate,
        FOLDS,
        RESUME,
    ),
    Verb(
        "train-simulated",
        "train dgm16 (the default model) or dgm24 on simulated maps; OUT is a folder for --weights",
        train_simulated,
        [
            option("MODEL", "default, dgm16 or dgm24"),
            OUT,
            option("--template FILE", "label template (.nii.gz) to simulate maps from (default: the phantom)", Path),
            option(
                "--part",
                "which network to train (default: %(default)s)",
                choices=("localizer", "segmenter"),
                default="segmenter",
            ),
            STEPS,
            LEARNING_RATE,
            *RUNTIME,
        ],
        RESUME,
    ),
    Verb(
        "finetune",
        "fine-tune dgm16 (the default model) or dgm24 on labelled maps; OUT is a folder for --weights",
        finetune_segmenter,
        [option("MODEL", "default, dgm16 or dgm24"), DATASET, OUT, STEPS, LEARNING_RATE, *LABELS, *RUNTIME],
        RESUME,
    ),
    Verb(
        "demo",
        "write a small BIDS study of phantoms with their true labels and values",
        write_demo_dataset,
        [NEW_FOLDER],
    ),
    Verb(
        "simulate",
        "write a labelled BIDS dataset of simulated susceptibility maps",
        write_simulated_dataset,
        [
            NEW_FOLDER,
            option(
                "--scans N",
                "number of participants, one scan per participant",
                partial(number, low=1, high=99_999, expected="an integer from 1 to 99999"),
                required=True,
            ),
            option("--seed S", "the same seed gives the same maps (default: %(default)s)", seed, default=0),
            option(
                "--labels TEMPLATE",
                "label template from workflows/make_template (default: the anatomy of the phantom)",
                Path,
            ),
            option(
                "--spacing-mm MM",
                "voxel size in mm, 0.4 to 4 (default: %(default)g)",
                partial(number, convert=float, low=0.4, high=4, expected="a voxel size from 0.4 to 4 mm"),
                default=1.0,
            ),
            option("--echoes", "write multi-echo GRE (magnitude and phase of four echoes) instead of chi maps"),
            option(
                "--typical",
                "typical 3 T scans of healthy subjects only: the middle half of the ranges of age, artefacts and "
                "reconstruction, half the rotations, no slices thicker than the voxels",
            ),
        ],
    ),
)
