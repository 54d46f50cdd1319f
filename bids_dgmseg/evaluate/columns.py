"""What the columns of the tables of `measurement.comparison` mean: their BIDS data dictionaries."""

from __future__ import annotations

from collections.abc import Mapping

Columns = Mapping[str, Mapping[str, str]]

_UNIT = "unit of the quantity"

_FEW = "n/a where too few scans or too little spread allow it"

_PAIR: Columns = {
    "reference": {"Description": "The reference, or the first of two raters"},
    "prediction": {"Description": "What is compared with it, or the second of two raters"},
}

_NUCLEUS: Columns = {"abbreviation": {"Description": "Nucleus and side, such as DN_L; left is the patient's left"}}

_COUNT: Columns = {
    "n": {"Description": "Scans that count: all raters compared have a value"},
    "n_missing": {"Description": "Scans left out because a rater has no value, such as where the nucleus has no voxel"},
}

_QUANTITY: Columns = {
    "quantity": {"Description": "volume_mm3: volume in mm^3; mean_ppm: mean susceptibility under the label in ppm"}
}

_ICC: Columns = {
    f"{name}{end}": {"Description": f"{what}{meaning}"}
    for name, what in (
        ("icc11", "ICC(1,1), one-way random effects, single rating"),
        ("icc21", "ICC(2,1), two-way random effects, absolute agreement, single rating"),
        ("icc31", "ICC(3,1), two-way mixed effects, consistency, single rating"),
    )
    for end, meaning in (
        ("", f" (Shrout and Fleiss 1979); {_FEW}"),
        ("_low", ": lower 95 % confidence bound"),
        ("_high", ": upper 95 % confidence bound"),
        ("_p", ": p of the F test against 0"),
    )
}

_TESTS: Columns = {
    "t": {"Description": f"Student's t of the paired differences (second minus first); {_FEW}"},
    "t_p": {"Description": "Its two-sided p"},
    "t_p_bonferroni": {"Description": "t_p by Bonferroni, over the nuclei and pairs with the same first column"},
    "t_p_holm": {"Description": "t_p by Holm, over the same tests"},
    "wilcoxon_w": {"Description": "Wilcoxon's signed-rank statistic, the smaller rank sum, zeros left out"},
    "wilcoxon_p": {"Description": "Its two-sided p"},
    "wilcoxon_p_bonferroni": {"Description": "wilcoxon_p by Bonferroni, over the same tests"},
    "wilcoxon_p_holm": {"Description": "wilcoxon_p by Holm, over the same tests"},
    "tukey_p": {
        "Description": "p of the pair by Tukey's honestly significant difference among all raters, taken as "
        "independent groups; n/a with two raters in agreement.tsv"
    },
}

_VARIANCE: Columns = {
    "anova_f": {"Description": "F of one-way analysis of variance, raters taken as independent groups"},
    "anova_p": {"Description": "Its p"},
    "repeated_f": {"Description": "F of repeated-measures analysis of variance, each scan its own control"},
    "repeated_p": {"Description": "Its p, sphericity assumed"},
    "repeated_epsilon": {"Description": "Greenhouse and Geisser's epsilon"},
    "repeated_p_corrected": {"Description": "p of repeated_f with degrees of freedom multiplied by epsilon"},
}


def _with_interval(name: str, what: str, units: str = "") -> Columns:
    unit = {"Units": units} if units else {}
    return {
        name: {"Description": f"{what}; {_FEW}", **unit},
        f"{name}_low": {"Description": f"Lower 95 % confidence bound of {name}", **unit},
        f"{name}_high": {"Description": f"Upper 95 % confidence bound of {name}", **unit},
    }


AGREEMENT_COLUMNS: Columns = {
    **_QUANTITY,
    **_NUCLEUS,
    **_PAIR,
    **_COUNT,
    "mean_reference": {"Description": "Mean of the reference over these scans", "Units": _UNIT},
    "mean_prediction": {"Description": "Mean of the prediction over these scans", "Units": _UNIT},
    **_with_interval("pearson_r", "Pearson's correlation (interval by Fisher's z)"),
    "pearson_r_p": {"Description": "Its two-sided p"},
    **_with_interval("spearman_rho", "Spearman's rank correlation (interval of Bonett and Wright 2000)"),
    "spearman_rho_p": {"Description": "Its two-sided p"},
    **_ICC,
    **_with_interval("bias", "Mean of prediction minus reference", _UNIT),
    **_with_interval("loa_lower", "Lower limit of agreement, bias - 1.96 SD (Bland and Altman 1999)", _UNIT),
    **_with_interval("loa_upper", "Upper limit of agreement, bias + 1.96 SD", _UNIT),
    "sd_difference": {"Description": "Standard deviation of prediction minus reference (n - 1)", "Units": _UNIT},
    **_TESTS,
}
"""Column → BIDS data dictionary entry, in the order of ``agreement.tsv``."""

RATERS_COLUMNS: Columns = {
    **_QUANTITY,
    **_NUCLEUS,
    "raters": {"Description": "Who is compared"},
    "k": {"Description": "Number of raters"},
    **_COUNT,
    **_ICC,
    **_VARIANCE,
}
"""The same of ``raters.tsv``."""

METHODS_COLUMNS: Columns = {
    "measure": {"Description": "Measure of overlap with the reference, a column of overlap.tsv"},
    **_NUCLEUS,
    "first": {"Description": "A prediction"},
    "second": {"Description": "Another"},
    **_COUNT,
    "mean_first": {"Description": "Mean of the measure for the first", "Units": "unit of the measure"},
    "mean_second": {"Description": "Mean of the measure for the second", "Units": "unit of the measure"},
    "mean_difference": {"Description": "mean_second minus mean_first", "Units": "unit of the measure"},
    **_TESTS,
    **_VARIANCE,
}
"""The same of ``methods.tsv``."""

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
            ("minimum", "Smallest value"),
            ("maximum", "Largest value"),
        )
    },
}
"""The same of ``overlap_summary.tsv``."""
