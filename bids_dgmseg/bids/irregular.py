"""What pybids cannot do in the search for images.

- Names: SEPIA writes ``Sepia_Chimap.nii.gz`` or ``SepiaChimap.nii.gz`` into the folder of a participant. pybids reads a
  suffix ``SepiaChimap`` from the second and no extension from a prefix with a dot. It drops entities that it does not
  know, so that two scans would have one name; and of ``acq-my-map`` it keeps ``my``.
- Places: pybids takes the first ``sub-X`` in a path; a file that lies in the folder of another participant is silently
  that participant's.
- Folders: pybids knows participants and sessions only by their indexed images, so that those without any could not be
  reported, and it ignores folders that it may not list.

Broken links and the pointers of git-annex and Git LFS are indexed like images; `bids_dgmseg.io.files` recognizes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from bids_dgmseg.bids.entities import split_entities, stem_of
from bids_dgmseg.errors import InputError

MAP_NAME = re.compile(r"(.*?)_?Chimap\.nii(\.gz)?")

ECHO_NAME = re.compile(r".*(_MEGRE|_T2starw|_GRE)\.nii(\.gz)?")

FOLDER_LEVELS = 3
"""Folder levels in a dataset: sub-X/ses-Y/anat."""

_FOLDER = re.compile(r"(sub|ses)-([0-9a-zA-Z+]+)")


def is_image(path: Path) -> bool:
    """Return whether a file has the name of a chi map or an echo."""
    return bool(MAP_NAME.fullmatch(path.name) or ECHO_NAME.fullmatch(path.name))


def read_entities(root: Path, path: Path) -> dict[str, str]:
    """Parse the entities in a file's name and folders; folders have precedence."""
    return {**split_entities(stem_of(path)), **_folder_entities(root, path)}


def consistent_entities(root: Path, path: Path, stem: str) -> dict[str, str]:
    """Parse the entities in a file's stem (without suffix) and folders; `InputError` if they differ."""
    entities = split_entities(stem)
    for prefix, label in _folder_entities(root, path).items():
        if entities.setdefault(prefix, label) != label:
            raise InputError(f"{path.name}: located in the folder of {prefix}-{label}; rename or move the file")
    return entities


def describe_misplaced(root: Path, path: Path) -> str:
    """Describe how the folders of an image contradict its name; empty if they do not."""
    try:
        consistent_entities(root, path, path.name.rpartition("_")[0])
    except InputError as error:
        return str(error)
    return ""


def _folder_entities(root: Path, path: Path) -> dict[str, str]:
    """Return the participant and session of the outer folders, whatever folders have been copied into them."""
    matches = map(_FOLDER.fullmatch, reversed(path.relative_to(root).parts[:-1]))
    return {match[1]: match[2] for match in matches if match}


def labelled_folders(folder: Path, prefix: str) -> dict[str, Path]:
    """List the folders with a prefix, ``sub`` or ``ses``: label → folder, sorted."""
    matches = ((_FOLDER.fullmatch(path.name), path) for path in sorted(folder.glob(f"{prefix}-*")) if path.is_dir())
    return {match[2]: path for match, path in matches if match}


def folders_in(folder: Path, levels: int = FOLDER_LEVELS) -> Iterator[Path]:
    """Yield a folder and those below it, without hidden ones; `InputError` if one cannot be listed."""
    yield folder
    try:
        with os.scandir(folder) as entries:
            inner = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError as error:
        raise InputError(
            f"{folder.name}: cannot be read ({error.strerror}); correct its permissions or select other participants"
        ) from error
    if levels > 1:
        for path in inner:
            yield from folders_in(path, levels - 1)
