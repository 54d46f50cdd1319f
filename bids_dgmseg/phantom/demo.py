"""Demo dataset: a small study of phantoms with known true values; BIDS datasets of labelled scans."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel import orientations
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

import bids_dgmseg
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.io.files import atomic_write, write_json, write_text, write_tsv
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM, Ellipsoid, Phantom

_MARGIN_MM = 4.0

_NOISE_PPM = 0.005

_PPB_STEP = 0.02
"""``scl_slope`` of a map stored as integers in ppb."""

_OFFSET_PPM = {"north": 0.0, "south": 0.008}
"""Zero of the maps of each site."""

_NIGRA_PPM = 0.03
"""Added to the substantia nigra of patients."""

_README = """\
Demo of bids_dgmseg: a study of phantoms
========================================

Simulated susceptibility of heads of ellipsoids, with noise. Participants, ages, sexes and groups are invented.

scan           map
{scans}

Susceptibilities rise with age: the mean of a nucleus is that of the phantom times 0.7 + 0.005 age. Patients (PD) have
0.03 ppm more in the substantia nigra, maps of the site "south" have a zero that is 0.008 ppm lower, so that all values
are higher, and the left putamen of sub-03 has 0.06 ppm more, as after a haemorrhage. Heads differ in size. The
field of view of sub-06 ses-1 was placed too high, so the scan was repeated a week later.

Left is the patient's left. The true labels are in derivatives/truth, and the true volumes and susceptibilities of all
nuclei in derivatives/truth/truth.tsv.
"""

_PARTICIPANT_COLUMNS: Mapping[str, Mapping[str, object]] = {
    "age": {"Description": "Invented age at the first session", "Units": "year"},
    "sex": {"Description": "Invented sex", "Levels": {"F": "female", "M": "male"}},
    "group": {"Description": "Invented diagnosis", "Levels": {"HC": "healthy control", "PD": "Parkinson's disease"}},
    "site": {"Description": "Invented site, which determines the zero of the maps"},
}

_TRUTH_COLUMNS: Mapping[str, Mapping[str, object]] = {
    "scan": {"Description": "Participant and session"},
    "abbreviation": {"Description": "Nucleus and hemisphere, as in dseg.tsv"},
    "volume_mm3": {"Description": "Volume of the ellipsoid, 4/3 pi abc", "Units": "mm3"},
    "mean_ppm": {"Description": "Susceptibility inside the ellipsoid", "Units": "ppm"},
}


@dataclass(frozen=True)
class DemoParticipant:
    """A head of the study."""

    label: str
    """Without ``sub-``."""
    age: int
    """Years at the first session."""
    sex: str
    group: str
    site: str
    size: float = 1.0
    """Scale of the head."""
    extra_ppm: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Added to single nuclei, by abbreviation."""

    def phantom(self, *, years: float = 0.0) -> Phantom:
        """Return the head as many years after the first session."""
        return Phantom(
            tuple(self._scale(ellipsoid, ellipsoid.chi_ppm) for ellipsoid in PHANTOM.tissues),
            tuple(self._scale(ellipsoid, self._nucleus_ppm(ellipsoid, years)) for ellipsoid in PHANTOM.nuclei),
        )

    def _nucleus_ppm(self, ellipsoid: Ellipsoid, years: float) -> float:
        name = STRUCTURES.numbered(ellipsoid.label).abbreviation
        disease = _NIGRA_PPM if self.group == "PD" and name.startswith("SN_") else 0.0
        return ellipsoid.chi_ppm * (0.7 + 0.005 * (self.age + years)) + disease + self.extra_ppm.get(name, 0.0)

    def _scale(self, ellipsoid: Ellipsoid, chi_ppm: float) -> Ellipsoid:
        x, y, z = (self.size * value for value in ellipsoid.centre_mm)
        a, b, c = (self.size * value for value in ellipsoid.semi_axes_mm)
        return dataclasses.replace(
            ellipsoid, centre_mm=(x, y, z), semi_axes_mm=(a, b, c), chi_ppm=chi_ppm + _OFFSET_PPM[self.site]
        )


@dataclass(frozen=True)
class DemoScan:
    """Acquisition of a participant."""

    participant: str
    session: str | None
    spacing_mm: tuple[float, float, float]
    axes: str = "RAS"
    """Orientation of the file's axes."""
    tilt_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Rotation of the field of view about x, then y, then z."""
    ppb: bool = False
    """Store integers in ppb instead of float32 in ppm."""
    date: str = ""
    """Date of the session."""
    years: float = 0.0
    """Since the first session."""
    lowest_mm: float | None = None
    """Where the field of view starts along its third axis; by default below the head."""

    @property
    def phantom(self) -> Phantom:
        """The head at the time of the scan."""
        return DEMO_PARTICIPANTS[self.participant].phantom(years=self.years)

    @property
    def name(self) -> str:
        """Subject and session as in file names."""
        return f"sub-{self.participant}" + (f"_ses-{self.session}" if self.session else "")

    @property
    def description(self) -> str:
        """Voxels, axes and units."""
        voxels = " x ".join(f"{edge:g}" for edge in dict.fromkeys(self.spacing_mm)) + " mm"
        oblique = "oblique" if any(self.tilt_deg) else self.axes
        cut = ", without the cerebellum" if self.lowest_mm is not None else ""
        return f"{voxels}, {oblique}, {'16-bit integers, ppb' if self.ppb else 'float32, ppm'}{cut}"


DEMO_PARTICIPANTS: Mapping[str, DemoParticipant] = {
    participant.label: participant
    for participant in (
        DemoParticipant("01", 34, "F", "HC", "north", size=0.98),
        DemoParticipant("02", 67, "M", "HC", "north", size=1.03),
        DemoParticipant("03", 58, "M", "PD", "north", extra_ppm={"PUT_L": 0.06}),
        DemoParticipant("04", 48, "F", "HC", "south", size=0.98),
        DemoParticipant("05", 76, "M", "HC", "south", size=1.02),
        DemoParticipant("06", 63, "F", "PD", "south", size=0.97),
    )
}
"""By label."""

DEMO_SCANS = (
    DemoScan("01", "1", (1.2, 1.2, 1.2), date="2022-03-01"),
    DemoScan("01", "2", (1.2, 1.2, 1.2), tilt_deg=(15.0, 0.0, 15.0), ppb=True, date="2024-03-01", years=2.0),
    DemoScan("02", "1", (1.2, 1.2, 1.2), date="2022-03-08"),
    DemoScan("02", "2", (1.2, 1.2, 1.2), date="2024-03-08", years=2.0),
    DemoScan("03", None, (1.2, 1.2, 1.2)),
    DemoScan("04", None, (1.0, 1.0, 2.0), axes="LPS"),
    DemoScan("05", None, (1.0, 1.0, 2.0), axes="LPS"),
    DemoScan("06", "1", (1.0, 1.0, 2.0), axes="LPS", date="2023-05-02", lowest_mm=-16.0),
    DemoScan("06", "2", (1.0, 1.0, 2.0), axes="LPS", date="2023-05-09", years=7 / 365.25),
)


def write_demo(root: Path, scans: Sequence[DemoScan] = DEMO_SCANS) -> Generator[str, None, None]:
    """Write the demo dataset, unless the folder has it already.

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
        If `root` contains something else.
    """
    table = "\n".join(f"{scan.name:<15}{scan.description}" for scan in scans)
    readme = _README.format(scans=table)
    with contextlib.suppress(OSError):
        if (root / "README").read_text(encoding="utf-8") == readme and (root / "participants.tsv").exists():
            return
    start_dataset(root, name="Demo of bids_dgmseg: a study of phantoms", readme=readme)
    for seed, scan in enumerate(scans, 1):
        add_scan(root, scan_phantom(scan, seed=seed))
        yield scan.name
    _write_truth(root / "derivatives" / "truth", scans)
    _write_people(root, scans)  # last, so that they show that the dataset is complete


def scan_phantom(scan: DemoScan, *, seed: int) -> LabelledScan:
    """Sample the head on the grid of a scan; the seed is that of the noise."""
    grid = head_grid(scan)
    chi, dseg = scan.phantom.scan(grid, seed=seed, noise_ppm=_NOISE_PPM)
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
    """Compute the grid of a scan that covers the head, or its part above ``scan.lowest_mm``."""
    directions = Rotation.from_euler("xyz", scan.tilt_deg, degrees=True).as_matrix()
    limits = [ellipsoid.extent_mm(directions) for ellipsoid in scan.phantom.tissues]
    low = np.min([low for low, _ in limits], axis=0) - _MARGIN_MM
    high = np.max([high for _, high in limits], axis=0) + _MARGIN_MM
    if scan.lowest_mm is not None:
        low[2] = scan.lowest_mm
    x, y, z = (int(size) for size in np.ceil((high - low) / scan.spacing_mm))
    centre = directions @ ((low + high) / 2)
    matrix: NDArray[np.float64] = directions * scan.spacing_mm
    affine = nib.affines.from_matvec(matrix, centre - matrix @ ((np.array([x, y, z]) - 1) / 2))
    # The RAS+ grid in the orientation of the file: voxels stay in place.
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(scan.axes)))
    shape = (x, y, z)
    i, j, k = (shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    return Grid((i, j, k), affine @ orientations.inv_ornt_aff(turn, shape))


def _write_people(root: Path, scans: Sequence[DemoScan]) -> None:
    """Write participants.tsv, and sessions.tsv of participants with sessions."""
    labels = dict.fromkeys(scan.participant for scan in scans)
    rows = [
        {"participant_id": f"sub-{label}", **{column: getattr(person, column) for column in _PARTICIPANT_COLUMNS}}
        for label, person in DEMO_PARTICIPANTS.items()
        if label in labels
    ]
    write_participants(root, rows, _PARTICIPANT_COLUMNS)
    for label in labels:
        sessions = [
            {"session_id": f"ses-{scan.session}", "acq_time": f"{scan.date}T12:00:00"}
            for scan in scans
            if scan.participant == label and scan.date
        ]
        if sessions:
            folder = root / f"sub-{label}"
            folder.mkdir(exist_ok=True)
            write_tsv(pd.DataFrame(sessions), folder / f"sub-{label}_sessions.tsv")


def _write_truth(truth: Path, scans: Sequence[DemoScan]) -> None:
    """Write the true volume and susceptibility of each nucleus of each scan."""
    rows = []
    for scan in scans:
        phantom = scan.phantom
        for name, volume_mm3 in phantom.volumes_mm3.items():
            rows.append((scan.name, name, round(volume_mm3, 1), round(phantom.chi_ppm[name], 4)))
    write_tsv(pd.DataFrame(rows, columns=list(_TRUTH_COLUMNS)), truth / "truth.tsv")
    write_json(_TRUTH_COLUMNS, truth / "truth.json")
    write_text("truth.*\n", truth / ".bidsignore")


_BIDS_VERSION = "1.11.2"

_TRUTH_README = """\
True labels of the scans, on the grid of each scan. dseg.tsv lists the labels; left is the patient's left. Use them as
the reference segmentation, for example with `dgmseg evaluate`.
"""


@dataclass(frozen=True)
class Image:
    """One image file of a scan."""

    suffix: str
    """Part of the file name after subject and session, such as ``echo-1_part-mag_MEGRE``."""
    array: NDArray[Any]
    """Shape (X, Y, Z): float32, or integers to be multiplied by `scale`."""
    sidecar: Mapping[str, Any] = field(default_factory=dict)
    """In addition to the fields common to the scan."""
    scale: float | None = None
    """``scl_slope`` of the file."""


@dataclass(frozen=True)
class LabelledScan:
    """A scan with its true labels; all arrays share the grid of `affine`."""

    participant: str
    """Without ``sub-``."""
    images: Sequence[Image]
    """A chi map, or magnitude and phase of several echoes."""
    dseg: NDArray[np.uint8]
    """Shape (X, Y, Z), labels of structures.tsv."""
    affine: NDArray[np.float64]
    sidecar: Mapping[str, Any]
    """Common to all images."""
    session: str | None = None
    """Without ``ses-``."""
    masks: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Further true masks by the value of ``label-``: shape (X, Y, Z), 1 inside."""

    @property
    def name(self) -> str:
        """Subject and session as in file names."""
        return f"sub-{self.participant}" + (f"_ses-{self.session}" if self.session else "")

    def folder(self, root: Path) -> Path:
        """Return the folder of the scan in a dataset."""
        return root.joinpath(*self.name.split("_"), "anat")


def start_dataset(root: Path, *, name: str, readme: str) -> None:
    """Write the top-level files of a dataset and of its ``derivatives/truth`` to a new or empty folder.

    Raises
    ------
    InputError
        If `root` contains something.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root.name}: exists and is not an empty folder; choose a new one")
    common = {
        "BIDSVersion": _BIDS_VERSION,
        "License": "CC0",
        "GeneratedBy": [{"Name": "bids_dgmseg", "Version": bids_dgmseg.__version__}],
    }
    raw = {"Name": name, **common, "DatasetType": "raw", "Authors": ["bids_dgmseg"]}
    derivative = {
        "Name": f"{name}: true labels",
        **common,
        "DatasetType": "derivative",
        "Authors": ["bids_dgmseg"],
        "SourceDatasets": [{"URL": "../.."}],
    }
    truth = root / "derivatives" / "truth"
    for folder, description, text in ((root, raw, readme), (truth, derivative, _TRUTH_README)):
        write_json(description, folder / "dataset_description.json")
        write_text(text, folder / "README")
    columns = ["index", "name", "abbreviation", "hemisphere", "color", "mapping"]
    table = pd.DataFrame([[getattr(row, column) for column in columns] for row in STRUCTURES], columns=columns)
    write_tsv(table, truth / "dseg.tsv")


def add_scan(root: Path, scan: LabelledScan) -> None:
    """Write the images of a scan with sidecars, its true labels and masks."""
    folder, truth = scan.folder(root), scan.folder(root / "derivatives" / "truth")
    folder.mkdir(parents=True, exist_ok=True)
    truth.mkdir(parents=True, exist_ok=True)
    for image in scan.images:
        write_json({**scan.sidecar, **image.sidecar}, folder / f"{scan.name}_{image.suffix}.json")
        _write_image(folder / f"{scan.name}_{image.suffix}.nii.gz", image.array, scan.affine, image.scale)
    _write_image(truth / f"{scan.name}_seg-truth_dseg.nii.gz", scan.dseg, scan.affine)
    for label, mask in scan.masks.items():
        _write_image(truth / f"{scan.name}_label-{label}_mask.nii.gz", mask, scan.affine)
        write_json({"Description": f"True {label}", "Type": "ROI"}, truth / f"{scan.name}_label-{label}_mask.json")


def write_participants(
    root: Path, rows: Sequence[Mapping[str, object]], columns: Mapping[str, Mapping[str, object]]
) -> None:
    """Write participants.tsv, one row per participant, and its data dictionary."""
    write_tsv(pd.DataFrame(rows), root / "participants.tsv")
    write_json(columns, root / "participants.json")


def _write_image(path: Path, array: NDArray[Any], affine: NDArray[np.float64], scale: float | None = None) -> None:
    """Write a NIfTI file; its bytes are reproducible, since nibabel omits the time from the gzip header."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    with atomic_write(path) as temporary:
        image.to_filename(temporary)
