"""Configuration of a run: small records, built once from the command line and passed down by part.

Every path is absolute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bids_dgmseg.errors import InputError

SHIPPED_WEIGHTS = "shipped with the program"
"""Name of the model's own weights in the QC record of a scan."""

Device = Literal["auto", "cpu", "cuda", "mps"]

PhaseSign = Literal["auto", "positive", "negative"]

Background = Literal["auto", "pdf", "vsharp"]

Unwrapping = Literal["region-growing", "laplacian"]

Inversion = Literal["star", "medi", "ilsqr"]

WarpMethod = Literal["demons", "ants"]


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
        raise InputError(f"sample {text}: not the end of a BIDS name; use e.g. R2starmap or desc-paramagnetic_Chimap")
    return {pair[1]: pair[2] for pair in entities if pair}, suffix


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Scans of a dataset to process; labels have no ``sub-`` or ``ses-``, and empty means all."""

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filter_file: Path | None = None
    derivatives: tuple[Path, ...] = ()
    """Derivative datasets with chi maps; empty means all below ``derivatives/`` of the dataset."""
    chi: tuple[str, ...] = ()
    """Entities of the chi maps to use, such as ``desc-cosmos``."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Reconstruction of chi maps from multi-echo GRE."""

    phase_sign: PhaseSign = "auto"
    """Whether phase increases or decreases with the field; ``auto`` decides by the shape of the head or the map."""
    brain_masks: Path | None = None
    """Folder with the user's brain masks."""
    background: Background = "auto"
    """Method of background field removal; ``auto`` depends on the mask and the number of echoes."""
    inversion: Inversion = "star"
    """Method of dipole inversion."""
    accept_implausible: bool = False
    """Segment maps that fail the plausibility checks."""
    unwrapping: Unwrapping = "region-growing"
    """Method of spatial phase unwrapping."""
    regularization: float | None = None
    """Weight λ of the inversion; None to choose it by the noise of the field."""
    erosion_mm: float | None = None
    """Depth below the border of the brain mask from which the map has values; None for that of the method."""
    save_fields: bool = False
    """Write the brain mask, the total and the local field."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Model and what it writes."""

    model: str | None = None
    """Key of the registry (aliases are resolved); None for the default, or for all models at the group level."""
    weights: Path | None = None
    """Folder with other weights than the model's own."""
    ensemble: bool = False
    """Average over each map and its mirror image, which dgm16 and dgm24 always do."""
    label_map: Path | None = None
    """Table that maps the labels of an nnU-Net folder to nuclei."""
    masks: bool = True
    """Write one binary mask per nucleus and hemisphere, and per region."""
    viewer: bool = True
    """Write an interactive viewer per scan."""
    bilateral: bool = False
    """Add a bilateral row (left and right combined) per nucleus to the table."""
    corrections: Path | None = None
    """Dataset with labels that were corrected manually."""
    longitudinal: bool = False
    """Label the sessions of a participant together, on one grid in their mid-space."""
    output_space: str = ""
    """Standard space, such as ``MNI152NLin2009cAsym:res-2``; empty for none."""
    output_space_warp: WarpMethod = "demons"
    """How the warp to the standard space is found; ``ants`` needs ANTs."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured besides the chi map, and where not."""

    sample: tuple[str, ...] = ()
    """Further maps of the session, such as ``R2starmap`` or ``desc-paramagnetic_Chimap``."""
    exclude_masks: Path | None = None
    """Folder with masks of voxels that are not measured, such as lesions."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRegion:
    """Region whose mean susceptibility is subtracted."""

    kind: Literal["none", "whole-brain", "csf", "structure"] = "none"
    structure: str | None = None
    """For ``structure``: a nucleus such as ``CN``, or one hemisphere of it, ``CN_L``."""
    masks: Path | None = None
    """For ``csf``: folder with the user's masks of cerebrospinal fluid."""


@dataclass(frozen=True, kw_only=True)
class GroupAnalysis:
    """Options of the group level."""

    merge: tuple[Path, ...] = ()
    """Output folders of other sites."""
    site_column: str | None = None
    group_column: str | None = None
    age_column: str | None = None
    control_filter: str | None = None
    covariates: tuple[str, ...] = ()
    """Empty means age, sex and site, for harmonization the group instead of the site; ``none`` means none."""
    combat_age: Literal["linear", "spline"] = "linear"
    """Effect of age that harmonization preserves."""
    combat_longitudinal: bool = False
    """Whether harmonization has a random intercept per participant."""
    harmonization_save: Path | None = None
    """File for the harmonization."""
    harmonization_apply: Path | None = None
    """File with a saved harmonization to apply instead of fitting one."""
    measures: tuple[str, ...] = ("mean_ppm", "volume_mm3")
    """Columns of ``_stats.tsv``."""
    norms_save: Path | None = None
    """File for the norms of the controls."""
    norms: Path | None = None
    """File with saved norms to compare scans with, at both levels."""
    evaluation: Path | None = None
    """Output folder of ``dgmseg evaluate``."""
    bootstrap: int = 0
    """Number of bootstrap refits for the limits of age curves; 0 for profile likelihood limits."""
    include_failed: bool = False
    """Whether scans and nuclei with a red rating enter the statistics."""
    correlate: tuple[str, ...] = ()
    """Columns of participants.tsv or sessions.tsv with clinical variables."""
    qc: tuple[Path, ...] = ()
    """Files with raters' decisions."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """CPUs, memory in GB and device."""

    nprocs: int = 1
    omp_nthreads: int = 1
    mem_gb: float = 4.0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class RunControl:
    """How a run proceeds."""

    work_dir: Path | None = None
    """Folder for the private folder of each run; None for the system's temporary folder."""
    skip_bids_validation: bool = False
    stop_on_first_crash: bool = False
    dry_run: bool = False
    force: bool = False
    verbose: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of one run of the BIDS App."""

    bids_dir: Path
    output_dir: Path
    level: Literal["participant", "group"] = "participant"
    selection: Selection = field(default_factory=Selection)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    segmentation: Segmentation = field(default_factory=Segmentation)
    reference: ReferenceRegion = field(default_factory=ReferenceRegion)
    measurement: Measurement = field(default_factory=Measurement)
    group: GroupAnalysis = field(default_factory=GroupAnalysis)
    resources: Resources = field(default_factory=Resources)
    control: RunControl = field(default_factory=RunControl)
