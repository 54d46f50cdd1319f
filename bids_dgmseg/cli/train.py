"""``dgmseg train``, ``train-nnunet``, ``train-simulated`` and ``finetune``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.arguments import absolute_path, non_negative_int, participant_label, positive_float, positive_int
from bids_dgmseg.bids.dataset import check_outside_raw_data
from bids_dgmseg.cli.options import CHECKPOINT, LABELS, OUT, PLAN, RECIPE, RUNTIME, START, Verb, option
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError, count
from bids_dgmseg.io.locks import sole_writer
from bids_dgmseg.models.nnunet_folder import STEPS
from bids_dgmseg.models.registry import ALIASES, BRAIN_MASK, MODELS, Model, get_model, weights_folder

if TYPE_CHECKING:
    from bids_dgmseg.lab.train.folds import RecipeTraining
    from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining

RESUME = "; run the same command again to resume"

PAPER_MODELS = ("dcnnet", "attunet25d", "deepqsmseg")
"""The keys of `bids_dgmseg.lab.train.recipes.RECIPES`; importing it loads torch."""

NNUNET = "nnunet2step"

_VERBS_OF: Mapping[str, tuple[str, ...]] = {**dict.fromkeys(PAPER_MODELS, ("train",)), NNUNET: ("train-nnunet",)}
"""Verbs that train a model; others with a localizer of their own are trained as the default model."""

SIMULATION_STEPS, CALIBRATION_MAPS, FINETUNING_MINUTES, NNUNET_EPOCHS = 4500, 40, 10.0, 5000


def train_recipe(args: argparse.Namespace) -> int:
    """Train folds of a published network."""
    model, _ = find_model(args.model, "train"), check_dataset(args.dataset, args.out)
    from bids_dgmseg.lab.train.folds import train_folds

    training = make_training(model, args)
    folds = check_folds(args.fold, training.recipe.folds)
    with StatusLine() as line, sole_writer(args.out, *(f"fold_{fold}" for fold in folds)):
        train_folds(training, folds, log=line)
    if set(training.recipe.classes) <= set(model.classes):
        line.log(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    if tuple(training.recipe.classes) != model.classes:
        line.log(f"continue with dgmseg train {model.name} DATASET OUT --from {args.out}")
    return 0


def check_folds(chosen: Sequence[int], n_folds: int) -> list[int]:
    """Return the folds to train, by default all; InputError if there is no such fold."""
    if wrong := [fold for fold in chosen if fold >= n_folds]:
        raise InputError(f"--fold {wrong[0]}: choose from 0 to {n_folds - 1}, or change --folds")
    return sorted(set(chosen)) or list(range(n_folds))


def make_training(model: Model, args: argparse.Namespace) -> RecipeTraining:
    """Return the training that the options of ``dgmseg train`` describe."""
    from bids_dgmseg.lab.train.folds import RecipeTraining
    from bids_dgmseg.lab.train.learner import RuntimeOptions
    from bids_dgmseg.lab.train.recipe import override, read_setting
    from bids_dgmseg.lab.train.recipes import get_recipe

    recipe = get_recipe(model.name, args.variant)
    pace = recipe.pace.shortened(args.epochs) if args.epochs else recipe.pace
    pace = replace(pace, minutes=args.minutes, learning_rate=args.learning_rate or pace.learning_rate)
    recipe = override(replace(recipe, pace=pace, folds=args.folds or recipe.folds), args.recipe)
    given = dict(read_setting(text, parameter="arch") for text in args.arch)
    # The arguments of registry and recipe belong to the model's own network, not to another one.
    arch: dict[str, Any] = {**({} if recipe.network else {**model.arch, **recipe.arch}), **given}
    return RecipeTraining(
        model=replace(model, arch=arch),
        recipe=recipe,
        dataset=args.dataset.absolute(),
        out=args.out.absolute(),
        options=RuntimeOptions(
            seed=args.seed, device=args.device, workers=args.workers, checkpoint_minutes=args.checkpoint_minutes
        ),
        scans=args.scans,
        start=find_start(model, args.start),
        pretrain_on=tuple(args.pretrain_on),
        distill=tuple(args.distill),
        holdout=tuple(args.holdout),
        derivatives=tuple(args.derivatives),
        choose=tuple(args.choose),
    )


def find_start(model: Model, name: str | None, *, shipped: Model | None = None, file: bool = True) -> Path | None:
    """Return the initial weights, if there are any.

    `name` is a path, or `default` (or the model's name) for those of the package, which are those of `shipped`. `file`
    says whether they may be a single file.
    """
    if name is None:
        return None
    start = absolute_path(name)
    known = ALIASES.get(name, name)
    if name == "default" or (known == model.name and not start.exists()):  # OUT may have the model's name
        return weights_folder(shipped or model)
    if start.is_dir() or (file and start.is_file()):
        return start
    if known in MODELS:
        raise InputError(f"--from {name}: its network differs from that of {model.name}; pass default or a folder")
    what = "folder or file" if file else "folder"
    other = ", or weights of ResNet-50" if model.name in PAPER_MODELS else ""
    raise InputError(f"--from {name}: no such {what}; pass a model folder, or default for the shipped weights{other}")


def train_nnunet(args: argparse.Namespace) -> int:
    """Train one nnU-Net or both, and print the mean Dice on the test set."""
    model, dataset = find_model(args.model, "train-nnunet"), check_dataset(args.dataset, args.out)
    from bids_dgmseg.lab.train.nnunet.run import NnunetRequest, run_nnunet_training

    steps, folds = (args.step,) if args.step else STEPS, check_folds(args.fold, args.folds)
    training = make_nnunet_training(args, n_nets=len(steps) * len(folds))
    request = NnunetRequest(
        model=model,
        dataset=dataset,
        out=args.out.absolute(),
        steps=steps,
        training=training,
        derivatives=tuple(args.derivatives),
        choose=tuple(args.choose),
        folds=args.folds,
        fold=tuple(folds),
        holdout=tuple(args.holdout),
        start=find_start(model, args.start),
    )
    parts = (f"{step}_{fold}" for step in steps for fold in folds)
    with StatusLine() as line, sole_writer(args.out, *parts):
        outcomes, table = run_nnunet_training(request, log=line)
    for outcome in outcomes:
        print(f"{outcome.name.replace('_', ' ')}: {count(outcome.epochs, 'epoch')}, sha256 {outcome.sha256}")
    for name, dice in table.groupby("abbreviation", sort=False)["dice"].mean().items():
        print(f"{name}: mean Dice {dice:.3f} on {count(table['scan'].nunique(), 'test scan')}")
    print(f"use it with bids_dgmseg --model {model.name} --weights {args.out}")
    return 0


def make_nnunet_training(args: argparse.Namespace, *, n_nets: int) -> NnunetTraining:
    """Return the training that the options of ``dgmseg train-nnunet`` describe."""
    from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining

    return NnunetTraining(
        epochs=args.epochs or NNUNET_EPOCHS,
        minutes=args.minutes and args.minutes / n_nets,
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        checkpoint_minutes=args.checkpoint_minutes,
        plan=args.plan,
    )


def train_simulated(args: argparse.Namespace) -> int:
    """Train one network on simulated maps for a while, or calibrate the segmenter."""
    model = find_model(args.model, "train-simulated")
    check_outside_raw_data(args.out)
    template = None if str(args.template) == "phantom" else args.template
    if template and not template.is_file():
        raise InputError(
            f"{template}: no such label template; create one with `dgmseg template`, pass phantom, or train on "
            "labelled maps with `dgmseg finetune`"
        )
    if args.external_validation and args.part != "segmenter":
        raise InputError(f"--external-validation: only evaluates the segmenter; omit it with --part {args.part}")
    if args.part == "calibration":
        from bids_dgmseg.lab.train.calibration import calibrate

        n_maps = args.steps or CALIBRATION_MAPS
        with sole_writer(args.out, "segmenter"):
            temperature = calibrate(
                model, template, args.out, n_maps=n_maps, seed=args.seed, device=args.device, log=StatusLine().log
            )
        print(
            f"temperature {temperature:.2f} in {args.out.name}/model.toml, "
            f"biases in {args.out.name}/segmenter.safetensors"
        )
        return 0
    from bids_dgmseg.lab.train.learning_curve import write_learning_curve
    from bids_dgmseg.lab.train.simulated import TrainingConfig, evaluate_on_dataset, train_on_simulations

    shipped = BRAIN_MASK if args.part == "brain-mask" else model
    config = TrainingConfig(
        part=args.part,
        steps=args.steps or SIMULATION_STEPS,
        minutes=args.minutes,
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        learning_rate=args.learning_rate,
        validation_maps=args.validation_maps,
        start=find_start(model, args.start, shipped=shipped, file=False),
        loss=args.loss,
    )
    with StatusLine() as line, sole_writer(args.out, args.part):
        outcome = train_on_simulations(model, template, args.out, config, log=line)
        if args.external_validation:
            evaluate_on_dataset(
                model, args.external_validation, args.out, step=outcome.step, device=args.device, log=line
            )
    write_learning_curve(args.out / f"{args.part}_curve.tsv")
    print(f"{args.part}: step {outcome.step} of {config.steps}, sha256 {outcome.sha256}")
    if not outcome.done:
        print("run the same command again to continue")
    return 0


def finetune_segmenter(args: argparse.Namespace) -> int:
    """Fine-tune dgm16 or dgm24, and print the Dice before and after."""
    model, dataset = find_model(args.model, "finetune"), check_dataset(args.dataset, args.out)
    from bids_dgmseg.lab.train.finetune import FineTuning, FineTuningRequest, finetune, summarize
    from bids_dgmseg.lab.train.learning_curve import write_learning_curve

    start = find_start(model, args.start, file=False)
    training = FineTuning(
        minutes=args.minutes or (math.inf if args.steps else FINETUNING_MINUTES),
        steps=args.steps,
        seed=args.seed,
        learning_rate=args.learning_rate,
        device=args.device,
        workers=args.workers,
    )
    request = FineTuningRequest(
        model=model,
        dataset=dataset,
        out=args.out.absolute(),
        start=None if start == weights_folder(model) else start,
        training=training,
        holdout=tuple(args.holdout),
        derivatives=tuple(args.derivatives),
        choose=tuple(args.choose),
    )
    with StatusLine() as line, sole_writer(args.out):
        outcome, table = finetune(request, log=line)
    write_learning_curve(args.out / "segmenter_curve.tsv")
    print(summarize(table))
    print(f"step {outcome.step}, sha256 {outcome.sha256}; Dice of each scan in {args.out.name}/dice.tsv")
    use = f"use it with bids_dgmseg --model {model.name} --weights {args.out}"
    print(use if outcome.done else "run the same command again to continue")
    return 0


def find_model(name: str, verb: str) -> Model:
    """Look up a model and check that this verb trains it."""
    model = get_model(name, prefix="")
    verbs = _VERBS_OF.get(model.name, ("finetune", "train-simulated") if model.localizer.network else ())
    if not verbs:
        raise InputError(f"{model.name}: this model cannot be trained; choose another one")
    if verb not in verbs:
        raise InputError(f"{model.name}: not trained by dgmseg {verb}; use dgmseg {' or dgmseg '.join(verbs)}")
    return model


def check_dataset(path: Path, out: Path) -> Path:
    """Return the absolute path of an existing dataset folder; `out` must be outside any raw data."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; pass the root directory of a labelled BIDS dataset")
    check_outside_raw_data(out)
    return path.absolute()


VERBS = (
    Verb(
        "train",
        "train a published network (dcnnet, attunet25d, deepqsmseg) on labelled maps; OUT is a folder for --weights",
        train_recipe,
        [
            option("MODEL", ", ".join(PAPER_MODELS)),
            option("DATASET", "BIDS dataset of maps with labels (_dseg)", Path),
            OUT,
            option(
                "--folds K",
                "number of folds, stratified by the column site of participants.tsv; with 1 there is no test set; "
                "dcnnet and attunet25d still validate on 20 %% unless --recipe validation=0 (default: the paper's, 5)",
                positive_int,
            ),
            option(
                "--fold N ...",
                "train only these folds, counted from 0 (default: all, one after the other)",
                non_negative_int,
            ),
            *RECIPE,
            CHECKPOINT,
            *RUNTIME,
        ],
        RESUME,
    ),
    Verb(
        "train-nnunet",
        "train the two nnU-Nets of nnunet2step on labelled maps; OUT is a folder for --weights",
        train_nnunet,
        [
            option("MODEL", NNUNET),
            option(
                "DATASET",
                "BIDS dataset of maps with labels of the dentate nuclei (_dseg) and, if available, masks of the "
                "cerebellum (label-cerebellum_mask)",
                Path,
            ),
            OUT,
            option("--step", "train only one of the two nnU-Nets (default: both)", choices=STEPS),
            option("--holdout LABEL ...", "participants of the test set (default: 20 %% of all)", participant_label),
            PLAN,
            START,
            option(
                "--epochs N", "epochs of 50 steps per net (default: %(default)s)", positive_int, default=NNUNET_EPOCHS
            ),
            option(
                "--folds K",
                "with more than one, training and validation set are divided into K folds, stratified by the "
                "column site of participants.tsv, which are averaged in use; the test set (20 %%) remains (default: "
                "%(default)s)",
                positive_int,
                default=1,
            ),
            option(
                "--fold N ...",
                "train only these folds, counted from 0 (default: all, one after the other)",
                non_negative_int,
            ),
            option("--minutes M", "time limit, for all nets and folds together (default: none)", positive_float),
            *LABELS,
            CHECKPOINT,
            *RUNTIME,
        ],
        RESUME,
    ),
    Verb(
        "train-simulated",
        "train dgm16 (the default model) or dgm24 on simulated maps; OUT is a folder for --weights",
        train_simulated,
        [
            option("MODEL", "default, dgm16 or dgm24"),
            option(
                "TEMPLATE",
                "label template (.nii.gz, see `dgmseg template`) to simulate maps from, or `phantom` for the analytic "
                "phantom",
                Path,
            ),
            OUT,
            option(
                "--part",
                "which of the two networks to train; calibration: fit the temperature and biases of the trained "
                "segmenter in OUT; brain-mask: train the network that finds the brain in the magnitude of echoes "
                "(default: %(default)s)",
                choices=("localizer", "segmenter", "calibration", "brain-mask"),
                default="segmenter",
            ),
            option(
                "--steps N",
                "length of the whole training; with --part calibration the number of maps (default: "
                f"{SIMULATION_STEPS} steps, {CALIBRATION_MAPS} maps)",
                positive_int,
            ),
            option(
                "--minutes M",
                "time until the run stops; the same command resumes the training (default: %(default)g)",
                positive_float,
                default=60.0,
            ),
            START,
            option(
                "--learning-rate RATE", "maximum learning rate (default: %(default)g)", positive_float, default=2e-3
            ),
            option(
                "--loss",
                "loss that is added to Dice (default: %(default)s)",
                choices=("cross-entropy", "focal"),
                default="cross-entropy",
            ),
            option(
                "--validation-maps N",
                "number of fixed simulated maps for validation, every ten minutes and at the end (default: "
                "%(default)s)",
                non_negative_int,
                default=10,
            ),
            option(
                "--external-validation DATASET",
                "labelled BIDS dataset on which the segmenter is evaluated at the end; not used for training",
                absolute_path,
            ),
            *RUNTIME,
        ],
        RESUME,
    ),
    Verb(
        "finetune",
        "fine-tune dgm16 (the default model) or dgm24 on labelled maps; OUT is a folder for --weights",
        finetune_segmenter,
        [
            option("MODEL", "default, dgm16 or dgm24"),
            option("DATASET", "BIDS dataset of maps with manual labels (_dseg, in it or its derivatives)", Path),
            OUT,
            option(
                "--minutes M",
                "training time; with --steps, time until the run stops, which the same command resumes (default: "
                f"{FINETUNING_MINUTES:g}; with --steps no limit)",
                positive_float,
            ),
            option("--steps N", "training length in steps, for reproducible results (default: by time)", positive_int),
            option("--from FOLDER", "starting weights (default: those that ship with the model)", dest="start"),
            option(
                "--learning-rate RATE", "maximum learning rate (default: %(default)g)", positive_float, default=5e-4
            ),
            option("--holdout LABEL ...", "participants to evaluate only, not to train on", participant_label),
            *LABELS,
            *RUNTIME,
        ],
        RESUME,
    ),
)
