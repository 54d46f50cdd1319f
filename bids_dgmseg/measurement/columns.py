"""What the columns of ``_stats.tsv`` mean: their BIDS data dictionary."""

from __future__ import annotations

from collections.abc import Mapping

_LABEL = "voxels of the nucleus in the segmentation that were measured (not NaN)"

REGION_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "index": {"Description": "Value of the nucleus in the segmentation (dseg)"},
    "name": {"Description": "Name of the nucleus; left is the patient's left"},
    "abbreviation": {"Description": "Nucleus and side, such as DN_L"},
    "hemisphere": {"Description": "Side: L is the patient's left, R the right"},
    "n_voxels": {"Description": "Number of voxels of the nucleus in the segmentation"},
    "n_valid": {"Description": f"Number of the {_LABEL}"},
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
"""Of `bids_dgmseg.measurement.nuclei`: column → BIDS data dictionary entry, in the order of the table."""

_PART = "voxels more than one standard deviation above the mean of the nucleus"

HIGH_IRON_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "sem_ppm": {
        "Description": "Standard error of the mean susceptibility, voxels taken for independent; missing below two",
        "Units": "ppm",
    },
    "high_iron_threshold_ppm": {
        "Description": "Mean plus one standard deviation of the measured voxels of the nucleus",
        "Units": "ppm",
    },
    "high_iron_mean_ppm": {"Description": f"Mean susceptibility of the {_PART}", "Units": "ppm"},
    "high_iron_sem_ppm": {"Description": f"Standard error of the mean over the {_PART}", "Units": "ppm"},
    "high_iron_volume_mm3": {"Description": f"Number of the {_PART}, times the volume of a voxel", "Units": "mm^3"},
    "high_iron_fraction": {"Description": f"Share of the {_PART} among its measured voxels"},
}
"""Of `bids_dgmseg.measurement.nuclei`."""

COMPARED: Mapping[str, str] = {
    "volume_mm3": "volume_asymmetry",
    "volume_pv_mm3": "volume_pv_asymmetry",
    "mean_ppm": "mean_ppm_asymmetry",
    "mean_pv_ppm": "mean_pv_ppm_asymmetry",
}
"""Column of the measures → column of its asymmetry index."""

ASYMMETRY_COLUMNS: Mapping[str, Mapping[str, str]] = {
    name: {
        "Description": f"Asymmetry of {column}: (left - right) / mean of both, from -2 to 2, the same on the rows of "
        "both sides; missing where a side is missing or below 0"
    }
    for column, name in COMPARED.items()
}
"""Of `bids_dgmseg.measurement.asymmetry`."""

REFERENCED: Mapping[str, str] = {
    "mean_ppm": "mean_ref_ppm",
    "median_ppm": "median_ref_ppm",
    "p05_ppm": "p05_ref_ppm",
    "p25_ppm": "p25_ref_ppm",
    "p75_ppm": "p75_ref_ppm",
    "p95_ppm": "p95_ref_ppm",
    "mean_pv_ppm": "mean_pv_ref_ppm",
    "core_mean_ppm": "core_mean_ref_ppm",
    "high_iron_mean_ppm": "high_iron_mean_ref_ppm",
}
"""Susceptibility → the same minus that of the reference region."""

REFERENCE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    **{
        name: {"Description": f"{column} minus the mean susceptibility of the reference region", "Units": "ppm"}
        for column, name in REFERENCED.items()
    },
    "mass_ref_ppm_mm3": {
        "Description": "mass_ppm_mm3 minus the mean susceptibility of the reference region times the volume of the "
        "measured voxels",
        "Units": "ppm mm^3",
    },
}
"""Of `bids_dgmseg.measurement.reference`; they are there where a reference was asked for."""

QUALITY_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "n_components": {"Description": "Parts of the nucleus, connected over faces, edges or corners of voxels"},
    "mean_entropy_bits": {
        "Description": "Mean binary entropy of the probability of the nucleus over its voxels: 0 is certain, 1 a coin",
        "Units": "bit",
    },
    "mass_outside_fraction": {
        "Description": "Share of the sum of the probabilities of the nucleus that lies outside its voxels",
    },
    "expected_dice": {
        "Description": "Dice to be expected with the true nucleus if the probabilities hold: twice the sum over the "
        "voxels of the nucleus, over their number plus the sum over all voxels",
    },
    "rim_contrast_ppm": {
        "Description": "Median susceptibility of the nucleus minus that of the voxels 1 to 3 mm from it that belong "
        "to no nucleus",
        "Units": "ppm",
    },
    "boundary_gradient_ppm_per_mm": {
        "Description": "Mean change of susceptibility across the surface towards the inside, weighted by area; "
        "surfaces shared with other nuclei are left out",
        "Units": "ppm/mm",
    },
    "edge_distance_mm": {
        "Description": "Smallest gap between a voxel of the nucleus and the end of what was measured; 0 is touching",
        "Units": "mm",
    },
}
"""Of `bids_dgmseg.measurement.confidence`."""

Z_COLUMNS: Mapping[str, str] = {"volume_mm3": "volume_z", "mean_ppm": "mean_ppm_z"}
"""Column of the measures → column of its z-score."""

_NORM_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "volume_z": {
        "Description": "Standard deviations of volume_mm3 from the mean in the literature (norms.tsv); missing where "
        "it has none"
    },
    "mean_ppm_z": {
        "Description": "Standard deviations of the mean susceptibility from that in the literature (norms.tsv), "
        "CSF-referenced where the run was; missing where map and norm are known to have different references"
    },
}

_RATING_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "rating": {"Description": "QC rating of the nucleus: green, amber or red, the worst of all rules"},
    "reasons": {"Description": "Why the rating is not green, the worst first, separated by semicolons"},
}

STATS_COLUMNS: Mapping[str, Mapping[str, str]] = {
    **REGION_COLUMNS,
    **HIGH_IRON_COLUMNS,
    **REFERENCE_COLUMNS,
    **ASYMMETRY_COLUMNS,
    **QUALITY_COLUMNS,
    **_NORM_COLUMNS,
    **_RATING_COLUMNS,
}
"""Column → BIDS data dictionary entry, in the order of the table."""
