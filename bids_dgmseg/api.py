"""Public Python API: segment, measure and reconstruct images in memory or on disk."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import nibabel as nib
import numpy as np
import pandas as pd

from bids_dgmseg.bids.entities import check_participant
from bids_dgmseg.bids.masks_and_maps import find_label_table
from bids_dgmseg.config import Device
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.units import check_acquisition, check_chi, standard_units
from bids_dgmseg.image.volume import read_labels
from bids_dgmseg.io.files import read_sidecar
from bids_dgmseg.io.nifti import (
    Niimg,
    as_file,
    check_header,
    expand,
    image_like,
    load_image,
    name_arguments,
    write_echoes,
    write_image,
)
from bids_dgmseg.measurement.further_maps import (
    check_plausible,
    label_structures,
    labels_on_grid,
    measure_labels,
    name_structures,
    name_units,
    read_map,
)
from bids_dgmseg.measurement.proof import prove as prove_labels
from bids_dgmseg.measurement.scan_measures import measure_scan
from bids_dgmseg.measurement.segmented_scan import SegmentedScan
from bids_dgmseg.models.label_tables import read_label_table
from bids_dgmseg.models.model_folder import describe_folds_trained_on
from bids_dgmseg.models.registry import ALIASES, MODELS, get_model
from bids_dgmseg.models.structures import with_pairs, with_wholes
from bids_dgmseg.qsm.inversion import Methods
from bids_dgmseg.qsm.reconstruct import list_warnings, reconstruct_files
from bids_dgmseg.segmentation.engines import choose_labels
from bids_dgmseg.segmentation.localize import resample_regions
from bids_dgmseg.segmentation.predict import ProbabilityBlock
from bids_dgmseg.segmentation.segment import segment_map


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
        n_present = int((nuclei["n_voxels"] > 0).sum())
        return f"SegmentationResult(model={self.model!r}, {n_present} of {len(nuclei)} nuclei, rating={self.rating!r})"


@contextmanager
def _named_arguments(units: str) -> Iterator[None]:
    """Name arguments in errors, see `name_arguments`."""
    try:
        yield
    except InputError as error:
        raise InputError(name_arguments(str(error), units)) from error


@_named_arguments("units")
def segment(
    img: Niimg,
    model: str = "dgm16",
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    units: str | None = None,
    bilateral: bool = False,
    prove: bool | str = False,
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
    device : {"auto", "cpu", "cuda", "mps"}
        Where the networks run; ``auto`` uses a GPU if there is one.
    units : str, optional
        Unit of the map, ``ppm`` or ``ppb``. By default that of the JSON file next to it, or else inferred from the
        values.
    bilateral : bool
        Add a bilateral row (left and right combined) per nucleus to the table, such as ``RN`` after ``RN_L`` and
        ``RN_R``.
    prove : bool or "full"
        Plant known changes in the map, segment it again (four times, six if ``full``), and add to the table what
        is recovered; see `bids_dgmseg.measurement.proof.prove`.

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
    if device not in get_args(Device):
        raise ValueError(f"device: {device!r}, expected one of {', '.join(get_args(Device))}")
    folder = None if weights is None else Path(weights).expanduser()
    chosen, notes = choose_labels(get_model(model), folder)
    with as_file(img, "img") as path:
        checked = check_chi(path, read_sidecar(path, units))
        chi = checked.chi_ppm
        network: dict[str, Any] = {"weights": folder, "device": device}
        result = segment_map(chi, chosen, **network)
        labels = image_like(result.labels, load_image(path))
        trained_on_it = describe_folds_trained_on(folder, path) if folder else ""
    block = result.block
    probseg = block.fractions() * np.float32(1 / 255)
    dseg = chi.with_array(result.labels)
    network["location"], structures, proof = result.location, result.model.structures, None
    if prove:
        proof = prove_labels(
            chi,
            dseg,
            structures,
            lambda planted: segment_map(planted.chi, chosen, **network).labels,
            full=prove == "full",
        )
    scan = SegmentedScan(
        chi=chi,
        dseg=dseg,
        probseg=probseg,
        block=block.slices,
        structures=structures,
        labelled=block.seen,
        proof=proof.table if proof else None,
    )
    heads, grid = result.location.labels, Grid(chi.shape, chi.affine)
    names = result.model.localizer.labels
    regions = (
        {} if heads is None else resample_regions(heads, grid, names=names, valid=scan.fov.inside, regions=["brain"])
    )
    nuclei = with_wholes(scan.structures)
    measures = measure_scan(
        scan,
        with_pairs(nuclei) if bilateral else nuclei,
        map_reference=checked.reference,
        facts={"brain_volume_ml": chi.volume_ml(regions["brain"])} if "brain" in regions else {},
    )
    lines = (*notes, *checked.warnings, *([trained_on_it] if trained_on_it else []), *measures.warnings)
    lines += proof.warnings if proof else ()
    remarks = tuple(map(name_arguments, lines))
    return SegmentationResult(labels, measures.stats, chosen.name, measures.rating, remarks, block, chi.shape)


@_named_arguments("units")
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
        3D map: R2*, T1, chi, …; NaN where it is not valid. A value of 0 counts, except in maps of relaxation times and
        rates by their BIDS suffix, and in chi maps where it is missing (outside of the brain mask, empty slices, in
        maps of both signs connected zeros inside the head).
    labels : Niimg-like
        3D label image in the same space. If it has another grid, each voxel of `img` gets the label of the nearest
        voxel of `labels`; no registration is done.
    units : str, optional
        Unit of the map, used in the names of the columns (``mean_per_s``). By default that of the JSON file next to the
        map, or of its BIDS suffix: ppm for ``Chimap``, s for ``T2starmap``, 1/s for ``R2starmap``; else the columns
        have no unit (``mean``). Maps in ppm or ppb are checked and converted to ppm as in `segment`, ms to s;
        other values are used as they are.
    lut : path or DataFrame, optional
        Look-up table of the labels as in BIDS (TSV with ``index`` and ``name``, and ``abbreviation`` if present). By
        default the ``dseg.tsv`` beside the label image; without it, labels are numbered as in the result of `segment`.
    bilateral : bool
        Add bilateral rows (left and right combined) for labels whose abbreviations differ only in ``_L`` and ``_R``.

    Returns
    -------
    DataFrame
        One row per label in `labels` (and, if asked for, per pair of sides): ``index``, ``name``, ``abbreviation``,
        ``hemisphere``, ``n_voxels``, ``n_valid``, ``volume_mm3`` and the mean, median, percentiles, standard deviation
        and core mean of the map.

    Raises
    ------
    InputError
        If an image cannot be read, more than half of the labelled voxels lie outside the map (another space), a label
        is not in the look-up table, the file names are of two participants, or no tissue has the median of the map
        (T1, T2, T2*, R1, R2, R2*) in its unit.
    """
    with as_file(img, "img") as path:
        values, unit = read_map(path, units)
        map_path = path
    with as_file(labels, "labels") as path:
        check_participant(path, [map_path])
        image_labels, source = read_labels(path), find_label_table(path).source if lut is None else None
        if source:
            structures = name_structures(image_labels, read_label_table(source), name=path.name)
        else:
            structures = label_structures(image_labels, lut, path.name)
        dseg = labels_on_grid(image_labels, values, path.name, map_path.name)
    check_plausible(values.array[dseg != 0], map_path, unit)
    table = measure_labels(values, dseg, with_pairs(structures) if bilateral else structures)
    if not any(structure.hemisphere for structure in structures):
        table = table.drop(columns="hemisphere")
    return name_units(table, unit)


@_named_arguments("phase_units")
def reconstruct(
    magnitude: Niimg | Sequence[Niimg] | None,
    phase: Niimg | Sequence[Niimg],
    *,
    echo_times_s: Sequence[float],
    field_strength_t: float,
    mask: Niimg | None = None,
    phase_units: str | None = None,
    phase_sign: str = "auto",
    regularization: float | None = None,
    erosion_mm: float | None = None,
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
        Field strength in T, to two decimals: scanners called 3 T have 2.89 to 3.0 T.
    mask : Niimg-like, optional
        Brain mask; by default the brain is found in the magnitude.
    phase_units : str, optional
        Unit of the phase, ``rad`` or ``arbitrary``. By default that of the JSON file next to it, or else inferred from
        the values.
    phase_sign : {"auto", "positive", "negative"}
        Whether phase increases or decreases with the field; by default judged by the shape of the head.
    regularization : float, optional
        Weight λ of the inversion; by default in proportion to the noise of the field.
    erosion_mm : float, optional
        Depth below the border of the brain from which the map has values; by default one voxel.

    Returns
    -------
    Nifti1Image
        Susceptibility in ppm on the grid of the first magnitude, with mean 0 over the brain and 0 outside.

    Raises
    ------
    ValueError
        If numbers of echoes differ, echo times are not ascending seconds, the field strength is not positive, the
        phase sign is unknown, or a weight or erosion is out of range.
    InputError
        If an image cannot be used, or the grids differ.

    Warns
    -----
    UserWarning
        If the brain mask or the values of the map are implausible, the sign of the phase is in doubt, its scale is a
        guess, the header states two orientations, or one of the checks of the app finds something.

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
                f"{len(magnitudes)} magnitude image(s), {len(phases)} phase image(s) and {len(times)} echo time(s); "
                "expected one of each per echo"
            )
        check_acquisition(times, field_strength_t)
        methods = Methods(
            phase_sign=phase_sign,
            regularization=regularization,
            erosion_mm=erosion_mm,
        )
        if phase_units is not None and standard_units(phase_units) not in ("rad", ""):
            raise ValueError(f"phase_units: {phase_units!r}, expected rad or arbitrary")
        beside = [expand(phase) if isinstance(phase, str | os.PathLike) else path for path in phases]
        parts = ("complex",) if magnitude is None else ("phase", "mag")
        done = reconstruct_files(
            [dict(zip(parts, files, strict=False)) for files in zip(phases, magnitudes, strict=True)],
            echo_times_s=times,
            b0_tesla=float(field_strength_t),
            phase_units=[str(read_sidecar(path, phase_units).get("Units", "")) for path in beside],
            mask=None if mask is None else write_image(mask, Path(folder), "mask"),
            methods=methods,
        )
        remarks = [*check_header(load_image(magnitudes[0]), magnitudes[0].name), *list_warnings(done)]
        remarks += [f"the reconstructed map is implausible: {problem}" for problem in done.problems]
        for text in remarks:
            warnings.warn(name_arguments(text, "phase_units"), stacklevel=3)
        return image_like(done.chi_ppm, load_image(magnitudes[0]))


def list_models() -> pd.DataFrame:
    """List the models.

    Returns
    -------
    DataFrame
        One row per model, indexed by the name that `segment` takes: ``nuclei`` (their number, sides counted once),
        ``network``, ``licence`` of the weights and ``default``. It fits into 80 columns; ``dgmseg models`` names the
        nuclei.
    """
    rows = [
        {
            "model": name,
            "nuclei": len({structure.nucleus for structure in model.structures}),
            "network": model.network.rpartition(":")[2] or "nnU-Net",
            "licence": model.weights.licence if model.weights else "n/a",
            "default": name == ALIASES["default"],
        }
        for name, model in MODELS.items()
    ]
    return pd.DataFrame(rows).set_index("model")
