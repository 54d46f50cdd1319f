"""The label template: one labelled head, combined from public atlases.

Sources, none of which is part of this project:

- Allen Human Reference Atlas – 3D, 2020 (RRID:SCR_017764, CC BY 4.0), drawn on ICBM152 2009b symmetric, 0.5 mm:
  download.alleninstitute.org/informatics-archive/allen_human_reference_atlas_3d_2020/version_1, of which
  ``annotation_full.nii.gz`` (voxels contain ids of the ontology) and ``examples/voxel_count/voxel_count.csv`` (ids and
  acronyms); or the same image with structures numbered 0 (air) to 141 and a list of their acronyms, as packaged for
  viewers.
- CIT168 subcortical atlas (Pauli, Nili, Tyszka 2018, CC BY 4.0): osf.io/jkzwp, on ICBM152 2009c asymmetric.
- ICBM152 2009 symmetric (McConnell Brain Imaging Centre, MNI): nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009. Its
  skull-stripped T1w image is also installed with nilearn, in ``nilearn/datasets/data``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, box_of_mask, resample, world_grid
from bids_dgmseg.image.masks import close_with_ball
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import atomic_write, read_json, read_tsv, write_tsv
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.lab.simulate.anatomy import SECOND_PARTS, TISSUES
from bids_dgmseg.lab.simulate.template import NUCLEUS_NAMES, with_extension
from bids_dgmseg.models.structures import STRUCTURES

NUCLEUS_SYMBOLS = {"CN": "CaH CaB", "PUT": "Pu", "GP": "GPe GPi", "RN": "RN", "SN": "SN", "STN": "STH"}
"""Nucleus → symbols of the Allen atlas; DN and IN are parts of CbDN."""

_CEREBELLAR_NUCLEI = "CbDN"

TISSUE_SYMBOLS = {
    "white matter": "FWM ac fx mtt ot olt or",
    "lateral ventricle": "aLV bLV pLV iLV xLV",
    "third ventricle": "3V",
    "fourth ventricle": "4V Aq cec",
    "thalamus": "THM ANC LD MD Re LP Pul VA VL VPL VPM DLG MG CM Pf HN Pin MiN",
    "brainstem": "ZI PTR MTg SC IC cpd scp PnBa PnTg MoPy MoTg IO icp mcp",
    "cerebellar cortex": "CBV CBPV CBL",
    "cerebellar white matter": f"HWM {_CEREBELLAR_NUCLEI}",
    "hippocampus and amygdala": "AMY AAA CEN La BL BM CoA CoP Me AHA HiH HiB HiT",
    "accumbens": "NAC",
    "basal forebrain, hypothalamus, claustrum": "Cla BF SEP BNST HTH HTHpo HTHso HTHtub HTHma PuPV",
    "corpus callosum": "cc",
    "caudate tail": "CaT",
}
"""Tissue → symbols; all other structures are cortex."""

_PALLIDUM_PARTS = ("GPe", "GPi")
"""Symbols of the first and the second part of the pallidum."""

_NIGRA_PARTS = ("SNr", "SNc")
"""Ends of the names in CIT168 of the first and the second part of the nigra."""

_AIR = "Air"

_ONTOLOGY = "voxel_count.csv"
"""File of the Allen atlas with ids and acronyms of all structures."""

_TISSUE = {name: number for number, name in TISSUES.items()}

_LAMINA_MM = 2.0
"""Radius of the closing of the laminae between putamen and pallidum."""

_NIGRA_PROBABILITY = 0.4

_MNI_OVER_AVERAGE = 1.3
"""Volume of the MNI head relative to an average head."""

LITERATURE_MM3 = {"GP": 1700.0, "SN": 500.0}
"""Volumes per side in vivo, for nuclei that are smaller in the atlas than in segmentations of chi maps."""

_MIDBRAIN_MARGIN_MM = 25.0
"""Around the nigra, for registration."""

_FINEST_LEVEL = (1.0, 20)
"""Voxel size in mm and number of iterations."""

_RANKS = np.linspace(0, 1, 101)
"""Quantiles between which the ranks of intensities of a T1w image are interpolated."""

_EDGE_MM = 0.5
"""SD of the Gaussian along whose level sets a nucleus grows."""

_BRAIN_LEVEL = 20 / 255
"""Threshold of the T1w image or brain mask, as a fraction of its maximum."""

_FASTIGIAL_PERCENT, _INTERPOSED_PERCENT = 3, 15

_SLOPE = 0.55
"""Weight of height against distance from the midline, in dividing the cerebellar nuclei."""

_LATERAL_MM, _POSTERIOR_INFERIOR_MM = 1.5, (-3.5, -2.5)
"""Lateral shift of dentate and fastigial, and shift of all in y and z: they lie too high in the atlas."""


def write_labels(labels: Volume, path: Path, *, description: str = "") -> None:
    """Write the labels of a template (uint8); `description` goes into its header."""
    image = nib.Nifti1Image(labels.array, labels.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    with atomic_write(path) as temporary:
        image.to_filename(temporary)


def write_template(
    allen: Path, midbrain: Path, mask: Path, out: Path, *, midbrain_t1w: Path | None = None
) -> Iterator[str]:
    """Build the label template from files; write it and a table of its labels (``OUT`` with ``.tsv``).

    Parameters
    ----------
    allen : path
        Allen atlas, see `read_allen`.
    midbrain : path
        Probabilities of CIT168, 4D, 0 to 1 or 0 to 255, with a TSV file of the same name (columns ``volume``,
        ``name``); names ending in SNc or SNr are used.
    mask : path
        Skull-stripped T1w image or brain mask of ICBM152 2009 symmetric.
    out : path
        NIfTI file to write.
    midbrain_t1w : path or None
        Skull-stripped T1w image in the space of `midbrain`, by which it is registered to `mask`, which then has to be
        the T1w image; None if `midbrain` is in the space of the Allen atlas.

    Yields
    ------
    str
        One line per label.

    Raises
    ------
    InputError
        If a file is missing, unreadable or lacks a structure.
    """
    atlas, symbols = read_allen(allen)
    nigra, head = read_nigra(midbrain), Volume.read(mask)
    if midbrain_t1w is not None:
        if len(np.unique(head.array)) <= 2:
            raise InputError(f"{mask.name}: a mask; provide the T1w image of ICBM152 2009 symmetric without skull")
        nigra = align_nigra(nigra, Volume.read(midbrain_t1w), head)
    labels = build_template(atlas, symbols, nigra, head)
    write_labels(labels, out)
    names = {**NUCLEUS_NAMES, **TISSUES}
    volumes_mm3 = np.bincount(labels.array.ravel(), minlength=max(names) + 1) * float(np.prod(labels.voxel_size_mm))
    rows = [(number, name, f"{volumes_mm3[number]:.0f}") for number, name in names.items()]
    write_tsv(pd.DataFrame(rows, columns=["index", "name", "volume_mm3"]), with_extension(out, ".tsv"))
    yield from (f"{number}  {name}  {volume}" for number, name, volume in rows)


def build_template(
    atlas: Volume,
    symbols: Sequence[str],
    nigra: Mapping[str, Volume],
    head: Volume,
    *,
    volumes_mm3: Mapping[str, float] = LITERATURE_MM3,
) -> Volume:
    """Build the label template (uint8, on the grid of the atlas): nuclei, their second parts and `TISSUES`.

    Nuclei are those of the Allen atlas, whose values are indices of `symbols`, with the following changes. The laminae
    between putamen and pallidum belong to the pallidum (closing by 2 mm). The substantia nigra includes voxels where
    CIT168 has a probability above 0.4 (`nigra`: SNr and SNc, both sides). Pallidum and nigra grow into white matter and
    brainstem to the volumes of manual segmentations on chi maps (`volumes_mm3`, per side in vivo). The cerebellar
    nuclei, one structure in the atlas, are divided geometrically and shifted to their position on chi maps. The caudate
    tail is a tissue, since segmentation protocols exclude it. Each voxel of pallidum and nigra gets the label of the
    nearer part: external or internal pallidum of the atlas, pars reticulata or compacta of CIT168. Brain outside the
    atlas is cerebrospinal fluid; `head` is a skull-stripped T1w image or brain mask. `nigra` and `head` may have any
    grid.

    Raises
    ------
    InputError
        If the atlas lacks a structure.
    """
    x_mm = np.arange(atlas.shape[0]) * atlas.affine[0, 0] + atlas.affine[0, 3]
    left: NDArray[np.bool_] = (x_mm < 0)[:, None, None]
    labels = _relabel(atlas, symbols, left)
    grid = Grid(atlas.shape, atlas.affine)
    brain = resample(head, grid).array > _BRAIN_LEVEL * head.array.max()
    labels[(labels == 0) & brain] = _TISSUE["cerebrospinal fluid"]
    putamen, pallidum = (np.isin(labels, [row.index for row in STRUCTURES.both_sides([n])]) for n in ("PUT", "GP"))
    laminae, step_mm = np.zeros(labels.shape, bool), atlas.voxel_size_mm[0]
    block = bounding_block(putamen | pallidum, margin=int(np.ceil(2 * _LAMINA_MM / step_mm)))
    if block is not None:
        closed = close_with_ball(pallidum[block], _LAMINA_MM, (step_mm,) * 3)
        near = ndimage.binary_dilation(closed, iterations=max(1, round(1 / step_mm)))
        gaps = close_with_ball((putamen | pallidum)[block], _LAMINA_MM, (step_mm,) * 3) & near
        laminae[block] = gaps & (labels[block] == _TISSUE["white matter"])
    labels = _assign(labels, laminae, "GP", left)
    reticulata, compacta = (resample(nigra[part], grid).array for part in _NIGRA_PARTS)
    likely = reticulata + compacta > _NIGRA_PROBABILITY
    labels = _assign(labels, likely & (labels == _TISSUE["brainstem"]), "SN", left)
    for nucleus, volume_mm3 in volumes_mm3.items():
        for structure in STRUCTURES.both_sides([nucleus]):
            growth = find_growth(atlas.with_array(labels), structure.index, _MNI_OVER_AVERAGE * volume_mm3)
            labels = np.where(growth, structure.index, labels).astype(np.uint8)
    external, internal = (atlas.array == symbols.index(symbol) for symbol in _PALLIDUM_PARTS)
    labels = assign_second_parts(atlas.with_array(labels), "GP", external, internal)
    labels = assign_second_parts(
        atlas.with_array(labels), "SN", likely & (reticulata >= compacta), likely & (reticulata < compacta)
    )
    nuclei = atlas.with_array(atlas.array == symbols.index(_CEREBELLAR_NUCLEI))
    return atlas.with_array(_insert_cerebellar_nuclei(labels, nuclei))


def read_allen(path: Path) -> tuple[Volume, list[str]]:
    """Read the Allen atlas and the symbols of its structures.

    Parameters
    ----------
    path : path
        Atlas with a JSON file of the same name whose ``labels`` are the symbols by value, or as the Allen Institute
        distributes it: ids of the ontology, and ``voxel_count.csv`` (columns ``id``, ``acronym``) in the same folder.

    Returns
    -------
    Volume
        Indices of the symbols.
    list of str
        Symbols; the first is ``Air``.

    Raises
    ------
    InputError
        If a file is missing or unreadable, or the atlas has an id without a symbol.
    """
    listed, ontology = with_extension(path, ".json"), path.with_name(_ONTOLOGY)
    if listed.is_file():
        symbols = read_json(listed).get("labels")
        if not isinstance(symbols, list):
            raise InputError(f'{listed.name}: has no list "labels"; it must list the structures in order')
        return Volume.read(path, np.float32), [str(symbol) for symbol in symbols]
    if not ontology.is_file():
        raise InputError(
            f"{path.name}: neither {_ONTOLOGY} nor {listed.name} found next to it; the former is in the folder "
            "examples/voxel_count of the atlas"
        )
    table = read_tsv(ontology, sep=",", dtype=str)
    if not {"id", "acronym"} <= set(table.columns):
        raise InputError(f"{ontology.name}: has no columns id and acronym; use the file of the atlas")
    acronyms = {**dict(zip(table["id"], table["acronym"].astype(str), strict=True)), "0": _AIR}
    atlas = Volume.read(path, np.float64)  # ids may be too large for float32
    ids = np.union1d(0, atlas.array)
    numbers = [f"{value:.0f}" for value in ids]
    if unknown := [number for number in numbers if number not in acronyms]:
        raise InputError(
            f"{path.name}: {unknown[0]} is not an id in {ontology.name}; use annotation_full.nii.gz of the atlas"
        )
    indices = np.searchsorted(ids, atlas.array).astype(np.float32)
    return atlas.with_array(indices), [acronyms[number] for number in numbers]


def read_nigra(midbrain: Path) -> dict[str, Volume]:
    """Read the probabilities (0 to 1) of the parts of the substantia nigra, both sides together: SNr, SNc."""
    image, path = nib.as_closest_canonical(load_image(midbrain)), with_extension(midbrain, ".tsv")
    if len(image.shape) != 4:
        raise InputError(f"{midbrain.name}: has {len(image.shape)} dimensions, expected 4, one volume per structure")
    if not path.is_file():
        raise InputError(f"{midbrain.name}: {path.name} not found next to it; it must list the volumes (volume, name)")
    table = read_tsv(path)
    if not {"volume", "name"} <= set(table.columns):
        raise InputError(f"{path.name}: has no columns volume and name; list the volumes of {midbrain.name}")
    sums = {}
    for part in _NIGRA_PARTS:
        volumes = table.loc[table["name"].astype(str).str.endswith(part), "volume"].astype(int)
        if volumes.empty:
            raise InputError(f"{path.name}: does not list {part}; add the volumes of the substantia nigra")
        total = np.zeros(image.shape[:3], np.float32)
        for volume in volumes:
            total += image.dataobj[..., volume]
        sums[part] = total
    scale = np.float32(255 if max(total.max() for total in sums.values()) > 2 else 1)
    return {part: Volume(total / scale, image.affine) for part, total in sums.items()}


def align_nigra(nigra: Mapping[str, Volume], t1w: Volume, head: Volume) -> dict[str, Volume]:
    """Register the space of `nigra`, whose T1w image is `t1w`, to that of the T1w image `head`, and resample `nigra`.

    Both T1w images have no skull. Symmetric demons, see `bids_dgmseg.registration.align.deform`, around the
    midbrain.

    Raises
    ------
    InputError
        If there is no nigra in the image.
    """
    from bids_dgmseg.registration.align import LEVELS, RANGE_PPM, deform  # imports SimpleITK

    first = next(iter(nigra.values()))
    both = first.with_array(np.sum([part.array for part in nigra.values()], axis=0) > _NIGRA_PROBABILITY)
    if not both.array.any():
        raise InputError(f"CIT168: no nigra with a probability above {_NIGRA_PROBABILITY:g}; use its probabilities")
    box = box_of_mask(both).expanded(_MIDBRAIN_MARGIN_MM)
    fixed, moving = (image.with_array(RANGE_PPM[1] * _rank_in_brain(image.array)) for image in (head, t1w))
    warp = deform(fixed, moving, box, levels=(*LEVELS, _FINEST_LEVEL))
    warp = warp.on_grid(world_grid(box, both.voxel_size_mm))
    return {part: Volume(warp.sample(image), warp.grid.affine) for part, image in nigra.items()}


def _rank_in_brain(t1w: NDArray[np.floating]) -> NDArray[np.float32]:
    """Replace intensities of the brain by their ranks (0 to 1), since templates differ in contrast; 0 outside."""
    brain = t1w > _BRAIN_LEVEL * t1w.max()
    ranks = np.interp(t1w, np.quantile(t1w[brain], _RANKS), _RANKS)
    return np.where(brain, ranks, 0).astype(np.float32)


def _relabel(atlas: Volume, symbols: Sequence[str], left: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Map the structures of the atlas to labels of the template; `left` marks slices (X, 1, 1)."""
    groups = {**NUCLEUS_SYMBOLS, **TISSUE_SYMBOLS}
    missing = {symbol for group in (_AIR, *groups.values()) for symbol in group.split()} - set(symbols)
    if missing:
        raise InputError(
            f"Allen atlas: structures {', '.join(sorted(missing))} not found among its labels; use the 3D atlas of 2020"
        )
    if atlas.array.min() < 0 or atlas.array.max() >= len(symbols):
        raise InputError(
            f"Allen atlas: has values up to {atlas.array.max():g} for {len(symbols)} labels; use the image whose "
            "values are indices of the labels"
        )
    table = np.full((2, len(symbols)), _TISSUE["cortex"], np.uint8)
    table[:, symbols.index(_AIR)] = 0
    for name, group in groups.items():
        numbers = (
            [row.index for row in STRUCTURES.both_sides([name])] if name in NUCLEUS_SYMBOLS else [_TISSUE[name]] * 2
        )
        for symbol in group.split():
            table[:, symbols.index(symbol)] = numbers
    values = atlas.array.astype(np.uint16)
    labels: NDArray[np.uint8] = np.where(left, table[0][values], table[1][values])
    return labels


def _assign(
    labels: NDArray[np.uint8], mask: NDArray[np.bool_], nucleus: str, left: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Assign a mask to the left and right label of a nucleus."""
    sides = STRUCTURES.both_sides([nucleus])
    return np.where(mask, np.where(left, sides[0].index, sides[1].index), labels).astype(np.uint8)


def assign_second_parts(
    labels: Volume, nucleus: str, first: NDArray[np.bool_], second: NDArray[np.bool_], *, share: float | None = None
) -> NDArray[np.uint8]:
    """Give the voxels of a nucleus that are nearer to `second` than to `first` the label of its second part.

    With `share`, this fraction of the nucleus becomes its second part, the voxels for which this holds most.
    """
    array = labels.array.copy()
    if not (first.any() and second.any()):
        return array
    for structure in STRUCTURES.both_sides([nucleus]):
        block = bounding_block(array == structure.index, margin=8)
        if block is None:
            continue
        distances = [ndimage.distance_transform_edt(~part[block], labels.voxel_size_mm) for part in (first, second)]
        nucleus_here, farther = array[block] == structure.index, distances[1] - distances[0]
        limit = 0 if share is None else np.quantile(farther[nucleus_here], share)
        array[block][nucleus_here & (farther < limit)] = SECOND_PARTS[structure.index]
    return array


def find_growth(labels: Volume, number: int, volume_mm3: float) -> NDArray[np.bool_]:
    """Find the white matter and brainstem nearest to a nucleus that it needs to reach a volume."""
    nucleus, growth = labels.array == number, np.zeros(labels.shape, bool)
    missing = round(volume_mm3 / float(np.prod(labels.voxel_size_mm))) - np.count_nonzero(nucleus)
    block = bounding_block(nucleus, margin=8)
    if missing <= 0 or block is None:
        return growth
    free = np.isin(labels.array[block], [_TISSUE["white matter"], _TISSUE["brainstem"]])
    nearness = ndimage.gaussian_filter(nucleus[block].astype(np.float32), np.divide(_EDGE_MM, labels.voxel_size_mm))
    order = np.argsort(np.where(free, nearness, 0), axis=None, kind="stable")[::-1]
    nearest = order[: min(missing, np.count_nonzero(free & (nearness > 0)))]
    growth[block][np.unravel_index(nearest, free.shape)] = True
    return growth


def bounding_block(mask: NDArray[np.bool_], *, margin: int) -> tuple[slice, slice, slice] | None:
    """Return the bounding block of a mask with a margin in voxels; None if the mask is empty."""
    (block,) = ndimage.find_objects(mask.astype(np.uint8)) or (None,)
    if block is None:
        return None
    x, y, z = (slice(max(0, along.start - margin), along.stop + margin) for along in block)
    return x, y, z


def _insert_cerebellar_nuclei(labels: NDArray[np.uint8], nuclei: Volume) -> NDArray[np.uint8]:
    """Divide the cerebellar nuclei, shift them and insert them into the cerebellar white matter.

    The medial, superior part is the fastigial nucleus, the lateral, inferior part the dentate.
    """
    voxels = np.argwhere(nuclei.array)
    points_mm = voxels @ nuclei.affine[:3, :3].T + nuclei.affine[:3, 3]
    height_mm = points_mm[:, 2] - points_mm[:, 2].mean()
    order = np.abs(points_mm[:, 0]) - _SLOPE * height_mm
    free, labels = labels == _TISSUE["cerebellar white matter"], labels.copy()
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
            shift = np.rint(np.divide((lateral_mm, *_POSTERIOR_INFERIOR_MM), nuclei.voxel_size_mm)).astype(int)
            shifted = np.clip(voxels[part] + shift, 0, np.subtract(labels.shape, 1))
            labels[tuple(shifted[free[tuple(shifted.T)]].T)] = number
    return labels
