"""Decisions of raters on scans and nuclei (``qc_decisions.tsv``): read, match with scans, compare between raters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.models.structures import ALL_STRUCTURES

COLUMNS = ("scan", "model", "nucleus", "decision", "note", "rater", "date", "labels")
"""Columns of ``qc_decisions.tsv``. `note` and `rater` are free text, `date` is ISO 8601, `labels` is the SHA-256 of the
``_dseg.nii.gz`` that was judged; they and `model` may be missing."""

DECISIONS = ("pass", "fail")
"""Values of `decision`; a row with a note alone has none."""

WHOLE_SCAN = "all"
"""Nucleus of a decision on the scan."""

_NUCLEI = {
    WHOLE_SCAN,
    *(structure.abbreviation for structure in ALL_STRUCTURES),
    *(structure.nucleus for structure in ALL_STRUCTURES),
}


def read_decisions(paths: Sequence[Path], folders: Mapping[Path, str] | None = None) -> pd.DataFrame:
    """Read the decisions in one or several files.

    Text; ``dataset`` is the innermost of the `folders` of results (→ names) that a file is in, NaN if it is in none.

    Raises
    ------
    InputError
        If a file cannot be read, lacks a column, or has an unknown decision or nucleus or a date that is not ISO 8601.
    """
    parts = [pd.DataFrame(columns=["dataset", *COLUMNS], dtype=object)]
    for path in paths:
        if not path.is_file():
            raise InputError(f"`qc` {path.name}: no such file; pass a qc_decisions.tsv")
        table = read_tsv(path, dtype=object)
        if missing := [name for name in ("scan", "nucleus", "decision") if name not in table]:
            raise InputError(f"`qc` {path.name}: no column {', '.join(missing)}; pass a qc_decisions.tsv")
        table = table.reindex(columns=list(COLUMNS)).astype(object).apply(lambda column: column.str.strip())
        is_valid = table["scan"].notna() & table["nucleus"].isin(_NUCLEI)
        is_valid &= table["decision"].isna() | table["decision"].isin(DECISIONS)
        is_valid &= table["date"].isna() | _to_times(table["date"]).notna()
        if not is_valid.all():
            place = int((~is_valid).to_numpy().argmax())
            shown = ", ".join(map(str, table[["scan", "nucleus", "decision", "date"]].iloc[place]))
            raise InputError(
                f"`qc` {path.name}: line {place + 2} ({shown}) has no scan, an unknown nucleus, a decision other than "
                "pass and fail, or a date that is not ISO 8601 (2026-11-30T10:00:00); correct it"
            )
        around = [folder for folder in folders or {} if path.resolve().is_relative_to(folder.resolve())]
        innermost = max(around, key=lambda folder: len(folder.parts), default=None)
        parts.append(table.assign(dataset=folders[innermost] if folders and innermost else float("nan")))
    table = pd.concat(parts, ignore_index=True)
    names = table["scan"].astype(object).str.removesuffix("_dseg")  # may be those of files
    table["model"] = table["model"].fillna(names.str.extract(r"_seg-([0-9a-zA-Z]+)", expand=False))
    table["scan"] = names.str.replace(r"_seg-[0-9a-zA-Z]+", "", regex=True)
    return table[table["decision"].notna() | table["note"].notna()].reset_index(drop=True)


def _to_times(dates: pd.Series) -> pd.Series:
    return pd.to_datetime(dates, format="ISO8601", errors="coerce", utc=True)


def match_decisions(
    decisions: pd.DataFrame, scans: pd.DataFrame, *, is_selection: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    """Return the last decision of each rater on each nucleus of each scan, with ``row``, the scan that it is on.

    `scans` have ``name``, ``model`` and, if known, ``labels`` and ``dataset``. A decision without a model is on all of
    them; those on scans that are not selected are dropped, and those on other labels are listed in a warning. If the
    dates of contradictory decisions are missing or equal, the failure counts, as another warning says.

    Raises
    ------
    InputError
        If a scan has no results, unless the scans are a selection, or is in several datasets.
    """
    keys = scans.reindex(columns=["name", "model", "dataset", "labels"]).rename(columns={"name": "scan"})
    keys = keys.reset_index(names="row")
    pairs = decisions.reset_index(names="line").merge(keys, on="scan", suffixes=("", "_of_scan"))
    for column in ("model", "dataset"):
        of_scan = pairs.pop(f"{column}_of_scan")
        is_same = pairs[column].isna() | of_scan.isna() | (pairs[column] == of_scan)
        pairs = pairs.assign(**{f"is_stated_{column}": pairs[column].notna(), column: of_scan})[is_same]
    unmatched = decisions.loc[~decisions.index.isin(pairs["line"]), "scan"]
    if len(unmatched) and not is_selection:
        raise InputError(
            f"`qc`: no results of {list_some(set(unmatched))} (available: e.g. {scans['name'].min()}); correct or "
            "remove these lines"
        )
    unstated = pairs[~pairs["is_stated_dataset"]]
    if (several := unstated.groupby("line")["dataset"].nunique() > 1).any():
        names = unstated["scan"][unstated["line"].isin(several.index[several])]
        raise InputError(
            f"`qc`: {list_some(set(names))}: in several datasets; move the file with these lines into the output "
            "folder that they are about"
        )
    is_other = pairs["labels"].notna() & pairs["labels_of_scan"].notna() & (pairs["labels"] != pairs["labels_of_scan"])
    warnings = _describe_rows(pairs[is_other], "refer to other labels; ignored, review again")
    by = ["row", "nucleus", "rater"]
    pairs = pairs[~is_other].assign(time=_comparable_times(pairs[~is_other], by))
    pairs["is_failure"] = pairs["decision"] == "fail"
    ordered = pairs.sort_values(["time", "is_failure", "line"], kind="stable", na_position="first")
    last = ordered.drop_duplicates(by, keep="last").sort_values(["line", "row"])
    rivals = pairs.merge(last[[*by, "time"]], on=[*by, "time"])
    is_contradicted = rivals["is_failure"] & (rivals.groupby(by, dropna=False)["decision"].transform("nunique") > 1)
    what = "conflict with another of the same rater and cannot be ordered by date; counted as fail"
    warnings += _describe_rows(rivals[is_contradicted], what)
    shown = [*(["dataset"] if "dataset" in scans else []), *COLUMNS, "row"]
    return last[shown].reset_index(drop=True), warnings


def _comparable_times(pairs: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Return the times of decisions `by` the same: whole days if one has no hour, none if one has no date."""
    times, keys = _to_times(pairs["date"]), [pairs[key] for key in by]
    is_day = pairs["date"].str.len().le(10).groupby(keys, dropna=False).transform("any").astype(bool)
    is_dated = times.notna().groupby(keys, dropna=False).transform("all").astype(bool)
    return times.where(~is_day, times.dt.normalize()).where(is_dated)


def _describe_rows(rows: pd.DataFrame, what: str) -> list[str]:
    names = rows["scan"] + " " + rows["nucleus"] + (" by " + rows["rater"]).fillna("")
    return [f"`qc`: {len(rows)} decision(s) {what}: {list_some(names.unique())}"] if len(rows) else []


def explain_decisions(matched: pd.DataFrame) -> dict[tuple[int, str], str]:
    """Return for each scan and nucleus why raters fail it, or empty text if one passes it and none fails it.

    Failing a nucleus also fails its sides, its parts and the nucleus that it is a part of.
    """
    verdicts: dict[tuple[int, str], str] = {}
    decided = matched.dropna(subset=["decision"]).sort_values("decision", ascending=False, kind="stable")
    for record in decided.to_dict("records"):  # pass, then fail
        nucleus = str(record["nucleus"])
        names = [nucleus] if nucleus == WHOLE_SCAN or nucleus[-2:] in ("_L", "_R") else [f"{nucleus}_L", f"{nucleus}_R"]
        if record["decision"] == "pass":
            for name in names:
                verdicts[record["row"], name] = ""
            continue
        relatives = [
            {structure.abbreviation: structure.part_of, structure.part_of: structure.abbreviation}.get(name)
            for structure in ALL_STRUCTURES
            for name in names
        ]
        for name in dict.fromkeys([*names, *filter(None, relatives)]):
            reasons = (verdicts.get((record["row"], name)), _describe(record))
            verdicts[record["row"], name] = "; ".join(dict.fromkeys(filter(None, reasons)))
    return verdicts


def _describe(record: Mapping[Any, Any]) -> str:
    """Return why a rater's decision leaves a value out."""
    texts = {key: "" if pd.isna(record[key]) else str(record[key]) for key in ("rater", "date", "note")}
    by = f" by {texts['rater']}" if texts["rater"] else ""
    on = f" on {texts['date'][:10]}" if texts["date"] else ""
    return f"failed{by}{on}" + (f": {texts['note']}" if texts["note"] else "")


def compare_raters(matched: pd.DataFrame) -> pd.DataFrame:
    r"""Compute the agreement of each pair of raters, over all nuclei and per nucleus.

    Returns
    -------
    DataFrame
        ``rater_1``, ``rater_2``, ``nucleus`` (``all`` for all together), ``n`` decided by both, ``n_agree``,
        ``agreement``, ``kappa`` with its 95 % limits, and ``note``.

    Notes
    -----
    Cohen's [1]_ :math:`\kappa = (p_o - p_e)/(1 - p_e)` with limits from its large-sample standard error (statsmodels).
    It is missing if a rater gave the same decision throughout, as it then does not depend on the other.

    References
    ----------
    .. [1] Cohen J. A coefficient of agreement for nominal scales. Educ Psychol Meas 20 (1960) 37-46.
       doi:10.1177/001316446002000104
    """
    columns = ["rater_1", "rater_2", "nucleus", "n", "n_agree", "agreement", "kappa", "kappa_low", "kappa_high", "note"]
    decided = matched.dropna(subset=["decision", "rater"])
    wide = decided.pivot(index=["row", "nucleus"], columns="rater", values="decision")
    records = []
    for first, second in combinations(map(str, wide.columns), 2):
        both = wide[[first, second]].dropna()
        if both.empty:
            continue
        nuclei = both.index.get_level_values("nucleus")
        for nucleus in [None, *dict.fromkeys(nuclei)]:
            pair = both if nucleus is None else both[nuclei == nucleus]
            name = "all nuclei" if nucleus is None else "whole scan" if nucleus == WHOLE_SCAN else nucleus
            record = {"rater_1": first, "rater_2": second, "nucleus": name}
            records.append(record | _kappa(pair[first], pair[second]))
    return pd.DataFrame(records, columns=columns)


def _kappa(first: pd.Series, second: pd.Series) -> dict[str, Any]:
    from statsmodels.stats.inter_rater import cohens_kappa  # slow to import

    codes = [pd.Categorical(values, categories=list(DECISIONS)).codes for values in (first, second)]
    table = np.zeros((len(DECISIONS),) * 2, int)
    np.add.at(table, tuple(codes), 1)
    n_agree = int(np.trace(table))
    record: dict[str, Any] = {"n": len(first), "n_agree": n_agree, "agreement": n_agree / len(first)}
    if max(table.sum(axis=0).max(), table.sum(axis=1).max()) == len(first):
        return record | {"note": "no kappa: a rater gave one decision only"}
    result = cohens_kappa(table)
    return record | {"kappa": result.kappa, "kappa_low": result.kappa_low, "kappa_high": result.kappa_upp, "note": ""}
