import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.corrections import prepare_corrections
from bids_dgmseg.bids.dataset import find_source
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES

MODEL = MODELS["dgm16"]
CAUDATE, PUTAMEN = (STRUCTURES.named(name).index for name in ("CN_L", "PUT_R"))


@pytest.fixture(params=["RAS", "LPS", "PIR"])
def output(request, tmp_path) -> Path:
    """Results of one scan, stored along other axes than those of the world."""
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[0, 1, 2], labels[3, 3, 5] = CAUDATE, PUTAMEN
    turned = nib.Nifti1Image(labels, np.diag([2.0, 2, 3, 1]))
    to = nib.orientations.axcodes2ornt(request.param)
    turned = turned.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(turned.affine), to))
    stem = tmp_path / "out" / "sub-01" / "anat" / "sub-01_seg-dgm16_dseg"
    stem.parent.mkdir(parents=True)
    turned.to_filename(f"{stem}.nii.gz")
    Path(f"{stem}.json").write_text(json.dumps({"Sources": ["bids:raw:sub-01/anat/sub-01_Chimap.nii.gz"]}))
    root: Path = tmp_path / "out"
    return root


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.Nifti1Image.from_filename(path)
    return np.asarray(image.dataobj), np.asarray(image.affine)


def test_chosen_nuclei_stay_in_place(output, tmp_path):
    (written,), kept = prepare_corrections(output, tmp_path / "corrections", MODEL, nuclei=["CN"])
    assert not kept
    (labels, affine), (before, grid) = (read(path) for path in (written, next(output.rglob("*.nii.gz"))))
    np.testing.assert_array_equal(labels, np.where(before == CAUDATE, CAUDATE, 0))
    np.testing.assert_array_equal(affine, grid)


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


@pytest.mark.parametrize("reconstructed", [False, True])
def test_map_of_a_correction_is_found(output, tmp_path, reconstructed):
    """Links are relative to the folder of each dataset, here at different depths."""
    root, name = (output, "") if reconstructed else (tmp_path / "my study", "raw")
    (output / "dataset_description.json").write_text(json.dumps({"DatasetLinks": {"raw": "../my%20study"}}))
    chi = root / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    chi.parent.mkdir(parents=True, exist_ok=True)
    chi.touch()
    (sidecar,) = output.rglob("*_dseg.json")
    uri = f"bids:{name}:sub-01/anat/sub-01_Chimap.nii.gz"
    sidecar.write_text(json.dumps({"Sources": [uri], "SpatialReference": uri}))
    (written,), _ = prepare_corrections(output, tmp_path / "a" / "b" / "corrections", MODEL)
    assert find_source(written, "Chimap") == chi


def test_unknown_scans_and_nuclei_are_refused(output, tmp_path):
    with pytest.raises(InputError, match="sub-02: no results of dgm16 in out"):
        prepare_corrections(output, tmp_path / "c", MODEL, scans=["sub-02"])
    with pytest.raises(InputError, match="XY: not a nucleus of dgm16"):
        prepare_corrections(output, tmp_path / "c", MODEL, nuclei=["XY"])
    assert not (tmp_path / "c").exists()
