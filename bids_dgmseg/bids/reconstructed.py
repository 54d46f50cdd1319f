"""The map that is reconstructed of a scan's echoes: one for all models, in the output beside their results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.paths import output_path
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import copy_file, read_optional_json, sha256_of, sha256_or_error, write_json

MAP_SIDECAR: Mapping[str, Any] = {"Units": "ppm", "SkullStripped": True, "SusceptibilityReference": "whole brain"}
"""What is true of every map that is reconstructed here."""

_DESCRIPTION = "Magnetic susceptibility, reconstructed by bids_dgmseg"

_MARK = "MapFingerprint"


def map_fingerprint(scan: Scan, phase_sign: str, brain_mask: Path | None) -> str:
    """Hash all that a reconstruction depends on; empty where the scan has a map.

    These are the content of the echoes and of the user's mask of the brain, their metadata, the sign of the phase and
    the program's version.
    """
    if not scan.from_echoes:
        return ""
    return sha256_of(
        {
            "echoes": [(uri, sha256_or_error(path)) for uri, path in zip(scan.uris, scan.files, strict=True)],
            "echo_times_s": [echo.time_s for echo in scan.echoes],
            "sidecar": scan.problem or scan.sidecar,
            "phase_sign": phase_sign,
            "brain_mask": brain_mask and sha256_or_error(brain_mask),
            "version": bids_dgmseg.__version__,
        }
    )


def map_path(output_dir: Path, scan: Scan) -> Path:
    """Name the reconstructed map of a scan."""
    return output_path(output_dir, scan, "Chimap", ".nii.gz")


def map_uri(output_dir: Path, scan: Scan) -> str:
    """Give the BIDS URI of the reconstructed map of a scan."""
    return f"bids::{map_path(output_dir, scan).relative_to(output_dir).as_posix()}"


def note_map(fingerprint: str) -> dict[str, str]:
    """Say in the sidecar of a dseg which reconstruction it was made from; nothing where the map was given."""
    return {_MARK: fingerprint} if fingerprint else {}


def is_made_from(output_dir: Path, scan: Scan, dseg: Mapping[str, Any]) -> bool:
    """Tell whether results, by the sidecar of their dseg, were made from the map that is there now."""
    return bool(dseg.get(_MARK) == read_optional_json(_sidecar(map_path(output_dir, scan))).get(_MARK))


def is_outdated(output_dir: Path, scan: Scan, model_name: str) -> bool:
    """Tell whether a model's results were made from another reconstruction than the one that is there now."""
    dseg = read_optional_json(output_path(output_dir, scan, "dseg", ".json", seg=model_name))
    return _MARK in dseg and not is_made_from(output_dir, scan, dseg)


def check_map(output_dir: Path, scan: Scan) -> None:
    """Refuse to replace a map that was not made here.

    Raises
    ------
    InputError
        If the user has put one of that name into the output folder.
    """
    made = map_path(output_dir, scan)
    if made.exists() and not _is_own(made):
        raise InputError(
            f"{made.name}: lies in {output_dir.name}, but was not made by this program; move it into a dataset of its "
            "own, or choose another output folder"
        )


def place_map(chi: Path, output_dir: Path, scan: Scan, *, about: Mapping[str, Any], fingerprint: str) -> list[Path]:
    """Place a reconstructed map with its sidecar, and give their paths."""
    made = map_path(output_dir, scan)
    copy_file(chi, made)
    said = {"Description": _DESCRIPTION, **MAP_SIDECAR, "Sources": scan.uris, **about, **note_map(fingerprint)}
    write_json(said, _sidecar(made))
    return [made, _sidecar(made)]


def drop_map(output_dir: Path, scan: Scan) -> None:
    """Remove a map that was made here before there was one, unless results of another model name it."""
    made = map_path(output_dir, scan)
    if made.resolve() == scan.chi.resolve() or not _is_own(made) or find_dependent(output_dir, scan):
        return
    made.unlink(missing_ok=True)
    _sidecar(made).unlink(missing_ok=True)


def find_dependent(output_dir: Path, scan: Scan, *, but_for: str | None = None) -> list[str]:
    """Name the models whose results of a scan were made from a reconstructed map, but for those of one fingerprint."""
    pattern = output_path(output_dir, scan, "dseg", ".json", seg="*")
    found = (read_optional_json(path) for path in sorted(pattern.parent.glob(pattern.name)))
    return [str(said.get("Model")) for said in found if said.get(_MARK, but_for) != but_for]


def _sidecar(made: Path) -> Path:
    return made.with_name(made.name.removesuffix(".nii.gz") + ".json")


def _is_own(made: Path) -> bool:
    return read_optional_json(_sidecar(made)).get("Description") == _DESCRIPTION
