import json
from pathlib import Path

import pytest

from bids_dgmseg.bids.corrections import prepare_corrections
from bids_dgmseg.bids.dataset import dataset_roots, find_map
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS

MODEL = MODELS["dgm16"]


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


def test_unknown_scan_is_refused(output, tmp_path):
    with pytest.raises(InputError, match="sub-02: no results of dgm16 in out"):
        prepare_corrections(output, tmp_path / "c", MODEL, scans=["sub-02"])
    assert not (tmp_path / "c").exists()
