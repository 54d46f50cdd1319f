"""What the user asked for, built once and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SHIPPED_WEIGHTS = "shipped with the program"
"""How the record of a scan names weights that the user did not give."""


@dataclass(frozen=True)
class Settings:
    """The options of one run; every path is absolute.

    Each field is the command-line option of that name; `model_given` tells whether there was one.
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: Literal["participant", "group"] = "participant"
    participant_label: tuple[str, ...] = ()
    """Without ``sub-``; empty means all."""
    session_label: tuple[str, ...] = ()
    """Without ``ses-``; empty means all."""
    bids_filter_file: Path | None = None
    derivatives: tuple[Path, ...] = ()
    model: str = "dgm16"
    """Key of the registry; aliases are resolved where the option is read."""
    model_given: bool = False
    """Whether the user named the model: then the group level takes results of no other."""
    weights: Path | None = None
    """Folder that takes the place of the model's own weights."""
    quality: bool = False
    """Average over mirrored maps and two checkpoints."""
    label_map: Path | None = None
    """Table that says which labels of an nnU-Net folder are which nuclei."""
    reference: Literal["none", "whole-brain", "csf", "structure"] = "none"
    """Region that the referenced susceptibilities are relative to."""
    reference_structure: str | None = None
    """Nucleus that ``structure`` means, such as ``CN``, or one side of it, ``CN_L``."""
    reference_mask: Path | None = None
    """Folder with the user's masks of cerebrospinal fluid, for ``csf``."""
    brain_mask: Path | None = None
    """Folder with the user's masks of the brain, for maps that are reconstructed from echoes."""
    phase_sign: Literal["auto", "positive", "negative"] = "auto"
    """Whether phase grows or falls with the field; ``auto`` tells it from the map."""
    nprocs: int = 1
    omp_nthreads: int = 1
    mem_gb: float = 4.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    work_dir: Path = Path("/tmp/bids_dgmseg")
    skip_bids_validation: bool = False
    stop_on_first_crash: bool = False
    dry_run: bool = False
    force: bool = False
    masks: bool = True
    """Write one binary mask a nucleus and side (``--no-masks`` does not)."""
    merge: tuple[Path, ...] = ()
    """Output folders of other sites whose scans join the group level."""
    site_column: str | None = None
    group_column: str | None = None
    control_filter: str | None = None
    covariates: tuple[str, ...] = ()
    """Empty means age and sex, and the group where sites are harmonized; ``none`` means none."""
    measures: tuple[str, ...] = ("mean_ppm", "volume_mm3")
    """Columns of ``_stats.tsv`` that the group level's statistics are made of."""
    evaluation: Path | None = None
    """Folder of ``dgmseg evaluate`` with the reference labels' measures."""
    bootstrap: int = 0
    """Refits for the limits of ageing curves; 0: limits by profile."""
    verbose: int = 0
