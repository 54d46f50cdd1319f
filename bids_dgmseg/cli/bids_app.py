"""Command line of the BIDS App: arguments → `RunConfig` → one analysis level → exit code.

Nothing heavy is imported before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bids_dgmseg import __version__
from bids_dgmseg.cli.options import absolute_path, participant_label, positive_float, positive_int, session_label
from bids_dgmseg.config import (
    GroupAnalysis,
    Reconstruction,
    ReferenceRegion,
    Resources,
    RunConfig,
    RunControl,
    Segmentation,
    Selection,
)
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.models.registry import ALIASES, MODELS, get_model
from bids_dgmseg.resources import available_memory_gb, count_cpus

MAX_THREADS = 8
"""More threads do not make one scan faster."""

MEMORY_SHARE = 0.9

# --no-masks, --no-viewer, --force and the resources have no effect at the group level, and are accepted there.
PARTICIPANT_ONLY = (
    "--bids-filter-file",
    "--derivatives",
    "--weights",
    "--ensemble",
    "--label-map",
    "--reference",
    "--reference-structure",
    "--reference-mask",
    "--brain-mask",
    "--phase-sign",
)

GROUP_ONLY = (
    "--merge",
    "--site-column",
    "--group-column",
    "--control-filter",
    "--covariates",
    "--measures",
    "--evaluation",
    "--bootstrap",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the BIDS App.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0: all scans done. 1: some scans failed. 2: invalid options or dataset. 130: interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    advice = "; run the same command again (finished scans are kept)"
    return run_command("bids_dgmseg", lambda: _run(read_config(arguments)), after_interrupt=advice)


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
    options = parser.parse_args(_with_hyphens(argv))
    model = get_model(options.model).name if options.model else None
    _check_level(options, parser)
    if options.weights and not options.weights.exists():
        raise InputError(f"{options.weights}: no such folder; check --weights")
    nprocs = options.nprocs or count_cpus()
    return RunConfig(
        options.bids_dir,
        options.output_dir,
        options.analysis_level,
        Selection(
            _unique(options.participant_label),
            _unique(options.session_label),
            options.bids_filter_file,
            tuple(options.derivatives),
        ),
        Reconstruction(options.phase_sign, options.brain_mask),
        Segmentation(model, options.weights, options.ensemble, options.label_map, options.masks, options.viewer),
        ReferenceRegion(options.reference, options.reference_structure, options.reference_mask),
        GroupAnalysis(
            merge=tuple(options.merge),
            site_column=options.site_column,
            group_column=options.group_column,
            control_filter=options.control_filter,
            covariates=_unique(options.covariates),
            measures=_unique(options.measures) or GroupAnalysis.measures,
            evaluation=options.evaluation,
            bootstrap=options.bootstrap or 0,
        ),
        Resources(
            nprocs,
            min(options.omp_nthreads or MAX_THREADS, nprocs),
            options.mem_gb or max(0.1, round(MEMORY_SHARE * available_memory_gb(), 1)),
            options.device,
        ),
        RunControl(
            work_dir=options.work_dir,
            skip_bids_validation=options.skip_bids_validation,
            stop_on_first_crash=options.stop_on_first_crash,
            dry_run=options.dry_run,
            force=options.force,
            verbose=options.verbose,
        ),
    )


def _unique(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _check_level(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Reject options that would have no effect at this level although the user expects one."""
    level, other = options.analysis_level, "group" if options.analysis_level == "participant" else "participant"
    for option in GROUP_ONLY if level == "participant" else PARTICIPANT_ONLY:
        name = option.removeprefix("--").replace("-", "_")
        if getattr(options, name) != parser.get_default(name):
            raise InputError(f"{option} is only valid at the {other} level; omit it at the {level} level")


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = argparse.ArgumentParser(
        prog="bids_dgmseg",
        description="Segment the deep gray nuclei on quantitative susceptibility maps (_Chimap) and measure their "
        "volume and susceptibility. Sessions without a map get one reconstructed from multi-echo GRE (_MEGRE). Left "
        "is always the patient's left.",
        epilog="Exit codes: 0 all scans done, 1 some scans failed, 2 invalid options or dataset, 130 interrupted. "
        "Running the same command again processes only scans that are missing or have changed.",
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=absolute_path, help="root folder of the BIDS dataset, raw or derivative")
    parser.add_argument(
        "output_dir", type=absolute_path, help="folder for the results, such as BIDS_DIR/derivatives/bids_dgmseg"
    )
    parser.add_argument(
        "analysis_level",
        choices=("participant", "group"),
        help="participant: segment and measure each scan; group: tables and statistics of all scans",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="also print the log to the terminal")
    _add_selection(parser.add_argument_group("selection of scans"))
    _add_reconstruction(parser.add_argument_group("reconstruction from multi-echo GRE"))
    _add_segmentation(parser.add_argument_group("segmentation"))
    _add_reference(parser.add_argument_group("reference region"))
    _add_group(parser.add_argument_group("group level"))
    _add_resources(parser.add_argument_group("resources"))
    _add_control(parser.add_argument_group("run control"))
    return parser


def _add_selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--participant-label",
        nargs="+",
        action="extend",
        default=[],
        type=participant_label,
        metavar="LABEL",
        help="participants to process, with or without sub- (default: all)",
    )
    group.add_argument(
        "--session-label",
        nargs="+",
        action="extend",
        default=[],
        type=session_label,
        metavar="LABEL",
        help="sessions to process, with or without ses- (default: all)",
    )
    group.add_argument(
        "--bids-filter-file",
        type=absolute_path,
        metavar="FILE",
        help='JSON file that selects images by entities: maps under "chimap", echoes under "megre", such as '
        '{"chimap": {"acquisition": "x"}}; "scope" selects the dataset ("raw" or the name of a derivative)',
    )
    group.add_argument(
        "--derivatives",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        metavar="FOLDER",
        help="derivative datasets with chi maps, such as those of QSMxT, SEPIA or qsm-forward (default: all below "
        "BIDS_DIR/derivatives)",
    )


def _add_reconstruction(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--brain-mask",
        type=absolute_path,
        metavar="FOLDER",
        help="folder with brain masks on the grid of the echoes, named as in BIDS derivatives "
        "(sub-X/anat/sub-X_desc-brain_mask.nii.gz; default: a mask computed from the magnitude)",
    )
    group.add_argument(
        "--phase-sign",
        choices=("auto", "positive", "negative"),
        default="auto",
        help="whether phase increases (positive) or decreases with the field, which depends on the scanner "
        "(default: auto, so that veins and iron are positive)",
    )


def _add_segmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"one of {', '.join([*ALIASES, *MODELS])} (default: {ALIASES['default']}; at the group level: all models)",
    )
    group.add_argument(
        "--weights",
        type=absolute_path,
        metavar="FOLDER",
        help="use these weights instead of the model's own; for nnunet2step, an nnU-Net v2 model folder or a folder "
        "with two of them, cerebellum and dentate",
    )
    group.add_argument(
        "--ensemble",
        action="store_true",
        help="average the predictions of all checkpoints, and of each map and its mirror image (dgm16 always does the "
        "latter); takes twice as long and changes little; not available for nnunet2step",
    )
    group.add_argument(
        "--label-map",
        type=absolute_path,
        metavar="FILE",
        help="for nnunet2step: TSV with the columns label (name or number) and abbreviation, or JSON such as "
        '{"left dentate": "DN_L"}, that maps the labels of an nnU-Net to nuclei (default: match by name)',
    )
    group.add_argument(
        "--no-masks",
        dest="masks",
        action="store_false",
        help="do not write one binary mask per nucleus and hemisphere, and per region",
    )
    group.add_argument(
        "--no-viewer",
        dest="viewer",
        action="store_false",
        help="do not write the interactive viewer of each scan (1 to 3 MB per scan)",
    )


def _add_reference(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reference",
        choices=("none", "whole-brain", "csf", "structure"),
        default="none",
        help="region whose mean susceptibility is subtracted; tables have both raw and referenced values. csf: lateral "
        "ventricles (default: none, values relative to the reference region of the map)",
    )
    group.add_argument(
        "--reference-structure",
        metavar="NUCLEUS",
        help="nucleus for --reference structure: both hemispheres (CN) or one (CN_L)",
    )
    group.add_argument(
        "--reference-mask",
        type=absolute_path,
        metavar="FOLDER",
        help="folder with masks for --reference csf on the grid of the map, named as in BIDS derivatives "
        "(sub-X/anat/sub-X_label-CSF_mask.nii.gz; default: the ventricles segmented by the model)",
    )


def _add_group(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--merge",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        metavar="FOLDER",
        help="output folders of other sites to analyse together with OUTPUT_DIR, which may be new",
    )
    group.add_argument(
        "--site-column",
        metavar="NAME",
        help="column of participants.tsv or sessions.tsv with the site (default: site or site_id; otherwise the "
        "merged folders, or the scanner in the sidecars if there is only one folder)",
    )
    group.add_argument(
        "--group-column", metavar="NAME", help="column with the groups to compare (default: group or diagnosis)"
    )
    group.add_argument(
        "--control-filter",
        metavar="CONDITION",
        help="condition for healthy controls, such as 'group == \"HC\" and age > 40': susceptibility is adjusted for "
        "volume by their regression, and other participants are compared with them",
    )
    group.add_argument(
        "--covariates",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="columns that harmonization preserves and group comparisons adjust for, or none (default: age and sex; "
        "harmonization also preserves the group)",
    )
    group.add_argument(
        "--measures",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"columns of _stats.tsv to analyse (default: {' '.join(GroupAnalysis.measures)})",
    )
    group.add_argument(
        "--evaluation",
        type=absolute_path,
        metavar="FOLDER",
        help="output folder of dgmseg evaluate; age curves are also fitted to its reference segmentations",
    )
    group.add_argument(
        "--bootstrap",
        type=positive_int,
        metavar="N",
        help="number of bootstrap samples for the confidence limits of age curves (default: profile likelihood limits)",
    )


def _add_resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--nprocs",
        type=positive_int,
        metavar="N",
        help="number of CPUs for all steps together (default: all available to this process)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=positive_int,
        metavar="N",
        help=f"threads per step, at most --nprocs (default: --nprocs, at most {MAX_THREADS})",
    )
    group.add_argument(
        "--mem-gb",
        type=positive_float,
        metavar="GB",
        help=f"memory for all steps together, in GB (default: {100 * MEMORY_SHARE:.0f} %% of the available memory)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device for the networks (default: auto, a GPU if there is one)",
    )


def _add_control(group: argparse._ArgumentGroup) -> None:
    work_dir = default_work_dir()
    group.add_argument(
        "-w",
        "--work-dir",
        type=absolute_path,
        default=work_dir,
        metavar="FOLDER",
        help=f"folder for intermediate files (default: {str(work_dir).replace('%', '%%')})",
    )
    group.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="do not run the BIDS validator on BIDS_DIR (it is used if installed, and only warns)",
    )
    group.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop when a scan fails (default: process the others)"
    )
    group.add_argument("--dry-run", action="store_true", help="list what would be done, without writing anything")
    group.add_argument("--force", action="store_true", help="process scans again whose results are up to date")


def default_work_dir() -> Path:
    """Return a folder below the system's temporary folder that is not shared between users."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()).absolute() / f"bids_dgmseg-{user}"


def _with_hyphens(argv: Sequence[str]) -> list[str]:
    """Accept ``--participant_label``, the spelling of the first BIDS Apps."""

    def spell(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if name.startswith("--") else argument

    return [spell(argument) for argument in argv]


def _run(config: RunConfig) -> int:
    if config.level == "group":
        from bids_dgmseg.workflow.group import run_group

        return run_group(config)
    from bids_dgmseg.workflow.participant import run_participant

    return run_participant(config)
