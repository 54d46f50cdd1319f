"""BIDS data dictionaries of the tables of ``dgmseg evaluate`` and of the model benchmark, in the order of columns."""

from __future__ import annotations

from collections.abc import Mapping

from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

Columns = Mapping[str, Mapping[str, str]]
"""Column → entry of the data dictionary."""

QUANTITIES: Mapping[str, str] = {"volume_mm3": "mm^3", "mean_ppm": "ppm"}
"""Quantity that raters are compared by → unit."""

BENCHMARK_MEASURES = (
    "dice",
    "jaccard",
    "hausdorff_mm",
    "hd95_mm",
    "mean_surface_distance_mm",
    "centre_distance_mm",
    "volume_similarity",
    "volume_difference_percent",
)
"""Measures of overlap in the benchmark's table per nucleus."""

BENCHMARK_ESTIMATES = ("mean_reference", "mean_prediction", "pearson_r", "icc21", "bias", "loa_lower", "loa_upper")
"""Estimates of agreement in the same table, for each of `QUANTITIES`."""

_UNIT = "unit of the quantity"

_TOO_FEW = "n/a with too few scans or no variation"

_PAIR: Columns = {
    "reference": {"Description": "Reference, or the first of two raters"},
    "prediction": {"Description": "Prediction, or the second of two raters"},
}

_NUCLEUS: Columns = {"abbreviation": {"Description": "Nucleus and side, such as DN_L; left is the patient's left"}}

_COUNT: Columns = {
    "n": {"Description": "Number of scans in which all raters compared have a value"},
    "n_missing": {"Description": "Number of scans in which a rater has no value, for example no voxel of the nucleus"},
}

_QUANTITY: Columns = {
    "quantity": {"Description": "volume_mm3: volume in mm^3; mean_ppm: mean susceptibility of the label in ppm"}
}

_ICC: Columns = {
    f"{name}{suffix}": {"Description": f"{what}{meaning}"}
    for name, what in (
        ("icc11", "ICC(1,1), one-way random effects, single rating"),
        ("icc21", "ICC(2,1), two-way random effects, absolute agreement, single rating"),
        ("icc31", "ICC(3,1), two-way mixed effects, consistency, single rating"),
    )
    for suffix, meaning in (
        ("", f" (Shrout and Fleiss 1979); {_TOO_FEW}"),
        ("_low", ": lower 95 % confidence limit"),
        ("_high", ": upper 95 % confidence limit"),
        ("_p", ": p value of the F test against 0"),
    )
}

_TESTS: Columns = {
    "t": {"Description": f"Paired Student's t (second minus first); {_TOO_FEW}"},
    "t_p": {"Description": "Two-sided p value of t"},
    "t_p_bonferroni": {"Description": "t_p with Bonferroni correction over the nuclei and pairs of the first column"},
    "t_p_holm": {"Description": "t_p with Holm correction over the same tests"},
    "wilcoxon_w": {"Description": "Wilcoxon signed-rank statistic (smaller rank sum, zeros excluded)"},
    "wilcoxon_p": {"Description": "Two-sided p value of wilcoxon_w"},
    "wilcoxon_p_bonferroni": {"Description": "wilcoxon_p with Bonferroni correction over the same tests"},
    "wilcoxon_p_holm": {"Description": "wilcoxon_p with Holm correction over the same tests"},
    "tukey_p": {
        "Description": "p value of the pair in Tukey's honestly significant difference test, all raters taken as "
        "independent groups; n/a with two raters in agreement.tsv"
    },
}

_VARIANCE: Columns = {
    "anova_f": {"Description": "F of one-way ANOVA, raters taken as independent groups"},
    "anova_p": {"Description": "p value of anova_f"},
    "repeated_f": {"Description": "F of repeated-measures ANOVA over the scans"},
    "repeated_p": {"Description": "p value of repeated_f, assuming sphericity"},
    "repeated_epsilon": {"Description": "Greenhouse-Geisser epsilon"},
    "repeated_p_corrected": {"Description": "p value of repeated_f with Greenhouse-Geisser correction"},
}


def _with_interval(name: str, what: str, units: str = "") -> Columns:
    unit = {"Units": units} if units else {}
    return {
        name: {"Description": f"{what}; {_TOO_FEW}", **unit},
        f"{name}_low": {"Description": f"Lower 95 % confidence limit of {name}", **unit},
        f"{name}_high": {"Description": f"Upper 95 % confidence limit of {name}", **unit},
    }


OVERLAP_TABLE_COLUMNS: Columns = {
    "participant_id": {"Description": "Participant"},
    "session_id": {"Description": "Session"},
    "scan": {"Description": "Entities of the scan that the segmentations share"},
    **_PAIR,
    **{name: entry for name, entry in OVERLAP_COLUMNS.items() if name != "index"},
    **{
        f"mean_{side}_ppm": {
            "Description": f"Mean susceptibility of the valid voxels of the nucleus in the {side}; n/a without a map",
            "Units": "ppm",
        }
        for side in ("reference", "prediction")
    },
}
"""overlap.tsv"""

SUMMARY_COLUMNS: Columns = {
    **_PAIR,
    **_NUCLEUS,
    "measure": {"Description": "Column of overlap.tsv"},
    **_COUNT,
    **{
        name: {"Description": f"{what} over the scans", "Units": "unit of the measure"}
        for name, what in (
            ("mean", "Mean"),
            ("sd", "Standard deviation (n - 1)"),
            ("median", "Median"),
            ("minimum", "Minimum"),
            ("maximum", "Maximum"),
        )
    },
}
"""overlap_summary.tsv"""

AGREEMENT_COLUMNS: Columns = {
    **_QUANTITY,
    **_NUCLEUS,
    **_PAIR,
    **_COUNT,
    "mean_reference": {"Description": "Mean of the reference over these scans", "Units": _UNIT},
    "mean_prediction": {"Description": "Mean of the prediction over these scans", "Units": _UNIT},
    **_with_interval("pearson_r", "Pearson correlation (interval by Fisher's z)"),
    "pearson_r_p": {"Description": "Two-sided p value of pearson_r"},
    **_with_interval("spearman_rho", "Spearman rank correlation (interval of Bonett and Wright 2000)"),
    "spearman_rho_p": {"Description": "Two-sided p value of spearman_rho"},
    **_ICC,
    **_with_interval("bias", "Mean of prediction minus reference", _UNIT),
    **_with_interval("loa_lower", "Lower limit of agreement, bias - 1.96 SD (Bland and Altman 1999)", _UNIT),
    **_with_interval("loa_upper", "Upper limit of agreement, bias + 1.96 SD", _UNIT),
    "sd_difference": {"Description": "Standard deviation of prediction minus reference (n - 1)", "Units": _UNIT},
    **_TESTS,
}
"""agreement.tsv"""

RATERS_COLUMNS: Columns = {
    **_QUANTITY,
    **_NUCLEUS,
    "raters": {"Description": "Raters compared"},
    "k": {"Description": "Number of raters"},
    **_COUNT,
    **_ICC,
    **_VARIANCE,
}
"""raters.tsv"""

METHODS_COLUMNS: Columns = {
    "measure": {"Description": "Measure of overlap with the reference, a column of overlap.tsv"},
    **_NUCLEUS,
    "first": {"Description": "First prediction"},
    "second": {"Description": "Second prediction"},
    **_COUNT,
    "mean_first": {"Description": "Mean of the measure for the first", "Units": "unit of the measure"},
    "mean_second": {"Description": "Mean of the measure for the second", "Units": "unit of the measure"},
    "mean_difference": {"Description": "mean_second minus mean_first", "Units": "unit of the measure"},
    **_TESTS,
    **_VARIANCE,
}
"""methods.tsv"""


def _overlap_entry(measure: str, *, sd: bool) -> Mapping[str, str]:
    entry = OVERLAP_COLUMNS[measure]
    statistic = "Standard deviation (n - 1)" if sd else "Mean"
    return {**entry, "Description": f"{statistic} over the scans of: {entry['Description']}"}


def _agreement_entry(quantity: str, estimate: str) -> Mapping[str, str]:
    what = "volume" if quantity == "volume_mm3" else "mean susceptibility of the label"
    unit = {} if estimate in ("pearson_r", "icc21") else {"Units": QUANTITIES[quantity]}
    return {"Description": f"Of the {what}: {AGREEMENT_COLUMNS[estimate]['Description']}", **unit}


_MODEL: Columns = {"model": {"Description": "Model, the name of its folder in predictions"}}

COST_COLUMNS: Columns = {
    "seconds": {"Description": "Time from the map in memory to its labels, including reading weights", "Units": "s"},
    "cpu_seconds": {"Description": "CPU time of all threads", "Units": "s"},
    "peak_mb": {"Description": "Peak resident memory of the process", "Units": "MB"},
}
"""Computational cost of a scan."""

MODELS_COLUMNS: Columns = {
    **_MODEL,
    "n_nuclei": {"Description": "Number of nuclei of the model, left and right separately"},
    "n_compared": {"Description": "Number of these that any reference segmentation has; means are over these"},
    "n_scans": {"Description": "Number of scans segmented"},
    "n_failed": {"Description": "Number of scans that could not be segmented"},
    "dice": {"Description": "Mean Dice over scans and nuclei of the reference segmentations"},
    "dice_least": {"Description": "Minimum of these"},
    "hd95_mm": {"Description": "Mean HD95 over the same, if both have the nucleus", "Units": "mm"},
    "n_missed": {"Description": "Number of nuclei over all scans that the reference has and the model has not"},
    **{
        name: {**entry, "Description": f"{statistic} of: {entry['Description']}"}
        for (name, entry), statistic in zip(COST_COLUMNS.items(), ("Median", "Median", "Maximum"), strict=True)
    },
}
"""models.tsv of the benchmark"""

NUCLEI_COLUMNS: Columns = {
    **_MODEL,
    **_NUCLEUS,
    "n": {"Description": "Number of scans whose reference or prediction has the nucleus"},
    **{
        f"{measure}{'_sd' * sd}": _overlap_entry(measure, sd=sd)
        for measure in BENCHMARK_MEASURES
        for sd in (False, True)
    },
    **{
        f"{quantity}_{estimate}": _agreement_entry(quantity, estimate)
        for quantity in QUANTITIES
        for estimate in BENCHMARK_ESTIMATES
    },
}
"""summary.tsv of the benchmark"""

COMPARISON_COLUMNS: Columns = {
    **{name: entry for name, entry in OVERLAP_TABLE_COLUMNS.items() if name not in ("reference", "prediction")},
    **_MODEL,
    **COST_COLUMNS,
    "problem": {"Description": "Why the model could not segment the scan"},
}
"""comparison.tsv of the benchmark"""
