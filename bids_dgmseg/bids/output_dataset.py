"""Files at the top level of the output: description, label table, README, citation."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, Inputs, linked_datasets, read_description
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError, as_options
from bids_dgmseg.io.files import (
    path_to_url,
    read_optional_json,
    value_of,
    wait_for_lock,
    write_bytes,
    write_json,
    write_text,
)
from bids_dgmseg.methods_text import REFERENCES, cite_methods, read_boilerplate
from bids_dgmseg.models.label_tables import format_color_tables
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import ALL_STRUCTURES, Structure
from bids_dgmseg.resources import describe_container, relative_outside

BIDS_VERSION = "1.11.2"

VIEWERS = "viewers"
"""Folder with color tables, in each dataset with labels."""

_NAME = "bids_dgmseg: deep gray nuclei on susceptibility maps"

FIELDS: Mapping[str, str] = {
    "brain": "Brain mask of the reconstruction, before its erosion by background removal",
    "total": "Field of all sources relative to B0, unwrapped; 0 outside the reliable part of the brain mask",
    "local": "Field of the sources in the brain relative to B0; 0 where the map has no value",
    **{
        part: f"{part.capitalize()} part of chi, positive; both add up to R2* / (91.3 Hz/ppm/T x B0) (Dimov 2022, "
        "doi:10.3390/tomography8030127); R2 is not subtracted, so that both are about 0.02 ppm too large at 3 T"
        for part in ("paramagnetic", "diamagnetic")
    },
}
"""Steps of a reconstruction, and parts of its map → description."""


def check_writable(output: Path) -> None:
    """Create the output folder and check that files can be written; `InputError` if not."""
    probe = output / f".{uuid.uuid4().hex}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{output}: cannot be written ({reason}); choose another output folder") from error


def write_dataset_files(output: Path, inputs: Inputs, scans: Sequence[Scan], model: Model) -> None:
    """Write the files that describe the output as a whole, except the citation; see `write_citation`.

    Every file but an existing README is replaced atomically, and only one run at a time does this, so that runs for
    different participants can share the output. Entries of earlier runs with other models or inputs are kept.

    Parameters
    ----------
    output : path
        The derivative dataset.
    inputs, scans, model
        Those of this run.
    """
    with wait_for_lock(output / "logs" / "output.lock"):  # these add to what other runs have written
        write_json(_dataset_description(output, inputs, scans), output / DATASET_DESCRIPTION)
        write_text(_desc_table(output / "descriptions.tsv", scans, model), output / "descriptions.tsv")
        _write_guide(output)


def write_citation(output: Path, scans: Sequence[Scan], model: Model) -> None:
    """Write ``logs/CITATION.md`` for the results of the scans of this run."""
    records = (read_optional_json(output_path(output, scan, "qc", ".json", seg=model.name)) for scan in scans)
    paragraphs = [text for _, text in cite_methods([(model.name, record) for record in records if record])]
    text = read_boilerplate("citation.md").format(methods="\n\n".join(paragraphs))
    write_text(text, output / "logs" / "CITATION.md")
    write_text(read_boilerplate(REFERENCES), output / "logs" / "CITATION.bib")


def write_group_citation(output: Path, text: str) -> None:
    """Put the paragraph on the group level into ``logs/CITATION.md``, in the place of an earlier one."""
    path, heading, end = output / "logs" / "CITATION.md", "## Group level\n", "# References"
    earlier = path.read_text(encoding="utf-8") if path.is_file() else f"{end}\n"
    kept = re.sub(f"(?s){heading}.*?(?={end})", "", earlier)
    write_text(kept.replace(end, f"{heading}\n{text}\n\n{end}", 1), path)
    write_text(read_boilerplate(REFERENCES), output / "logs" / "CITATION.bib")


def start_dataset(output: Path) -> None:
    """Write the files that each dataset has, if this one has no description."""
    if (output / DATASET_DESCRIPTION).exists():
        return
    check_writable(output)
    with wait_for_lock(output / "logs" / "output.lock"):
        _write_guide(output)
        write_json(describe_derivative(_NAME), output / DATASET_DESCRIPTION)


def write_merged_dataset_files(output: Path, folders: Sequence[Path]) -> None:
    """Write the description of a dataset with the group tables of several output folders; existing files are kept.

    Raises
    ------
    InputError
        If the dataset cannot be written.
    """
    check_writable(output)
    _write_bidsignore(output)
    if (output / DATASET_DESCRIPTION).exists():
        return
    links = [path_to_url(path) for folder in folders if (path := relative_outside(folder, output))]
    description = describe_derivative("bids_dgmseg: deep gray nuclei, tables of several datasets")
    write_json({**description, "SourceDatasets": [{"URL": link} for link in links]}, output / DATASET_DESCRIPTION)
    _write_readme("Tables of the deep gray nuclei in several datasets, by bids_dgmseg; open group.html.", output)


def _write_guide(output: Path) -> None:
    """Write ``.bidsignore``, label table, its data dictionary, color tables and README of a dataset with labels."""
    _write_bidsignore(output)
    write_text(label_table(ALL_STRUCTURES), output / "dseg.tsv")
    columns = {column: {"Description": text} for column, text in _LABEL_COLUMNS.items()}
    write_json(columns, output / "dseg.json")  # by inheritance, also of the label tables of scans
    write_color_tables(output)
    _write_readme(as_options(read_boilerplate("README_output.txt").format(version=bids_dgmseg.__version__)), output)


def _write_readme(text: str, output: Path) -> None:
    """Write the README of a dataset that has none, in any format."""
    if not any(output.glob("README*")):
        write_text(text, output / "README")


def _write_bidsignore(output: Path) -> None:
    """Add the files that BIDS has no names for to ``.bidsignore``."""
    path = output / ".bidsignore"
    text = path.read_text(encoding="utf-8", errors="backslashreplace") if path.exists() else ""
    present = {line.strip() for line in text.splitlines()}
    if missing := [line for line in read_boilerplate("bidsignore.txt").split() if line not in present]:
        write_text("\n".join([*text.splitlines(), *missing]), path)


def write_color_tables(folder: Path) -> None:
    """Write the colors of the nuclei for viewers into the folder `VIEWERS`."""
    for name, content in format_color_tables(ALL_STRUCTURES).items():
        write_bytes(content, folder / VIEWERS / name)


_LABEL_COLUMNS: Mapping[str, str] = {
    "index": "Value in the label image",
    "name": "Nucleus, with its side; left is the patient's left",
    "abbreviation": "Nucleus and side, as in the tables of measures",
    "hemisphere": "Side: L or R",
    "color": "Color in viewers",
    "mapping": "Index of the standard label of BIDS",
    "freesurfer": "Number of the nucleus in FreeSurfer's aseg, n/a if it has none",
    "mask_label": "Value of label- in the names of masks",
}
"""Columns of the label tables → description."""


def label_table(structures: Sequence[Structure]) -> str:
    """Format the label table of a dseg as tab-separated text."""
    names = {"freesurfer": "freesurfer", "mask_label": "bids_label"}
    rows = [[str(getattr(row, names.get(column, column)) or "n/a") for column in _LABEL_COLUMNS] for row in structures]
    return "\n".join("\t".join(row) for row in [[*_LABEL_COLUMNS], *rows])


def _dataset_description(output: Path, inputs: Inputs, scans: Sequence[Scan]) -> dict[str, Any]:
    roots = {source.name: source.root for source in inputs.sources}
    roots |= {scan.dataset_name: scan.dataset_root for scan in scans}
    paths = {name: relative_outside(root, output) for name, root in roots.items()}
    links = {name: path_to_url(path) for name, path in paths.items() if path}
    sources: list[dict[str, str]] = []
    for name, root in roots.items():
        about = read_description(root)
        texts = {"URL": links.get(name), "DOI": about.get("DatasetDOI"), "Version": about.get("DatasetVersion")}
        sources.append({key: str(text) for key, text in texts.items() if text})
    stated = value_of(read_description(output), "SourceDatasets", list)  # users write descriptions by hand
    stated = [source for source in stated if isinstance(source, dict)]
    earlier = [source for source in stated if source not in sources and source.get("URL") not in links.values()]
    return {
        **describe_derivative(_NAME),
        "License": "as the source datasets",
        "HowToAcknowledge": "See logs/CITATION.md",
        "SourceDatasets": [*sources, *earlier],
        "DatasetLinks": {**linked_datasets(output), **links},
    }


def describe_derivative(name: str) -> dict[str, Any]:
    """Return the description of a dataset that this program writes."""
    container = describe_container()
    program = {
        "Name": "bids_dgmseg",
        "Version": bids_dgmseg.__version__,
        "Description": "Segmentation and measurement of deep gray nuclei on quantitative susceptibility maps",
        **({"Container": container} if container else {}),
    }
    return {"Name": name, "BIDSVersion": BIDS_VERSION, "DatasetType": "derivative", "GeneratedBy": [program]}


def _desc_table(path: Path, scans: Sequence[Scan], model: Model) -> str:
    """Format ``descriptions.tsv``, which explains the values of ``desc``, with the rows of earlier runs."""
    # Not read_tsv: every run of the app comes here, and importing pandas takes longer than the rest of a dry run.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    pairs = (line.partition("\t") for line in text.splitlines()[1:])
    descriptions = {key: meaning for key, _, meaning in pairs if key}
    descriptions[f"desc-{model.name}"] = f"Nuclei by model {model.name}: {model.title}"
    if any(scan.from_echoes for scan in scans):
        descriptions |= {f"desc-{name}": text for name, text in FIELDS.items()}
    for desc in sorted({scan.entities["desc"] for scan in scans if "desc" in scan.entities}):
        named = model.name[:1].upper() + model.name[1:]
        descriptions[f"desc-{desc}"] = f"From the chi map with desc-{desc}"
        descriptions[f"desc-{desc}{named}"] = f"Nuclei by model {model.name} on the chi map with desc-{desc}"
    return "\n".join(["desc_id\tdescription", *(f"{key}\t{text}" for key, text in sorted(descriptions.items()))])
