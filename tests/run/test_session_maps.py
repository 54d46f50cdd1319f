"""Further maps and excluded voxels from the command line to tables and pages."""

import json

import nibabel as nib
import numpy as np

from tests.conftest import coarse_chi, contents, read_stats


def test_sampled_maps_and_masks_reach_table_and_page(bids_dataset, run, tmp_path, capsys):
    dataset, chi = bids_dataset("sub-01"), coarse_chi()
    path = dataset / "sub-01" / "anat" / "sub-01_R2starmap.nii.gz"
    nib.Nifti1Image(np.where(chi.array != 0, np.float32(25), 0), chi.affine).to_filename(path)
    options = ["--further-maps", "R2starmap", "T1map"]
    assert run(dataset, *options) == 0
    printed = capsys.readouterr()
    assert "sub-01: T1map missing; its columns are n/a" in printed.out + printed.err
    rows = read_stats(tmp_path / "out")
    assert float(rows["PUT_L"]["R2starmap_mean_per_s"]) == 25
    assert "excluded_fraction" not in rows["PUT_L"]
    page = (tmp_path / "out" / "sub-01.html").read_text(encoding="utf-8")
    assert "R2starmap (1/s)" in page
    (figure,) = (tmp_path / "out" / "figures").glob("*R2starmapFurtherMap_dseg.png")
    assert f'src="figures/{figure.name}"' in page
    before = contents(tmp_path / "out")
    assert run(dataset, *options) == 0
    assert "up to date" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before

    assert run(dataset, "--dry-run") == 0  # without the maps
    assert "would segment" in capsys.readouterr().out

    labels = next((tmp_path / "out").rglob("*_seg-*_dseg.nii.gz"))
    image = nib.Nifti1Image.from_filename(labels)
    index = int(rows["PUT_L"]["index"])
    mask = tmp_path / "lesions" / "sub-01" / "anat" / "sub-01_label-lesion_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    half = (np.asarray(image.dataobj) == index) & (np.indices(image.shape)[2] % 2 == 0)
    nib.Nifti1Image(half.astype(np.uint8), image.affine).to_filename(mask)
    assert run(dataset, *options, "--lesion-masks", str(mask.parents[2])) == 0
    after = read_stats(tmp_path / "out")["PUT_L"]
    n_voxels = int(rows["PUT_L"]["n_voxels"])
    assert int(after["n_voxels"]) == n_voxels - half.sum()
    assert int(after["R2starmap_n_valid"]) == n_voxels - half.sum()
    assert float(after["excluded_fraction"]) == half.sum() / n_voxels
    record = json.loads(next((tmp_path / "out").rglob("*_qc.json")).read_text(encoding="utf-8"))
    assert record["excluded"]["files"] == ["sub-01_label-lesion_mask.nii.gz"]
    assert (
        next((tmp_path / "out").rglob("*_seg-*_dseg.nii.gz")).read_bytes()
        == before[str(labels.relative_to(tmp_path / "out"))]
    )
