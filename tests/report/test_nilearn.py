"""Outputs load in nilearn as docs/how-to/nilearn.md says."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.maskers import NiftiLabelsMasker

from bids_dgmseg.io.nifti import load_image

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "nilearn.md"


@pytest.fixture
def results(bids_dataset, run, tmp_path):
    """Folder of ``ds``, with an R2* map on another grid, and ``out``."""
    anat = bids_dataset() / "sub-01" / "anat"
    assert run(tmp_path / "ds", "--no-masks") == 0
    chi = load_image(anat / "sub-01_Chimap.nii.gz")
    halves = np.diag([1, 1, 0.5, 1])
    halves[2, 3] = -0.25  # two slices inside each slice of the chi map
    r2star = 20 + 100 * np.repeat(chi.get_fdata(), 2, axis=2)
    nib.Nifti1Image(r2star, chi.affine @ halves).to_filename(anat / "sub-01_R2starmap.nii.gz")
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_guide_runs_and_masker_gives_means_of_stats_table(results, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(results)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("dgm16", "oracle"), names)
    stats = pd.read_csv("out/sub-01/anat/sub-01_seg-oracle_stats.tsv", sep="\t").set_index("abbreviation")
    expected = stats.loc["DN_L"].to_dict()
    (mean,) = re.findall(r"^left dentate nucleus: (\S+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert float(mean) == pytest.approx(20 + 100 * expected["mean_ppm"], rel=5e-3)  # three digits
    assert names["volume_mm3"] == pytest.approx(expected["volume_pv_mm3"], rel=1e-3)
    assert Path("nuclei.png").stat().st_size > 0
    _check_masker(results)


def _check_masker(results):
    """The means of a NiftiLabelsMasker are those of the table."""
    anat = results / "out" / "sub-01" / "anat"
    stats = pd.read_csv(anat / "sub-01_seg-oracle_stats.tsv", sep="\t", na_values="n/a")
    for lut in (results / "out" / "dseg.tsv", anat / "sub-01_seg-oracle_dseg.tsv"):
        masker = NiftiLabelsMasker(str(anat / "sub-01_seg-oracle_dseg.nii.gz"), lut=str(lut), standardize=None)
        means = masker.fit_transform(str(results / "ds" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz")).ravel()
        present = stats[stats["n_voxels"] > 0]
        assert list(masker.region_names_.values()) == present["name"].tolist()
        assert means == pytest.approx(present["mean_ppm"], rel=1e-4)  # float32
