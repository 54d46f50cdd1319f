"""Train the folds of several models on one labelled dataset, each as a node of a Nipype workflow.

    python workflows/train_models.py DATASET OUT [--models dcnnet attunet25d deepqsmseg] [--folds K] [--nprocs N]
                                     [--work-dir FOLDER] [-- OPTIONS OF dgmseg train]

Each model gets a folder OUT/MODEL for `bids_dgmseg --model MODEL --weights OUT/MODEL`; OUT/training.tsv compares the
folds. A fold that was interrupted goes on with the same command. Copy this file to add models, options or steps.
"""

from __future__ import annotations

import argparse
import csv
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

MODELS = ("dcnnet", "attunet25d", "deepqsmseg")
COLUMNS = ("model", "fold", "epochs", "best_epoch", "validation_loss", "mean_dice")


class _TrainInputSpec(BaseInterfaceInputSpec):
    model = traits.Str(mandatory=True, desc="key of the registry")
    fold = traits.Int(mandatory=True, desc="counted from 0")
    folds = traits.Int(mandatory=True, desc="how many there are")
    in_dataset = Directory(exists=True, mandatory=True, desc="labelled BIDS dataset")
    out_folder = traits.Str(mandatory=True, desc="model folder, shared by the folds")
    options = traits.List(traits.Str, desc="further options of dgmseg train")


class _TrainOutputSpec(TraitedSpec):
    out_curve = File(exists=True, desc="learning curve, a row an epoch")


class Train(SimpleInterface):
    """Train one fold of a model in a process of its own, or go on where it stopped."""

    input_spec = _TrainInputSpec
    output_spec = _TrainOutputSpec
    always_run = True
    """The folder knows what is done; a cache of ours would not see a longer training."""

    def _run_interface(self, runtime: Bunch) -> Bunch:
        given = self.inputs
        command = [
            sys.executable, "-m", "bids_dgmseg.commands", "train", given.model, given.in_dataset, given.out_folder,
            "--folds", str(given.folds), "--fold", str(given.fold), *(given.options or []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log = Path(runtime.cwd) / "train.log"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise RuntimeError(f"{given.model} fold {given.fold}: {reason} (see {log})")
        self._results["out_curve"] = str(Path(given.out_folder) / f"fold_{given.fold}" / "curve.tsv")
        return runtime


class _CompareInputSpec(BaseInterfaceInputSpec):
    in_curves = InputMultiObject(File(exists=True), mandatory=True, desc="learning curves, OUT/MODEL/fold_N/curve.tsv")
    out_table = traits.Str(mandatory=True, desc="table to write")


class _CompareOutputSpec(TraitedSpec):
    out_table = File(exists=True, desc="a row a fold")


class Compare(SimpleInterface):
    """Lay the best epoch of every fold side by side."""

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
    """Find the epoch with the least validation loss; without validation the last one."""
    with curve.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    validated = [row for row in rows if row["validation_loss"] != "n/a"]
    best = min(validated, key=lambda row: float(row["validation_loss"])) if validated else rows[-1]
    dice = [float(value) for value in list(best.values())[5:] if value != "n/a"]
    return {
        "model": curve.parents[1].name, "fold": curve.parent.name.removeprefix("fold_"), "epochs": len(rows),
        "best_epoch": best["epoch"], "validation_loss": best["validation_loss"],
        "mean_dice": f"{sum(dice) / len(dice):.4f}" if dice else "n/a",
    }  # fmt: skip


def init_train_models_wf(
    *, out: Path, models: Sequence[str] = MODELS, folds: int = 5, options: Sequence[str] = (),
    name: str = "train_models_wf",
) -> Workflow:  # fmt: skip
    """Connect a training for each model and fold with the table that compares them.

    Parameters
    ----------
    out : path
        Gets a model folder a model, and ``training.tsv``.
    models : sequence of str
        Keys of the registry.
    folds : int
        How many each model has.
    options : sequence of str
        Further options of ``dgmseg train``.
    name : str
        What the logs and the working directory call it.

    Inputs
    ------
    in_dataset
        Labelled BIDS dataset.

    Outputs
    -------
    out_table
        A row a fold.
    """
    inputs = Node(IdentityInterface(fields=["in_dataset"]), name="inputs")
    outputs = Node(IdentityInterface(fields=["out_table"]), name="outputs")
    gather = Node(Merge(len(models) * folds), name="gather")
    compare = Node(Compare(out_table=str(out / "training.tsv")), name="compare")
    workflow = Workflow(name=name)
    pairs = [(model, fold) for model in models for fold in range(folds)]
    for place, (model, fold) in enumerate(pairs, start=1):
        interface = Train(model=model, fold=fold, folds=folds, out_folder=str(out / model), options=list(options))
        train = Node(interface, name=f"train_{model}_fold_{fold}")
        workflow.connect([
            (inputs, train, [("in_dataset", "in_dataset")]),
            (train, gather, [("out_curve", f"in{place}")]),
        ])  # fmt: skip
    workflow.connect([
        (gather, compare, [("out", "in_curves")]),
        (compare, outputs, [("out_table", "out_table")]),
    ])  # fmt: skip
    return workflow


def main(argv: Sequence[str] | None = None) -> int:
    """Train all folds of all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--nprocs", type=int, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, help="for logs (default: a temporary folder)")
    given = list(sys.argv[1:] if argv is None else argv)
    place = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:place]), given[place + 1 :]
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    workflow = init_train_models_wf(out=out, models=args.models, folds=args.folds, options=options)
    workflow.base_dir = str((args.work_dir or Path(tempfile.mkdtemp(prefix="train_models_"))).absolute())
    workflow.inputs.inputs.in_dataset = str(args.dataset.absolute())
    if args.nprocs == 1:
        workflow.run()
    else:
        workflow.run(plugin="MultiProc", plugin_args={"n_procs": args.nprocs})
    sys.stdout.write((out / "training.tsv").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
