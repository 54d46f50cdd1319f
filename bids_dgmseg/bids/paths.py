"""Names of derivatives."""

from __future__ import annotations

from pathlib import Path

from bids_dgmseg.bids.names import join_entities
from bids_dgmseg.bids.scans import Scan


def output_path(output_dir: Path, scan: Scan, suffix: str, extension: str, **entities: str) -> Path:
    """Name a derivative.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset.
    scan : Scan
        Whose entities the name starts from. A ``desc`` of its own stays in front of the one given:
        ``rts`` and ``dgm16`` make ``desc-rtsDgm16``.
    suffix, extension : str
        Such as ``dseg`` and ``.nii.gz``.
    **entities : str
        Further entities, such as ``seg="dgm16"``.
    """
    session = [f"ses-{scan.session}"] if scan.session else []
    folder = output_dir.joinpath(f"sub-{scan.participant}", *session, "anat")
    return folder / f"{output_stem(scan, **entities)}_{suffix}{extension}"


def output_stem(scan: Scan, **entities: str) -> str:
    """Name a derivative without suffix and extension; else as `output_path`."""
    own, given = scan.entities.get("desc", ""), entities.get("desc", "")
    both = {"desc": own + given[:1].upper() + given[1:]} if own and given else {}
    return join_entities({**scan.named_entities, **entities, **both})
