import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.corrections import apply_correction, find_corrections, prepare_corrections
from bids_dgmseg.bids.current import InputFile, MadeFrom, write_record
from bids_dgmseg.bids.dataset import dataset_roots, find_map
from bids_dgmseg.bids.entities import ScanName
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import sha256
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES

MODEL = MODELS["dgm16"]
CN_L, PUT_L = (STRUCTURES.named(name).index for name in ("CN_L", "PUT_L"))


@pytest.fixture
def output(tmp_path) -> Path:
    """Results of one scan."""
    root: Path = tmp_path / "out"
    stem = root / "sub-01" / "anat" / "sub-01_seg-dgm16_dseg"
    stem.parent.mkdir(parents=True)
    for extension in (".nii.gz", ".tsv"):
        Path(f"{stem}{extension}").write_bytes(extension.encode())
    Path(f"{stem}.json").write_text(json.dumps({"Sources": ["bids:raw:sub-01/anat/sub-01_Chimap.nii.gz"]}))
    return root


def test_correction_is_never_replaced(output, tmp_path):
    folder = tmp_path / "corrections"
    (written,), _ = prepare_corrections(output, folder, MODEL)
    before = next(output.rglob("*.nii.gz"))
    assert written.read_bytes() == before.read_bytes()
    written.write_bytes(b"edited")
    assert prepare_corrections(output, folder, MODEL) == ([], [written])
    assert written.read_bytes() == b"edited"


@pytest.fixture
def drawn(output, tmp_path) -> tuple[Path, Path, Volume]:
    """Return a correction in which the caudate lacks a voxel, its map, and other automatic labels of this map."""
    anat, chi = output / "sub-01" / "anat", tmp_path / "sub-01_Chimap.nii.gz"
    chi.write_bytes(b"a map")
    array = np.zeros((4, 5, 6), np.uint8)
    array[0, 0, :4], array[2, 0, :4] = CN_L, PUT_L
    dseg, record = anat / "sub-01_seg-dgm16_dseg.nii.gz", anat / "sub-01_seg-dgm16_qc.json"
    nib.Nifti1Image(array, np.eye(4)).to_filename(dseg)
    dseg.with_name("sub-01_seg-dgm16_dseg.tsv").write_text(label_table(MODEL.structures))
    outputs = {dseg.relative_to(output).as_posix(): sha256(dseg)}
    write_record(record, {}, MadeFrom(inputs={"map": InputFile(chi)}).describe(), outputs, output)
    (correction,), _ = prepare_corrections(output, tmp_path / "corrections", MODEL)
    edited = array.copy()
    edited[0, 0, 0] = 0
    nib.Nifti1Image(edited, np.eye(4)).to_filename(correction)
    array[2, 0, 4] = PUT_L  # as of other weights
    return correction, chi, Volume(array, np.eye(4))


def test_only_nuclei_that_were_drawn_are_corrected(drawn):
    correction, chi, automatic = drawn
    edited = apply_correction(automatic, correction, MODEL, source=chi)
    assert edited.dice == {"CN_L": pytest.approx(6 / 7)}
    assert not edited.warnings
    assert np.count_nonzero(edited.labels == CN_L) == 3
    assert np.array_equal(edited.labels == PUT_L, automatic.array == PUT_L)


def test_correction_drawn_on_another_map_is_refused(drawn):
    correction, chi, automatic = drawn
    chi.write_bytes(b"another map")
    with pytest.raises(InputError, match=r"^sub-01_seg-dgm16_dseg.nii.gz: was drawn on a different map from sub-01_"):
        apply_correction(automatic, correction, MODEL, source=chi)


def test_correction_without_a_record_is_applied_and_not_checked(drawn):
    correction, chi, automatic = drawn
    correction.with_name("sub-01_seg-dgm16_dseg.json").unlink()
    table = label_table([row for row in MODEL.structures if row.abbreviation != "CN_L"])
    correction.with_name("sub-01_seg-dgm16_dseg.tsv").write_text(table)
    nib.Nifti1Image(np.where(automatic.array == PUT_L, PUT_L, 0).astype(np.uint8), np.eye(4)).to_filename(correction)
    edited = apply_correction(automatic, correction, MODEL, source=chi)
    assert edited.warnings == [f"{correction.name}: source map not recorded, so it cannot be checked"]
    assert np.array_equal(edited.labels, automatic.array)  # the caudate is not in its table


def test_labels_in_standard_space_are_not_corrected(output, tmp_path):
    for path in list(output.rglob("*_dseg.*")):
        copy = path.with_name(path.name.replace("_seg-", "_space-MNI152NLin2009cAsym_seg-"))
        copy.write_bytes(path.read_bytes())
    (written,), _ = prepare_corrections(output, tmp_path / "corrections", MODEL)
    assert written.name == "sub-01_seg-dgm16_dseg.nii.gz"


def test_map_of_a_correction_is_found(output, tmp_path):
    """Links are relative to the folder of each dataset, here at different depths."""
    (output / "dataset_description.json").write_text(json.dumps({"DatasetLinks": {"raw": "../my%20study"}}))
    chi = tmp_path / "my study" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    chi.parent.mkdir(parents=True)
    chi.touch()
    folder = tmp_path / "a" / "b" / "corrections"
    (written,), _ = prepare_corrections(output, folder, MODEL)
    path = find_map(written.with_name("sub-01_seg-dgm16_dseg.json"), dataset_roots(folder))
    assert path is not None
    assert path.resolve() == chi


def test_correction_of_no_scan_or_nucleus_is_refused(drawn, tmp_path):
    correction, chi, automatic = drawn
    with pytest.raises(InputError, match=r"^sub-01_seg-dgm16_dseg.nii.gz: matches no scan, or there is another"):
        find_corrections(tmp_path / "corrections", [ScanName("02", None, {})], MODEL, selection=Selection())
    table = correction.with_name("sub-01_seg-dgm16_dseg.tsv")
    table.write_text(table.read_text().replace("CN_L", "hippocampus").replace("left caudate nucleus", "hippocampus"))
    with pytest.raises(InputError, match=r"^sub-01_seg-dgm16_dseg.nii.gz: hippocampus is not a nucleus of dgm16; choo"):
        apply_correction(automatic, correction, MODEL, source=chi)
    table.unlink()
    with pytest.raises(InputError, match=r"^sub-01_seg-dgm16_dseg.nii.gz: no label table beside it"):
        apply_correction(automatic, correction, MODEL, source=chi)


def test_unknown_scan_is_refused(output, tmp_path):
    with pytest.raises(InputError, match="sub-02: no results of dgm16 in out"):
        prepare_corrections(output, tmp_path / "c", MODEL, scans=["sub-02"])
    assert not (tmp_path / "c").exists()
