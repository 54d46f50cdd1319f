"""``dgmseg measure`` and ``dgmseg prove``: any labels, in any maps and on their own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from bids_dgmseg.cli.main import main
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import coarse_chi

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SHAPE = (20, 20, 20)
LEFT, RIGHT = (slice(3, 8),) * 3, (slice(12, 16), slice(3, 8), slice(3, 8))
"""Blocks of voxels: left caudate (5 x 5 x 5) and right putamen (4 x 5 x 5)."""


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, **sidecar: object) -> Path:
    """Write an image and its sidecar."""
    nib.Nifti1Image(array, affine).to_filename(path)
    if sidecar:
        path.with_name(path.name.partition(".")[0] + ".json").write_text(json.dumps(sidecar))
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Labels with the numbers of FreeSurfer: 11 left caudate, 51 right putamen."""
    array = np.zeros(SHAPE, np.int16)
    array[LEFT], array[RIGHT] = 11, 51
    return write(tmp_path / "aseg.nii.gz", array)


@pytest.fixture
def r2star(tmp_path: Path) -> Path:
    """R2* that grows by 1 per s along x, in voxels of `labels`."""
    return write(tmp_path / "sub-01_R2starmap.nii.gz", np.indices(SHAPE)[0].astype(np.float32))


@pytest.fixture
def measure(labels, tmp_path, capsys):
    """Function that runs the command and returns the exit code, the joint table and what was printed."""

    def call(*maps, labels=labels, lut="freesurfer", options=()):
        out = tmp_path / "measured"
        arguments = ["measure", *map(str, maps), "--labels", str(labels), "--out", str(out), *options]
        code = main([*arguments, *(["--lut", str(lut)] if lut else [])])
        streams = capsys.readouterr()
        table = read_tsv(out / "measures.tsv").set_index("abbreviation") if code == 0 else None
        return code, table, streams.out + streams.err

    return call


def test_freesurfer_labels_are_measured(measure, r2star, tmp_path):
    code, table, _ = measure(r2star)
    assert code == 0
    assert table.index.tolist() == ["CN_L", "PUT_R"]
    assert table["index"].tolist() == [11, 51]
    assert table["n_voxels"].tolist() == [125, 100]
    assert table["volume_mm3"].tolist() == [1000, 800]
    assert table["R2starmap_mean_per_s"].tolist() == pytest.approx([5, 13.5])  # mean of 3 to 7, of 12 to 15
    assert table["R2starmap_median_per_s"].tolist() == pytest.approx([5, 13.5])
    sampled = read_tsv(tmp_path / "measured" / "R2starmap_stats.tsv")
    assert sampled["p05_per_s"].tolist() == pytest.approx([3, 12])
    page = (tmp_path / "measured" / "index.html").read_text(encoding="utf-8")
    assert "sub-01_R2starmap.nii.gz, 1/s" in page
    assert (tmp_path / "measured" / "figures" / "R2starmap.png").is_file()


def test_maps_on_other_grids_are_sampled(measure, r2star, tmp_path):
    halves = np.diag([1.0, 1.0, 1.0, 1.0])
    halves[:3, 3] = -0.5  # two voxels fill one of the labels
    fine = write(
        tmp_path / "sub-01_T1map.nii.gz",
        np.repeat(np.indices(SHAPE)[0], 2, axis=0).repeat(2, axis=1).repeat(2, axis=2).astype(np.float32),
        halves,
    )
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    wide = write(tmp_path / "sub-01_R2map.nii.gz", 2 * np.indices((10, 10, 10))[0].astype(np.float32), coarse)
    code, table, text = measure(r2star, fine, wide)
    assert code == 0, text
    for name in (
        "R2starmap_mean_per_s",
        "T1map_mean_s",
        "R2map_mean_per_s",
    ):  # a linear gradient is interpolated exactly
        assert table[name].tolist() == pytest.approx([5, 13.5], abs=1e-4)
    assert table["n_voxels"].tolist() == [125, 100]


def test_table_beside_the_labels_is_read(measure, labels, r2star):
    labels.with_name("aseg.tsv").write_text("index\tname\n11\tleft caudate nucleus\n51\tlesion\n")
    _, table, _ = measure(r2star, lut=None)
    assert table.index.tolist() == ["CN_L", "lesion"]


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("no table", "aseg.nii.gz: no label table beside it (dseg.tsv); provide one with --lut"),
        ("other space", "aseg.nii.gz: 100% of the labelled voxels lie outside sub-01_R2starmap.nii.gz"),
        ("fractions", "contains 5.5, expected integers"),
        ("wrong unit", "expected ppm (about -1 to 1)"),
    ],
)
def test_unusable_input_is_named(measure, labels, r2star, tmp_path, problem, line):
    lut: Any = None if problem == "no table" else "freesurfer"
    array = np.asanyarray(nib.Nifti1Image.from_filename(labels).dataobj)
    if problem == "other space":
        away = AFFINE.copy()
        away[:3, 3] = 500
        write(labels, array, away)
    elif problem == "fractions":
        write(labels, array.astype(np.float32) / 2)
    elif problem == "wrong unit":
        values = np.random.default_rng(1).normal(0, 100, SHAPE).astype(np.float32)
        r2star = write(tmp_path / "sub-01_Chimap.nii.gz", values, Units="ppm")
    code, _, text = measure(r2star, lut=lut)
    assert code == 2
    assert line in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("flip", [1, -1], ids=["RAS", "LAS"])
def test_surfaces_enclose_the_labels_of_an_oblique_grid(tmp_path, flip):
    rotation = Rotation.from_euler("xyz", [20, -10, 15], degrees=True).as_matrix()
    affine = nib.affines.from_matvec(rotation @ np.diag([flip * 0.8, 1.0, 1.5]), [12, -30, 7])
    indices = np.moveaxis(np.indices((30, 26, 20)), 0, -1)
    centre = nib.affines.apply_affine(affine, [14.3, 12.6, 9.2])
    away = np.linalg.norm(nib.affines.apply_affine(affine, indices) - centre, axis=-1)
    path = write(tmp_path / "sub-01_dseg.nii.gz", np.where(away < 6, 7, 0).astype(np.int16), affine)
    (tmp_path / "sub-01_dseg.tsv").write_text("index\tname\tabbreviation\n7\tleft ../x\tSN_L\n8\tn\tRN_L\n")
    assert main(["view", str(path), "--surfaces", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"sub-01_hemi-L_label-SN_mesh{end}" for end in (".stl", ".surf.gii")
    }
    image: Any = nib.load(tmp_path / "out" / "sub-01_hemi-L_label-SN_mesh.surf.gii")
    vertices, triangles = (array.data for array in image.darrays)
    assert vertices.mean(axis=0) == pytest.approx(centre, abs=0.2)
    volume = (away < 6).sum() * 0.8 * 1.0 * 1.5
    assert ConvexHull(vertices).volume == pytest.approx(volume, rel=0.03)  # slightly larger than a rough sphere
    corners = vertices[triangles]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outwards = ((corners.mean(axis=1) - centre) * normals).sum(axis=1)
    assert (outwards > 0).all()
    assert outwards.sum() / 6 == pytest.approx(volume, rel=0.002)  # cones of the triangles and the centre
    stl = (tmp_path / "out" / "sub-01_hemi-L_label-SN_mesh.stl").read_bytes()
    assert b"SPACE=RAS" in stl[:80]
    assert len(stl) == 84 + 50 * int.from_bytes(stl[80:84], "little") == 84 + 50 * len(triangles)
    assert np.frombuffer(stl[84 + 12 : 84 + 48], "<f4").reshape(3, 3) == pytest.approx(corners[0])


PROGRAM = """
import sys
import nibabel as nib, numpy as np
from scipy import ndimage

source, reference, mode, image, out = sys.argv
if mode == "fail":
    sys.exit("out of memory")
image, labels = nib.load(image), np.asarray(nib.load(reference).dataobj)
near = ndimage.grey_dilation(labels, 3)
found = np.where(np.nan_to_num(image.get_fdata()) > 25, near, 0).astype(np.uint8)
nib.Nifti1Image(found[: -1 if mode == "crop" else None], image.affine).to_filename(out)
"""


@pytest.fixture
def program(tmp_path, capsys):
    """Function that proves a program that labels the phantom by a threshold: exit code, output folder, what it said."""
    (tmp_path / "program.py").write_text(PROGRAM)
    chi = coarse_chi()
    image = write(tmp_path / "sub-01_Chimap.nii.gz", 1000 * chi.array, chi.affine, Units="ppb")
    first = PHANTOM.dseg(Grid(chi.shape, chi.affine))
    reference = write(tmp_path / "reference.nii.gz", first.array.astype(np.uint8), chi.affine)
    labels, out = tmp_path / "sub-01_dseg.nii.gz", tmp_path / "proof"
    command = [sys.executable, str(tmp_path / "program.py"), str(reference)]
    subprocess.run([*command, "label", str(image), str(labels)], check=True)

    def call(mode, rest="{in} {out}"):
        run = f"{shlex.join([*command, mode])} {rest}"
        code = main(["prove", *map(str, (image, labels, out)), "--run", run, "--lut", "dgmseg"])
        streams = capsys.readouterr()
        return code, out, streams.out + streams.err

    return call


def test_program_that_follows_the_map_is_proved(program):
    code, out, text = program("label")
    assert code == 0, text
    table = read_tsv(out / "sub-01_desc-planted_stats.tsv").set_index("abbreviation")
    assert table.loc[["CN_L", "PUT_R", "GP_L"], "recovered_ppb"].between(5, 12).all(), table
    images = sorted(path.name for path in out.glob("*.nii.gz"))
    assert images == [f"sub-01_desc-{name}_{suffix}.nii.gz" for name, suffix in planted_names()]
    planted, original = (
        load_image(path).get_fdata() for path in (out / images[0], out.parent / "sub-01_Chimap.nii.gz")
    )
    about = json.loads((out / "sub-01_desc-planted1_Chimap.json").read_text())
    assert about["Units"] == "ppb"
    assert set(about["SusceptibilityAddedPpb"].values()) == {10}
    truth = load_image(out / "sub-01_desc-planted1_probseg.nii.gz").get_fdata()
    labels = load_image(out.parent / "sub-01_dseg.nii.gz").get_fdata()
    names = json.loads((out / "sub-01_desc-planted1_probseg.json").read_text())["LabelMap"]
    for name in about["VolumeChangePercent"]:
        before = np.count_nonzero(labels == STRUCTURES.named(name).index)
        change = 100 * (truth[..., names.index(name)].sum() / before - 1)
        assert change == pytest.approx(about["VolumeChangePercent"][name], abs=0.1)
    for name in about["SusceptibilityAddedPpb"]:
        core = truth[..., names.index(name)] > 0.999
        if core.any():
            np.testing.assert_allclose((planted - original)[core], 10, atol=5)  # its neighbours move its edge


def planted_names() -> list[tuple[str, str]]:
    planted = [(f"planted{number}", suffix) for number in range(1, 5) for suffix in ("Chimap", "probseg")]
    return [*planted, *((f"proved{number}", "dseg") for number in range(1, 5))]


@pytest.mark.parametrize(
    ("mode", "rest", "code", "message"),
    [
        (
            "fail",
            "{in} {out}",
            1,
            "not tested, {python}: ended with exit code 1 for sub-01_desc-planted1_Chimap.nii.gz",
        ),
        ("crop", "{in} {out}", 1, "not tested, sub-01_desc-proved1_dseg.nii.gz: "),
        ("label", "{in} elsewhere.nii.gz {out", 2, "lacks {in} or {out}"),
    ],
)
def test_program_that_fails_ends_with_one_line(program, mode, rest, code, message):
    result, _, text = program(mode, rest)
    assert result == code, text
    assert message.replace("{python}", sys.executable) in text
    assert len([line for line in text.splitlines() if "not tested, " in line]) == int(code == 1)
