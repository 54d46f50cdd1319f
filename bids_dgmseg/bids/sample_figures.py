"""Names of the figures of further maps of a session, in ``figures/``."""

from __future__ import annotations

import re
from pathlib import Path

from bids_dgmseg.io.files import read_optional_json

_SAMPLE = "Sample"
"""End of ``desc``."""


def sample_figure(name: str) -> str:
    """Return the end of ``desc`` of the figure of a further map.

    >>> sample_figure("paramagnetic_Chimap")
    'paramagneticChimapSample'
    """
    return re.sub("[^0-9a-zA-Z]", "", name) + _SAMPLE


def find_sample_figures(output_dir: Path, sidecar: Path) -> list[Path]:
    """List the figures of further maps of an earlier run."""
    names = read_optional_json(sidecar).get("OutputFiles")
    stem = sidecar.name.partition("_seg-")[0]
    files = [Path(str(name)).name for name in names] if isinstance(names, list) else []
    return [
        output_dir / "figures" / name
        for name in files
        if name.startswith(f"{stem}_") and name.endswith(f"{_SAMPLE}_dseg.png")
    ]
