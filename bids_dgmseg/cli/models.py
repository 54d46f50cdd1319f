"""``dgmseg models``: list the models and check their weights."""

from __future__ import annotations

import argparse

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256
from bids_dgmseg.models.registry import ALIASES, MODELS, Localizer, Model, get_model, weights_folder

HELP = "list the models, show one, or verify the checksums of the weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "show", "check"),
        default="list",
        help="list: one line per model; show: details of a model; check: compare the weights with their checksums "
        "(exit code 1 if any differs; default: %(default)s)",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model (required by show; default: all)")


def run(args: argparse.Namespace) -> int:
    """Print the models."""
    if args.action == "show" and args.model is None:
        raise InputError(f"show: no model given; choose from {', '.join([*ALIASES, *MODELS])}")
    chosen = [get_model(args.model, option="")] if args.model else list(MODELS.values())
    if args.action == "list":
        print(_table([("model", "nuclei", "size", "licence", "trained on", "title"), *map(_row, chosen)]))
    elif args.action == "show":
        print(_table([(f"{key}:", value) for key, value in _details(chosen[0]).items()]))
    else:
        return _check(chosen)
    return 0


def _row(model: Model) -> tuple[str, ...]:
    licence = model.weights.licence if model.weights else "n/a"
    trained_on = model.weights.trained_on if model.weights else "n/a"
    return _keys(model), ",".join(_nuclei(model)), _size(model), licence, trained_on, model.title


def _keys(model: Model) -> str:
    """Return the name of a model with its aliases.

    >>> _keys(get_model("default"))
    'dgm16 (default)'
    """
    aliases = [alias for alias, key in ALIASES.items() if key == model.name]
    return f"{model.name} ({', '.join(aliases)})" if aliases else model.name


def _nuclei(model: Model) -> list[str]:
    return list(dict.fromkeys(structure.nucleus for structure in model.structures))


def _size(model: Model) -> str:
    if not model.weights:
        return "no weights"
    sizes = [path.stat().st_size for name in model.weights.files if (path := weights_folder(model) / name).is_file()]
    return f"{sum(sizes) / 1e6:.1f} MB"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _details(model: Model) -> dict[str, str]:
    spacing, patch = (
        "×".join(f"{value:g}" for value in triple) for triple in (model.input.spacing_mm, model.input.patch_mm)
    )
    weights = model.weights
    files = weights.files.items() if weights else ()
    return {
        "model": _keys(model),
        "title": model.title,
        "labels": " ".join(model.labels),
        "heads": " | ".join(" ".join(("background", *group)) for group in model.groups),
        "network": model.network or str(model.predictor),
        "architecture": ", ".join(f"{key} {value}" for key, value in model.arch.items()) or "n/a",
        "input": f"{spacing} mm voxels, patch {patch} mm, {model.input.normalization}",
        "localizer": _describe_localizer(model.localizer),
        "memory": f"{model.memory_gb:g} GB",
        "size": _size(model),
        "licence": weights.licence if weights else "n/a",
        "trained on": weights.trained_on if weights else "n/a",
        "citation": ", ".join(model.citation) or "n/a",
        **{name: f"sha256 {checksum}" for name, checksum in files},
        "folder": str(weights_folder(model)),
    }


def _describe_localizer(localizer: Localizer) -> str:
    """Return the kind of a localizer.

    >>> _describe_localizer(get_model("deepqsmseg").localizer)
    'centre, guarded by the localizer of dgm16'
    """
    guard = f", guarded by the localizer of {localizer.guard}" if localizer.guard else ""
    return f"{localizer.kind} {localizer.network}".strip() + guard


def _check(models: list[Model]) -> int:
    wrong = 0
    for model in models:
        if not model.weights:
            print(f"{model.name}: no weights in the package")
            continue
        for name, expected in model.weights.files.items():
            path = weights_folder(model) / name
            found = sha256(path) if path.is_file() else "missing"
            wrong += found != expected
            print(f"{model.name}/{name}: " + ("ok" if found == expected else f"{found}, expected {expected}"))
    return 1 if wrong else 0
