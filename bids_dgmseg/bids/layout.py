"""Index the images of a dataset with pybids, in memory or in a database.

pybids is imported here only and when it is needed, because the import takes half a second.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.bids.irregular import ECHO_NAME, FOLDER_LEVELS, MAP_NAME, folders_in, is_image
from bids_dgmseg.errors import InputError

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

_DATABASE = "layout_index.sqlite"
"""Name of pybids' file in the folder of a database."""

_OTHER_DATATYPES = r"/(?:beh|dwi|eeg|fmap|func|ieeg|meg|micr|motion|mrs|nirs|perf|pet)$"

_IMAGE_NAMES = f"{MAP_NAME.pattern}|{ECHO_NAME.pattern}"


@dataclass(frozen=True)
class ImageIndex:
    """The chi maps and echoes of a dataset."""

    root: Path
    layouts: Mapping[BIDSLayout, Collection[str]]
    """Index → participants, without ``sub-``, whose images are taken from it."""
    is_wanted: Callable[[Path], bool] = is_image

    def find(self, filters: Mapping[str, Any] | None = None, *, regex_search: bool = False) -> list[Path]:
        """List the images that have certain entities, sorted; without filters, all.

        `filters` and `regex_search` are those of pybids' ``BIDSLayout.get``. `InputError` if pybids refuses them.
        """
        found: list[Path] = []
        for layout, participants in self.layouts.items():
            try:
                names = layout.get(return_type="file", regex_search=regex_search, **(filters or {}))
            except Exception as error:  # of SQLAlchemy, sqlite3 or re, whatever the user's filter holds
                raise InputError(f"the filter cannot be applied ({_first_line(error)}); correct its values") from error
            folders = {f"sub-{label}" for label in participants}
            paths = [Path(name).relative_to(layout.root) for name in names]
            found += [self.root / path for path in paths if path.parts[0] in folders and self.is_wanted(path)]
        return sorted(found)


def index_images(root: Path, participants: Mapping[str, Path], *, everyone: bool, database: Path | None) -> ImageIndex:
    """Index the images of some participants of a dataset.

    Parameters
    ----------
    root : path
        Dataset.
    participants : mapping
        Label without ``sub-`` → folder.
    everyone : bool
        Whether these are all participants of the dataset.
    database : path, optional
        Folder with an index that pybids has written for all participants; created if it does not exist. Participants
        whose folders have changed since are indexed again, in memory, so that no image is missed and several runs can
        share the database. By default everything is indexed in memory.

    Raises
    ------
    InputError
        If a folder cannot be listed, the database cannot be used or belongs to another dataset, or pybids refuses the
        dataset.
    """
    folders = {label: list(folders_in(folder)) for label, folder in participants.items()}
    if database is None:
        return ImageIndex(root, {_index(root, () if everyone else list(participants)): participants.keys()})
    layout, began_ns = _open_database(root, database)
    # Not the time of modification, which rsync and cp set to that of the original.
    changed = [
        label
        for label, paths in folders.items()
        if max(one.st_ctime_ns for path in paths for one in (path.stat(), path.lstat())) >= began_ns  # or a link to it
    ]
    layouts: dict[BIDSLayout, Collection[str]] = {layout: participants.keys() - set(changed)}
    if changed:
        layouts[_index(root, changed)] = changed
    return ImageIndex(root, layouts)


def index_maps(root: Path, participants: Mapping[str, Path], suffixes: Sequence[str], *, everyone: bool) -> ImageIndex:
    """Index the maps with some suffixes of participants, as `index_images`, in memory and of any datatype."""
    names = rf".*_(?:{'|'.join(map(re.escape, suffixes))})\.nii(?:\.gz)?"
    layout = _index(root, () if everyone else list(participants), names=names, datatypes="")
    return ImageIndex(root, {layout: participants.keys()}, lambda path: bool(re.fullmatch(names, path.name)))


def _index(
    root: Path,
    participants: Sequence[str],
    database: Path | None = None,
    *,
    names: str = _IMAGE_NAMES,
    datatypes: str = _OTHER_DATATYPES,
) -> BIDSLayout:
    """Index the images of participants, by default of all; no metadata (see `Sidecars`).

    Files of other `names`, and folders that `datatypes` matches, are ignored.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    wanted = f"(?:{'|'.join(map(re.escape, participants))})(?:/|$)" if participants else ""
    others = rf"/(?!(?:{names})$)[^/]*\.[a-zA-Z][^/.]*(?:\.gz)?$"
    folders = f"|{datatypes}" if datatypes else ""
    ignored = re.compile(rf"^/(?!sub-{wanted})|^(?:/[^/]+){{{FOLDER_LEVELS + 2}}}{folders}|{others}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of derivatives in the format of before BIDS 1.4
            return BIDSLayout(
                root,
                validate=False,
                config=[_anchored_config(root)],
                indexer=BIDSLayoutIndexer(index_metadata=False, ignore=[ignored]),
                database_path=database,
            )
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object}: the name is not valid UTF-8; rename the file or folder") from error
    except Exception as error:  # pybids has no exception for descriptions that it does not understand
        if isinstance(error, OSError):
            raise
        raise InputError(
            f"{root.name}: pybids cannot index it ({_first_line(error)}); check dataset_description.json"
        ) from error


def _anchored_config(root: Path) -> dict[str, Any]:
    """Return pybids' entities, searched for below the root only: ``/data/highres-x/ds`` would have ``res-x``."""
    return {
        "name": "bids",
        "entities": [
            {
                "name": name,
                "pattern": f"^{re.escape(str(root.absolute()))}(?=/).*?{entity.pattern}",
                "directory": entity.directory,
                "dtype": entity._dtype,
            }
            for name, entity in pybids_entities().items()
        ],
    }


@cache
def pybids_entities() -> Mapping[str, Any]:
    """Return the entities that pybids knows in raw and derivative datasets, by name."""
    from bids.layout.models import Config

    return {**Config.load("bids").entities, **Config.load("derivatives").entities}


def _open_database(root: Path, folder: Path) -> tuple[BIDSLayout, int]:
    """Open the database of a dataset, or create it; return it and when the indexing began (ns).

    It is renamed when it is complete, so that a killed run leaves no part of an index, nor do two runs at once.
    """
    from bids.layout import BIDSLayout

    try:
        if not (folder / _DATABASE).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
            temporary.mkdir()
            try:
                began_ns = temporary.stat().st_ctime_ns
                _index(root, (), temporary).connection_manager.engine.dispose()
                os.utime(temporary / _DATABASE, ns=(began_ns, began_ns))
                if not (folder / _DATABASE).is_file():
                    temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        began_ns = (folder / _DATABASE).stat().st_mtime_ns
        with warnings.catch_warnings(action="ignore"):
            layout = BIDSLayout(root, validate=False, database_path=folder)
            layout.get_entities()
    except InputError:
        raise
    except Exception as error:  # of SQLAlchemy, sqlite3 or pybids, whatever the file holds
        raise InputError(
            f"`bids_database_dir` {folder}: not a usable database of pybids ({_first_line(error)}); delete it or "
            "choose another folder"
        ) from error
    if Path(layout.root) != root.absolute():
        raise InputError(
            f"`bids_database_dir` {folder}: belongs to another dataset ({layout.root}); choose another folder"
        )
    return layout, began_ns


def _first_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(getattr(error, "orig", None) or error)
    return str(reason or type(error).__name__).partition("\n")[0]
