"""What the program promises, end to end.

The oracle replaces the network: it knows the true labels of the phantom, so that every expected value is known.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import coarse_chi, contents, make_grid, read_stats, start_dataset, write_map
from tests.oracle import oracle_model

VALIDATOR = shutil.which("bids-validator-deno", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
STORED: Mapping[str, Mapping[str, Any]] = {
    "upright": {"grid": "RAS"},
    "qformonly": {"grid": "LAS", "codes": (1, 0)},
    "integers": {"grid": "PIR", "extension": ".nii", "dtype": np.int16},
    "twocodes": {"grid": "oblique", "codes": (1, 4)},
    "anisotropic": {"grid": "anisotropic"},
}
"""Participant → how the same head is stored."""
WITHOUT_CODES = {"grid": "RAS", "codes": (0, 0)}
"""Neither form states where the head is: only the grid is kept."""


def assert_same_grid(written: nib.Nifti1Image, original: nib.Nifti1Image) -> None:
    assert written.shape[:3] == original.shape
    np.testing.assert_array_equal(written.affine, original.affine)
    np.testing.assert_array_equal(written.header["pixdim"][:4], original.header["pixdim"][:4])
    for code in ("qform_code", "sform_code"):
        assert written.header[code] == original.header[code]


def validate(folder: Path, cache: Path) -> None:
    environment = {**os.environ, "DENO_DIR": str(cache), "DENO_NO_UPDATE_CHECK": "1"}
    command = [str(VALIDATOR), str(folder), "--ignoreWarnings"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def store(root: Path, name: str, how: Mapping[str, Any]) -> None:
    """Write the map of a participant as `STORED` describes it."""
    chi = PHANTOM.chi(make_grid(how["grid"]))
    path = write_map(root, f"sub-{name}", chi, extension=how.get("extension", ".nii.gz"))
    if "dtype" in how:
        image = load_image(path)
        scaled = nib.Nifti1Image(image.get_fdata(), image.affine, dtype=how["dtype"])
        scaled.set_data_dtype(how["dtype"])  # nibabel chooses scl_slope
        scaled.to_filename(path)
    if "codes" in how:
        image = load_image(path)
        image.set_qform(image.affine, how["codes"][0])
        image.set_sform(image.affine, how["codes"][1])
        image.to_filename(path)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the dataset ``ds`` of all participants of `STORED` and the results ``out``."""
    folder = tmp_path_factory.mktemp("heads")
    start_dataset(folder / "ds")
    for name, how in {**STORED, "nocodes": WITHOUT_CODES}.items():
        store(folder / "ds", name, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "oracle", oracle_model())
        arguments = ["--model", "oracle", "--nprocs", "1", "-w", str(folder / "work"), "--no-masks", "--no-viewer"]
        arguments.append("--skip-bids-validation")
        assert main([str(folder / "ds"), str(folder / "out"), "participant", *arguments]) == 0
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=STORED)
def head(request: pytest.FixtureRequest, heads: Path) -> tuple[Path, Path, str]:
    """Map, output directory and name of one scan."""
    (chi,) = (heads / "ds" / f"sub-{request.param}").rglob("*_Chimap.nii*")
    return chi, heads / "out", f"sub-{request.param}"


@pytest.mark.parametrize("head", [*STORED, "nocodes"], indirect=True)
@pytest.mark.parametrize("suffix", ["dseg", "probseg"])
def test_results_are_on_the_grid_of_the_map(head, suffix):
    chi, out, scan = head
    (path,) = out.rglob(f"{scan}_seg-oracle_{suffix}.nii.gz")
    assert_same_grid(load_image(path), load_image(chi))


def test_left_stays_left_and_values_hold(head):
    _, out, scan = head
    stats = read_stats(out, scan)
    for name, row in stats.items():
        truth_mm3 = PHANTOM.volumes_mm3[name]
        # Interpolated from 2 mm to the voxel centres of the map: a nucleus 5 mm high spans few voxels of 3 mm.
        assert float(row["volume_pv_mm3"]) == pytest.approx(truth_mm3, rel=0.12), name
    for name in ("DN_L", "CN_R", "PUT_L", "GP_R"):  # large enough for a core without partial volume
        core = float(stats[name]["core_mean_ppm"])
        assert core == pytest.approx(PHANTOM.chi_ppm[name], abs=0.002), name  # left and right differ by at least 0.004
    (path,) = out.rglob(f"{scan}_seg-oracle_dseg.nii.gz")
    dseg = Volume.read(path, np.uint8)
    for structure in STRUCTURES:
        x_mm = (np.argwhere(dseg.array == structure.index) @ dseg.affine[:3, :3].T + dseg.affine[:3, 3])[:, 0]
        assert (x_mm < 0).all() == (structure.hemisphere == "L"), structure.abbreviation


def test_labels_match_the_phantom(head):
    _, out, scan = head
    (path,) = out.rglob(f"{scan}_seg-oracle_dseg.nii.gz")
    dseg = load_image(path)
    labels = np.asanyarray(dseg.dataobj)
    truth = PHANTOM.dseg(Grid((labels.shape[0], labels.shape[1], labels.shape[2]), dseg.affine)).array
    dice = 2 * np.count_nonzero((truth == labels) & (truth > 0)) / (np.count_nonzero(truth) + np.count_nonzero(labels))
    assert dice > 0.9  # over all nuclei: voxels of 2 mm, boundaries at most half a voxel off


def test_probabilities_are_scaled_integers(head):
    _, out, scan = head
    (path,) = out.rglob(f"{scan}_seg-oracle_probseg.nii.gz")
    image = load_image(path)
    assert image.get_data_dtype() == np.uint8
    assert image.shape[3] == 16
    proxy: Any = image.dataobj
    assert proxy.slope == pytest.approx(1 / 255)
    assert 0.9 < image.get_fdata().max() <= 1 + 1e-7  # 1/255 is rounded to float32 in the header


@pytest.mark.figures
def test_one_command_writes_every_file_and_again_the_same_bytes(bids_dataset, run, tmp_path):
    dataset, out = bids_dataset("sub-01_ses-1_acq-x"), tmp_path / "out"
    run(dataset)
    run(dataset, out=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    stem = "sub-01/ses-1/anat/sub-01_ses-1_acq-x"
    ends = "dseg.nii.gz dseg.json dseg.tsv probseg.nii.gz probseg.json stats.tsv stats.json qc.json"
    results = {f"{stem}_seg-oracle_{end}" for end in ends.split()}
    masks = {f"{stem}_space-orig_label-{structure.bids_label}_desc-oracle_mask.nii.gz" for structure in STRUCTURES}
    figure = "figures/sub-01_ses-1_acq-x_seg-oracle_desc-{}_dseg.png"
    figures = {figure.format(plane) for plane in ("axial", "coronal", "sagittal")}
    top = "dataset_description.json dseg.tsv descriptions.tsv .bidsignore README sub-01.html".split()
    assert results | masks | figures | {*top, "logs/CITATION.md", "logs/CITATION.bib"} <= names
    assert not [name for name in names if Path(name).name.startswith(".") and name != ".bidsignore"]
    assert "weights were provided by the user" not in (out / "sub-01.html").read_text()


def test_participants_reach_the_group_tables_and_all_is_valid_bids(bids_dataset, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01_ses-1", "sub-02_ses-1"), tmp_path / "out"
    (dataset / "participants.tsv").write_text("participant_id\tage\nsub-01\t34\nsub-02\t71\n")
    assert run(dataset) == 0
    assert run(dataset, level="group") == 0
    assert str(out / "group" / "group_stats.tsv") in capsys.readouterr().out
    with (out / "group" / "group_volumes.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["participant_id"], row["age"]) for row in rows] == [("sub-01", "34"), ("sub-02", "71")]
    assert float(rows[1]["RN_L_volume_mm3"]) == float(read_stats(out, "sub-02_ses-1")["RN_L"]["volume_mm3"])
    for folder in (dataset, out) if VALIDATOR else ():
        validate(folder, tmp_path / "deno")


def test_rerun_processes_changed_scans_only(bids_dataset, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01"), tmp_path / "out"
    run(dataset)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*_seg-*")}
    capsys.readouterr()
    assert run(dataset) == 0
    assert capsys.readouterr().out == "all 1 scan(s) are up to date; use --force to process them again\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*_seg-*")} == before
    next(out.rglob("*_probseg.nii.gz")).unlink()
    assert run(dataset) == 0
    assert "sub-01: done (1 of 1)" in capsys.readouterr().out
    write_map(dataset, "sub-01", coarse_chi().with_array(1.1 * coarse_chi().array))
    assert run(dataset) == 0
    assert "sub-01: done (1 of 1)" in capsys.readouterr().out
    assert run(dataset, "--no-masks") == 0
    assert "sub-01: done (1 of 1)" in capsys.readouterr().out


def test_dry_run_lists_scans_and_writes_nothing(bids_dataset, run, tmp_path, capsys):
    dataset = bids_dataset("sub-01_ses-1", "sub-02")
    assert run(dataset, "--dry-run") == 0
    out, err = capsys.readouterr()
    source = "bids:raw:sub-01/ses-1/anat/sub-01_ses-1_Chimap.nii.gz"
    assert f"sub-01_ses-1: would segment {source} with oracle: no results yet\n" in out
    assert err == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()


SCRIPT = """
import os, signal, sys
from bids_dgmseg.bids import derivatives
from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.models.registry import MODELS
from tests.oracle import oracle_model

MODELS["oracle"] = oracle_model()
copy_file, count = derivatives.copy_file, iter(range(9))
def die_at_the_third(temporary, final):
    if next(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy_file(temporary, final)
derivatives.copy_file = die_at_the_third
main(sys.argv[1:])
"""
"""The program with the oracle, killed while it writes results."""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the program in a new process with an empty HOME."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        ),
    }
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        environment.pop(name, None)

    def call(bids_dir: Path, *options: str, level: str = "participant") -> subprocess.Popen[str]:
        arguments = [sys.executable, str(script), bids_dir.name, "out", level, "-w", "work", "--model", "oracle"]
        return subprocess.Popen(
            [*arguments, "--skip-bids-validation", *options],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return call


def test_killed_and_concurrent_runs_share_output_without_touching_home(bids_dataset, start, run, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01", "sub-02"), tmp_path / "out"
    killed = start(dataset, "--participant-label", "01", "--nprocs", "1", "--no-viewer")
    assert killed.stdout
    assert killed.stdout.readline() == "sub-01: localize\n"
    assert run(dataset, "--participant-label", "02") == 0
    _, err = killed.communicate(timeout=300)
    assert (killed.returncode, err) == (-9, "")
    for path in out.rglob("sub-*.nii.gz"):
        load_image(path).get_fdata()  # no half-written file
    assert run(dataset) == 0
    said = capsys.readouterr()
    assert "1 of 2 scan(s) done, 1 unchanged since an earlier run" in said.out
    assert said.err == ""
    assert {path.name for path in out.glob("*.html")} == {"sub-01.html", "sub-02.html"}
    assert len(list(out.rglob("*_stats.tsv"))) == 2
    assert list((tmp_path / "home").iterdir()) == []
