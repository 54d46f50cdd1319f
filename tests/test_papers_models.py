"""The app end to end with each paper's network: its plumbing, with weights that were never trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.models.model_folder import save_weights, segmenter_network, write_model_toml
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.segmentation.segment import segment_map
from tests.conftest import HEAD, coarse_chi, read_stats

pytestmark = pytest.mark.usefixtures("coarse_midplane")

SMALL = {
    "dcnnet": {"initial_features": 2, "growth": 2, "dilations": [[1], [1, 2]], "bottleneck_layers": 1},
    "attunet25d": {"features": [2, 4, 8], "scales": 2},
    "deepqsmseg": {"features": [2, 4], "blocks": [1, 1], "attended": 1},
}
"""Arguments that make each network quick."""
NUCLEI = {"dcnnet": "DN IN", "attunet25d": "RN SN STN", "deepqsmseg": "CN PUT GP SN RN"}


def untrained(name: str, folder: Path) -> Path:
    """Write a model folder of random weights, as a training would leave it."""
    model = replace(MODELS[name], arch={**MODELS[name].arch, **SMALL[name]})
    torch.manual_seed(0)
    save_weights(segmenter_network(model).state_dict(), folder / "fold_0.safetensors")
    write_model_toml(model, folder, about={"licence": "CC0-1.0", "trained_on": "nothing"})
    if model.localizer.kind == "atlas":
        (folder / "references").mkdir()
        grid = world_grid(HEAD, (3.0, 3.0, 3.0))
        for kind, volume in (("Chimap", PHANTOM.chi(grid, supersampling=1)), ("dseg", PHANTOM.dseg(grid))):
            nib.Nifti1Image(volume.array, grid.affine).to_filename(folder / "references" / f"phantom_{kind}.nii.gz")
    return folder


@pytest.mark.parametrize("name", list(SMALL))
def test_each_network_writes_only_its_nuclei(name, bids_dataset, tmp_path, capsys):
    dataset, out = bids_dataset("sub-01"), tmp_path / "out"
    folder = untrained(name, tmp_path / "weights")
    arguments = ["--model", name, "--weights", str(folder), "--device", "cpu", "--nprocs", "1", "--no-viewer"]
    arguments.append("--skip-bids-validation")
    assert main([str(dataset), str(out), "participant", "-w", str(tmp_path / "work"), *arguments]) == 0
    expected = [f"{nucleus}_{side}" for nucleus in NUCLEI[name].split() for side in "LR"]
    assert list(read_stats(out)) == expected
    probseg = load_image(next(out.rglob(f"*_seg-{name}_probseg.nii.gz")))
    assert probseg.shape[3] == len(expected)
    numbers = np.unique(np.asanyarray(load_image(next(out.rglob(f"*_seg-{name}_dseg.nii.gz"))).dataobj))
    assert set(numbers.tolist()) <= {0, *(structure.index for structure in MODELS[name].structures)}
    assert name in (out / "sub-01.html").read_text("utf-8")


def test_unsided_networks_split_left_and_right(tmp_path, monkeypatch):
    def everywhere_red_nucleus(logits, groups, *, temperatures):
        probabilities = torch.zeros_like(logits)
        probabilities[:, 1] = 1
        return probabilities

    monkeypatch.setattr("bids_dgmseg.segmentation.predict.softmax_heads", everywhere_red_nucleus)
    chi = coarse_chi()
    dseg = segment_map(chi, MODELS["attunet25d"], weights=untrained("attunet25d", tmp_path / "weights")).labels
    for number, side in ((5, -1), (6, 1)):
        x_mm = nib.affines.apply_affine(chi.affine, np.argwhere(dseg == number))[:, 0]
        assert (side * x_mm > -1.5).all()  # half a voxel of 2.5 mm about the phantom's midplane, x = 0
        assert len(x_mm) > 100
