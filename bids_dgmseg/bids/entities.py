"""Entities in the names and folders of BIDS files, the names of derivatives, and sidecars by inheritance."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json

ORDER = (
    "sub tpl ses cohort sample task tracksys acq nuc voi ce trc stain rec dir run mod echo flip"
    " inv mt part proc hemi space split recording chunk atlas seg scale res den label desc"
).split()
"""Entities in the order of BIDS file names."""

_PAIR = re.compile(r"([a-zA-Z]+)-([0-9a-zA-Z+]+)")

_EXTENSIONS = re.compile(r"(\.[a-zA-Z][0-9a-zA-Z]*)+$")

_NUMBERED = ("run", "echo")
"""Entities with numbers, which may have leading zeros."""

_PARTIAL_CHI = ("paramagnetic", "diamagnetic", "msa")
"""Values of ``desc`` for maps that are not the susceptibility: a part of it, or its anisotropy (of QSMxT)."""


def stem_of(path: Path) -> str:
    """Return a file name without its extensions, which begin with a letter.

    >>> stem_of(Path("sub-01_acq-0.7mm_MEGRE.nii.gz"))
    'sub-01_acq-0.7mm_MEGRE'
    """
    return _EXTENSIONS.sub("", path.name)


def split_entities(stem: str) -> dict[str, str]:
    """Parse the ``key-value`` parts of a file name; other parts are ignored.

    >>> split_entities("sub-01_acq-x_Sepia_Chimap")
    {'sub': '01', 'acq': 'x'}
    """
    pairs = (_PAIR.fullmatch(part) for part in stem.split("_"))
    return {pair[1]: pair[2] for pair in pairs if pair}


def join_entities(entities: Mapping[str, str]) -> str:
    """Format entities in the order of BIDS, with unknown ones before ``atlas``.

    >>> join_entities({"desc": "x", "seg": "dgm16", "sub": "01"})
    'sub-01_seg-dgm16_desc-x'
    """
    # Not pybids' build_path: it drops entities that its pattern does not list, or finds no path, so that two scans
    # could share a name or have none; and each process that writes results would import pybids, which takes 0.5 s.
    unknown = ORDER.index("atlas")
    ranked = sorted(entities, key=lambda key: ORDER.index(key) if key in ORDER else unknown - 0.5)
    return "_".join(f"{key}-{entities[key]}" for key in ranked)


@dataclass(frozen=True)
class ScanName:
    """The entities of a scan, after which its derivatives are named."""

    participant: str
    """Without ``sub-``."""
    session: str | None
    """Without ``ses-``."""
    entities: Mapping[str, str]
    """The other entities (``acq``, ``rec``, ``run``, ``desc``, …) in BIDS order; without ``echo`` and ``part``."""

    @classmethod
    def of(cls, entities: Mapping[str, str]) -> ScanName:
        """Create a name from all entities, such as ``{"sub": "01", "ses": "1"}``.

        Raises
        ------
        InputError
            If there is no ``sub``, or a key or value has other characters than letters and digits.
        """
        invalid = [f"{key}-{value}" for key, value in entities.items() if not _PAIR.fullmatch(f"{key}-{value}")]
        if invalid or "sub" not in entities:
            problem = f"{invalid[0]} is not a valid BIDS entity" if invalid else "no sub"
            raise InputError(f"`entities`: {problem}; pass letters and digits, such as sub: 01, ses: 1")
        rest = split_entities(join_entities(entities))
        return cls(rest.pop("sub"), rest.pop("ses", None), rest)

    @property
    def named_entities(self) -> dict[str, str]:
        """All entities, ``sub`` and ``ses`` first."""
        session = {"ses": self.session} if self.session else {}
        return {"sub": self.participant, **session, **self.entities}

    @property
    def name(self) -> str:
        """Entities without suffix, such as ``sub-01_ses-1_acq-x_run-1``."""
        return join_entities(self.named_entities)


def output_path(output_dir: Path, scan: ScanName, suffix: str, extension: str, **entities: str) -> Path:
    """Return the path of a derivative, such as its ``dseg`` ``.nii.gz`` with ``seg="dgm16"``.

    The scan provides the first entities. If both it and `entities` have ``desc``, the values are joined: ``rts`` and
    ``dgm16`` become ``desc-rtsDgm16``.
    """
    session = [f"ses-{scan.session}"] if scan.session else []
    folder = output_dir.joinpath(f"sub-{scan.participant}", *session, "anat")
    return folder / f"{stem_with(scan, **entities)}_{suffix}{extension}"


def stem_with(scan: ScanName, **entities: str) -> str:
    """Return the name of a derivative without suffix: the entities of a scan and more."""
    first, second = scan.entities.get("desc", ""), entities.get("desc", "")
    joined = {"desc": first + second[:1].upper() + second[1:]} if first and second else {}
    return join_entities({**scan.named_entities, **entities, **joined})


def comparable(entities: Mapping[str, str]) -> dict[str, str]:
    """Remove leading zeros of numbers, so that ``run-1`` and ``run-01`` are equal."""
    return {
        key: str(int(value)) if key in _NUMBERED and value.isdecimal() else value for key, value in entities.items()
    }


def is_in_standard_space(name: str) -> bool:
    """Return whether an image was resampled to an MNI template, so that it is a result and no scan."""
    return "_space-MNI" in name


def is_partial_chi(name: str) -> bool:
    """Return whether a chi map contains paramagnetic or diamagnetic susceptibility only, or its anisotropy."""
    return any(f"_desc-{part}_" in name for part in _PARTIAL_CHI)


# What pybids cannot do in the search for images:
# - Names: SEPIA writes Sepia_Chimap.nii.gz or SepiaChimap.nii.gz into the folder of a participant. pybids reads a
#   suffix SepiaChimap from the second and no extension from a prefix with a dot. It drops entities that it does not
#   know, so that two scans would have one name; and of acq-my-map it keeps my.
# - Places: pybids takes the first sub-X in a path; a file in the folder of another participant is silently theirs.
# - Folders: pybids knows participants and sessions only by their indexed images, and ignores folders that it may not
#   list.

MAP_NAME = re.compile(r"(.*?)_?Chimap\.nii(\.gz)?")

ECHO_NAME = re.compile(r".*(_MEGRE|_T2starw|_GRE)\.nii(\.gz)?")

FOLDER_LEVELS = 3
"""Folder levels in a dataset: sub-X/ses-Y/anat."""

_FOLDER = re.compile(r"(sub|ses)-([0-9a-zA-Z+]+)")


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


class Sidecars:
    """The JSON sidecars of images with one suffix, such as ``Chimap``; each folder is listed once.

    Not pybids' ``get_metadata``: it needs an index of all metadata (1,000 participants with four images and sidecars
    each: 19 s instead of 5 s on the same machine), and the first broken sidecar stops the index of the whole dataset.
    """

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._in_folder = cache(lambda folder: sorted(folder.glob(f"*{suffix}.json")))

    def inherit(self, root: Path, path: Path) -> dict[str, Any]:
        """Merge the sidecars that apply to an image, from the root to its folder."""
        stem = stem_of(path).removesuffix(self._suffix).removesuffix("_")
        entities = read_entities(root, path).items()
        merged: dict[str, Any] = {}
        for folder in (parent for parent in reversed(path.parents) if parent.is_relative_to(root)):
            candidates = []
            for sidecar in self._in_folder(folder):
                shared = sidecar.name.removesuffix(f"{self._suffix}.json").rstrip("_")
                parsed = split_entities(shared)
                # Its entities must be a subset of the image's, and other parts of its name the same.
                if shared == stem or (join_entities(parsed) == shared and parsed.items() <= entities):
                    candidates.append((len(parsed), sidecar))
            for _, sidecar in sorted(candidates, key=lambda candidate: candidate[0]):
                merged.update(read_json(sidecar))
        return merged


def check_participant(labels: Path, maps: Sequence[Path]) -> None:
    """Check that the names of labels and maps are of one participant, as far as they name one."""
    participant = split_entities(stem_of(labels)).get("sub")
    for path in maps:
        other = split_entities(stem_of(path)).get("sub")
        if participant and other and participant != other:
            raise InputError(
                f"{labels.name}: labels of sub-{participant}, but {path.name} is of sub-{other}; pass its own labels"
            )
