"""Demo dataset: maps of the phantom on several grids, in several units."""

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
from bids_dgmseg.simulate.phantom import PHANTOM
from bids_dgmseg.simulate.simulated_dataset import Image, LabelledScan, add_scan, start_dataset, write_participants

_DEMO_MARGIN_MM = 4.0

_DEMO_NOISE_PPM = 0.005

_PPB_STEP = 0.02
"""``scl_slope`` of the map stored as integers in ppb."""

_DEMO_README = """\
Demo of bids_dgmseg: phantom maps
=================================

Simulated susceptibility of a head of ellipsoids, with noise. Participants are fictitious, with their ages and sexes.
All maps show the same head, so their measures should agree:

sub-01 ses-1    1 mm, RAS, ppm
sub-01 ses-2    1 mm, oblique by 15 degrees about two axes, scaled 16-bit integers, ppb
sub-02          0.9 x 0.9 x 1.5 mm, LPS, ppm

Left is the patient's left. The true labels are in derivatives/truth; the exact values are

nucleus  volume (mm3)  susceptibility (ppm)
{table}
"""

_DEMO_COLUMNS: Mapping[str, Mapping[str, object]] = {
    "age": {"Description": "Invented age", "Units": "year"},
    "sex": {"Description": "Invented sex", "Levels": {"F": "female", "M": "male"}},
}

_DEMO_PARTICIPANTS = (
    {"participant_id": "sub-01", "age": 34, "sex": "F"},
    {"participant_id": "sub-02", "age": 67, "sex": "M"},
)


@dataclass(frozen=True)
class DemoScan:
    """Acquisition of the phantom."""

    participant: str
    session: str | None
    spacing_mm: tuple[float, float, float]
    axes: str = "RAS"
    """Orientation of the file's axes."""
    tilt_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Rotation of the field of view about x, then y, then z."""
    ppb: bool = False
    """Store integers in ppb instead of float32 in ppm."""


DEMO_SCANS = (
    DemoScan("01", "1", (1.0, 1.0, 1.0)),
    DemoScan("01", "2", (1.0, 1.0, 1.0), tilt_deg=(15.0, 0.0, 15.0), ppb=True),
    DemoScan("02", None, (0.9, 0.9, 1.5), axes="LPS"),
)


def write_demo(root: Path, scans: Sequence[DemoScan] = DEMO_SCANS) -> Iterator[str]:
    """Write the demo dataset.

    Parameters
    ----------
    root : path
        New or empty folder.
    scans : sequence of DemoScan
        Acquisitions, each a participant or session.

    Yields
    ------
    str
        Name of each scan after it has been written.

    Raises
    ------
    InputError
        If `root` is not new or empty.
    """
    rows = [f"{name:<9}{volume:>12.1f}{PHANTOM.chi_ppm[name]:>22.3f}" for name, volume in PHANTOM.volumes_mm3.items()]
    start_dataset(root, name="Demo of bids_dgmseg: phantom maps", readme=_DEMO_README.format(table="\n".join(rows)))
    write_participants(root, _DEMO_PARTICIPANTS, _DEMO_COLUMNS)
    for seed, scan in enumerate(scans, 1):
        labelled = scan_phantom(scan, seed=seed)
        add_scan(root, labelled)
        yield labelled.name


def scan_phantom(scan: DemoScan, *, seed: int) -> LabelledScan:
    """Sample the phantom on the grid of a scan; the seed is that of the noise."""
    grid = head_grid(scan)
    chi, dseg = PHANTOM.scan(grid, seed=seed, noise_ppm=_DEMO_NOISE_PPM)
    if scan.ppb:
        image = Image("Chimap", np.rint(chi.array * (1000 / _PPB_STEP)).astype(np.int16), scale=_PPB_STEP)
    else:
        image = Image("Chimap", chi.array)
    sidecar = {
        "Units": "ppb" if scan.ppb else "ppm",
        "MagneticFieldStrength": 3,
        "SkullStripped": True,
        "Description": "Susceptibility of an analytic phantom, with noise",
    }
    return LabelledScan(scan.participant, [image], dseg.array, grid.affine, sidecar, session=scan.session)


def head_grid(scan: DemoScan) -> Grid:
    """Compute the grid of a scan that covers the head of the phantom."""
    directions = Rotation.from_euler("xyz", scan.tilt_deg, degrees=True).as_matrix()
    limits = [ellipsoid.extent_mm(directions) for ellipsoid in PHANTOM.tissues]
    low = np.min([low for low, _ in limits], axis=0) - _DEMO_MARGIN_MM
    high = np.max([high for _, high in limits], axis=0) + _DEMO_MARGIN_MM
    x, y, z = (int(size) for size in np.ceil((high - low) / scan.spacing_mm))
    centre = directions @ ((low + high) / 2)
    matrix: NDArray[np.float64] = directions * scan.spacing_mm
    affine = nib.affines.from_matvec(matrix, centre - matrix @ ((np.array([x, y, z]) - 1) / 2))
    # The RAS+ grid in the orientation of the file: voxels stay in place.
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(scan.axes)))
    shape = (x, y, z)
    i, j, k = (shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    return Grid((i, j, k), affine @ orientations.inv_ornt_aff(turn, shape))
