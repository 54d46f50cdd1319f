"""The command line of the BIDS App: arguments → `Settings` → one level → exit code.

Nothing heavy is imported before the arguments are read.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bids_dgmseg import __version__
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError, end_well
from bids_dgmseg.models.registry import ALIASES, MODELS, get_model
from bids_dgmseg.resources import available_memory_gb, count_cpus

MOST_THREADS = 8
"""More threads for one scan do not make it faster."""

MEMORY_SHARE = 0.9

_PARTICIPANT_ONLY = (
    "--bids-filter-file",
    "--derivatives",
    "--weights",
    "--quality",
    "--label-map",
    "--reference",
    "--reference-structure",
    "--reference-mask",
    "--brain-mask",
    "--phase-sign",
)
"""Options that choose maps or make other values of them: whoever gives them to the group level expects a change."""

_GROUP_ONLY = (
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
        0: all done. 1: some scans failed. 2: the options or the dataset do not allow a run. 130: interrupted.
    """
    given = sys.argv[1:] if argv is None else argv
    kept = "; run the same command again (finished scans are kept)"
    return end_well("bids_dgmseg", lambda: _run(read_settings(given)), after_interrupt=kept)


def read_settings(argv: Sequence[str]) -> Settings:
    """Read the arguments.

    Raises
    ------
    InputError
        If there is no such model or no such folder of weights.
    SystemExit
        If argparse refuses the arguments (2), or ``--help`` or ``--version`` was all that was asked for (0).
    """
    parser = build_parser()
    options = parser.parse_args(_with_hyphens(argv))
    model = get_model(options.model or "default")
    _refuse_idle(options, parser)
    if options.weights and not options.weights.exists():
        raise InputError(f"{options.weights}: no such folder; check --weights")
    nprocs = options.nprocs or count_cpus()
    return Settings(
        **{
            **vars(options),
            "model": model.name,
            "model_given": options.model is not None,
            "participant_label": tuple(dict.fromkeys(options.participant_label)),
            "session_label": tuple(dict.fromkeys(options.session_label)),
            "derivatives": tuple(options.derivatives),
            "merge": tuple(options.merge),
            "covariates": tuple(dict.fromkeys(options.covariates)),
            "measures": tuple(dict.fromkeys(options.measures)) or Settings.measures,
            "bootstrap": options.bootstrap or 0,
            "nprocs": nprocs,
            "omp_nthreads": min(options.omp_nthreads or MOST_THREADS, nprocs),
            "mem_gb": options.mem_gb or max(0.1, round(MEMORY_SHARE * available_memory_gb(), 1)),
        }
    )


def _refuse_idle(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would change nothing at this level."""
    idle, why = {
        "participant": (_GROUP_ONLY, "group level, which comes afterwards"),
        "group": (_PARTICIPANT_ONLY, "participant level, the group level reads its results as they are"),
    }[options.analysis_level]
    for option in idle:
        name = option.removeprefix("--").replace("-", "_")
        if getattr(options, name) != parser.get_default(name):
            raise InputError(f"{option}: is an option of the {why}; leave it out")


def build_parser() -> argparse.ArgumentParser:
    """Declare the options; each is the field of `Settings` of that name."""
    parser = argparse.ArgumentParser(
        prog="bids_dgmseg",
        description="Segment the deep nuclei of the brain on quantitative susceptibility maps (_Chimap), or on maps "
        "made of phase and magnitude (_MEGRE) where there are none, and measure them. Left is always the patient's "
        "left.",
        epilog="Exit code: 0 all scans done, 1 some failed (they are named), 2 wrong options or dataset. "
        "Running the same command again does only what is missing or has changed.",
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=absolute_path, help="root folder of a BIDS dataset, raw or derivative")
    parser.add_argument(
        "output_dir", type=absolute_path, help="folder for the results, such as BIDS_DIR/derivatives/bids_dgmseg"
    )
    parser.add_argument(
        "analysis_level",
        choices=("participant", "group"),
        help="participant: segment and measure each scan; group: gather the measures of all scans in tables",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="show the log of the steps too")
    _add_selection(parser.add_argument_group("which scans"))
    _add_reconstruction(parser.add_argument_group("how maps are made of echoes"))
    _add_model(parser.add_argument_group("how they are segmented"))
    _add_reference(parser.add_argument_group("what susceptibilities are relative to"))
    _add_group(parser.add_argument_group("the group level"))
    _add_resources(parser.add_argument_group("resources"))
    _add_run(parser.add_argument_group("the run"))
    return parser


def _add_selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--participant-label",
        nargs="+",
        action="extend",
        default=[],
        type=participant_label,
        metavar="LABEL",
        help="only these participants, with or without sub-; at both levels (default: all)",
    )
    group.add_argument(
        "--session-label",
        nargs="+",
        action="extend",
        default=[],
        type=session_label,
        metavar="LABEL",
        help="only these sessions, with or without ses-; at both levels (default: all)",
    )
    group.add_argument(
        "--bids-filter-file",
        type=absolute_path,
        metavar="FILE",
        help='JSON that selects maps by entities, such as {"chimap": {"acquisition": "x"}}, and echoes '
        'under "megre"; "scope" chooses the dataset ("raw" or a derivative\'s folder name)',
    )
    group.add_argument(
        "--derivatives",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        metavar="FOLDER",
        help="derivative datasets to take chi maps from besides BIDS_DIR, such as those of QSMxT, "
        "SEPIA or qsm-forward (default: all below BIDS_DIR/derivatives)",
    )


def _add_reconstruction(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--brain-mask",
        type=absolute_path,
        metavar="FOLDER",
        help="folder with your masks of the brain, named as in BIDS derivatives "
        "(sub-X/anat/sub-X_desc-brain_mask.nii.gz), on the grid of the echoes (default: the tissue that "
        "the magnitude shows)",
    )
    group.add_argument(
        "--phase-sign",
        choices=("auto", "positive", "negative"),
        default="auto",
        help="whether phase grows (positive) or falls with the field: scanners differ (default: auto, "
        "so that veins and iron are positive)",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    names = ", ".join([*ALIASES, *MODELS])
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"one of: {names} (default: {ALIASES['default']}; group: only results of this model, default: of all)",
    )
    group.add_argument(
        "--weights",
        type=absolute_path,
        metavar="FOLDER",
        help="weights in place of the model's own (default: those that ship with it); for nnunet2step "
        "an nnU-Net v2 model folder, or one with two of them, cerebellum and dentate",
    )
    group.add_argument(
        "--quality",
        action="store_true",
        help="average over two checkpoints where the weights have them, and for every model over each "
        "map and its mirror image, as dgm16 does anyway: twice the computing; does little for dgm16 "
        "(not for nnunet2step)",
    )
    group.add_argument(
        "--label-map",
        type=absolute_path,
        metavar="FILE",
        help="nnunet2step: which label of the folder is which nucleus, as a TSV with the columns label "
        '(name or number) and abbreviation, or as JSON such as {"left dentate": "DN_L"} (default: '
        "labels are matched by name)",
    )
    group.add_argument(
        "--no-masks",
        dest="masks",
        action="store_false",
        help="do not write one binary mask a nucleus and side, or region (fewer files)",
    )


def _add_group(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--merge",
        nargs="+",
        action="extend",
        default=[],
        type=absolute_path,
        metavar="FOLDER",
        help="output folders of other sites, whose scans join those of OUTPUT_DIR (which may be new)",
    )
    group.add_argument(
        "--site-column",
        metavar="NAME",
        help="column of participants.tsv or sessions.tsv with the sites (default: site or site_id; else "
        "with several folders each is a site, with one the scanner in the maps' sidecars)",
    )
    group.add_argument(
        "--group-column", metavar="NAME", help="column with the groups to compare (default: group or diagnosis)"
    )
    group.add_argument(
        "--control-filter",
        metavar="CONDITION",
        help="who is a healthy control, such as 'group == \"HC\" and age > 40': susceptibility is "
        "adjusted for size by their regression, and others are compared with their group",
    )
    group.add_argument(
        "--covariates",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="columns that harmonizing keeps and group comparison adjusts for; none for none (default: "
        "age and sex; harmonizing keeps the group too)",
    )
    group.add_argument(
        "--measures",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"columns of _stats.tsv that the statistics are made of (default: {' '.join(Settings.measures)})",
    )
    group.add_argument(
        "--evaluation",
        type=absolute_path,
        metavar="FOLDER",
        help="folder of dgmseg evaluate: ageing is fitted to its reference labels too",
    )
    group.add_argument(
        "--bootstrap",
        type=positive_count,
        metavar="N",
        help="refits to resampled participants for the limits of ageing curves (default: limits by profile)",
    )


def _add_reference(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reference",
        choices=("none", "whole-brain", "csf", "structure"),
        default="none",
        help="region whose mean is subtracted; the table has raw and referenced values. csf: lateral "
        "ventricles (default: none, the map's own reference)",
    )
    group.add_argument(
        "--reference-structure",
        metavar="NUCLEUS",
        help="with --reference structure: which, both sides (CN) or one (CN_L)",
    )
    group.add_argument(
        "--reference-mask",
        type=absolute_path,
        metavar="FOLDER",
        help="with --reference csf: folder with your masks, named as in BIDS derivatives "
        "(sub-X/anat/sub-X_label-CSF_mask.nii.gz), on the grid of the map (default: the ventricles "
        "that the model labels)",
    )


def _add_resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--nprocs",
        type=positive_count,
        metavar="N",
        help="processors all steps together may use (default: all that this process may use)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=positive_count,
        metavar="N",
        help=f"threads of one step, at most --nprocs (default: --nprocs, but at most {MOST_THREADS})",
    )
    group.add_argument(
        "--mem-gb",
        type=positive_gb,
        metavar="GB",
        help=f"memory all steps together may use, in GB (default: {100 * MEMORY_SHARE:.0f} %% of what is available)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the networks run (default: auto, a GPU where there is one)",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    work_dir = default_work_dir()
    group.add_argument(
        "-w",
        "--work-dir",
        type=absolute_path,
        default=work_dir,
        metavar="FOLDER",
        help=f"folder for intermediate files (default: {_escape(work_dir)})",
    )
    group.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="do not run the BIDS validator on BIDS_DIR (it only warns, and only where it is installed)",
    )
    group.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop when a scan fails (default: go on with the others)"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="list the scans (group: the folders) and what would be done, and stop"
    )
    group.add_argument("--force", action="store_true", help="do scans again that are done and unchanged")


def absolute_path(text: str) -> Path:
    """Read a path and make it absolute, since steps run in folders of their own."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(os.path.normpath(Path(text).expanduser().absolute()))


def positive_count(text: str) -> int:
    """Read a whole number from 1."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")


def positive_gb(text: str) -> float:
    """Read a size in gigabytes, such as ``8`` or ``1.5``."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of gigabytes")


def participant_label(text: str) -> str:
    """Read the label of a participant.

    >>> participant_label("sub-01"), participant_label("01")
    ('01', '01')
    """
    return _bare_label(text, "sub-")


def session_label(text: str) -> str:
    """Read the label of a session.

    >>> session_label("ses-1"), session_label("1")
    ('1', '1')
    """
    return _bare_label(text, "ses-")


def _bare_label(text: str, prefix: str) -> str:
    bare = text.removeprefix(prefix)
    if re.fullmatch(r"[0-9a-zA-Z+]+", bare):
        return bare
    raise argparse.ArgumentTypeError(f"{text!r} is not a label: letters and digits, with or without {prefix}")


def default_work_dir() -> Path:
    """Name a folder in the system's temporary folder that users of one machine do not share; never in HOME."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()).absolute() / f"bids_dgmseg-{user}"


def _escape(path: Path) -> str:
    """Write a path so that argparse's help keeps its percent signs."""
    return str(path).replace("%", "%%")


def _with_hyphens(argv: Sequence[str]) -> list[str]:
    """Accept ``--participant_label``, as the first BIDS Apps spelled it."""

    def spell(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if name.startswith("--") else argument

    return [spell(argument) for argument in argv]


def _run(settings: Settings) -> int:
    if settings.analysis_level == "group":
        from bids_dgmseg.workflow.group import run_group

        return run_group(settings)
    from bids_dgmseg.workflow.participant import run_participant

    return run_participant(settings)
