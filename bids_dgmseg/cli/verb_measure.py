"""``dgmseg measure`` and ``dgmseg prove``: labels from any software, measured in any map and proved on their map."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.arguments import absolute_path
from bids_dgmseg.cli import Verb, option
from bids_dgmseg.errors import InputError, as_options

if TYPE_CHECKING:
    from bids_dgmseg.image.volume import Volume
    from bids_dgmseg.models.structures import Structure


def measure_any(args: argparse.Namespace) -> int:
    """Measure maps in labels; write tables, figures and a page."""
    from bids_dgmseg.bids.dataset import check_outside_raw_data
    from bids_dgmseg.bids.entities import check_participant
    from bids_dgmseg.io.files import write_json, write_tsv
    from bids_dgmseg.io.nifti import check_header, load_image
    from bids_dgmseg.measurement.further_maps import describe_columns, join_measures, measure_map, name_maps
    from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
    from bids_dgmseg.models.structures import with_pairs
    from bids_dgmseg.report.scan_page import write_measures_page

    check_outside_raw_data(args.out)
    path = args.labels
    labels, structures = _read_structures(path, args.lut)
    check_participant(path, args.map)
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


def _read_structures(path: Path, lut: str | None) -> tuple[Volume, list[Structure]]:
    """Read a label image and name its labels."""
    from bids_dgmseg.bids.masks_and_maps import find_label_table
    from bids_dgmseg.image.volume import read_labels
    from bids_dgmseg.measurement.further_maps import name_structures
    from bids_dgmseg.models.label_tables import TABLES, read_label_table

    labels = read_labels(path)
    source = (lut if lut in TABLES else absolute_path(lut)) if lut else find_label_table(path).source
    if not source:
        raise InputError(
            f"{path.name}: no label table beside it (dseg.tsv); provide one with `lut`, or `lut` freesurfer for the "
            "numbers of FreeSurfer, `lut` dgmseg for those of this program"
        )
    return labels, name_structures(labels, read_label_table(source), name=path.name)


def prove_program(args: argparse.Namespace) -> int:
    """Plant known changes in a map, let another program label it, and report what is recovered."""
    import numpy as np

    from bids_dgmseg.bids.dataset import check_outside_raw_data
    from bids_dgmseg.bids.entities import check_participant, join_entities, split_entities, stem_of
    from bids_dgmseg.bids.output_dataset import describe_derivative
    from bids_dgmseg.image.grids import check_grid
    from bids_dgmseg.image.units import check_chi
    from bids_dgmseg.image.volume import Volume, read_labels
    from bids_dgmseg.io.files import read_sidecar, sidecar_path, write_json, write_tsv
    from bids_dgmseg.io.nifti import write_like
    from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
    from bids_dgmseg.measurement.proof import PLANTED_PPB, PlantedMap, prove

    check_outside_raw_data(args.out)
    if not all(place in args.run for place in ("{in}", "{out}")):
        raise InputError(f"`run` {args.run!r}: lacks {{in}} or {{out}}, which stand for the map and its labels")
    words = split_command(args.run)
    check_participant(args.labels, [args.map])
    checked, original = check_chi(args.map, read_sidecar(args.map)), Volume.read(args.map)
    labels, structures = _read_structures(args.labels, args.lut)
    check_grid(args.labels, labels, checked.chi_ppm)
    entities, factor = split_entities(stem_of(args.map)), 1000 if checked.units == "ppb" else 1
    written: list[Path] = []

    def segment(planted: PlantedMap) -> Any:
        def name(suffix: str, desc: str = "planted") -> Path:
            return args.out / f"{join_entities({**entities, 'desc': f'{desc}{len(written) + 1}'})}_{suffix}.nii.gz"

        changed, result = planted.chi.array != checked.chi_ppm.array, name("dseg", "proved")
        values = np.where(changed & np.isfinite(planted.chi.array), factor * planted.chi.array, original.array)
        path = write_like(values.astype(np.float32), args.map, name("Chimap"))
        truth = write_like(np.moveaxis(planted.true_fractions(structures), 0, -1), args.map, name("probseg"))
        about = {
            "Description": "Map with known changes; the probabilities are the true fractions of voxels in each label",
            "Sources": [str(args.map), str(args.labels)],
            "SusceptibilityAddedPpb": dict.fromkeys(planted.ppb, PLANTED_PPB),
            "VolumeChangePercent": {label: value for part in planted.percent.values() for label, value in part.items()},
            "ShiftMm": (checked.chi_ppm.affine[:3, :3] @ planted.shift_voxels).round(6).tolist(),
            "NoisePpm": planted.noise_ppm,
        }
        write_json({**about, "Units": checked.units}, sidecar_path(path))
        write_json({**about, "LabelMap": [row.abbreviation for row in structures]}, sidecar_path(truth))
        written.append(path)
        run_program(words, path, result)
        answer = read_labels(result)
        check_grid(result, answer, checked.chi_ppm)
        return answer.array

    proof = prove(checked.chi_ppm, labels, structures, segment, full=args.full)
    table = proof.table.reset_index(names="abbreviation")
    stem = args.out / f"{join_entities({**entities, 'desc': 'planted'})}_stats"
    write_tsv(table, stem.with_suffix(".tsv"))
    write_json({str(name): STATS_COLUMNS[str(name)] for name in table}, stem.with_suffix(".json"))
    write_json(describe_derivative("Maps with planted changes"), args.out / "dataset_description.json")
    print(proof.table.round(2).to_string(na_rep="n/a"))
    for line in proof.warnings:
        print(f"note: {as_options(line)}")
    return int(proof.table.isna().all(axis=None))


def split_command(command: str) -> list[str]:
    """Split a command into words as a shell does; `InputError` if a quotation mark lacks its partner."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise InputError(f"`run` {command!r}: {str(error).lower()}") from error


def run_program(command: Sequence[str], image: Path, labels: Path) -> None:
    """Run a command, without a shell, that labels an image; `InputError` if it fails or writes no labels."""
    words = [word.replace("{in}", str(image)).replace("{out}", str(labels)) for word in command]
    labels.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise InputError(f"{words[0]}: cannot be run ({error.strerror}); check `run`") from error
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    if done.returncode:
        raise InputError(f"{words[0]}: ended with exit code {done.returncode} for {image.name} ({last}); check `run`")
    if not labels.is_file():
        raise InputError(f"{words[0]}: wrote no {labels.name} ({last}); check `run`")


LUT = option(
    "--lut TABLE",
    "table of the labels: BIDS TSV or a table of FreeSurfer, ITK-SNAP or 3D Slicer; freesurfer for FreeSurfer's own "
    "numbers, suit for those of SUIT's cerebellar atlas, dgmseg for those of this program (default: the dseg.tsv of "
    "the labels)",
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
            LUT,
            option(
                "--units UNIT",
                "unit of all maps, such as 1/s (default: Units in the sidecar, or that of the BIDS suffix)",
            ),
            option("--bilateral", "add a bilateral row (left and right combined) per structure"),
        ],
    ),
    Verb(
        "prove",
        "plant known changes in a map, let any program label it again, and report what is recovered",
        prove_program,
        [
            option("MAP", "susceptibility map in ppm or ppb", absolute_path),
            option("LABELS", "labels that the program made of the map (dseg), on its grid", absolute_path),
            option("OUT", "output folder (planted maps, their truth, labels, table)", absolute_path),
            option("--run COMMAND", "command that labels the map {in} and writes {out}, in quotes", required=True),
            LUT,
            option("--full", "plant growth and a smaller loss of volume as well"),
        ],
    ),
)
