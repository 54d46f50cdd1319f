"""Command line of the BIDS App: arguments → `RunConfig` → one analysis level → exit code.

Nothing heavy is imported before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, get_args

from bids_dgmseg import __version__
from bids_dgmseg.arguments import Level, absolute_path, add_record, build_record, flag_of, key_of, level_of
from bids_dgmseg.cli import Parser
from bids_dgmseg.config import Resources, RunConfig
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.resources import available_memory_gb, count_cpus
from bids_dgmseg.run.environment import ignore_current_folder, terminate_as_interrupt

LEVELS = get_args(Level)

CONFIG_PARTS = [part for part in fields(RunConfig) if "title" in part.metadata]
"""Records of options, as fields of the configuration."""

MEMORY_SHARE = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the BIDS App and return the exit code; the default arguments are those of the process."""

    def run() -> int:
        config = read_config(sys.argv[1:] if argv is None else argv)
        with ignore_current_folder():
            if config.level == "group":
                from bids_dgmseg.run.group import run_group

                return run_group(config)
            from bids_dgmseg.run.participant import run_participant

            return run_participant(config)

    with terminate_as_interrupt():
        return run_command("bids_dgmseg", run, after_interrupt="; rerun the same command (completed scans are kept)")


def read_config(argv: Sequence[str]) -> RunConfig:
    """Parse the arguments.

    Raises
    ------
    InputError
        If the model or the folder of weights does not exist, or an option belongs to the other level.
    SystemExit
        If argparse rejects the arguments (2), or after ``--help`` or ``--version`` (0).
    """
    arguments = [spell_with_hyphens(argument) for argument in argv]
    level = next((level for level in LEVELS if level in arguments), None)
    values = vars(build_parser([level]).parse_args(arguments))
    _reject_useless(values)
    if values.get("model"):
        values["model"] = get_model(values["model"]).name
    nprocs = values.get("nprocs") or count_cpus()
    resources = {
        "mem_gb": max(0.1, round(MEMORY_SHARE * available_memory_gb(), 1)),
        **values,
        "nprocs": nprocs,
        "omp_nthreads": min(values.get("omp_nthreads", 1), nprocs),
    }
    parts = {part.name: build_record(part.metadata["record"], values) for part in CONFIG_PARTS}
    parts["resources"] = build_record(Resources, resources)
    return RunConfig(
        bids_dir=values["bids_dir"], output_dir=values["output_dir"], level=values["analysis_level"], **parts
    )


def list_options() -> list[tuple[Level | None, Field[Any]]]:
    """Return all options as fields of their records, with the only level at which they are accepted (None for both)."""
    return [(level_of(part, item), item) for part in CONFIG_PARTS for item in fields(part.metadata["record"])]


def _reject_useless(values: Mapping[str, Any]) -> None:
    """Raise an `InputError` for options that would have no effect although the user expects one."""
    level = values["analysis_level"]
    for other, item in list_options():
        if key_of(item) in values and other not in (None, level):
            raise InputError(f"{flag_of(item)} is only valid at the {other} level; omit it at the {level} level")
    if (weights := values.get("weights")) and not weights.exists():
        raise InputError(f"{weights}: no such folder; check --weights")
    if "norms_save" in values and "norms" in values:
        raise InputError("--norms-save has no effect: --norms applies saved norms; omit it")


def spell_with_hyphens(argument: str) -> str:
    """Accept ``--participant_label``, the spelling of the first BIDS Apps."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def build_parser(shown: Collection[Level | None] = (None, *LEVELS)) -> argparse.ArgumentParser:
    """Build the argument parser, whose help shows the options of these levels; None are those of both."""
    further = "Options of both levels: bids_dgmseg --help."
    if None in shown:
        further = "Run bids_dgmseg BIDS_DIR OUTPUT_DIR participant --help (or group --help) for the options of a level."
    parser = Parser(
        prog="bids_dgmseg",
        description="Segment the deep gray nuclei on quantitative susceptibility maps (_Chimap) and measure their "
        "volume and susceptibility. Sessions without a map get one reconstructed from gradient echoes (_MEGRE, "
        "_T2starw, _GRE). Left is always the patient's left.",
        epilog=f"{further} Exit codes: 0 all scans done, 1 some scans failed, 2 invalid options or dataset, 129 "
        "terminal closed, 130 interrupted. The same command again processes only what is missing or has changed.",
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=absolute_path, help="root folder of the BIDS dataset, raw or derivative")
    parser.add_argument(
        "output_dir",
        type=absolute_path,
        help="folder for the results, such as BIDS_DIR/derivatives/bids_dgmseg; created if it does not exist",
    )
    parser.add_argument(
        "analysis_level",
        choices=LEVELS,
        help="participant: segment and measure each scan; group: tables and statistics of all scans in OUTPUT_DIR, "
        "merged with participants.tsv and sessions.tsv of BIDS_DIR",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for part in CONFIG_PARTS:
        add_record(parser.add_argument_group(part.metadata["title"]), part, shown=shown)
    return parser
