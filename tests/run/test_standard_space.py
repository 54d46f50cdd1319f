"""Results in standard space of the app: names, sidecars, reruns."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.registration import mni
from tests.conftest import contents
from tests.test_promise import VALIDATOR, validate

SPACE = "MNI152NLin2009cAsym"


@pytest.fixture(autouse=True)
def _few_iterations(monkeypatch):
    monkeypatch.setattr(mni, "_ITERATIONS", 2)


def test_files_in_standard_space(run, bids_dataset, tmp_path):
    dataset = bids_dataset()
    (chi,) = dataset.rglob("*_Chimap.nii.gz")  # stored along other axes
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt("PIR"))
    load_image(chi).as_reoriented(turn).to_filename(chi)
    assert run(dataset, "--output-space", f"{SPACE}:res-2") == 0
    both = contents(tmp_path / "out" / "sub-01")

    folder = tmp_path / "out" / "sub-01" / "anat"
    names = {path.name for path in folder.glob(f"*{SPACE}*")}
    stems = (
        f"sub-01_space-{SPACE}_res-2_desc-oracle_Chimap",
        f"sub-01_space-{SPACE}_seg-oracle_res-2_dseg",
        f"sub-01_space-{SPACE}_seg-oracle_res-2_probseg",
        f"sub-01_from-Chimap_to-{SPACE}_mode-image_desc-oracle_xfm",
        f"sub-01_from-{SPACE}_to-Chimap_mode-image_desc-oracle_xfm",
    )
    expected = {f"{stem}{extension}" for stem in stems for extension in (".nii.gz", ".json")}
    assert names == expected | {"sub-01_space-MNI152NLin2009cAsym_seg-oracle_res-2_dseg.tsv"}
    assert json.loads((folder / f"{stems[0]}.json").read_text())["Resolution"] == "2 mm"
    dseg = nib.Nifti1Image.from_filename(folder / f"{stems[1]}.nii.gz")
    assert dseg.shape == (97, 115, 97)
    assert np.array_equal(dseg.affine, mni.standard_grid(2).affine)
    labels, mapped = np.asarray(dseg.dataobj), load_image(folder / f"{stems[0]}.nii.gz").get_fdata()
    for structure in STRUCTURES:
        x = nib.affines.apply_affine(dseg.affine, np.argwhere(labels == structure.index))[:, 0].mean()
        assert (x < 0) == (structure.hemisphere == "L")
    for name in ("PUT_L", "PUT_R"):
        inside = labels == STRUCTURES.named(name).index
        assert mapped[inside].mean() == pytest.approx(PHANTOM.chi_ppm[name], abs=0.01)
    if VALIDATOR:
        validate(tmp_path / "out", tmp_path / "deno")

    # A run without the option removes them; the page and later runs do not take them for scans.
    with pytest.raises(InputError):  # not even as scans of another run
        find_scans(open_inputs(tmp_path / "out", output_dir=tmp_path / "other"))
    assert run(dataset) == 0
    assert not list(folder.glob(f"*{SPACE}*"))
    # The results on the grid of the scan do not depend on the option.
    native = contents(tmp_path / "out" / "sub-01")
    same = {name: content for name, content in native.items() if name.endswith(".nii.gz") or "_stats" in name}
    assert same.items() <= both.items()


def test_scans_with_the_same_names_in_standard_space_are_refused(run, bids_dataset, capsys):
    dataset = bids_dataset()
    anat = dataset / "sub-01" / "anat"
    (anat / "sub-01_space-T1w_Chimap.nii.gz").write_bytes((anat / "sub-01_Chimap.nii.gz").read_bytes())
    (anat / "sub-01_space-T1w_Chimap.json").write_bytes((anat / "sub-01_Chimap.json").read_bytes())
    assert run(dataset, "--output-space", SPACE) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"sub-01 and sub-01_space-T1w would get the same files in {SPACE}; select one of them with --" in said
