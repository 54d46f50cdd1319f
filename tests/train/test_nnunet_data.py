import json
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.train.nnunet.data import Case, crop_to_cerebellum, split_by_site, write_raw


def test_each_site_is_split_seventy_ten_twenty():
    sites = {f"{site}{number}": site for site, count in (("A", 20), ("B", 10)) for number in range(count)}
    parts = split_by_site(sites, seed=1)
    for site, expected in (("A", {"train": 14, "tune": 2, "test": 4}), ("B", {"train": 7, "tune": 1, "test": 2})):
        assert Counter(parts[name] for name in sites if sites[name] == site) == expected
    assert split_by_site(sites, seed=1) == parts
    assert split_by_site(sites, seed=2) != parts


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
def test_from_three_participants_on_no_part_is_empty(count):
    assert set(split_by_site({str(number): "n/a" for number in range(count)}, seed=1).values()) == {
        "train",
        "tune",
        "test",
    }


def test_two_participants_are_both_learned_from_or_tested():
    assert "train" in split_by_site({"a": "n/a", "b": "n/a"}, seed=1).values()


def make_case(part="train", name="sub-01") -> Case:
    chi = np.arange(10 * 8 * 6, dtype=np.float32).reshape(10, 8, 6)
    labels = np.zeros(chi.shape, np.uint8)
    labels[4, 3, 2], labels[6, 3, 2] = 1, 2
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-9, -7, -5)
    return Case(name, Volume(chi, affine), labels, part)


def test_step_two_learns_from_the_box_of_the_cerebellum_and_its_margin():
    case, cerebellum = make_case(), np.zeros((10, 8, 6), bool)
    cerebellum[4:7, 3:5, 2:4] = True
    cropped = crop_to_cerebellum(case, cerebellum, margin_mm=2.0)  # a voxel more on every side
    assert cropped.chi.shape == (5, 4, 4)
    np.testing.assert_array_equal(cropped.chi.array, case.chi.array[3:8, 2:6, 1:5])
    np.testing.assert_array_equal(np.argwhere(cropped.labels), [[1, 1, 1], [3, 1, 1]])
    assert cropped.chi.affine[:3, 3].tolist() == [-3.0, -3.0, -3.0]  # -9 + 3 * 2, -7 + 2 * 2, -5 + 1 * 2


def test_a_raw_dataset_has_all_but_the_scans_to_test(tmp_path):
    parts = write_raw(tmp_path / "raw", [make_case(), make_case("test", "sub-02")], ("DN_L", "DN_R"))
    assert parts == {"train": ["sub-01"], "tune": [], "test": ["sub-02"]}
    assert [path.name for path in (tmp_path / "raw" / "imagesTr").iterdir()] == ["sub-01_0000.nii.gz"]
    labels = nib.nifti1.load(tmp_path / "raw" / "labelsTr" / "sub-01.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), make_case().labels)
    dataset = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "DN_L": 1, "DN_R": 2}
    assert (dataset["numTraining"], dataset["orientation"]) == (1, "RAS")
