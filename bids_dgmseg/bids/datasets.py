"""The datasets that chi maps are looked for in: the one given, and derivatives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bids_dgmseg.bids.description import DATASET_DESCRIPTION, is_own
from bids_dgmseg.bids.names import split_entities
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import is_file_or_unfetched
from bids_dgmseg.io.files import read_json

MAP_NAME = re.compile(r"(.*?)_?Chimap\.nii(\.gz)?")

ECHO_NAME = re.compile(r".*_MEGRE\.nii(\.gz)?")

_FOLDER = re.compile(r"(sub|ses)-([0-9a-zA-Z+]+)")

_DEPTH = 3  # sub-X/ses-Y/anat


@dataclass(frozen=True)
class Source:
    """A dataset that chi maps are looked for in."""

    root: Path
    name: str
    raw: bool

    def folders(self, participants: Sequence[str] = ()) -> dict[str, Path]:
        """Find the ``sub-X`` folders by label, those of the participants given or all."""
        if not participants:
            return _labelled(self.root, "sub")
        named = {label: self.root / f"sub-{label}" for label in participants}
        return {label: folder for label, folder in named.items() if folder.is_dir()}

    def sessions(self, participants: Sequence[str] = ()) -> set[str]:
        """Find the labels of the ``ses-Y`` folders of the participants given or all."""
        return {label for folder in self.folders(participants).values() for label in _labelled(folder, "ses")}

    def misnamed(self) -> list[str]:
        """List the folders that begin as a participant's do, but whose label BIDS does not allow."""
        folders = [path.name for path in sorted(self.root.glob("sub-*")) if path.is_dir()]
        return [name for name in folders if not _FOLDER.fullmatch(name)]

    def files(self, participants: Sequence[str], sessions: Sequence[str]) -> Iterator[Path]:
        """Yield the files of the selected participants; a session's choice leaves other ``ses-Y`` folders unread."""
        for folder in self.folders(participants).values():
            yield from _walk(folder, _DEPTH, sessions)

    def show(self, path: Path) -> str:
        """Name a file so that one of several datasets is recognised."""
        return (self.root.name / PurePosixPath(path.relative_to(self.root).as_posix())).as_posix()

    def place(self, path: Path) -> dict[str, str]:
        """Read ``sub`` and ``ses`` from the folders that a file lies in."""
        matches = map(_FOLDER.fullmatch, path.relative_to(self.root).parts[:-1])
        return {match[1]: match[2] for match in matches if match}

    def read_entities(self, path: Path, stem: str) -> dict[str, str]:
        """Read what a file's name (without suffix and extension) and folders say.

        Raises
        ------
        InputError
            If they contradict one another.
        """
        named = split_entities(stem)
        for prefix, label in self.place(path).items():
            if named.setdefault(prefix, label) != label:
                raise InputError(f"{path.name}: lies in {prefix}-{label}; rename the file or move it")
        return named


def find_sources(settings: Settings) -> list[Source]:
    """List the datasets to look in, the main one first.

    Raises
    ------
    InputError
        If the main one is no BIDS dataset or a derivative does not exist.
    """
    root = settings.bids_dir
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the root folder of the BIDS dataset")
    if not is_file_or_unfetched(root / DATASET_DESCRIPTION):
        raise InputError(f"{root.name}: no {DATASET_DESCRIPTION}; give the root folder of the BIDS dataset")
    raw = read_json(root / DATASET_DESCRIPTION).get("DatasetType") != "derivative"
    sources = [Source(root, "raw" if raw else _link_name(root, []), raw)]
    folders = _given(settings.derivatives) if settings.derivatives else _own_derivatives(settings)
    for folder in folders:
        known = {settings.output_dir.resolve(), *(source.root.resolve() for source in sources)}
        if folder.resolve() not in known:
            sources.append(Source(folder, _link_name(folder, [source.name for source in sources]), raw=False))
    return sources


def _given(derivatives: Sequence[Path]) -> Iterator[Path]:
    """Yield the derivatives named; a folder of derivatives stands for those in it."""
    for folder in derivatives:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; check --derivatives")
        inner = [folder] if _labelled(folder, "sub") else _datasets_in(folder)
        if not inner:
            raise InputError(f"{folder.name}: no sub-X folder; give the root folder of a derivative to --derivatives")
        yield from inner


def _own_derivatives(settings: Settings) -> list[Path]:
    """List the derivatives below the dataset that are not this program's own output."""
    folder = settings.bids_dir / "derivatives"
    found = _datasets_in(folder) if folder.is_dir() else []
    return [dataset for dataset in found if dataset != settings.output_dir]


def _datasets_in(folder: Path) -> list[Path]:
    inner = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [path for path in inner if _labelled(path, "sub") and not is_own(path)]


def _link_name(folder: Path, taken: Sequence[str]) -> str:
    """Name a derivative in URIs by its folder; letters, digits, ``-`` and ``_`` only, each name once."""
    plain = re.sub(r"[^0-9a-zA-Z_-]+", "-", folder.name) or "derivative"
    names = [plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken and name != "raw")


def _labelled(folder: Path, prefix: str) -> dict[str, Path]:
    matches = ((_FOLDER.fullmatch(path.name), path) for path in sorted(folder.glob(f"{prefix}-*")) if path.is_dir())
    return {match[2]: path for match, path in matches if match}


def _walk(folder: Path, depth: int, sessions: Sequence[str]) -> Iterator[Path]:
    for path in _list(folder):
        match = _FOLDER.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif depth > 1 and not (match and sessions and match[1] == "ses" and match[2] not in sessions):
            yield from _walk(path, depth - 1, sessions)


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder.name}: cannot be read ({error.strerror}); correct its permissions or choose other participants"
        ) from error
