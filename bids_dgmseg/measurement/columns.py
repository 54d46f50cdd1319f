"""Columns of ``_stats.tsv`` with their BIDS data dictionary, which is ``data/columns_stats.tsv``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bids_dgmseg.io.files import DataDictionary, read_data_dictionaries

_DICTIONARIES = read_data_dictionaries("stats")

STATS_COLUMNS: DataDictionary = {name: entry for table in _DICTIONARIES.values() for name, entry in table.items()}
"""All columns of ``_stats.tsv``, in order."""

NUCLEUS_COLUMNS = _DICTIONARIES["nucleus"]
"""Columns of `bids_dgmseg.measurement.nuclei.measure_nuclei`, in order."""

HIGH_IRON_COLUMNS = _DICTIONARIES["high_iron"]
"""Columns of `bids_dgmseg.measurement.nuclei.measure_high_iron`."""

R2STAR_COLUMNS = _DICTIONARIES["r2star"]
"""Columns of `bids_dgmseg.measurement.nuclei.measure_r2star`; present if the map is made of several echoes."""

REFERENCE_COLUMNS = _DICTIONARIES["reference"]
"""Columns of `bids_dgmseg.measurement.scan`; present if a reference region was requested."""

CONFIDENCE_COLUMNS = _DICTIONARIES["confidence"]
"""Columns of `bids_dgmseg.measurement.rating`."""

EDIT_COLUMNS = _DICTIONARIES["edited"]
"""Columns of scans whose labels were edited by hand."""

PLACEMENT_COLUMNS = _DICTIONARIES["placement"]
"""Columns of `bids_dgmseg.measurement.placement`."""

SESSION_COLUMNS = _DICTIONARIES["sessions"]
"""Columns of `bids_dgmseg.measurement.volume_change`, of scans that were labelled together with other sessions."""

EXCLUSION_COLUMNS = _DICTIONARIES["excluded"]
"""Columns of scans of which voxels were excluded by a mask."""

BLOB_COLUMNS = _DICTIONARIES["blobs"]
"""Columns of `bids_dgmseg.measurement.blobs`."""

SAMPLED_MEASURES: Mapping[str, str] = {"mean": "Mean", "median": "Median", "std": "Standard deviation (n - 1)"}
"""Measures of further maps in the nuclei."""

_SAMPLED = re.compile(rf"(.+)_(n_valid|{'|'.join(SAMPLED_MEASURES)})(?:_([a-z0-9_]+))?")


def describe_sampled(column: str) -> Mapping[str, str] | None:
    """Return the data dictionary entry of a measure of a further map; None if the column is none.

    >>> describe_sampled("R2starmap_mean_per_s")
    {'Description': 'Mean of R2starmap over the valid voxels of the nucleus', 'Units': '1/s'}
    """
    match = _SAMPLED.fullmatch(column)
    if column in STATS_COLUMNS or not match:
        return None
    name, measure, unit = match.groups()
    if measure == "n_valid":
        return {"Description": f"Voxels of the nucleus with a value of {name}"}
    shown = f"{name} (|chi-|, positive)" if name.startswith("diamagnetic_") else name
    units = {"Units": spell_unit(unit)} if unit else {}
    return {"Description": f"{SAMPLED_MEASURES[measure]} of {shown} over the valid voxels of the nucleus", **units}


def spell_unit(unit: str) -> str:
    """Return a unit at the end of a column's name as it is read.

    >>> spell_unit("per_s"), spell_unit("ml_per_100g_per_min"), spell_unit("ppm")
    ('1/s', 'ml/100g/min', 'ppm')
    """
    return unit.replace("_per_", "/").replace("per_", "1/")


ASYMMETRY_OF: Mapping[str, str] = {
    "volume_mm3": "volume_asymmetry",
    "volume_pv_mm3": "volume_pv_asymmetry",
    "mean_ppm": "mean_ppm_asymmetry",
    "mean_pv_ppm": "mean_pv_ppm_asymmetry",
}
"""Measure → column of its asymmetry index."""

REFERENCED: Mapping[str, str] = {
    name.replace("_ref_ppm", "_ppm"): name for name in REFERENCE_COLUMNS if name.endswith("_ref_ppm")
}
"""Susceptibility → the same relative to the reference region."""

Z_SCORE_OF: Mapping[str, str] = {"volume_mm3": "volume_z", "mean_ppm": "mean_ppm_z"}
"""Measure → column of its z-score."""
