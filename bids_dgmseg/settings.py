"""What the user asked for, built once and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """The options of one run; every path is absolute.

    Each field is the command-line option of that name.
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
    weights: Path | None = None
    """Folder that takes the place of the model's own weights."""
    label_map: Path | None = None
    """Table that says which labels of an nnU-Net folder are which nuclei."""
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
    verbose: int = 0
