"""Page of all options, made from the parsers: ``python -m bids_dgmseg.cli.options_page > docs/options.md``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping

from bids_dgmseg.cli.bids_app import build_parser
from bids_dgmseg.cli.cluster import APP_OPTIONS
from bids_dgmseg.cli.main import VERBS
from bids_dgmseg.cli.options import Verb, add_options

_APP_LINKS: Mapping[str, str] = {
    "--bids-filter-file": "[maps](how-to/inputs.md#select-among-several-maps-of-a-scan), "
    "[echoes](how-to/inputs.md#select-among-echoes)",
    "--chi": "[how to](how-to/inputs.md#select-among-several-maps-of-a-scan)",
    "--brain-mask": "[network](models.md#brain-mask)",
    "--phase-sign": "[methods](methods.md#reconstruct)",
    "--unwrapping": "[methods](methods.md#reconstruct)",
    "--background": "[methods](methods.md#reconstruct)",
    "--inversion": "[methods](methods.md#reconstruct)",
    "--regularization": "[methods](methods.md#reconstruct)",
    "--erosion-mm": "[methods](methods.md#reconstruct)",
    "--save-fields": "[outputs](outputs.md)",
    "--accept-implausible-maps": "[methods](methods.md#reconstruct)",
    "--model": "[models](models.md)",
    "--weights": "[how to](how-to/nnunet.md)",
    "--ensemble": "[methods](methods.md#segment)",
    "--bilateral": "[outputs](outputs.md#statstsv)",
    "--output-space": "[how to](how-to/standard-space.md)",
    "--reference": "[methods](methods.md#reference)",
    "--merge": "[how to](how-to/multi-site.md)",
    "--age-column": "[similar names](how-to/multi-site.md#describe-the-participants)",
    "--control-filter": "[conditions](how-to/multi-site.md#select-the-controls)",
    "--combat-age": "[how to](how-to/multi-site.md#harmonize)",
    "--combat-longitudinal": "[how to](how-to/harmonization.md#repeated-scans)",
    "--harmonization-save": "[how to](how-to/harmonization.md)",
    "--harmonization-apply": "[how to](how-to/harmonization.md)",
    "--norms-save": "[how to](how-to/norms.md)",
    "--norms": "[how to](how-to/norms.md)",
    "--evaluation": "[how to](how-to/evaluate.md#age-curves)",
    "--include-failed": "[methods](methods.md#cohorts)",
    "--correlate": "[how to](how-to/clinical.md)",
    "--qc": "[how to](how-to/review.md)",
    "--mem-gb": "[how to](how-to/running.md#cpus-and-memory)",
    "--device": "[how to](how-to/running.md#gpu)",
}
"""What to read about options of the app."""

_GROUP_NOTES: Mapping[str, str] = {
    "reconstruction from multi-echo GRE": "Only for sessions with echoes and without a map "
    "([how to](how-to/inputs.md#reconstruct-chi-maps-from-multi-echo-gre)).",
}

_VERB_NOTES: Mapping[str, str] = {
    "corrections": "[How to correct labels by hand](how-to/corrections.md).",
    "cross-validate": "`OUT` gets `models/fold-N`, the derivative datasets `fold-N` and `evaluation`. `--minutes` is "
    "the limit of each fold. Exit code 1 if some scans could not be segmented or compared. "
    "[How to cross-validate](how-to/train.md#cross-validation).",
    "demo": "[The tutorial](tutorial.md) uses it.",
    "review": "Ends with Ctrl+C. [How to review](how-to/review.md).",
    "evaluate": "Exit code 1 if some scans could not be compared. [How to evaluate](how-to/evaluate.md).",
    "finetune": "[How to fine-tune](how-to/fine-tune.md).",
    "measure": "Maps on other grids are sampled at the voxels of the labels. [How to measure any map in any "
    "labels](how-to/measure.md).",
    "models": "[Models](models.md).",
    "simulate": "The true labels and masks of the cerebellum are in `DIR/derivatives/truth`. Different seeds below "
    "29,000 give different maps, none of which occurs in training with a seed below 131. [Simulation](simulation.md).",
    "slurm": "[How to run on a cluster](how-to/cluster.md). The [options of bids_dgmseg](#bids_dgmseg) are accepted, "
    "too, and passed to the level that they belong to, except those that the scripts set: number of CPUs, memory, "
    "validation.",
    "status": "Exit code 1 unless all are done. [How to read it](how-to/cluster.md#status).",
    "template": "[Where the files are found](evidence/training.md#reproduce-the-weights).",
    "train": "[How to train](how-to/train.md).",
    "train-nnunet": "20 % of the participants are the test set. [How to train both "
    "steps](how-to/nnunet.md#train-both-steps).",
    "train-simulated": "On a GPU the maps are simulated there. "
    "[How to train on simulated maps](how-to/weights.md#train-on-simulated-maps).",
    "view": "[How to look at labels in any viewer](how-to/viewers.md).",
}

_APP_INTRODUCTION = """\
Options may be spelled with underscores (`--participant_label`), but not abbreviated.
Options of one level are rejected at the other.
`--no-masks`, `--no-viewer`, `--force` and the resources are accepted at both and have no effect at the group level.
Exit codes: [messages](messages.md#exit-codes)."""

_TOOLS_INTRODUCTION = """\
Tools for evaluation, training and simulation.
`dgmseg --version` prints the version, `dgmseg VERB --help` the options of a verb.
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
    yield _usage("bids_dgmseg", parser._actions)
    yield _mark_code(str(parser.description))
    yield _table(positional._group_actions, heading="Argument")
    yield _APP_INTRODUCTION
    for group in (*groups, general):
        title = "general" if group is general else str(group.title)
        yield f"### {title[0].upper()}{title[1:]}"
        if title in _GROUP_NOTES:
            yield _GROUP_NOTES[title]
        yield _table(group._group_actions, links=_APP_LINKS)


def _describe_tools() -> Iterable[str]:
    yield "## dgmseg"
    yield _TOOLS_INTRODUCTION
    for verb in VERBS.values():
        actions = _verb_actions(verb)
        yield f"### dgmseg {verb.name}"
        yield _usage(f"dgmseg {verb.name}", actions)
        yield f"{_mark_code(verb.help[0].upper() + verb.help[1:])}. {_VERB_NOTES[verb.name]}"
        yield _table(actions, heading="Argument or option")


def _verb_actions(verb: Verb) -> list[argparse.Action]:
    """Return the arguments and options of a verb, without those of the app that it passes on."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, [one for one in verb.options if one not in APP_OPTIONS])
    return parser._actions


def _usage(program: str, actions: Iterable[argparse.Action]) -> str:
    """Return the arguments and required options of a command in a block of code."""
    words = [_spell(action) for action in actions if action.required or not action.option_strings]
    options = ["[options]"] if any(not action.required and action.option_strings for action in actions) else []
    return "\n".join(["```text", " ".join([program, *words, *options]), "```"])


def _spell(action: argparse.Action) -> str:
    """Return an argument or option with its values."""
    values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else str(action.metavar or action.dest)
    values += " …" if action.nargs == "+" else ""
    if not action.option_strings:
        return f"[{values}]" if action.nargs == "?" else values
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {values}")


def _table(
    actions: Iterable[argparse.Action], *, heading: str = "Option", links: Mapping[str, str] | None = None
) -> str:
    """Return a row per option with its meaning and, if any of them has one, its default."""
    rows = [[heading, "Meaning", "Default"], ["---"] * 3]
    for action in actions:
        meaning, default = split_default(str(action.help) % {"default": action.default, "prog": "bids_dgmseg"})
        link = next((links[word] for word in action.option_strings if word in links), "") if links else ""
        name = _spell(action).replace(", -", "`, `-") if action.option_strings else action.metavar or action.dest
        rows.append([f"`{name}`", _mark_code(meaning) + (f" ({link})" if link else ""), _mark_code(default)])
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
