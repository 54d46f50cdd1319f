"""Small trainings by the papers' recipes: labelled phantoms, options of small networks, and what a training writes."""

import functools
import json

import nibabel as nib
import numpy as np

from bids_dgmseg.cli.main import main
from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.lab.train.recipe import Recipe, read_recipe
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.predict import Location
from bids_dgmseg.segmentation.segment import segment_map
from tests.conftest import start_dataset, write_map

BRIEF = ["--minutes", "0.0001"]
"""One step of training."""

GRID = world_grid(Box((-75, -110, -80), (75, 74, 80)), (2.5, 2.5, 2.5))
SMALL: dict[str, dict[str, object]] = {
    "dcnnet": {
        "arch.dilations": [[1], [1, 2]],
        "arch.growth": 2,
        "arch.initial_features": 2,
        "arch.bottleneck_layers": 1,
        "sampling.size": [16, 16, 16],
        "sampling.step": [20, 20, 20],
        "pace.batch": 4,
    },
    "attunet25d": {
        "arch.features": [2, 4, 8, 16],
        "arch.scales": 3,
        "sampling.size": [32, 3, 32],
        "sampling.step": [0, 8, 0],
        "pace.batch": 4,
    },
    "deepqsmseg": {"arch.features": [2, 4], "arch.blocks": [1, 1], "arch.attended": 1, "sampling.size": [64, 64, 32]},
}
BOX = Box((-20, -40, -40), (20, 0, 0))
"""Around the dentate nuclei of the phantom."""


@functools.cache
def phantom(seed=None):
    """Return the map of the phantom."""
    return PHANTOM.chi(GRID, seed=seed, supersampling=1)


def make_dataset(root):
    start_dataset(root)
    rows = ["participant_id\tsite"]
    for number in range(1, 5):
        scan = f"sub-{number:02d}"
        rows.append(f"{scan}\t{'AB'[number % 2]}")
        write_map(root, scan, phantom(number))
        if number < 4:
            label(root / "derivatives" / "manual", scan, seg="manual")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def label(derivative, scan, *, seg, moved_mm=0.0):
    """Write the phantom's truth, moved, as labels of a scan."""
    shift = np.eye(4)
    shift[1, 3] = moved_mm
    start_dataset(derivative, DatasetType="derivative")
    folder = derivative / scan / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    dseg = PHANTOM.dseg(Grid(GRID.shape, shift @ GRID.affine)).array
    nib.Nifti1Image(dseg, GRID.affine).to_filename(folder / f"{scan}_seg-{seg}_dseg.nii.gz")


def command(model, dataset, out, *options, epochs=2, folds=1, changes=None, small=True, verb="train"):
    """Return the arguments of a training, with the recipe of a small network and changes of it."""
    recipe = {**(SMALL[model] if small else {}), **(changes or {})}
    path = out.with_name(f"{out.name}.toml")
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.items()))
    length = f"--epochs {epochs} --folds {folds} --workers 0 --device cpu --recipe {path}"
    return [verb, model, str(dataset), str(out), *length.split(), *options]


def train(*args, **options):
    return main(command(*args, **options))


def read(name) -> Recipe:
    """Read a recipe of the package, such as ``dcnnet`` or ``dcnnet-joint``."""
    recipe = read_recipe(MODELS[name.partition("-")[0]], name if "-" in name else None)
    assert isinstance(recipe, Recipe)
    return recipe


def record(out):
    return json.loads((out / "training.json").read_text())


def curve(folder):
    lines = (folder / "curve.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]


def predict(model, weights):
    """Return the probabilities of a model in the box of the dentate nuclei."""
    return segment_map(phantom(), model, weights=weights, location=Location(BOX)).block
