"""Decisions of raters on scans and nuclei (``qc_decisions.tsv``): read, check, apply, compare between raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.io.files import MISSING, read_tsv
from bids_dgmseg.models.structures import ALL_STRUCTURES, wholes_of

COLUMNS = ("scan", "model", "nucleus", "decision", "note", "rater", "date")
"""Of ``qc_decisions.tsv``; `note`, `rater` and `date` are free text, `model` may be missing."""

DECISIONS = ("pass", "fail")
"""A row with a note alone has none."""

WHOLE_SCAN = "all"
"""Nucleus of a decision on the scan."""

_PARTS = {
    whole.abbreviation: tuple(one.abbreviation for one in ALL_STRUCTURES if one.part_of == whole.abbreviation)
    for whole in wholes_of(ALL_STRUCTURES)
}
"""Nucleus that `dgm24` labels in parts → these."""

_REQUIRED = ("scan", "nucleus", "decision")


@dataclass(frozen=True)
class Verdicts:
    """What the decisions say about the scans and nuclei of a study; a failure by any rater counts."""

    failed_scans: pd.Series
    """Why each scan is left out, NaN if it is not."""
    failed_rows: pd.Series
    """Why the value of each nucleus is left out, NaN if it is not."""
    passed_scans: pd.Series
    passed_rows: pd.Series


def read_decisions(paths: Sequence[Path], folders: Mapping[Path, str] | None = None) -> pd.DataFrame:
    """Read the decisions in one or several files, the last of each rater on a nucleus.

    Text; `decision` is ``pass`` or ``fail``, NaN for a note alone. Rows without any of these are dropped. With several
    `folders` of results (→ names), ``dataset`` is the one that a file is in, NaN if it is in none.

    Raises
    ------
    InputError
        If a file cannot be read, lacks a column, or has an unknown decision or nucleus.
    """
    parts = []
    known = {structure.abbreviation for structure in ALL_STRUCTURES}
    known |= {WHOLE_SCAN, *(structure.nucleus for structure in ALL_STRUCTURES)}
    for path in paths:
        if not path.is_file():
            raise InputError(f"`qc` {path.name}: no such file; pass a qc_decisions.tsv")
        table = read_tsv(path, dtype=object)
        if missing := [name for name in _REQUIRED if name not in table]:
            raise InputError(
                f"`qc` {path.name}: no column {', '.join(missing)} (columns: {', '.join(map(str, table.columns))}); "
                "pass a file of dgmseg review"
            )
        table = table.reindex(columns=list(COLUMNS)).astype(object).apply(lambda column: column.str.strip())
        table["decision"] = table["decision"].str.lower()
        for column, allowed, expected in (
            ("decision", set(DECISIONS), " or ".join(DECISIONS)),
            ("nucleus", known, f"{WHOLE_SCAN} or a nucleus such as CN_L"),
        ):
            wrong = table[column].notna() & ~table[column].isin(allowed)
            if wrong.any():
                place = int(wrong.to_numpy().argmax())
                raise InputError(
                    f"`qc` {path.name}: line {place + 2}: {column} is {table[column].iloc[place]!r}, expected "
                    f"{expected}; correct it"
                )
        if (lacking := table[["scan", "nucleus"]].isna().any(axis=1)).any():
            line = int(lacking.to_numpy().argmax()) + 2
            raise InputError(f"`qc` {path.name}: line {line}: no scan or nucleus; complete or remove the line")
        parts.append(table.assign(dataset=_find_dataset(path, folders)) if folders else table)
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS), dtype=object)
    names = table["scan"].astype(object).str.removesuffix("_dseg")  # may be those of files
    table["model"] = table["model"].fillna(names.str.extract(r"_seg-([0-9a-zA-Z]+)", expand=False))
    table["scan"] = names.str.replace(r"_seg-[0-9a-zA-Z]+", "", regex=True)
    last = _last_of_raters(table)
    return last[last["decision"].notna() | last["note"].notna()].reset_index(drop=True)


def _find_dataset(path: Path, folders: Mapping[Path, str]) -> str | float:
    """Return the name of the innermost folder that a file is in."""
    around = [folder for folder in folders if path.resolve().is_relative_to(folder.resolve())]
    return folders[max(around, key=lambda folder: len(folder.parts))] if around else float("nan")


def _keys(decisions: pd.DataFrame) -> list[str]:
    """Return the columns that say what is decided on."""
    return [*(["dataset"] if "dataset" in decisions else []), "scan", "model", "nucleus"]


def check_scans(decisions: pd.DataFrame, scans: pd.DataFrame, *, where: str) -> None:
    """Raise an `InputError` that names the decisions on scans that the study does not have, or has several of.

    `scans` have ``name``, ``model`` and, if there are several datasets, ``dataset``.
    """

    def names_of(scans: pd.DataFrame) -> set[str]:
        return {*scans["name"], *(scans["name"] + " by " + scans["model"])}

    of_dataset = {one: names_of(own) for one, own in scans.groupby("dataset")} if "dataset" in scans else {}
    names = names_of(scans)
    datasets = decisions.get("dataset", [None] * len(decisions))
    pairs = {
        (scan if pd.isna(model) else f"{scan} by {model}", None if pd.isna(dataset) else str(dataset))
        for scan, model, dataset in zip(decisions["scan"], decisions["model"], datasets, strict=True)
    }
    if unknown := sorted(
        {scan for scan, one in pairs if scan not in (names if one is None else of_dataset.get(one, ()))}
    ):
        example = min(name for name in names if (" by " in name) == (" by " in unknown[0]))
        raise InputError(
            f"`qc` {where}: {count(len(unknown), 'scan')} without results: {list_some(unknown)} (results have such as "
            f"{example}); correct or remove these lines"
        )
    n_datasets = Counter(name for own in of_dataset.values() for name in own)
    if several := sorted({scan for scan, one in pairs if one is None and n_datasets[scan] > 1}):
        raise InputError(
            f"`qc` {where}: {list_some(several)}: in several datasets; move the file with these lines into the output "
            "folder that they are about"
        )


def apply_decisions(decisions: pd.DataFrame, scans: pd.DataFrame, rows: pd.DataFrame) -> Verdicts:
    """Return what decisions mean for the scans (``name``, ``model``) and the nuclei (``scan``, ``abbreviation``).

    If the scans are of several datasets (``dataset``), a decision with a dataset is on that one only.

    `rows` count the scans from 0. A nucleus fails if any rater fails it; it is passed if a rater passes it and none
    fails it. A bilateral row, such as CN, fails with either side, and is passed if one side is passed and the other is
    passed or, by ``rating``, not red; a nucleus with parts fails with any of them, and is passed if all are.
    """
    failed: dict[tuple[str, str], str] = {}
    passed: set[tuple[str, str]] = set()
    datasets = scans["dataset"].unique().tolist() if "dataset" in scans else [""]
    last = _last_of_each(decisions, scans["model"].unique().tolist()).dropna(subset=["decision"])
    for record in last.to_dict("records"):
        for dataset in datasets if pd.isna(record.get("dataset")) else [record["dataset"]]:
            key = f"{dataset} {record['scan']} {record['model']}", str(record["nucleus"])
            if record["decision"] == "fail":
                failed[key] = "; ".join(dict.fromkeys(filter(None, (failed.get(key), _describe(record)))))
            else:
                passed.add(key)
    passed -= failed.keys()
    names = (scans.get("dataset", "") + " " + scans["name"] + " " + scans["model"]).to_numpy(object)
    of_row = names[rows["scan"].to_numpy(int)]
    nuclei = rows["abbreviation"].to_numpy(object)
    is_usable = rows.get("rating", pd.Series(index=rows.index, dtype=object)).isin(["green", "amber"])
    usable = set(zip(of_row[is_usable], nuclei[is_usable], strict=True))

    def find(name: str, nucleus: str) -> Any:
        own = [nucleus] if _has_side(nucleus) else [nucleus, f"{nucleus}_L", f"{nucleus}_R"]
        own += [part for side in own for part in _PARTS.get(side, ())]
        own += [side[:-2] for side in own if _has_side(side)]
        return next((failed[name, one] for one in own if (name, one) in failed), np.nan)

    def is_passed(name: str, nucleus: str) -> bool:
        if (name, nucleus) in passed:
            return True
        if not _has_side(nucleus):
            sides = [(name, f"{nucleus}_{side}") for side in "LR"]
            passes = [is_passed(*side) for side in sides]
            return any(passes) and all(one or side in usable for one, side in zip(passes, sides, strict=True))
        parts = _PARTS.get(nucleus, ())
        return (name, nucleus[:-2]) in passed or (bool(parts) and all(is_passed(name, part) for part in parts))

    whole = [failed.get((name, WHOLE_SCAN), np.nan) for name in names]
    single = [find(name, nucleus) for name, nucleus in zip(of_row, nuclei, strict=True)]
    return Verdicts(
        failed_scans=pd.Series(whole, index=scans.index, dtype=object),
        failed_rows=pd.Series(single, index=rows.index, dtype=object),
        passed_scans=pd.Series([(name, WHOLE_SCAN) in passed for name in names], scans.index, bool),
        passed_rows=pd.Series([is_passed(*key) for key in zip(of_row, nuclei, strict=True)], rows.index, bool),
    )


def _last_of_each(decisions: pd.DataFrame, models: Sequence[str]) -> pd.DataFrame:
    """Return the last decision of each rater by date, one row per model; one without a model is on all of them."""
    each = [list(models) if pd.isna(model) else [model] for model in decisions["model"]]
    rows = decisions.assign(model=pd.Series(each, index=decisions.index, dtype=object)).explode("model")
    rows = rows.reset_index(drop=True).reindex(columns=list(dict.fromkeys([*rows.columns, *COLUMNS])))
    return _last_of_raters(rows)


def _last_of_raters(decisions: pd.DataFrame) -> pd.DataFrame:
    """Return the last decision of each rater by date; without dates, by the order of the rows."""
    ordered = decisions.sort_values("date", kind="stable", na_position="first")
    return ordered.drop_duplicates([*_keys(decisions), "rater"], keep="last").sort_index()


def _has_side(nucleus: str) -> bool:
    return nucleus.endswith(("_L", "_R"))


def _describe(record: Mapping[Any, Any]) -> str:
    """Return why a rater's decision leaves a value out."""
    texts = {key: "" if pd.isna(record[key]) else str(record[key]) for key in ("rater", "date", "note")}
    by = f" by {texts['rater']}" if texts["rater"] else ""
    on = f" on {texts['date'][:10]}" if texts["date"] else ""
    return f"failed{by}{on}" + (f": {texts['note']}" if texts["note"] else "")


def compare_raters(decisions: pd.DataFrame) -> pd.DataFrame:
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
    decided = decisions.dropna(subset=["decision", "rater"])
    keys = _keys(decided)
    if "dataset" in decided:  # without one, it is that of the only scan of this name
        of_scan = decided.groupby("scan")["dataset"].transform("first")
        decided = decided.assign(dataset=decided["dataset"].fillna(of_scan).fillna(MISSING))
    decided = _last_of_each(decided, decided["model"].dropna().unique().tolist() or [MISSING])
    wide = decided.pivot(index=keys, columns="rater", values="decision")
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
    found = cohens_kappa(table)
    return record | {"kappa": found.kappa, "kappa_low": found.kappa_low, "kappa_high": found.kappa_upp, "note": ""}
