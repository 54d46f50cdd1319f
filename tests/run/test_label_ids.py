"""Labels written with the numbers of FreeSurfer: files agree with each other, and everything reads them rightly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bids_dgmseg.bids.label_ids import read_nuclei
from bids_dgmseg.cli.main import main as dgmseg
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.color_tables import read_color_table
from bids_dgmseg.models.structures import STRUCTURES
from tests.conftest import read_stats

IN_FREESURFER = {"CN_L": 11, "CN_R": 50, "PUT_L": 12, "PUT_R": 51, "GP_L": 13, "GP_R": 52, "SN_L": 27, "SN_R": 59}
IN_FREESURFER |= {"THA_L": 10, "THA_R": 49, "NAC_L": 26, "NAC_R": 58}
"""From FreeSurferColorLUT.txt: Left-Caudate, Left-Putamen, Left-Pallidum, Left-Substancia-Nigra, Left-Thalamus,
Left-Accumbens-area, and right."""


@pytest.fixture
def outputs(processed, tmp_path, run) -> tuple[Path, Path, Path]:
    """A dataset of one scan, results with the numbers of this program, and those with the numbers of FreeSurfer."""
    shutil.copytree(processed / "ds" / "sub-01", tmp_path / "ds" / "sub-01")
    for path in (processed / "ds").glob("*.*"):
        shutil.copy(path, tmp_path / "ds")
    assert run(tmp_path / "ds", "--label-ids", "freesurfer") == 0
    return tmp_path / "ds", processed / "out", tmp_path / "out"


def labels_of(out: Path) -> Path:
    (path,) = (out / "sub-01").rglob("*_dseg.nii.gz")
    return path


def numbers_of(table: Path) -> dict[str, int]:
    rows = read_tsv(table, dtype=str)
    return {name: int(index) for name, index in zip(rows["abbreviation"], rows["index"], strict=True)}


def test_files_agree_and_are_read_rightly(outputs, run, capsys, tmp_path):
    ds, plain, out = outputs
    every = numbers_of(out / "dseg.tsv")  # of all models
    assert len(set(every.values())) == len(every) == 28
    assert every.items() >= IN_FREESURFER.items()
    numbers = {one.abbreviation: every[one.abbreviation] for one in STRUCTURES}
    assert min(every[name] for name in every.keys() - IN_FREESURFER) > 20000
    before, after = (np.asanyarray(load_image(labels_of(folder)).dataobj) for folder in (plain, out))
    for one in STRUCTURES:
        np.testing.assert_array_equal(before == one.index, after == numbers[one.abbreviation])
    np.testing.assert_array_equal(before > 0, after > 0)
    assert numbers_of(labels_of(out).with_name(labels_of(out).name.replace(".nii.gz", ".tsv"))) == numbers
    stats = {name: int(row["index"]) for name, row in read_stats(out, "sub-01").items()}
    assert stats == {name: numbers[name] for name in stats}
    for name in ("freesurfer.txt", "itksnap.txt", "slicer.ctbl", "fsleyes.lut"):
        assert {one.name: one.index for one in read_color_table(out / "viewers" / name)} == every
    assert not (out / "viewers" / "mricrogl.lut").exists()  # has 256 entries
    np.testing.assert_array_equal(read_nuclei(labels_of(out)).array, read_nuclei(labels_of(plain)).array)

    # evaluation, corrections of some nuclei, resuming, group level
    result = tmp_path / "evaluation"
    assert dgmseg(["evaluate", str(labels_of(plain)), str(labels_of(out)), "--out", str(result)]) == 0
    assert set(read_tsv(result / "overlap.tsv")["dice"]) == {1}
    corrected = tmp_path / "corrected"
    assert dgmseg(["corrections", "init", str(out), str(corrected), "--nuclei", "CN", "--model", "oracle"]) == 0
    copied = np.asanyarray(load_image(labels_of(corrected)).dataobj)
    np.testing.assert_array_equal(copied, np.where(np.isin(after, [11, 50]), after, 0))
    assert {one.name: one.index for one in read_color_table(corrected / "viewers" / "itksnap.txt")} == every
    capsys.readouterr()
    assert run(ds, "--label-ids", "freesurfer", "--corrections", str(corrected)) == 0
    np.testing.assert_array_equal(np.asanyarray(load_image(labels_of(out)).dataobj), after)
    assert run(ds, "--label-ids", "freesurfer", "--corrections", str(corrected), "--dry-run") == 0
    assert "up to date" in capsys.readouterr().out
    assert run(ds, "--corrections", str(corrected), "--dry-run") == 0  # other numbers
    assert "would segment" in capsys.readouterr().out
