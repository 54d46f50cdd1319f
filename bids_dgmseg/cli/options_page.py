"""Page of all options, made from the parsers: ``python -m bids_dgmseg.cli.options_page > docs/options.md``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable

from bids_dgmseg.cli.bids_app import build_parser
from bids_dgmseg.cli.main import VERBS
from bids_dgmseg.cli.options import Verb, add_options

_APP_INTRODUCTION = """\
Options may be spelled with underscores (`--participant_label`), but not abbreviated.
Options of one level are rejected at the other.
`--no-masks`, `--no-viewer`, `--force` and the resources are accepted at both and have no effect at the group level.
Exit codes: [questions](faq.md#exit-codes)."""

_TOOLS_INTRODUCTION = """\
Tools for measurement, evaluation and training.
`dgmseg VERB --help` prints the options of a verb.
Exit codes: 0 done, 1 problems were found, 2 invalid options or files, 129 terminal closed, 130 interrupted."""

_CODE = re.compile(
    r"(?<![\w`\"/.-])("
    r"--[a-z]+(?:-[a-z]+)*(?: [a-z]+=\d+)?"  # options
    rf"|dgmseg (?:{'|'.join(VERBS)})"
    r"|\{\"[^}]*\}+|'[a-z]+ == [^']*'"  # JSON, conditions
    r"|(?:desc|label|seg|ses|sub)-\w*(?:-\w+)*(?![\w\[/_])"  # entities
    r"|[\w\[\]/*-]*_[\w\[\]/.-]*\w|\w+\.(?:html|tsv)|[A-Z]+/[a-z]+"  # files, columns
    r")(?![\w\"`])"
)
"""What is code within a description."""


def describe_options() -> str:
    """Return the page as Markdown."""
    return "\n\n".join(["# Options", *_describe_app(), *_describe_tools()]) + "\n"


def _describe_app() -> Iterable[str]:
    parser = build_parser()
    positional, general, *groups = parser._action_groups
    yield "## bids_dgmseg"
    yield f"```text\n{_usage('bids_dgmseg', parser._actions)}\n```"
    yield _mark_code(str(parser.description))
    yield _table(positional._group_actions, heading="Argument")
    yield _APP_INTRODUCTION
    for group in (*groups, general):
        title = "general" if group is general else str(group.title)
        yield f"### {title[0].upper()}{title[1:]}"
        yield _table(group._group_actions)


def _describe_tools() -> Iterable[str]:
    yield "## dgmseg"
    yield _TOOLS_INTRODUCTION
    rows = [["Command", "What it does"], ["---"] * 2]
    rows += [[f"`{_usage_of_verb(verb)}`", _mark_code(verb.help)] for verb in VERBS.values()]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _usage_of_verb(verb: Verb) -> str:
    """Return a verb with its arguments and required options."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, verb.options)
    return _usage(f"dgmseg {verb.name}", parser._actions).replace("|", r"\|")


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
    """Return a row per option with its meaning and, if any of them has one, its default."""
    rows = [[heading, "Meaning", "Default"], ["---"] * 3]
    for action in actions:
        meaning, default = split_default(str(action.help) % {"default": action.default, "prog": "bids_dgmseg"})
        name = _spell(action).replace(", -", "`, `-") if action.option_strings else action.metavar or action.dest
        rows.append([f"`{name}`", _mark_code(meaning), _mark_code(default)])
    if not any(default for _, _, default in rows[2:]):
        rows = [row[:2] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def split_default(text: str) -> tuple[str, str]:
    """Split the default off a description.

    >>> split_default("time limit per fold (default: none)")
    ('time limit per fold', 'none')
    >>> split_default("masks (label-CSF; default: those of the model)")
    ('masks (label-CSF)', 'those of the model')
    >>> split_default("column with the ages (default: age, or 'Age (years)')")
    ('column with the ages', "age, or 'Age (years)'")
    >>> split_default("process scans again")
    ('process scans again', '')
    """
    if match := re.fullmatch(r"(.*?)(?: \(|(; ))default: (.*)\)", text):
        return match[1] + (")" if match[2] else ""), match[3]
    return text, ""


def _mark_code(text: str) -> str:
    """Put options, names of files and columns in backquotes, for the cell of a table."""
    return _CODE.sub(r"`\1`", text).replace("|", r"\|")


if __name__ == "__main__":
    sys.stdout.write(describe_options())
