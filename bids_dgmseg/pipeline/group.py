"""The group level: one table of all scans, from this program's own outputs."""

from __future__ import annotations

from bids_dgmseg.pipeline.progress import Progress
from bids_dgmseg.settings import Settings


def run_group(settings: Settings) -> int:
    """Write the long and the wide tables of all scans in the output directory.

    The input dataset lends its participants.tsv, if it has one; its images are not needed.

    Parameters
    ----------
    settings : Settings
        The run's options.

    Returns
    -------
    int
        0.

    Raises
    ------
    InputError
        If no scan has been measured yet, or participants.tsv cannot be used.
    """
    from bids_dgmseg.cohort.tables import write_group_tables

    participants = settings.bids_dir / "participants.tsv"
    tables = write_group_tables(settings.output_dir, participants if participants.is_file() else None)
    progress = Progress(0)
    if not participants.is_file():
        progress.warn(f"{settings.bids_dir.name}: no participants.tsv; the tables have no columns from it")
    for warning in tables.warnings:
        progress.warn(warning)
    for path in tables.paths:
        progress.say(str(path))
    return 0
