"""Train the network that finds the brain in the magnitude of echoes, on magnitudes drawn during training.

    python workflows/train_brain_mask.py OUT [--template FILE] [--steps N] [--minutes M] [--from FOLDER] [--seed S]
                                         [--workers N]

The same command resumes an interrupted training. ``OUT/brain-mask.safetensors`` are the weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from whole_head import WholeHead, draw_magnitude, prepare_whole_head

from bids_dgmseg.arguments import absolute_path, positive_float, positive_int
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import OK, run_command
from bids_dgmseg.lab.simulate.sample import phantom_labels
from bids_dgmseg.lab.simulate.template import read_template
from bids_dgmseg.lab.train.frame import TrainingRequest
from bids_dgmseg.lab.train.simulated import one_thread, train_on_simulations
from bids_dgmseg.models.registry import BRAIN_MASK
from bids_dgmseg.segmentation.inference import NORMALIZATIONS


@dataclass(frozen=True, eq=False)
class SimulatedMagnitudes(Dataset[tuple[Tensor, Tensor]]):
    """Magnitude images of whole heads and their brains, drawn on demand; sample i of a seed is always the same."""

    head: WholeHead
    seed: int
    """Two seeds share no sample."""
    normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw sample `index`: input (1, X, Y, Z) and brain (X, Y, Z)."""
        with one_thread():
            generator = torch.Generator().manual_seed(self.seed * 10_000_000 + index)
            magnitude, brain = draw_magnitude(self.head, generator)
        return torch.from_numpy(self.normalize(magnitude.numpy()))[None], brain


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or resume the training in OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=absolute_path, help="folder of the weights")
    parser.add_argument("--template", type=absolute_path, help="label template (default: the phantom)")
    parser.add_argument("--steps", type=positive_int, help="length of the whole training (default: 4500)")
    parser.add_argument("--minutes", type=positive_float, help="time limit of this call")
    parser.add_argument("--from", dest="start", type=absolute_path, help="folder of weights to start from")
    parser.add_argument("--seed", type=int, default=1, help="seed of initial weights and samples (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw samples (default: 1)")
    args = parser.parse_args(argv)
    request = TrainingRequest(model=BRAIN_MASK, part=BRAIN_MASK.name, **vars(args))
    return run_command("train_brain_mask", lambda: _train(request))


def _train(request: TrainingRequest) -> int:
    labels = phantom_labels() if request.template is None else read_template(request.template)
    normalize = NORMALIZATIONS[request.model.input.normalization]
    magnitudes = SimulatedMagnitudes(prepare_whole_head(labels), request.seed, normalize)
    with StatusLine() as line:
        train_on_simulations(request, log=line, samples=magnitudes)
    return OK


if __name__ == "__main__":
    sys.exit(main())
