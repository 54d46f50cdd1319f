"""The public Python API: images in, images and tables out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.image import new_img_like
from scipy.ndimage import grey_dilation

import bids_dgmseg
from bids_dgmseg import list_models, measure, reconstruct, segment
from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.measurement.scan_measures import measure_scan
from bids_dgmseg.measurement.segmented_scan import SegmentedScan
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.demo import DEMO_SCANS, write_demo
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import HEAD, coarse_chi, make_grid

COARSE_DEMO = tuple(replace(scan, spacing_mm=(3.0, 3.0, 4.0)) for scan in DEMO_SCANS)


def image_of(volume) -> nib.Nifti1Image:
    return nib.Nifti1Image(volume.array, volume.affine)


@pytest.fixture(scope="module")
def labels() -> nib.Nifti1Image:
    """The phantom's nuclei at 2.5 mm."""
    return image_of(PHANTOM.dseg(world_grid(HEAD, (2.5, 2.5, 2.5))))


def test_home_folder_in_weights_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.toml").write_text('model = "dgm24"\n')
    with pytest.raises(InputError, match=r"contains weights of dgm24, not of dgm16"):
        segment(image_of(coarse_chi()), weights="~/weights")


def test_segment_returns_what_the_app_writes(oracle, bids_dataset, tmp_path):
    ds, out = bids_dataset("sub-01"), tmp_path / "out"
    options = ["--model", "oracle", "--nprocs", "1", "--skip-bids-validation", "--bilateral"]
    assert main([str(ds), str(out), "participant", *options]) == 0
    result = segment(ds / "sub-01/anat/sub-01_Chimap.nii.gz", "oracle", bilateral=True)
    written = load_image(out / "sub-01/anat/sub-01_seg-oracle_dseg.nii.gz")
    assert result.labels.header["sform_code"] == written.header["sform_code"]
    np.testing.assert_array_equal(result.labels.affine, written.affine)
    np.testing.assert_array_equal(result.labels.dataobj, written.dataobj)
    probseg = load_image(out / "sub-01/anat/sub-01_seg-oracle_probseg.nii.gz")
    np.testing.assert_allclose(result.probabilities.get_fdata(), probseg.get_fdata(), atol=1e-7)
    stats = pd.read_csv(out / "sub-01/anat/sub-01_seg-oracle_stats.tsv", sep="\t", dtype={"index": "Int64"})
    pd.testing.assert_frame_equal(result.table, stats, check_dtype=False, rtol=1e-5)


@pytest.mark.parametrize("name", ["LPS", "oblique", "anisotropic"])
def test_results_lie_on_the_grid_of_the_input(oracle, name):
    image = image_of(PHANTOM.chi(make_grid(name), seed=1))
    result = segment(image, "oracle")
    assert result.labels.shape == image.shape
    assert result.probabilities.shape == (*image.shape, 16)
    np.testing.assert_allclose(np.asarray(result.labels.affine), image.affine, atol=1e-5)
    values = np.asanyarray(result.labels.dataobj)
    for structure in STRUCTURES:
        x_mm = nib.affines.apply_affine(image.affine, np.argwhere(values == structure.index))[:, 0].mean()
        assert (x_mm < 0) == (structure.hemisphere == "L")


def test_maps_in_ppb_give_the_same_table(oracle):
    chi = coarse_chi()
    ppm, ppb = image_of(chi), nib.Nifti1Image(chi.array * np.float32(1000), chi.affine)
    tables = [segment(ppm, "oracle").table, segment(ppb, "oracle", units="ppb").table]
    pd.testing.assert_series_equal(tables[0]["mean_ppm"], tables[1]["mean_ppm"], rtol=1e-5)
    assert 'no "Units" in its sidecar; read as ppb' in " ".join(segment(ppb, "oracle").warnings)


def test_unusable_image_is_refused_in_one_line(oracle):
    chi = coarse_chi()
    with pytest.raises(InputError, match=r"^map.nii: all voxels are 0"):
        segment(nib.Nifti1Image(chi.array * 0, chi.affine), "oracle")


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"^`model` dgm17: no such model; choose from default, dgm16"):
        segment(image_of(coarse_chi()), "dgm17")
    with pytest.raises(ValueError, match=r"^device: 'gpu', expected one of auto, cpu, cuda, mps$"):
        segment(image_of(coarse_chi()), device="gpu")
    with pytest.raises(InputError, match=r"nowhere.nii.gz: "):
        segment("nowhere.nii.gz")


def test_measure_names_columns_after_the_unit(labels, tmp_path):
    r2star = new_img_like(labels, np.full(labels.shape, 30.0, np.float32))
    assert measure(r2star, labels, units="1/s")["mean_per_s"].tolist() == [30.0] * 16
    r2star.to_filename(tmp_path / "sub-01_R2starmap.nii.gz")
    table = measure(tmp_path / "sub-01_R2starmap.nii.gz", labels)
    assert {"mean_per_s", "median_per_s", "core_mean_per_s", "std_per_s", "volume_mm3"} < set(table)
    assert not [column for column in table if "ppm" in str(column) or "probability" in str(column)]
    assert "mean" in measure(r2star, labels)


def test_milliseconds_are_converted_to_seconds(labels, tmp_path):
    t2star = new_img_like(labels, np.full(labels.shape, 25.0, np.float32))
    np.testing.assert_allclose(measure(t2star, labels, units="ms")["mean_s"], 0.025, rtol=1e-6)
    t2star.to_filename(tmp_path / "sub-01_T2starmap.nii.gz")
    (tmp_path / "sub-01_T2starmap.json").write_text('{"Units": "ms"}')
    np.testing.assert_allclose(measure(tmp_path / "sub-01_T2starmap.nii.gz", labels)["mean_s"], 0.025, rtol=1e-6)


def test_measure_agrees_with_segment_on_the_map_itself(oracle):
    image = image_of(coarse_chi())
    result = segment(image, "oracle", bilateral=True)
    table = measure(image, result.labels, units="ppm", bilateral=True)
    assert table["abbreviation"][:4].tolist() == ["DN_L", "DN_R", "DN", "IN_L"]
    common = [column for column in table if column in result.table]
    assert {"mean_ppm", "p95_ppm", "volume_mm3", "n_valid"} < set(common)
    pd.testing.assert_frame_equal(table, result.table[common], check_dtype=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("demo") / "ds"
    assert len(list(write_demo(root, COARSE_DEMO))) == len(COARSE_DEMO)
    return root


@pytest.mark.parametrize("scan", [scan.name for scan in COARSE_DEMO])
def test_measure_agrees_with_the_app_beyond_the_brain_mask(demo, tmp_path, scan):
    (chi_path,), (dseg_path,) = (demo.rglob(f"{scan}_{end}") for end in ("Chimap.nii.gz", "seg-truth_dseg.nii.gz"))
    sidecar = json.loads(chi_path.with_name(f"{scan}_Chimap.json").read_text())
    chi, dseg = load_image(chi_path).get_fdata(), grey_dilation(np.asanyarray(load_image(dseg_path).dataobj), 3)
    chi[..., : np.argwhere(dseg)[:, 2].min() + 2] = 0  # a brain mask that ends above the lowest labels
    paths = tmp_path / "sub-01_Chimap.nii.gz", tmp_path / "dseg.nii.gz"
    for array, path in ((chi.astype(np.float32), paths[0]), (dseg, paths[1])):
        nib.Nifti1Image(array, load_image(chi_path).affine).to_filename(path)
    labels = Volume.read(paths[1], np.int32)
    x, y, z = labels.shape
    present = [structure for structure in STRUCTURES if (labels.array == structure.index).any()]
    segmented = SegmentedScan(
        chi=check_chi(paths[0], sidecar).chi_ppm,
        dseg=labels,
        probseg=np.array([labels.array == structure.index for structure in present], np.float32),
        block=(slice(0, x), slice(0, y), slice(0, z)),
        structures=present,
        labelled={structure.abbreviation for structure in present},
    )
    expected = measure_scan(segmented, present, box=HEAD).stats
    table = measure(*paths, units=sidecar["Units"])
    assert (table["n_valid"] < table["n_voxels"]).any()
    common = [column for column in table if column in expected]
    assert {"mean_ppm", "p95_ppm", "volume_mm3", "n_valid"} < set(common)
    pd.testing.assert_frame_equal(table, expected[common], check_dtype=False)


def test_labels_on_another_grid_are_resampled_to_the_nearest_voxel(labels):
    fine = world_grid(HEAD, (1.25, 1.25, 1.25))  # 8 voxels of it fill one of the labels
    values = nib.Nifti1Image(np.ones(fine.shape, np.float32), fine.affine)
    same = measure(new_img_like(labels, np.ones(labels.shape, np.float32)), labels)
    assert measure(values, labels)["volume_mm3"].tolist() == same["volume_mm3"].tolist()


def test_labels_of_another_space_are_refused(labels):
    away = labels.affine.copy()
    away[:3, 3] += 300
    values = new_img_like(labels, np.ones(labels.shape, np.float32))
    with pytest.raises(InputError, match=r"^labels.nii: 100% of the labelled voxels lie outside map.nii; register"):
        measure(values, nib.Nifti1Image(np.asanyarray(labels.dataobj), away))


def test_other_labels_need_a_look_up_table(labels, tmp_path):
    array = np.where(np.asanyarray(labels.dataobj) == 1, 51, 0).astype(np.int32)
    values, given = new_img_like(labels, np.ones(labels.shape)), nib.Nifti1Image(array, labels.affine)
    with pytest.raises(
        InputError, match=r"^labels.nii: label 51 is not in the label table; provide another one with `lut`"
    ):
        measure(values, given)
    lut = pd.DataFrame({"index": [10, 51], "name": ["Left-Thalamus", "NA"]})  # the accumbens is no missing value
    lut.to_csv(tmp_path / "lut.tsv", sep="\t", index=False)
    for form in (lut, tmp_path / "lut.tsv"):
        (row,) = measure(values, given, lut=form).to_dict("records")
        assert (row["index"], row["name"], row["mean"]) == (51, "NA", 1.0)
    with pytest.raises(InputError, match=r"^`lut`: no column name; expected index and name"):
        measure(values, given, lut=lut[["index"]])


@pytest.mark.parametrize("number", [-5, 2_000_000_000])
def test_labels_may_have_any_number(labels, number):
    values, name = new_img_like(labels, np.ones(labels.shape)), {1: "left", number: "other"}
    given = np.asanyarray(labels.dataobj).astype(np.int32)
    sizes = {index: np.count_nonzero(given == own) for index, own in ((1, 1), (number, 2))}
    renumbered = np.select([given == 1, given == 2], [1, number], 0).astype(np.int32)
    lut = pd.DataFrame({"index": list(name), "name": list(name.values())})
    table = measure(values, nib.Nifti1Image(renumbered, labels.affine), lut=lut).set_index("index")
    assert table["n_voxels"].to_dict() == sizes
    assert table["name"].to_dict() == name


@pytest.mark.parametrize(
    ("lut", "message"),
    [
        ("none.tsv", r"^none.tsv: no such file; check the path$"),
        ("empty.tsv", r"^empty.tsv: not a tab-separated table \(No columns to parse from file\); fix the file"),
        ("binary.tsv", r"^binary.tsv: not a tab-separated table \("),
        ([1, 1], r"^`lut`: 1 is listed twice; keep one row per label$"),
        ([1, 1.7], r"^`lut`: index 1.7, expected integers; correct the table$"),
        ([1, np.nan], r"^`lut`: index nan, expected integers; correct the table$"),
        ([1, "two"], r"^`lut`: index two, expected integers; correct the table$"),
    ],
)
def test_unusable_look_up_tables_are_refused(labels, tmp_path, monkeypatch, lut, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.tsv").touch()
    Path("binary.tsv").write_bytes(bytes(range(128, 256)))
    if isinstance(lut, list):
        lut = pd.DataFrame({"index": lut, "name": ["one", "other"]})
    with pytest.raises(InputError, match=message):
        measure(labels, labels, lut=lut)


def test_unusable_paths_and_affines_are_refused(labels):
    array = np.ones((4, 4, 4), np.float32)
    nowhere, undefined = (nib.spatialimages.SpatialImage(array, one) for one in (None, np.diag([1, 1, np.nan, 1])))
    for image, message in (
        ("", r"^the path of an image is empty; pass the path of a NIfTI file$"),
        ("~nosuchuser/x.nii", r"^~nosuchuser/x.nii: no home folder of that user; use an absolute path$"),
        (nowhere, r"^map: its affine is missing or not finite; pass an image with an affine in mm$"),
        (undefined, r"^map: its affine is missing or not finite"),
    ):
        with pytest.raises(InputError, match=message):
            measure(image, labels)


def test_damaged_map_of_any_kind_is_refused(labels, tmp_path):
    path = tmp_path / "sub-01_R2starmap.nii.gz"
    new_img_like(labels, np.full(labels.shape, 30.0)).to_filename(path)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the checksum
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^sub-01_R2starmap.nii.gz: "):
        measure(path, labels)


def _echoes(times_s):
    """A ball of 0.1 ppm more than the sphere of water around it, at 3 T."""
    centre = (np.indices((48, 48, 48)) - 23.5) * 2.0
    r_mm = np.linalg.norm(centre, axis=0)
    inside, outside = r_mm < 10, (r_mm >= 10)
    cos2 = np.square(centre[2] / np.maximum(r_mm, 1e-6))
    field_ppm = np.where(outside, 0.1 / 3 * (10 / np.maximum(r_mm, 10)) ** 3 * (3 * cos2 - 1), 0.0)
    brain = r_mm < 44
    phases = [np.angle(np.exp(1j * 2 * np.pi * 42.577e6 * 3 * field_ppm * 1e-6 * t)) for t in times_s]
    phase = np.stack(phases).astype(np.float32)
    phase[:, 0, 0, :2] = -np.pi, np.pi  # the range by which the unit of a phase without a sidecar is recognized
    return phase, brain, inside


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inversion": "ilsqr", "regularization": 1e-3}, "regularization: ilsqr has no weight; leave it out"),
        ({"regularization": 0.0}, "regularization: 0.0, expected a positive number"),
        ({"regularization": float("nan")}, "regularization: nan, expected a positive number"),
        ({"erosion_mm": -1.0}, "erosion_mm: -1.0, expected a depth in mm"),
    ],
)
def test_weights_of_reconstruction_are_checked(options, message):
    phase, brain, _ = _echoes([0.005, 0.010])
    images = [nib.Nifti1Image(one, np.diag([2.0, 2.0, 2.0, 1.0])) for one in phase]
    magnitude = [nib.Nifti1Image((1000.0 * brain).astype(np.float32), images[0].affine) for _ in images]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reconstruct(magnitude, images, echo_times_s=[0.005, 0.010], field_strength_t=3.0, **options)


def test_reconstruct_returns_ppm_on_the_grid_of_the_echoes():
    times_s = [0.005, 0.010, 0.015]
    phase, brain, inside = _echoes(times_s)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    magnitude = [nib.Nifti1Image((1000.0 * brain).astype(np.float32), affine) for _ in times_s]
    phases = [nib.Nifti1Image(one, affine) for one in phase]
    options = {"echo_times_s": times_s, "field_strength_t": 3.0, "mask": new_img_like(magnitude[0], brain)}
    with pytest.warns(
        UserWarning, match=r"^phase increases with the field according to the map's extreme values alone"
    ):
        reconstruct(magnitude, phases, **options)  # a ball of water has no shape of a head
    options["phase_sign"] = "positive"
    listed = reconstruct(magnitude, phases, **options)
    contrast_ppm = listed.get_fdata()[inside].mean() - listed.get_fdata()[brain & ~inside].mean()
    assert 0.05 < contrast_ppm < 0.11  # total variation regularization takes some of 0.1
    stacked = reconstruct(
        nib.Nifti1Image(np.stack([one.get_fdata() for one in magnitude], -1), affine),
        nib.Nifti1Image(np.stack([one.get_fdata() for one in phases], -1), affine),
        **options,
    )
    np.testing.assert_allclose(stacked.get_fdata(), listed.get_fdata(), atol=1e-6)


def test_reconstruct_names_what_was_passed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    times_s = [0.005, 0.010]
    phase, brain, _ = _echoes(times_s)
    stacked = tmp_path / "phases.nii.gz"
    nib.Nifti1Image(np.moveaxis(phase / 10, 0, -1), np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(stacked)
    magnitude = [nib.Nifti1Image(brain.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))] * 2
    options: dict[str, Any] = {"echo_times_s": times_s, "field_strength_t": 3.0, "phase_sign": "positive"}
    with pytest.raises(InputError, match=r"^phases.nii.gz \(echo 1\): values from .* are not in a known range"):
        reconstruct(magnitude, "~/phases.nii.gz", **options)
    with pytest.raises(InputError, match=r"^phase \(echo 1\): values from .* are not in a known range"):
        reconstruct(magnitude, [nib.Nifti1Image(one / 10, magnitude[0].affine) for one in phase], **options)
    # The sidecar of the stacked file is used, and its unit makes no sense for a complex image.
    stacked.with_name("phases.json").write_text('{"Units": "rad"}')
    options["mask"] = magnitude[0]
    by_parts = reconstruct(magnitude, "~/phases.nii.gz", **options)
    signal = [
        nib.Nifti1Image(one.get_fdata() * np.exp(1j * echo / 10), one.affine)
        for one, echo in zip(magnitude, phase, strict=True)
    ]
    whole = reconstruct(None, signal, **options)
    # A complex number rounds the phase differently, which decides where equal gradients of this ball are edges of the
    # map; a wrong unit changes all digits.
    difference = abs(whole.get_fdata() - by_parts.get_fdata())
    assert difference.max() < 0.01
    assert (difference > 1e-4).mean() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"echo_times_s": [0.005]}, r"^2 magnitude images, 2 phase images and 1 echo time; expected one of each"),
        ({"echo_times_s": [5.0, 10.0]}, r"^echo_times_s: \[5.0, 10.0\], expected ascending times in seconds"),
        ({"field_strength_t": 0}, r"^field_strength_t: 0, expected the field strength in T, such as 3$"),
        ({"phase_units": "Hz"}, r"^phase_units: 'Hz', expected rad or arbitrary$"),
        ({"phase_sign": "down"}, r"^phase_sign: 'down', expected one of auto, positive, negative"),
    ],
)
def test_reconstruct_refuses_impossible_arguments(change, message):
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
    arguments = {"echo_times_s": [0.005, 0.01], "field_strength_t": 3.0, **change}
    with pytest.raises(ValueError, match=message):
        reconstruct([image] * 2, [image] * 2, **arguments)


def test_examples_of_the_docs_run(oracle, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "dgm16", oracle)
    monkeypatch.chdir(tmp_path)
    chi = coarse_chi()
    for name in ("sub-01/ses-1/anat/sub-01_ses-1", "sub-04/anat/sub-04"):
        path = tmp_path / f"demo/{name}_Chimap.nii.gz"
        path.parent.mkdir(parents=True)
        image_of(chi).to_filename(path)
    nib.Nifti1Image(np.full(chi.shape, 30.0, np.float32), chi.affine).to_filename("sub-04_R2starmap.nii.gz")
    phases, brain, _ = _echoes([0.008, 0.016, 0.024])
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for echo, phase in enumerate(phases, start=1):
        nib.Nifti1Image(phase, affine).to_filename(f"echo-{echo}_phase.nii.gz")
        nib.Nifti1Image((1000.0 * brain).astype(np.float32), affine).to_filename(f"echo-{echo}_mag.nii.gz")
    text = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        warnings = "the reconstructed map is implausible: its brain mask has" if "reconstruct(" in block else None
        with pytest.warns(UserWarning, match=warnings) if warnings else nullcontext():  # a ball of 358 ml
            exec(block, names)
    assert {"sub-04_dseg.nii.gz", "Chimap.nii.gz"} < {path.name for path in tmp_path.iterdir()}


def test_list_models_has_one_row_per_model():
    table = list_models()
    assert table.index.tolist()[0] == "dgm16"
    assert table.loc["dgm16", "nuclei"] == "DN IN RN SN STN CN PUT GP"
    assert table["default"].sum() == 1
    assert max(map(len, str(table).splitlines())) <= 80  # no column is elided


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, bids_dgmseg; print(bids_dgmseg.__version__, *sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "nibabel", "pandas", "nilearn"} & set(loaded)
    assert set(bids_dgmseg.__all__) <= set(dir(bids_dgmseg))
    with pytest.raises(AttributeError, match="no attribute 'segmnet'"):
        bids_dgmseg.segmnet  # noqa: B018
