"""What the columns of ``_stats.tsv`` mean: their BIDS data dictionary."""

from __future__ import annotations

from collections.abc import Mapping

_LABEL = "voxels of the nucleus in the segmentation that were measured (not NaN)"

STATS_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "index": {"Description": "Value of the nucleus in the segmentation (dseg)"},
    "name": {"Description": "Name of the nucleus; left is the patient's left"},
    "abbreviation": {"Description": "Nucleus and side, such as DN_L"},
    "hemisphere": {"Description": "Side: L is the patient's left, R the right"},
    "n_voxels": {"Description": "Number of voxels of the nucleus in the segmentation"},
    "volume_mm3": {"Description": "n_voxels times the volume of a voxel", "Units": "mm^3"},
    "volume_pv_mm3": {
        "Description": "Sum of the probabilities of the nucleus over the image times the volume of a voxel, "
        "so that a voxel at its edge counts in part",
        "Units": "mm^3",
    },
    "mean_ppm": {"Description": f"Mean susceptibility of the {_LABEL}", "Units": "ppm"},
    "median_ppm": {"Description": f"Median susceptibility of the {_LABEL}", "Units": "ppm"},
    "std_ppm": {
        "Description": f"Standard deviation (n - 1 in the denominator) of the susceptibility of the {_LABEL}; "
        "missing below two voxels",
        "Units": "ppm",
    },
    "p05_ppm": {"Description": f"5th percentile (linear interpolation) of the {_LABEL}", "Units": "ppm"},
    "p25_ppm": {"Description": f"25th percentile of the {_LABEL}", "Units": "ppm"},
    "p75_ppm": {"Description": f"75th percentile of the {_LABEL}", "Units": "ppm"},
    "p95_ppm": {"Description": f"95th percentile of the {_LABEL}", "Units": "ppm"},
    "mean_pv_ppm": {
        "Description": "Mean susceptibility of the measured voxels of the image, each weighted with its probability "
        "of the nucleus",
        "Units": "ppm",
    },
    "core_mean_ppm": {
        "Description": "Mean susceptibility of the voxels deep inside the nucleus: farther from every voxel that is "
        "not of it than 1 mm and than 1.2 times the shortest edge of a voxel (centre to centre)",
        "Units": "ppm",
    },
    "mass_ppm_mm3": {
        "Description": f"Sum of the susceptibilities of the {_LABEL} times the volume of a voxel",
        "Units": "ppm mm^3",
    },
    "mean_probability": {"Description": "Mean probability of the nucleus over its voxels in the segmentation"},
}
"""Column → BIDS data dictionary entry, in the order of the table."""
