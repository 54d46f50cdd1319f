"""ROI tables of any program: recognized columns, written as results that the group level reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from bids_dgmseg.bids.output_dataset import describe_derivative
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, read_tsv, write_json, write_tsv
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
from bids_dgmseg.models.label_tables import PROGRAM_NAMES
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.study.participants import AGE, GROUP, SEX, SITE, find_column, read_labelled_table
from bids_dgmseg.study.results import IMPORTED
from bids_dgmseg.study.study import COLUMNS

PARTICIPANT = ("participant_id", "participant", "subject_id", "subject", "sub", "id")
SESSION = ("session_id", "session", "visit", "timepoint", "ses")
STRUCTURE = ("abbreviation", "structure", "region", "roi", "nucleus", "object", "structname", "label")
HEMISPHERE = ("hemisphere", "hemi", "side")
_DEMOGRAPHICS = (*AGE, *SEX, *GROUP, *SITE, "acq_time")
"""Names of columns, in lower case."""

_SIDES = {"l": "L", "lh": "L", "left": "L", "r": "R", "rh": "R", "right": "R"}

_OTHER_NAMES = {
    "IN": "interpositus",
    "RN": "rednc",
    "SN": "nigra, snigra",
    "CN": "caud, cd",
    "PUT": "pu",
    "GP": "pallidus",
    "GPe": "globus pallidus external, globus pallidus externus",
    "GPi": "globus pallidus internal, globus pallidus internus",
    "NAC": "nacc",
    "THA": "thal",
}
"""Nucleus → its names in MRICloud and papers, besides ours and those of FreeSurfer."""

_FILLERS = {"nucleus", "area", "proper", "cerebellum", "of", "the"}

_STATISTICS = {
    **dict.fromkeys(("volume", "vol"), "volume_mm3"),
    **dict.fromkeys(("mean", "average", "avg", "normmean"), "mean_ppm"),
    "median": "median_ppm",
    **dict.fromkeys(("std", "sd", "normstddev"), "std_ppm"),
}
_QUANTITIES = {"qsm", "chi", "susceptibility", "value"}
_UNITS = {"ppm": 1.0, "ppb": 1e-3, "mm3": 1.0, "ml": 1e3, "cm3": 1e3}
"""Unit → factor to ppm or mm³."""

_LIMITS = {"ppm": (0.005, 1.5), "mm3": (5.0, 30_000.0)}
"""Unit → plausible medians of the absolute values of a table's nuclei."""

_IGNORED = {
    *COLUMNS,
    *("acquisition", "run", "model", "num_voxels", "nvoxels", "min", "max", "segid", "normmin", "normmax", "normrange"),
}
"""Columns of this and other programs that are not analysed, in lower case."""

_HOW_TO = "describe them in a file for `columns` (column, structure, hemisphere, measure)"


@dataclass(frozen=True)
class Meaning:
    """What a column, or the name of a region, stands for; empty if it does not say."""

    structure: str = ""
    """Abbreviation of a nucleus without its side, or the name of another region."""
    side: str = ""
    measure: str = ""
    """Column of ``_stats.tsv``."""
    factor: float = float("nan")
    """To the unit of the measure; NaN if the unit is not stated."""
    rest: tuple[str, ...] = ()
    """Words that were not recognized."""

    @property
    def abbreviation(self) -> str:
        """Structure with its side, such as ``DN_L``."""
        return "_".join(filter(None, [self.structure, self.side]))


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What the user states about a table."""

    columns: Path | None = None
    """Table with the meaning of columns: ``column``, ``structure``, ``hemisphere``, ``measure``."""
    measure: str = ""
    """Measure of columns whose names have none."""
    units: str = ""
    """``ppm`` or ``ppb`` of susceptibilities whose columns do not say."""
    participants: Path | None = None
    keep_others: bool = False
    """Keep regions that are not nuclei, and columns that are not recognized as those of participants."""
    names: Sequence[str] = field(default=())
    """Columns of participants that options name, such as covariates."""


_MEASURE = re.compile(
    rf"(?:^|_)({'|'.join(name for name in STATS_COLUMNS if name.endswith(('_ppm', '_mm3', '_per_s')))})$"
)
"""End of a name that is one of our measures."""


@cache
def interpret(name: str) -> Meaning:
    """Interpret the name of a column or region.

    >>> interpret("Left-Pallidum"), interpret("lh_Putamen_volume_mm3").measure, interpret("DN_L_mean_ppb").factor
    (Meaning(structure='GP', side='L', measure='', factor=nan, rest=()), 'volume_mm3', 0.001)
    """
    text, measure, factor = re.sub(r"(?i)\b(left|right|lh|rh)(?=[A-Z])", r"\1 ", name), "", float("nan")
    if ours := _MEASURE.search(text):
        text, measure, factor = text[: ours.start(1)], ours[1], 1.0
    words = re.findall(r"[a-z]+\d?|\d+", text.lower().replace("³", "3"))
    sides = {_SIDES[word] for word in words if word in _SIDES}
    statistics = {_STATISTICS[word] for word in words if word in _STATISTICS}
    units = {word for word in words if word in _UNITS}
    if not measure and units & {"mm3", "ml", "cm3"}:
        statistics = statistics or {"volume_mm3"}
    if not measure and not statistics and (units or _QUANTITIES & {*words}):
        statistics = {"mean_ppm"}
    recognized = {*_SIDES, *_STATISTICS, *_UNITS, *_QUANTITIES}
    rest = tuple(word for word in words if word not in recognized)
    if len(sides) > 1 or len(statistics) + bool(measure) > 1 or len(units) > 1:
        return Meaning(rest=(*rest, *(word for word in words if word in recognized)))
    if statistics:
        measure = statistics.pop()
        factor = _UNITS[units.pop()] if units else 1.0 if measure == "volume_mm3" else float("nan")
    structure = _NUCLEI.get(" ".join(word for word in rest if word not in _FILLERS), "")
    return Meaning(structure, "".join(sides), measure, factor, () if structure else rest)


def _list_names() -> dict[str, str]:
    """Return the names of the nuclei in lower case, without fillers and sides."""
    names = {}
    for structure in ALL_STRUCTURES:
        ours = structure.name.partition(" ")[2]
        theirs = [name for name, meaning in PROGRAM_NAMES.items() if meaning == ours]
        for name in (structure.nucleus, ours, *theirs, *_OTHER_NAMES.get(structure.nucleus, "").split(",")):
            names[" ".join(word for word in name.lower().split() if word not in _FILLERS)] = structure.nucleus
    names.pop("", None)
    return names


_NUCLEI = _list_names()


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of text in UTF-8, separated by tabs, commas or semicolons; NaN where missing.

    Raises
    ------
    InputError
        If it is not one, or a name of a column occurs twice.
    """
    header = path.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0] if path.is_file() else ""
    separator = max("\t,;", key=header.count)
    table = read_tsv(path, sep=separator, dtype=str, header=None, quoting=csv.QUOTE_MINIMAL)
    table = table.dropna(how="all").apply(lambda column: column.str.strip())
    names = table.iloc[0].tolist() if len(table) else []
    if len(names) < 2 or len(table) < 2 or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path.name}: not a table with a name for each column; export it as text (UTF-8) with tabs")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path.name}: column {doubled[0]} occurs twice; rename one")
    return table.iloc[1:].set_axis(pd.Index(names, dtype=object), axis=1).reset_index(drop=True)


def import_table(path: Path, out_dir: Path, options: TableOptions) -> tuple[tuple[str, ...], list[str]]:
    """Write a ROI table as results of the participant level: ``_stats.tsv`` per scan, and ``participants.tsv``.

    Parameters
    ----------
    path : Path
        One row per participant, session and structure, or per participant (and session) with one column per structure.
    out_dir : Path
        Output folder. Results of an earlier table there are replaced.
    options : TableOptions

    Returns
    -------
    tuple of str
        Measures, those of the default first.
    list of str
        What was recognized, and warnings.

    Raises
    ------
    InputError
        If columns are not recognized, values are not numbers or not plausible, or a scan has a measure twice.
    """
    table = read_table(path)
    if "excluded" in table:  # by the group level
        table = table[table["excluded"].isna()].reset_index(drop=True)
    columns = _find_columns(path, table, options.names)
    keys = pd.DataFrame({"participant_id": _labels(path, table[columns.participant]), "session_id": MISSING})
    if columns.session:
        is_known = table[columns.session].notna()
        keys.loc[is_known, "session_id"] = _labels(path, table[columns.session][is_known], "ses-")
    ignored: list[str] = []
    if columns.structure:
        regions = _interpret_regions(table, columns)
        is_nucleus = np.array([bool(region.structure) for region in regions])
        kept = is_nucleus | options.keep_others
        if not kept.any():
            shown = list_some(table[columns.structure].unique())
            raise InputError(f"{path.name}: {columns.structure}: no nucleus among {shown}; {_HOW_TO}")
        names = [
            _region(region, str(name)).abbreviation
            for region, name in zip(regions, table[columns.structure], strict=True)
        ]
        ignored = sorted({str(name) for name in table[columns.structure][~kept]})
        keys, table = keys.assign(abbreviation=names)[kept], table[kept]
    meanings, people = _interpret_columns(path, table, columns, options)
    long = _melt(path, table, keys, meanings, options.units)
    _check_plausible(path, long)
    _write(out_dir, long, _people(path, table, keys, people, options), source=path)
    recognized = sorted({meaning.measure for meaning in meanings.values()})
    nuclei = list(dict.fromkeys(long["abbreviation"]))
    n_scans = long.groupby(["participant_id", "session_id"]).ngroups
    lines = [f"{path.name}: {n_scans} scan(s), {', '.join(recognized)} of {', '.join(nuclei)}"]
    lines += [f"{path.name}: not used: {list_some(ignored)}"] if ignored else []
    other_side = {"_L": "_R", "_R": "_L"}
    lone = [name for name in nuclei if name[-2:] in other_side and name[:-2] + other_side[name[-2:]] not in nuclei]
    lines += [f"{path.name}: only one side of {list_some(lone)}"] if lone else []
    main = [name for name in ("mean_ppm", "volume_mm3") if name in recognized]
    return tuple(main or recognized), lines


@dataclass(frozen=True)
class _Columns:
    """Names of the columns of a table by their role; empty if there is none."""

    participant: str
    session: str
    structure: str
    hemisphere: str
    people: tuple[str, ...]
    others: tuple[str, ...]


def _find_columns(path: Path, table: pd.DataFrame, named: Sequence[str]) -> _Columns:
    names = [str(name) for name in table]
    first = next((name for name in names if name.startswith("Measure:")), "")  # FreeSurfer's asegstats2table
    participant = find_column(names, PARTICIPANT) or first
    if not participant:
        raise InputError(f"{path.name}: no column participant_id (columns: {list_some(names)}); rename it")
    session, structure, hemisphere = (find_column(names, usual) or "" for usual in (SESSION, STRUCTURE, HEMISPHERE))
    roles = (participant, session, structure, hemisphere)
    people = tuple(name for name in names if name.casefold() in (*_DEMOGRAPHICS, *map(str.casefold, named)))
    others = tuple(name for name in names if name not in (*roles, *people))
    return _Columns(participant, session, structure, hemisphere, people, others)


def _interpret_regions(table: pd.DataFrame, columns: _Columns) -> list[Meaning]:
    sides = table[columns.hemisphere].fillna("") if columns.hemisphere else [""] * len(table)
    return [interpret(f"{name} {side}") for name, side in zip(table[columns.structure], sides, strict=True)]


def _interpret_columns(
    path: Path, table: pd.DataFrame, columns: _Columns, options: TableOptions
) -> tuple[dict[str, Meaning], list[str]]:
    """Return the columns of measures with their meaning, and the names of those of participants."""
    described = _read_columns(options.columns)
    default = options.measure or _STATISTICS.get(columns.participant.partition(":")[2].strip().lower(), "")
    meanings, people, unclear = {}, [*columns.people], []
    for name in columns.others:
        meaning = described.get(name) or interpret(name)
        if not columns.structure:
            meaning = _with_measure(meaning, default)
            if options.keep_others and meaning.measure and _is_numeric(table[name]):
                meaning = _region(meaning, name)
        if meaning.measure and not meaning.rest and bool(meaning.structure) != bool(columns.structure):
            meanings[name] = meaning
        elif options.keep_others and name.casefold() not in _IGNORED:
            people.append(name)
        elif name.casefold() not in _IGNORED:
            unclear.append(name)
    if unclear or not meanings:
        what = f"not recognized: {list_some(unclear)}" if unclear else "no measure of a nucleus was recognized"
        state = "" if columns.structure or default else ", state their measure (`measure`)"
        raise InputError(f"{path.name}: {what}; {_HOW_TO}{state}, or keep them (`keep_others`)")
    return meanings, people


def _with_measure(meaning: Meaning, measure: str) -> Meaning:
    if meaning.measure or not measure:
        return meaning
    factor = 1.0 if measure.endswith("_mm3") else meaning.factor
    return Meaning(meaning.structure, meaning.side, measure, factor, meaning.rest)


def _region(meaning: Meaning, name: str) -> Meaning:
    """Return the meaning with the name of another region, if it is not a nucleus."""
    if meaning.structure:
        return meaning
    other = "".join(word.capitalize() for word in meaning.rest) or re.sub(r"\W", "", name)
    return Meaning(other, meaning.side, meaning.measure, meaning.factor)


def _read_columns(path: Path | None) -> dict[str, Meaning]:
    """Read the table that describes columns."""
    if path is None:
        return {}
    table = read_table(path)
    if missing := [name for name in ("column", "structure", "measure") if name not in table]:
        raise InputError(f"{path.name}: no column {missing[0]}; expected column, structure, hemisphere, measure")
    meanings = {}
    for row in table.fillna("").to_dict("records"):
        region = interpret(" ".join([row["structure"], row.get("hemisphere", "")]))
        measure = interpret(row["measure"])
        if not measure.measure:
            raise InputError(
                f"{path.name}: {row['column']}: measure {row['measure']!r}; write e.g. mean_ppm, mean_ppb or volume_mm3"
            )
        named = _region(region, row["structure"])
        meanings[row["column"]] = Meaning(named.structure, named.side, measure.measure, measure.factor)
    return meanings


def _labels(path: Path, texts: pd.Series, prefix: str = "sub-") -> pd.Series:
    """Return labels of BIDS: letters and digits, unique for each text."""
    if texts.isna().any():
        raise InputError(f"{path.name}: {texts.name} is missing in row {int(texts.isna().argmax()) + 2}; complete it")
    labels = texts.str.removeprefix(prefix).str.replace("[^0-9a-zA-Z]", "", regex=True)
    if labels.nunique() < texts.nunique() or (labels == "").any():
        raise InputError(f"{path.name}: {texts.name} must differ in letters or digits; rename them")
    return prefix + labels


def _is_numeric(texts: pd.Series) -> bool:
    return bool(pd.to_numeric(texts.dropna(), errors="coerce").notna().all())


def _melt(
    path: Path, table: pd.DataFrame, keys: pd.DataFrame, meanings: Mapping[str, Meaning], units: str
) -> pd.DataFrame:
    """Return one row per scan and structure with the measures in ppm and mm³."""
    parts = []
    for name, meaning in meanings.items():
        numbers = pd.to_numeric(table[name], errors="coerce")
        if (wrong := numbers.isna() & table[name].notna()).any():
            cells = list_some(map(repr, table[name][wrong].unique()))
            raise InputError(f"{path.name}: {name}: {cells} is not a number; write a decimal point, n/a where missing")
        factor = meaning.factor
        if np.isnan(factor):
            if not units:
                raise InputError(f"{path.name}: {name}: unit not stated; set `units` to ppm or ppb")
            factor = _UNITS[units]
        part = keys[["participant_id", "session_id"]].assign(
            abbreviation=keys["abbreviation"] if "abbreviation" in keys else meaning.abbreviation,
            measure=meaning.measure,
            value=numbers * factor,
        )
        parts.append(part)
    long = pd.concat(parts)
    index = ["participant_id", "session_id", "abbreviation"]
    if (twice := long.duplicated([*index, "measure"])).any():
        row = long[twice].iloc[0]
        where = row["participant_id"] + ("" if row["session_id"] == MISSING else f" {row['session_id']}")
        raise InputError(
            f"{path.name}: {row['measure']} of {row['abbreviation']} occurs twice for {where}; "
            "keep one, or add session_id"
        )
    return long.pivot(index=index, columns="measure", values="value").reset_index()


def _check_plausible(path: Path, long: pd.DataFrame) -> None:
    """Check the order of magnitude of the measures of nuclei, which a wrong unit changes."""
    nuclei = long[long["abbreviation"].str.partition("_")[0].isin(_NUCLEI.values())]
    for measure in {"mean_ppm", "median_ppm", "volume_mm3"}.intersection(map(str, long)):
        low, high = _LIMITS[measure.rpartition("_")[2]]
        middle = float(nuclei[measure].abs().median())
        if not low <= middle <= high and not np.isnan(middle):
            raise InputError(
                f"{path.name}: {measure}: the median of the nuclei is {middle:.3g}, expected {low:g} to {high:g}; "
                "check the unit (`units`)"
            )


def _people(
    path: Path, table: pd.DataFrame, keys: pd.DataFrame, names: Sequence[str], options: TableOptions
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return the columns of participants, and by participant those that differ between sessions."""
    rows = pd.concat([keys[["participant_id", "session_id"]], table[list(names)]], axis=1).drop_duplicates()
    twice = rows.duplicated(["participant_id", "session_id"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise InputError(
            f"{path.name}: {row['participant_id']}: {list_some(names)} differ within a session; correct them"
        )
    varying = [name for name in names if (rows.groupby("participant_id")[name].nunique(dropna=False) > 1).any()]
    if len(varying) and (rows["session_id"] == MISSING).all():
        raise InputError(f"{path.name}: {varying[0]} differs between rows of a participant; add session_id")
    general = rows.drop(columns=["session_id", *varying]).drop_duplicates("participant_id")
    if options.participants:
        others = read_labelled_table(options.participants, "participant_id")
        others = others.rename_axis("participant_id").rename(index=lambda label: f"sub-{label}")
        doubled = [name for name in others if name in general or name in varying]
        if doubled:
            raise InputError(f"{options.participants.name}: {doubled[0]} is a column of {path.name}, too; remove one")
        general = general.merge(others.reset_index(), on="participant_id", how="left")
    sessions = {
        str(who): part.drop(columns="participant_id")
        for who, part in rows[["participant_id", "session_id", *varying]].groupby("participant_id")
        if varying
    }
    return general, sessions


def _write(
    out_dir: Path, long: pd.DataFrame, people: tuple[pd.DataFrame, dict[str, pd.DataFrame]], *, source: Path
) -> None:
    """Write the results, in place of those of an earlier table."""
    if out_dir.exists() and not _is_import(out_dir):
        raise InputError(f"{out_dir}: has other files; choose an empty folder")
    for earlier in [*out_dir.glob(f"sub-*/**/*_seg-{IMPORTED}_stats.tsv"), *out_dir.glob("sub-*/*_sessions.tsv")]:
        earlier.unlink()
    out_dir.mkdir(parents=True, exist_ok=True)
    description = describe_derivative(f"ROI table {source.name}")
    write_json({**description, "SourceDatasets": [{"URL": source.as_uri()}]}, out_dir / "dataset_description.json")
    general, sessions = people
    write_tsv(general, out_dir / "participants.tsv")
    for label, visits in sessions.items():
        write_tsv(visits, out_dir / label / f"{label}_sessions.tsv")
    for name in ("volume_mm3", "mean_ppm"):
        if name not in long:
            long = long.assign(**{name: np.nan})
    for (who, session), rows in long.groupby(["participant_id", "session_id"], sort=False):
        parts = [str(who), *([] if session == MISSING else [str(session)])]
        write_tsv(
            rows.drop(columns=["participant_id", "session_id"]),
            out_dir.joinpath(*parts, "anat", "_".join([*parts, f"seg-{IMPORTED}", "stats.tsv"])),
        )


def _is_import(folder: Path) -> bool:
    """Return whether a folder is empty or the result of an earlier import."""
    entries = list(folder.iterdir())
    return not entries or any(folder.glob(f"sub-*/**/*_seg-{IMPORTED}_stats.tsv"))
