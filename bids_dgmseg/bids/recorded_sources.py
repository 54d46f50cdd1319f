"""The images that results were computed from, as their sidecars record them: changed, gone, or not to be found.

For results of scans that a search of the dataset does not find: of a map that was renamed or removed, of a dataset that
the group level was not told of, or if the search itself fails.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bids_dgmseg.bids.dataset import find_raw_datasets, linked_datasets
from bids_dgmseg.bids.derivatives import MAP_FINGERPRINT, SOURCE_FINGERPRINT, TOGETHER
from bids_dgmseg.bids.entities import folders_in, is_image, is_in_standard_space, labelled_folders, map_sidecar
from bids_dgmseg.bids.resume import CHANGED, GONE, last_change
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import (
    hash_files,
    is_file_or_unfetched,
    is_unfetched,
    list_folders,
    read_optional_json,
    url_to_path,
)


@dataclass(frozen=True)
class RecordedSources:
    """What is known of the images of results."""

    outdated: Mapping[str, str]
    """File name of a ``_stats.tsv`` → why its results are out of date."""
    unknown: Sequence[str]
    """File names of those whose images are in no known dataset."""


def check_recorded_sources(
    output_dir: Path, bids_dir: Path, *, known: Collection[str] = (), participants: Collection[str] = ()
) -> RecordedSources:
    """Check the images that the sidecars in an output folder name, in the datasets that it links to.

    An image whose folder is empty, as in a dataset that is not installed, counts as unchanged like one whose content
    is not fetched. Files are read only if they are more recent than the results.

    Parameters
    ----------
    output_dir, bids_dir : path
    known : collection of str
        File names of ``_stats.tsv`` whose own images need no check, only those of sessions labelled together with them.
    participants : collection of str, optional
        Labels of the participants to check; by default all.
    """
    datasets = _Datasets(output_dir, bids_dir)
    outdated, unknown = {}, []
    for sidecar in _find_sidecars(output_dir, participants):
        name = sidecar.name.replace("_dseg.json", "_stats.tsv")
        if not sidecar.with_name(name).exists():
            continue
        dseg = read_optional_json(sidecar)
        together = [datasets.find(str(uri)) for uri in dseg.get(TOGETHER, ())]
        if any(path and not is_file_or_unfetched(path) and not _is_not_installed(path) for path in together):
            outdated[name] = CHANGED
        if name in known:
            continue
        about = read_optional_json(map_sidecar(sidecar)) if MAP_FINGERPRINT in dseg else dseg
        sources = about.get("Sources")
        found = [datasets.find(str(uri)) for uri in sources] if isinstance(sources, list) else []
        if SOURCE_FINGERPRINT not in dseg or not found or None in found:
            unknown.append(name)
            continue
        paths = [path for path in found if path]
        if gone := [path for path in paths if not is_file_or_unfetched(path)]:
            if not any(_is_not_installed(path) for path in gone):
                outdated[name] = f"{GONE} ({gone[0].name})"
        elif _has_changed(paths, sidecar, str(dseg[SOURCE_FINGERPRINT])):
            outdated[name] = CHANGED
    return RecordedSources(outdated, unknown)


class _Datasets:
    """The datasets that an output folder links to, by name."""

    def __init__(self, output_dir: Path, bids_dir: Path) -> None:
        self._output_dir = output_dir
        self._roots: dict[str, list[Path]] = {"raw": [bids_dir, *find_raw_datasets(bids_dir)]}
        self._roots.setdefault(bids_dir.name, []).append(bids_dir)
        for name, url in linked_datasets(output_dir).items():
            parts = urlsplit(url)
            if parts.scheme in ("", "file"):
                path = Path(os.path.normpath(url_to_path(parts.path, output_dir)))
                self._roots.setdefault(name, []).append(path)
        self._with_images: dict[Path, bool] = {}

    def find(self, uri: str) -> Path | None:
        """Return the path of a BIDS URI, existing if possible; None if its dataset is unknown or has no images."""
        scheme, _, rest = uri.partition(":")
        name, _, relative = rest.partition(":")
        if scheme != "bids" or not relative:
            return None
        roots = list(dict.fromkeys(self._roots.get(name, ()))) if name else [self._output_dir]
        existing = next((root / relative for root in roots if is_file_or_unfetched(root / relative)), None)
        return existing or next((root / relative for root in roots if self._has_images(root)), None)

    def _has_images(self, root: Path) -> bool:
        if root not in self._with_images:
            self._with_images[root] = _has_images(root)
        return self._with_images[root]


def _has_images(root: Path) -> bool:
    """Return whether any participant of a dataset has a chi map or echoes, so that another one could."""
    try:
        folders = (inner for folder in labelled_folders(root, "sub").values() for inner in folders_in(folder))
        return any(is_image(path) for folder in folders for path in folder.iterdir())
    except (OSError, InputError):
        return False


def _find_sidecars(output_dir: Path, participants: Collection[str]) -> Iterator[Path]:
    for folder in sorted(list_folders(output_dir, "sub-")):
        if not participants or folder.name.removeprefix("sub-") in participants:
            for parent in (folder, *sorted(list_folders(folder, "ses-"))):
                found = sorted((parent / "anat").glob("*_dseg.json"))
                yield from (path for path in found if not is_in_standard_space(path.name))


def _is_not_installed(path: Path) -> bool:
    """Return whether the deepest folder that exists on the way to a missing file is empty."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    return not any(folder.iterdir())


def _has_changed(paths: Sequence[Path], results: Path, recorded: str) -> bool:
    """Return whether images have another hash than recorded; no if they are older than the results or not fetched."""
    if any(map(is_unfetched, paths)) or last_change(paths) < results.stat().st_mtime:
        return False
    return hash_files(paths) != recorded


def find_maps(sidecars: Sequence[Path], output_dir: Path, bids_dir: Path | None = None) -> list[Path | None]:
    """Return the susceptibility map that labels were drawn on, by the sidecar of each; None where it is not found.

    It is the image of ``SpatialReference``, in the output folder, a dataset that it links to, or `bids_dir`.
    """
    datasets = _Datasets(output_dir, bids_dir or output_dir)
    maps = []
    for sidecar in sidecars:
        about = read_optional_json(sidecar)
        sources = about.get("Sources")
        uris = [about.get("SpatialReference"), *(sources if isinstance(sources, list) else [])]
        found = (datasets.find(uri) for uri in uris if isinstance(uri, str))
        maps.append(next((path for path in found if path and path.is_file() and not is_unfetched(path)), None))
    return maps
