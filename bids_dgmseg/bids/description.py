"""What datasets say of themselves in ``dataset_description.json``, which users write too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bids_dgmseg.io.files import read_optional_json

DATASET_DESCRIPTION = "dataset_description.json"


def read_description(dataset: Path) -> dict[str, Any]:
    """Read the description of a dataset; empty if there is none (SEPIA writes none) or it is broken."""
    return read_optional_json(dataset / DATASET_DESCRIPTION)


def linked_datasets(dataset: Path) -> dict[str, str]:
    """Give the links of a dataset to others, by name."""
    links = read_description(dataset).get("DatasetLinks")
    pairs = links.items() if isinstance(links, Mapping) else ()
    return {name: link for name, link in pairs if isinstance(link, str)}


def source_datasets(dataset: Path) -> list[str]:
    """List the URLs of what a dataset was made from."""
    return [source["URL"] for source in _objects(dataset, "SourceDatasets", "URL")]


def makers(dataset: Path) -> list[Mapping[str, Any]]:
    """List the programs that made a dataset, each with its ``Name``."""
    return _objects(dataset, "GeneratedBy", "Name")


def is_own(dataset: Path) -> bool:
    """Tell whether this program made a dataset."""
    return any(maker["Name"] == "bids_dgmseg" for maker in makers(dataset))


def _objects(dataset: Path, key: str, text: str) -> list[Mapping[str, Any]]:
    """List the objects under a key that have a certain text."""
    values = read_description(dataset).get(key)
    objects = [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []
    return [value for value in objects if isinstance(value.get(text), str)]
