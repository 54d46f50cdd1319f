"""Records that the steps of a segmentation take and return, and the file in which they travel between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, check_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import atomic_write, write_bytes
from bids_dgmseg.io.nifti import image_like, load_image
from bids_dgmseg.registration.midplane import Midplane

_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How a model is run."""

    weights: Path | None = None
    """Model folder to use instead of the weights in the package."""
    device: str = "cpu"
    """Where the networks run: ``cpu``, ``cuda`` or ``auto``."""
    ensemble: bool = False
    """Average over each map and its mirror image, which dgm16 and dgm24 always do: twice as slow."""
    folds: tuple[int, ...] = ()
    """Folds of the model folder to average; empty: all."""
    own_voxels: bool = True
    """Whether the network's grid follows the voxels of the map if they fit."""


@dataclass(frozen=True)
class Location:
    """Result of the localizer.

    Parameters
    ----------
    box : Box
        Region in which the nuclei are segmented.
    labels : Volume or None
        Head regions, numbered from 1 in the order of ``model.localizer.labels``; None if no network was run.
    plane : Midplane or None
        Plane between the hemispheres; None if it was not searched.
    regions : Volume or None
        Head regions by the network that was run, of this model or another one, by which the plane is found.
    """

    box: Box
    labels: Volume | None = None
    plane: Midplane | None = None
    regions: Volume | None = None


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
    """Volumes of the nuclei in this session (`bids_dgmseg.measurement.volume_change.measure_session_volumes`)."""
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


@dataclass(frozen=True)
class ProbabilityBlock:
    """Probabilities on a block of a map's grid; every voxel outside is background.

    Parameters
    ----------
    probabilities : ndarray of shape (C + 1, x, y, z)
        float32, channel 0 background, then the model's labels; the channels sum to 1.
    slices : tuple of 3 slice
        Position of the block in the map's array.
    seen : tuple of str
        Nuclei with at least one voxel on the network's own grid, before resampling to the map's grid; empty if
        unknown.
    voxel_size_mm : tuple of 3 float
        Voxel size of the map.
    """

    probabilities: NDArray[np.float32]
    slices: tuple[slice, slice, slice]
    seen: tuple[str, ...] = ()
    voxel_size_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def fractions(self) -> NDArray[np.uint8]:
        """Return the probabilities (C, x, y, z) of the nuclei in steps of 1/255, as ``_probseg`` files store them."""
        return np.rint(np.clip(self.probabilities[1:], 0, 1) * 255).astype(np.uint8)
