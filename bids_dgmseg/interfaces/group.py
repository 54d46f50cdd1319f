"""Nipype interfaces of the group level: collect the tables of many scans, analyse them.

NumPy, pandas and matplotlib are imported when an interface runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.interfaces.base import BaseInterfaceInputSpec, Directory, File, TraitedSpec, isdefined, traits

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.interfaces.base import FileInterface, check_absolute

COLLECTED = ("stats", "volumes", "susceptibility", "qc", "scans", "cohort")
"""Files between the two interfaces: outputs ``out_stats`` and so on, inputs ``in_stats``."""


class _Step(FileInterface):
    """Interface whose optional inputs may be left open."""

    def _value(self, name: str) -> Any:
        """Return an input, None if it is not set."""
        value = getattr(self.inputs, name)
        return value if isdefined(value) else None

    def _path(self, name: str) -> Path | None:
        """Return an input as a path, None if it is not set."""
        value = self._value(name)
        return Path(value) if value else None


class _CollectStatsInputSpec(BaseInterfaceInputSpec):
    results = traits.List(Directory, mandatory=True, minlen=1, desc="output folders of the participant level")
    datasets = traits.List(
        Directory,
        desc="dataset with participants.tsv and sessions.tsv of each folder of results (default: the folder itself, "
        "otherwise its DatasetLinks, otherwise the dataset around derivatives/)",
    )
    tables_dir = traits.Str(
        desc="folder of the group tables, from which pages of participants are linked (default: the first of results)"
    )
    participant_label = traits.List(traits.Str, desc="participants to use, without sub- (default: all)")
    session_label = traits.List(traits.Str, desc="sessions to use, without ses- (default: all)")
    model = traits.List(traits.Str, desc="models to use (default: all)")
    site_column = traits.Str(
        desc="column of participants.tsv or sessions.tsv with the site (default: site or site_id, otherwise the folder "
        "of results, with one folder the scanner)"
    )
    group_column = traits.Str(desc="column with the groups to compare (default: group or diagnosis)")
    age_column = traits.Str(desc="column with the ages (default: age, or a name such as age_at_scan)")
    include_failed = traits.Bool(
        False, usedefault=True, desc="use scans and nuclei with a red rating in the statistics"
    )
    qc = traits.List(File(exists=True), desc="qc_decisions.tsv of raters: failed scans and nuclei are left out")
    outdated = traits.Dict(
        traits.Str,
        traits.Str,
        desc="name of a _stats.tsv in the first folder of results to why it is out of date and left out of the "
        "statistics, such as a changed image",
    )


class _CollectStatsOutputSpec(TraitedSpec):
    out_stats = File(
        exists=True,
        desc="long table, one row per scan, model and nucleus: BIDS entities, site, age (years), all measures (volumes "
        "in mm³, susceptibilities in ppm), why the value enters no statistics, columns of participants.tsv",
    )
    out_volumes = File(exists=True, desc="one row per scan and model: volume of each nucleus in mm³")
    out_susceptibility = File(exists=True, desc="one row per scan and model: mean susceptibility per nucleus in ppm")
    out_qc = File(exists=True, desc="one row per scan and model: ratings, quality, input and reconstruction of the map")
    out_maps = File(
        exists=True, desc="one row per scan and model: mean of each further map per nucleus; not set if there is none"
    )
    out_scans = File(
        exists=True,
        desc="one row per scan and model: person, age and time since the first session in years, sex, group, site",
    )
    out_cohort = File(
        exists=True, desc="JSON: keys of the tables, data dictionaries, settings, warnings, numbers of unusable results"
    )


class CollectStats(_Step):
    """Collect ``_stats.tsv`` and ``_qc.json`` of many scans, with ages, groups and sites of the participants.

    The files are written to the working folder. Always runs, since Nipype does not look into folders for changes.

    Examples
    --------
    >>> CollectStats(results=["out"], group_column="diagnosis").run().outputs.out_stats  # doctest: +SKIP
    """

    input_spec = _CollectStatsInputSpec
    output_spec = _CollectStatsOutputSpec
    _always_run = True

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Collect the tables."""
        from bids_dgmseg.study.collection import collect_stats
        from bids_dgmseg.study.results_folders import ResultsSelection, find_results_folders

        tables_dir = self._value("tables_dir")
        files = collect_stats(
            find_results_folders(
                [Path(path) for path in self.inputs.results],
                datasets=[Path(path) for path in self._value("datasets") or ()],
                tables_dir=Path(tables_dir) if tables_dir else None,
                outdated=self._value("outdated"),
            ),
            folder,
            selection=ResultsSelection(
                *(tuple(self._value(name) or ()) for name in ("participant_label", "session_label", "model"))
            ),
            site_column=self._value("site_column"),
            group_column=self._value("group_column"),
            age_column=self._value("age_column"),
            include_failed=self.inputs.include_failed,
            qc=[Path(path) for path in self._value("qc") or ()],
        )
        maps = {"out_maps": str(files.maps)} if files.maps else {}
        return {**maps, **{f"out_{name}": str(getattr(files, name)) for name in COLLECTED}}


class _AnalyseGroupInputSpec(BaseInterfaceInputSpec):
    in_stats = File(exists=True, mandatory=True, desc="out_stats of CollectStats")
    in_volumes = File(exists=True, mandatory=True, desc="out_volumes of CollectStats")
    in_susceptibility = File(exists=True, mandatory=True, desc="out_susceptibility of CollectStats")
    in_qc = File(exists=True, mandatory=True, desc="out_qc of CollectStats")
    in_maps = File(exists=True, desc="out_maps of CollectStats")
    in_scans = File(exists=True, mandatory=True, desc="out_scans of CollectStats")
    in_cohort = File(exists=True, mandatory=True, desc="out_cohort of CollectStats")
    out_dir = traits.Str(desc="folder for tables and page, absolute, created if needed (default: the working folder)")
    measures = traits.List(
        traits.Str, list(GroupOptions.measures), usedefault=True, minlen=1, desc="columns of _stats.tsv to analyse"
    )
    control_filter = traits.Str(
        desc="condition for healthy controls, such as 'group == \"HC\" and age > 40': susceptibility "
        "is adjusted for volume by their regression, and other participants are compared with them"
    )
    covariates = traits.List(
        traits.Str,
        desc="columns that harmonization preserves and group comparisons adjust for, or none (default: age, sex and, "
        "for comparisons, site; harmonization also preserves the group)",
    )
    correlate = traits.List(
        traits.Str,
        desc="columns with clinical variables: partial correlation and regression, adjusted for the covariates",
    )
    combat_age = traits.Enum("linear", "spline", usedefault=True, desc="effect of age that harmonization preserves")
    combat_longitudinal = traits.Bool(
        False, usedefault=True, desc="harmonize repeated scans with a random intercept per participant"
    )
    harmonization_save = traits.Str(desc="JSON file to write the harmonization to, for harmonization_apply of others")
    harmonization_apply = traits.Str(desc="JSON file with a saved harmonization to apply instead of fitting one")
    norms_save = traits.Str(desc="JSON file to write the centiles of the controls to, for norms of others")
    norms = traits.Str(desc="JSON file with saved norms to compare with instead of those of the controls")
    evaluation = Directory(
        desc="output folder of dgmseg evaluate; age curves are also fitted to its reference segmentations"
    )
    bootstrap = traits.Range(
        low=0,
        value=0,
        usedefault=True,
        desc="bootstrap samples for the 95 % limits of age curves; 0: profile likelihood",
    )
    warnings = traits.List(traits.Str, desc="further warnings, to be shown on the page")
    n_missing = traits.Range(low=0, value=0, usedefault=True, desc="scans of the study without results")
    nprocs = traits.Range(
        low=1, value=1, usedefault=True, nohash=True, desc="2 or more: a second process renders figures for print"
    )


class _AnalyseGroupOutputSpec(TraitedSpec):
    out_tables = traits.List(
        File(exists=True),
        desc="group_*.tsv: measures of all scans and results; each has a data dictionary (.json)",
    )
    out_page = File(exists=True, desc="group.html; not set if it could not be written, see out_warnings")
    out_reference_group = traits.Str(desc="group that the others are compared with, and why; empty without groups")
    out_warnings = traits.List(traits.Str, desc="all warnings, in one line each")
    out_notes = traits.List(traits.Str, desc="why tables are empty")


class AnalyseGroup(_Step):
    """Analyse the tables of `CollectStats`: sides, outliers, sites, ages, groups and changes; write tables and a page.

    With ``out_dir``, tables and page are written there, and links on the page work if it is the ``tables_dir`` of
    `CollectStats`.
    """

    input_spec = _AnalyseGroupInputSpec
    output_spec = _AnalyseGroupOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Analyse the tables."""
        from bids_dgmseg.report.group_report import analyse_group
        from bids_dgmseg.study.collection import CollectedStats

        if out_dir := self._value("out_dir"):
            check_absolute(out_dir)
        report = analyse_group(
            CollectedStats(
                maps=Path(maps) if (maps := self._value("in_maps")) else None,
                **{name: Path(getattr(self.inputs, f"in_{name}")) for name in COLLECTED},
            ),
            Path(out_dir) if out_dir else folder,
            options=GroupOptions(
                control_filter=self._value("control_filter"),
                covariates=tuple(self._value("covariates") or ()),
                correlate=tuple(self._value("correlate") or ()),
                combat_age=self.inputs.combat_age,
                combat_longitudinal=self.inputs.combat_longitudinal,
                harmonization_save=self._path("harmonization_save"),
                harmonization_apply=self._path("harmonization_apply"),
                norms_save=self._path("norms_save"),
                norms=self._path("norms"),
                measures=tuple(self.inputs.measures),
                evaluation=self._path("evaluation"),
                bootstrap=self.inputs.bootstrap,
            ),
            warnings=self._value("warnings") or (),
            n_missing=self.inputs.n_missing,
            nprocs=self.inputs.nprocs,
        )
        return {
            "out_tables": list(map(str, report.tables)),
            **({"out_page": str(report.page)} if report.page else {}),
            "out_reference_group": report.reference_group,
            "out_warnings": list(report.warnings),
            "out_notes": list(report.notes),
        }
