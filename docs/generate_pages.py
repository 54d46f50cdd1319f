"""Files that are generated: the page of all options, the list of frozen names and the Boutiques descriptor.

``python docs/generate_pages.py`` writes ``docs/options.md``, ``docs/names.md`` and ``boutiques.json`` in the current
folder.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from bids_dgmseg import __version__
from bids_dgmseg.arguments import absolute_path, non_negative_float, positive_float, positive_int
from bids_dgmseg.cli import add_options
from bids_dgmseg.cli.bids_app import build_parser
from bids_dgmseg.cli.main import VERBS

_APP_INTRODUCTION = """\
Options may be spelled with underscores (`--participant_label`), but not abbreviated.
Options of one level are rejected at the other; `--help` after the level shows those of the level.
Exit codes: [questions](faq.md#exit-codes)."""

_TOOLS_INTRODUCTION = """\
Tools for measurement, evaluation and training.
`dgmseg COMMAND --help` prints the options of a command.
Exit codes: 0 done, 1 problems were found, 2 invalid options or files, 129 terminal closed, 130 interrupted."""

_NAMES_INTRODUCTION = "Kept from version 0.1.0 to the next major version; new ones may be added."

_NUMBERS: dict[Any, dict[str, Any]] = {
    positive_int: {"integer": True, "minimum": 1},
    positive_float: {"minimum": 0, "exclusive-minimum": True},
    non_negative_float: {"minimum": 0},
}

_FIRST = ("bids_dir", "output_dir", "analysis_level", "participant_label", "session_label")
"""Inputs that must come first in a Boutiques descriptor."""


def describe_options() -> str:
    """Return the page of options as Markdown."""
    return "\n\n".join(["# Options", *_describe_app(), *_describe_tools()]) + "\n"


def _describe_app() -> Iterable[str]:
    parser = build_parser()
    positional, general, *groups = parser._action_groups
    yield "## bids_dgmseg"
    yield f"```text\n{_usage('bids_dgmseg', parser._actions)}\n```"
    yield _mark_code(str(parser.description))
    yield _table(positional._group_actions, heading="Argument")
    yield _APP_INTRODUCTION
    general.title = "general"
    for group in (*groups, general):
        yield f"### {str(group.title)[0].upper()}{str(group.title)[1:]}"
        yield _table(group._group_actions)


def _describe_tools() -> Iterable[str]:
    yield "## dgmseg"
    yield _TOOLS_INTRODUCTION
    rows = [["Command", "What it does"], ["---", "---"]]
    for verb in VERBS.values():
        parser = argparse.ArgumentParser(add_help=False)
        add_options(parser, verb.options)
        usage = _usage(f"dgmseg {verb.name}", parser._actions).replace("|", r"\|")
        rows.append([f"`{usage}`", _mark_code(verb.help)])
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _usage(program: str, actions: Iterable[argparse.Action]) -> str:
    """Return a command with its arguments and required options."""
    words = [_spell(action) for action in actions if action.required or not action.option_strings]
    options = ["[options]"] if any(not action.required and action.option_strings for action in actions) else []
    return " ".join([program, *words, *options])


def _spell(action: argparse.Action) -> str:
    """Return an argument or option with its values."""
    values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else str(action.metavar or action.dest)
    values += " …" if action.nargs == "+" else ""
    if not action.option_strings:
        return f"[{values}]" if action.nargs == "?" else values
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {values}")


def _table(actions: Iterable[argparse.Action], *, heading: str = "Option") -> str:
    """Return one row per option."""
    rows = [[heading, "Meaning"], ["---", "---"]]
    for action in actions:
        name = _spell(action).replace(", -", "`, `-") if action.option_strings else action.metavar or action.dest
        meaning = str(action.help) % {"default": action.default, "prog": "bids_dgmseg"}
        rows.append([f"`{name}`", _mark_code(meaning)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mark_code(text: str) -> str:
    """Put options and names that have Markdown's special characters in backquotes."""
    marked = re.sub(r"(?<![\w`-])(--[a-z-]+|[^\s(,;\"'`]*[_*\[][^\s,;)\"'`]*\w)", r"`\1`", text)
    return marked.replace("|", r"\|")


def describe_names(outputs: str) -> str:
    """Return the page of frozen names as Markdown, from the parsers, data dictionaries and the page of outputs."""
    tables = re.findall(r"^\| File.*\n\|[- |]+\n((?:\|.*\n)+)", outputs, flags=re.MULTILINE)
    paths = [name for row in "".join(tables).splitlines() for name in re.findall(r"`(.+?)`", row.split(" | ")[0])]
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for verb in VERBS.values():
        add_options(parser, verb.options)
    sections: dict[str, Iterable[str]] = {
        "Options of bids_dgmseg": _names(build_parser()),
        "Commands of dgmseg": VERBS,
        "Their options": _names(parser),
        "Files": paths,
        "Columns of stats.tsv": _columns("stats"),
        "Columns of group tables": _columns("group"),
        "Columns of dgmseg evaluate": _columns("evaluation"),
    }
    rows = [f"| {title} | {', '.join(f'`{name}`' for name in names)} |" for title, names in sections.items()]
    return "\n".join(["# Frozen names", "", _NAMES_INTRODUCTION, "", "| | |", "| --- | --- |", *rows]) + "\n"


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [
        word for action in parser._actions for word in action.option_strings if action.dest not in ("help", "version")
    ]


def _columns(table: str) -> list[str]:
    text = files("bids_dgmseg").joinpath("data", f"columns_{table}.tsv").read_text(encoding="utf-8")
    return list(dict.fromkeys(line.split("\t")[1] for line in text.splitlines()[1:]))


def describe_app() -> dict[str, Any]:
    """Return the Boutiques descriptor, schema 0.5.

    The output directory is an input of type File, because Boutiques mounts only those in a container: results elsewhere
    would be lost with it.
    """
    parser = build_parser()
    actions = {_id(action): action for action in parser._actions if action.dest not in ("help", "version")}
    inputs = {name: _describe_input(name, actions[name]) for name in dict.fromkeys((*_FIRST, *actions))}
    keys = [item["value-key"] for item in inputs.values()]
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
            {"code": 129, "description": "The terminal was closed; completed scans are kept"},
            {"code": 130, "description": "Interrupted; rerun the same command (completed scans are kept)"},
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
    is_mounted = action.type is absolute_path and name != "work_dir"  # which need not exist
    description = {
        "id": name,
        "name": name.replace("_", " ").capitalize(),
        "description": text[0].upper() + text[1:],
        "type": "File" if is_mounted else kind,
        **_NUMBERS.get(action.type, {}),
        "value-key": f"[{name.upper()}]",
        "optional": bool(action.option_strings),
    }
    if action.choices:
        description["value-choices"] = list(action.choices)
    if action.nargs == "+":
        description["list"] = True
    if action.option_strings:
        description["command-line-flag"] = f"--{name.replace('_', '-')}"
    return description


if __name__ == "__main__":
    Path("docs/options.md").write_text(describe_options(), encoding="utf-8")
    page = Path("docs/outputs.md").read_text(encoding="utf-8")
    Path("docs/names.md").write_text(describe_names(page), encoding="utf-8")
    Path("boutiques.json").write_text(json.dumps(describe_app(), indent=4) + "\n", encoding="utf-8")
