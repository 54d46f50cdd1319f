"""Scans with echoes and without a chi map."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.scans import find_scans, find_skipped
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError

TIMES_S = {"1": 0.004, "2": 0.012, "3": 0.02}


def scans_of(root: Path, **selection):
    return find_scans(open_inputs(root, Selection(**selection), output_dir=root / "out"), echoes=True)


def echo(number: str, part: str, *entities: str, extension: str = ".nii.gz") -> str:
    """Path of an echo from its number, its part and further entities, such as ``sub-01`` and ``run-2``."""
    folders = [entity for entity in entities if entity.startswith(("sub-", "ses-"))]
    stem = "_".join([*entities, f"echo-{number}", f"part-{part}", "MEGRE"])
    return "/".join([*folders, "anat", stem + extension])


def echoes(*entities: str) -> list[str]:
    return [echo(number, part, *entities) for number in TIMES_S for part in ("mag", "phase")]


def unnamed(*entities: str) -> list[str]:
    """Echoes without ``part-``."""
    return [echo(number, "mag", *entities).replace("_part-mag", "") for number in TIMES_S]


def describe(root: Path, **changes) -> None:
    """Write the field strength at the root and an echo time for each echo, except for changes."""
    field_t = changes.get("field", 3)
    (root / "MEGRE.json").write_text(json.dumps({} if field_t is None else {"MagneticFieldStrength": field_t}))
    for number, time_s in {**TIMES_S, **changes.get("times", {})}.items():
        (root / f"echo-{number}_MEGRE.json").write_text(json.dumps({} if time_s is None else {"EchoTime": time_s}))


@pytest.fixture
def measured(dataset):
    """Return a function that creates a dataset with metadata."""

    def create(*files: str, **changes) -> Path:
        root: Path = dataset("ds", *files)
        describe(root, **changes)
        return root

    return create


def test_echoes_without_map_are_one_scan(measured):
    root = measured(*echoes("sub-01", "ses-1", "acq-x", "run-2"))
    (scan,) = scans_of(root)
    assert scan.name == "sub-01_ses-1_acq-x_run-2"
    assert scan.from_echoes
    assert [item.time_s for item in scan.echoes] == [0.004, 0.012, 0.02]
    assert [item.parts["phase"].name.partition("echo-")[2] for item in scan.echoes] == [
        f"{number}_part-phase_MEGRE.nii.gz" for number in "123"
    ]
    assert scan.sidecar["MagneticFieldStrength"] == 3
    assert scan.chi == scan.echoes[0].parts["phase"]
    assert len(scan.uris) == 6
    assert scan.uris[1] == f"bids:raw:{echo('1', 'mag', 'sub-01', 'ses-1', 'acq-x', 'run-2')}"


def test_echoes_are_sorted_by_echo_time(measured):
    root = measured(*echoes("sub-01"), times={"1": 0.03})
    (scan,) = scans_of(root)
    assert [item.time_s for item in scan.echoes] == [0.012, 0.02, 0.03]
    assert scan.chi.name == "sub-01_echo-2_part-phase_MEGRE.nii.gz"


def test_map_replaces_the_echoes_of_its_session(measured):
    root = measured(
        *echoes("sub-01", "ses-1"),
        *echoes("sub-01", "ses-2"),
        *echoes("sub-02"),
        *echoes("sub-03", "ses-1"),
        "sub-01/ses-1/anat/sub-01_ses-1_Chimap.nii.gz",
        "sub-03/Sepia_Chimap.nii.gz",  # without session, so of all
    )
    assert [(scan.name, scan.from_echoes) for scan in scans_of(root)] == [
        ("sub-01_ses-1", False),
        ("sub-01_ses-2", True),
        ("sub-02", True),
        ("sub-03", False),
    ]


def test_unselected_maps_of_derivatives_replace_echoes(measured, dataset, filter_file):
    root = measured(*echoes("sub-01"), *echoes("sub-02"))
    dataset("ds/derivatives/qsmxt", "sub-01/anat/sub-01_Chimap.nii", kind="derivative")
    assert [scan.from_echoes for scan in scans_of(root)] == [False, True]
    filter_file.write_text('{"chimap": {"acquisition": "x"}}')
    assert [scan.name for scan in scans_of(root, filter_file=filter_file)] == ["sub-02"]


def test_filter_file_selects_echoes(measured, filter_file):
    root = measured(*echoes("sub-01", "acq-a"), *echoes("sub-01", "acq-b"))
    filter_file.write_text('{"megre": {"acquisition": "b"}}')
    assert [scan.name for scan in scans_of(root, filter_file=filter_file)] == ["sub-01_acq-b"]
    filter_file.write_text('{"megre": {"acquisition": "c"}}')
    with pytest.raises(InputError, match=r"^ds: no _Chimap selected by filter.json and no _MEGRE, "):
        scans_of(root, filter_file=filter_file)


def test_magnitudes_without_phase_are_not_a_scan(measured):
    root = measured(echo("1", "mag", "sub-01"), *echoes("sub-02"))
    inputs = open_inputs(root)
    scans = find_scans(inputs, echoes=True)
    assert [scan.name for scan in scans] == ["sub-02"]
    (line,) = find_skipped(inputs, scans)
    assert line.startswith("sub-01: no _Chimap ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": {"2": None}}, r"sub-01_echo-2_part-phase_MEGRE.json: EchoTime is missing; add it in seconds"),
        ({"times": {"2": 0.004}}, r"sub-01_echo-2_part-phase_MEGRE.nii.gz: same EchoTime as sub-01_echo-1_part-phase"),
        ({"field": 3000}, r"sub-01_echo-1_part-phase_MEGRE.json: MagneticFieldStrength is 3000, expected tesla"),
    ],
)
def test_wrong_metadata_affects_only_its_scan(measured, changes, message):
    root = measured(*echoes("sub-01"), "sub-02/anat/sub-02_Chimap.nii.gz", **changes)
    scan, other = scans_of(root)
    assert scan.problem.startswith(message)
    assert other.problem is None


@pytest.mark.parametrize(("part", "other"), [("phase", "mag"), ("mag", "phase"), ("real", "imag"), ("imag", "real")])
def test_incomplete_echo_is_a_problem(measured, part, other):
    whole = [echo("1", name, "sub-01") for name in (part, other)]
    (scan,) = scans_of(measured(*whole, echo("2", part, "sub-01")))
    line = f"sub-01_echo-2_part-{part}_MEGRE.nii.gz: no part-{other} file of this echo; add it, or remove this echo"
    assert scan.problem == line


def test_duplicate_echo_is_a_problem(measured):
    root = measured(*echoes("sub-01"), echo("1", "phase", "sub-01", extension=".nii"), *echoes("sub-02"))
    item, other = scans_of(root)
    assert item.problem.startswith("sub-01_echo-1_part-phase_MEGRE.nii.gz: same echo as sub-01_echo-1_part-phase")
    assert other.problem is None


@pytest.mark.parametrize("suffix", ["T2starw", "GRE"])
def test_single_echo_with_another_suffix_is_a_scan(measured, suffix):
    root = measured(*(f"sub-01/anat/sub-01_part-{part}_{suffix}.nii.gz" for part in ("mag", "phase")))
    (root / f"{suffix}.json").write_text('{"EchoTime": 0.02, "MagneticFieldStrength": 7}')
    (scan,) = scans_of(root)
    assert scan.problem is None
    assert scan.name == "sub-01"
    assert scan.from_echoes
    assert [item.time_s for item in scan.echoes] == [0.02]
    assert [path.name for path in scan.files] == [f"sub-01_part-{part}_{suffix}.nii.gz" for part in ("phase", "mag")]


def test_real_and_imaginary_parts_replace_missing_phase(measured):
    cartesian = [echo(number, part, "sub-01") for number in TIMES_S for part in ("real", "imag")]
    phases = [echo(number, "phase", "sub-02") for number in TIMES_S]  # without magnitude
    scans = scans_of(measured(*cartesian, *phases, *(file.replace("sub-01", "sub-02") for file in cartesian)))
    for scan in scans:
        assert scan.problem is None
        assert [list(item.parts) for item in scan.echoes] == [["real", "imag"]] * 3
        assert scan.chi.name == f"{scan.name}_echo-1_part-real_MEGRE.nii.gz"


def test_complex_images_are_recognized_by_their_header(measured):
    root = measured(*unnamed("sub-01"), *unnamed("sub-02"))
    for number, name in enumerate(unnamed("sub-01"), 1):
        dtype = np.complex64 if number < 3 else np.complex128
        nib.Nifti1Image(np.ones((2, 2, 2), dtype), np.eye(4)).to_filename(root / name)
    for name in unnamed("sub-02"):
        nib.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)).to_filename(root / name)
    (scan,) = scans_of(root)  # those of sub-02 are magnitudes
    assert [list(item.parts) for item in scan.echoes] == [["complex"]] * 3


def test_reconstructed_map_is_not_an_input(measured, dataset):
    root = measured(*echoes("sub-01"))
    out = dataset("ds/out", "sub-01/anat/sub-01_Chimap.nii.gz", kind="derivative")
    (scan,) = scans_of(root, derivatives=(out,))
    assert scan.from_echoes


def test_run_without_map_is_reconstructed(measured):
    runs = [file for run in ("run-1", "run-2", "run-03") for file in echoes("sub-01", "ses-1", run)]
    root = measured(*runs, "sub-01/ses-1/anat/sub-01_ses-1_run-01_Chimap.nii.gz", *echoes("sub-02", "run-1"))
    dataset_maps = {scan.name: scan.from_echoes for scan in scans_of(root)}
    assert dataset_maps == {
        "sub-01_ses-1_run-01": False,
        "sub-01_ses-1_run-2": True,
        "sub-01_ses-1_run-03": True,
        "sub-02_run-1": True,
    }


def test_echoes_of_another_acquisition_are_reported(measured):
    root = measured(
        *echoes("sub-01", "acq-a"), *echoes("sub-01", "acq-b"), "sub-01/anat/sub-01_acq-a_desc-x_Chimap.nii.gz"
    )
    inputs = open_inputs(root)
    scans = find_scans(inputs, echoes=True)
    assert [scan.name for scan in scans] == ["sub-01_acq-a_desc-x"]
    assert find_skipped(inputs, scans) == [
        "sub-01_acq-b: echoes skipped; the session already has a chi map of another acquisition"
    ]


def test_map_in_standard_space_does_not_replace_the_echoes(measured):
    """It is a result, from which nothing else is measured."""
    standard = "sub-01/anat/sub-01_space-MNI152NLin2009cAsym_res-2_desc-dgm16_Chimap.nii.gz"
    root = measured(*echoes("sub-01"), standard)
    assert [(scan.name, scan.from_echoes) for scan in scans_of(root)] == [("sub-01", True)]


def test_image_of_a_single_coil_is_refused(measured):
    (scan,) = scans_of(measured(*(path.replace("sub-01_echo", "sub-01_coil-07_echo") for path in echoes("sub-01"))))
    assert scan.problem is not None
    assert "sub-01_coil-07_echo-1_part-mag_MEGRE.nii.gz: image of a single coil; combine the coils" in scan.problem
