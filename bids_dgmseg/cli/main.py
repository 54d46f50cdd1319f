"""Command line of `dgmseg`: one `Verb` per command; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bids_dgmseg import __version__
from bids_dgmseg.cli import (
    Parser,
    Verb,
    add_options,
    verb_evaluate,
    verb_measure,
    verb_models,
    verb_slurm,
    verb_study,
    verb_train,
)
from bids_dgmseg.errors import run_command
from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.run.environment import ignore_current_folder, terminate_as_interrupt

MODULES = (verb_evaluate, verb_measure, verb_models, verb_slurm, verb_study, verb_train)

VERBS = {
    verb.name: verb
    for verb in sorted((verb for module in MODULES for verb in module.VERBS), key=lambda verb: verb.name)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``dgmseg COMMAND`` and return the exit code: 0 done, 1 the verb found a problem, else as in `errors`."""
    args = build_parser().parse_args(argv)
    verb: Verb = VERBS[args.verb]
    keep_freed_memory()
    with terminate_as_interrupt(), ignore_current_folder(leave=False):
        return run_command(f"dgmseg {verb.name}", lambda: verb.run(args), after_interrupt=verb.after_interrupt)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = Parser(
        prog="dgmseg",
        description="Evaluation, training, simulation and other tools of bids_dgmseg. Left is always the patient's "
        "left.",
        epilog="`dgmseg COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for verb in VERBS.values():
        description = f"{verb.help[0].upper()}{verb.help[1:]}."
        add_options(
            verbs.add_parser(verb.name, help=verb.help, description=description, allow_abbrev=False), verb.options
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
