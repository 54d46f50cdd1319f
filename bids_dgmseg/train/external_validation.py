"""Look at labelled scans while a model learns from simulated ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from bids_dgmseg.io.files import write_text
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice
from bids_dgmseg.train.data import read_labelled_maps
from bids_dgmseg.train.run_finetuning import given_labels


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
        ``segmenter_watch.tsv`` in `out`: step, scan, abbreviation, Dice. Rows of earlier steps stay; those of this
        step and of later ones, which a training that was begun again has left behind, do not.

    Raises
    ------
    InputError
        If the dataset has no labelled maps.
    """
    borrows = bool(model.localizer.network) and not (out / "localizer.safetensors").is_file()
    located_by = None if borrows else out
    scores = score_labelled(dataset, model, weights=out, located_by=located_by, device=device, say=say)
    table = scores.assign(step=step)[["step", "scan", "abbreviation", "dice"]]
    nuclei = table["dice"].groupby(table["abbreviation"].str.split("_").str[0], sort=False).mean()
    means = " ".join(f"{name} {value:.3f}" for name, value in nuclei.items())
    where = f"{table['scan'].nunique()} scans of {dataset.name}, not learned from"
    say(f"step {step}, Dice on {where}: {means} mean {nuclei.mean():.3f}")
    path = out / "segmenter_watch.tsv"
    earlier = [pd.read_csv(path, sep="\t").query("step < @step")] if path.is_file() else []
    write_text(pd.concat([*earlier, table]).to_csv(sep="\t", index=False, float_format="%.4f"), path)
    return path


def score_labelled(
    dataset: Path,
    model: Model,
    *,
    weights: Path | None,
    located_by: Path | None,
    device: str,
    say: Callable[[str], None],
) -> pd.DataFrame:
    """Segment every labelled map of a dataset.

    Parameters
    ----------
    dataset : path
        Root of a BIDS dataset with labelled maps.
    model : Model
        Which nuclei.
    weights, located_by : path or None
        Folders of the segmenter and of the localizer; None for the model's own.
    device : {"cpu", "cuda", "auto"}
        Where to compute.
    say : callable
        Gets a line on what does not match.

    Returns
    -------
    DataFrame
        The columns of `dice`, scan and seconds; a row a scan and nucleus that is labelled in it.

    Raises
    ------
    InputError
        If the dataset has no labelled maps.
    """
    tables = []
    for one in read_labelled_maps(dataset, model, say=say):
        started = time.perf_counter()
        location = localize(one.map.chi, model, weights=located_by, device=device)
        found = segment_map(one.map.chi, model, weights=weights, device=device, location=location).labels
        seconds = time.perf_counter() - started
        known = [model.structures[channel - 1] for channel in one.map.channels]
        table = dice(given_labels(one.map, model), found, structures=known)
        tables.append(table.assign(scan=one.map.name, seconds=seconds))
    return pd.concat(tables)
