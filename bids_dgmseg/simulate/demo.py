"""The demo dataset: the analytic phantom, scanned in three ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.simulate.bids_writer import LabelledScan, add_scan, start_dataset, write_participants
from bids_dgmseg.simulate.phantom import PHANTOM

_MARGIN_MM = 4.0

_NOISE_PPM = 0.005

_PPB_STEP = 0.02
"""``scl_slope`` of the map that is stored as whole numbers, in ppb."""

_README = """\
Demo of bids_dgmseg: phantom maps
=================================

Magnetic susceptibility of a head made of ellipsoids, with a little noise. No person was scanned; ages and sexes are
invented. The same head lies in every map, so every map should give the same numbers:

sub-01 ses-1    1 mm, axes to the right, front and top (RAS), ppm
sub-01 ses-2    1 mm, oblique by 15 degrees about two axes, 16-bit whole numbers with a scale, ppb
sub-02          0.9 x 0.9 x 1.5 mm, axes to the left, back and top (LPS), ppm

Left is the patient's left. The true labels are in derivatives/truth; on paper the nuclei have

nucleus  volume (mm3)  susceptibility (ppm)
{table}
"""

_COLUMNS: Mapping[str, Mapping[str, object]] = {
    "age": {"Description": "Invented age", "Units": "year"},
    "sex": {"Description": "Invented sex", "Levels": {"F": "female", "M": "male"}},
}

_PARTICIPANTS = (
    {"participant_id": "sub-01", "age": 34, "sex": "F"},
    {"participant_id": "sub-02", "age": 67, "sex": "M"},
)


@dataclass(frozen=True)
class DemoScan:
    """How the phantom is scanned."""

    participant: str
    session: str | None
    spacing_mm: tuple[float, float, float]
    axes: str = "RAS"
    """Where the file's axes run."""
    tilt_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of the field of view about x, then y, then z."""
    ppb: bool = False
    """Stored as whole numbers in ppb, else as float32 in ppm."""


SCANS = (
    DemoScan("01", "1", (1.0, 1.0, 1.0)),
    DemoScan("01", "2", (1.0, 1.0, 1.0), tilt_deg=(15.0, 0.0, 15.0), ppb=True),
    DemoScan("02", None, (0.9, 0.9, 1.5), axes="LPS"),
)


def write_demo(root: Path, scans: Sequence[DemoScan] = SCANS) -> Iterator[str]:
    """Write the demo dataset.

    Parameters
    ----------
    root : path
        New or empty folder.
    scans : sequence of DemoScan
        How the phantom is scanned; each a participant or session of its own.

    Yields
    ------
    str
        The name of each scan once it is written.

    Raises
    ------
    InputError
        If `root` is not new or empty.
    """
    rows = [f"{name:<9}{volume:>12.1f}{PHANTOM.chi_ppm[name]:>22.3f}" for name, volume in PHANTOM.volumes_mm3.items()]
    start_dataset(root, name="Demo of bids_dgmseg: phantom maps", readme=_README.format(table="\n".join(rows)))
    write_participants(root, _PARTICIPANTS, _COLUMNS)
    for seed, scan in enumerate(scans, 1):
        drawn = scan_phantom(scan, seed=seed)
        add_scan(root, drawn)
        yield drawn.name


def scan_phantom(scan: DemoScan, *, seed: int) -> LabelledScan:
    """Sample the phantom as a scan does; the seed is that of the noise."""
    grid = head_grid(scan)
    chi, dseg = PHANTOM.scan(grid, seed=seed, noise_ppm=_NOISE_PPM)
    sidecar = {
        "Units": "ppb" if scan.ppb else "ppm",
        "MagneticFieldStrength": 3,
        "SkullStripped": True,
        "Description": "Susceptibility of an analytic phantom, with noise",
    }
    return LabelledScan(
        participant=scan.participant,
        session=scan.session,
        affine=grid.affine,
        sidecar=sidecar,
        chi=np.rint(chi.array * (1000 / _PPB_STEP)).astype(np.int16) if scan.ppb else chi.array,
        dseg=dseg.array,
        scale=_PPB_STEP if scan.ppb else None,
    )


def head_grid(scan: DemoScan) -> Grid:
    """Lay a scan's grid around the phantom's head."""
    directions = Rotation.from_euler("xyz", scan.tilt_deg, degrees=True).as_matrix()
    ends = [body.extent_mm(directions) for body in PHANTOM.tissues]
    low = np.min([low for low, _ in ends], axis=0) - _MARGIN_MM
    high = np.max([high for _, high in ends], axis=0) + _MARGIN_MM
    x, y, z = (int(size) for size in np.ceil((high - low) / scan.spacing_mm))
    centre = directions @ ((low + high) / 2)
    matrix: NDArray[np.float64] = directions * scan.spacing_mm
    affine = nib.affines.from_matvec(matrix, centre - matrix @ ((np.array([x, y, z]) - 1) / 2))
    return _turned(Grid((x, y, z), affine), scan.axes)


def _turned(grid: Grid, axes: str) -> Grid:
    """Let the axes of an RAS+ grid run elsewhere; the voxels stay where they are."""
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(axes)))
    x, y, z = (grid.shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    return Grid((x, y, z), grid.affine @ orientations.inv_ornt_aff(turn, grid.shape))
