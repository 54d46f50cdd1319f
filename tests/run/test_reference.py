"""Reference regions, from the command line to the tables; the oracle replaces the network."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS, Localizer, ModelInput
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.predict import Location
from tests.conftest import HEAD, make_grid, read_stats, start_dataset, write_map
from tests.oracle import oracle_model

CSF_PPM = 0.012
"""Susceptibility of the phantom's lateral ventricles; the maps here have no noise."""
VENTRICLE = 23


@cache
def head(name: str) -> tuple[Volume, np.ndarray]:
    """Map and labels of the phantom on a grid of 2 mm."""
    grid = make_grid(name)
    return PHANTOM.chi(grid), PHANTOM.labels(grid.centres_mm())


def whole_voxels() -> np.ndarray:
    """Voxels of the lateral ventricles without partial volume."""
    chi, labels = head("RAS")
    whole: np.ndarray = (labels == VENTRICLE) & (chi.array == np.float32(CSF_PPM))
    return whole


def write_mask(folder: Path, scan: str, mask: np.ndarray, affine: np.ndarray, label: str = "CSF") -> Path:
    path = folder / scan / "anat" / f"{scan}_label-{label}_mask.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(mask.astype(np.uint8), affine).to_filename(path)
    return path


def read_quality(out: Path, scan: str = "sub-01") -> dict[str, Any]:
    (path,) = out.rglob(f"{scan}_*_qc.json")
    quality: dict[str, Any] = json.loads(path.read_text())
    return quality


def write_heads(root: Path) -> Path:
    """Write the phantom without noise, stored RAS (sub-01) and LPS (sub-02), each with a CSF mask stored RAS."""
    start_dataset(root / "ds")
    for scan, name in (("sub-01", "RAS"), ("sub-02", "LPS")):
        write_map(root / "ds", scan, head(name)[0])
        write_mask(root / "masks", scan, whole_voxels(), make_grid("RAS").affine)
    return root


@pytest.fixture
def heads(tmp_path) -> Path:
    return write_heads(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """Folder of the heads with the results ``out`` of a run with their CSF masks."""
    root, model = write_heads(tmp_path_factory.mktemp("heads")), oracle_model()
    options = ["-w", str(root / "work"), "--model", model.name, "--nprocs", "1", "--skip-bids-validation"]
    options += ["--no-viewer", "--reference", "csf", "--reference-masks", str(root / "masks")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, model.name, model)
        assert main([str(root / "ds"), str(root / "out"), "participant", *options]) == 0
    return root


def test_csf_mask_shifts_all_values_by_csf(done):
    n_voxels = int(whole_voxels().sum())
    for scan in ("sub-01", "sub-02"):
        reference = read_quality(done / "out", scan)["reference"]
        assert reference["n_voxels"] == n_voxels > 50
        assert reference["mean_ppm"] == pytest.approx(CSF_PPM, rel=1e-6)  # float32
        assert reference["std_ppm"] == pytest.approx(0, abs=1e-7)
        assert reference["source"] == f"mask {scan}_label-CSF_mask.nii.gz"
        for name, row in read_stats(done / "out", scan).items():
            for measure in ("mean", "median", "p05", "p25", "p75", "p95", "mean_pv"):
                shift = float(row[f"{measure}_ppm"]) - float(row[f"{measure}_ref_ppm"])
                assert shift == pytest.approx(CSF_PPM, rel=1e-5), (name, measure)
            mass = float(row["mass_ppm_mm3"]) - float(row["mass_ref_ppm_mm3"])
            assert mass == pytest.approx(CSF_PPM * float(row["volume_mm3"]), rel=1e-5)  # all voxels are valid
    (dictionary,) = (done / "out").rglob("sub-01_*_stats.json")
    assert json.loads(dictionary.read_text())["SusceptibilityReference"] == read_quality(done / "out")["reference"]


def test_mask_that_is_missing_or_on_another_grid_stops_no_other_scan(heads, run, capsys):
    for scan, options in (("sub-01", np.ones((4, 4, 4))), ("sub-02", None)):
        (path,) = (heads / "masks" / scan).rglob("*.nii.gz")
        path.unlink()
        if options is not None:
            write_mask(heads / "masks", scan, options, np.eye(4))
    assert run(heads / "ds", "--reference", "csf", "--reference-masks", str(heads / "masks")) == 1
    err = capsys.readouterr().err
    assert "sub-01_label-CSF_mask.nii.gz: is not on the same grid as the map (shape" in err
    assert "sub-02: reference csf: no mask for this scan; its referenced values are n/a" in err
    assert "1 of 2 scan(s) failed: sub-01" in err
    row = read_stats(heads / "out", "sub-02")["RN_L"]
    assert (row["mean_ref_ppm"], row["mass_ref_ppm_mm3"]) == ("n/a", "n/a")


def test_nucleus_as_reference_has_zero_mean(heads, run):
    options = ["--participant-label", "01", "--reference", "CN"]
    assert run(heads / "ds", *options) == 0
    stats, reference = read_stats(heads / "out"), read_quality(heads / "out")["reference"]
    counts, means = ([float(stats[f"CN_{side}"][name]) for side in "LR"] for name in ("n_voxels", "mean_ref_ppm"))
    assert np.dot(counts, means) == pytest.approx(0, abs=1e-6)
    assert reference["n_voxels"] == sum(counts)
    assert (reference["region"], reference["source"]) == ("CN", "CN labelled by oracle")


NAMES = ("brain", "cerebellum", "ventricles", "nuclei", "cerebellar_nuclei")
COARSE = world_grid(HEAD, (4.0, 4.0, 4.0))


def label_head(*args: object, **kwargs: object) -> Location:
    """Return the result of a perfect localizer with voxels of 4 mm."""
    truth = PHANTOM.labels(COARSE.centres_mm())
    labels = (truth > 0).astype(np.uint8)
    labels[np.isin(truth, [25, 29, 30])] = 2
    labels[truth == VENTRICLE] = 3
    labels[(truth > 4) & (truth < 17)] = 4
    labels[(truth > 0) & (truth < 5)] = 5
    return Location(Box((-55, -95, -60), (55, 55, 50)), Volume(labels, COARSE.affine))


@pytest.fixture
def seeing(monkeypatch) -> str:
    """Name of a model whose localizer labels head regions."""
    whole_head = Localizer(kind="centre", labels=NAMES, input=ModelInput((4.0, 4.0, 4.0), (150.0, 184.0, 160.0)))
    model = replace(oracle_model("seeing"), localizer=whole_head)
    monkeypatch.setitem(MODELS, model.name, model)
    monkeypatch.setattr("bids_dgmseg.segmentation.engines.NetworkEngine.localize", label_head)
    return model.name


def test_segmented_ventricles_give_the_csf_reference(heads, run, seeing):
    assert run(heads / "ds", "--participant-label", "02", "--model", seeing, "--reference", "csf") == 0
    reference = read_quality(heads / "out", "sub-02")["reference"]
    assert reference["source"] == "lateral ventricles labelled by seeing, eroded by 2 mm"
    # Neighbours are white matter (-0.03) and caudate (0.045): a rim of a quarter of the voxels would shift it by 0.008.
    assert reference["mean_ppm"] == pytest.approx(CSF_PPM, abs=0.002)
    assert reference["n_voxels"] > 50
    row = read_stats(heads / "out", "sub-02")["DN_L"]
    assert float(row["mean_ppm"]) - float(row["mean_ref_ppm"]) == pytest.approx(reference["mean_ppm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--reference", "csf"],
            "--reference csf: oracle does not label the ventricles; provide masks with --reference-masks",
        ),
        (
            ["--reference", "whole-brain", "--reference-masks", "."],
            "--reference-masks: requires --reference csf, not whole-brain",
        ),
    ],
)
def test_invalid_reference_options_exit_with_2(heads, run, capsys, monkeypatch, options, message):
    monkeypatch.chdir(heads)
    assert run(heads / "ds", *options) == 2
    assert message in capsys.readouterr().err
    assert not list((heads / "out").rglob("*_stats.tsv"))
