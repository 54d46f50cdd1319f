"""``dgmseg analyse``: the group level for ROI tables of any program."""

from __future__ import annotations

import argparse
from dataclasses import replace

from bids_dgmseg.arguments import absolute_path, build_record, list_arguments
from bids_dgmseg.cli import Option, Verb, option
from bids_dgmseg.config import GroupOptions, RunConfig

_OF_RESULTS = {"merge", "include_failed", "qc"}
"""Options that need results of this program."""


def analyse(args: argparse.Namespace) -> int:
    """Import the table and run the group level on it."""
    from bids_dgmseg.run.environment import limit_library_threads
    from bids_dgmseg.run.group import analyse_folders
    from bids_dgmseg.study.results import find_results_folders
    from bids_dgmseg.study.roi_tables import TableOptions, import_table
    from bids_dgmseg.study.study import MEASURES

    limit_library_threads(1)

    values = {name: value for name, value in vars(args).items() if value is not None}
    group: GroupOptions = build_record(GroupOptions, values)
    named = [group.group_column, group.site_column, *group.covariates, *group.correlate]
    options = TableOptions(
        columns=args.columns,
        measure=args.measure,
        units=args.units,
        participants=args.participants,
        keep_others=args.keep_others,
        names=tuple(filter(None, named)),
    )
    dataset = args.out / "table"
    measures, lines = import_table(args.table, dataset, options)
    print("\n".join(lines))
    if "measures" not in values and measures != MEASURES:
        group = replace(group, measures=measures)
    folders = find_results_folders([dataset], datasets=[dataset], tables_dir=args.out)
    return analyse_folders(RunConfig(bids_dir=dataset, output_dir=args.out, level="group", group=group), folders)


VERBS = (
    Verb(
        "analyse",
        "analyse a ROI table from any software as bids_dgmseg group does its own results",
        analyse,
        [
            option(
                "TABLE",
                "text in UTF-8: one row per participant, session and structure, or per participant (and session) with "
                "one column per structure",
                absolute_path,
            ),
            option("OUT", "output folder, created if it does not exist", absolute_path),
            option("--participants FILE", "participants.tsv with age, sex, group, site", absolute_path, default=None),
            option(
                "--columns FILE",
                "table that describes columns: column, structure, hemisphere, measure (default: by their names)",
                absolute_path,
                default=None,
            ),
            option("--measure NAME", "measure of columns that name none, such as mean_ppm or volume_mm3", default=""),
            option("--units", "unit of susceptibilities that state none", choices=("ppm", "ppb"), default=""),
            option(
                "--keep-others",
                "keep regions that are not nuclei, and columns that are not recognized as participants'",
            ),
            *(
                Option(tuple(names), keywords)
                for item, names, keywords in list_arguments(GroupOptions)
                if item.name not in _OF_RESULTS
            ),
        ],
    ),
)
