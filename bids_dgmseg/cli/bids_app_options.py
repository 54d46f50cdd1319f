"""The options of ``bids_dgmseg``, by the headings of its help."""

from __future__ import annotations

from typing import get_args

from bids_dgmseg.cli.options import (
    absolute_path,
    entity,
    map_name,
    non_negative_float,
    option,
    output_space,
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
    Unwrapping,
    WarpMethod,
)
from bids_dgmseg.models.registry import ALIASES, MODELS

MEMORY_SHARE = 0.9

# --no-masks, --no-viewer, --force and the resources have no effect at the group level, and are accepted there.
PARTICIPANT_ONLY = (
    "--bids-filter-file",
    "--chi",
    "--derivatives",
    "--weights",
    "--ensemble",
    "--label-map",
    "--bilateral",
    "--corrections",
    "--longitudinal",
    "--output-space",
    "--output-space-warp",
    "--sample",
    "--exclude-mask",
    "--reference",
    "--reference-structure",
    "--reference-mask",
    "--brain-mask",
    "--phase-sign",
    "--unwrapping",
    "--background",
    "--inversion",
    "--regularization",
    "--erosion-mm",
    "--save-fields",
    "--accept-implausible-maps",
)

OPTIONS = {
    "selection of scans": (
        option(
            "--participant-label LABEL ...",
            "participants to process, with or without sub-; at both levels (default: all)",
            participant_label,
        ),
        option(
            "--session-label LABEL ...",
            "sessions to process, with or without ses-; at both levels (default: all)",
            session_label,
        ),
        option(
            "--bids-filter-file FILE",
            'JSON file that selects images by entities: maps under "chimap", echoes under "megre", such as '
            '{"chimap": {"acquisition": "x"}}; "scope" selects the dataset ("raw" or the name of a derivative)',
            absolute_path,
        ),
        option(
            "--chi ENTITY ...",
            "use the chi maps with these entities, such as desc-cosmos (default: all; of those that QSMxT makes of one "
            "acquisition, the one without desc)",
            entity,
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
            "(sub-X/[ses-Y/]anat/sub-X[_ses-Y]_desc-brain_mask.nii.gz or label-brain; default: found in the magnitude "
            "by a network)",
            absolute_path,
        ),
        option(
            "--phase-sign",
            "whether phase increases (positive) or decreases with the field, which depends on the scanner (default: "
            "auto, as the field that the shape of the head induces, or where that is not recognized, so that veins "
            "and iron are positive)",
            choices=("auto", "positive", "negative"),
            default="auto",
        ),
        option(
            "--unwrapping",
            "phase unwrapping: region-growing (ROMEO-like) or laplacian, for phase with open wraps, which removes "
            " part of the background field (default: region-growing)",
            choices=get_args(Unwrapping),
            default=ReconstructionOptions.unwrapping,
        ),
        option(
            "--background",
            "method that removes the field of sources outside the brain: projection onto dipole fields or V-SHARP "
            "(default: auto, pdf for several echoes with --brain-mask, otherwise vsharp)",
            choices=get_args(Background),
            default=ReconstructionOptions.background,
        ),
        option(
            "--inversion",
            "method of dipole inversion: star (two-level total variation with edges of the magnitude and of the map, "
            "after STAR-QSM), medi (MEDI+0) or ilsqr (iLSQR) (default: star)",
            choices=get_args(Inversion),
            default=ReconstructionOptions.inversion,
        ),
        option(
            "--regularization WEIGHT",
            "weight λ of star and medi, as RegularizationWeight in the sidecar of the map (default: in proportion "
            "to the noise of the field, and increased if the map fits noise)",
            positive_float,
        ),
        option(
            "--erosion-mm MM",
            "depth below the border of the brain mask from which the map has values (default: one voxel, with vsharp "
            "3 mm)",
            non_negative_float,
        ),
        option(
            "--save-fields",
            "also write the brain mask (_desc-brain_mask), the total and the local field in Hz "
            "(fmap/*_desc-total_fieldmap, desc-local)",
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
            "average the predictions of each map and its mirror image, which dgm16 and dgm24 always do; takes twice as "
            "long; not available for nnunet2step",
        ),
        option(
            "--label-map FILE",
            "for nnunet2step: TSV with the columns label (name or number) and abbreviation, or JSON such as "
            '{"left dentate": "DN_L"}, that maps the labels of an nnU-Net to nuclei (default: match by name)',
            absolute_path,
        ),
        option(
            "--no-masks",
            "do not write one binary mask per nucleus and hemisphere, and per region (36 fewer files per scan of "
            "dgm16)",
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
            "add a bilateral row (left and right combined) per nucleus, such as RN after RN_L and RN_R in _stats.tsv, "
            "and in the group tables",
        ),
        option(
            "--corrections FOLDER",
            "derivative dataset with manually corrected _dseg files, of some or all scans, as dgmseg "
            "corrections prepares it: their labels are measured instead of the automatic ones",
            absolute_path,
        ),
        option(
            "--longitudinal",
            "label the sessions of each participant together: their maps are aligned rigidly halfway between them, and "
            "the network sees all on the same grid, which makes changes less noisy; changes of volume are measured "
            "between the aligned maps",
        ),
        option(
            "--output-space SPACE",
            "also write map, labels, probabilities and transforms in MNI152NLin2009cAsym, at 1 mm, or with :res-2 at "
            "2 mm (default: only on the grid of each scan)",
            output_space,
        ),
        option(
            "--output-space-warp",
            "how the warp to the standard space is found: demons, or ants (SyN of ANTs, which must be installed; "
            "default: demons)",
            choices=get_args(WarpMethod),
            default="demons",
        ),
    ),
    "measures": (
        option(
            "--sample MAP ...",
            "further maps of each session to measure in the nuclei, by the end of their names, such as R2starmap T1map "
            "desc-paramagnetic_Chimap; on any grid, in the space of the chi map",
            map_name,
        ),
        option(
            "--exclude-mask FOLDER",
            "folder with masks of voxels to leave out of all measures, such as lesions and haemorrhages, in the space "
            "of the map, named as in BIDS derivatives (sub-X/[ses-Y/]anat/sub-X[_ses-Y]_label-lesion_mask.nii.gz or "
            "desc-lesion; haemorrhage, calcification, exclude)",
            absolute_path,
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
            "(sub-X/[ses-Y/]anat/sub-X[_ses-Y]_label-CSF_mask.nii.gz or label-ventricles; default: the lateral "
            "ventricles segmented by the model, eroded)",
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
            "--combat-longitudinal",
            "harmonize repeated scans with a random intercept per participant (longitudinal ComBat; default: scans of "
            "a participant at a site are averaged for the estimates)",
        ),
        option(
            "--harmonization-save FILE",
            "write the harmonization to this JSON file, to be applied to other scans; with --control-filter it is "
            "fitted to the controls only, and removed from all",
            absolute_path,
        ),
        option(
            "--harmonization-apply FILE",
            "apply a saved harmonization to scans of its sites instead of fitting one; effects of other sites are "
            "estimated if they have 10 participants (with --control-filter, controls), or 5 also scanned at a known "
            "site",
            absolute_path,
        ),
        option(
            "--norms-save FILE",
            "write the centiles of the controls by age and sex to this JSON file, for --norms; needs --control-filter",
            absolute_path,
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
        option(
            "--correlate NAME ...",
            "columns of participants.tsv or sessions.tsv with clinical variables, such as UPDRS: partial correlation "
            "and regression of each nucleus, adjusted for the covariates",
        ),
        option(
            "--qc FILE ...",
            "qc_decisions.tsv of one or several raters, from dgmseg review: scans and nuclei that a rater failed are "
            "left out and listed, those that were passed are used even if rated red",
            absolute_path,
        ),
    ),
    "norms": (
        option(
            "--norms FILE",
            "compare each nucleus with saved norms of healthy people of the same age and sex (participants.tsv): "
            "z-scores and centiles on the participants' pages, at the group level in group_zscores.tsv and on the page",
            absolute_path,
        ),
    ),
    "resources": (
        option(
            "--nprocs N",
            "number of CPUs for all steps together (default: all available to this process); the group level "
            "uses at most 2",
            positive_int,
        ),
        option(
            "--omp-nthreads N",
            "threads per step, at most --nprocs; use more than 1 only for a few scans; the group level always uses one "
            "thread (default: 1)",
            positive_int,
        ),
        option(
            "--mem-gb GB",
            "memory for all steps together, in GB; a scan whose image needs more fails before it is read (default: "
            f"{100 * MEMORY_SHARE:.0f} %% of the available memory)",
            positive_float,
        ),
        option(
            "--device",
            "device for the networks; mps: GPU of a Mac (default: auto, a CUDA GPU if there is one)",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
        ),
    ),
    "run control": (
        option(
            "-w, --work-dir FOLDER",
            "folder for intermediate files, of which each run creates a private one; outside the raw data and "
            "OUTPUT_DIR, and not a folder of another user (default: TMPDIR or /tmp)",
            absolute_path,
        ),
        option(
            "--skip-bids-validation",
            "do not run the BIDS validator on BIDS_DIR (it is used if installed, and only warns)",
        ),
        option("--stop-on-first-crash", "stop when a scan fails (default: process the others)"),
        option("--dry-run", "check options, weights and device, and list what would be done; nothing is written"),
        option("--force", "process scans again whose results are up to date (default: they are skipped)"),
    ),
}
"""Options by the heading above them in ``--help``."""

GROUP_ONLY = tuple(option.names[0] for option in OPTIONS["group level"])
