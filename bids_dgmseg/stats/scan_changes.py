"""What all nuclei of a scan have in common: the scale and zero of its map, the size of its voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bids_dgmseg.stats.long_table import N_OUTLIERS, Floats, iter_groups, require_columns, robust_z

N_NUCLEI = 5
"""Nuclei from which a common change is estimated."""

SMALLEST_RATIO, SMALLEST_SHIFT = 1.25, 0.015
"""Changes below these (ppm) are no outliers, however similar the other scans are."""

_LOWEST_RATIO = 0.01
"""In place of ratios that are not positive, whose logarithm does not exist."""

_COLUMNS = ["scan", "n_nuclei", "ratio", "shift", "z_ratio", "z_shift", "outlier", "note"]


def common_change(values: Floats, expected: Floats, *, with_shift: bool) -> tuple[int, float, float]:
    r"""Estimate by which ratio, or by which shift of the zero, the nuclei of a scan differ from what is expected.

    Parameters
    ----------
    values, expected : ndarray of shape (n,)
        Measure of each nucleus, and what is expected of it; NaN where missing.
    with_shift : bool
        Susceptibilities have an arbitrary zero; volumes have none.

    Returns
    -------
    n_nuclei : int
        Nuclei with a value of which more than 0 is expected; others do not count.
    ratio, shift : float
        NaN with fewer than five nuclei; the shift also without `with_shift`.

    Notes
    -----
    The ratio is the median of :math:`x / \text{expected}`, the shift the slope of a line through
    :math:`x / \text{expected}` over :math:`1 / \text{expected}` (Theil and Sen's median of slopes [1]_): people
    differ in proportion to what is expected. A haemorrhage or a missed nucleus changes neither.

    References
    ----------
    .. [1] Sen PK. Estimates of the regression coefficient based on Kendall's tau. J Am Stat Assoc 63 (1968) 1379-1389.
       doi:10.1080/01621459.1968.10480934
    """
    known = np.isfinite(values) & (expected > 0)
    n_nuclei = int(known.sum())
    if n_nuclei < N_NUCLEI:
        return n_nuclei, np.nan, np.nan
    ratios, inverses = values[known] / expected[known], 1 / expected[known]
    shift = _median_slope(ratios, inverses) if with_shift and np.ptp(inverses) > 0 else np.nan
    return n_nuclei, float(np.median(ratios)), shift


def _median_slope(y: Floats, x: Floats) -> float:
    """Return the slope of Theil and Sen; scipy's takes ten times as long, for its interval."""
    runs = x[:, None] - x
    upward = runs > 0
    return float(np.median((y[:, None] - y)[upward] / runs[upward]))


def find_changed_scans(
    table: pd.DataFrame, *, value: str, by: Sequence[str], site: str = "site", with_shift: bool, limit: float = 3.5
) -> pd.DataFrame:
    """Compare the common change of each scan with those of the other scans of its site.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``scan``, `value`, ``expected`` (see `robust_z`), `site` and `by`.
    value : str
        Column of the measure.
    by : sequence of str
        Columns of a scan that are never pooled.
    site : str
        Column of the site; rows without form one site.
    with_shift : bool
        Whether the zero of the measure is arbitrary, see `common_change`.
    limit : float
        Absolute robust z-score above which a ratio or shift is an outlier, if it is not negligible.

    Returns
    -------
    DataFrame
        One row per scan, ascending: ``scan``, ``n_nuclei``, ``ratio``, ``shift``, their robust z-scores ``z_ratio`` (of
        the logarithm) and ``z_shift``, ``outlier`` and ``note``.
    """
    require_columns(table, "scan", value, "expected", site, *by)
    ordered = table.sort_values("scan", kind="stable")
    scans = ordered[["scan", site, *by]].drop_duplicates("scan").reset_index(drop=True)
    starts = np.flatnonzero(~ordered["scan"].duplicated())[1:]
    values, expected = (np.split(ordered[name].to_numpy(np.float64), starts) for name in (value, "expected"))
    pairs = zip(values, expected, strict=True) if len(scans) else ()  # no rows would be split into one part
    changes = [common_change(*pair, with_shift=with_shift) for pair in pairs]
    scans[["n_nuclei", "ratio", "shift"]] = pd.DataFrame(changes, columns=["n_nuclei", "ratio", "shift"])
    scans["log_ratio"] = np.log(scans["ratio"].clip(lower=_LOWEST_RATIO))
    ratios, shifts = (robust_z(scans, value=name, by=tuple(by), site=site) for name in ("log_ratio", "shift"))
    is_ratio = (ratios["robust_z"].abs() > limit) & (scans["log_ratio"].abs() > np.log(SMALLEST_RATIO))
    is_shift = (shifts["robust_z"].abs() > limit) & (scans["shift"].abs() > SMALLEST_SHIFT)
    note = ratios["note"].where(scans["n_nuclei"] >= N_NUCLEI, f"fewer than {N_NUCLEI} nuclei")
    result = scans.assign(
        z_ratio=ratios["robust_z"], z_shift=shifts["robust_z"], outlier=is_ratio | is_shift, note=note
    )
    return result[_COLUMNS]


def compare_sites(table: pd.DataFrame, *, by: Sequence[str], site: str = "site", with_shift: bool) -> pd.DataFrame:
    """Estimate the common change of the medians of each site relative to those of the other sites.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``abbreviation``, ``median`` and ``n_site`` of `robust_z`, `site` and `by`.
    by, site, with_shift
        As in `find_changed_scans`.

    Returns
    -------
    DataFrame
        The columns `by`, `site`, ``ratio`` and ``shift``; sites with fewer than five values of a nucleus are left out,
        and so is a site without another.
    """
    require_columns(table, "abbreviation", "median", "n_site", site, *by)
    rows = []
    for key, part in iter_groups(table[table["n_site"] >= N_OUTLIERS], by):
        medians = part.groupby([site, "abbreviation"], observed=True)["median"].first().unstack()
        for name, values in medians.iterrows() if len(medians) > 1 else ():
            others = medians.drop(name).median().to_numpy(np.float64)
            _, ratio, shift = common_change(values.to_numpy(np.float64), others, with_shift=with_shift)
            rows.append({**key, site: name, "ratio": ratio, "shift": shift})
    return pd.DataFrame(rows, columns=[*by, site, "ratio", "shift"])
