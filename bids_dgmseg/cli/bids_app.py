"""Command line of the BIDS App: arguments → `RunConfig` → one analysis level → exit code.

Nothing heavy is imported before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from bids_dgmseg import __version__
from bids_dgmseg.cli.options import (
    absolute_path,
    add_options,
    option,
    participant_label,
    positive_float,
    positive_int,
    session_label,
)
from bids_dgmseg.config import (
    Background,
    GroupAnalysis,
    Inversion,
    ReconstructionOptions,
    ReferenceRegion,
    Resources,
    RunConfig,
    RunControl,
    Segmentation,
    Selection,
    Unwrapping,
)
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.models.registry import ALIASES, MODELS, get_model
from bids_dgmseg.resources import available_memory_gb, count_cpus
from bids_dgmseg.workflow.environment import ignore_current_folder, terminate_as_interrupt

MEMORY_SHARE = 0.9

# --no-masks, --no-viewer, --force and the resources have no effect at the group level, and are accepted there.
PARTICIPANT_ONLY = (
    "--bids-filter-file",
    "--derivatives",
    "--weights",
    "--ensemble",
    "--label-map",
    "--bilateral",
    "--reference",
    "--reference-structure",
    "--reference-mask",
    "--brain-mask",
    "--phase-sign",
    "--unwrapping",
    "--background",
    "--inversion",
    "--accept-implausible-maps",
    "--nipype-plugin-file",
)

OPTIONS = {
    "selection of scans": (
        option(
            "--participant-label LABEL ...",
            "participants to process, with or without sub- (default: all)",
            participant_label,
        ),
        option("--session-label LABEL ...", "sessions to process, with or without ses- (default: all)", session_label),
        option(
            "--bids-filter-file FILE",
            'JSON file that selects images by entities: maps under "chimap", echoes under "megre", such as '
            '{"chimap": {"acquisition": "x"}}; "scope" selects the dataset ("raw" or the name of a derivative)',
            absolute_path,
        ),
        option(
            "--derivatives FOLDER ...",
            "derivative datasets with chi maps, such as those of QSMxT, SEPIA or qsm-forward (default: all below "
            "BIDS_DIR/derivatives)",
            absolute_path,
        ),
    ),
    "reconstruction from multi-echo GRE": (
        option(
            "--brain-mask FOLDER",
            "folder with brain masks on the grid of the echoes, named as in BIDS derivatives "
            "(sub-X/anat/sub-X_desc-brain_mask.nii.gz; default: found in the magnitude by a network)",
            absolute_path,
        ),
        option(
            "--phase-sign",
            "whether phase increases (positive) or decreases with the field (default: auto, by the shape of the head)",
            choices=("auto", "positive", "negative"),
            default="auto",
        ),
        option(
            "--unwrapping",
            "phase unwrapping: a region grows to its most coherent neighbours, most reliable voxels first, or by the "
            "Laplacian, for poor phase (default: region-growing)",
            choices=get_args(Unwrapping),
            default=ReconstructionOptions.unwrapping,
        ),
        option(
            "--background",
            "method that removes the field of sources outside the brain: projection onto dipole fields, V-SHARP or "
            "Laplacian boundary values (default: auto, pdf for several echoes with --brain-mask, otherwise vsharp)",
            choices=get_args(Background),
            default=ReconstructionOptions.background,
        ),
        option(
            "--inversion",
            "method of dipole inversion: MEDI with edges of the magnitude and uniform ventricles, total variation, "
            "two-level total variation (as STAR-QSM), iLSQR or thresholded k-space division (default: medi)",
            choices=get_args(Inversion),
            default=ReconstructionOptions.inversion,
        ),
        option(
            "--accept-implausible-maps",
            "segment reconstructed maps that fail the plausibility checks: the volume of the brain mask, the spread of "
            "the values (default: such a scan fails)",
        ),
    ),
    "segmentation": (
        option(
            "--model NAME",
            f"one of {', '.join([*ALIASES, *MODELS])} (default: {ALIASES['default']}; at the group level: all models)",
        ),
        option(
            "--weights FOLDER",
            "use these weights instead of the model's own; for nnunet2step, an nnU-Net v2 model folder or a folder "
            "with two of them, cerebellum and dentate",
            absolute_path,
        ),
        option(
            "--ensemble",
            "average the predictions of all checkpoints, and of each map and its mirror image (dgm16 always does the "
            "latter); takes twice as long and changes little; not available for nnunet2step",
        ),
        option(
            "--label-map FILE",
            "for nnunet2step: TSV with the columns label (name or number) and abbreviation, or JSON such as "
            '{"left dentate": "DN_L"}, that maps the labels of an nnU-Net to nuclei (default: match by name)',
            absolute_path,
        ),
        option(
            "--no-masks",
            "do not write one binary mask per nucleus and hemisphere, and per region",
            dest="masks",
            action="store_false",
        ),
        option(
            "--no-viewer",
            "do not write the interactive viewer of each scan (1 to 3 MB per scan)",
            dest="viewer",
            action="store_false",
        ),
        option(
            "--bilateral",
            "also measure both sides of each nucleus together (rows such as RN beside RN_L and RN_R in _stats.tsv)",
        ),
    ),
    "reference region": (
        option(
            "--reference",
            "region whose mean susceptibility is subtracted; tables have both raw and referenced values. csf: lateral "
            "ventricles (default: none, values relative to the reference region of the map)",
            choices=("none", "whole-brain", "csf", "structure"),
            default="none",
        ),
        option(
            "--reference-structure NUCLEUS",
            "nucleus for --reference structure: both hemispheres (CN) or one (CN_L)",
        ),
        option(
            "--reference-mask FOLDER",
            "folder with masks for --reference csf on the grid of the map, named as in BIDS derivatives "
            "(sub-X/anat/sub-X_label-CSF_mask.nii.gz; default: the ventricles segmented by the model)",
            absolute_path,
        ),
    ),
    "group level": (
        option(
            "--merge FOLDER ...",
            "output folders of other sites to analyse together with OUTPUT_DIR, which may be new",
            absolute_path,
        ),
        option(
            "--site-column NAME",
            "column of participants.tsv or sessions.tsv with the site (default: site or site_id; otherwise the merged "
            "folders, or the scanner in the sidecars if there is only one folder)",
        ),
        option("--group-column NAME", "column with the groups to compare (default: group or diagnosis)"),
        option(
            "--age-column NAME", "column with the ages (default: age, or a name such as age_at_scan or 'Age (years)')"
        ),
        option(
            "--control-filter CONDITION",
            "condition for healthy controls, such as 'group == \"HC\" and age > 40': susceptibility is adjusted for "
            "volume by their regression, and other participants are compared with them",
        ),
        option(
            "--covariates NAME ...",
            "columns that harmonization preserves and group comparisons adjust for, or none (default: age, sex and, "
            "for comparisons, site; harmonization also preserves the group)",
        ),
        option(
            "--combat-age",
            "effect of age that harmonization preserves: a straight line or a natural cubic spline, for sites of "
            "different ages (default: linear)",
            choices=("linear", "spline"),
            default=GroupAnalysis.combat_age,
        ),
        option(
            "--measures NAME ...",
            f"columns of _stats.tsv to analyse (default: {' '.join(GroupAnalysis.measures)})",
        ),
        option(
            "--evaluation FOLDER",
            "output folder of dgmseg evaluate; age curves are also fitted to its reference segmentations",
            absolute_path,
        ),
        option(
            "--bootstrap N",
            "number of bootstrap samples for the confidence limits of age curves (default: profile likelihood limits)",
            positive_int,
        ),
        option(
            "--include-failed",
            "use scans and nuclei with a red rating in the statistics (default: they are left out and listed)",
        ),
    ),
    "resources": (
        option(
            "--nprocs N",
            "number of CPUs for all steps together (default: all available to this process)",
            positive_int,
        ),
        option(
            "--omp-nthreads N",
            "threads per step, at most --nprocs; more than 1 for few scans (default: 1)",
            positive_int,
        ),
        option(
            "--mem-gb GB",
            f"memory for all steps together, in GB (default: {100 * MEMORY_SHARE:.0f} %% of the available memory)",
            positive_float,
        ),
        option(
            "--device",
            "device for the networks (default: auto, a GPU if there is one)",
            choices=("auto", "cpu", "cuda"),
            default="auto",
        ),
    ),
    "run control": (
        option(
            "-w, --work-dir FOLDER",
            "folder for intermediate files, of which each run creates a private one (default: TMPDIR or /tmp)",
            absolute_path,
        ),
        option(
            "--skip-bids-validation",
            "do not run the BIDS validator on BIDS_DIR (it is used if installed, and only warns)",
        ),
        option(
            "--nipype-plugin-file FILE",
            "YAML or JSON file with a Nipype plugin (SLURM, SGE, PBS or LSF) that submits each step as a job, and its "
            "plugin_args; needs a folder that all nodes share (-w)",
            absolute_path,
        ),
        option("--stop-on-first-crash", "stop when a scan fails (default: process the others)"),
        option("--dry-run", "list what would be done, without writing anything"),
        option("--force", "process scans again whose results are up to date"),
    ),
}
"""Options by the heading above them in ``--help``."""

GROUP_ONLY = tuple(option.names[0] for option in OPTIONS["group level"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the BIDS App and return the exit code; the default arguments are those of the process."""

    def run() -> int:
        config = read_config(sys.argv[1:] if argv is None else argv)
        with ignore_current_folder():
            if config.level == "group":
                from bids_dgmseg.workflow.group import run_group

                return run_group(config)
            from bids_dgmseg.workflow.participant import run_participant

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
    level = options.analysis_level
    # Reject options that would have no effect at this level although the user expects one.
    for name in GROUP_ONLY if level == "participant" else PARTICIPANT_ONLY:
        key = name.removeprefix("--").replace("-", "_")
        if getattr(options, key) != parser.get_default(key):
            other = "group" if level == "participant" else "participant"
            raise InputError(f"{name} is only valid at the {other} level; omit it at the {level} level")
    if options.weights and not options.weights.exists():
        raise InputError(f"{options.weights}: no such folder; check --weights")
    nprocs = options.nprocs or count_cpus()
    return RunConfig(
        options.bids_dir,
        options.output_dir,
        level,
        Selection(
            unique(options.participant_label),
            unique(options.session_label),
            options.bids_filter_file,
            tuple(options.derivatives),
        ),
        ReconstructionOptions(
            options.phase_sign,
            options.brain_mask,
            options.background,
            options.inversion,
            options.accept_implausible_maps,
            options.unwrapping,
        ),
        Segmentation(
            model,
            options.weights,
            options.ensemble,
            options.label_map,
            options.masks,
            options.viewer,
            options.bilateral,
        ),
        ReferenceRegion(options.reference, options.reference_structure, options.reference_mask),
        GroupAnalysis(
            merge=tuple(options.merge),
            site_column=options.site_column,
            group_column=options.group_column,
            age_column=options.age_column,
            control_filter=options.control_filter,
            covariates=unique(options.covariates),
            combat_age=options.combat_age,
            measures=unique(options.measures) or GroupAnalysis.measures,
            evaluation=options.evaluation,
            bootstrap=options.bootstrap or 0,
            include_failed=options.include_failed,
        ),
        Resources(
            nprocs,
            min(options.omp_nthreads or 1, nprocs),
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
            plugin_file=options.nipype_plugin_file,
        ),
    )


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
        "output_dir", type=absolute_path, help="folder for the results, such as BIDS_DIR/derivatives/bids_dgmseg"
    )
    parser.add_argument(
        "analysis_level",
        choices=("participant", "group"),
        help="participant: segment and measure each scan; group: tables and statistics of all scans",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="also print the log to the terminal")
    for title, options in OPTIONS.items():
        add_options(parser.add_argument_group(title), options)
    return parser
