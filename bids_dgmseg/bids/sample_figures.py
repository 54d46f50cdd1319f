"""Names of the figures of further maps of a session, in ``figures/``."""

from __future__ import annotations

import re
from pathlib import Path

_SAMPLE = "Sample"
"""End of ``desc``."""


def sample_figure(name: str) -> str:
    """Return the end of ``desc`` of the figure of a further map.

    >>> sample_figure("paramagnetic_Chimap")
    'paramagneticChimapSample'
    """
    return re.sub("[^0-9a-zA-Z]", "", name) + _SAMPLE


def find_sample_figures(output_dir: Path, scan: str, model: str) -> list[Path]:
    """List the figures of further maps of an earlier run."""
    return sorted((output_dir / "figures").glob(f"{scan}_seg-{model}_desc-*{_SAMPLE}_dseg.png"))
