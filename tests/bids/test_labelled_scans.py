from types import SimpleNamespace

import nibabel as nib
import numpy as np

from bids_dgmseg.bids.labelled_scans import majority_vote, read_labelled_maps
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from tests.conftest import start_dataset, write_map


def test_majority_vote_prefers_background_in_ties():
    votes = [np.array(row, np.uint8) for row in ([1, 2, 0, 1], [1, 2, 2, 2], [0, 1, 1, 0])]
    assert majority_vote(votes).tolist() == [1, 2, 0, 0]


def test_bilateral_label_is_divided_at_the_midplane(tmp_path, monkeypatch):
    midplane = SimpleNamespace(is_right=lambda grid: grid.centres_mm()[..., 0] > 0)
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.find_regions", lambda chi: chi)
    monkeypatch.setattr("bids_dgmseg.registration.midplane.find_midplane", lambda chi, regions: midplane)
    grid = world_grid(Box((-75, -110, -80), (75, 74, 80)), (4.0, 4.0, 4.0))
    truth = PHANTOM.dseg(grid).array
    names = {row.index: row.nucleus if row.nucleus == "RN" else row.abbreviation for row in STRUCTURES}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()), 1)}
    start_dataset(tmp_path)
    chi = write_map(tmp_path, "sub-1", Volume(PHANTOM.chi(grid, seed=1).array, grid.affine))
    labels = np.array([0, *(numbers[names[number]] for number in sorted(names))], np.uint8)[truth]
    nib.Nifti1Image(labels, grid.affine).to_filename(str(chi).replace("Chimap", "dseg"))
    rows = [f"{number}\t{'red nucleus' if name == 'RN' else name}" for name, number in numbers.items()]
    (tmp_path / "dseg.tsv").write_text("\n".join(["index\tabbreviation", *rows]) + "\n", encoding="utf-8")
    said, shown = list[str](), list[str]()
    model = get_model("attunet25d")
    (read,) = read_labelled_maps(tmp_path, model, warn=said.append, progress=shown.append)
    assert shown == ["reading sub-1, 1 of 1"]
    expected = np.zeros(truth.shape, np.uint8)
    for channel, structure in enumerate(model.structures, 1):
        expected[truth == structure.index] = channel
    np.testing.assert_array_equal(read.channel_map.array, expected)
    assert "dseg.tsv: bilateral labels (RN) divided at the midplane of the head" in said


def test_extreme_voxel_is_clipped_as_for_prediction(tmp_path):
    grid = world_grid(Box((-75, -110, -80), (75, 74, 80)), (5.0, 5.0, 5.0))
    chi, truth = PHANTOM.chi(grid, seed=1).array.copy(), PHANTOM.dseg(grid).array
    chi[15, 18, 16] = 8.0  # ppm; in a z-score, all tissue beside it would have the same value
    start_dataset(tmp_path)
    path = write_map(tmp_path, "sub-1", Volume(chi, grid.affine))
    nib.Nifti1Image(truth, grid.affine).to_filename(str(path).replace("Chimap", "dseg"))
    (read,) = read_labelled_maps(tmp_path, get_model("dgm16"), warn=list[str]().append)
    assert read.chi.array[15, 18, 16] == 5
    chi[15, 18, 16] = 5
    np.testing.assert_array_equal(read.chi.array, chi)
