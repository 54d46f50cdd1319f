"""What a run has to do; loads nothing, so that a dry run is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.bids.scans import Scan


@dataclass(frozen=True)
class Job:
    """A scan that is to be segmented."""

    scan: Scan
    fingerprint: str
    """What its results depend on."""
    reference_mask: Path | None = None
    """The user's mask of the reference region."""
    brain_mask: Path | None = None
    """The user's mask of the brain, where the map is to be reconstructed."""
    reconstruction: str = ""
    """What that map depends on."""
