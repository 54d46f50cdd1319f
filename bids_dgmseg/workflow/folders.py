"""Checks of the output and working directories."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, generators, is_own
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_missing, describe_unfetched, is_broken_symlink, is_pointer_file
from bids_dgmseg.io.files import read_json


def check_folders(config: RunConfig) -> None:
    """Reject an output or working directory that would damage the input or another program's dataset.

    Writes nothing, except that the output directory is created unless this is a dry run.

    Raises
    ------
    InputError
        If a directory lies inside the raw data, or the output directory is read-only or another program's dataset.
    """
    from bids_dgmseg.bids.output_dataset import check_writable

    root, output_dir, work_dir = config.bids_dir.resolve(), config.output_dir, config.control.work_dir
    for folder, option in ((output_dir, "output directory"), (work_dir, "--work-dir")):
        inside = folder.resolve()
        if inside.is_relative_to(root) and inside.relative_to(root).parts[:1] != ("derivatives",):
            raise InputError(
                f"{folder.name}: {option} inside the input's raw data ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: --work-dir inside the output directory, which would not be valid BIDS; choose a folder "
            "outside it"
        )
    maker = _find_other_maker(output_dir)
    if not maker and config.level == "participant":
        maker = _find_unknown_maker(output_dir)
    if maker:
        raise InputError(f"{output_dir.name}: contains a dataset of {maker}; choose another output directory")
    if not config.control.dry_run:
        check_writable(output_dir)


def make_run_folder(work_dir: Path) -> Path:
    """Create a folder in the working directory that no other run uses.

    Raises
    ------
    InputError
        If that fails.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="run-", dir=work_dir))
    except OSError as error:
        raise InputError(f"{work_dir}: cannot be written ({error.strerror}); choose another --work-dir") from error


def _find_other_maker(folder: Path) -> str | None:
    """Return the program that made the dataset in a folder, unless it is this one or there is no dataset."""
    path = folder / DATASET_DESCRIPTION
    if is_broken_symlink(path):
        raise InputError(f"{folder.name}: {describe_missing(path)}")
    if is_pointer_file(path):
        raise InputError(f"{folder.name}: {describe_unfetched(path)}")
    if not path.is_file():
        return None
    try:
        read_json(path)
    except InputError as error:
        raise InputError(f"{folder.name}/{error}") from error
    if is_own(folder):
        return None
    return ", ".join(maker["Name"] for maker in generators(folder)) or "another program"


def _find_unknown_maker(folder: Path) -> str | None:
    """Return a description of a folder with participants but without dataset_description.json, as SEPIA writes it."""
    if (folder / DATASET_DESCRIPTION).exists():
        return None
    found = next((one.name for one in sorted(folder.glob("sub-*")) if one.is_dir() and any(one.iterdir())), None)
    return f"another program ({found}, but no {DATASET_DESCRIPTION})" if found else None
