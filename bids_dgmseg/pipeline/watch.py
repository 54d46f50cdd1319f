"""Look at labelled scans while a model learns from simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from bids_dgmseg.bids.files import write_text
from bids_dgmseg.measure.overlap import dice
from bids_dgmseg.models import Model
from bids_dgmseg.pipeline.finetune import given_labels, segment
from bids_dgmseg.pipeline.labels import read_labelled_maps
from bids_dgmseg.segment.localize import localize


def watch(model: Model, dataset: Path, out: Path, *, step: int, device: str, say: Callable[[str], None]) -> Path:
    """Score a model folder on a labelled dataset from which nothing is learned.

    Parameters
    ----------
    model : Model
        Whose segmenter ``out`` has.
    dataset : path
        Root of a BIDS dataset with labelled maps.
    out : path
        Model folder; the box comes from its localizer where it has one, else from the model's own.
    step : int
        After how many steps.
    device : {"cpu", "cuda", "auto"}
        Where to compute.
    say : callable
        Gets the mean Dice of each nucleus, left and right together.

    Returns
    -------
    path
        ``segmenter_watch.tsv`` in `out`: step, scan, abbreviation, Dice; rows of other steps stay.

    Raises
    ------
    InputError
        If the dataset has no labelled maps.
    """
    borrows = bool(model.localizer.network) and not (out / "localizer.safetensors").is_file()
    rows = []
    for one in read_labelled_maps(dataset, model, say=say):
        box = localize(one.map.chi, model, weights=None if borrows else out, device=device).box
        found = segment(one.map, box, model, weights=out, device=device)
        known = [model.structures[channel - 1] for channel in one.map.channels]
        table = dice(given_labels(one.map, model), found, structures=known)
        rows.append(table[["abbreviation", "dice"]].assign(step=step, scan=one.map.name))
    table = pd.concat(rows)[["step", "scan", "abbreviation", "dice"]]
    nuclei = table["dice"].groupby(table["abbreviation"].str.split("_").str[0], sort=False).mean()
    means = " ".join(f"{name} {value:.3f}" for name, value in nuclei.items())
    say(f"step {step}, Dice on {len(rows)} scans of {dataset.name}, not learned from: {means} mean {nuclei.mean():.3f}")
    path = out / "segmenter_watch.tsv"
    earlier = [pd.read_csv(path, sep="\t").query("step < @step")] if path.is_file() else []
    write_text(pd.concat([*earlier, table]).to_csv(sep="\t", index=False, float_format="%.4f"), path)
    return path
