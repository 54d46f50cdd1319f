"""BIDS data dictionary of ``_stats.tsv``: column → description and units."""

from __future__ import annotations

from collections.abc import Mapping

Dictionary = Mapping[str, Mapping[str, str]]

_VALID = "the valid voxels of the nucleus (labelled, and finite in the map)"

NUCLEUS_COLUMNS: Dictionary = {
    "index": {"Description": "Value of the nucleus in the segmentation (dseg)"},
    "name": {"Description": "Name of the nucleus; left is the patient's left"},
    "abbreviation": {"Description": "Nucleus and hemisphere, such as DN_L"},
    "hemisphere": {"Description": "L for the patient's left, R for the right"},
    "n_voxels": {"Description": "Number of voxels of the nucleus in the segmentation"},
    "n_valid": {"Description": f"Number of {_VALID}"},
    "volume_mm3": {"Description": "n_voxels times the voxel volume", "Units": "mm^3"},
    "volume_pv_mm3": {
        "Description": "Sum of the probabilities of the nucleus over the image times the voxel volume, "
        "so that voxels at its boundary count in part",
        "Units": "mm^3",
    },
    "mean_ppm": {"Description": f"Mean susceptibility of {_VALID}", "Units": "ppm"},
    "median_ppm": {"Description": f"Median susceptibility of {_VALID}", "Units": "ppm"},
    "std_ppm": {
        "Description": f"Standard deviation (n - 1 in the denominator) of the susceptibility of {_VALID}; "
        "missing for fewer than two voxels",
        "Units": "ppm",
    },
    "p05_ppm": {"Description": f"5th percentile (linear interpolation) of {_VALID}", "Units": "ppm"},
    "p25_ppm": {"Description": f"25th percentile of {_VALID}", "Units": "ppm"},
    "p75_ppm": {"Description": f"75th percentile of {_VALID}", "Units": "ppm"},
    "p95_ppm": {"Description": f"95th percentile of {_VALID}", "Units": "ppm"},
    "mean_pv_ppm": {
        "Description": "Mean susceptibility of the valid voxels of the image, weighted by the probability of the "
        "nucleus",
        "Units": "ppm",
    },
    "core_mean_ppm": {
        "Description": "Mean susceptibility of the core of the nucleus: voxels whose centre is farther than 1 mm, and "
        "than 1.2 times the shortest voxel edge, from the centre of every voxel outside the nucleus",
        "Units": "ppm",
    },
    "mass_ppm_mm3": {
        "Description": f"Sum of the susceptibilities of {_VALID} times the voxel volume",
        "Units": "ppm mm^3",
    },
    "mean_probability": {"Description": "Mean probability of the nucleus over its voxels in the segmentation"},
}
"""Columns of `bids_dgmseg.measurement.nuclei.measure_nuclei`, in order."""

_HIGH = "the valid voxels more than one standard deviation above the mean of the nucleus"

HIGH_IRON_COLUMNS: Dictionary = {
    "sem_ppm": {
        "Description": "Standard error of the mean susceptibility, with voxels counted as independent; missing for "
        "fewer than two voxels",
        "Units": "ppm",
    },
    "high_iron_threshold_ppm": {
        "Description": "Mean plus one standard deviation of the valid voxels of the nucleus",
        "Units": "ppm",
    },
    "high_iron_mean_ppm": {"Description": f"Mean susceptibility of {_HIGH}", "Units": "ppm"},
    "high_iron_sem_ppm": {"Description": f"Standard error of the mean of {_HIGH}", "Units": "ppm"},
    "high_iron_volume_mm3": {"Description": f"Number of {_HIGH}, times the voxel volume", "Units": "mm^3"},
    "high_iron_fraction": {"Description": f"Number of {_HIGH}, divided by n_valid"},
}
"""Columns of `bids_dgmseg.measurement.nuclei.measure_high_iron`."""

ASYMMETRY_OF: Mapping[str, str] = {
    "volume_mm3": "volume_asymmetry",
    "volume_pv_mm3": "volume_pv_asymmetry",
    "mean_ppm": "mean_ppm_asymmetry",
    "mean_pv_ppm": "mean_pv_ppm_asymmetry",
}
"""Measure → column of its asymmetry index."""

_ASYMMETRY_COLUMNS: Dictionary = {
    name: {
        "Description": f"Asymmetry index of {column}: (left - right) / mean of both, from -2 to 2; the same in both "
        "rows of a nucleus; missing if either value is missing or below 0"
    }
    for column, name in ASYMMETRY_OF.items()
}

REFERENCED: Mapping[str, str] = {
    column: column.replace("_ppm", "_ref_ppm")
    for column in (
        "mean_ppm",
        "median_ppm",
        "p05_ppm",
        "p25_ppm",
        "p75_ppm",
        "p95_ppm",
        "mean_pv_ppm",
        "core_mean_ppm",
        "high_iron_mean_ppm",
    )
}
"""Susceptibility → the same relative to the reference region."""

REFERENCE_COLUMNS: Dictionary = {
    **{
        name: {"Description": f"{column} minus the mean susceptibility of the reference region", "Units": "ppm"}
        for column, name in REFERENCED.items()
    },
    "mass_ref_ppm_mm3": {
        "Description": "mass_ppm_mm3 minus the mean susceptibility of the reference region times the volume of the "
        "valid voxels",
        "Units": "ppm mm^3",
    },
}
"""Columns of `bids_dgmseg.measurement.reference`; present if a reference region was requested."""

CONFIDENCE_COLUMNS: Dictionary = {
    "n_components": {"Description": "Number of 26-connected components of the nucleus"},
    "mean_entropy_bits": {
        "Description": "Mean binary entropy of the probability of the nucleus over its voxels, from 0 (certain) to 1",
        "Units": "bit",
    },
    "mass_outside_fraction": {
        "Description": "Fraction of the summed probability of the nucleus that lies outside its voxels",
    },
    "expected_dice": {
        "Description": "Dice coefficient with the true nucleus that is expected if the probabilities are calibrated: "
        "twice the sum over the voxels of the nucleus, divided by their number plus the sum over all voxels",
    },
    "rim_contrast_ppm": {
        "Description": "Median susceptibility of the nucleus minus that of the voxels 1 to 3 mm away that belong to no "
        "nucleus",
        "Units": "ppm",
    },
    "boundary_gradient_ppm_per_mm": {
        "Description": "Mean inward gradient of the susceptibility across the surface, weighted by area; faces shared "
        "with other nuclei are excluded",
        "Units": "ppm/mm",
    },
    "edge_distance_mm": {
        "Description": "Shortest distance between a voxel of the nucleus and the edge of the field of view (the region "
        "of valid voxels); 0 if they touch",
        "Units": "mm",
    },
}
"""Columns of `bids_dgmseg.measurement.confidence`."""

Z_SCORE_OF: Mapping[str, str] = {"volume_mm3": "volume_z", "mean_ppm": "mean_ppm_z"}
"""Measure → column of its z-score."""

STATS_COLUMNS: Dictionary = {
    **NUCLEUS_COLUMNS,
    **HIGH_IRON_COLUMNS,
    **REFERENCE_COLUMNS,
    **_ASYMMETRY_COLUMNS,
    **CONFIDENCE_COLUMNS,
    "volume_z": {"Description": "z-score of volume_mm3 relative to the norms (norms.tsv); missing without a norm"},
    "mean_ppm_z": {
        "Description": "z-score of the mean susceptibility (relative to CSF if the run used CSF as reference region) "
        "relative to the norms (norms.tsv); missing if the map and the norm are known to have different references"
    },
    "rating": {"Description": "QC rating of the nucleus: green, amber or red, the worst of all rules"},
    "reasons": {"Description": "Why the rating is not green, worst first, separated by semicolons"},
}
"""All columns of ``_stats.tsv``, in order."""
