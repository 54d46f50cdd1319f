"""Shared fixtures: the phantom, grids to sample it on, the oracle model, and datasets."""

from __future__ import annotations

import csv
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()  # until the first test: what is imported stays
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch: one thread per process of pytest-xdist

import nibabel as nib
import numpy as np
import pytest
from bids.layout.models import Config
from hypothesis import settings
from nibabel import orientations
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.phantom.head import PHANTOM, Phantom
from bids_dgmseg.run.environment import WORKER_MODULES
from tests.pixel import PIXEL, write_pixel

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background or nohup ignores them,
if hasattr(signal, "SIGHUP"):  # which the processes of the tests would inherit
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

WORKER_MODULES.append("tests.worker_models")

settings.register_profile("suite", deadline=None, derandomize=True)  # the same cases each time, on any machine
settings.load_profile("suite")

os.fsync = lambda fd: None  # the files of tests need not survive a power cut

_load_config = Config.load
Config.load = classmethod(lambda cls, config, session=None: _load_config(config))  # pybids commits each of 40 entities


_modules: set[str] = set()


def _freeze_modules() -> None:
    """Exclude what was imported from garbage collection, which otherwise takes a third of the time of a run."""
    if len(sys.modules) > len(_modules):
        _modules.update(sys.modules)
        gc.collect()
        gc.freeze()
        gc.enable()


_LONG = """
test_promise test_multi_echo_scans test_changed_results test_longitudinal test_sessions test_standard_space test_mni
test_papers_models test_nnunet_app test_api test_participant test_regions test_scan_interfaces test_initial_weights
test_folds test_finetune test_shapes test_reconstruct test_group_page test_browser
""".split()


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # keep the order below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long modules, so that all processes of pytest-xdist end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


_DRAWN = {
    "bids_dgmseg.report.mosaic": "draw_mosaic",
    "bids_dgmseg.report.scan_figures": "draw_reconstruction",
    "bids_dgmseg.report.group_figures": "draw_boxes draw_panels",
    "bids_dgmseg.lab.evaluate.page": "draw_agreement draw_age_curves draw_overlap",
}
"""Module → its functions that draw a figure."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Write one pixel instead of each figure, except in tests of figures: drawing takes most of the time of a run."""
    _freeze_modules()
    if item.get_closest_marker("figures"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for module, names in _DRAWN.items():
            for name in names.split():
                patch.setattr(importlib.import_module(module), name, _pixel_for(name))
        return (yield)


def _pixel_for(name: str) -> Callable[..., object]:
    """Return what stands for a function that draws: mosaics are written, figures returned, boxes also as PDF."""
    figure = (PIXEL, PIXEL) if name == "draw_boxes" else PIXEL
    return write_pixel if name in ("draw_mosaic", "draw_reconstruction") else lambda *args, **options: figure


HEAD = Box((-75, -110, -80), (75, 74, 80))
"""Box that contains the phantom."""
SIDECAR = {"Units": "ppm", "ReferenceRegion": "whole brain"}


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    """Ellipsoid nuclei of known centre, side, ppm and semi-axes: volume 4/3 pi abc."""
    return PHANTOM


@pytest.fixture(params=["RAS", "LAS", "LPS", "PIR", "oblique", "anisotropic"])
def grid(request: pytest.FixtureRequest) -> Grid:
    """The same head on six grids; values in mm, mm3 and ppm must not depend on the grid."""
    return make_grid(request.param)


@cache
def make_grid(name: str) -> Grid:
    """Grid over the head in a named orientation."""
    if name == "anisotropic":
        return world_grid(HEAD, (1.5, 1.5, 3.0))
    upright = world_grid(HEAD, (2.0, 2.0, 2.0))
    if name == "oblique":
        return Grid(upright.shape, nib.affines.from_matvec(_tilt()) @ upright.affine)
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(name)))
    turned = orientations.apply_orientation(np.empty(upright.shape), turn)
    x, y, z = turned.shape
    return Grid((x, y, z), upright.affine @ orientations.inv_ornt_aff(turn, upright.shape))


def _tilt() -> NDArray[np.float64]:
    """Rotation by 15 degrees about x, then 10 about z."""
    about_x, about_z = np.deg2rad([15, 10])
    x = np.array([[1, 0, 0], [0, np.cos(about_x), -np.sin(about_x)], [0, np.sin(about_x), np.cos(about_x)]])
    z = np.array([[np.cos(about_z), -np.sin(about_z), 0], [np.sin(about_z), np.cos(about_z), 0], [0, 0, 1]])
    tilt: NDArray[np.float64] = z @ x
    return tilt


@cache
def coarse_chi() -> Volume:
    """Chi map of the phantom at 2.5 mm, computed once per process."""
    return PHANTOM.chi(world_grid(HEAD, (2.5, 2.5, 2.5)), seed=1)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Model:
    """Model that returns the true labels of the phantom, registered for one test."""
    from tests.oracle import oracle_model  # which loads PyTorch, and each start of pytest loads this module

    model = oracle_model()
    monkeypatch.setitem(MODELS, model.name, model)
    return model


@pytest.fixture
def coarse_midplane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the plane between the hemispheres at 6 mm only."""
    monkeypatch.setattr("bids_dgmseg.registration.midplane._SPACINGS_MM", (6.0,))


def coarsen_sessions(patch: pytest.MonkeyPatch) -> None:
    """Align sessions once, on images of 4 mm, and average them at 2 mm."""
    for name, value in (("_ROUNDS", 1), ("_SPACING_MM", 4.0), ("_MEAN_MM", 2.0)):
        patch.setattr(f"bids_dgmseg.segmentation.sessions.{name}", value)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32, like processors without bfloat16, and like nnU-Net on every processor."""
    monkeypatch.setattr("bids_dgmseg.segmentation.inference._has_fast_bfloat16", lambda device: False)


@pytest.fixture
def bids_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a small BIDS dataset of phantom maps; scans are named like ``sub-01_ses-1_acq-x``."""

    def make(*scans: str, extension: str = ".nii.gz", sidecar: Mapping[str, Any] | None = SIDECAR) -> Path:
        root = tmp_path / "ds"
        start_dataset(root)
        for scan in scans or ("sub-01",):
            write_map(root, scan, coarse_chi(), extension=extension, sidecar=sidecar)
        return root

    return make


def start_dataset(root: Path, **description: str) -> None:
    """Write the files that BIDS requires at the root of a dataset."""
    root.mkdir(parents=True, exist_ok=True)
    content = {"Name": "Phantoms", "BIDSVersion": "1.10.0", "License": "CC0", "Authors": ["Nobody"], **description}
    (root / "dataset_description.json").write_text(json.dumps(content), encoding="utf-8")
    (root / "README").write_text("Maps of an analytic phantom, made for a test.\n", encoding="utf-8")


def write_map(
    root: Path, scan: str, chi: Volume, *, extension: str = ".nii.gz", sidecar: Mapping[str, Any] | None = SIDECAR
) -> Path:
    """Write one chi map under its BIDS name, with the axes of `chi.affine`."""
    folder = root.joinpath(*(part for part in scan.split("_") if part.startswith(("sub-", "ses-"))), "anat")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scan}_Chimap{extension}"
    nib.Nifti1Image(chi.array, chi.affine).to_filename(path)
    if sidecar is not None:
        (folder / f"{scan}_Chimap.json").write_text(json.dumps(dict(sidecar)), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path, oracle: Model) -> Callable[..., int]:
    """Function that runs the command line with the oracle into ``out`` and returns the exit code."""
    from bids_dgmseg.cli.bids_app import main

    def call(bids_dir: Path, *options: str, level: str = "participant", out: Path | None = None) -> int:
        arguments = [str(bids_dir), str(out or tmp_path / "out"), level, "-w", str(tmp_path / "work")]
        arguments += ["--no-viewer"] if level == "participant" else []  # importing nilearn takes seconds per scan
        return main([*arguments, "--model", oracle.name, "--nprocs", "1", "--skip-bids-validation", *options])

    return call


def contents(out: Path) -> dict[str, bytes]:
    """Return the bytes of every result by name, except logs, which differ between runs."""
    paths = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if "logs" not in path.parts}


def read_stats(out: Path, scan: str = "*") -> dict[str, dict[str, str]]:
    """Read the table of measures of a scan (by default of the only one): one row per abbreviation."""
    (path,) = out.rglob(f"{scan}_seg-*_stats.tsv")
    with path.open(encoding="utf-8") as file:
        return {row["abbreviation"]: row for row in csv.DictReader(file, delimiter="\t")}
