"""Boutiques descriptor of the BIDS App, made from its parser: ``python -m bids_dgmseg.cli.boutiques > boutiques.json``.

The output directory is an input of type File, because Boutiques mounts only those in a container: results elsewhere
would be lost with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bids_dgmseg import __version__
from bids_dgmseg.cli.bids_app import build_parser
from bids_dgmseg.cli.options import absolute_path, non_negative_float, positive_float, positive_int

_IN_ORDER = ("bids_dir", "output_dir", "analysis_level", "participant_label", "session_label")
"""Inputs that must come first."""

_CREATED = ("work_dir",)
"""Paths that need not exist and are not mounted."""

_NUMBERS: dict[Any, dict[str, Any]] = {
    positive_int: {"integer": True, "minimum": 1},
    positive_float: {"minimum": 0, "exclusive-minimum": True},
    non_negative_float: {"minimum": 0},
}


def describe_app() -> dict[str, Any]:
    """Return the descriptor, schema 0.5."""
    parser = build_parser()
    actions = {_id(action): action for action in parser._actions if action.dest not in ("help", "version")}
    inputs = {name: _describe_input(name, actions[name]) for name in dict.fromkeys((*_IN_ORDER, *actions))}
    keys = [given["value-key"] for given in inputs.values()]
    # bosh validate --bids asks for another one of type String, and for a group with both; a command without output_dir
    # fails, because Boutiques then leaves out the key.
    inputs["output_dir"]["optional"] = True
    other = {"id": "output_dir_name", "name": "Output dir name", "type": "String"}
    other["description"] = "Not used; Boutiques' rules for BIDS Apps ask for it. Set output_dir, an existing folder"
    return {
        "name": "bids_dgmseg",
        "tool-version": __version__,
        "schema-version": "0.5",
        "author": "The bids_dgmseg developers",
        "description": str(parser.description),
        "command-line": f"mkdir -p [OUTPUT_DIR]; bids_dgmseg {' '.join(keys)}",
        "container-image": {"type": "docker", "image": f"bids_dgmseg:{__version__}"},
        "inputs": [*inputs.values(), {**inputs["output_dir"], **other}],
        "groups": [
            {
                "id": "output",
                "name": "Output directory",
                "members": ["output_dir", "output_dir_name"],
                "mutually-exclusive": True,
                "one-is-required": True,
            }
        ],
        "output-files": [
            {
                "id": "results",
                "name": "BIDS derivatives",
                "description": "Labels, probabilities, masks, tables and pages per participant; tables of all scans",
                "path-template": "[OUTPUT_DIR]",
                "optional": False,
            }
        ],
        "error-codes": [
            {"code": 1, "description": "Some scans failed; they are listed, the others are done"},
            {"code": 2, "description": "Invalid options or dataset"},
            {"code": 129, "description": "The terminal was closed; finished scans are kept"},
            {"code": 130, "description": "Interrupted; run the same command again (finished scans are kept)"},
        ],
        "suggested-resources": {"cpu-cores": 2, "ram": 4},
        "tags": {"domain": ["neuroinformatics", "neuroimaging", "mri", "bids-app", "qsm", "segmentation"]},
    }


def _id(action: argparse.Action) -> str:
    long = next((word for word in action.option_strings if word.startswith("--")), action.dest)
    return long.removeprefix("--").replace("-", "_")


def _describe_input(name: str, action: argparse.Action) -> dict[str, Any]:
    # bosh pprint passes descriptions to argparse, which would take a percent sign for a format
    text = str(action.help).replace(" %%", " percent").replace("%%", " percent")
    kind = "Flag" if action.nargs == 0 else "Number" if action.type in _NUMBERS else "String"
    given = {
        "id": name,
        "name": name.replace("_", " ").capitalize(),
        "description": text[0].upper() + text[1:],
        "type": "File" if action.type is absolute_path and name not in _CREATED else kind,
        **_NUMBERS.get(action.type, {}),
        "value-key": f"[{name.upper()}]",
        "optional": bool(action.option_strings),
    }
    if action.choices:
        given["value-choices"] = list(action.choices)
    if action.nargs == "+":
        given["list"] = True
    if action.option_strings:
        given["command-line-flag"] = next(word for word in action.option_strings if word.startswith("--"))
    return given


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe_app(), indent=4) + "\n")
