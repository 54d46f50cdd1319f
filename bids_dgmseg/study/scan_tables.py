"""The tables of all scans, from the outputs of the participant level."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.measurement.nuclei import asymmetry_index
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.stats.outliers import robust_z
from bids_dgmseg.stats.size_adjustment import N_CONTROLS, adjust_for_size
from bids_dgmseg.study.columns import WIDE, describe
from bids_dgmseg.study.load import Cohort
from bids_dgmseg.study.participants import MISSING
from bids_dgmseg.study.results import ScanStats
from bids_dgmseg.study.study import VOLUME, Study
from bids_dgmseg.study.writing import GroupTable, write_lines

Line = Sequence[str]


def write_scan_tables(folder: Path, cohort: Cohort, *, settings: Mapping[str, Any]) -> list[Path]:
    """Write the measures of all scans with the participants' columns behind.

    These are ``group_stats.tsv`` (a row a nucleus), ``group_volumes.tsv``, ``group_susceptibility.tsv`` and
    ``group_qc.tsv`` (a row a scan and model), each with a data dictionary of the same name and each renamed into
    place when complete. Columns of ``_stats.tsv`` and ``_qc.json`` that are new pass through.

    Parameters
    ----------
    folder : Path
        Where to.
    cohort : Cohort
        All scans.
    settings : mapping
        For the data dictionaries.

    Raises
    ------
    InputError
        If a table cannot be written.
    """
    scans = cohort.scans
    writer = _Writer(folder, cohort, settings)
    columns = [*dict.fromkeys(column for scan in scans for column in scan.columns)]
    paths = writer.write("group_stats", columns, (_long_rows(scan, columns) for scan in scans))
    known = {abbreviation for scan in scans for abbreviation in scan.values("abbreviation")}
    nuclei = [structure.abbreviation for structure in STRUCTURES if structure.abbreviation in known]
    volumes, susceptibilities = ([f"{nucleus}_{measure}" for nucleus in nuclei] for measure in WIDE)
    paths += writer.write("group_volumes", volumes, ([_wide_row(scan, nuclei, WIDE[0])] for scan in scans))
    paths += writer.write(
        "group_susceptibility",
        ["reference", *susceptibilities],
        ([[scan.reference or MISSING, *_wide_row(scan, nuclei, WIDE[1])]] for scan in scans),
    )
    names = [*dict.fromkeys(name for scan in scans for name in scan.quality)]
    paths += writer.write(
        "group_qc",
        ["page", *names],
        (
            [[page, *(scan.quality.get(name, MISSING) for name in names)]]
            for scan, page in zip(scans, cohort.pages, strict=True)
        ),
    )
    return paths


class _Writer:
    """Puts a scan's keys in front of its lines and its participant's columns behind."""

    def __init__(self, folder: Path, cohort: Cohort, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings, self._descriptions = folder, settings, cohort.descriptions
        front = cohort.keys.assign(age_years=[MISSING if pd.isna(age) else f"{age:.7g}" for age in cohort.facts["age"]])
        self._keys, self._people = list(front.columns), list(cohort.people.columns)
        self._front, self._behind = front.to_numpy(object).tolist(), cohort.people.to_numpy(object).tolist()

    def write(self, name: str, columns: Sequence[str], scans: Iterable[Iterable[Line]]) -> list[Path]:
        """Write the lines of all scans; a participant's column that would hide another is renamed."""
        own = [*self._keys, *columns]
        people = {column: f"participants_{column}" if column in own else column for column in self._people}
        dictionary: dict[str, Any] = {column: describe(column) for column in own}
        for column, shown in people.items():
            told = {"Description": f"Column {column} of participants.tsv or sessions.tsv"}
            dictionary[shown] = self._descriptions.get(column, told)
        lines = (
            [*front, *line, *behind]
            for front, behind, rows in zip(self._front, self._behind, scans, strict=True)
            for line in rows
        )
        header = [*own, *people.values()]
        return write_lines(self._folder, name, header, lines, dictionary | {"Settings": self._settings})


def _long_rows(scan: ScanStats, columns: Sequence[str]) -> Iterator[Line]:
    """Rows of a scan's table, in the order of all scans' columns."""
    if scan.columns == tuple(columns):
        yield from scan.rows()
        return
    places = [scan.columns.index(column) if column in scan.columns else None for column in columns]
    for row in scan.rows():
        yield [MISSING if place is None else row[place] for place in places]


def _wide_row(scan: ScanStats, nuclei: Sequence[str], measure: str) -> list[str]:
    values = scan.values(measure)
    return [values.get(name, MISSING) for name in nuclei]


_ADJUSTED = ["scan", "abbreviation", "control", "measure", "volume_mm3", "value", "adjusted"]


def asymmetry_table(study: Study) -> GroupTable:
    """Compare left with right in each scan."""
    parts = []
    side = study.table["abbreviation"].str[-2:]
    names = study.table["abbreviation"].str[:-2]
    nuclei = pd.Categorical(names, categories=list(names.unique()))  # merging sorts them so
    for measure in study.options.measures:
        rows = pd.DataFrame({"scan": study.table["scan"], "nucleus": nuclei, "value": study.table[measure]})
        left, right = (rows[side == f"_{name}"] for name in "LR")
        both = left.merge(right, on=["scan", "nucleus"], suffixes=("_left", "_right"), how="outer")
        parts.append(
            pd.DataFrame(
                {
                    "scan": both["scan"],
                    "nucleus": both["nucleus"],
                    "measure": measure,
                    "left": both["value_left"],
                    "right": both["value_right"],
                    "asymmetry": asymmetry_index(both["value_left"], both["value_right"]),
                }
            )
        )
    return GroupTable("group_asymmetry", _by_scan(parts))


def outlier_table(study: Study) -> GroupTable:
    """Robust z of each value within its site."""
    parts = []
    for measure in study.options.measures:
        found = robust_z(study.table, value=measure, by=(*study.by, "site"))
        rows = study.table[["scan", "abbreviation"]].assign(measure=measure, value=study.table[measure])
        parts.append(pd.concat([rows, found], axis=1))
    rows = _by_scan(parts)
    return GroupTable("group_outliers", rows, facts={"NumberOfOutliers": int(rows["outlier"].sum())})


def adjusted_table(study: Study) -> GroupTable:
    """Adjust for size by the controls' regression, and give the study the adjusted measures."""
    name = "group_adjusted"
    if study.controls is None:
        return GroupTable(name, pd.DataFrame(columns=_ADJUSTED), not_computed="no --control-filter was given")
    control = study.controls[study.table["scan"].to_numpy()]
    n_controls = study.cohort.facts["participant_id"][study.controls].nunique()
    facts = {"Controls": {"Participants": n_controls, "Scans": int(study.controls.sum())}}
    if n_controls < N_CONTROLS:
        why = f"--control-filter matches {n_controls} participants, a slope needs {N_CONTROLS}"
        study.warnings.append(f"{name}.tsv: not computed: {why}")
        return GroupTable(name, pd.DataFrame(columns=_ADJUSTED), facts=facts, not_computed=why)
    parts: list[pd.DataFrame] = []
    coefficients: list[dict[Hashable, Any]] = []
    for measure in [measure for measure in study.options.measures if measure.endswith("_ppm")]:
        done = adjust_for_size(
            study.table, controls=control, value=measure, volume=VOLUME, by=study.by, participant="participant_id"
        )
        found = done.coefficients.assign(measure=measure)[["measure", *done.coefficients.columns]]
        coefficients += found.to_dict("records")
        rows = study.table[["scan", "abbreviation"]].assign(
            control=control,
            measure=measure,
            volume_mm3=study.table[VOLUME],
            value=study.table[measure],
            adjusted=done.values,
        )
        parts.append(rows)
        if done.values.notna().any():
            study.table[f"{measure}_adjusted"] = done.values
            study.measures.append(f"{measure}_adjusted")
    if not parts:
        return GroupTable(name, pd.DataFrame(columns=_ADJUSTED), not_computed="no susceptibility among --measures")
    notes = tuple(
        f"{record['measure']} of {record['abbreviation']} by {record['model']}: {record['note']}"
        for record in coefficients
        if record["note"]
    )
    return GroupTable(name, _by_scan(parts), facts={**facts, "Coefficients": coefficients}, notes=notes)


def _by_scan(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One table in the order of the scans."""
    together = pd.concat(parts, ignore_index=True)
    order = np.argsort(together["scan"].to_numpy(), kind="stable")
    return together.iloc[order].reset_index(drop=True)
