"""BIDS data dictionary of the group tables."""

from __future__ import annotations

from collections.abc import Mapping

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES

WIDE = ("volume_mm3", "mean_ppm")
"""Measures that have a wide table."""

_UNIT = "unit of the measure"

_LIMIT = "95 % confidence limit"

_ANCOVA = "ancova_"

_DESCRIPTIONS: Mapping[str, str] = {
    "participant_id": "Participant",
    "session_id": "Session",
    "acquisition": "Entity acq of the map",
    "run": "Entity run of the map",
    "model": "Segmentation model (entity seg); the name of the reference segmentation if labels is reference",
    "reconstruction": "Entity rec of the map",
    "description": "Entity desc of the map",
    "ceagent": "Entity ce of the map",
    "direction": "Entity dir of the map",
    "resolution": "Entity res of the map",
    "dataset": "Output folder that the scan comes from",
    "site": "Site or scanner of the scan; SiteFrom in Settings is its source",
    "age_years": "Age at the scan in years: that of the session, otherwise that of the participant plus the time since "
    "the first session",
    "reference": "Reference region: where the susceptibility of the map is 0, according to its sidecar; in "
    "group_differences, the reference group",
    "page": "Page of the participant, relative to this folder",
    "nucleus": "Nucleus, both sides",
    "measure": "Column of _stats.tsv; _adjusted: adjusted for volume, _harmonized: harmonized across sites",
    "left": f"Value on the patient's left; {_UNIT}",
    "right": f"Value on the patient's right; {_UNIT}",
    "asymmetry": "(left - right) / mean of both; n/a if a side is missing or negative",
    "value": f"Value of the measure; {_UNIT}",
    "n_site": "Number of values of the same nucleus and site",
    "median": f"Median of these values; {_UNIT}",
    "robust_z": "(value - median) / (1.4826 median absolute deviation)",
    "outlier": "Whether the absolute robust z exceeds 3.5; false if it is missing",
    "note": "Why a value is missing, or how it is limited",
    "labels": "predicted: labels of the model; reference: reference segmentation given to dgmseg evaluate",
    "scans": "all: all scans; with_reference: scans with a reference segmentation",
    "curve": "exponential: alpha (1 - exp(-beta age)) + gamma; linear: alpha age + gamma; logarithmic: alpha ln(age) + "
    "gamma",
    "n": "Number of values used; in group_longitudinal, number of participants with a change",
    "n_missing": "Number of values not used because the measure, the age or a covariate is missing",
    "n_participants": "Number of participants used",
    "age_min": "Lowest age used; years",
    "age_max": "Highest age used; years",
    "alpha": f"Parameter of the curve; {_UNIT}, of the linear curve per year",
    "alpha_low": f"Lower {_LIMIT}",
    "alpha_high": f"Upper {_LIMIT}",
    "beta_per_year": "Rate of the exponential curve; 1/year",
    "beta_per_year_low": f"Lower {_LIMIT}",
    "beta_per_year_high": f"Upper {_LIMIT}",
    "gamma": f"Parameter of the curve; {_UNIT}",
    "gamma_low": f"Lower {_LIMIT}",
    "gamma_high": f"Upper {_LIMIT}",
    "std": f"Standard deviation of the residuals, or of the participants' changes; {_UNIT}",
    "r2": "Coefficient of determination",
    "aicc": "Akaike information criterion, corrected for small samples",
    "delta_aicc": "aicc minus that of the best curve",
    "best": "Whether the curve has the lowest aicc",
    "age": "Age; years",
    "fit": f"Value of the fitted curve; {_UNIT}",
    "low": f"Lower {_LIMIT} of the curve",
    "high": f"Upper {_LIMIT} of the curve",
    "prediction_low": "Lower 95 % prediction limit for a further scan",
    "prediction_high": "Upper 95 % prediction limit for a further scan",
    "control": "Whether the scan is of a control; ControlFilter in Settings is the filter",
    "adjusted": f"Value adjusted for volume by the controls' regression; {_UNIT}",
    "raw": f"Value before harmonization; {_UNIT}",
    "harmonized": f"Value without the shift and scale of its site (ComBat); {_UNIT}",
    "site_variance_before": f"Variance of the site means after covariates, weighted by scans; {_UNIT} squared",
    "site_variance_after": "The same for the harmonized values",
    "reduction": "1 - site_variance_after / site_variance_before",
    "p_site_before": "p value of the F test for sites after covariates",
    "p_site_after": "The same for the harmonized values; descriptive only, since the site effects were fitted",
    "n_unused": "Number of scans of the site without a usable value",
    "shift": f"Additive site effect, least squares; {_UNIT}",
    "scale": "Multiplicative site effect, least squares",
    "shift_bayes": f"Additive site effect that was removed, empirical Bayes; {_UNIT}",
    "scale_bayes": "Multiplicative site effect that was removed, empirical Bayes",
    "group": "Group compared with the reference group",
    "n_reference": "Number of participants of the reference group used",
    "n_group": "Number of participants of the group used",
    "n_no_group": "Number of participants without a group",
    "n_scans": "Number of scans used; scans of a participant are averaged, or, for changes, regressed on time",
    "mean_reference": f"Mean of the reference group; {_UNIT}",
    "mean_group": f"Mean of the group; {_UNIT}",
    "std_reference": f"Standard deviation in the reference group; {_UNIT}",
    "std_group": f"Standard deviation in the group; {_UNIT}",
    "difference": f"Mean of the group minus mean of the reference group; {_UNIT}",
    "difference_low": f"Lower {_LIMIT} (Welch)",
    "difference_high": f"Upper {_LIMIT} (Welch)",
    "t": "t statistic: Welch's between groups, otherwise of the change or the adjusted difference",
    "df": "Degrees of freedom of t",
    "p_t": "Two-sided p value of t",
    "q_t": "p_t corrected over nuclei and models (Benjamini-Hochberg)",
    "u": "Mann-Whitney U of the group",
    "p_mannwhitney": "Two-sided p value of U",
    "q_mannwhitney": "p_mannwhitney corrected over nuclei and models",
    "hedges_g": "Hedges' g: standardized difference, corrected for small samples",
    "hedges_g_low": f"Lower {_LIMIT} (noncentral t)",
    "hedges_g_high": f"Upper {_LIMIT} (noncentral t)",
    "p": "Two-sided p value",
    "q": "p corrected over nuclei and models (Benjamini-Hochberg)",
    "f_groups": "F statistic for all groups together",
    "df_groups": "Its degrees of freedom in the numerator; those in the denominator are df",
    "p_groups": "p value of f_groups",
    "q_groups": "p_groups corrected over nuclei and models",
    "partial_eta2": "Partial eta squared of the groups",
    "n_single": "Number of participants without scans at two times",
    "years_median": "Median time between first and last scan; years",
    "change_per_year": "Least-squares slope over a participant's scans; in group_longitudinal the mean of the slopes; "
    f"{_UNIT} per year",
    "change_low": f"Lower {_LIMIT}",
    "change_high": f"Upper {_LIMIT}",
    "years": "Time between first and last scan; years",
    "first": f"Value at the first scan; {_UNIT}",
    "n_warnings": "Number of warnings about the scan",
    "input_reconstructed_from": "What the map was reconstructed from here; n/a if the map was given",
    "reconstruction_n_echoes": "Number of echoes that the map was reconstructed from; n/a if the map was given",
    "reconstruction_PhaseSign": "1 if the phase increases with the field, -1 if it decreases; n/a if the map was given",
    "reconstruction_PhaseSignFrom": "How the sign of the phase was determined",
    "reconstruction_BrainMask": "Brain mask of the reconstruction: its file name, or by magnitude",
    "reconstruction_MagneticFieldStrength": "Field strength assumed in the reconstruction; T",
}


def describe(column: str) -> Mapping[str, str]:
    """Return the data dictionary entry of a column of a group table.

    >>> describe("DN_L_volume_mm3")["Description"].partition(":")[0]
    'left dentate nucleus'
    """
    if column in STATS_COLUMNS:
        return STATS_COLUMNS[column]
    if column in _DESCRIPTIONS:
        return {"Description": _DESCRIPTIONS[column]}
    if (name := column.removeprefix(_ANCOVA)) in _DESCRIPTIONS and name != column:
        return {"Description": f"At equal covariates (ANCOVA): {_DESCRIPTIONS[name]}"}
    names = {structure.abbreviation: structure.name for structure in STRUCTURES}
    for measure in WIDE:
        nucleus = column.removesuffix(f"_{measure}")
        if nucleus in names:
            entry = STATS_COLUMNS[measure]
            return {**entry, "Description": f"{names[nucleus]}: {entry['Description']}"}
    return {"Description": f"Value of {column} in the scan's files or file name"}
