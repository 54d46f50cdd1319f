"""Invalid input of users and programs: message, exit code, and effect on other scans."""

from __future__ import annotations

import contextlib
import gzip
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import HEAD, coarse_chi, read_stats, start_dataset, write_map
from tests.oracle import oracle_model

CORTEX = (0, 60, 20)
"""Point in the brain away from the nuclei, in mm."""


def write(path: Path, array: NDArray[Any], **sidecar: str) -> None:
    """Replace a map and, if asked, its sidecar."""
    nib.Nifti1Image(array, coarse_chi().affine).to_filename(path)
    if sidecar:
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))


def chi() -> NDArray[np.float32]:
    copy: NDArray[np.float32] = coarse_chi().array.copy()
    return copy


def break_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../.git/annex/objects/x")  # as DataLad leaves files that were not fetched


def break_sidecar(path: Path) -> None:
    path.with_name(path.name.replace(".nii.gz", ".json")).write_text('{\n "Units": "ppm",\n}')


def append_zeros(path: Path) -> None:
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(20_000_000), 1))


def claim_size(path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((2000, 2000, 2000))  # 32 GB of float32; the file contains nothing of it
    header["sform_code"], header["srow_x"][0], header["srow_y"][1], header["srow_z"][2] = 1, 0.1, 0.1, 0.1
    header.set_data_dtype(np.float32)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)))


BAD: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "zeros": (lambda path: write(path, 0 * chi()), r"all voxels are 0; "),
    "link": (break_symlink, r"content not fetched \(broken symlink\); fetch it first \(datalad get"),
    "bomb": (append_zeros, r"contains more data than the header's 60 x 74 x 64 voxels; replace the file$"),
    "claimed": (
        claim_size,  # 8e9 voxels of 60 bytes
        r"segment needs about 480\.6 GB of memory for 2000 x 2000 x 2000 voxels, --mem-gb is [\d.]+; raise ",
    ),
    "control": (
        lambda path: write(path, chi(), Units="\x1b[2Kppm\0\u202e"),
        r"\"Units\" in its sidecar is '\\x1b\[2Kppm\\x00\\u202e', expected \"ppm\" or \"ppb\"; correct it$",
    ),
    "sidecar": (break_sidecar, r"invalid JSON \(line 3, column 1\); fix the file$"),
}
"""Participant → how its map is damaged, and the message."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    code: int
    err: Sequence[str]
    out: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run over every invalid map and a valid one."""
    folder = tmp_path_factory.mktemp("bad")
    start_dataset(folder / "ds")
    write_map(folder / "ds", "sub-good", coarse_chi())
    for label, (damage, _) in BAD.items():
        damage(write_map(folder / "ds", f"sub-{label}", coarse_chi()))
    arguments = ["--model", "oracle", "--nprocs", "1", "-w", str(folder / "work"), "--skip-bids-validation"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setitem(MODELS, "oracle", oracle_model())
        code = main([str(folder / "ds"), str(folder / "out"), "participant", *arguments])
    return Outcome(code, err.getvalue().splitlines(), folder / "out")


def test_names_of_files_cannot_act_on_the_terminal(bids_dataset, run, capsys):
    dataset = bids_dataset("sub-01", "sub-02")
    there = dataset / "sub-01" / "anat"
    (there / "sub-01_Chimap.nii.gz").rename(there / "sub-03_\x1b[2K\u202e_Chimap.nii.gz")
    assert run(dataset, "--dry-run") == 0
    said = "sub-03_\\x1b[2K\\u202e_Chimap.nii.gz: located in the folder of sub-01; rename or move the file; ignored\n"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("label", BAD)
def test_invalid_map_gives_one_line(outcome, label):
    (line,) = [line for line in outcome.err if line.startswith(f"sub-{label}")]
    assert re.match(rf"sub-{label}_Chimap\.(nii\.gz|json): {BAD[label][1]}", line)
    (page,) = outcome.out.glob(f"sub-{label}*")
    assert page.name == f"sub-{label}.html"
    assert f"<li>{line}</li>" in html.unescape(page.read_text())


def test_invalid_maps_do_not_stop_the_valid_one(outcome):
    assert outcome.code == 1
    labels = ", ".join(sorted(f"sub-{label}" for label in BAD))
    assert outcome.err[-1].startswith(f"{len(BAD)} of {len(BAD) + 1} scan(s) failed: {labels}; see ")
    assert len(outcome.err) == len(BAD) + 1
    assert (outcome.out / "sub-good.html").is_file()


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        (
            "dataset_description.json",
            "",
            r"ds: dataset_description\.json not found; pass the root directory of the BIDS",
        ),
        (None, "--model unet", r"--model unet: no such model; choose from default, dgm16"),
        (None, "--weights gone", r".*gone: no such folder; check --weights"),
    ],
)
def test_invalid_run_exits_with_2_and_one_line(bids_dataset, run, tmp_path, capsys, missing, options, message):
    dataset = bids_dataset("sub-01")
    if missing:
        (dataset / missing).unlink()
    assert run(dataset, *options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"bids_dgmseg: error: " + message, line)
    assert not (tmp_path / "out").exists()


def test_participants_of_another_program_are_kept(bids_dataset, run, tmp_path, capsys):
    kept = tmp_path / "out" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"a map")
    assert run(bids_dataset("sub-01")) == 2
    assert capsys.readouterr().err == (
        "bids_dgmseg: error: out: already contains output of another program (sub-01, but no "
        "dataset_description.json); choose another output directory\n"
    )
    assert kept.read_bytes() == b"a map"


def read_quality(out: Path) -> dict[str, object]:
    (path,) = out.rglob("*_qc.json")
    quality: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return quality


def voxel_at(place_mm: tuple[float, float, float]) -> tuple[int, ...]:
    index = np.linalg.inv(coarse_chi().affine) @ [*place_mm, 1]
    return tuple(np.rint(index[:3]).astype(int))


def test_invalid_voxels_are_counted_and_excluded(bids_dataset, run, tmp_path, capsys):
    dataset = bids_dataset("sub-01")
    spoiled = chi()
    (nucleus,) = (body for body in PHANTOM.nuclei if body.label == STRUCTURES.named("PUT_L").index)
    for place, value in ((CORTEX, np.inf), (nucleus.centre_mm, np.nan)):
        spoiled[voxel_at(place)] = value
    write(dataset / "sub-01" / "anat" / "sub-01_Chimap.nii.gz", spoiled)
    assert run(dataset) == 0
    assert "2 voxels inside the brain are NaN, infinite or beyond ±10 ppm" in capsys.readouterr().err
    assert read_quality(tmp_path / "out")["input"]["n_replaced"] == 2  # type: ignore[index]
    putamen = read_stats(tmp_path / "out")["PUT_L"]
    mean_ppm, mass, voxel_mm3 = float(putamen["mean_ppm"]), float(putamen["mass_ppm_mm3"]), 2.5**3
    # The invalid voxel counts only in the volume.
    assert mass / mean_ppm / voxel_mm3 == pytest.approx(int(putamen["n_voxels"]) - 1)


def test_nuclei_outside_the_field_of_view_are_missing(run, tmp_path, capsys):
    start_dataset(tmp_path / "ds")
    x, y, _ = HEAD.low_mm
    grid = world_grid(Box((x, y, -24), HEAD.high_mm), (2.0, 2.0, 2.0))  # the dentate nuclei lie below it
    write_map(tmp_path / "ds", "sub-01", PHANTOM.chi(grid))
    assert run(tmp_path / "ds") == 0
    out = tmp_path / "out"
    stats = read_stats(out)
    for name, row in stats.items():
        values = [value for column, value in row.items() if column.endswith(("voxels", "mm3", "ppm", "probability"))]
        assert all(value == "n/a" for value in values) == name.startswith(("DN", "IN")), name
    assert float(stats["RN_L"]["volume_pv_mm3"]) == pytest.approx(PHANTOM.volumes_mm3["RN_L"], rel=0.1)
    err = capsys.readouterr().err.splitlines()
    assert "sub-01: DN_L lies outside the field of view (lowest slice at z = -23 mm); its values are n/a" in err
    assert sum("outside the field of view" in line for line in err) == 4
    assert read_quality(out)["warnings"] == err
    assert "DN_L, DN_R, IN_L, IN_R: lies outside the field of view" in (out / "sub-01.html").read_text(encoding="utf-8")
