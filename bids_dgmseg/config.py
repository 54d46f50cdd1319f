"""Configuration of a run: small records, built once from the command line and passed down by part.

The fields declare the options of ``bids_dgmseg``: its parser, the settings that are recorded and hashed, the
documentation and the Boutiques descriptor are derived from them. Every path is absolute.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bids_dgmseg.arguments import (
    Level,
    entity,
    option,
    participant_label,
    positive_float,
    positive_int,
    session_label,
)
from bids_dgmseg.errors import InputError

SHIPPED_WEIGHTS = "shipped with the program"
"""Name of the model's own weights in the QC record of a scan."""

Device = Literal["auto", "cpu", "cuda", "mps"]

PhaseSign = Literal["auto", "positive", "negative"]

Prove = Literal["", "short", "full"]
"""Extent of the proof; empty: none."""

MNI = "MNI152NLin2009cAsym"
"""Name of the standard space in TemplateFlow."""


def parse_output_space(text: str) -> tuple[str, int | None]:
    """Parse the name of a standard space, with or without a resolution.

    >>> parse_output_space("MNI152NLin2009cAsym:res-2")
    ('MNI152NLin2009cAsym', 2)

    Raises
    ------
    InputError
        If the space or the resolution is unknown.
    """
    match = re.fullmatch(rf"({MNI})(?::res-0?([12]))?", text)
    if not match:
        raise InputError(f"output_space {text}: unknown; use {MNI}, {MNI}:res-1 or {MNI}:res-2")
    return match[1], int(match[2]) if match[2] else None


def parse_map_name(text: str) -> tuple[dict[str, str], str]:
    """Parse the name of a map: entities and suffix.

    >>> parse_map_name("desc-paramagnetic_Chimap")
    ({'desc': 'paramagnetic'}, 'Chimap')

    Raises
    ------
    InputError
        If it is not the end of a BIDS name.
    """
    *pairs, suffix = text.split("_")
    entities = [re.fullmatch(r"([a-z]+)-([0-9a-zA-Z+]+)", pair) for pair in pairs]
    if not re.fullmatch("[0-9a-zA-Z]+", suffix) or not all(entities):
        raise InputError(
            f"`further_maps` {text}: not the end of a BIDS name; use e.g. R2starmap or desc-paramagnetic_Chimap"
        )
    return {pair[1]: pair[2] for pair in entities if pair}, suffix


def _checked(parse: Callable[[str], object], text: str) -> str:
    """Return the value of an option that `parse` accepts."""
    try:
        parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).partition(" ")[2]) from error
    return text


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Scans of a dataset to process; labels have no ``sub-`` or ``ses-``, and empty means all."""

    participants: tuple[str, ...] = option(
        "participants to process, with or without sub- (default: all)",
        (),
        name="participant-label",
        values="LABEL",
        parse=participant_label,
    )
    sessions: tuple[str, ...] = option(
        "sessions to process, with or without ses- (default: all)",
        (),
        name="session-label",
        values="LABEL",
        parse=session_label,
    )
    filter_file: Path | None = option(
        'JSON file that selects images by entities: maps under "chimap", echoes under "megre", such as '
        '{"chimap": {"acquisition": "x"}}; "scope" selects the dataset ("raw" or the name of a derivative)',
        None,
        name="bids-filter-file",
        values="FILE",
    )
    chi: tuple[str, ...] = option(
        "only use chi maps with these entities, such as desc-cosmos (default: all; if QSMxT wrote several maps of one "
        "acquisition, the one without desc)",
        (),
        values="ENTITY",
        parse=entity,
    )
    derivatives: tuple[Path, ...] = option(
        "derivative datasets with chi maps, such as those of QSMxT, SEPIA or qsm-forward (default: all below "
        "BIDS_DIR/derivatives)",
        (),
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Reconstruction of chi maps from multi-echo GRE."""

    brain_masks: Path | None = option(
        "folder with brain masks on the grid of the echoes, named as in BIDS derivatives "
        "(sub-X/[ses-Y/]anat/sub-X[_ses-Y]_desc-brain_mask.nii.gz or label-brain; default: found in the magnitude "
        "by a network)",
        None,
    )
    phase_sign: PhaseSign = option(
        "whether phase increases (positive) or decreases with the field, which depends on the scanner (default: "
        "auto, from the field that the head induces; if that is inconclusive, so that veins and iron are positive)",
        "auto",
        changes_results=True,
    )
    save_fields: bool = option(
        "also write the brain mask (_desc-brain_mask), the total and the local field in Hz "
        "(fmap/*_desc-total_fieldmap, desc-local)",
        False,
        changes_results=True,
    )
    accept_implausible: bool = option(
        "segment reconstructed maps that fail the plausibility checks (volume of the brain mask, range of values; by "
        "default such a scan fails)",
        False,
        name="accept-implausible-maps",
    )


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions:
    """Model and what it writes."""

    model: str | None = option(
        "name or alias of a model, see dgmseg models (default: dgm16; at the group level: all models)",
        None,
        both_levels=True,
    )
    weights: Path | None = option(
        "use these weights instead of the model's own; for nnunet2step, an nnU-Net v2 model folder or a folder "
        "with two of them, cerebellum and dentate",
        None,
    )
    masks: bool = option(
        "do not write one binary mask per nucleus and hemisphere, and per region (18 fewer files per scan of dgm16)",
        True,
        changes_results=True,
        both_levels=True,
    )
    viewer: bool = option(
        "do not write the interactive viewer of each scan (1 to 3 MB per scan)",
        True,
        changes_results=True,
        both_levels=True,
    )
    bilateral: bool = option(
        "add a bilateral row (left and right combined) per nucleus, such as RN after RN_L and RN_R in _stats.tsv, "
        "and in the group tables",
        False,
        changes_results=True,
    )
    prove: Prove = option(
        "prove each segmentation on its own map: plant a known susceptibility and loss of volume in the nuclei, "
        "segment again, and report what is recovered and how repeatable it is (full: also growth and a smaller loss)",
        "",
        changes_results=True,
    )
    corrections: Path | None = option(
        "derivative dataset with manually corrected _dseg files, of some or all scans, as dgmseg "
        "corrections prepares it: their labels are measured instead of the automatic ones",
        None,
    )
    longitudinal: bool = option(
        "label the sessions of each participant together: their maps are rigidly aligned to a midpoint space and "
        "labelled on one grid, which reduces noise in changes over time; changes of volume are measured between the "
        "aligned maps",
        False,
    )
    output_space: str = option(
        "also write map, labels, probabilities and transforms in MNI152NLin2009cAsym, at 1 mm, or with :res-2 at "
        "2 mm (default: only on the grid of each scan)",
        "",
        values="SPACE",
        parse=partial(_checked, parse_output_space),
        changes_results=True,
    )


@dataclass(frozen=True, kw_only=True)
class MeasurementOptions:
    """What is measured besides the chi map, and where not."""

    further_maps: tuple[str, ...] = option(
        "further maps of each session to measure in the nuclei, given by the end of their file names, such as "
        "R2starmap T1map desc-paramagnetic_Chimap; aligned with the chi map, on any grid",
        (),
        values="MAP",
        parse=partial(_checked, parse_map_name),
        changes_results=True,
    )
    lesion_masks: Path | None = option(
        "folder with masks of voxels to leave out of all measures, such as lesions and haemorrhages, in the space "
        "of the map, named as in BIDS derivatives (sub-X/[ses-Y/]anat/sub-X[_ses-Y]_label-lesion_mask.nii.gz or "
        "desc-lesion; haemorrhage, calcification, exclude)",
        None,
        changes_results=True,
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceRegion:
    """Region whose mean susceptibility is subtracted."""

    region: str = option(
        "region whose mean susceptibility is subtracted: whole-brain, csf (lateral ventricles), or a nucleus of both "
        "hemispheres (CN) or of one (CN_L); tables have both raw and referenced values (default: none, values relative "
        "to the reference region of the map)",
        "none",
        name="reference",
        values="REGION",
        changes_results=True,
    )
    masks: Path | None = option(
        "folder with masks for --reference csf on the grid of the map, named as in BIDS derivatives "
        "(sub-X/[ses-Y/]anat/sub-X[_ses-Y]_label-CSF_mask.nii.gz or label-ventricles; default: the lateral "
        "ventricles segmented by dgm16, eroded)",
        None,
        name="reference-masks",
        changes_results=True,
    )


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options of the group level."""

    merge: tuple[Path, ...] = option(
        "output folders of other sites to analyse together with OUTPUT_DIR (which need not exist yet)", ()
    )
    site_column: str | None = option(
        "column of participants.tsv or sessions.tsv with the site (default: site or site_id; otherwise the merged "
        "folders, or the scanner in the sidecars if there is only one folder)",
        None,
    )
    group_column: str | None = option("column with the groups to compare (default: group or diagnosis)", None)
    controls: tuple[str, ...] = option(
        "groups of healthy controls, as in the group column, such as HC: susceptibility is adjusted for volume with "
        "a slope fitted in controls, and all scans get centiles relative to controls",
        (),
        values="GROUP",
    )
    covariates: tuple[str, ...] = option(
        "columns that harmonization preserves and group comparisons adjust for, or none (default: age, sex and, "
        "for comparisons, site); harmonization always preserves the group",
        (),
    )
    harmonization_save: Path | None = option(
        "write the harmonization to this JSON file, to be applied to other scans; with --controls, site effects are "
        "estimated in controls and removed from all scans",
        None,
        values="FILE",
    )
    harmonization_apply: Path | None = option(
        "apply a saved harmonization to scans of its sites instead of fitting one; scans of other sites are not "
        "harmonized",
        None,
        values="FILE",
    )
    norms_save: Path | None = option(
        "write the centiles of the controls by age and sex to this JSON file, for --norms; needs --controls",
        None,
        values="FILE",
    )
    norms: Path | None = option(
        "compare each nucleus with saved norms of healthy people of the same age and sex (participants.tsv): "
        "z-scores and centiles in group_zscores.tsv",
        None,
        values="FILE",
    )
    measures: tuple[str, ...] = option(
        "columns of _stats.tsv to analyse and to draw (default: mean_ppm volume_mm3; only mean_ppm is drawn)", ()
    )
    include_failed: bool = option(
        "use scans and nuclei with a red rating in the statistics (default: they are left out and listed)", False
    )
    correlate: tuple[str, ...] = option(
        "columns of participants.tsv or sessions.tsv with clinical variables, such as UPDRS: partial correlation "
        "and regression of each nucleus, adjusted for the covariates",
        (),
    )
    retest_days: int | None = option(
        "scans of a participant at most this many days apart count as repeated for the reliability (default: the first "
        "two scans, however far apart)",
        None,
        values="N",
        parse=positive_int,
    )
    qc: tuple[Path, ...] = option(
        "qc_decisions.tsv of one or several raters, from dgmseg review: scans and nuclei that a rater failed are "
        "left out and listed, those that were passed are used even if rated red, unless another rater failed them",
        (),
        values="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """CPUs, memory in GB and device; the command line replaces the defaults by what is available."""

    nprocs: int = option(
        "total number of CPUs (default: all available to this process); the group level uses at most 2",
        1,
        values="N",
        parse=positive_int,
    )
    omp_nthreads: int = option(
        "threads per step, at most --nprocs; use more than 1 only for a few scans; the group level always uses one "
        "thread",
        1,
        values="N",
        parse=positive_int,
    )
    mem_gb: float = option(
        "memory for all steps together, in GB; a scan whose image needs more fails before it is read (default: 90 %% "
        "of the available memory)",
        4.0,
        values="GB",
        parse=positive_float,
    )
    device: Device = option("device for the networks; mps: GPU of a Mac (default: auto, a CUDA GPU if any)", "auto")


@dataclass(frozen=True, kw_only=True)
class RunControl:
    """How a run proceeds."""

    work_dir: Path | None = option(
        "folder for intermediate files; each run uses its own subfolder; outside the raw data and OUTPUT_DIR, and not "
        "a folder of another user (default: TMPDIR or /tmp)",
        None,
        short="-w",
    )
    skip_bids_validation: bool = option(
        "do not run the BIDS validator on BIDS_DIR (it is used if installed, and only warns)", False
    )
    dry_run: bool = option("check options, weights and device, and list what would be done; nothing is written", False)
    force: bool = option("reprocess scans even if they are up to date (default: they are skipped)", False)


def _part(record: type, title: str, level: Level | None = None) -> Any:
    return field(default_factory=record, metadata={"record": record, "title": title, "level": level})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of one run of the BIDS App; the titles are headings of ``--help``."""

    bids_dir: Path
    output_dir: Path
    level: Level = "participant"
    selection: Selection = _part(Selection, "selection of scans")
    reconstruction: ReconstructionOptions = _part(
        ReconstructionOptions, "reconstruction from multi-echo GRE", "participant"
    )
    segmentation: SegmentationOptions = _part(SegmentationOptions, "segmentation", "participant")
    measurement: MeasurementOptions = _part(MeasurementOptions, "measures", "participant")
    reference: ReferenceRegion = _part(ReferenceRegion, "reference region", "participant")
    group: GroupOptions = _part(GroupOptions, "group level", "group")
    resources: Resources = _part(Resources, "resources")
    control: RunControl = _part(RunControl, "run control")
