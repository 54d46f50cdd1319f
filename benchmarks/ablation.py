"""What each ingredient of simulation and training is good for: the same network, trained without it, on the same maps.

    python benchmarks/ablation.py TEMPLATE OUT [--settings NAME ...] [--steps N] [--spacing MM] [--maps N] [--seed S]
                                  [--real DATASET]

Trains dgm16's segmenter from random weights, on voxels of ``--spacing`` mm so that many settings can be tried in an
evening, once a setting, with the same number of steps and the same seed. Each is then tried on maps that are drawn
with all ingredients from seeds not trained on, and on a dataset of real maps with labels. Prints Markdown; OUT gets a
folder a setting and ``ablation.tsv`` with all settings that were tried there. The same command goes on where
it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copyfile

import numpy as np
import pandas as pd
import torch
from accuracy import score
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.cli.options import positive_float, positive_int, seed
from bids_dgmseg.errors import run_command
from bids_dgmseg.models.registry import Model, get_model, weights_folder
from bids_dgmseg.models.weights import load_weights, save_weights, segmenter_network, to_channels_last
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, batch_to_device, mixed_precision
from bids_dgmseg.simulate.dataset import read_template
from bids_dgmseg.simulate.sample import SEGMENTER_VIEW, View, nuclei_labels
from bids_dgmseg.simulate.tissue_details import DetailRanges
from bids_dgmseg.train.dice_loss import dice_and_cross_entropy
from bids_dgmseg.train.loop import Progress, Reached, Schedule, class_counts, dice_of_counts, train, use_cores
from bids_dgmseg.train.losses import deepqsmseg_loss
from bids_dgmseg.train.sampling import SimulatedMaps, training_heads
from bids_dgmseg.train.simulated import among_ordinary

_CPU = torch.device("cpu")
_PLAIN = DetailRanges(
    texture=(0.0, 0.0), fine_ppm=(0.0, 0.0), slow_ppm=(0.0, 0.0), tracts=0.0, veins=0.0, spots=(0.0, 0.0)
)
_SCORES = "scores.tsv"
_UNSEEN_SEED = 3 * 10**6
"""Seeds of training are below."""


@dataclass(frozen=True)
class Setting:
    """One way to simulate and to learn."""

    name: str
    view: View
    ordinary: bool = False
    """Whether every third map is an ordinary one."""
    schedule: type[Schedule] = Schedule
    optimizer: Callable[[nn.Module, Schedule], torch.optim.Optimizer] | None = None
    """None for that of `Progress.start`."""
    loss: Callable[[Tensor, Tensor], Tensor] = dice_and_cross_entropy

    def folder_in(self, out: Path) -> Path:
        """Name the folder of what is learned and scored."""
        return out / self.name.replace(" ", "_").replace(",", "")


def settings(view: View) -> list[Setting]:
    """List the ways; the first has all ingredients, the last four learn from the same maps in other ways."""
    return [
        Setting("everything", view),
        Setting("everything, a third ordinary", view, ordinary=True),
        Setting("no physics", replace(view, artefacts=replace(view.artefacts, physics=0.0))),
        Setting("physics alone", replace(view, artefacts=replace(view.artefacts, physics=1.0))),
        Setting("no plain mixtures", replace(view, values=replace(view.values, mixture=0.0))),
        Setting("plain mixtures alone", replace(view, values=replace(view.values, mixture=1.0))),
        Setting("shapes of the template", replace(view, shapes=replace(view.shapes, amount=0.0))),
        Setting("no vessels, tracts, texture", replace(view, values=replace(view.values, details=_PLAIN))),
        Setting("SGD, poly", view, schedule=NnunetSchedule, optimizer=nnunet_sgd),
        Setting("nuclei weigh as background", view, loss=partial(dice_and_cross_entropy, foreground_weight=1.0)),
        Setting("cross-entropy alone", view, loss=weighted_cross_entropy),
        Setting("Dice and focal", view, loss=deepqsmseg_loss),
    ]


@dataclass(frozen=True)
class NnunetSchedule(Schedule):
    """nnU-Net's: from 0.01 down to 0 as a power of what is left."""

    learning_rate: float = 0.01
    weight_decay: float = 3e-5
    gradient_norm: float = 12.0

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step."""
        return float(self.learning_rate * (1 - self.part(step, seconds)) ** 0.9)


def nnunet_sgd(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Give nnU-Net's optimizer."""
    return torch.optim.SGD(
        network.parameters(),
        lr=schedule.learning_rate,
        momentum=0.99,
        nesterov=True,
        weight_decay=schedule.weight_decay,
    )


def weighted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute what is left of `dice_and_cross_entropy` without Dice."""
    weights = torch.full((logits.shape[1],), 3.0)
    weights[0] = 1.0
    return functional.cross_entropy(logits.float(), labels.long(), weight=weights)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score the settings one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [setting.name for setting in settings(SEGMENTER_VIEW)]
    parser.add_argument("template", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--settings", nargs="+", default=names, choices=names, help="settings to try (default: all)")
    parser.add_argument("--steps", type=positive_int, default=2000, help="of each training (default: %(default)s)")
    parser.add_argument(
        "--spacing", type=positive_float, default=1.5, help="edge of the voxels in mm (default: %(default)s)"
    )
    parser.add_argument("--maps", type=positive_int, default=60, help="drawn to try each on (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--real", type=Path, help="dataset with labels")
    args = parser.parse_args(argv)
    use_cores()
    model, view = coarser(get_model("dgm16"), SEGMENTER_VIEW, args.spacing)
    heads = training_heads(read_template(args.template))
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
            among_ordinary(maps, model) if setting.ordinary else maps,
            folder,
            setting,
            steps=args.steps,
            seed=args.seed,
        )
        tables = [try_on_simulated(model, unseen, folder, n_maps=args.maps).assign(maps="simulated")]
        if args.real:
            tables.append(score(args.real, model, folder)[["abbreviation", "dice"]].assign(maps="real"))
        pd.concat(tables).assign(setting=setting.name).to_csv(folder / _SCORES, sep="\t", index=False, na_rep="n/a")
        print(as_markdown(all_scores(args.out, view)), flush=True)
    all_scores(args.out, view).to_csv(args.out / "ablation.tsv", sep="\t", index=False, na_rep="n/a")
    return 0


def all_scores(out: Path, view: View) -> pd.DataFrame:
    """Gather the scores of all settings that this call or an earlier one tried."""
    tried = [setting.folder_in(out) / _SCORES for setting in settings(view)]
    return pd.concat([pd.read_csv(path, sep="\t") for path in tried if path.is_file()], ignore_index=True)


def coarser(model: Model, view: View, spacing_mm: float) -> tuple[Model, View]:
    """Give a model and its training's field of view larger voxels."""
    x, y, z = (round(size * view.spacing_mm / spacing_mm) for size in view.shape)
    shown = replace(model.input, spacing_mm=(spacing_mm,) * 3)
    return replace(model, input=shown), replace(view, shape=(x, y, z), spacing_mm=spacing_mm)


def learn(model: Model, samples: SimulatedMaps, folder: Path, setting: Setting, *, steps: int, seed: int) -> None:
    """Train the segmenter as `dgmseg train` does, and leave its weights in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    schedule, checkpoint = setting.schedule(steps=steps), folder / "segmenter_checkpoint.pt"
    progress = Progress.start(to_channels_last(segmenter_network(model), _CPU), schedule)
    if setting.optimizer:
        progress.optimizer = setting.optimizer(progress.network, schedule)
    if checkpoint.is_file():
        progress.load(checkpoint)

    def report(reached: Reached) -> None:
        if reached.step % 100 == 0:
            dice = float(reached.dice.nanmean())
            print(f"{folder.name}: step {reached.step}, {reached.seconds:.0f} s, Dice {dice:.2f}", flush=True)

    train(
        progress,
        samples,
        schedule=schedule,
        checkpoint=checkpoint,
        minutes=float("inf"),
        device=_CPU,
        report=report,
        loss=setting.loss,
    )
    save_weights(progress.average, folder / "segmenter.safetensors")
    copyfile(weights_folder(model) / "localizer.safetensors", folder / "localizer.safetensors")


def try_on_simulated(model: Model, samples: SimulatedMaps, folder: Path, *, n_maps: int) -> pd.DataFrame:
    """Score most probable labels on maps drawn from fixed seeds, all maps' voxels of a nucleus together."""
    network = to_channels_last(load_weights(segmenter_network(model), model, "segmenter", folder), _CPU)
    counts = torch.zeros(3, len(model.labels) + 1)
    for index in range(n_maps):
        values, labels = samples[index]
        with torch.inference_mode(), mixed_precision(_CPU):
            found = network(batch_to_device(values[None], _CPU)).argmax(dim=1)
        counts += class_counts(found, labels[None], len(model.labels) + 1)
    return pd.DataFrame({"abbreviation": model.labels, "dice": dice_of_counts(counts).tolist()})


def as_markdown(table: pd.DataFrame) -> str:
    """Lay settings out in rows and nuclei in columns, mean of left and right."""
    nuclei = table.assign(nucleus=table["abbreviation"].str.split("_").str[0])
    wide = nuclei.pivot_table(index=["maps", "setting"], columns="nucleus", values="dice", sort=False)
    wide["mean"] = wide.mean(axis=1)
    lines = ["| tried on | setting | " + " | ".join(wide.columns) + " |", "| --- " * (2 + len(wide.columns)) + "|"]
    for maps, rows in wide.groupby(level="maps", sort=False):
        for setting, row in rows.droplevel("maps").iterrows():
            cells = ["" if np.isnan(value) else f"{value:.3f}" for value in row]
            lines.append(f"| {maps} | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_command("ablation", main))
