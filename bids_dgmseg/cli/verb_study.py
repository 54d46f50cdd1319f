"""Verbs around a study: ``analyse`` (ROI tables of any program), ``review``, ``corrections`` and ``view``."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from bids_dgmseg.arguments import absolute_path, build_record, list_arguments
from bids_dgmseg.cli import Option, Verb, option
from bids_dgmseg.config import GroupOptions, RunConfig
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError, for_terminal, list_some
from bids_dgmseg.models.registry import get_model

_OF_RESULTS = {"merge", "include_failed", "qc"}
"""Options that need results of this program."""

OUTPUT_DIR = option("OUTPUT_DIR", "output folder of bids_dgmseg", absolute_path)


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


def review(args: argparse.Namespace) -> int:
    """Write the page on which raters pass or fail scans and nuclei."""
    from bids_dgmseg.report.review_page import find_review_scans, write_review_page

    if not args.output_dir.is_dir():
        raise InputError(f"{args.output_dir}: no such folder; pass an output folder of bids_dgmseg")
    scans = find_review_scans(args.output_dir, bids_dir=args.bids_dir, model=args.model)
    with StatusLine() as status:
        page, warnings = write_review_page(args.output_dir, scans, report=status.update)
    for line in warnings:
        print(f"warning: {for_terminal(line)}")
    print(f"{len(scans)} scan(s) on {page}")
    return 0


def prepare_corrections(args: argparse.Namespace) -> int:
    """Copy the labels of scans into a dataset in which they can be corrected."""
    from bids_dgmseg.bids import corrections

    model = get_model(args.model)
    written, kept = corrections.prepare_corrections(args.output_dir, args.dir, model, scans=args.scans)
    print("\n".join([*map(str, written), *(f"{path}: exists and is kept" for path in kept)]))
    if written:
        print(f"{len(written)} scan(s) ready; edit, then run bids_dgmseg … participant --corrections {args.dir}")
    return 0


def write_surfaces(args: argparse.Namespace) -> int:
    """Write the surface of each nucleus of a label image as STL and GIFTI."""
    from bids_dgmseg.bids.dataset import check_outside_raw_data
    from bids_dgmseg.bids.entities import join_entities, split_entities, stem_of
    from bids_dgmseg.bids.masks_and_maps import find_label_table
    from bids_dgmseg.image.volume import find_surface, read_labels
    from bids_dgmseg.io.nifti import write_surface

    check_outside_raw_data(args.surfaces)
    labels, table, stem = read_labels(args.labels), find_label_table(args.labels), stem_of(args.labels)
    masks = {name: labels.array == value for value, name in table.abbreviations.items()}
    if missing := [name for name in args.nuclei or masks if name not in masks or not masks[name].any()]:
        print(f"note: {args.labels.name}: no voxels of {list_some(missing)}")
    chosen = [name for name in args.nuclei or masks if name not in missing]
    if not chosen:
        raise InputError(f"{args.labels.name}: none of its labels has a name; add its dseg.tsv, or check --nuclei")
    for name in chosen:
        surface = find_surface(masks[name], labels.affine)
        nucleus, side = (name[:-2], name[-1]) if name.endswith(("_L", "_R")) else (name, "")
        entities = {**split_entities(stem), **({"hemi": side} if side else {}), "label": re.sub(r"\W|_", "", nucleus)}
        path = args.surfaces / f"{'' if 'sub-' in stem else stem + '_'}{join_entities(entities)}_mesh"
        write_surface(surface.vertices, surface.triangles, path)
        print(f"{for_terminal(name)}: {surface.volume_mm3:.0f} mm³, {len(surface.triangles)} triangles: {path}.stl")
    return 0


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
                "keep regions that are not nuclei, and unrecognized columns as columns of participants",
            ),
            *(
                Option(tuple(names), keywords)
                for item, names, keywords in list_arguments(GroupOptions)
                if item.name not in _OF_RESULTS
            ),
        ],
    ),
    Verb(
        "view",
        "write the surface of each nucleus as STL and GIFTI, in scanner coordinates (mm), for stereotactic planning "
        "and viewers",
        write_surfaces,
        [
            option("LABELS", "label image (dseg), named by its dseg.tsv", absolute_path),
            option("--surfaces DIR", "output folder", absolute_path, required=True),
            option("--nuclei NAME ...", "only these, such as STN_L (default: all)"),
        ],
    ),
    Verb(
        "review",
        "write review.html: a montage per nucleus over all scans, on which raters pass or fail them; the page saves "
        "their decisions as qc_decisions.tsv, for bids_dgmseg group --qc",
        review,
        [
            OUTPUT_DIR,
            option("--bids-dir FOLDER", "dataset with the maps, if OUTPUT_DIR does not link to it", absolute_path),
            option("--model NAME", "model whose results are shown, if there are several"),
        ],
    ),
    Verb(
        "corrections",
        "prepare the labels of scans for manual correction; then pass the folder to bids_dgmseg --corrections",
        prepare_corrections,
        [
            option(
                "ACTION",
                "init: copy the labels of the scans and their label tables to DIR; files that exist are kept",
                choices=("init",),
                metavar=None,
            ),
            OUTPUT_DIR,
            option("DIR", "dataset of corrections, created if it does not exist", absolute_path),
            option("--scans SCAN ...", "scans such as sub-01 or sub-01_ses-1_run-1 (default: all with results)"),
            option("--model NAME", "model whose labels are corrected (default: dgm16)", default="default"),
        ],
    ),
)
