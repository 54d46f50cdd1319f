"""Before the networks run: are they there, and how many threads may they use."""

from __future__ import annotations

from pathlib import Path

from bids_dgmseg.models.registry import MODELS, Model


def check_ready(model: Model, *, weights: Path | None, device: str) -> list[str]:
    """Load what a model needs once, so that a run that cannot work ends before its first scan.

    Parameters
    ----------
    model : Model
        The registry entry.
    weights : path or None
        Folder that takes the place of the model's own weights.
    device : {"cpu", "cuda", "auto"}
        Where the networks are to run.

    Returns
    -------
    list of str
        What the user should know of the weights.

    Raises
    ------
    InputError
        If weights are missing or damaged, or there is no such device.
    """
    from bids_dgmseg.models.weights import load_segmenters, load_weights, localizer_network, pick_device
    from bids_dgmseg.segmentation.registration import read_references

    pick_device(device)
    if model.localizer.kind == "nnunet":
        from bids_dgmseg.segmentation.nnunet import check_nnunet

        return check_nnunet(model, weights=weights)
    if model.localizer.network:
        load_weights(localizer_network(model), model, "localizer", weights)
    if model.network:
        load_segmenters(model, weights)
    if model.localizer.guard:
        guard = MODELS[model.localizer.guard]
        load_weights(localizer_network(guard), guard, "localizer")
    if model.localizer.kind == "atlas":
        read_references(model, weights)
    return []


def limit_threads(count: int) -> None:
    """Let the networks of this process use `count` threads."""
    import torch

    torch.set_num_threads(count)
