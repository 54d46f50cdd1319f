"""Index the images of a dataset with pybids.

pybids is imported here only and when it is needed, because the import takes half a second.
"""

from __future__ import annotations

import re
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

_OTHER_DATATYPES = r"/(?:beh|dwi|eeg|fmap|func|ieeg|meg|micr|motion|mrs|nirs|perf|pet)$"

_IMAGE_NAMES = f"{MAP_NAME.pattern}|{ECHO_NAME.pattern}"


@dataclass(frozen=True)
class ImageIndex:
    """The chi maps and echoes of a dataset, or other images."""

    root: Path
    layout: BIDSLayout | None
    """None: no images."""
    participants: Collection[str] = ()
    """Labels without ``sub-``; images of others are left out."""
    is_wanted: Callable[[Path], bool] = is_image

    def find(self, filters: Mapping[str, Any] | None = None, *, regex_search: bool = False) -> list[Path]:
        """List the images that have certain entities, sorted; without filters, all.

        `filters` and `regex_search` are those of pybids' ``BIDSLayout.get``. `InputError` if pybids refuses them.
        """
        if self.layout is None:
            return []
        try:
            names = self.layout.get(return_type="file", regex_search=regex_search, **(filters or {}))
        except Exception as error:  # of SQLAlchemy, sqlite3 or re, whatever the user's filter holds
            raise InputError(f"the filter cannot be applied ({_first_line(error)}); correct its values") from error
        paths = (Path(name).relative_to(self.layout.root) for name in names)
        own = (path for path in paths if path.parts[0].removeprefix("sub-") in self.participants)
        return sorted(self.root / path for path in own if self.is_wanted(path))


def index_images(root: Path, participants: Mapping[str, Path], *, everyone: bool) -> ImageIndex:
    """Index the chi maps and echoes of some participants of a dataset.

    Parameters
    ----------
    root : path
        Dataset.
    participants : mapping
        Label without ``sub-`` → folder.
    everyone : bool
        Whether these are all participants of the dataset.

    Raises
    ------
    InputError
        If a folder cannot be listed, or pybids refuses the dataset.
    """
    for folder in participants.values():
        list(folders_in(folder))
    return ImageIndex(root, _index(root, () if everyone else list(participants)), participants.keys())


def index_maps(root: Path, participants: Mapping[str, Path], suffixes: Sequence[str], *, everyone: bool) -> ImageIndex:
    """Index the maps with some suffixes of participants, as `index_images`, and of any datatype."""
    names = rf".*_(?:{'|'.join(map(re.escape, suffixes))})\.nii(?:\.gz)?"
    layout = _index(root, () if everyone else list(participants), names=names, datatypes="")
    return ImageIndex(root, layout, participants.keys(), lambda path: bool(re.fullmatch(names, path.name)))


def _index(
    root: Path,
    participants: Sequence[str],
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


def _first_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(getattr(error, "orig", None) or error)
    return str(reason or type(error).__name__).partition("\n")[0]
