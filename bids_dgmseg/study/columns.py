"""What the columns of the group tables mean: their BIDS data dictionary."""

from __future__ import annotations

from collections.abc import Mapping

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES

WIDE = ("volume_mm3", "mean_ppm")
"""Measures that have a wide table."""

_UNIT = "unit of the measure"

_LIMIT = "confidence limit, 95 %"

_TEXTS: Mapping[str, str] = {
    "participant_id": "Participant",
    "session_id": "Session",
    "acquisition": "Value of the acq entity of the map",
    "run": "Value of the run entity of the map",
    "model": "Model that segmented, the seg entity of the files; the name of the reference labels where labels says so",
    "reconstruction": "Value of the rec entity of the map",
    "description": "Value of the desc entity of the map",
    "ceagent": "Value of the ce entity of the map",
    "direction": "Value of the dir entity of the map",
    "resolution": "Value of the res entity of the map",
    "tree": "Output folder that the scan comes from",
    "site": "Site or scanner of the scan; Settings tell where it was found",
    "age_years": "Age at the scan as a number: the session's, else the participant's and the time since the first "
    "session; years",
    "reference": "Region whose susceptibility is 0 in the map, as the map's sidecar states it; in group_differences, "
    "the group that others are compared with",
    "page": "Page of the participant, from this folder",
    "nucleus": "Nucleus, of both sides",
    "measure": "Column of stats.tsv, or one made from it: _adjusted for size, _harmonized over sites",
    "left": f"Value of the patient's left side; {_UNIT}",
    "right": f"Value of the patient's right side; {_UNIT}",
    "asymmetry": "(left - right) / mean of both; n/a where a side is missing or below 0",
    "value": f"Value of the measure; {_UNIT}",
    "n_site": "Values of the same nucleus and site that are looked at together",
    "median": f"Their median; {_UNIT}",
    "robust_z": "(value - median) / (1.4826 median absolute deviation)",
    "outlier": "Whether the robust z is beyond 3.5 in either direction; false where there is none",
    "note": "Why something is missing, or what to mind",
    "labels": "predicted: the model's labels; reference: labels of the reference of dgmseg evaluate",
    "scans": "all, or only those with_reference labels",
    "curve": "exponential: alpha (1 - exp(-beta age)) + gamma; linear: alpha age + gamma; logarithmic: alpha ln(age) + "
    "gamma",
    "n": "Number of values used; in group_longitudinal, of participants with a change",
    "n_missing": "Number of values not used because the measure, the age or a covariate is missing",
    "n_participants": "Number of participants used",
    "age_min": "Age of the youngest used; years",
    "age_max": "Age of the oldest used; years",
    "alpha": f"Parameter of the curve; {_UNIT}, for the linear curve a year",
    "alpha_low": f"Lower {_LIMIT}",
    "alpha_high": f"Upper {_LIMIT}",
    "beta_per_year": "Rate of the exponential curve; 1/year",
    "beta_per_year_low": f"Lower {_LIMIT}",
    "beta_per_year_high": f"Upper {_LIMIT}",
    "gamma": f"Parameter of the curve; {_UNIT}",
    "gamma_low": f"Lower {_LIMIT}",
    "gamma_high": f"Upper {_LIMIT}",
    "std": f"Standard deviation of the residuals, or of the changes over participants; {_UNIT}",
    "r2": "Share of the variance that the curve explains",
    "aicc": "Akaike's information criterion for small samples",
    "delta_aicc": "aicc above that of the best curve",
    "best": "Whether the curve has the lowest aicc",
    "age": "Age; years",
    "fit": f"Value of the fitted curve; {_UNIT}",
    "low": f"Lower {_LIMIT}, of the curve",
    "high": f"Upper {_LIMIT}, of the curve",
    "prediction_low": "Lower limit of a further scan, 95 %",
    "prediction_high": "Upper limit of a further scan, 95 %",
    "control": "Whether the scan is of a control, by the filter in Settings",
    "adjusted": f"Value without the part that goes with the volume, by the controls' regression; {_UNIT}",
    "raw": f"Value as measured; {_UNIT}",
    "harmonized": f"Value without shift and scale of its site (ComBat); {_UNIT}",
    "site_variance_before": f"Variance of the sites' means after covariates, weighted by scans; {_UNIT} squared",
    "site_variance_after": "The same of the harmonized values",
    "reduction": "1 - site_variance_after / site_variance_before",
    "p_site_before": "p of the F-test of sites after covariates",
    "p_site_after": "The same of the harmonized values; descriptive, since the sites were fitted before",
    "n_unused": "Scans of the site without a value that could be used",
    "shift": f"What the site adds, by least squares; {_UNIT}",
    "scale": "Ratio of the site's spread to that of all, by least squares",
    "shift_bayes": f"What was taken out: the shift with empirical Bayes; {_UNIT}",
    "scale_bayes": "What was divided by: the scale with empirical Bayes",
    "group": "Group compared with the reference group",
    "n_reference": "Participants of the reference group used",
    "n_group": "Participants of the group used",
    "n_no_group": "Participants without a group",
    "n_scans": "Scans used; a participant's are averaged, or, for changes, regressed on time",
    "mean_reference": f"Mean of the reference group; {_UNIT}",
    "mean_group": f"Mean of the group; {_UNIT}",
    "std_reference": f"Standard deviation in the reference group; {_UNIT}",
    "std_group": f"Standard deviation in the group; {_UNIT}",
    "difference": f"Mean of the group minus that of the reference group; {_UNIT}",
    "difference_low": f"Lower {_LIMIT} (Welch)",
    "difference_high": f"Upper {_LIMIT} (Welch)",
    "t": "t statistic: Welch's between groups, else of the change or the adjusted difference",
    "df": "Degrees of freedom of t",
    "p_t": "Two-sided p of t",
    "q_t": "p_t adjusted over the nuclei and models (Benjamini-Hochberg)",
    "u": "Mann-Whitney's U of the group",
    "p_mannwhitney": "Two-sided p of U",
    "q_mannwhitney": "p_mannwhitney adjusted over the nuclei and models",
    "hedges_g": "Standardized difference without the bias of small samples",
    "hedges_g_low": f"Lower {_LIMIT} (noncentral t)",
    "hedges_g_high": f"Upper {_LIMIT} (noncentral t)",
    "p": "Two-sided p",
    "q": "p adjusted over the nuclei and models (Benjamini-Hochberg)",
    "f_groups": "F statistic of all groups together",
    "df_groups": "Its degrees of freedom in the numerator; those of the denominator are df",
    "p_groups": "p of f_groups",
    "q_groups": "p_groups adjusted over the nuclei and models",
    "partial_eta2": "Share of the variance not explained by the covariates that the groups explain",
    "n_single": "Participants without scans at two times",
    "years_median": "Median time between first and last scan; years",
    "change_per_year": "Slope of least squares over a participant's scans; in group_longitudinal their mean; "
    f"{_UNIT} a year",
    "change_low": f"Lower {_LIMIT}",
    "change_high": f"Upper {_LIMIT}",
    "years": "Time between first and last scan; years",
    "first": f"Value at the first scan; {_UNIT}",
    "n_warnings": "Number of warnings of the scan",
    "input_reconstructed_from": "What the program made the map of; n/a where the map was given",
    "reconstruction_n_echoes": "Number of echoes that the map was made of here; n/a where the map was given",
    "reconstruction_PhaseSign": "1 where phase grows with the field, -1 where it falls; n/a where the map was given",
    "reconstruction_PhaseSignFrom": "Where that was taken from",
    "reconstruction_BrainMask": "Mask of the brain in the reconstruction: the name of the user's, or by magnitude",
    "reconstruction_MagneticFieldStrength": "Main field in the reconstruction; T",
}

_ANCOVA = "ancova_"


def describe(column: str) -> Mapping[str, str]:
    """Describe a column of a group table, one of a wide table by its nucleus.

    >>> describe("DN_L_volume_mm3")["Description"]
    'left dentate nucleus: n_voxels times the volume of a voxel'
    """
    if column in STATS_COLUMNS:
        return STATS_COLUMNS[column]
    if column in _TEXTS:
        return {"Description": _TEXTS[column]}
    if (name := column.removeprefix(_ANCOVA)) in _TEXTS and name != column:
        return {"Description": f"At equal covariates (analysis of covariance): {_TEXTS[name]}"}
    names = {structure.abbreviation: structure.name for structure in STRUCTURES}
    for measure in WIDE:
        nucleus = column.removesuffix(f"_{measure}")
        if nucleus in names:
            entry = STATS_COLUMNS[measure]
            return {**entry, "Description": f"{names[nucleus]}: {entry['Description']}"}
    return {"Description": f"Value of {column} in the scan's files or file name"}
