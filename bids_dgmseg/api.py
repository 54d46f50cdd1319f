"""Public Python API: segment, measure and reconstruct images in memory or on disk."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError, count
from bids_dgmseg.image.grids import Grid, describe_grid_mismatch
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.units import check_chi, standard_units
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.io.files import read_json
from bids_dgmseg.io.nifti import check_header, check_intact, image_like, load_image
from bids_dgmseg.io.niimg import Niimg, as_file, name_echoes, write_echoes, write_image
from bids_dgmseg.measurement.nuclei import insert_bilateral, join_labels, measure_nuclei
from bids_dgmseg.measurement.scan import SegmentedScan, measure_scan
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.model_folder import describe_learned_folds
from bids_dgmseg.models.registry import ALIASES, MODELS, get_model
from bids_dgmseg.models.structures import STRUCTURES, Structure
from bids_dgmseg.qsm.background import BACKGROUNDS
from bids_dgmseg.qsm.inversion import INVERSIONS
from bids_dgmseg.qsm.phase import UNWRAPPINGS
from bids_dgmseg.qsm.phase_sign import describe_doubt
from bids_dgmseg.qsm.reconstruct import PHASE_SIGNS, reconstruct_files
from bids_dgmseg.segmentation.predict import ProbabilityBlock
from bids_dgmseg.segmentation.segment import segment_map

_SUFFIX_UNITS = {
    "Chimap": "ppm",
    **dict.fromkeys(("T1map", "T2map", "T2starmap"), "s"),
    **dict.fromkeys(("R1map", "R2map", "R2starmap"), "hz"),
}
"""BIDS suffix → unit of the map."""

_UNIT_NAMES = {"hz": "hz", "1/s": "hz", "s^-1": "hz", "s-1": "hz", "arbitrary": "", "n/a": ""}

_NO_PROBABILITIES = ["mean_probability", "volume_pv_mm3", "mean_pv_ppm", "mass_ppm_mm3"]
"""Columns of `measure_nuclei` that need probabilities or only make sense for susceptibility."""


@dataclass(frozen=True)
class SegmentationResult:
    """Result of `segment`.

    Parameters
    ----------
    labels : Nifti1Image
        uint8 labels on the grid of the input (shape, affine, qform and sform codes); values are the ``index`` of
        `table`, 0 is background.
    table : DataFrame
        One row per nucleus (and, if asked for, per pair of sides), the columns of ``_stats.tsv``.
    model : str
        Name of the model.
    rating : str
        Quality rating of the scan: ``green``, ``amber`` or ``red``.
    warnings : tuple of str
        Remarks on the map and on nuclei that are cut off or were not found.
    """

    labels: nib.Nifti1Image
    table: pd.DataFrame
    model: str
    rating: str
    warnings: tuple[str, ...]
    _block: ProbabilityBlock = field(repr=False)
    _shape: tuple[int, int, int] = field(repr=False)

    @cached_property
    def probabilities(self) -> nib.Nifti1Image:
        """4D float32 image on the grid of the input, one volume per row of `table` with an ``index``, from 0 to 1."""
        fractions = self._block.fractions()
        array = np.zeros((*self._shape, len(fractions)), np.float32)
        array[self._block.slices] = np.moveaxis(fractions, 0, -1) * np.float32(1 / 255)
        return image_like(array, self.labels)

    def __repr__(self) -> str:
        nuclei = self.table.dropna(subset=["index"])
        found = int((nuclei["n_voxels"] > 0).sum())
        return f"SegmentationResult(model={self.model!r}, {found} of {len(nuclei)} nuclei, rating={self.rating!r})"


def segment(
    img: Niimg,
    model: str = "dgm16",
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    ensemble: bool = False,
    units: str | None = None,
    bilateral: bool = False,
) -> SegmentationResult:
    """Segment the deep gray nuclei on a susceptibility map and measure them.

    Parameters
    ----------
    img : Niimg-like
        3D susceptibility map (total chi, one head): path, nibabel image or whatever `nilearn.image.load_img` accepts.
    model : str
        One of `list_models`.
    weights : path, optional
        Model folder to use instead of the weights in the package.
    device : {"auto", "cpu", "cuda"}
        Where the networks run; ``auto`` uses a GPU if there is one.
    ensemble : bool
        Average over mirror images and all checkpoints of the weights: slower, slightly more accurate.
    units : {"ppm", "ppb"}, optional
        Unit of the map. By default that of the JSON file next to it, or else inferred from the values.
    bilateral : bool
        Add rows of both sides of each nucleus together to the table, such as ``RN`` after ``RN_L`` and ``RN_R``.

    Returns
    -------
    SegmentationResult
        ``labels`` and ``probabilities`` (nibabel images on the grid of `img`) and ``table`` (DataFrame), the same as
        the files that ``bids_dgmseg`` writes.

    Raises
    ------
    InputError
        If the image is not a usable susceptibility map, the model does not exist, or its weights cannot be loaded.
    ValueError
        If `device` is unknown.

    Examples
    --------
    >>> result = segment("sub-01_Chimap.nii.gz")  # doctest: +SKIP
    >>> result.labels.to_filename("sub-01_dseg.nii.gz")  # doctest: +SKIP
    >>> result.table[["abbreviation", "volume_mm3", "mean_ppm"]]  # doctest: +SKIP
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: {device!r}, expected one of auto, cpu, cuda")
    folder = None if weights is None else Path(weights)
    chosen, notes = choose_labels(replace(get_model(model, option="model "), ensemble=ensemble), folder, None)
    if ensemble and chosen.localizer.kind == "nnunet":
        raise InputError(f"ensemble: {chosen.name} distinguishes left from right and is not mirrored; set it to False")
    with as_file(img, "map") as path:
        checked = check_chi(path, _sidecar(path, units))
        chi = checked.chi_ppm
        found = segment_map(chi, chosen, weights=folder, device=device)
        labels = image_like(found.labels, load_image(path))
        learned = describe_learned_folds(folder, path) if folder else ""
    block = found.block
    probseg = block.fractions() * np.float32(1 / 255)
    dseg = chi.with_array(found.labels)
    scan = SegmentedScan(chi, dseg, probseg, block.slices, found.model.structures, labelled=block.seen)
    measures = measure_scan(scan, box=found.location.box, map_reference=checked.reference, bilateral=bilateral)
    warnings = (*notes, *checked.warnings, *([learned] if learned else []), *measures.warnings)
    return SegmentationResult(labels, measures.stats, chosen.name, measures.rating, warnings, block, chi.shape)


def measure(
    img: Niimg,
    labels: Niimg,
    *,
    units: str | None = None,
    lut: str | os.PathLike[str] | pd.DataFrame | None = None,
    bilateral: bool = False,
) -> pd.DataFrame:
    """Measure any quantitative map in labelled regions.

    Parameters
    ----------
    img : Niimg-like
        3D map: R2*, T1, chi, …; NaN where it is not valid. A value of 0 counts, except in chi
        maps where it is missing (empty slices, connected zeros inside the head).
    labels : Niimg-like
        3D label image in the same space. If it has another grid, each voxel of `img` gets the label of the nearest
        voxel of `labels`; no registration is done.
    units : str, optional
        Unit of the map, used in the names of the columns (``mean_hz``). By default that of the JSON file next to the
        map, or of its BIDS suffix: ppm for ``Chimap``, s for ``T2starmap``, hz for ``R2starmap``; else the columns
        have no unit (``mean``). Maps in ppm or ppb are checked and converted to ppm as in `segment`, other values are
        used as they are.
    lut : path or DataFrame, optional
        Look-up table of the labels as in BIDS (TSV with ``index`` and ``name``, and ``abbreviation`` if present). By
        default labels are numbered as in the result of `segment`.
    bilateral : bool
        Add rows of both sides together for labels whose abbreviations differ only in ``_L`` and ``_R``.

    Returns
    -------
    DataFrame
        One row per label in `labels` (and, if asked for, per pair of sides): ``index``, ``name``, ``abbreviation``,
        ``hemisphere``, ``n_voxels``, ``n_valid``, ``volume_mm3`` and the mean, median, percentiles, standard deviation
        and core mean of the map.

    Raises
    ------
    InputError
        If an image cannot be read, more than half of the labelled voxels lie outside the map (another space), or a
        label is not in the look-up table.
    """
    with as_file(img, "map") as path:
        values, unit = _read_map(path, units)
        name = path.name
    with as_file(labels, "labels") as path:
        given = read_labels(path)
        structures = _structures(given, lut, path.name)
        dseg = _on_grid(given, values, path.name, name)
    table = _measure_labels(values, dseg, structures)
    if bilateral:
        table = insert_bilateral(table, _measure_labels(values, *join_labels(dseg, structures)))
    if not any(structure.hemisphere for structure in structures):
        table = table.drop(columns="hemisphere")
    suffix = f"_{unit}" if unit else ""
    return table.rename(columns=lambda column: re.sub("_ppm$", suffix, column))


def _measure_labels(values: Volume, dseg: NDArray[Any], structures: Sequence[Structure]) -> pd.DataFrame:
    """Return the measures that need no probabilities."""
    nothing = np.broadcast_to(np.float32(0), (len(structures), *values.shape))
    table = measure_nuclei(values.array, dseg, nothing, structures=structures, voxel_size_mm=values.voxel_size_mm)
    return table.drop(columns=_NO_PROBABILITIES)


def reconstruct(
    magnitude: Niimg | Sequence[Niimg] | None,
    phase: Niimg | Sequence[Niimg],
    *,
    echo_times_s: Sequence[float],
    field_strength_t: float,
    mask: Niimg | None = None,
    phase_units: str | None = None,
    phase_sign: str = "auto",
    background: str = "auto",
    inversion: str = "medi",
    unwrapping: str = "region-growing",
) -> nib.Nifti1Image:
    """Reconstruct a susceptibility map from multi-echo GRE.

    Parameters
    ----------
    magnitude, phase : sequence of Niimg-like
        One 3D image per echo, or one 4D image. The phase is wrapped, in radians or in the integers of the scanner. If
        `magnitude` is None, `phase` are complex images, which contain both.
    echo_times_s : sequence of float
        Echo times in seconds, in ascending order.
    field_strength_t : float
        Field strength in T.
    mask : Niimg-like, optional
        Brain mask; by default the brain is found in the magnitude.
    phase_units : {"rad", "arbitrary"}, optional
        Unit of the phase. By default that of the JSON file next to it, or else inferred from the values.
    phase_sign : {"auto", "positive", "negative"}
        Whether phase increases or decreases with the field; by default judged by the shape of the head.
    background : {"auto", "pdf", "vsharp", "lbv"}
        Method of background field removal; ``auto`` is ``pdf`` for several echoes with a mask, else ``vsharp``.
    inversion : {"medi", "tv", "star", "ilsqr", "tkd"}
        Method of dipole inversion.
    unwrapping : {"region-growing", "best-path", "laplacian"}
        Method of phase unwrapping; ``laplacian`` removes part of the background field.

    Returns
    -------
    Nifti1Image
        Susceptibility in ppm on the grid of the first magnitude, with mean 0 over the brain and 0 outside.

    Raises
    ------
    ValueError
        If numbers of echoes differ, echo times are not ascending seconds, or the field strength is not positive.
    InputError
        If an image cannot be used, or the grids differ.

    Warns
    -----
    UserWarning
        If the brain mask or the values of the map are implausible, the sign of the phase is in doubt, its scale is a
        guess, or the header states two orientations.

    Notes
    -----
    Unwrapping, weighted field fit, background field removal and dipole inversion; see
    `bids_dgmseg.qsm.reconstruct.reconstruct_chi`.
    """
    with tempfile.TemporaryDirectory() as folder:
        phases = write_echoes(phase, Path(folder), "phase")
        magnitudes = phases if magnitude is None else write_echoes(magnitude, Path(folder), "magnitude")
        times = [float(time_s) for time_s in echo_times_s]
        if not len(magnitudes) == len(phases) == len(times):
            raise ValueError(
                f"{count(len(magnitudes), 'magnitude image')}, {count(len(phases), 'phase image')} and "
                f"{count(len(times), 'echo time')}; "
                "expected one of each per echo"
            )
        if not times or min(times) <= 0 or max(times) > 1 or sorted(set(times)) != times:
            raise ValueError(f"echo_times_s: {times}, expected ascending times in seconds, such as [0.005, 0.010]")
        if not field_strength_t > 0:
            raise ValueError(f"field_strength_t: {field_strength_t}, expected the field strength in T, such as 3")
        for name, value, known in (
            ("phase_sign", phase_sign, PHASE_SIGNS),
            ("unwrapping", unwrapping, UNWRAPPINGS),
            ("background", background, ("auto", *BACKGROUNDS)),
            ("inversion", inversion, INVERSIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r}, expected one of {', '.join(known)}")
        beside = [Path(phase) if isinstance(phase, str | os.PathLike) else path for path in phases]
        parts = ("complex",) if magnitude is None else ("phase", "mag")
        try:
            done = reconstruct_files(
                [dict(zip(parts, files, strict=False)) for files in zip(phases, magnitudes, strict=True)],
                echo_times_s=times,
                b0_tesla=float(field_strength_t),
                phase_units=[str(_sidecar(path, phase_units).get("Units", "")) for path in beside],
                mask=None if mask is None else write_image(mask, Path(folder), "mask"),
                phase_sign=phase_sign,
                background=background,
                inversion=inversion,
                unwrapping=unwrapping,
            )
        except InputError as error:
            raise InputError(name_echoes(str(error))) from error
        found = [*check_header(load_image(magnitudes[0]), magnitudes[0].name), *done.warnings]
        found += [f"the reconstructed map is implausible: {problem}" for problem in done.problems]
        if doubt := describe_doubt(
            done.head_correlation, done.tail_ratio, sign=done.phase_sign, given=phase_sign != "auto"
        ):
            found.append(f"{doubt.replace('--phase-sign', 'phase_sign')}; compare the map with a known one")
        for text in found:
            warnings.warn(name_echoes(text), stacklevel=2)
        return image_like(done.chi_ppm, load_image(magnitudes[0]))


def list_models() -> pd.DataFrame:
    """List the models.

    Returns
    -------
    DataFrame
        One row per model, indexed by the name that `segment` takes: ``nuclei`` (both sides of each), ``network``,
        ``licence`` of the weights and ``default``.
    """
    rows = [
        {
            "model": name,
            "nuclei": " ".join(dict.fromkeys(structure.nucleus for structure in model.structures)),
            "network": model.network.rpartition(":")[2] or "nnU-Net",
            "licence": model.weights.licence if model.weights else "n/a",
            "default": name == ALIASES["default"],
        }
        for name, model in MODELS.items()
    ]
    return pd.DataFrame(rows).set_index("model")


def _sidecar(path: Path, units: str | None = None) -> Mapping[str, Any]:
    """Read the JSON file next to an image if there is one; stated units take precedence."""
    beside = path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name) + ".json")
    sidecar = read_json(beside) if beside.is_file() else {}
    return {**sidecar, "Units": units} if units else sidecar


def _read_map(path: Path, units: str | None) -> tuple[Volume, str]:
    """Read a map and return the unit in column names; chi is converted to ppm."""
    suffix = path.name.partition(".")[0].rpartition("_")[2]
    beside = {key.casefold(): value for key, value in _sidecar(path).items()}
    stated = units or str(beside.get("units", beside.get("unit", "")))
    if not units and standard_units(stated) == "":  # such as "arbitrary"
        stated = _SUFFIX_UNITS.get(suffix, stated)
    stated = stated.strip().lower()
    if standard_units(stated) in ("ppm", "ppb"):
        sidecar = _sidecar(path, units)
        return check_chi(path, sidecar).chi_ppm, "ppm"
    check_intact(path)
    check_header(load_image(path), path.name)
    values = Volume.read(path)
    values = values.with_array(np.where(np.isfinite(values.array), values.array, np.float32(np.nan)))
    return values, re.sub(r"\W+", "_", _UNIT_NAMES.get(stated, stated)).strip("_")


def _structures(labels: Volume, lut: str | os.PathLike[str] | pd.DataFrame | None, name: str) -> list[Structure]:
    """Return the structures that a label image contains, in the order of their numbers."""
    if lut is None:
        known = {structure.index: structure for structure in STRUCTURES}
        remedy = "pass their look-up table as lut"
    else:
        table = lut if isinstance(lut, pd.DataFrame) else pd.read_csv(lut, sep="\t")
        if missing := {"index", "name"} - set(table):
            raise InputError(f"lut: no column {' or '.join(sorted(missing))}; expected index and name")
        no_side: Any = ""
        abbreviations = table["abbreviation"] if "abbreviation" in table else table["name"]
        known = {
            int(row["index"]): Structure(int(row["index"]), str(row["name"]), str(abbreviation), no_side, "", 0)
            for (_, row), abbreviation in zip(table.iterrows(), abbreviations, strict=True)
        }
        remedy = "add them to the look-up table"
    present = [int(number) for number in np.unique(labels.array) if number]
    if not present:
        raise InputError(f"{name}: no labels, all voxels are 0")
    if unknown := [str(number) for number in present if number not in known]:
        raise InputError(f"{name}: unknown labels {', '.join(unknown[:5])}{' …' if unknown[5:] else ''}; {remedy}")
    return [known[number] for number in present]


def _on_grid(labels: Volume, values: Volume, name: str, map_name: str) -> NDArray[Any]:
    """Resample labels to the grid of a map, nearest neighbour; refuse labels of another space."""
    if not describe_grid_mismatch(values, labels):
        return labels.array
    to_map = np.linalg.inv(values.affine) @ labels.affine
    voxels = nib.affines.apply_affine(to_map, np.argwhere(labels.array))
    covered = ((voxels > -0.5) & (voxels < np.array(values.shape) - 0.5)).all(axis=1).mean()
    if covered < 0.5:
        raise InputError(
            f"{name}: {1 - covered:.0%} of the labelled voxels lie outside {map_name}; register them to the map first"
        )
    return resample(labels, Grid(values.shape, values.affine), order=0).array
