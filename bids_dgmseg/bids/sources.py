"""Find the files that a derivative says it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bids_dgmseg.bids.description import DATASET_DESCRIPTION, linked_datasets
from bids_dgmseg.io.files import read_optional_json, url_to_path


def find_source(path: Path, suffix: str) -> Path | None:
    """Find the image of a suffix among the ``Sources`` of a derivative.

    Sources are BIDS URIs (``bids:NAME:path``, where ``DatasetLinks`` of the dataset say what NAME is, and
    ``bids::path`` in the dataset itself) or, as before BIDS 1.7, paths from the root of the dataset.

    Parameters
    ----------
    path : Path
        An image of the derivative dataset.
    suffix : str
        Such as ``Chimap``.

    Returns
    -------
    Path or None
        The first such image that exists here; None where sidecar or dataset say nothing that leads to one.
    """
    root = next((folder for folder in path.parents if (folder / DATASET_DESCRIPTION).is_file()), None)
    if root is None:
        return None
    stated = read_optional_json(path.with_name(f"{path.name.partition('.')[0]}.json")).get("Sources", ())
    sources = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    names = (source for source in sources if f"{suffix}.nii" in str(source))
    return next((found for found in _resolve(root, names) if found.is_file()), None)


def _resolve(root: Path, sources: Iterator[Any]) -> Iterator[Path]:
    """Turn URIs and paths into absolute paths; those of datasets that are not linked are passed over."""
    links = linked_datasets(root)
    for source in map(str, sources):
        scheme, _, rest = source.partition(":")
        dataset, _, relative = rest.partition(":")
        if scheme != "bids":
            yield root / source
        elif not dataset:
            yield root / relative
        elif dataset in links:
            link = urlsplit(links[dataset])
            if link.scheme in ("", "file"):
                yield Path(os.path.normpath(url_to_path(link.path, root))) / relative
