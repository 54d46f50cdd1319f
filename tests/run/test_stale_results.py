"""Results that no longer belong to their inputs, or to each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.io.nifti import load_image
from tests.conftest import contents


@pytest.fixture
def dataset(processed: Path, tmp_path: Path) -> Path:
    """Copy of the dataset, with its results beside it."""
    for name in ("ds", "out"):
        shutil.copytree(processed / name, tmp_path / name)
    return tmp_path / "ds"


@pytest.fixture
def out(dataset: Path) -> Path:
    """The results of `dataset`."""
    return dataset.with_name("out")


def edit_labels(out: Path, scan: str) -> Path:
    """Remove half of the caudate, as a person does in a viewer."""
    (path,) = out.rglob(f"{scan}_seg-*_dseg.nii.gz")
    image = load_image(path)
    labels = np.asanyarray(image.dataobj).copy()
    caudate = np.argwhere(labels == 1)
    labels[tuple(caudate[: len(caudate) // 2].T)] = 0
    nib.Nifti1Image(labels, None, image.header).to_filename(path)
    return path


def exclusions(out: Path) -> dict[str, str]:
    """Return why scans are excluded by the group level."""
    table = read_tsv(out / "group" / "group_qc.tsv").set_index("participant_id")
    return {str(participant): str(why) for participant, why in table["excluded"].dropna().items()}


def test_edited_labels_stop_their_scan(dataset, out, run, capsys):
    first = contents(out)
    edited = edit_labels(out, "sub-01").read_bytes()
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
    (path,) = out.rglob("sub-01_seg-oracle_dseg.nii.gz")
    assert path.read_bytes() == edited
    path.write_bytes(first[str(path.relative_to(out))])  # restored
    assert run(dataset) == 0
    assert "all 2 scan(s) are up to date" in capsys.readouterr().out
    edit_labels(out, "sub-01")
    assert run(dataset, "--force", "--participant-label", "01") == 0
    assert {name: content for name, content in contents(out).items() if "group" not in name} == first


@pytest.mark.parametrize("kind", ["link", "pointer"])
def test_results_of_an_unfetched_map_stay_valid(dataset, out, run, capsys, kind):
    first = contents(out)
    for path in dataset.rglob("sub-01_Chimap.*" if kind == "link" else "sub-01_Chimap.nii.gz"):
        path.unlink()
        target = ".git/annex/objects/Xk/2f/MD5E-s9--0123456789abcdef.nii.gz/MD5E-s9--0123456789abcdef.nii.gz"
        if kind == "link":
            path.symlink_to(f"../../{target}")
        else:
            path.write_text(f"/annex/objects/{Path(target).name}\n")
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
        assert run(dataset, level="group") == 1
        assert exclusions(out)["sub-01"].endswith(f"({use}) has changed")
        path.write_bytes(content)


def test_results_without_inputs_stay_in(dataset, out, run, capsys):
    (dataset / "sub-02" / "anat" / "sub-02_Chimap.nii.gz").unlink()
    assert run(dataset, level="group") == 0
    assert exclusions(out) == {}
    assert "not checked for changes: 1 scan(s) whose inputs were not found" in capsys.readouterr().err


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
