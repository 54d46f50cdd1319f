"""The label template: one labelled head, put together from public atlases.

Where the originals are found (none of them lies in this project):

- Allen Human Reference Atlas – 3D, 2020 (RRID:SCR_017764, CC BY 4.0), drawn on ICBM152 2009b symmetric, 0.5 mm:
  download.alleninstitute.org/informatics-archive/allen_human_reference_atlas_3d_2020 and community.brain-map.org. Its
  voxels carry ten-digit ids of the ontology; wanted here is the same image with the structures counted 0 (air) to 141
  and their symbols by that number, as viewers pack it.
- CIT168 subcortical atlas (Pauli, Nili, Tyszka 2018, CC BY 4.0): osf.io/jkzwp, on ICBM152 2009c asymmetric. Register
  its template to ICBM152 2009b symmetric (such as SyN of ANTs) and carry the probabilities along.
- ICBM152 2009 symmetric (McConnell Brain Imaging Centre, MNI): nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009. Its
  T1w image without skull is also installed with nilearn, in ``nilearn/datasets/data``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.masks import close_with_ball
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.bids_writer import write_tsv
from bids_dgmseg.simulate.susceptibility import TISSUES

_NUCLEI = {"CN": "CaH CaB", "PUT": "Pu", "GP": "GPe GPi", "RN": "RN", "SN": "SN", "STN": "STH"}
"""Nucleus → symbols of the Allen atlas; DN and IN are cut out of CbDN."""

_CEREBELLAR_NUCLEI = "CbDN"

_TISSUES = {
    "white matter": "FWM ac fx mtt ot olt or",
    "lateral ventricle": "aLV bLV pLV iLV xLV",
    "third ventricle": "3V",
    "fourth ventricle": "4V Aq cec",
    "thalamus": "THM ANC LD MD Re LP Pul VA VL VPL VPM DLG MG CM Pf HN Pin MiN",
    "brainstem": "ZI PTR MTg SC IC cpd scp PnBa PnTg MoPy MoTg IO icp mcp",
    "cerebellar cortex": "CBV CBPV CBL",
    "cerebellar white matter": f"HWM {_CEREBELLAR_NUCLEI}",
    "hippocampus and amygdala": "AMY AAA CEN La BL BM CoA CoP Me AHA HiH HiB HiT",
    "accumbens, basal forebrain, hypothalamus, claustrum": "NAC Cla BF SEP BNST HTH HTHpo HTHso HTHtub HTHma PuPV",
    "corpus callosum": "cc",
    "caudate tail": "CaT",
}
"""Tissue → symbols; what is named nowhere is cortex."""

_AIR = "Air"

_TISSUE = {name: number for number, name in TISSUES.items()}

_LAMINA_MM = 2.0
"""Radius of the ball that closes the laminae between putamen and pallidum."""

_NIGRA_PROBABILITY = 0.4

_LIVING = 1.3
"""The template's head is this much larger than a living one, in volume."""

LITERATURE_MM3 = {"GP": 1700.0, "SN": 500.0}
"""Volumes a side in living heads, for nuclei that the atlas draws smaller than raters of susceptibility maps do."""

_EDGE_MM = 0.5
"""SD of the blur whose level sets a nucleus grows along."""

_BRAIN_LEVEL = 20 / 255
"""Of the brightest voxel: what is above it in the T1w image, or in the mask, is brain."""

_FASTIGIAL_PERCENT, _INTERPOSED_PERCENT = 3, 15

_SLOPE = 0.55
"""Height against distance from the middle, by which the cerebellar nuclei are told apart."""

_LATERAL_MM, _DOWN_AND_BACK_MM = 1.5, (-3.5, -2.5)
"""Shift of dentate and fastigial away from the middle, and of all three in y and z: the atlas has them too high."""


def write_template(allen: Path, midbrain: Path, mask: Path, out: Path) -> Iterator[str]:
    """Build the label template from files, write it and a table of its labels (``OUT`` with ``.tsv``).

    Parameters
    ----------
    allen : path
        Allen atlas, values 0 to 141, with a JSON file of the same name whose ``labels`` are the symbols by value.
    midbrain : path
        Probabilities of CIT168 on the Allen atlas's space, 4D, 0 to 1 or 0 to 255, with a TSV file of the same name
        (columns ``volume``, ``name``); those whose name ends in SNc or SNr are taken.
    mask : path
        T1w image without skull, or brain mask, of ICBM152 2009 symmetric.
    out : path
        NIfTI file to write.

    Yields
    ------
    str
        A line on each label.

    Raises
    ------
    InputError
        If a file is missing, cannot be read, or lacks a structure.
    """
    atlas, symbols = Volume.read(allen, np.float32), read_symbols(allen)
    labels = build_template(atlas, symbols, read_nigra(midbrain), Volume.read(mask))
    image = nib.Nifti1Image(labels.array, labels.affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(out)
    rows = _count(labels)
    write_tsv(_beside(out, ".tsv"), rows)
    yield from ("  ".join(str(value) for value in row.values()) for row in rows)


def build_template(
    atlas: Volume,
    symbols: Sequence[str],
    nigra: Volume,
    head: Volume,
    *,
    living_mm3: Mapping[str, float] = LITERATURE_MM3,
) -> Volume:
    """Build the label template.

    Nuclei are those of the Allen atlas, with these differences: the laminae between putamen and pallidum are given to
    the pallidum (ball of 2 mm); the nigra is joined with CIT168's where that has more than 0.4; pallidum and nigra grow
    into white matter and brainstem to the volumes that raters of susceptibility maps draw; the cerebellar nuclei,
    one structure in the atlas, are divided by a rule of geometry and moved to where they lie on susceptibility maps;
    the caudate's tail is a tissue, since protocols leave it out. What is brain, but not in the atlas, is cerebrospinal
    fluid.

    Parameters
    ----------
    atlas : Volume
        Allen atlas, values that number `symbols`.
    symbols : sequence of str
        Symbols of the structures; 0 is ``Air``.
    nigra : Volume
        Probability of the substantia nigra, both sides, on any grid.
    head : Volume
        Bright in the brain, 0 outside, on any grid.
    living_mm3 : mapping of str to float
        Nuclei that grow and the volume a side that they have then in a living head.

    Returns
    -------
    Volume
        uint8 on the atlas's grid: nuclei as structures.tsv, tissues as `susceptibility.TISSUES`.

    Raises
    ------
    InputError
        If the atlas lacks a structure.
    """
    left = _left_of_the_middle(atlas)
    labels = _translate(atlas, symbols, left)
    grid = Grid(atlas.shape, atlas.affine)
    labels[(labels == 0) & (resample(head, grid).array > _BRAIN_LEVEL * head.array.max())] = _TISSUE[
        "cerebrospinal fluid"
    ]
    _close_laminae(labels, left, step_mm=atlas.voxel_size_mm[0])
    likely = resample(nigra, grid).array > _NIGRA_PROBABILITY
    _paint(labels, likely & (labels == _TISSUE["brainstem"]), "SN", left)
    for nucleus, volume_mm3 in living_mm3.items():
        for structure in STRUCTURES.both_sides([nucleus]):
            _grow(atlas.with_array(labels), structure.index, _LIVING * volume_mm3)
    _place_cerebellar_nuclei(labels, atlas.with_array(atlas.array == symbols.index(_CEREBELLAR_NUCLEI)))
    return atlas.with_array(labels)


def read_symbols(allen: Path) -> list[str]:
    """Read the structures' symbols from the JSON file beside the Allen atlas.

    Raises
    ------
    InputError
        If there is none, or it has no list ``labels``.
    """
    path = _beside(allen, ".json")
    try:
        symbols = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except OSError:
        raise InputError(f"{allen.name}: no {path.name} beside it; it must list the structures by number") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path.name}: has no list "labels"; it must list the structures by number') from None
    return [str(symbol) for symbol in symbols]


def read_nigra(midbrain: Path) -> Volume:
    """Add the probabilities of the nigra's parts, 0 to 1, both sides.

    Raises
    ------
    InputError
        If the file is not 4D or its table names no SNc and SNr.
    """
    image, path = nib.as_closest_canonical(load_image(midbrain)), _beside(midbrain, ".tsv")
    if len(image.shape) != 4:
        raise InputError(f"{midbrain.name}: has {len(image.shape)} dimensions, expected 4, one volume a structure")
    if not path.is_file():
        raise InputError(f"{midbrain.name}: no {path.name} beside it; it must name the volumes (columns volume, name)")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    volumes = [int(row["volume"]) for row in rows if (row.get("name") or "").endswith(("SNc", "SNr"))]
    if not volumes:
        raise InputError(f"{path.name}: names no SNc and SNr; give the volumes of the substantia nigra")
    total = np.zeros(image.shape[:3], np.float32)
    for volume in volumes:
        total += image.dataobj[..., volume]
    return Volume(total / np.float32(255 if total.max() > 2 else 1), image.affine)


def _beside(path: Path, extension: str) -> Path:
    """Name the file that belongs to a NIfTI file."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + extension)


def _left_of_the_middle(atlas: Volume) -> NDArray[np.bool_]:
    """Tell which slices (X, 1, 1) lie left of the middle."""
    x_mm = np.arange(atlas.shape[0]) * atlas.affine[0, 0] + atlas.affine[0, 3]
    left: NDArray[np.bool_] = (x_mm < 0)[:, None, None]
    return left


def _translate(atlas: Volume, symbols: Sequence[str], left: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Give each structure of the atlas the number it has here."""
    groups = {**_NUCLEI, **_TISSUES}
    missing = {symbol for group in (_AIR, *groups.values()) for symbol in group.split()} - set(symbols)
    if missing:
        raise InputError(
            f"Allen atlas: no structure {', '.join(sorted(missing))} among its labels; give the 3D atlas of 2020"
        )
    if atlas.array.min() < 0 or atlas.array.max() >= len(symbols):
        raise InputError(
            f"Allen atlas: has values up to {atlas.array.max():g} for {len(symbols)} labels; give the "
            "image whose values number the labels"
        )
    table = np.full((2, len(symbols)), _TISSUE["cortex"], np.uint8)
    table[:, symbols.index(_AIR)] = 0
    for name, group in groups.items():
        numbers = [row.index for row in STRUCTURES.both_sides([name])] if name in _NUCLEI else [_TISSUE[name]] * 2
        for symbol in group.split():
            table[:, symbols.index(symbol)] = numbers
    values = atlas.array.astype(np.uint16)
    labels: NDArray[np.uint8] = np.where(left, table[0][values], table[1][values])
    return labels


def _paint(labels: NDArray[np.uint8], mask: NDArray[np.bool_], nucleus: str, left: NDArray[np.bool_]) -> None:
    """Give a mask to a nucleus, each side its own, in place."""
    for structure, side in zip(STRUCTURES.both_sides([nucleus]), (left, ~left), strict=True):
        labels[mask & side] = structure.index


def _close_laminae(labels: NDArray[np.uint8], left: NDArray[np.bool_], *, step_mm: float) -> None:
    """Give the thin white layers in the pallidum, and between it and the putamen, to the pallidum; in place."""
    putamen, pallidum = (np.isin(labels, [row.index for row in STRUCTURES.both_sides([n])]) for n in ("PUT", "GP"))
    place = _around(putamen | pallidum, margin=int(np.ceil(2 * _LAMINA_MM / step_mm)))
    if place is None:
        return
    block, putamen, pallidum = labels[place], putamen[place], pallidum[place]
    edges_mm = (step_mm,) * 3
    closed = close_with_ball(pallidum, _LAMINA_MM, edges_mm)
    near = ndimage.binary_dilation(closed, iterations=max(1, round(1 / step_mm)))
    gaps = close_with_ball(putamen | pallidum, _LAMINA_MM, edges_mm) & near
    _paint(block, gaps & (block == _TISSUE["white matter"]), "GP", left[place[0]])


def _grow(labels: Volume, number: int, volume_mm3: float) -> None:
    """Let a nucleus grow evenly into white matter and brainstem to a volume, in place; a larger one stays."""
    nucleus = labels.array == number
    missing = round(volume_mm3 / float(np.prod(labels.voxel_size_mm))) - np.count_nonzero(nucleus)
    place = _around(nucleus, margin=8)
    if missing <= 0 or place is None:
        return
    block = labels.array[place]
    free = np.isin(block, [_TISSUE["white matter"], _TISSUE["brainstem"]])
    nearness = ndimage.gaussian_filter(nucleus[place].astype(np.float32), np.divide(_EDGE_MM, labels.voxel_size_mm))
    order = np.argsort(np.where(free, nearness, 0), axis=None, kind="stable")[::-1]
    block[np.unravel_index(order[: min(missing, np.count_nonzero(free & (nearness > 0)))], block.shape)] = number


def _around(mask: NDArray[np.bool_], *, margin: int) -> tuple[slice, slice, slice] | None:
    """Give the block that holds a mask, with a margin in voxels; None where the mask is empty."""
    (place,) = ndimage.find_objects(mask.astype(np.uint8)) or (None,)
    if place is None:
        return None
    x, y, z = (slice(max(0, along.start - margin), along.stop + margin) for along in place)
    return x, y, z


def _place_cerebellar_nuclei(labels: NDArray[np.uint8], nuclei: Volume) -> None:
    """Divide the cerebellar nuclei into fastigial, interposed and dentate and move them, in place.

    Medial and high is fastigial, lateral and low is dentate.
    """
    voxels = np.argwhere(nuclei.array)
    points_mm = voxels @ nuclei.affine[:3, :3].T + nuclei.affine[:3, 3]
    height_mm = points_mm[:, 2] - points_mm[:, 2].mean()
    order = np.abs(points_mm[:, 0]) - _SLOPE * height_mm
    free = labels == _TISSUE["cerebellar white matter"]
    for sign, dentate, interposed in zip(
        (-1, 1), STRUCTURES.both_sides(["DN"]), STRUCTURES.both_sides(["IN"]), strict=True
    ):
        side = points_mm[:, 0] < 0 if sign < 0 else points_mm[:, 0] >= 0
        low, high = np.percentile(order[side], [_FASTIGIAL_PERCENT, _INTERPOSED_PERCENT])
        parts: Mapping[int, tuple[NDArray[np.bool_], float]] = {
            interposed.index: (side & (order >= low) & (order < high), 0.0),
            _TISSUE["fastigial nucleus"]: (side & (order < low), sign * _LATERAL_MM),
            dentate.index: (side & (order >= high), sign * _LATERAL_MM),
        }
        for number, (part, lateral_mm) in parts.items():
            shift = np.rint(np.divide((lateral_mm, *_DOWN_AND_BACK_MM), nuclei.voxel_size_mm)).astype(int)
            moved = np.clip(voxels[part] + shift, 0, np.subtract(labels.shape, 1))
            moved = moved[free[tuple(moved.T)]]
            labels[tuple(moved.T)] = number


def _count(labels: Volume) -> list[dict[str, object]]:
    names = {**{row.index: row.name for row in STRUCTURES}, **TISSUES}
    counts = np.bincount(labels.array.ravel(), minlength=max(names) + 1)
    voxel_mm3 = float(np.prod(labels.voxel_size_mm))
    return [
        {"index": number, "name": name, "volume_mm3": f"{counts[number] * voxel_mm3:.0f}"}
        for number, name in names.items()
    ]
