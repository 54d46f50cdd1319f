"""``dgmseg measure``: measure any quantitative map using labels from any software."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bids_dgmseg.arguments import absolute_path
from bids_dgmseg.cli import Verb, option
from bids_dgmseg.errors import InputError, as_options


def measure_any(args: argparse.Namespace) -> int:
    """Measure maps in labels; write tables, figures and a page."""
    from bids_dgmseg.bids.dataset import check_outside_raw_data
    from bids_dgmseg.bids.masks_and_maps import find_label_table
    from bids_dgmseg.image.volume import read_labels
    from bids_dgmseg.io.files import write_json, write_tsv
    from bids_dgmseg.io.nifti import check_header, load_image
    from bids_dgmseg.measurement.further_maps import (
        describe_columns,
        join_measures,
        measure_map,
        name_maps,
        name_structures,
    )
    from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
    from bids_dgmseg.models.label_tables import TABLES, read_label_table
    from bids_dgmseg.models.structures import with_pairs
    from bids_dgmseg.report.scan_page import write_measures_page

    check_outside_raw_data(args.out)
    path = args.labels
    labels = read_labels(path)
    if args.lut:
        names = read_label_table(args.lut if args.lut in TABLES else absolute_path(args.lut))
    elif source := find_label_table(path).source:
        names = read_label_table(source)
    else:
        raise InputError(
            f"{path.name}: no label table beside it (dseg.tsv); provide one with `lut`, or `lut` freesurfer for the "
            "numbers of FreeSurfer, `lut` dgmseg for those of this program"
        )
    _check_participant(path, args.map)
    structures = name_structures(labels, names, name=path.name)
    rows = with_pairs(structures) if args.bilateral else structures
    measured = [
        measure_map(image, labels, rows, name=name, labels_name=path.name, units=args.units)
        for image, name in zip(args.map, name_maps(args.map), strict=True)
    ]
    notes = [line for image in (path, *args.map) for line in check_header(load_image(image), image.name)]
    notes += [
        f"{item.path.name}: no unit is known, so its columns have none; state it in the sidecar or with `units`"
        for item in measured
        if not item.unit
    ]
    for item in measured:
        write_tsv(item.table, args.out / f"{item.name}_stats.tsv")
        columns = {str(name): STATS_COLUMNS[str(name)] for name in item.table if name in STATS_COLUMNS}
        write_json(columns, args.out / f"{item.name}_stats.json")
    write_tsv(join_measures(measured), args.out / "measures.tsv")
    write_json(describe_columns(measured), args.out / "measures.json")
    notes = [as_options(note) for note in notes]
    page = write_measures_page(args.out, measured, labels, structures, labels_name=path.name, notes=notes)
    for note in notes:
        print(f"note: {note}")
    print(f"{len(measured)} map(s) measured in {len(structures)} label(s); open {page}")
    return 0


def _check_participant(labels: Path, maps: Sequence[Path]) -> None:
    """Check that the names of labels and maps are of one participant, as far as they name one."""
    from bids_dgmseg.bids.entities import split_entities, stem_of

    participant = split_entities(stem_of(labels)).get("sub")
    for path in maps:
        other = split_entities(stem_of(path)).get("sub")
        if participant and other and participant != other:
            raise InputError(
                f"{labels.name}: labels of sub-{participant}, but {path.name} is of sub-{other}; pass its own labels"
            )


VERBS = (
    Verb(
        "measure",
        "measure any quantitative map using labels from any software: tables, figures and a page",
        measure_any,
        [
            option("MAP ...", "quantitative maps, aligned with the labels: R2*, T1, chi, …", absolute_path),
            option("--labels FILE", "label image (dseg)", absolute_path, required=True),
            option("--out DIR", "output folder (index.html, measures.tsv, …)", absolute_path, required=True),
            option(
                "--lut TABLE",
                "table of the labels: BIDS TSV or a table of FreeSurfer, ITK-SNAP or 3D Slicer; freesurfer "
                "for FreeSurfer's own numbers, suit for those of SUIT's cerebellar atlas, dgmseg for those of this "
                "program (default: the dseg.tsv of the labels)",
            ),
            option(
                "--units UNIT",
                "unit of all maps, such as 1/s (default: Units in the sidecar, or that of the BIDS suffix)",
            ),
            option("--bilateral", "add a bilateral row (left and right combined) per structure"),
        ],
    ),
)
