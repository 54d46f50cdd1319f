"""Regions of the head: the box of the nuclei, by networks of this package or atlases; brain, ventricles and sides."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
import torch
from nibabel.affines import apply_affine
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import (
    MAX_ROTATION_DEG,
    Box,
    Grid,
    axis_directions,
    block_affine,
    box_of_mask,
    check_grid,
    covering_block,
    integer_ratio,
    max_axis_angle_deg,
    resample,
    shape_to_cover,
    world_grid,
)
from bids_dgmseg.image.masks import (
    faces_that_cut,
    is_valid,
    large_components,
    outside_field_of_view,
    valid_box,
    without_separated_blocks,
)
from bids_dgmseg.image.volume import Volume, read_labels
from bids_dgmseg.io.files import atomic_write, write_bytes
from bids_dgmseg.io.nifti import image_like, load_image
from bids_dgmseg.models.model_folder import atlas_files, load_weights, localizer_network, segmenter_network
from bids_dgmseg.models.registry import BRAIN_MASK, MODELS, Model, ModelInput, get_model
from bids_dgmseg.registration.midplane import MIN_BRAIN_MM3, Midplane
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, forward_batch
from bids_dgmseg.segmentation.predict import InferenceOptions, Location

if TYPE_CHECKING:
    from bids_dgmseg.registration.align import Atlas, Head

_Record = TypeVar("_Record")

_MIN_PITCH_DEG = 12.0
"""Networks tolerate less; from here on the benefit of an upright grid exceeds the harm of interpolation."""

_MAX_OBLIQUITY_DEG = 30.0
"""Slices tilted by less follow the head; beyond, they follow something else."""

_MAX_PITCH_DEG = 50.0
"""No head is tilted farther in a scanner: beyond, the cerebellum was not found where it is."""

_CEREBELLUM_DEG = 31.3
"""Angle below the horizontal at which the centre of the cerebellum lies, seen from that of the nuclei, in the label
template."""

_MIN_CEREBELLUM_RATIO = 4.0
"""Volume of the cerebellum, relative to the nuclei, below which it is cut off; a whole one has a ratio of 5."""

_BELOW_MM, _BEHIND_MM = 20.0, 30.0
"""Extent of the dentate nuclei below and behind the other nuclei."""

_CORNER = 1 / 16
"""Edge length of the corners of a map, which are outside any head, relative to the map."""


def find_cerebellum(chi: Volume, *, device: str = "cpu") -> NDArray[np.bool_]:
    """Find the cerebellum in a finite map in ppm with the localizer of the default model.

    The mask (X, Y, Z) on the grid of the map is empty if there is none.
    """
    model = get_model("default")
    labels = find_regions(clip_and_remove_small_components(chi), device=device)
    grid = Grid(chi.shape, chi.affine)
    regions = resample_regions(
        labels, grid, names=model.localizer.labels, valid=is_valid(chi.array), regions=["cerebellum"]
    )
    return large_components(regions["cerebellum"])


def find_regions(chi: Volume, *, device: str = "cpu") -> Volume:
    """Label the head regions of a finite map in ppm, on a coarse grid, with the localizer of the default model."""
    return _label_head(chi, get_model("default"), InferenceOptions(device=device))


def cerebellar_nuclei_mm(regions: Volume) -> NDArray[np.float64]:
    """Return the centres (N, 3), RAS+ mm, of the voxels of cerebellar nuclei in the result of `find_regions`."""
    return apply_affine(regions.affine, np.argwhere(_region(regions, get_model("default"), "cerebellar_nuclei")))


def run_localizer(chi: Volume, model: Model, options: InferenceOptions) -> Location:
    """Find the box that contains the nuclei of a model with networks of this package.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 (or noise) outside the brain.
    model : Model
        As it is run: with what its folder states, or in training with the patch that is being trained.
    options : InferenceOptions
        Weights and device.

    Raises
    ------
    InputError
        If the map shows no head.
    """
    localizer = model.localizer
    if localizer.kind == "centre" and not localizer.guard:
        return Location(_centre_box(chi, model.input))
    # In a few voxels among zeros, a network labels a whole head, and a registration puts one there.
    check_brain_size(chi)
    if localizer.kind == "network":
        labels = _label_head(chi, model, options)
        return Location(_box_of_nuclei(labels, chi, model), labels, regions=labels)
    guard = MODELS[localizer.guard] if localizer.guard else None
    regions = _label_head(chi, guard, replace(options, weights=None)) if guard else None
    plane = None
    if localizer.kind == "centre":
        box = _centre_box(chi, model.input)
    else:
        from bids_dgmseg.registration.align import Head  # with SimpleITK

        head = Head(chi, regions)
        box = find_by_atlas(head, read_atlases(model, options), model, axes=enclosing_axes(chi, model.input))
        plane = head.plane if regions else None  # without regions it may be wrong
    if guard and regions:  # shift the box as little as necessary so that it cuts no nucleus of the model
        cerebellar = {structure.nucleus for structure in model.structures} <= CEREBELLAR_NUCLEI
        nuclei = _region(regions, guard, "cerebellar_nuclei") if cerebellar else _upper_nuclei(regions, guard)
        if nuclei.any():
            nuclei_box = box_of_mask(regions.with_array(nuclei)).expanded(localizer.margin_mm)
            box = box.shifted_to_cover(nuclei_box, grow=model.input.zero_padding)
    return Location(box, plane=plane, regions=regions)


def read_atlases(model: Model, options: InferenceOptions) -> list[Atlas]:
    """Read the atlases of a model folder; see `bids_dgmseg.models.model_folder.atlas_files`."""
    from bids_dgmseg.registration.align import Atlas  # with SimpleITK

    atlases = []
    for path, labels in atlas_files(model, options.weights, folds=options.folds):
        chi = Volume.read(path)
        chi = chi.with_array(np.nan_to_num(chi.array, copy=False, nan=0.0, posinf=0.0, neginf=0.0))
        atlases.append(Atlas(path.name.removesuffix("_Chimap.nii.gz"), chi, read_labels(labels)))
    return atlases


def find_by_atlas(head: Head, atlases: list[Atlas], model: Model, *, axes: NDArray[np.float64] | None = None) -> Box:
    """Find the box of the nuclei, along `axes` (unit vectors in columns) if given, by registering the best atlas.

    All are registered rigidly; the one with the largest mutual information is then registered affinely. The box
    contains all voxels of the model's nuclei with its margin, and is at least as large as its patch unless that is
    padded with zeros.

    Raises
    ------
    InputError
        If the map is 0 everywhere or an atlas has no nucleus of the model.
    """
    from bids_dgmseg.registration.align import align_affinely, align_rigidly  # with SimpleITK

    numbers, masks = [structure.index for structure in model.structures], []
    for atlas in atlases:
        masks.append(atlas.labels.with_array(np.isin(atlas.labels.array, numbers)))
        if not masks[-1].array.any():
            raise InputError(f"{atlas.name}_dseg.nii.gz: no {model.labels[0]} found; correct the labels of the atlas")
    rigid = [align_rigidly(head, atlas) for atlas in atlases]
    best = max(range(len(atlases)), key=lambda index: rigid[index].similarity)
    to_map = align_affinely(head, atlases[best], rigid[best]).to_map
    aligned = Volume(masks[best].array, to_map @ masks[best].affine)
    box = box_of_mask(aligned, axes=axes).expanded(model.localizer.margin_mm)
    return box if model.input.zero_padding else box.at_least(model.input.patch_mm)


def _centre_box(chi: Volume, network_input: ModelInput) -> Box:
    """Return a box of the size of a patch in the middle of the head, along oblique slices that are not resampled."""
    centre_mm, axes = np.array(valid_box(chi).centre_mm), _oblique_axes(chi, network_input)
    return Box.centred(centre_mm, network_input.patch_mm, axes)


def enclosing_axes(chi: Volume, network_input: ModelInput) -> NDArray[np.float64] | None:
    """Return the axes along which a box encloses nuclei, see `box_of_mask`.

    Those of oblique slices if a network sees their voxels unresampled, or else, if it pads with zeros, the world's.
    """
    oblique = _oblique_axes(chi, network_input)
    return np.eye(3) if oblique is None and network_input.zero_padding else oblique


def _oblique_axes(chi: Volume, network_input: ModelInput) -> NDArray[np.float64] | None:
    """Return the axes (unit vectors in columns) of oblique slices if a network sees their voxels unresampled."""
    axes, tolerance = axis_directions(chi.affine), network_input.native_voxel_tolerance
    orthogonal = np.allclose(axes.T @ axes, np.eye(3), atol=1e-3)
    oblique = MAX_ROTATION_DEG < max_axis_angle_deg(axes) < _MAX_OBLIQUITY_DEG
    native = tolerance and integer_ratio(network_input.spacing_mm, chi.voxel_size_mm, tolerance)[1].any()
    return axes if orthogonal and oblique and native else None


def check_brain_size(chi: Volume) -> None:
    """Raise `InputError` if a map has too few valid voxels for a head."""
    _check_volume(is_valid(chi.array), chi)


def _check_volume(brain: NDArray[np.bool_], grid: Volume) -> None:
    brain_mm3 = np.count_nonzero(brain) * np.prod(grid.voxel_size_mm)
    if brain_mm3 < MIN_BRAIN_MM3:
        raise InputError(f"no brain found ({brain_mm3 / 1000:.0f} mL); check that the map shows a head, in ppm")


def _label_head(chi: Volume, model: Model, options: InferenceOptions) -> Volume:
    """Label the regions of the head on the coarse grid of the localizer."""
    network_input = model.localizer.input
    if network_input is None:
        raise ValueError(f"{model.name}: its localizer {model.localizer.kind!r} has no network")
    coarse_grid = world_grid(_centre_box(chi, network_input), network_input.spacing_mm)
    coarse = resample(chi, coarse_grid, antialias=True)
    ends = [np.minimum(np.arange(size), np.arange(size)[::-1]) < max(_CORNER * size, 1) for size in chi.shape]
    corners = chi.with_array((ends[0][:, None, None] & ends[1][:, None] & ends[2]).astype(np.uint8))
    if is_valid(chi.array[corners.array > 0]).mean() >= 0.9:
        # The map has noise around the head: fill the grid beyond the map with noise too, or the network takes the
        # edge of the noise for the surface of the head.
        beyond = resample(chi.with_array(np.ones(chi.shape, np.float32)), coarse_grid).array < 0.5
        around, seen = coarse, resample(corners, coarse_grid, order=0).array > 0
        if not seen.any():  # the map is longer than the grid along some axis
            wide = world_grid(box_of_mask(chi.with_array(np.ones(chi.shape, bool))), network_input.spacing_mm)
            around, seen = resample(chi, wide, antialias=True), resample(corners, wide, order=0).array > 0
        noise = np.random.default_rng(0).normal(0, around.array[seen].std(), coarse.shape).astype(np.float32)
        coarse = coarse.with_array(np.where(beyond, noise, coarse.array))
    network = load_weights(localizer_network(model), model, "localizer", options.weights)
    values = NORMALIZATIONS[network_input.normalization](coarse.array)[None, None]
    logits = forward_batch(network, values, options.device)[0]
    regions = logits.max(dim=0).indices  # argmax takes 50 times as long on CPUs
    return coarse.with_array(regions.to(torch.uint8).cpu().numpy())


def _box_of_nuclei(labels: Volume, chi: Volume, model: Model) -> Box:
    """Center the patch of the segmentation network on the nuclei.

    It includes the usual position of the dentate nuclei if the map does not show them.
    """
    masks = (
        _upper_nuclei(labels, model),
        _region(labels, model, "cerebellar_nuclei"),
        _region(labels, model, "cerebellum"),
    )
    upper, lower, cerebellum = (apply_affine(labels.affine, np.argwhere(mask)) for mask in masks)
    axes = _choose_axes(upper, cerebellum, chi, model)
    # Voxels extend half a voxel beyond their centres.
    corners, half_mm = [points @ axes for points in (upper, lower) if len(points)], max(labels.voxel_size_mm) / 2
    low = np.min([points.min(axis=0) for points in corners], axis=0) - half_mm
    high = np.max([points.max(axis=0) for points in corners], axis=0) + half_mm
    if not len(lower):
        low -= (0, _BEHIND_MM, _BELOW_MM)
    size = np.maximum(high - low + 2 * model.localizer.margin_mm, model.input.patch_mm)
    # Limited, because a failed localization must not make the box, and with it time and memory, arbitrarily large.
    x, y, z = np.minimum(size, 1.25 * np.asarray(model.input.patch_mm)).tolist()
    centre_mm = axes @ ((low + high) / 2)
    return Box.centred(centre_mm, (x, y, z), axes)


def _choose_axes(
    nuclei_mm: NDArray[np.float64], cerebellum_mm: NDArray[np.float64], chi: Volume, model: Model
) -> NDArray[np.float64]:
    """Choose axes (unit vectors, one per column) in which the head is hardly tilted.

    Those of oblique slices if the network sees their voxels unresampled, the world, or else those of the head, whose
    pitch follows from the position of the cerebellum.
    """
    oblique = _oblique_axes(chi, model.input)
    choices = [np.eye(3)] if oblique is None else [oblique, np.eye(3)]
    cut_off = len(cerebellum_mm) < _MIN_CEREBELLUM_RATIO * len(nuclei_mm)
    for axes in choices:
        if cut_off:
            return axes
        _, back, down = (nuclei_mm @ axes).mean(axis=0) - (cerebellum_mm @ axes).mean(axis=0)
        pitch_deg = float(np.rad2deg(np.arctan2(down, back))) - _CEREBELLUM_DEG
        if abs(pitch_deg) <= _MIN_PITCH_DEG or abs(pitch_deg) >= _MAX_PITCH_DEG:
            return axes
    return Rotation.from_euler("x", pitch_deg, degrees=True).as_matrix()


def _upper_nuclei(labels: Volume, model: Model) -> NDArray[np.bool_]:
    """Return the mask of the nuclei above the cerebellum; every head shows some of them."""
    _check_volume(labels.array > 0, labels)
    upper = _region(labels, model, "nuclei")
    if not upper.any():
        raise InputError("no deep nuclei found in the brain; check units, orientation and field of view of the map")
    return upper


def _region(labels: Volume, model: Model, name: str) -> NDArray[np.bool_]:
    """Return the mask of a head region without components smaller than a fifth of the largest."""
    return large_components(labels.array == model.localizer.labels.index(name) + 1, 0.2, over_corners=True)


_LARGEST_PPM = 5.0
"""Upper limit of |chi|; bone, calcifications and hemorrhages stay below it."""

REGIONS: Mapping[str, tuple[str, ...]] = {
    "brain": ("brain", "cerebellum", "ventricles", "nuclei", "cerebellar_nuclei"),
    "cerebellum": ("cerebellum", "cerebellar_nuclei"),
    "ventricles": ("ventricles",),
}
"""Region → the localizer's labels that form it, the required one first; ``ventricles`` are the lateral ventricles."""

CEREBELLAR_NUCLEI = frozenset({"DN", "IN"})
"""Nuclei of the localizer's label ``cerebellar_nuclei``."""


def clip_and_remove_small_components(chi: Volume) -> Volume:
    """Set small separate components to 0 and clip the map to ±5 ppm.

    A single voxel of extreme susceptibility changes what a network predicts far inside the head.
    """
    valid = is_valid(chi.array)
    if (small := valid & ~without_separated_blocks(valid)).any():
        chi = chi.with_array(np.where(small, np.float32(0), chi.array))
    low, high = float(chi.array.min()), float(chi.array.max())
    if -_LARGEST_PPM <= low and high <= _LARGEST_PPM:
        return chi
    return chi.with_array(np.clip(chi.array, -_LARGEST_PPM, _LARGEST_PPM))


def resample_regions(
    labels: Volume,
    grid: Grid,
    *,
    names: Sequence[str],
    valid: NDArray[np.bool_],
    regions: Collection[str] = tuple(REGIONS),
) -> dict[str, NDArray[np.bool_]]:
    """Resample head regions to the grid of a map.

    Parameters
    ----------
    labels : Volume
        Result of the whole-head network, usually on a coarser grid: numbers from 1 in the order of `names`.
    grid : Grid
        Grid of the map.
    names : sequence of str
        ``localizer.labels`` of the model.
    valid : ndarray of bool, shape of `grid`
        Valid voxels of the map; regions are limited to them.
    regions : collection of str
        Which of `REGIONS`.

    Returns
    -------
    dict
        Region → mask of shape `grid`, for each of `regions` whose first label the model has.

    Notes
    -----
    The mask of each region is interpolated linearly and thresholded at one half: the boundary is smooth between the
    coarse voxels, where nearest-neighbour interpolation would leave steps.
    """
    masks = {}
    for region, parts in REGIONS.items():
        if region not in regions or parts[0] not in names:
            continue
        masks[region] = np.zeros(grid.shape, bool)
        mask = np.isin(labels.array, [names.index(part) + 1 for part in parts if part in names])
        if mask.any():
            box = box_of_mask(labels.with_array(mask)).expanded(max(labels.voxel_size_mm))
            x, y, z = block = covering_block(grid, box)
            shape = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
            fine = Grid(shape, block_affine(grid.affine, block))
            fraction = resample(labels.with_array(mask.astype(np.float32)), fine)
            masks[region][block] = (fraction.array > 0.5) & valid[block]
    return masks


_MIDLINE_MM = 5.0
"""The midplane is found to within about 2 mm, and brains are not exactly symmetric; dentate nuclei lie further out."""


def clear_other_side(
    probabilities: NDArray[np.float32], grid: Grid, model: Model, plane: Midplane
) -> NDArray[np.float32]:
    """Assign to the background what nuclei have more than 5 mm beyond the midplane, on the other side.

    Takes and returns probabilities (1 + labels, X, Y, Z) on a grid, background first. Networks for labels with sides
    may confuse the sides far from the nuclei, in a patch that can be larger than the nucleus itself.
    """
    distance_mm = plane.distance_mm(grid.centres_mm())
    side = {"L": distance_mm < _MIDLINE_MM, "R": distance_mm > -_MIDLINE_MM}
    nuclei = probabilities[1:] * np.stack([side[structure.hemisphere] for structure in model.structures])
    return np.concatenate([1 - nuclei.sum(axis=0, keepdims=True), nuclei])


_BRAIN_ML = (900.0, 1900.0)
"""Plausible volumes: adults have 1,000 to 1,700 ml, sulci and ventricles included."""

_BRIDGE_MM, _REGROWTH_MM = 9.0, 1.5
"""Half-width of bridges from the brain to eyes and neck, which are cut; the core grows back by this much more."""

_ROUNDING_MM = 1e-3
"""Voxel sizes differ by less from those that were set; 9 mm are a whole number of many."""

_SCALP_MM, _TISSUE, _MAX_BARE = 20.0, 0.15, 0.25
"""There is scalp this near the brain; signal of tissue relative to the brain's; largest fraction of the mask's surface
without scalp."""


def find_brain(magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Find the brain in a magnitude with the network ``brain-mask``.

    Parameters
    ----------
    magnitude : ndarray of shape (X, Y, Z)
        Signal in any unit, in RAS+ axes; voxels that are not finite count as 0.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)
        Brain with its sulci and ventricles: one component without holes; empty if there is none.

    Notes
    -----
    The network sees the field of view with voxels of 3 mm along the axes of the image. Its probabilities are
    interpolated linearly to the voxels of the image. The mask is where they exceed 0.5, after an opening by 9 mm.
    """
    finite = np.where(np.isfinite(magnitude), magnitude, 0).astype(np.float32)
    volume = Volume(finite, np.diag([*voxel_size_mm, 1.0]))
    shown = BRAIN_MASK.input
    box = box_of_mask(volume.with_array(np.ones(volume.shape, bool)))
    sizes = (np.maximum(covered, least) for covered, least in zip(box.size_mm, shown.patch_mm, strict=True))
    grid = world_grid(box, shown.spacing_mm, shape_to_cover(tuple(sizes), shown.spacing_mm))
    coarse = resample(volume, grid, antialias=True)
    values = NORMALIZATIONS[shown.normalization](coarse.array)[None, None]
    network = load_weights(segmenter_network(BRAIN_MASK), BRAIN_MASK, BRAIN_MASK.name, None)
    probability = forward_batch(network, values, "cpu")[0].softmax(dim=0)[1].cpu().numpy()
    fine = resample(coarse.with_array(probability), Grid(volume.shape, volume.affine)).array
    brain = (fine > 0.5) & ~outside_field_of_view(finite > 0)
    depth_mm = ndimage.distance_transform_edt(brain, sampling=voxel_size_mm)
    core = large_components(depth_mm > _BRIDGE_MM + _ROUNDING_MM)
    if not core.any():
        return core
    near = ndimage.distance_transform_edt(~core, sampling=voxel_size_mm) <= _BRIDGE_MM + _REGROWTH_MM
    return np.asarray(ndimage.binary_fill_holes(large_components(brain & near)), bool)


def find_mask_problems(
    mask: NDArray[np.bool_], magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float]
) -> Iterator[str]:
    """Yield the reasons why a mask is not that of a brain: its volume, and missing scalp around it.

    A mask that a face of the image cuts (a slab) may be small. After skull stripping there need be no scalp. All arrays
    have shape (X, Y, Z).
    """
    volume_ml, (low, high) = float(mask.sum() * math.prod(voxel_size_mm) / 1e3), _BRAIN_ML
    if volume_ml > high or (volume_ml < low and not faces_that_cut(mask).any()):
        what = "scalp or neck included" if volume_ml > high else "parts of the brain missing"
        yield f"its brain mask has {volume_ml:,.0f} ml ({what}?), expected {low:,.0f} to {high:,.0f} ml"
    outside = np.zeros_like(mask)
    if mask.any():
        beyond = ~ndimage.binary_dilation(mask, np.ones((3, 3, 3)))
        outside = beyond & (magnitude > _TISSUE * np.median(magnitude[mask]))
    if outside.sum() < 0.1 * mask.sum():  # the skull has been stripped
        return
    surface = mask & ~ndimage.binary_erosion(mask, border_value=1)
    scalp_mm = ndimage.distance_transform_edt(~outside, sampling=voxel_size_mm)
    if (bare := float((scalp_mm[surface] > _SCALP_MM).mean())) > _MAX_BARE:
        yield f"{bare:.0%} of the surface of its brain mask lies at the skin, expected at most {_MAX_BARE:.0%}"


@dataclass(frozen=True)
class SharedSpace:
    """The mid-space of the sessions of a participant, for one of their maps."""

    to_map: NDArray[np.float64]
    """4×4, from the mid-space to the space of the map, RAS+ mm."""
    location: Location
    """Box and midplane in the mid-space, the same for all sessions."""
    correlations: Mapping[str, float] = field(default_factory=dict)
    """Name of each session → correlation of its map with the mean of the others."""
    volumes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Volumes of the nuclei in this session (`bids_dgmseg.measurement.nuclei.measure_session_volumes`)."""
    warnings: Sequence[str] = ()

    @classmethod
    def read(cls, path: Path) -> SharedSpace:
        """Read a mid-space; `InputError` if the file is another one."""
        return _decode(path.read_bytes(), cls, f"{path.name}: pass one of out_sessions of AlignSessions")

    def write(self, path: Path) -> Path:
        """Write the mid-space as JSON."""
        return write_bytes(_encode(self), path)


@dataclass(frozen=True)
class _Header:
    """JSON object in the header of the file of a `Localization`."""

    location: Location
    regions: Sequence[str]
    space: SharedSpace | None


@dataclass(frozen=True, kw_only=True)
class Localization:
    """Location of the nuclei and regions of the head in a map, in one file.

    The file is an image on the grid of the map, in which each region has a bit; a JSON object in its header has the
    names of the regions, box, midplane and mid-space.
    """

    location: Location
    regions: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Region of the head (``brain``, ``cerebellum``, ``ventricles``) → mask on the grid of the map."""
    space: SharedSpace | None = None
    """Mid-space of the sessions that are labelled together."""

    @classmethod
    def read(cls, path: Path, chi: Volume) -> Localization:
        """Read the localization of a map; `InputError` if the file is another one or on another grid."""
        text = b"".join(extension.get_content() for extension in load_image(path).header.extensions)
        header = _decode(text, _Header, f"{path.name}: pass out_location of LocalizeNuclei")
        bits = Volume.read(path, np.uint8)
        check_grid(path, bits, chi)
        regions = {name: ((bits.array >> bit) & 1).astype(bool) for bit, name in enumerate(header.regions)}
        return cls(location=header.location, regions=regions, space=header.space)

    def write(self, path: Path, chi: Volume, *, like: Path) -> Path:
        """Write the localization of a map that was read from the file `like`."""
        bits = np.zeros(chi.shape, np.uint8)
        for bit, mask in enumerate(self.regions.values()):
            bits |= mask.astype(np.uint8) << bit
        image = image_like(bits, load_image(like))
        header = _Header(replace(self.location, labels=None, regions=None), [*self.regions], self.space)
        image.header.extensions.append(Nifti1Extension("comment", _encode(header)))
        with atomic_write(path) as temporary:
            image.to_filename(temporary)
        return path


def _encode(record: object) -> bytes:
    """Return a record with arrays as JSON."""
    return msgspec.json.encode(record, enc_hook=lambda array: array.tolist())


def _decode(text: bytes, kind: type[_Record], remedy: str) -> _Record:
    """Return the record in a JSON object; `InputError` if it is another one."""
    try:
        return msgspec.json.decode(text.rstrip(b"\0"), type=kind, dec_hook=lambda _, values: np.array(values))
    except msgspec.MsgspecError as error:
        name, _, advice = remedy.partition(": ")
        raise InputError(f"{name}: is another file ({error}); {advice}") from None


def to_mid_space(chi: Volume, to_map: NDArray[np.float64]) -> Volume:
    """Return a map with its affine in the mid-space, from which `to_map` leads to its own space."""
    return Volume(chi.array, np.linalg.inv(to_map) @ chi.affine)
