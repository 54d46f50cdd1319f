"""Command line of the BIDS App: arguments → `RunConfig` → one analysis level → exit code.

Nothing heavy is imported before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from bids_dgmseg import __version__
from bids_dgmseg.cli.bids_app_options import GROUP_ONLY, MEMORY_SHARE, OPTIONS, PARTICIPANT_ONLY
from bids_dgmseg.cli.options import absolute_path, add_options
from bids_dgmseg.config import (
    GroupAnalysis,
    Measurement,
    ReconstructionOptions,
    ReferenceRegion,
    Resources,
    RunConfig,
    RunControl,
    Segmentation,
    Selection,
)
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.resources import available_memory_gb, count_cpus
from bids_dgmseg.run.environment import ignore_current_folder
from bids_dgmseg.run.signals import terminate_as_interrupt

_Record = TypeVar("_Record")


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
        return run_command("bids_dgmseg", run, after_interrupt="; run the same command again (finished scans are kept)")


def read_config(argv: Sequence[str]) -> RunConfig:
    """Parse the arguments.

    Raises
    ------
    InputError
        If the model or the folder of weights does not exist, or an option belongs to the other level.
    SystemExit
        If argparse rejects the arguments (2), or after ``--help`` or ``--version`` (0).
    """
    parser = build_parser()
    options = parser.parse_args([spell_with_hyphens(argument) for argument in argv])
    model = get_model(options.model).name if options.model else None
    _reject_useless(parser, options)
    nprocs = options.nprocs or count_cpus()
    return RunConfig(
        bids_dir=options.bids_dir,
        output_dir=options.output_dir,
        level=options.analysis_level,
        selection=_record(
            Selection,
            options,
            participants=unique(options.participant_label),
            sessions=unique(options.session_label),
            filter_file=options.bids_filter_file,
            derivatives=tuple(options.derivatives),
            chi=unique(options.chi),
        ),
        reconstruction=_record(
            ReconstructionOptions,
            options,
            brain_masks=options.brain_mask,
            accept_implausible=options.accept_implausible_maps,
        ),
        segmentation=_record(Segmentation, options, model=model, output_space=options.output_space or ""),
        reference=ReferenceRegion(
            kind=options.reference, structure=options.reference_structure, masks=options.reference_mask
        ),
        measurement=Measurement(sample=unique(options.sample), exclude_masks=options.exclude_mask),
        group=_record(
            GroupAnalysis,
            options,
            merge=tuple(options.merge),
            covariates=unique(options.covariates),
            measures=unique(options.measures) or GroupAnalysis.measures,
            bootstrap=options.bootstrap or 0,
            correlate=unique(options.correlate),
            qc=tuple(options.qc),
        ),
        resources=Resources(
            nprocs=nprocs,
            omp_nthreads=min(options.omp_nthreads or 1, nprocs),
            mem_gb=options.mem_gb or max(0.1, round(MEMORY_SHARE * available_memory_gb(), 1)),
            device=options.device,
        ),
        control=_record(RunControl, options),
    )


def _reject_useless(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raise an `InputError` for options that would have no effect although the user expects one."""
    level = options.analysis_level
    for name in GROUP_ONLY if level == "participant" else PARTICIPANT_ONLY:
        key = name.removeprefix("--").replace("-", "_")
        if getattr(options, key) != parser.get_default(key):
            other = "group" if level == "participant" else "participant"
            raise InputError(f"{name} is only valid at the {other} level; omit it at the {level} level")
    if options.weights and not options.weights.exists():
        raise InputError(f"{options.weights}: no such folder; check --weights")
    if options.regularization and options.inversion == "ilsqr":
        raise InputError(f"--regularization: --inversion {options.inversion} has no weight; omit it")
    for useless, because, problem in (
        ("combat_longitudinal", options.harmonization_apply, "--harmonization-apply applies a saved fit"),
        ("combat_age", options.harmonization_apply, "--harmonization-apply applies a saved fit"),
        ("output_space_warp", not options.output_space, "it is for --output-space"),
        ("norms_save", options.norms, "--norms applies saved norms"),
    ):
        if because and getattr(options, useless) != parser.get_default(useless):
            raise InputError(f"--{useless.replace('_', '-')} has no effect: {problem}; omit it")


def _record(kind: type[_Record], options: argparse.Namespace, **values: Any) -> _Record:
    """Fill a record with the options that are named like its fields, except those with other values."""
    names = [field.name for field in fields(kind) if hasattr(options, field.name)]  # type: ignore[arg-type]
    return kind(**{**{name: getattr(options, name) for name in names}, **values})


def spell_with_hyphens(argument: str) -> str:
    """Accept ``--participant_label``, the spelling of the first BIDS Apps."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def unique(values: Sequence[str]) -> tuple[str, ...]:
    """Drop duplicates."""
    return tuple(dict.fromkeys(values))


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = argparse.ArgumentParser(
        prog="bids_dgmseg",
        description="Segment the deep gray nuclei on quantitative susceptibility maps (_Chimap) and measure their "
        "volume and susceptibility. Sessions without a map get one reconstructed from gradient echoes (_MEGRE, "
        "_T2starw). Left is always the patient's left.",
        epilog="Exit codes: 0 all scans done, 1 some scans failed, 2 invalid options or dataset, 129 terminal "
        "closed, 130 interrupted. Running the same command again processes only scans that are missing or have "
        "changed.",
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
        choices=("participant", "group"),
        help="participant: segment and measure each scan; group: tables and statistics of all scans in OUTPUT_DIR, "
        "joined with participants.tsv and sessions.tsv of BIDS_DIR",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="also print the log to the terminal (default: log file only)"
    )
    for title, options in OPTIONS.items():
        add_options(parser.add_argument_group(title), options)
    return parser
