"""Results that were corrected, edited, or no longer belong to their inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.main import main as dgmseg
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import STRUCTURES
from tests.conftest import contents, read_stats

CN_L = STRUCTURES.named("CN_L").index
SCAN = "sub-01"


@pytest.fixture
def dataset(processed: Path, tmp_path: Path, oracle: Model) -> Path:
    """Copy of the dataset, with its results beside it."""
    for name in ("ds", "out"):
        shutil.copytree(processed / name, tmp_path / name)
    return tmp_path / "ds"


@pytest.fixture
def out(dataset: Path) -> Path:
    """The results of `dataset`."""
    return dataset.with_name("out")


@pytest.fixture
def corrections(out: Path) -> Path:
    """Dataset of corrections of the first scan, not yet edited."""
    folder = out.with_name("corrected")
    assert dgmseg(["corrections", "init", str(out), str(folder), "--scans", SCAN, "--model", "oracle"]) == 0
    return folder


def labels_of(folder: Path, scan: str = SCAN) -> Path:
    """Return the labels of a scan."""
    (path,) = folder.glob(f"{scan}/**/anat/*_dseg.nii.gz")
    return path


def read_array(path: Path) -> np.ndarray:
    """Return the labels in a file."""
    return np.asanyarray(load_image(path).dataobj).copy()


def edit(path: Path, index: int = CN_L) -> np.ndarray:
    """Remove the upper half of a nucleus and return the labels."""
    image, labels = load_image(path), read_array(path)
    _, _, z = np.nonzero(labels == index)
    labels[..., int(np.median(z)) :][labels[..., int(np.median(z)) :] == index] = 0
    nib.Nifti1Image(labels, None, image.header).to_filename(path)
    return labels


def test_corrected_labels_are_measured(dataset, out, run, corrections, capsys):
    automatic, before = read_array(labels_of(out)), read_stats(out, SCAN)
    chi = load_image(next(dataset.rglob("sub-01_Chimap.nii.gz"))).get_fdata()
    labels = edit(labels_of(corrections))
    content = labels_of(corrections).read_bytes()
    assert run(dataset, "--corrections", str(corrections)) == 0
    assert "1 of 2 scan(s) done, 1 unchanged since an earlier run" in capsys.readouterr().out
    after = read_stats(out, SCAN)
    region = labels == CN_L
    dice = 2 * region.sum() / (region.sum() + (automatic == CN_L).sum())
    assert int(after["CN_L"]["n_voxels"]) == region.sum() < int(before["CN_L"]["n_voxels"])
    assert float(after["CN_L"]["mean_ppm"]) == pytest.approx(chi[region].mean(), abs=1e-6)
    assert after["CN_L"]["edited"] == "1"
    assert float(after["CN_L"]["automatic_dice"]) == pytest.approx(dice, abs=1e-6)
    assert {after["CN_L"][name] for name in ("mean_probability", "volume_pv_mm3", "expected_dice")} == {"n/a"}
    assert {name: row["edited"] for name, row in after.items() if row["edited"] != "0"} == {"CN_L": "1"}
    paired = ("asymmetry", "rating", "reasons", "caudate_ratio")  # depend on the other side
    same = [name for name in before["CN_R"] if not any(word in name for word in paired)]
    assert [after["CN_R"][name] for name in same] == [before["CN_R"][name] for name in same]
    assert np.array_equal(read_array(labels_of(out)), labels)
    assert np.array_equal(read_array(labels_of(out / "derivatives" / "automatic")), automatic)
    assert labels_of(corrections).read_bytes() == content
    page = (out / "sub-01.html").read_text(encoding="utf-8")
    assert "the labels of CN_L were corrected" in " ".join(page.split())
    sidecar = json.loads(labels_of(out).with_name("sub-01_seg-oracle_dseg.json").read_text())
    assert sidecar["Manual"] is True
    assert sidecar["Correction"]["edited"] == ["CN_L"]
    assert run(dataset, level="group") == 0
    group = read_tsv(out / "group" / "group_stats.tsv").query("participant_id == 'sub-01' and abbreviation == 'CN_L'")
    assert group["edited"].tolist() == [1]
    assert (
        read_tsv(out / "group" / "group_qc.tsv").set_index("participant_id").loc["sub-01", "correction_edited"]
        == "CN_L"
    )


def test_results_with_corrections_are_kept(dataset, out, run, corrections, capsys):
    first = contents(out)
    edit(labels_of(corrections))
    assert run(dataset, "--corrections", str(corrections)) == 0
    corrected = contents(out)
    assert run(dataset, "--corrections", str(corrections)) == 0
    assert "all 2 scan(s) are up to date" in capsys.readouterr().out
    assert run(dataset) == 1
    line = "sub-01: its results have manual corrections (sub-01_seg-oracle_dseg.nii.gz); add --corrections with their "
    assert line in capsys.readouterr().err
    kept = contents(out)
    assert {name for name in corrected if kept[name] != corrected[name]} <= {"sub-01.html"}
    assert run(dataset, "--force") == 0
    automatic = contents(out)
    assert {name: text for name, text in automatic.items() if "automatic" not in name} == first  # as if never corrected
    assert not list((out / "derivatives").rglob("*_dseg.*"))


def test_correction_of_another_grid_stops_its_scan(dataset, out, run, corrections, capsys):
    path, first = labels_of(corrections), contents(out)
    nib.Nifti1Image(read_array(path)[1:], load_image(path).affine).to_filename(path)
    capsys.readouterr()
    assert run(dataset, "--corrections", str(corrections)) == 1
    assert "is not on the same grid as the labels that it corrects (shape" in capsys.readouterr().err
    changed = {name for name, content in contents(out).items() if first.get(name) != content}
    assert {name for name in changed if not name.endswith((".html", ".json"))} == set()


def exclusions(out: Path) -> dict[str, str]:
    """Return why scans are excluded by the group level."""
    table = read_tsv(out / "group" / "group_qc.tsv").set_index("participant_id")
    return {str(participant): str(why) for participant, why in table["excluded"].dropna().items()}


def test_edited_labels_stop_their_scan(dataset, out, run, capsys):
    first = contents(out)
    (path,) = out.rglob("sub-01_seg-oracle_dseg.nii.gz")
    labels, edited = edit(path), path.read_bytes()
    capsys.readouterr()
    line = (
        "sub-01_seg-oracle_dseg.nii.gz: changed since the run, so that the other results no longer belong to it; "
        "restore it (--force overwrites it), or, to measure edited labels, run dgmseg corrections init OUTPUT_DIR DIR "
        "--scans sub-01 and then this command with --corrections DIR\n"
    )
    assert run(dataset, "--dry-run") == 0
    assert f"sub-01: would fail: {line}" in capsys.readouterr().out
    assert run(dataset) == 1
    err = capsys.readouterr().err
    assert line in err
    assert "1 of 2 scan(s) failed: sub-01" in err
    assert run(dataset, level="group") == 1
    assert exclusions(out) == {"sub-01": "out of date: sub-01_seg-oracle_dseg.nii.gz: edited since the run"}
    assert path.read_bytes() == edited
    path.write_bytes(first[str(path.relative_to(out))])  # restored
    assert run(dataset) == 0
    assert "all 2 scan(s) are up to date" in capsys.readouterr().out
    path.write_bytes(edited)
    folder = out.with_name("corrected")
    assert dgmseg(["corrections", "init", str(out), str(folder), "--scans", SCAN, "--model", "oracle"]) == 0
    assert run(dataset, "--corrections", str(folder)) == 0
    assert np.array_equal(read_array(path), labels)
    assert read_stats(out, SCAN)["CN_L"]["edited"] == "1"


def test_results_of_an_unfetched_map_stay_valid(dataset, out, run, capsys):
    first = contents(out)
    for path in dataset.rglob("sub-01_Chimap.*"):
        path.unlink()
        path.symlink_to("../../.git/annex/objects/Xk/2f/MD5E-s9--0123456789abcdef.nii.gz")
    capsys.readouterr()
    assert run(dataset) == 0
    assert "all 2 scan(s) are up to date" in capsys.readouterr().out
    assert contents(out) == first
    assert run(dataset, level="group") == 0
    assert exclusions(out) == {}
    assert run(dataset, "--force") == 1  # what cannot be read cannot be processed
    assert "content not fetched" in capsys.readouterr().err
    assert run(dataset, level="group") == 0


def test_group_level_names_what_changed_although_results_were_copied(dataset, out, run, tmp_path, capsys):
    """A further map, a lesion mask, a correction and the unit in a sidecar."""
    (labels,) = out.rglob("sub-01_seg-oracle_dseg.nii.gz")
    image = load_image(labels)
    names = ("R2starmap", "label-lesion_mask", "desc-manual_dseg")
    roots = (dataset, tmp_path / "lesions", tmp_path / "corrected")
    paths = [root / "sub-01" / "anat" / f"sub-01_{name}.nii.gz" for root, name in zip(roots, names, strict=True)]
    arrays = [20 + np.asanyarray(image.dataobj), np.zeros(image.shape, np.uint8), np.asanyarray(image.dataobj)]
    for path, array in zip(paths, arrays, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(array.astype(np.uint8), image.affine).to_filename(path)
    shutil.copy(out / "dseg.tsv", tmp_path / "corrected")
    options = ["--further-maps", "R2starmap", "--lesion-masks", str(roots[1]), "--corrections", str(roots[2])]
    assert run(dataset, *options) == 0
    shutil.copytree(out, tmp_path / "copied")
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "copied", out)
    assert run(dataset, level="group") == 0
    (sidecar,) = dataset.rglob("sub-01_Chimap.json")
    uses = ("further map R2starmap", "lesion mask 1", "correction", "map")
    for path, use in zip((*paths, sidecar), uses, strict=True):
        content = path.read_bytes()
        path.write_bytes(content + b"\0" if path != sidecar else b'{"Units": "ppb"}')
        capsys.readouterr()
        assert run(dataset, *options, "--dry-run") == 0
        assert f"({use}) has changed" in capsys.readouterr().out
        if use in ("correction", "map"):
            assert run(dataset, level="group") == 1
            assert exclusions(out)["sub-01"].endswith(f"({use}) has changed")
        path.write_bytes(content)


def test_results_without_inputs_stay_in(dataset, out, run, capsys):
    (dataset / "sub-02" / "anat" / "sub-02_Chimap.nii.gz").unlink()
    assert run(dataset, level="group") == 0
    assert exclusions(out) == {}
    assert "1 scan(s) whose inputs were not found (sub-02); delete results of" in capsys.readouterr().err


def test_images_of_another_study_are_an_error(dataset, out, run, capsys):
    """Both maps are exchanged; then only that of sub-02, which the dataset reaches through a link."""
    first, second = (dataset / scan / "anat" / f"{scan}_Chimap.nii.gz" for scan in ("sub-01", "sub-02"))
    other = load_image(first)
    nib.Nifti1Image(0.9 * other.get_fdata(), other.affine).to_filename(dataset.parent / "other.nii.gz")
    original = first.read_bytes()
    for path in (first, second):
        path.unlink()
        path.symlink_to(dataset.parent / "other.nii.gz")
    assert run(dataset, level="group") == 2
    line = "ds: all 2 results in out were made from different images; pass their dataset"
    assert line in capsys.readouterr().err
    first.unlink()
    first.write_bytes(original)
    assert run(dataset, level="group") == 1
    assert exclusions(out) == {"sub-02": "out of date: sub-02_Chimap.nii.gz (map) has changed"}


def test_copy_is_not_merged(dataset, out, run, capsys):
    shutil.copytree(out, out.with_name("copy"))
    assert run(dataset, "--merge", str(out.with_name("copy")), level="group") == 2
    assert "--merge: copy duplicates out (1 image(s)); merge only one" in capsys.readouterr().err
