"""Files of a scan in standard space: their names and sidecars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.entities import ScanName, output_path, stem_of
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.config import MNI, parse_output_space
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import copy_file, write_json, write_text
from bids_dgmseg.models.registry import Model


def standard_paths(
    output_dir: Path, scan: ScanName, model: Model, output_space: str, *, extension: str = ".nii.gz"
) -> dict[str, Path]:
    """Return the paths of the files in standard space, by the names that `normalize_files` gives them.

    The model is in ``seg`` or ``desc``: its labels determine the alignment.
    """
    space, resolution = parse_output_space(output_space)
    entities = {"space": space, **({"res": str(resolution)} if resolution else {})}
    names = {
        "standard_chi": ("Chimap", {"desc": model.name}),
        "standard_dseg": ("dseg", {"seg": model.name}),
        "standard_probseg": ("probseg", {"seg": model.name}),
    }
    paths = {
        name: output_path(output_dir, scan, suffix, extension, **entities, **more)
        for name, (suffix, more) in names.items()
    }
    for name, (start, end) in {"to_standard_xfm": ("Chimap", space), "from_standard_xfm": (space, "Chimap")}.items():
        stem = f"{scan.name}_from-{start}_to-{end}_mode-image_desc-{model.name}_xfm"
        paths[name] = paths["standard_chi"].with_name(stem + extension)
    return paths


def check_standard_names(scans: Iterable[ScanName], model: Model, output_space: str) -> None:
    """Raise InputError if scans that differ in ``space`` only would get the same files in standard space."""
    owners: dict[Path, str] = {}
    for scan in scans:
        other = owners.setdefault(standard_paths(Path(), scan, model, output_space)["standard_chi"], scan.name)
        if other != scan.name:
            raise InputError(
                f"`output_space`: {other} and {scan.name} would get the same files in {output_space}; select one of "
                "them with `filter_file`"
            )


def find_standard(output_dir: Path, scan: ScanName, model: Model) -> list[Path]:
    """List the files of a scan in standard space, and their sidecars."""
    found = []
    for suffix in ("", ":res-1", ":res-2"):
        for extension in (".nii.gz", ".json", ".tsv"):
            paths = standard_paths(output_dir, scan, model, MNI + suffix, extension=extension)
            found += [path for path in paths.values() if path.exists() and path not in found]
    return found


def write_standard(
    output_dir: Path,
    scan: ScanName,
    model: Model,
    standard: Mapping[str, Path],
    output_space: str,
    common: Mapping[str, Any],
) -> list[Path]:
    """Write the files in standard space with their sidecars; `common` has their ``Sources``, and ``Manual``."""
    sidecars = standard_paths(output_dir, scan, model, output_space, extension=".json")
    space, resolution = parse_output_space(output_space)
    sources = {"Sources": common["Sources"]}
    about: dict[str, dict[str, Any]] = {
        "standard_chi": {"Description": f"Magnetic susceptibility in {space}", "Units": "ppm", "SkullStripped": True},
        "standard_dseg": {
            "Description": f"Deep gray nuclei by model {model.name} in {space}",
            "Manual": common["Manual"],
        },
        "standard_probseg": {"Description": f"Probability of each nucleus in {space}", "LabelMap": list(model.labels)},
        "to_standard_xfm": {"Description": f"Displacement field (ITK, mm) that takes images of the scan to {space}"},
        "from_standard_xfm": {"Description": f"Displacement field (ITK, mm) that takes images in {space} to the scan"},
    }
    written = []
    for name, path in standard_paths(output_dir, scan, model, output_space).items():
        if name not in standard:
            continue
        grid = {"Resolution": f"{resolution} mm"} if resolution and not name.endswith("xfm") else {}
        if name == "standard_dseg":
            table = path.with_name(f"{stem_of(path)}.tsv")
            written.append(write_text(label_table(model.structures), table))
        written.append(copy_file(standard[name], path))
        written.append(write_json({**about[name], **sources, **grid}, sidecars[name]))
    return written
