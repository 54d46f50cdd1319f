"""Derivatives of a scan: their names, their content, and how they are written."""

from __future__ import annotations

import gzip
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import bids_dgmseg
from bids_dgmseg.bids.current import MAP_CHECKSUM, MadeFrom, write_record
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION
from bids_dgmseg.bids.entities import ScanName, output_path, split_entities, stem_with
from bids_dgmseg.bids.output_dataset import FIELDS, describe_derivative, label_table, start_dataset
from bids_dgmseg.config import MNI, parse_output_space
from bids_dgmseg.errors import InputError, as_options
from bids_dgmseg.io.files import (
    copy_file,
    hash_files,
    read_optional_json,
    sha256,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
)
from bids_dgmseg.models.registry import Model, get_model

_LIBRARIES = ("nibabel", "nipype", "numpy", "scipy", "torch")
"""Libraries whose versions the quality record states."""


def contents_of_page(page: Path, failures: Sequence[str] = ()) -> str:
    """Return a checksum of what the page of a participant shows: the records of its scans, and failures."""
    records = sorted(page.with_suffix("").rglob("*_qc.json"))
    return sha256_of({"records": hash_files(records), "failures": list(failures)})


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the results of a scan are made from."""

    sources: Sequence[str] = ()
    """BIDS URIs of the map, or of the echoes that it was reconstructed from; the first defines the grid."""
    scanner: Mapping[str, Any] = field(default_factory=dict)
    """Metadata that identify the scanner."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of the run, for the quality record."""
    made_from: Mapping[str, Any] = field(default_factory=lambda: MadeFrom().describe())
    """What the results depend on (`bids_dgmseg.bids.current.MadeFrom`)."""


@dataclass(frozen=True, kw_only=True)
class ScanResults:
    """Files and reports of the steps of a scan, and what they are made from."""

    chi: Path
    """The map that was segmented; it is saved if it was reconstructed."""
    dseg: Path
    """Labels of structures.tsv on the grid of the map."""
    probseg: Path
    """Probabilities on the same grid, one volume per nucleus of the model."""
    stats: Path
    """Table of the measures."""
    location: Path
    """Box and regions of the head (`bids_dgmseg.segmentation.localize.Localization`)."""
    map_report: Mapping[str, Any]
    """Reports of the interfaces LocalizeNuclei, SegmentNuclei, MeasureNuclei and, if it ran, ReconstructQSM."""
    segmentation_report: Mapping[str, Any]
    measures_report: Mapping[str, Any]
    reconstruction_report: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    figures: Mapping[str, Path] = field(default_factory=dict)
    """Plane → PNG, ``viewer`` → HTML, ``reconstruction`` → PNG."""
    map_figures: Mapping[str, Path] = field(default_factory=dict)
    """Name of each further map → PNG."""
    automatic: Path | None = None
    """Labels before manual edits; None without."""
    r2star: Path | None = None
    """R2* of the echoes that the map was reconstructed from."""
    fields: Mapping[str, Path] = field(default_factory=dict)
    """Steps of the reconstruction to write (``brain``, ``total``, ``local``), parts of the map."""
    standard: Mapping[str, Path] = field(default_factory=dict)
    """Files in standard space (`bids_dgmseg.registration.mni.normalize_files`) by their names."""

    @property
    def model(self) -> Model:
        """The model that made the labels, with its nuclei."""
        return get_model(self.segmentation_report["model"], self.segmentation_report["labels"])

    @property
    def edits(self) -> dict[str, Any]:
        """File with the labels that a person has edited, and the nuclei that differ; empty without."""
        report = self.segmentation_report["edits"]
        return {**report, "edited": [*report["edited"]]} if report else {}

    @property
    def maps(self) -> dict[str, Path | None]:
        """Reconstructed maps by suffix."""
        made = bool(self.reconstruction_report)
        return {"Chimap": self.chi if made else None, "R2starmap": self.r2star if made else None}


def build_quality_record(scan: ScanName, results: ScanResults, box_mm: Mapping[str, Any]) -> dict[str, Any]:
    """Combine the reports of the steps to the content of ``_qc.json``, see docs/outputs.md.

    The record depends only on the scan, the options and the versions.
    """
    steps, measures, provenance = results.reconstruction_report, results.measures_report, results.provenance
    reconstruction = steps["reconstruction"] if steps else {}
    from_echoes = {"reconstructed_from": f"{len(reconstruction['EchoTime'])} echoes"} if reconstruction else {}
    reports = (steps, results.map_report, results.segmentation_report, measures)
    return {
        "scan": scan.name,
        "model": results.model.name,
        "input": {**results.map_report["input"], **from_echoes},
        **({"reconstruction": reconstruction} if reconstruction else {}),
        **({"correction": results.edits} if results.edits else {}),
        "scanner": dict(provenance.scanner),
        "box_mm": dict(box_mm),
        **measures["measures"],
        "warnings": [with_scan(scan.name, text) for report in reports for text in report.get("warnings", ())],
        "settings": {**provenance.settings, **results.segmentation_report["settings"]},
        "versions": {
            "bids_dgmseg": bids_dgmseg.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        **{part: measures[part] for part in ("maps", "normalization") if part in measures},
    }


def with_scan(name: str, message: str) -> str:
    """Prefix a message with the name of the scan, unless what precedes its first colon contains it.

    Parameters in it become options.

    >>> with_scan("sub-01", "DN_L was not found")
    'sub-01: DN_L was not found'
    >>> with_scan("sub-01", "sub-01_Chimap.nii.gz: all voxels are 0")
    'sub-01_Chimap.nii.gz: all voxels are 0'
    """
    message = as_options(message)
    return message if name in message.partition(":")[0] else f"{name}: {message}"


AUTOMATIC = Path("derivatives", "automatic")
"""Dataset in the output with the automatic labels of scans that a person has edited."""

SCANNER_FIELDS = (
    "InstitutionName",
    "Manufacturer",
    "ManufacturersModelName",
    "DeviceSerialNumber",
    "MagneticFieldStrength",
)
"""Sidecar fields that identify a scanner; the QC record of a scan keeps them."""

ACQUISITION_FIELDS = (
    *("SoftwareVersions", "ReceiveCoilName", "PulseSequenceType", "MRAcquisitionType", "RepetitionTime"),
    *("RepetitionTimeExcitation", "FlipAngle", "PixelBandwidth", "PartialFourier", "ParallelAcquisitionTechnique"),
    *("ParallelReductionFactorInPlane", "ParallelReductionFactorOutOfPlane"),
)
"""Sidecar fields that papers report [QSM consensus, table 5]; the QC record and reconstructed maps keep them."""

_PRIVATE = {"InstitutionName", "DeviceSerialNumber"}
"""Fields that shared maps should not have."""

RECONSTRUCTED: Mapping[str, str] = {
    "Chimap": "Magnetic susceptibility, reconstructed by bids_dgmseg",
    "R2starmap": "Rate of the decay of the magnitude, R2*, fitted by bids_dgmseg",
}
"""Suffix of the maps reconstructed from echoes → description in the sidecar, which distinguishes them."""

_CHECKED = ("_dseg.nii.gz", "_probseg.nii.gz", "_stats.tsv", "_Chimap.nii.gz", "_R2starmap.nii.gz")
"""Ends of the names of results whose content the record states, because other results and tables depend on it."""

MAP_SIDECAR: Mapping[str, Any] = {"Units": "ppm", "SkullStripped": True, "SusceptibilityReference": "whole brain"}
"""Metadata of every reconstructed map."""


_FURTHER_MAP = "FurtherMap"
"""End of ``desc`` of the figures of further maps."""


@dataclass(frozen=True)
class _Paths:
    """Paths of the derivatives of a scan by one model."""

    output_dir: Path
    scan: ScanName
    model: Model

    def result(self, suffix: str, extension: str) -> Path:
        """Return the path of labels, probabilities, table or record."""
        return output_path(self.output_dir, self.scan, suffix, extension, seg=self.model.name)

    def figure(self, name: str, extension: str) -> Path:
        """Return the path of a figure."""
        stem = stem_with(self.scan, seg=self.model.name, desc=name)
        return self.output_dir / "figures" / f"{stem}_dseg{extension}"

    def mask(self, label: str) -> Path:
        """Return the path of a mask; the model is in ``desc``, because BIDS does not allow ``seg`` for masks."""
        space = {} if "space" in self.scan.entities else {"space": "orig"}
        entities = {**space, "label": label, "desc": self.model.name}
        return output_path(self.output_dir, self.scan, "mask", ".nii.gz", **entities)


def map_paths(output_dir: Path, scan: ScanName, suffix: str = "Chimap") -> tuple[Path, Path]:
    """Return the paths of a map reconstructed from the echoes of a scan, one for all models, and of its sidecar."""
    return output_path(output_dir, scan, suffix, ".nii.gz"), output_path(output_dir, scan, suffix, ".json")


def further_map_figure(name: str) -> str:
    """Return the end of ``desc`` of the figure of a further map.

    >>> further_map_figure("paramagnetic_Chimap")
    'paramagneticChimapFurtherMap'
    """
    return re.sub("[^0-9a-zA-Z]", "", name) + _FURTHER_MAP


def _field_path(output_dir: Path, scan: ScanName, name: str, extension: str) -> Path:
    """Return the path of a step of a reconstruction; the brain mask is named as those that users provide."""
    if name == "brain":
        return output_path(output_dir, scan, "mask", extension, desc="brain")
    if name.endswith("magnetic"):
        return output_path(output_dir, scan, "Chimap", extension, desc=name)
    path = output_path(output_dir, scan, "fieldmap", extension, desc=name)
    return path.parents[1] / "fmap" / path.name


def save_scan(output_dir: Path, scan: ScanName, results: ScanResults, *, masks: bool = True) -> list[Path]:
    """Write all derivatives of one scan, replacing those of an earlier run, and the files of a new dataset.

    The record (``_qc.json``) is written last and lists the others: if it exists, the scan is complete.

    Parameters
    ----------
    output_dir : path
        The derivative dataset.
    scan : ScanName
    results : ScanResults
    masks : bool
        Whether to write one binary mask per nucleus and hemisphere, and per region of the head.

    Returns
    -------
    list of path
        The files written.

    Raises
    ------
    InputError
        If the reconstructed map would replace a map of the user, or an input changed while the scan was processed.
    """
    import numpy as np

    from bids_dgmseg.image.volume import Volume
    from bids_dgmseg.io.nifti import write_like
    from bids_dgmseg.segmentation.localize import Localization

    model, provenance = results.model, results.provenance
    paths, dseg = _Paths(output_dir, scan, model), Volume.read(results.dseg, np.uint8)
    located = Localization.read(results.location, dseg)
    record = build_quality_record(scan, results, located.location.box.to_dict())
    start_dataset(output_dir)
    _remove_earlier_results(paths, results)
    own_map = f"bids::{map_paths(output_dir, scan)[0].relative_to(output_dir).as_posix()}"
    common = {
        "Sources": [own_map] if results.maps["Chimap"] else list(provenance.sources[:1]),
        "SpatialReference": next(iter(provenance.sources), "n/a"),
    }
    figures = {further_map_figure(name): path for name, path in results.map_figures.items()} | dict(results.figures)
    written = [
        copy_file(results.dseg, paths.result("dseg", ".nii.gz")),
        _copy_image(results.probseg, paths.result("probseg", ".nii.gz")),
        copy_file(results.stats, paths.result("stats", ".tsv")),
        *(copy_file(path, paths.figure(name, path.suffix)) for name, path in figures.items()),
        *_write_reconstruction(output_dir, scan, results),
        *_write_texts(paths, results.stats, record.get("reference"), common),
    ]
    if masks:
        structures = {structure.bids_label: dseg.array == structure.index for structure in model.structures}
        regions = {**located.regions}
        if "ventricles" in regions:  # coarse: they cover parts of the nuclei beside them
            regions["ventricles"] = regions["ventricles"] & (dseg.array == 0)
        for label, mask in {**structures, **regions}.items():
            written.append(write_like(mask.astype(np.uint8), results.dseg, paths.mask(label)))
        text = (
            f"Voxels of one nucleus or region of the head (label) by model {model.name}; labels: mask_label in dseg.tsv"
        )
        sidecar = output_dir / f"desc-{split_entities(paths.mask('x').name)['desc']}_mask.json"  # of all scans
        write_json({"Description": text, "Type": "ROI", "SpatialReference": "orig"}, sidecar)
    if results.automatic is not None:
        written += _write_automatic(output_dir, scan, model, results.automatic)
    labels = _describe_labels(model, record, common, results.edits)
    if results.standard:
        space = results.measures_report["normalization"]["output_space"]
        written += _write_standard(output_dir, scan, model, results.standard, space, labels)
    written.append(write_json(labels, paths.result("dseg", ".json")))
    checksums = {
        path.relative_to(output_dir).as_posix(): sha256(path) if path.name.endswith(_CHECKED) else ""
        for path in written
        if not path.is_relative_to(output_dir / AUTOMATIC)
    }
    path = paths.result("qc", ".json")
    return [*written, write_record(path, record, provenance.made_from, checksums, output_dir)]


def _read_columns(stats: Path) -> list[str]:
    """Return the columns of a table."""
    with stats.open(encoding="utf-8") as file:
        return file.readline().rstrip("\r\n").split("\t")


def _write_reconstruction(output_dir: Path, scan: ScanName, results: ScanResults) -> list[Path]:
    """Write the maps, the brain mask and the fields of a reconstruction, each with its sidecar."""
    if not results.reconstruction_report:
        return []
    steps, written = results.reconstruction_report["reconstruction"], []
    scanner = {name: value for name, value in results.provenance.scanner.items() if name not in _PRIVATE}
    common = {"Sources": list(results.provenance.sources), **scanner}
    common["MagneticFieldStrength"] = steps["MagneticFieldStrength"]  # not the nominal one
    for suffix, source in results.maps.items():
        if source is not None:
            about = {**MAP_SIDECAR, **steps} if suffix == "Chimap" else _describe_r2star(steps)
            path, path_json = map_paths(output_dir, scan, suffix)
            about = {"Description": RECONSTRUCTED[suffix], **common, **about}
            # If the next write fails, an earlier map beside the new checksum would look as if a person had edited it.
            path.unlink(missing_ok=True)
            written += [write_json({**about, MAP_CHECKSUM: sha256(source)}, path_json), copy_file(source, path)]
    for name, source in results.fields.items():
        path, path_json = (_field_path(output_dir, scan, name, extension) for extension in (".nii.gz", ".json"))
        unit = "ppm" if name.endswith("magnetic") else "Hz"
        kind = {"Type": "Brain"} if name == "brain" else {"Units": unit, "SkullStripped": True}
        about = {"Description": FIELDS[name], **common, **kind}
        written += [write_json(about, path_json), copy_file(source, path)]
    return written


def _describe_labels(
    model: Model, record: Mapping[str, Any], common: Mapping[str, Any], edits: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the sidecar of the labels states about the model and the map."""
    prepared = record.get("input", {})
    return {
        "Description": f"Deep gray nuclei by model {model.name}; labels in the table; left is the patient's left",
        **common,
        "Manual": bool(edits and edits["edited"]),
        **({"Correction": dict(edits)} if edits else {}),
        "Model": model.name,
        "ModelTitle": model.title,
        "InputUnits": prepared.get("units", "n/a"),
        "InputUnitsFrom": prepared.get("units_from", "n/a"),
        "InputReference": prepared.get("reference", "n/a"),
    }


def _write_automatic(output_dir: Path, scan: ScanName, model: Model, dseg: Path) -> list[Path]:
    """Write the labels of the model for a scan with edited ones into the dataset `AUTOMATIC`."""
    root = output_dir / AUTOMATIC
    about = describe_derivative("Automatic labels of scans with manual edits")
    write_json({**about, "SourceDatasets": [{"URL": "../.."}]}, root / DATASET_DESCRIPTION)
    path, table = (output_path(root, scan, "dseg", extension, seg=model.name) for extension in (".nii.gz", ".tsv"))
    return [copy_file(dseg, path), write_text(label_table(model.structures), table)]


def _copy_image(source: Path, path: Path) -> Path:
    """Copy an image, compressed."""
    if source.suffix == ".nii":
        return write_bytes(gzip.compress(source.read_bytes(), compresslevel=6, mtime=0), path)
    return copy_file(source, path)


def _describe_r2star(steps: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: steps[name] for name in ("EchoTime", "BrainMask")}
    return {"Units": "1/s", "SkullStripped": True, **kept, "EstimationAlgorithm": steps["R2starFit"]}


def save_refused(output_dir: Path, scan: ScanName, model: Model, *, figure: Path, record: Mapping[str, Any]) -> None:
    """Write the figure and the record of a reconstruction whose map is not usable, for the page of the participant."""
    paths = _Paths(output_dir, scan, model)
    copy_file(figure, paths.figure("refused", ".png"))
    write_json({"scan": scan.name, "model": model.name, **record}, paths.figure("refused", ".json"))


def remove_refused(output_dir: Path, scan: ScanName, model: Model) -> None:
    """Remove what `save_refused` has written in an earlier run."""
    for extension in (".png", ".json"):
        _Paths(output_dir, scan, model).figure("refused", extension).unlink(missing_ok=True)


def _remove_earlier_results(paths: _Paths, results: ScanResults) -> None:
    """Remove the completeness marker and stale derivatives; never delete a user's map."""
    output_dir, scan, model = paths.output_dir, paths.scan, paths.model
    is_ours = {}
    for suffix, made in results.maps.items():
        path, sidecar = map_paths(output_dir, scan, suffix)
        is_ours[suffix] = read_optional_json(sidecar).get("Description") == RECONSTRUCTED[suffix]
        if made and path.exists() and not is_ours[suffix]:
            raise InputError(
                f"{path.name}: exists in {output_dir.name}, but was not reconstructed by this program; move it into "
                "another dataset, or choose another output folder"
            )
    mask = paths.mask("*")  # also of labels that other weights had
    outdated = [
        paths.result("qc", ".json"),
        paths.result("dseg", ".json"),
        *paths.figure("x", "").parent.glob(paths.figure(f"*{_FURTHER_MAP}", ".png").name),
        paths.figure("viewer", ".html"),
        paths.figure("reconstruction", ".png"),
        *(output_path(output_dir / AUTOMATIC, scan, "dseg", end, seg=model.name) for end in (".nii.gz", ".tsv")),
        *mask.parent.glob(mask.name),
        *_find_fields(output_dir, scan, results),
        *_find_standard(output_dir, scan, model),
    ]
    for path in outdated:
        path.unlink(missing_ok=True)
    remove_refused(output_dir, scan, model)
    is_input = map_paths(output_dir, scan)[0].resolve() == results.chi.resolve()
    if not results.maps["Chimap"] and is_input:
        return
    # Remove our map once the user provides one, and R2* once only one echo is left.
    for suffix, made in results.maps.items():
        if not made and is_ours[suffix]:
            for path in map_paths(output_dir, scan, suffix):
                path.unlink(missing_ok=True)


def _find_fields(output_dir: Path, scan: ScanName, results: ScanResults) -> Iterator[Path]:
    """Yield the files of `FIELDS` of another map than the present one."""
    chi, earlier = results.maps["Chimap"], read_optional_json(map_paths(output_dir, scan)[1]).get(MAP_CHECKSUM)
    if chi is not None and sha256(chi) == earlier:
        return
    for name, description in FIELDS.items():
        path, path_json = (_field_path(output_dir, scan, name, extension) for extension in (".nii.gz", ".json"))
        if read_optional_json(path_json).get("Description") == description:
            yield from (path, path_json)


def _write_texts(paths: _Paths, stats: Path, reference: Any, common: Mapping[str, Any]) -> list[Path]:
    """Write the label table, the data dictionary and the sidecar of the probabilities."""
    from bids_dgmseg.measurement.nuclei import STATS_COLUMNS, describe_sampled  # with pandas

    entries = ((column, STATS_COLUMNS.get(column) or describe_sampled(column)) for column in _read_columns(stats))
    dictionary: dict[str, Any] = {column: entry for column, entry in entries if entry}
    if reference:
        dictionary["SusceptibilityReference"] = reference
    model = paths.model
    about = {"Description": f"Probability of each nucleus, one volume per nucleus, by model {model.name}"}
    contents = {"stats": dictionary, "probseg": {**about, **common, "LabelMap": list(model.labels)}}
    return [
        write_text(label_table(model.structures), paths.result("dseg", ".tsv")),
        *(write_json(content, paths.result(suffix, ".json")) for suffix, content in contents.items()),
    ]


def standard_paths(
    output_dir: Path, scan: ScanName, model: Model, output_space: str, *, extension: str = ".nii.gz"
) -> dict[str, Path]:
    """Return the paths of the files in standard space, by the names that `normalize_files` gives them.

    The model is in ``seg`` or ``desc``: its labels determine the alignment.
    """
    space, resolution = parse_output_space(output_space)
    entities = {"space": space, **({"res": str(resolution)} if resolution else {})}
    paths = {
        f"standard_{name}": output_path(output_dir, scan, suffix, extension, **entities, **{key: model.name})
        for name, suffix, key in (("chi", "Chimap", "desc"), ("dseg", "dseg", "seg"), ("probseg", "probseg", "seg"))
    }
    for name, start, end in (("to_standard_xfm", "Chimap", space), ("from_standard_xfm", space, "Chimap")):
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


def _find_standard(output_dir: Path, scan: ScanName, model: Model) -> list[Path]:
    """List the files of a scan in standard space, and their sidecars."""
    paths = [
        path
        for suffix in ("", ":res-1", ":res-2")
        for extension in (".nii.gz", ".json", ".tsv")
        for path in standard_paths(output_dir, scan, model, MNI + suffix, extension=extension).values()
    ]
    return [path for path in dict.fromkeys(paths) if path.exists()]


def _write_standard(
    output_dir: Path,
    scan: ScanName,
    model: Model,
    standard: Mapping[str, Path],
    output_space: str,
    common: Mapping[str, Any],
) -> list[Path]:
    """Write the files in standard space with their sidecars; `common` has their ``Sources``, and ``Manual``."""
    space, resolution = parse_output_space(output_space)
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
    paths, written = standard_paths(output_dir, scan, model, output_space, extension=""), []
    for name, source in standard.items():
        more: dict[str, Any] = {"Sources": common["Sources"]}
        if resolution and not name.endswith("xfm"):
            more["Resolution"] = f"{resolution} mm"
        if name == "standard_dseg":
            table = paths[name].with_name(f"{paths[name].name}.tsv")
            written.append(write_text(label_table(model.structures), table))
        written.append(copy_file(source, paths[name].with_name(f"{paths[name].name}.nii.gz")))
        written.append(write_json({**about[name], **more}, paths[name].with_name(f"{paths[name].name}.json")))
    return written
