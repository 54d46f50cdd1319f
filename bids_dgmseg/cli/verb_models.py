"""``dgmseg models``: list the models and check their weights."""

from __future__ import annotations

import argparse

from bids_dgmseg.cli import Verb, option
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256
from bids_dgmseg.models.registry import ALIASES, BRAIN_MASK, MODELS, Model, get_model, weights_folder


def show_models(args: argparse.Namespace) -> int:
    """Print the models, one of them or the state of the weights; the exit code is 1 if weights are damaged."""
    if args.action == "show" and args.model is None:
        raise InputError(f"show: no model given; choose from {', '.join([*ALIASES, *MODELS])}")
    chosen = [get_model(args.model, prefix="")] if args.model else list(MODELS.values())
    if args.action == "check":
        return check_weights(chosen if args.model else [*chosen, BRAIN_MASK])
    rows: list[tuple[str, ...]] = []
    if args.action == "list":
        columns = ("model", "nuclei", "size", "licence", "trained on", "title")
        rows = [columns]
        rows += [tuple(describe_model(model)[column].partition(" (re-")[0] for column in columns) for model in chosen]
    else:
        from bids_dgmseg.models.model_folder import read_model_folder  # imports torch

        shipped = read_model_folder(chosen[0])  # the network and patch of the weights, not of the paper
        rows = [(f"{key}:", value) for key, value in describe_model(shipped).items() if key != "nuclei"]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def describe_model(model: Model) -> dict[str, str]:
    """Return the properties of a model.

    >>> properties = describe_model(get_model("default"))
    >>> properties["model"], properties["nuclei"], properties["localizer"][:8]
    ('dgm16 (default)', 'DN,IN,RN,SN,STN,CN,PUT,GP', 'network ')
    >>> describe_model(get_model("deepqsmseg"))["localizer"]
    'centre, guarded by the localizer of dgm16'
    """
    aliases = [alias for alias, name in ALIASES.items() if name == model.name]
    spacing, patch = (
        "×".join(f"{value:g}" for value in triple) for triple in (model.input.spacing_mm, model.input.patch_mm)
    )
    localizer, weights = model.localizer, model.weights
    guard = f", guarded by the localizer of {localizer.guard}" if localizer.guard else ""
    files = weights.files if weights else {}
    sizes = [path.stat().st_size for name in files if (path := weights_folder(model) / name).is_file()]
    return {
        "model": f"{model.name} ({', '.join(aliases)})" if aliases else model.name,
        "title": model.title,
        "nuclei": ",".join(dict.fromkeys(structure.nucleus for structure in model.structures)),
        "labels": " ".join(model.labels),
        "network": model.network or "nnU-Net v2 model folders",
        "architecture": ", ".join(f"{key} {value}" for key, value in model.arch.items()) or "n/a",
        "input": f"{spacing} mm voxels, patch {patch} mm, {model.input.normalization}",
        "localizer": f"{localizer.kind} {localizer.network}".strip() + guard,
        "memory": f"{model.memory_gb:g} GB",
        "size": f"{sum(sizes) / 1e6:.1f} MB" if weights else "no weights",
        "licence": weights.licence if weights else "n/a",
        "trained on": weights.trained_on if weights else "n/a",
        "citation": ", ".join(model.citation) or "n/a",
        **{name: f"sha256 {checksum}" for name, checksum in files.items()},
        "folder": str(weights_folder(model)),
    }


def check_weights(models: list[Model]) -> int:
    """Compare the weights with their checksums and return the exit code."""
    wrong = 0
    for model in models:
        if not model.weights:
            print(f"{model.name}: no weights in the package")
            continue
        for name, expected in model.weights.files.items():
            path = weights_folder(model) / name
            checksum = sha256(path) if path.is_file() else "missing"
            wrong += checksum != expected
            print(f"{model.name}/{name}: " + ("ok" if checksum == expected else f"{checksum}, expected {expected}"))
    return 1 if wrong else 0


VERBS = (
    Verb(
        "models",
        "list the models, show one, or verify the checksums of the weights",
        show_models,
        [
            option(
                "ACTION",
                "list: one line per model; show: details of a model; check: compare the weights with their checksums "
                "(exit code 1 if any differs; default: %(default)s)",
                nargs="?",
                choices=("list", "show", "check"),
                default="list",
                metavar=None,
            ),
            option("MODEL", "model (required by show; default: all)", nargs="?"),
        ],
    ),
)
