"""One network on its way from untrained, or from other weights, to those of a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.weights import load_object, pick_device, save_weights, to_channels_last
from bids_dgmseg.networks.attention_unet import ResNet50AttentionUNet25D
from bids_dgmseg.train.cases import Case
from bids_dgmseg.train.epochs import Run, State, learn
from bids_dgmseg.train.objectives import main_logits
from bids_dgmseg.train.patches import WindowSamples
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.recipe_values import fit
from bids_dgmseg.train.schemes import transfer

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Means:
    """What a training runs with."""

    seed: int = 1
    """Of weights, samples and their order."""
    device: str = "auto"
    workers: int = 0
    checkpoint_minutes: float = 2.0


class Learner:
    """A network, supervised at each of its scales, that learns by a recipe.

    Parameters
    ----------
    model : Model
        Gives the network and its arguments.
    recipe : Recipe
        How to learn.
    means : Means
        Seed and machine.

    Raises
    ------
    ValueError
        If the network does not take the arguments, or not the recipe's samples.
    InputError
        If the loss does not take what the network answers.
    """

    def __init__(self, model: Model, recipe: Recipe, means: Means) -> None:
        self.recipe, self.means = recipe, means
        torch.manual_seed(means.seed)
        kind = load_object(recipe.network or model.network)
        _check(model.arch, get_type_hints(kind.__init__))
        try:
            self.network: nn.Module = kind(model.input.channels, len(recipe.classes) + 1, True, **model.arch)
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(str(error)) from error
        self._try_sample()

    def _try_sample(self) -> None:
        """Show the network a sample, and the loss the answer, before the maps are prepared."""
        sampling = self.recipe.sampling
        sample = torch.zeros(sampling.size)
        channels = sample[None] if sampling.stack_axis is None else sample.movedim(sampling.stack_axis, 0)
        try:
            with torch.inference_mode():
                answer = self.network.eval()(channels[None])
        except RuntimeError as error:
            raise ValueError(f"samples of {sampling.size} do not fit ({str(error).splitlines()[0]})") from error
        labels = torch.zeros(main_logits(answer)[:, 0].shape, dtype=torch.long)
        try:
            with torch.inference_mode():
                self.recipe.loss(self.network, answer, labels)
        except ValueError as error:
            raise InputError(f"--recipe loss: {error}") from error

    @property
    def parameters(self) -> int:
        """How many there are to learn."""
        return sum(value.numel() for value in self.network.parameters())

    def begin_with(self, path: Path, *, new_heads: bool) -> list[str]:
        """Take weights from a file; for an encoder from ImageNet those of ResNet-50.

        Parameters
        ----------
        path : path
            Of safetensors.
        new_heads : bool
            Leave the output layers untrained, as for other classes.

        Returns
        -------
        list of str
            Parameters that stay untrained.

        Raises
        ------
        ValueError
            If the file has no weights, or those of another network.
        """
        try:
            weights = {name: value.float() for name, value in load_file(path).items()}
            if isinstance(self.network, ResNet50AttentionUNet25D) and not any("heads" in name for name in weights):
                self.network.load_imagenet(weights)
                return [name for name in self.network.state_dict() if not name.startswith("encoder.")]
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(str(error).splitlines()[0]) from error
        return transfer(self.network, weights, new_heads=new_heads)

    def learn(
        self,
        cases: Sequence[Case],
        validation: Sequence[Case],
        folder: Path,
        *,
        report: Callable[[State, int, float], None],
        finish_epoch: Callable[[State], bool | None] = lambda state: None,
    ) -> State:
        """Learn from some maps while watching others, going on where the folder's checkpoint stopped.

        Parameters
        ----------
        cases, validation : sequence of Case
            Maps; without any to watch the last weights are kept.
        folder : path
            Gets ``checkpoint.pt``.
        report, finish_epoch : callable
            As for `bids_dgmseg.train.epochs.learn`.

        Returns
        -------
        State
            Where the training stands; the network then has the weights to keep.
        """
        means, recipe = self.means, self.recipe
        folder.mkdir(parents=True, exist_ok=True)
        samples = WindowSamples(cases, recipe, seed=means.seed, moved=True)
        watched = WindowSamples(validation, recipe, seed=means.seed, moved=False) if validation else None
        device = pick_device(means.device)
        state = State.start(to_channels_last(self.network, device), recipe.pace)
        if (folder / CHECKPOINT).is_file():
            state.load(folder / CHECKPOINT)
        run = Run(
            recipe.pace,
            recipe.loss,
            folder / CHECKPOINT,
            len(recipe.classes) + 1,
            seed=means.seed,
            device=device.type,
            workers=means.workers,
            checkpoint_minutes=means.checkpoint_minutes,
        )
        learn(state, samples, watched, run, report=report, finish_epoch=finish_epoch)
        self.network.load_state_dict(state.result())
        return state

    def save(self, path: Path) -> str:
        """Write the weights for a model folder; returns the file's sha256."""
        return save_weights(self.network.state_dict(), path)


def _check(arch: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Hold arguments against the annotations of a network; those that it does not have, it refuses itself."""
    for name in arch.keys() & kinds.keys() - {"return"}:
        try:
            fit(kinds[name], arch[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
