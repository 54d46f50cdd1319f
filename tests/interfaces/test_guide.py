"""The code in docs/how-to/nipype.md."""

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import coarse_chi

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "nipype.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def _in_folder_with_a_map(tmp_path, monkeypatch, oracle):
    chi = coarse_chi()
    nib.Nifti1Image(chi.array, chi.affine).to_filename(tmp_path / "sub-01_Chimap.nii.gz")
    for echo in (1, 2):
        for part in ("phase", "mag"):
            (tmp_path / f"echo-{echo}_{part}.nii.gz").touch()
    monkeypatch.chdir(tmp_path)


def test_one_step_runs_as_written():
    names: dict[str, Any] = {}
    exec(BLOCKS[0].replace("dgm16", "oracle"), names)
    assert np.count_nonzero(np.asarray(nib.Nifti1Image.from_filename(names["labels"]).dataobj)) > 0


@pytest.mark.filterwarnings("ignore")  # Nipype warns of FSL and ANTs that are not installed
def test_workflows_connect_as_written(tmp_path):
    names: dict[str, Any] = {}
    for block in BLOCKS[1:]:
        block = block.replace("/study/derivatives/qsmxt", str(tmp_path))
        exec(re.sub(r"^study\.run.*$", "", block, flags=re.MULTILINE), names)
    study = names["study"]
    edges = {(source.name, target.name) for source, target in study._graph.edges()}
    assert {
        ("maps", "dgmseg_wf"),
        ("dgmseg_wf", "mean"),
        ("dgmseg_wf", "warp"),
        ("reconstruct_wf", "from_echoes_wf"),
    } <= edges
