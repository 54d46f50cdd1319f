"""Command line of `dgmseg`, one module per verb.

A verb is a module of this package with ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args)``, which returns
the exit code, and optionally ``AFTER_INTERRUPT``, a hint for interrupted runs. Nothing heavy is imported before a verb
runs.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from bids_dgmseg import __version__
from bids_dgmseg.errors import run_command
from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.workflow.environment import terminate_as_interrupt

VERBS = (
    "demo",
    "evaluate",
    "finetune",
    "models",
    "simulate",
    "template",
    "train",
    "train-nnunet",
    "train-simulated",
)
"""Modules of this package, with hyphens for underscores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``dgmseg VERB``.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0: done. 1: the verb found a problem. 2: invalid options or files. 130: interrupted.
    """
    args = build_parser().parse_args(argv)
    keep_freed_memory()
    with terminate_as_interrupt():
        return run_command(f"dgmseg {args.verb}", lambda: int(args.run(args)), after_interrupt=args.after_interrupt)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="dgmseg",
        description="Evaluation, training, simulation and other tools of bids_dgmseg. Left is always the patient's "
        "left.",
        epilog="`dgmseg VERB --help` shows the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = importlib.import_module(f"bids_dgmseg.cli.{name.replace('-', '_')}")
        description = f"{verb.HELP[0].upper()}{verb.HELP[1:]}."
        subparser = verbs.add_parser(name, help=verb.HELP, description=description, allow_abbrev=False)
        verb.add_arguments(subparser)
        subparser.set_defaults(run=verb.run, after_interrupt=getattr(verb, "AFTER_INTERRUPT", ""))
    return parser
