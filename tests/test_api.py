"""The public Python API: images in, images and tables out."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.image import new_img_like

import bids_dgmseg
from bids_dgmseg import list_models, measure, reconstruct, segment
from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import HEAD, coarse_chi, make_grid


def image_of(volume) -> nib.Nifti1Image:
    return nib.Nifti1Image(volume.array, volume.affine)


@pytest.fixture(scope="module")
def labels() -> nib.Nifti1Image:
    """The phantom's nuclei at 2.5 mm."""
    return image_of(PHANTOM.dseg(world_grid(HEAD, (2.5, 2.5, 2.5))))


def test_segment_returns_what_the_app_writes(oracle, bids_dataset, tmp_path):
    ds, out = bids_dataset("sub-01"), tmp_path / "out"
    options = ["--model", "oracle", "--nprocs", "1", "--skip-bids-validation", "--bilateral", "--prove"]
    assert main([str(ds), str(out), "participant", *options]) == 0
    result = segment(ds / "sub-01/anat/sub-01_Chimap.nii.gz", "oracle", bilateral=True, prove=True)
    written = load_image(out / "sub-01/anat/sub-01_seg-oracle_dseg.nii.gz")
    assert result.labels.header["sform_code"] == written.header["sform_code"]
    np.testing.assert_array_equal(result.labels.affine, written.affine)
    np.testing.assert_array_equal(result.labels.dataobj, written.dataobj)
    probseg = load_image(out / "sub-01/anat/sub-01_seg-oracle_probseg.nii.gz")
    np.testing.assert_allclose(result.probabilities.get_fdata(), probseg.get_fdata(), atol=1e-7)
    stats = pd.read_csv(out / "sub-01/anat/sub-01_seg-oracle_stats.tsv", sep="\t", dtype={"index": "Int64"})
    pd.testing.assert_frame_equal(result.table, stats, check_dtype=False, rtol=1e-5)
    is_single = stats["hemisphere"].notna()
    assert (stats.loc[is_single, "recovered_percent"] == 0).all()  # the oracle never looks at the map
    np.testing.assert_allclose(stats.loc[is_single, "recovered_ppb"], 10, atol=0.5)  # neighbours move the rims
    assert stats.loc[~is_single, ["recovered_ppb", "repeat_dice"]].isna().all(axis=None)


def test_results_lie_on_the_grid_of_the_input(oracle):
    image = image_of(PHANTOM.chi(make_grid("oblique"), seed=1))
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
    expected, result = segment(ppm, "oracle").table, segment(ppb, "oracle")
    pd.testing.assert_series_equal(result.table["mean_ppm"], expected["mean_ppm"], rtol=1e-5)
    assert "img: no `units`; assuming ppb" in " ".join(result.warnings)
    with pytest.raises(InputError, match=r"^img: values reach .*; set `units` to \"ppm\" or rescale the map$"):
        segment(ppm, "oracle", units="ppb")


def test_unusable_image_is_refused_in_one_line(oracle):
    chi = coarse_chi()
    with pytest.raises(InputError, match=r"^img: all voxels are 0"):
        segment(nib.Nifti1Image(chi.array * 0, chi.affine), "oracle")
    with pytest.raises(
        InputError, match=r"^img: ndarray, expected an image; pass a path or nibabel.Nifti1Image\(array, "
    ):
        segment(chi.array, "oracle")  # type: ignore[arg-type]


def test_measure_names_columns_after_the_unit(labels, tmp_path):
    r2star = new_img_like(labels, np.full(labels.shape, 30.0, np.float32))
    assert measure(r2star, labels, units="1/s")["mean_per_s"].tolist() == [30.0] * 16
    r2star.to_filename(tmp_path / "sub-01_R2starmap.nii.gz")
    table = measure(tmp_path / "sub-01_R2starmap.nii.gz", labels)
    assert {"mean_per_s", "median_per_s", "core_mean_per_s", "std_per_s", "volume_mm3"} < set(table)
    assert not [column for column in table if "ppm" in str(column) or "probability" in str(column)]
    assert "mean" in measure(r2star, labels)
    r2star.dataobj[: len(r2star.dataobj) // 2] = 0  # no rate: outside a mask
    r2star.to_filename(tmp_path / "sub-01_R2starmap.nii.gz")
    table = measure(tmp_path / "sub-01_R2starmap.nii.gz", labels)
    assert table["mean_per_s"].dropna().tolist() == [30.0] * 8


def test_measure_agrees_with_segment_on_the_map_itself(oracle):
    image = image_of(coarse_chi())
    result = segment(image, "oracle", bilateral=True)
    table = measure(image, result.labels, units="ppm", bilateral=True)
    assert table["abbreviation"][:4].tolist() == ["DN_L", "DN_R", "DN", "IN_L"]
    common = [column for column in table if column in result.table]
    assert {"mean_ppm", "p95_ppm", "volume_mm3", "n_valid"} < set(common)
    pd.testing.assert_frame_equal(table, result.table[common], check_dtype=False)


def test_labels_have_the_names_of_their_table(labels, tmp_path):
    labels.to_filename(tmp_path / "sub-01_dseg.nii.gz")
    (tmp_path / "dseg.tsv").write_text("index\tname\n" + "".join(f"{n}\tregion {n}\n" for n in range(1, 17)))
    values = new_img_like(labels, np.ones(labels.shape, np.float32))
    assert measure(values, tmp_path / "sub-01_dseg.nii.gz")["name"][0] == "region 1"
    values.to_filename(tmp_path / "sub-02_R2starmap.nii.gz")
    with pytest.raises(InputError, match=r"^sub-01_dseg.nii.gz: labels of sub-01, but sub-02_R2starmap.nii.gz is of"):
        measure(tmp_path / "sub-02_R2starmap.nii.gz", tmp_path / "sub-01_dseg.nii.gz")


def test_labels_on_another_grid_are_resampled_to_the_nearest_voxel(labels):
    fine = world_grid(HEAD, (1.25, 1.25, 1.25))  # 8 voxels of it fill one of the labels
    values = nib.Nifti1Image(np.ones(fine.shape, np.float32), fine.affine)
    same = measure(new_img_like(labels, np.ones(labels.shape, np.float32)), labels)
    assert measure(values, labels)["volume_mm3"].tolist() == same["volume_mm3"].tolist()


def test_labels_of_another_space_are_refused(labels):
    away = labels.affine.copy()
    away[:3, 3] += 300
    values = new_img_like(labels, np.ones(labels.shape, np.float32))
    with pytest.raises(InputError, match=r"^labels: 100% of the labelled voxels lie outside img; register"):
        measure(values, nib.Nifti1Image(np.asanyarray(labels.dataobj), away))


def test_other_labels_need_a_look_up_table(labels, tmp_path):
    array = np.where(np.asanyarray(labels.dataobj) == 1, 51, 0).astype(np.int32)
    values, image = new_img_like(labels, np.ones(labels.shape)), nib.Nifti1Image(array, labels.affine)
    with pytest.raises(
        InputError, match=r"^labels: label 51 is not in the label table; provide another one with `lut`"
    ):
        measure(values, image)
    lut = pd.DataFrame({"index": [10, 51], "name": ["Left-Thalamus", "NA"]})  # the accumbens is no missing value
    lut.to_csv(tmp_path / "lut.tsv", sep="\t", index=False)
    for form in (lut, tmp_path / "lut.tsv"):
        (row,) = measure(values, image, lut=form).to_dict("records")
        assert (row["index"], row["name"], row["mean"]) == (51, "NA", 1.0)
    with pytest.raises(InputError, match=r"^`lut`: no column name; expected index and name"):
        measure(values, image, lut=lut[["index"]])


@pytest.mark.parametrize(
    ("lut", "message"),
    [
        ("empty.tsv", r"^empty.tsv: not a tab-separated table \(No columns to parse from file\); fix the file"),
        ([1, 1], r"^`lut`: 1 is listed twice; keep one row per label$"),
        ([1, 1.7], r"^`lut`: index 1.7, expected integers; correct the table$"),
    ],
)
def test_unusable_look_up_tables_are_refused(labels, tmp_path, monkeypatch, lut, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.tsv").touch()
    if isinstance(lut, list):
        lut = pd.DataFrame({"index": lut, "name": ["one", "other"]})
    with pytest.raises(InputError, match=message):
        measure(labels, labels, lut=lut)


def _echoes(times_s):
    """A ball of 0.1 ppm more than the sphere of water around it, and air outside, at 3 T."""
    centre = (np.indices((48, 48, 48)) - 23.5) * 2.0
    r_mm = np.linalg.norm(centre, axis=0)
    inside, outside = r_mm < 10, (r_mm >= 10)
    cos2 = np.square(centre[2] / np.maximum(r_mm, 1e-6))
    field_ppm = np.where(outside, 0.1 / 3 * (10 / np.maximum(r_mm, 10)) ** 3 * (3 * cos2 - 1), 0.0)
    to_air = centre + np.reshape([0, 100, 0], (3, 1, 1, 1))  # from a ball of air of 20 mm
    air_mm = np.linalg.norm(to_air, axis=0)
    field_ppm = field_ppm + 9.4 / 3 * (20 / air_mm) ** 3 * (3 * np.square(to_air[2] / air_mm) - 1)
    brain = r_mm < 44
    phases = [np.angle(np.exp(1j * 2 * np.pi * 42.577e6 * 3 * field_ppm * 1e-6 * t)) for t in times_s]
    phase = np.stack(phases).astype(np.float32)
    phase[:, 0, 0, :2] = -np.pi, np.pi  # the range by which the unit of a phase without a sidecar is recognized
    return phase, brain, inside


@pytest.mark.filterwarnings("ignore:residual is")  # a ball without noise
def test_reconstruct_returns_ppm_on_the_grid_of_the_echoes():
    times_s = [0.005, 0.010, 0.015]
    phase, brain, inside = _echoes(times_s)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    magnitude = [nib.Nifti1Image((1000.0 * brain).astype(np.float32), affine) for _ in times_s]
    phases = [nib.Nifti1Image(item, affine) for item in phase]
    options = {"echo_times_s": times_s, "field_strength_t": 3.0, "mask": new_img_like(magnitude[0], brain)}
    with pytest.warns(UserWarning, match=r"^the phase sign is judged from the map's extreme values alone"):
        reconstruct(magnitude, phases, **options)  # a ball of water has no shape of a head
    options["phase_sign"] = "positive"
    listed = reconstruct(magnitude, phases, **options)
    contrast_ppm = listed.get_fdata()[inside].mean() - listed.get_fdata()[brain & ~inside].mean()
    assert 0.05 < contrast_ppm < 0.11  # total variation regularization takes some of 0.1


@pytest.mark.filterwarnings("ignore:residual is")  # a ball without noise
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
        reconstruct(magnitude, [nib.Nifti1Image(item / 10, magnitude[0].affine) for item in phase], **options)
    # The sidecar of the stacked file is used, and its unit makes no sense for a complex image.
    stacked.with_name("phases.json").write_text('{"Units": "rad"}')
    options["mask"] = magnitude[0]
    by_parts = reconstruct(magnitude, "~/phases.nii.gz", **options)
    signal = [
        nib.Nifti1Image(item.get_fdata() * np.exp(1j * echo / 10), item.affine)
        for item, echo in zip(magnitude, phase, strict=True)
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
        ({"echo_times_s": [0.005]}, r"^2 magnitude image\(s\), 2 phase image\(s\) and 1 echo time\(s\); expected"),
        ({"echo_times_s": [5.0, 10.0]}, r"^echo_times_s: \[5.0, 10.0\], expected ascending times in seconds"),
        ({"field_strength_t": 0}, r"^field_strength_t: 0, expected the field strength in T, such as 3$"),
        ({"phase_units": "Hz"}, r"^phase_units: 'Hz', expected rad or arbitrary$"),
        ({"regularization": 0.0}, "^regularization: 0.0, expected a positive number$"),
        ({"erosion_mm": -1.0}, "^erosion_mm: -1.0, expected a depth in mm"),
        ({"phase_sign": "down"}, r"^phase_sign: 'down', expected one of auto, positive, negative"),
    ],
)
def test_reconstruct_refuses_impossible_arguments(change, message):
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
    arguments = {"echo_times_s": [0.005, 0.01], "field_strength_t": 3.0, **change}
    with pytest.raises(ValueError, match=message):
        reconstruct([image] * 2, [image] * 2, **arguments)


@pytest.mark.filterwarnings("ignore:residual is")  # a ball without noise
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


def test_list_models_shows_all_columns_in_80_characters(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *args: (80, 24))
    table = list_models()
    assert list(table.loc["dgm16", ["nuclei", "default"]]) == [8, True]
    with pd.option_context("display.width", 80, "display.max_columns", 0):  # as in a terminal
        lines = str(table).splitlines()
    assert lines[0].split() == ["nuclei", "network", "licence", "default"]
    assert len(lines) == 2 + len(MODELS)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, bids_dgmseg; print(bids_dgmseg.__version__, *sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "nibabel", "pandas", "nilearn"} & set(loaded)
    assert set(bids_dgmseg.__all__) <= set(dir(bids_dgmseg))
    with pytest.raises(AttributeError, match="no attribute 'segmnet'"):
        bids_dgmseg.segmnet  # noqa: B018
