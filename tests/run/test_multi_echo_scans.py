"""Scans with multi-echo GRE instead of a map, from the command line to the tables."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from scipy import ndimage

from bids_dgmseg.image.grids import Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.lab.simulate.acquisition import Echoes, draw_echoes
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import HEAD, make_grid, read_stats, start_dataset, write_map
from tests.run.conftest import process

SHRINKS = 0.4
"""Maximum relative loss of contrast by regularized inversion; the smallest nucleus has 5 voxels here."""


@cache
def grid_of(name: str) -> Grid:
    """Return voxels of 4 mm, or of 3.0 mm along the axes of a tilted scan."""
    if name == "coarse":
        return world_grid(HEAD, (4.0, 4.0, 4.0))
    upright, tilt = world_grid(HEAD, (2.5,) * 3), make_grid("oblique").affine @ np.linalg.inv(make_grid("RAS").affine)
    return Grid(upright.shape, tilt @ upright.affine)


@cache
def scanned(name: str) -> tuple[Echoes, np.ndarray]:
    """Echoes of the phantom, with the main field along z, and its labels."""
    grid = grid_of(name)
    chi, labels = PHANTOM.chi(grid), PHANTOM.labels(grid.centres_mm()).astype(np.uint8)
    x, y, z = (chi.affine[2, :3] / chi.voxel_size_mm).tolist()
    echoes = draw_echoes(
        torch.from_numpy(chi.array),
        torch.from_numpy(labels),
        voxel_size_mm=chi.voxel_size_mm,
        b0_direction=(x, y, z),
        generator=torch.Generator().manual_seed(1),
    )
    return echoes, labels


def write_echoes(
    root: Path,
    scan: str = "sub-01",
    name: str = "coarse",
    *,
    axes: str = "RAS",
    sign: int = 1,
    ramp_rad: float = 0,
    folder: str = "",
) -> Path:
    """Write the echoes of the phantom.

    Stored along other axes, with a phase that falls with the field, or with a ramp across the field of view whose sign
    alternates.
    """
    echoes, _ = scanned(name)
    anat = root / (folder or scan) / "anat"
    anat.mkdir(parents=True)
    affine = grid_of(name).affine
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(axes)))
    for number, time_s in enumerate(echoes.echo_times_s, 1):
        for part, images, scale in (("phase", echoes.phase, sign), ("mag", echoes.magnitude, 1)):
            image = scale * images[number - 1].numpy()
            if part == "phase" and ramp_rad:
                ramp = np.linspace(0, ramp_rad, image.shape[1], dtype=np.float32)[:, None]
                image = np.angle(np.exp(1j * (image + (-1) ** number * ramp))).astype(np.float32)
            stored = orientations.apply_orientation(image, turn)
            stem = anat / f"{scan}_echo-{number}_part-{part}_MEGRE"
            turned = affine @ orientations.inv_ornt_aff(turn, images.shape[1:])
            nib.Nifti1Image(stored, turned).to_filename(f"{stem}.nii.gz")
            units = {"Units": "rad" if part == "phase" else "arbitrary"}
            about = {"EchoTime": time_s, "MagneticFieldStrength": echoes.b0_tesla, "FlipAngle": 15, **units}
            Path(f"{stem}.json").write_text(json.dumps(about))
    return anat


@pytest.fixture
def ds(tmp_path) -> Path:
    start_dataset(tmp_path / "ds")
    return Path(tmp_path / "ds")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """Folder with two scans of one head and the results ``out`` of a run with the oracle."""
    root = tmp_path_factory.mktemp("echoes")
    start_dataset(root / "ds")
    write_echoes(root / "ds", "sub-01", "oblique")
    write_echoes(root / "ds", "sub-02", "oblique", axes="PIL", sign=-1)
    process(root, "--save-fields")
    return root


def chi_of(out: Path, scan: str = "sub-01") -> Volume:
    return Volume.read(out / scan / "anat" / f"{scan}_Chimap.nii.gz")


def quality_of(out: Path, scan: str = "sub-01") -> dict[str, Any]:
    (path,) = out.rglob(f"{scan}_*_qc.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_reconstruction_recovers_the_contrast_of_nuclei(done):
    maps, (echoes, labels) = chi_of(done / "out").array, scanned("oblique")
    for structure in STRUCTURES:
        # Background field removal also removes slow variation, so only the contrast with the surroundings is preserved.
        near = ndimage.binary_dilation(labels == structure.index, iterations=3)
        nucleus, around = labels == structure.index, near & (labels > len(STRUCTURES))
        contrast, true = (float(chi[nucleus].mean() - chi[around].mean()) for chi in (maps, echoes.chi.numpy()))
        assert (1 - SHRINKS) * true < contrast < 1.15 * true, structure.abbreviation


def test_other_orientation_and_sign_of_the_phase_give_the_same_map(done):
    chi, other = chi_of(done / "out"), chi_of(done / "out", "sub-02")
    assert other.file_orientation == "PIL"
    # Rounding decides which of two almost equal gradients is an edge of the map: few voxels differ by more.
    assert np.percentile(np.abs(other.array - chi.array), 99.99) < 2e-3
    np.testing.assert_allclose(other.array, chi.array, atol=0.01)
    stored = load_image(done / "out" / "sub-02" / "anat" / "sub-02_Chimap.nii.gz")
    original = load_image(done / "ds" / "sub-02" / "anat" / "sub-02_echo-1_part-phase_MEGRE.nii.gz")
    np.testing.assert_array_equal(stored.affine, original.affine)
    for scan, sign in (("sub-01", 1), ("sub-02", -1)):
        assert quality_of(done / "out", scan)["reconstruction"]["PhaseSign"] == sign


def test_reconstruction_is_documented(done):
    anat = done / "out" / "sub-01" / "anat"
    sidecar = json.loads((anat / "sub-01_Chimap.json").read_text())
    assert sidecar["Units"] == "ppm"
    assert (sidecar["EchoTime"], sidecar["FlipAngle"]) == ([0.005, 0.01, 0.015, 0.02], 15)
    assert sidecar["B0Direction"] == (make_grid("oblique").affine[2, :3] / 2).round(4).tolist()
    chi = chi_of(done / "out")
    valid_ml = float((chi.array != 0).sum() * np.prod(chi.voxel_size_mm)) / 1000
    assert sidecar["MapVolume"] == pytest.approx(valid_ml, rel=0.001)
    assert sidecar["BrainVolume"] > valid_ml
    assert 0 < sidecar["FieldMisfit"] < sidecar["LocalFieldFraction"] < 1
    edge_mm = float(np.prod(chi.voxel_size_mm)) ** (1 / 3)
    assert sidecar["RegularizationWeight"] == pytest.approx(0.24 * sidecar["FieldNoise"] * edge_mm, rel=0.01)
    assert sidecar["RegularizationCorrections"] == 0
    assert sidecar["Sources"][0] == "bids:raw:sub-01/anat/sub-01_echo-1_part-phase_MEGRE.nii.gz"
    assert len(sidecar["Sources"]) == 8
    (dseg,) = anat.glob("*_dseg.json")
    assert json.loads(dseg.read_text())["Sources"] == ["bids::sub-01/anat/sub-01_Chimap.nii.gz"]
    assert quality_of(done / "out")["input"]["reference"] == "whole brain"
    for text in ((done / "out" / "sub-01.html").read_text(), (done / "out" / "logs" / "CITATION.md").read_text()):
        assert "estimated by weighted least squares" in text
    page = (done / "out" / "sub-01.html").read_text()
    assert "projection onto dipole fields (PDF)" in page
    assert 'href="sub-01/anat/sub-01_Chimap.nii.gz"' in page


def test_r2star_is_written_and_sampled(done):
    anat, (echoes, labels) = done / "out" / "sub-02" / "anat", scanned("oblique")
    sidecar = json.loads((anat / "sub-02_R2starmap.json").read_text())
    assert (sidecar["Units"], sidecar["EstimationAlgorithm"], len(sidecar["EchoTime"])) == ("1/s", "ARLO", 4)
    r2star, stats = Volume.read(anat / "sub-02_R2starmap.nii.gz"), read_stats(done / "out", "sub-02")
    assert r2star.file_orientation == "PIL"
    for structure in STRUCTURES:
        # Simulated at 3 T as 12 1/s for grey matter and 137 1/s per ppm of either sign; nuclei have 18 to 36 1/s.
        expected = 12 + 137 * np.abs(echoes.chi.numpy()[labels == structure.index]).mean()
        row = stats[structure.abbreviation]
        assert float(row["r2star_mean_per_s"]) == pytest.approx(expected, abs=3), structure.abbreviation
        assert float(row["r2star_median_per_s"]) == pytest.approx(float(row["r2star_mean_per_s"]), abs=2)


def test_parts_are_written_and_measured(done):
    anat, stats = done / "out" / "sub-02" / "anat", read_stats(done / "out", "sub-02")
    para, dia = (Volume.read(anat / f"sub-02_desc-{part}magnetic_Chimap.nii.gz") for part in ("para", "dia"))
    np.testing.assert_allclose(para.array - dia.array, chi_of(done / "out", "sub-02").array, atol=1e-6)
    assert json.loads((anat / "sub-02_desc-diamagnetic_Chimap.json").read_text())["Units"] == "ppm"
    row = stats["GP_L"]
    assert float(row["mean_paramagnetic_ppm"]) > 3 * float(row["mean_diamagnetic_ppm"]) > 0  # of R2 alone


def test_errors_of_means_are_as_large_as_stated(done):
    ratios, (echoes, labels) = [], scanned("oblique")
    for scan in ("sub-01", "sub-02"):
        chi, stats = chi_of(done / "out", scan).array, read_stats(done / "out", scan)
        for structure in STRUCTURES:
            row, nucleus = stats[structure.abbreviation], labels == structure.index
            # Slow variation is removed with the background.
            around = ndimage.binary_dilation(nucleus, iterations=3) & (labels > len(STRUCTURES))
            contrast, true = (image[nucleus].mean() - image[around].mean() for image in (chi, echoes.chi.numpy()))
            error = contrast - true
            ratios.append(error / math.hypot(*(float(row[f"mean_sd_{name}_ppm"]) for name in ("noise", "choices"))))
    # Voxels of 2.5 mm: a brain mask that differs by one changes more than errors do (see phase_conditions.py).
    assert 0.3 < np.sqrt(np.mean(np.square(ratios))) < 2


def test_reconstruction_is_repeated_only_after_changes(ds, run, capsys):
    folder = write_echoes(ds)
    assert run(ds) == 0
    upright = chi_of(ds.parent / "out").array
    assert run(ds) == 0
    assert "up to date" in capsys.readouterr().out
    assert run(ds, "--phase-sign", "negative") == 0
    np.testing.assert_array_equal(chi_of(ds.parent / "out").array, -upright)
    sidecar = folder / "sub-01_echo-3_part-phase_MEGRE.json"
    sidecar.write_text(sidecar.read_text().replace("0.015", "0.0151"))
    capsys.readouterr()
    assert run(ds, "--dry-run", "--phase-sign", "negative") == 0
    assert "sub-01: would reconstruct a map from bids:raw:sub-01/anat/sub-01_echo-1" in capsys.readouterr().out


def test_map_of_the_user_replaces_the_reconstructed_one(ds, run, capsys):
    write_echoes(ds)
    assert run(ds) == 0
    made = ds.parent / "out" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    write_map(ds, "sub-01", Volume.read(made))
    assert run(ds, "--phase-sign", "positive") == 0
    assert "--phase-sign has no effect: every selected scan already has a chi map" in capsys.readouterr().err
    assert not list(made.parent.glob("*Chimap*"))
    assert "reconstruction" not in quality_of(ds.parent / "out")


def test_brain_mask_of_the_user_is_used(ds, run, tmp_path, capsys):
    write_echoes(ds)
    _, labels = scanned("coarse")
    mask = tmp_path / "masks" / "sub-01" / "anat" / "sub-01_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    values = np.where(labels > 0, np.float32(0.9), np.float32(0.1))  # a probability
    nib.Nifti1Image(values, grid_of("coarse").affine).to_filename(mask)
    assert run(ds, "--brain-masks", str(tmp_path / "masks")) == 0
    assert not (chi_of(tmp_path / "out").array[labels == 0] != 0).any()
    assert quality_of(tmp_path / "out")["reconstruction"]["BrainMask"] == mask.name
    write_echoes(ds, "sub-02")
    assert run(ds, "--brain-masks", str(tmp_path / "masks")) == 2
    assert "masks: no mask of sub-02; add it, or omit --brain-masks" in capsys.readouterr().err


def test_maps_of_the_user_are_never_replaced(ds, run, capsys):
    first = write_map(ds, "sub-02", PHANTOM.chi(grid_of("coarse"), seed=1))
    assert run(ds) == 0
    placed = ds.parent / "out" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(first.read_bytes())
    write_echoes(ds)
    capsys.readouterr()
    assert run(ds) == 1
    assert placed.read_bytes() == first.read_bytes()
    line = "sub-01_Chimap.nii.gz: exists in out, but was not reconstructed by this program"
    assert line in capsys.readouterr().err


def test_implausible_map_is_not_segmented(ds, run, capsys):
    # The same phase at a tenth of the field strength means ten times the susceptibility.
    folder = write_echoes(ds)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"MagneticFieldStrength": 3.0', '"MagneticFieldStrength": 0.3'))
    assert run(ds) == 1
    said = capsys.readouterr().err
    assert "the reconstructed map of sub-01 is not usable: its values have a spread of " in said
    assert "provide a brain mask with --brain-masks, or use --accept-implausible-maps" in said
    out = ds.parent / "out"
    assert not list(out.rglob("*_dseg.nii.gz"))
    assert "desc-refused_dseg.png" in (out / "sub-01.html").read_text()  # shows why
    assert (out / "figures" / "sub-01_seg-oracle_desc-refused_dseg.png").is_file()
    assert run(ds, "--accept-implausible-maps") == 0
    assert not list(out.rglob("*refused*"))
    page = (out / "sub-01.html").read_text()
    assert "desc-refused" not in page
    assert "desc-reconstruction_dseg.png" in page
    record = quality_of(out)
    assert record["rating"] != "green"
    assert record["failed_checks"] == 1
    assert "spread" in record["reconstruction"]["Problems"][0]
    assert any("the map is implausible" in line for line in record["warnings"])
