"""The files at the top of the output: they describe the whole and are written anew at each run."""

from __future__ import annotations

import contextlib
import csv
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.citation import read_boilerplate, say_reconstruction
from bids_dgmseg.bids.datasets import find_sources
from bids_dgmseg.bids.description import DATASET_DESCRIPTION, linked_datasets, read_description
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import path_to_url, write_json, write_text
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import STRUCTURES, Structure

BIDS_VERSION = "1.10.0"

IGNORED = (
    "*.html",
    "*_xfm.*",
    "*_stats.tsv",
    "*_stats.json",
    "*_qc.json",
    "group_*",
    "figures",
    "figures/**",
    "**/figures",
    "**/figures/**",
    "**/log",
    "**/log/**",
)

_README = """\
Deep nuclei of the brain on quantitative susceptibility maps
============================================================

Made by bids_dgmseg {version}. Left is always the patient's left.

sub-X.html                         open this first: pictures, table and warnings of each scan
sub-X/[ses-Y/]anat/
    *_Chimap.nii.gz                susceptibility map (ppm), where it was made of echoes
    *_seg-MODEL_dseg.nii.gz        labels on the grid of the chi map; numbers in dseg.tsv
    *_seg-MODEL_probseg.nii.gz     probabilities, one volume a nucleus (LabelMap in the .json)
    *_label-*_desc-MODEL_mask.*    one binary mask a nucleus and side; brain, cerebellum, ventricles
    *_seg-MODEL_stats.tsv          volumes (mm3) and susceptibilities (ppm); columns explained in the .json
    *_seg-MODEL_qc.json            how the map was understood, warnings, settings, versions
group.html, group_*.tsv            page and tables of all scans, once the group level was run
logs/CITATION.md                   text and references for a paper
"""


def check_output(settings: Settings) -> None:
    """Refuse an output directory that would mix with the raw data or cannot be written.

    Raises
    ------
    InputError
        If it is the dataset itself, lies inside a ``sub-X`` folder or ``sourcedata`` of it, or is read-only.
    """
    output, root = settings.output_dir, settings.bids_dir
    resolved, inside = output.resolve(), root.resolve()
    if resolved == inside:
        raise InputError(f"{output.name}: is the input dataset; give another output folder, such as {_usual(root)}")
    if resolved.is_relative_to(inside):
        first = resolved.relative_to(inside).parts[0]
        if first.startswith("sub-") or first in ("sourcedata", "code"):
            raise InputError(
                f"{output.name}: lies in {first} of the input; give another output folder, such as {_usual(root)}"
            )
    if not settings.dry_run:
        _check_writable(output)


def _usual(root: Path) -> str:
    return f"{root.name}/derivatives/bids_dgmseg"


def _check_writable(output: Path) -> None:
    probe = output / f".{uuid.uuid4().hex}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{output}: cannot be written ({reason}); choose another output folder") from error


def write_dataset_files(settings: Settings, scans: Sequence[Scan], model: Model) -> None:
    """Write what describes the output as a whole.

    Each file is replaced in one step, so runs of several participants may do this at the same time. What earlier
    runs with other models or sources added is kept.

    Parameters
    ----------
    settings : Settings
        Where the datasets lie.
    scans : sequence of Scan
        The scans of this run.
    model : Model
        The model of this run.
    """
    output = settings.output_dir
    write_json(_description(settings, scans), output / DATASET_DESCRIPTION)
    write_text(label_table(STRUCTURES), output / "dseg.tsv")
    write_text(_descriptions(output / "descriptions.tsv", scans, model), output / "descriptions.tsv")
    _ignore(output)
    if not any((output / name).exists() for name in ("README.md", "README.txt", "README.rst")):
        write_text(_README.format(version=bids_dgmseg.__version__), output / "README")
    template = read_boilerplate("citation.md")
    reconstruction = say_reconstruction([len(scan.echoes) for scan in scans if scan.echoes or not scan.from_echoes])
    reconstruction += "\n" if reconstruction else ""
    text = template.format(**_citation(settings, model), reconstruction=reconstruction)
    write_text(text, output / "logs" / "CITATION.md")
    write_text(read_boilerplate("references.bib"), output / "logs" / "CITATION.bib")


def write_merged_dataset_files(output: Path, trees: Sequence[Path]) -> None:
    """Make a dataset of a folder that gathers the tables of several; files that are there stay.

    Parameters
    ----------
    output : Path
        Where the tables go.
    trees : sequence of Path
        Output folders that are merged.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    _check_writable(output)
    _ignore(output)
    if (output / DATASET_DESCRIPTION).exists():
        return
    links = [path_to_url(os.path.relpath(tree, output)) for tree in trees]
    write_json(
        {
            "Name": "bids_dgmseg: deep nuclei of the brain, tables of several datasets",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "bids_dgmseg", "Version": bids_dgmseg.__version__}],
            "SourceDatasets": [{"URL": link} for link in links],
        },
        output / DATASET_DESCRIPTION,
    )
    if not (output / "README").exists():
        names = "\n".join(f"    {link}" for link in links)
        write_text(
            f"Tables of the deep nuclei in several datasets\n\n{names}\n\nMade by bids_dgmseg "
            f"{bids_dgmseg.__version__}.",
            output / "README",
        )


def _ignore(output: Path) -> None:
    """Have the validator ignore what BIDS has no names for; lines that are there stay."""
    path = output / ".bidsignore"
    try:
        there = path.read_text(encoding="utf-8", errors="backslashreplace")
    except FileNotFoundError:
        there = ""
    known = {line.strip() for line in there.splitlines()}
    if missing := [line for line in IGNORED if line not in known]:
        write_text("\n".join([*there.splitlines(), *missing]), path)


def label_table(structures: Sequence[Structure]) -> str:
    """Write the label table that explains a dseg, as tab-separated text."""
    columns = ("index", "name", "abbreviation", "hemisphere", "color", "mapping")
    rows = ["\t".join(str(getattr(structure, column)) for column in columns) for structure in structures]
    return "\n".join(["\t".join(columns), *rows])


def _description(settings: Settings, scans: Sequence[Scan]) -> dict[str, Any]:
    output = settings.output_dir
    roots = {source.name: source.root for source in find_sources(settings)}
    roots |= {scan.dataset_name: scan.dataset_root for scan in scans}
    links = {name: path_to_url(os.path.relpath(root, output)) for name, root in roots.items()}
    licences = {str(licence) for root in roots.values() if (licence := read_description(root).get("License"))}
    return {
        "Name": "bids_dgmseg: deep nuclei of the brain on susceptibility maps",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "License": "; ".join(sorted(licences)) or "as the source datasets",
        "GeneratedBy": [
            {
                "Name": "bids_dgmseg",
                "Version": bids_dgmseg.__version__,
                "Description": "Segmentation and measurement of deep nuclei on quantitative susceptibility maps",
            }
        ],
        "HowToAcknowledge": "See logs/CITATION.md",
        "SourceDatasets": [_source(name, root, links[name]) for name, root in roots.items()],
        "DatasetLinks": {**linked_datasets(output), **links},
    }


def _source(name: str, root: Path, link: str) -> dict[str, str]:
    description = read_description(root)
    version = {"Version": str(description["DatasetVersion"])} if description.get("DatasetVersion") else {}
    doi = {"DOI": str(description["DatasetDOI"])} if description.get("DatasetDOI") else {}
    return {"URL": link, **doi, **version}


def _descriptions(path: Path, scans: Sequence[Scan], model: Model) -> str:
    """Explain the values of ``desc-``, keeping the rows of earlier runs."""
    known: dict[str, str] = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as file, contextlib.suppress(csv.Error):
            for row in csv.DictReader(file, delimiter="\t"):
                known[row.get("desc_id") or ""] = row.get("description") or ""
    known.pop("", None)
    known[f"desc-{model.name}"] = f"Nuclei by model {model.name}: {model.title}"
    for own in sorted({scan.entities["desc"] for scan in scans if "desc" in scan.entities}):
        named = model.name[:1].upper() + model.name[1:]
        known[f"desc-{own}"] = f"From the chi map with desc-{own}"
        known[f"desc-{own}{named}"] = f"Nuclei by model {model.name} on the chi map with desc-{own}"
    return "\n".join(["desc_id\tdescription", *(f"{key}\t{text}" for key, text in sorted(known.items()))])


def _citation(settings: Settings, model: Model) -> dict[str, str]:
    nuclei = list(dict.fromkeys(structure.nucleus for structure in model.structures))
    keys = [key for key in model.citation if key != "bids_dgmseg"]
    if settings.weights:
        weights = "Its weights were given by the user."
    elif model.weights:
        weights = f"Its weights were trained on {model.weights.trained_on} (licence {model.weights.licence})."
    else:
        weights = ""
    return {
        "version": bids_dgmseg.__version__,
        "model": model.name,
        "title": model.title,
        "nuclei": ", ".join(nuclei),
        "model_citation": f" [{'; '.join(f'@{key}' for key in keys)}]" if keys else "",
        "weights": weights,
        "referenced": _say_referenced(settings),
    }


def _say_referenced(settings: Settings) -> str:
    """Say what referenced values are relative to; empty where no region was chosen."""
    masks = ", masked by the user" if settings.reference_mask else ""
    region = {
        "none": "",
        "whole-brain": "whole brain",
        "csf": f"cerebrospinal fluid{masks}",
        "structure": str(settings.reference_structure),
    }[settings.reference]
    return f"; referenced values are relative to the mean of a region of the same map ({region})" if region else ""
