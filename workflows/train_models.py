"""Train the folds of several models on one labelled dataset, each fold as a node of a Nipype workflow.

    python workflows/train_models.py DATASET OUT [--models dcnnet attunet25d deepqsmseg nnunet2step] [--folds K]
                                     [--nprocs N] [--work-dir FOLDER] [-- TRAINING OPTIONS]

Each model gets a folder OUT/MODEL for `bids_dgmseg --model MODEL --weights OUT/MODEL`; OUT/training.tsv compares the
folds. The same command resumes an interrupted training. Options after -- go to `dgmseg train`. Copy this file to add
models, options or steps.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from nipype import IdentityInterface, Merge, Node, Workflow
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Bunch,
    Directory,
    File,
    InputMultiObject,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from bids_dgmseg.arguments import absolute_path, positive_int
from bids_dgmseg.errors import InputError, run_command

NNUNET = "nnunet2step"
MODELS = ("dcnnet", "attunet25d", "deepqsmseg", NNUNET)
COLUMNS = ("model", "fold", "epochs", "best_epoch", "validation_loss", "mean_dice")
NO_CLASSES = ("epoch", "steps", "learning_rate", "loss", "validation_loss")
"""Columns of the learning curves that do not hold Dice."""


class _TrainInputSpec(BaseInterfaceInputSpec):
    model = traits.Str(mandatory=True, desc="key of the registry")
    fold = traits.Int(mandatory=True, desc="fold, counted from 0")
    in_dataset = Directory(exists=True, mandatory=True, desc="labelled BIDS dataset")
    out_folder = traits.Str(mandatory=True, desc="model folder, shared by the folds")
    options = traits.List(traits.Str, usedefault=True, desc="further options of `dgmseg train`")


class _TrainOutputSpec(TraitedSpec):
    out_curve = File(exists=True, desc="learning curve, one row per epoch")


class Train(SimpleInterface):
    """Train one fold of a model in a separate process; resume it if it was interrupted."""

    input_spec = _TrainInputSpec
    output_spec = _TrainOutputSpec
    always_run = True
    """The model folder records what is finished; Nipype's cache would not notice a longer training."""

    def _run_interface(self, runtime: Bunch) -> Bunch:
        model, fold, folder = self.inputs.model, self.inputs.fold, self.inputs.out_folder
        command = [sys.executable, "-m", "bids_dgmseg.cli.main", "train", model, self.inputs.in_dataset, folder]
        command += ["--fold", str(fold), *self.inputs.options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log = Path(runtime.cwd) / "train.log"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise RuntimeError(f"{model} fold {fold}: {reason} (see {log})")
        step = "dentate" if model == NNUNET else ""
        self._results["out_curve"] = str(Path(folder) / step / f"fold_{fold}" / "curve.tsv")
        return runtime


class _CompareInputSpec(BaseInterfaceInputSpec):
    in_curves = InputMultiObject(File(exists=True), mandatory=True, desc="learning curves of the folds")
    out_table = traits.Str(mandatory=True, desc="table to write")


class _CompareOutputSpec(TraitedSpec):
    out_table = File(exists=True, desc="one row per fold")


class Compare(SimpleInterface):
    """Tabulate the epochs whose weights are kept, one row per fold."""

    input_spec = _CompareInputSpec
    output_spec = _CompareOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        rows = [summarize(Path(path)) for path in self.inputs.in_curves]
        with Path(self.inputs.out_table).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._results["out_table"] = self.inputs.out_table
        return runtime


def summarize(curve: Path) -> Mapping[str, object]:
    """Summarize the epoch whose weights are kept: that of the lowest validation loss.

    Without validation, and for nnU-Nets, it is the last one.
    """
    with curve.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    of_nnunet = curve.parents[1].name == "dentate"
    validated = [] if of_nnunet else [row for row in rows if row["validation_loss"] != "n/a"]
    best = min(validated, key=lambda row: float(row["validation_loss"])) if validated else rows[-1]
    dice = [float(value) for name, value in best.items() if name not in NO_CLASSES and value not in ("n/a", "nan")]
    return {
        "model": curve.parents[2 if of_nnunet else 1].name,
        "fold": curve.parent.name.removeprefix("fold_"),
        "epochs": len(rows),
        "best_epoch": best["epoch"],
        "validation_loss": best["validation_loss"],
        "mean_dice": f"{sum(dice) / len(dice):.4f}" if dice else "n/a",
    }


def init_train_models_wf(
    *,
    out: Path,
    models: Sequence[str] = MODELS,
    folds: int = 5,
    options: Sequence[str] = (),
    name: str = "train_models_wf",
) -> Workflow:
    """Build a workflow with one node per model and fold, and a node that compares them.

    Parameters
    ----------
    out : path
        Folder for one model folder per model and ``training.tsv``.
    models : sequence of str
        Names of models.
    folds : int
        Number of folds.
    options : sequence of str
        Further options of ``dgmseg train``.
    name : str
        Name of the workflow and of its working directory.

    Inputs
    ------
    in_dataset
        Labelled BIDS dataset.

    Outputs
    -------
    out_table
        Table with one row per fold.
    """
    parts = [(model, fold) for model in models for fold in range(folds)]
    options = ["--folds", str(folds), *options]
    inputs = Node(IdentityInterface(fields=["in_dataset"]), name="inputs")
    outputs = Node(IdentityInterface(fields=["out_table"]), name="outputs")
    gather = Node(Merge(len(parts)), name="gather")
    compare = Node(Compare(out_table=str(out / "training.tsv")), name="compare")
    workflow = Workflow(name=name)
    for place, (model, fold) in enumerate(parts, start=1):
        interface = Train(model=model, fold=fold, out_folder=str(out / model), options=options)
        train = Node(interface, name=f"train_{model}_fold_{fold}")
        workflow.connect(
            [
                (inputs, train, [("in_dataset", "in_dataset")]),
                (train, gather, [("out_curve", f"in{place}")]),
            ]
        )
    workflow.connect(
        [
            (gather, compare, [("out", "in_curves")]),
            (compare, outputs, [("out_table", "out_table")]),
        ]
    )
    return workflow


def main(argv: Sequence[str] | None = None) -> int:
    """Train all folds of all models; return 2 if any of them failed (the others are finished first)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=absolute_path, help="labelled BIDS dataset")
    parser.add_argument("out", type=absolute_path, help="folder for the trained models")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="default: all")
    parser.add_argument("--folds", type=positive_int, default=5, help="number of folds (default: %(default)s)")
    parser.add_argument("--nprocs", type=positive_int, default=1, help="parallel trainings (default: %(default)s)")
    parser.add_argument("--work-dir", type=absolute_path, help="folder for logs (default: a temporary folder)")
    words = list(sys.argv[1:] if argv is None else argv)
    place = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:place]), words[place + 1 :]
    return run_command("train_models", lambda: _run(args, options))


def _run(args: argparse.Namespace, options: Sequence[str]) -> int:
    out = args.out
    if not args.dataset.is_dir():
        raise InputError(f"{args.dataset}: no such folder; pass the root directory of a labelled BIDS dataset")
    out.mkdir(parents=True, exist_ok=True)
    workflow = init_train_models_wf(out=out, models=args.models, folds=args.folds, options=options)
    workflow.base_dir = str(args.work_dir or tempfile.mkdtemp(prefix="train_models_"))
    workflow.inputs.inputs.in_dataset = str(args.dataset)
    workflow.config["execution"] = {"crashdump_dir": workflow.base_dir, "crashfile_format": "txt"}
    plugin = "Linear" if args.nprocs == 1 else "MultiProc"
    try:
        workflow.run(plugin=plugin, plugin_args={"n_procs": args.nprocs})
    except RuntimeError as error:  # Nipype's, with the traceback of the node
        reasons = re.findall(r"RuntimeError: (.* \(see .*\))", f"{error}\n{error.__cause__}")
        if not reasons:
            raise
        raise InputError(reasons[0]) from error
    sys.stdout.write((out / "training.tsv").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
