"""Nipype interface of the group level, from the results of many scans to tables and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from nipype.interfaces.base import BaseInterfaceInputSpec, Directory, File, TraitedSpec, isdefined, traits

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.interfaces.step import FileInterface, check_absolute


class _AnalyseGroupInputSpec(BaseInterfaceInputSpec):
    results = traits.List(Directory, mandatory=True, minlen=1, desc="output folders of the participant level")
    datasets = traits.List(
        Directory,
        desc="dataset with participants.tsv and sessions.tsv of each folder of results (default: the folder itself, "
        "otherwise its DatasetLinks, otherwise the dataset around derivatives/)",
    )
    out_dir = traits.Str(desc="folder for tables and page, absolute, created if needed (default: the working folder)")
    participant_label = traits.List(traits.Str, desc="participants to use, without sub- (default: all)")
    session_label = traits.List(traits.Str, desc="sessions to use, without ses- (default: all)")
    model = traits.List(traits.Str, desc="models to use (default: all)")
    options = traits.Dict(
        traits.Str,
        traits.Any,
        desc="fields of bids_dgmseg.config.GroupOptions, such as {'group_column': 'diagnosis'}",
    )
    warnings = traits.List(traits.Str, desc="further warnings, to be shown on the page")
    n_missing = traits.Range(low=0, value=0, usedefault=True, desc="scans of the study without results")


class _AnalyseGroupOutputSpec(TraitedSpec):
    out_tables = traits.List(
        File(exists=True),
        desc="group_*.tsv: measures of all scans and results; each has a data dictionary (.json)",
    )
    out_page = File(exists=True, desc="group.html; not set if it could not be written, see out_warnings")
    out_reference_group = traits.Str(desc="group that the others are compared with, and why; empty without groups")
    out_warnings = traits.List(traits.Str, desc="all warnings, in one line each")
    out_notes = traits.List(traits.Str, desc="why tables are not written")
    out_n_unusable = traits.Int(desc="damaged tables and scans whose results are out of date")


class AnalyseGroup(FileInterface):
    """Analyse the ``_stats.tsv`` and ``_qc.json`` of many scans: sides, outliers, sites, ages, groups and changes.

    Tables and a page are written to ``out_dir``. Always runs, since Nipype does not look into folders for changes.

    Examples
    --------
    >>> AnalyseGroup(results=["out"], options={"group_column": "diagnosis"}).run().outputs.out_page  # doctest: +SKIP
    """

    input_spec = _AnalyseGroupInputSpec
    output_spec = _AnalyseGroupOutputSpec
    _always_run = True

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Analyse the results and write tables and page."""
        from bids_dgmseg.report.group_page import analyse_group
        from bids_dgmseg.study.results import ResultsSelection, find_results_folders

        def value(name: str, default: Any) -> Any:
            trait = getattr(self.inputs, name)
            return trait if isdefined(trait) else default

        out_dir = Path(value("out_dir", folder))
        check_absolute(out_dir)
        report = analyse_group(
            find_results_folders(
                [Path(path) for path in self.inputs.results],
                datasets=[Path(path) for path in value("datasets", ())],
                tables_dir=out_dir,
            ),
            out_dir,
            options=read_options(value("options", {})),
            selection=ResultsSelection(
                *(tuple(value(name, ())) for name in ("participant_label", "session_label", "model"))
            ),
            warnings=value("warnings", ()),
            n_missing=self.inputs.n_missing,
        )
        return {
            "out_tables": list(map(str, report.tables)),
            **({"out_page": str(report.page)} if report.page else {}),
            "out_reference_group": report.reference_group,
            "out_warnings": list(report.warnings),
            "out_notes": list(report.notes),
            "out_n_unusable": report.n_unusable,
        }


def read_options(values: Mapping[str, Any]) -> GroupOptions:
    """Convert plain values to options; ValueError for unknown names and values of another type."""
    if unknown := {*values} - {field.name for field in fields(GroupOptions)}:
        raise ValueError(f"`options`: unknown {', '.join(sorted(unknown))}")
    return msgspec.convert(dict(values), GroupOptions, dec_hook=lambda _, value: Path(value))
