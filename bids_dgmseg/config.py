"""Configuration of a run: small records, built once from the command line and passed down by part.

Every path is absolute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SHIPPED_WEIGHTS = "shipped with the program"
"""Name of the model's own weights in the QC record of a scan."""

Device = Literal["auto", "cpu", "cuda"]

PhaseSign = Literal["auto", "positive", "negative"]

Background = Literal["auto", "pdf", "vsharp", "lbv"]

Unwrapping = Literal["region-growing", "best-path", "laplacian"]

Inversion = Literal["medi", "tv", "star", "ilsqr", "tkd"]


@dataclass(frozen=True)
class Selection:
    """Scans of a dataset to process; labels have no ``sub-`` or ``ses-``, and empty means all."""

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filter_file: Path | None = None
    derivatives: tuple[Path, ...] = ()
    """Derivative datasets with chi maps; empty means all below ``derivatives/`` of the dataset."""


@dataclass(frozen=True)
class ReconstructionOptions:
    """Reconstruction of chi maps from multi-echo GRE."""

    phase_sign: PhaseSign = "auto"
    """Whether phase increases or decreases with the field; ``auto`` decides by the shape of the head or the map."""
    brain_masks: Path | None = None
    """Folder with the user's brain masks."""
    background: Background = "auto"
    """Method of background field removal; ``auto`` depends on the mask and the number of echoes."""
    inversion: Inversion = "medi"
    """Method of dipole inversion."""
    accept_implausible: bool = False
    """Segment maps that fail the plausibility checks."""
    unwrapping: Unwrapping = "region-growing"
    """Method of spatial phase unwrapping."""


@dataclass(frozen=True)
class Segmentation:
    """Model and what it writes."""

    model: str | None = None
    """Key of the registry (aliases are resolved); None for the default, or for all models at the group level."""
    weights: Path | None = None
    """Folder with other weights than the model's own."""
    ensemble: bool = False
    """Average over mirror images and all checkpoints."""
    label_map: Path | None = None
    """Table that maps the labels of an nnU-Net folder to nuclei."""
    masks: bool = True
    """Write one binary mask per nucleus and hemisphere, and per region."""
    viewer: bool = True
    """Write an interactive viewer per scan."""
    bilateral: bool = False
    """Add rows of both sides of each nucleus together to the table."""


@dataclass(frozen=True)
class ReferenceRegion:
    """Region whose mean susceptibility is subtracted."""

    kind: Literal["none", "whole-brain", "csf", "structure"] = "none"
    structure: str | None = None
    """For ``structure``: a nucleus such as ``CN``, or one hemisphere of it, ``CN_L``."""
    masks: Path | None = None
    """For ``csf``: folder with the user's masks of cerebrospinal fluid."""


@dataclass(frozen=True)
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
    measures: tuple[str, ...] = ("mean_ppm", "volume_mm3")
    """Columns of ``_stats.tsv``."""
    evaluation: Path | None = None
    """Output folder of ``dgmseg evaluate``."""
    bootstrap: int = 0
    """Number of bootstrap refits for the limits of age curves; 0 for profile likelihood limits."""
    include_failed: bool = False
    """Whether scans and nuclei with a red rating enter the statistics."""


@dataclass(frozen=True)
class Resources:
    """CPUs, memory in GB and device."""

    nprocs: int = 1
    omp_nthreads: int = 1
    mem_gb: float = 4.0
    device: Device = "auto"


@dataclass(frozen=True)
class RunControl:
    """How a run proceeds."""

    work_dir: Path | None = None
    """Folder for the private folder of each run; None for the system's temporary folder."""
    skip_bids_validation: bool = False
    stop_on_first_crash: bool = False
    dry_run: bool = False
    force: bool = False
    verbose: int = 0
    plugin_file: Path | None = None
    """YAML or JSON file with the Nipype plugin that submits the steps to a cluster; None to run them here."""


@dataclass(frozen=True)
class RunConfig:
    """Configuration of one run of the BIDS App."""

    bids_dir: Path
    output_dir: Path
    level: Literal["participant", "group"] = "participant"
    selection: Selection = field(default_factory=Selection)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    segmentation: Segmentation = field(default_factory=Segmentation)
    reference: ReferenceRegion = field(default_factory=ReferenceRegion)
    group: GroupAnalysis = field(default_factory=GroupAnalysis)
    resources: Resources = field(default_factory=Resources)
    control: RunControl = field(default_factory=RunControl)
