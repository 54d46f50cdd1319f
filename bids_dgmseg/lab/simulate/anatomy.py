"""Labelled anatomy and its deformation into the space of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import sha256
from bids_dgmseg.lab.simulate.ranges import HeadRanges, smooth_noise, uniform

LAST_NUCLEUS = 20
"""Labels up to here are nuclei, 1 to 16 as in structures.tsv; labels above are `TISSUES`."""

SECOND_PARTS = {15: 17, 16: 18, 7: 19, 8: 20}
"""Label of a nucleus, in templates with parts that of its first part → label of its second part: internal pallidum,
pars compacta."""

TISSUES = {
    21: "cortex",
    22: "white matter",
    23: "lateral ventricle",
    24: "third ventricle",
    25: "fourth ventricle",
    26: "cerebrospinal fluid",
    27: "thalamus",
    28: "brainstem",
    29: "cerebellar cortex",
    30: "cerebellar white matter",
    31: "hippocampus and amygdala",
    32: "basal forebrain, hypothalamus, claustrum",
    33: "corpus callosum",
    34: "fastigial nucleus",
    35: "caudate tail",
    36: "accumbens",
}

RIGHT_TISSUES = {27: 37, 36: 38}
"""Tissue → its label in the right hemisphere, in the labels of drawn heads."""

IN_VEIN = 64
"""Added to the label of tissue in a vein that is visible on the map; not in nuclei, thalamus and accumbens."""


@dataclass(frozen=True)
class LabelMap:
    """Labels of a head in template space.

    Parameters
    ----------
    labels : Tensor of shape (X, Y, Z), uint8
    world_to_index : Tensor of shape (4, 4)
        RAS+ mm to voxel indices.
    """

    labels: Tensor
    world_to_index: Tensor

    @classmethod
    def from_volume(cls, volume: Volume) -> LabelMap:
        """Create a label map from a label volume."""
        inverse = torch.tensor(np.linalg.inv(volume.affine), dtype=torch.float32)
        return cls(torch.from_numpy(volume.array.astype(np.uint8)), inverse)

    def to(self, device: str | torch.device) -> LabelMap:
        """Copy the labels to a device."""
        return LabelMap(self.labels.to(device), self.world_to_index.to(device))

    def indices(self, points_mm: Tensor) -> Tensor:
        """Return the fractional voxel indices (..., 3) of world points (..., 3)."""
        return points_mm @ self.world_to_index[:3, :3].T + self.world_to_index[:3, 3]

    def at(self, indices: Tensor) -> Tensor:
        """Return the labels (uint8) at voxel indices (..., 3); 0 outside."""
        return look_up(self.labels, indices)


def is_made_from(image: nib.Nifti1Image, template: Path) -> bool:
    """Return whether the header of an image has the hash of a label template as its description."""
    return bytes(image.header["descrip"]).decode(errors="replace").rstrip("\0") == sha256(template)


def merge_parts(labels: Tensor) -> Tensor:
    """Replace the labels of second parts by those of their nuclei."""
    merged = labels
    for nucleus, part in SECOND_PARTS.items():
        merged = torch.where(labels == part, nucleus, merged)
    return merged


def look_up(labels: Tensor, indices: Tensor) -> Tensor:
    """Return the nearest label (uint8) at voxel indices (..., 3); 0 outside."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int32, device=indices.device)
    inside = torch.ones(flat.shape, dtype=torch.bool, device=indices.device)
    for axis, size in enumerate(labels.shape):  # axis by axis: `all` over an axis of length 3 is slow
        nearest = indices[..., axis].round().int()
        inside &= (nearest >= 0) & (nearest < size)
        flat = flat.mul_(size).add_(nearest)
    nearby = labels.view(-1)[flat.mul_(inside)]
    return nearby.mul_(inside)


def draw_head_points(
    shape: tuple[int, int, int],
    spacing_mm: float,
    *,
    centre_mm: Sequence[float],
    ranges: HeadRanges,
    generator: torch.Generator,
) -> Tensor:
    """Draw the template coordinates (X, Y, Z, 3) in mm of each voxel: affine transform and smooth deformation.

    The grid of the scan is isotropic and RAS+; `centre_mm` is the template point about which it is centred.
    """
    device = generator.device
    axes = [(torch.arange(n, device=device) - (n - 1) / 2) * spacing_mm for n in shape]
    scan = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    shift = [c + uniform(generator, -s, s) for c, s in zip(centre_mm, ranges.shift_mm, strict=True)]
    angles = [np.deg2rad(uniform(generator, -limit, limit)) for limit in ranges.rotation_deg]
    size = uniform(generator, *ranges.scale)
    zoom = np.diag([1 / (size * uniform(generator, *ranges.axis_scale)) for _ in range(3)])
    shear = np.eye(3)
    shear[0, 1:] = [uniform(generator, -ranges.shear / 2, ranges.shear / 2) for _ in range(2)]
    shear[1, 2] = uniform(generator, -ranges.shear, ranges.shear)
    matrix = torch.tensor(Rotation.from_euler("xyz", angles).as_matrix() @ zoom @ shear, dtype=torch.float32)
    points = scan @ matrix.T.to(device) + torch.tensor(shift, device=device)
    for wavelength_mm, amplitude_mm in ranges.bends:
        amplitude = uniform(generator, 0.2, 1.0) * amplitude_mm
        points += smooth_noise(shape, wavelength_mm / spacing_mm, generator, 3).permute(1, 2, 3, 0) * amplitude
    return points
