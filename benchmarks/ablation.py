"""Ablation: the same network trained without one ingredient of simulation or training, on the same test maps.

    python benchmarks/ablation.py TEMPLATE OUT [--settings NAME ...] [--steps N] [--spacing MM] [--maps N] [--seed S]
                                  [--real DATASET]

Trains the segmenter of dgm16 from scratch once per setting, with the same number of steps and the same seed, on voxels
of ``--spacing`` mm so that many settings fit into an evening. Each network is tested on simulated maps with all
ingredients and unseen seeds, and on a dataset of labelled real maps. OUT gets one folder per setting and
``ablation.tsv`` with all settings tested so far. The same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copyfile

import pandas as pd
import torch
from accuracy import score
from reporting import dice_by_nucleus, markdown
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.arguments import positive_float, positive_int, seed
from bids_dgmseg.errors import run_command
from bids_dgmseg.lab.simulate.ranges import DetailRanges
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW, View, nuclei_labels, read_training_head
from bids_dgmseg.lab.train.core import Run, State, StepResult, class_counts, dice_of_counts, train, use_all_cores
from bids_dgmseg.lab.train.losses import deepqsmseg_loss, dice_and_cross_entropy
from bids_dgmseg.lab.train.schedule import Position, StepSchedule
from bids_dgmseg.lab.train.simulated import SimulatedMaps, mix_in_typical_maps, training_heads
from bids_dgmseg.models.model_folder import load_weights, save_weights, segmenter_network, to_channels_last
from bids_dgmseg.models.registry import Model, get_model, weights_folder
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, batch_to_device, mixed_precision

_CPU = torch.device("cpu")
_PLAIN = DetailRanges(
    texture=(0.0, 0.0), fine_ppm=(0.0, 0.0), slow_ppm=(0.0, 0.0), tracts=0.0, veins=0.0, spots=(0.0, 0.0)
)
_SCORES = "scores.tsv"
_UNSEEN_SEED = 3 * 10**6
"""Beyond the seeds of training."""


@dataclass(frozen=True)
class Setting:
    """One variant of simulation and training."""

    name: str
    view: View
    typical: bool = False
    """Whether every third map is a typical one."""
    schedule: type[StepSchedule] = StepSchedule
    optimizer: Callable[[nn.Module, StepSchedule], torch.optim.Optimizer] | None = None
    """Default: that of `State.start`."""
    loss: Callable[[Tensor, Tensor], Tensor] = dice_and_cross_entropy

    def folder_in(self, out: Path) -> Path:
        """Return the folder of weights and scores."""
        return out / self.name.replace(" ", "_").replace(",", "")


def settings(view: View) -> list[Setting]:
    """List the settings: first all ingredients, last four variants of training on the same maps."""
    return [
        Setting("everything", view),
        Setting("everything, a third typical", view, typical=True),
        Setting("no physics", replace(view, artefacts=replace(view.artefacts, physics=0.0))),
        Setting("physics only", replace(view, artefacts=replace(view.artefacts, physics=1.0))),
        Setting("no random values", replace(view, values=replace(view.values, mixture=0.0))),
        Setting("random values only", replace(view, values=replace(view.values, mixture=1.0))),
        Setting("shapes of the template", replace(view, shapes=replace(view.shapes, amount=0.0))),
        Setting("no vessels, tracts, texture", replace(view, values=replace(view.values, details=_PLAIN))),
        Setting("SGD, poly", view, schedule=NnunetSchedule, optimizer=nnunet_sgd),
        Setting("equal class weights", view, loss=partial(dice_and_cross_entropy, foreground_weight=1.0)),
        Setting("cross-entropy only", view, loss=weighted_cross_entropy),
        Setting("Dice and focal", view, loss=deepqsmseg_loss),
    ]


@dataclass(frozen=True)
class NnunetSchedule(StepSchedule):
    """Polynomial schedule of nnU-Net, from 0.01 to 0."""

    learning_rate: float = 0.01
    weight_decay: float = 3e-5
    gradient_norm: float | None = 12.0

    def rate(self, at: Position) -> float:
        """Return the learning rate of a step."""
        return float(self.learning_rate * (1 - self.fraction_done(at)) ** 0.9)


def nnunet_sgd(network: nn.Module, schedule: StepSchedule) -> torch.optim.Optimizer:
    """Return the optimizer of nnU-Net."""
    return torch.optim.SGD(
        network.parameters(),
        lr=schedule.learning_rate,
        momentum=0.99,
        nesterov=True,
        weight_decay=schedule.weight_decay,
    )


def weighted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy term of `dice_and_cross_entropy`."""
    weights = torch.full((logits.shape[1],), 3.0)
    weights[0] = 1.0
    return functional.cross_entropy(logits.float(), labels.long(), weight=weights)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and test the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [setting.name for setting in settings(SEGMENTER_VIEW)]
    parser.add_argument("template", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--settings", nargs="+", default=names, choices=names, help="settings to test (default: all)")
    parser.add_argument("--steps", type=positive_int, default=2000, help="per training (default: %(default)s)")
    parser.add_argument("--spacing", type=positive_float, default=1.5, help="voxel size in mm (default: %(default)s)")
    parser.add_argument("--maps", type=positive_int, default=60, help="number of test maps (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--real", type=Path, help="dataset of labelled real maps")
    args = parser.parse_args(argv)
    use_all_cores()
    model, view = coarser(get_model("dgm16"), SEGMENTER_VIEW, args.spacing)
    heads = training_heads(read_training_head(args.template))
    unseen = SimulatedMaps(
        heads,
        view,
        seed=_UNSEEN_SEED + args.seed,
        classes_of=nuclei_labels,
        normalize=NORMALIZATIONS[model.input.normalization],
    )
    for setting in settings(view):
        if setting.name not in args.settings:
            continue
        folder = setting.folder_in(args.out)
        maps = replace(unseen, view=setting.view, seed=args.seed)
        learn(
            model,
            mix_in_typical_maps(maps, model) if setting.typical else maps,
            folder,
            setting,
            steps=args.steps,
            seed=args.seed,
        )
        tables = [score_simulated(model, unseen, folder, n_maps=args.maps).assign(maps="simulated")]
        if args.real:
            tables.append(score(args.real, model, folder, ensemble=False)[["abbreviation", "dice"]].assign(maps="real"))
        pd.concat(tables).assign(setting=setting.name).to_csv(folder / _SCORES, sep="\t", index=False, na_rep="n/a")
        print(as_markdown(all_scores(args.out, view)), flush=True)
    all_scores(args.out, view).to_csv(args.out / "ablation.tsv", sep="\t", index=False, na_rep="n/a")
    return 0


def all_scores(out: Path, view: View) -> pd.DataFrame:
    """Read the scores of all settings tested by this call or an earlier one."""
    tried = [setting.folder_in(out) / _SCORES for setting in settings(view)]
    return pd.concat([pd.read_csv(path, sep="\t") for path in tried if path.is_file()], ignore_index=True)


def coarser(model: Model, view: View, spacing_mm: float) -> tuple[Model, View]:
    """Increase the voxel size of a model and of its field of view."""
    x, y, z = (round(size * view.spacing_mm / spacing_mm) for size in view.shape)
    shown = replace(model.input, spacing_mm=(spacing_mm,) * 3)
    return replace(model, input=shown), replace(view, shape=(x, y, z), spacing_mm=spacing_mm)


def learn(model: Model, samples: SimulatedMaps, folder: Path, setting: Setting, *, steps: int, seed: int) -> None:
    """Train the segmenter as `dgmseg train-simulated` does and save its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    schedule, checkpoint = setting.schedule(steps=steps), folder / "segmenter_checkpoint.pt"
    state = State.start(to_channels_last(segmenter_network(model), _CPU), schedule)
    if setting.optimizer:
        state.optimizer = setting.optimizer(state.network, schedule)
    if checkpoint.is_file():
        state.load(checkpoint)

    def report(state: State, result: StepResult) -> None:
        if state.step % 100 == 0:
            dice = float(result.dice.nanmean())
            print(f"{folder.name}: step {state.step}, {state.seconds:.0f} s, Dice {dice:.2f}", flush=True)

    run = Run(schedule, lambda network, logits, labels: setting.loss(logits, labels), checkpoint, workers=1)
    train(state, samples, run, report=report)
    save_weights(state.weights, folder / "segmenter.safetensors")
    copyfile(weights_folder(model) / "localizer.safetensors", folder / "localizer.safetensors")


def score_simulated(model: Model, samples: SimulatedMaps, folder: Path, *, n_maps: int) -> pd.DataFrame:
    """Compute the Dice of the most probable labels per nucleus over all voxels of simulated maps."""
    network = to_channels_last(load_weights(segmenter_network(model), model, "segmenter", folder), _CPU)
    counts = torch.zeros(3, len(model.labels) + 1)
    for index in range(n_maps):
        values, labels = samples[index]
        with torch.inference_mode(), mixed_precision(_CPU):
            found = network(batch_to_device(values[None], _CPU)).argmax(dim=1)
        counts += class_counts(found, labels[None], len(model.labels) + 1)
    return pd.DataFrame({"abbreviation": model.labels, "dice": dice_of_counts(counts).tolist()})


def as_markdown(table: pd.DataFrame) -> str:
    """Format the Dice per setting and nucleus, separately for simulated and real maps."""
    return markdown(dice_by_nucleus(table, ["maps", "setting"]).reset_index().rename(columns={"maps": "tested on"}))


if __name__ == "__main__":
    raise SystemExit(run_command("ablation", main))
