import json

import nibabel as nib
import numpy as np

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.train.nnunet.step import NnunetCase, crop_to_cerebellum, write_raw_dataset


def make_case(part="train", name="sub-01") -> NnunetCase:
    chi = np.arange(10 * 8 * 6, dtype=np.float32).reshape(10, 8, 6)
    labels = np.zeros(chi.shape, np.uint8)
    labels[4, 3, 2], labels[6, 3, 2] = 1, 2
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-9, -7, -5)
    return NnunetCase(name, Volume(chi, affine), labels, part)


def test_crop_is_the_box_with_its_margin():
    case, cerebellum = make_case(), np.zeros((10, 8, 6), bool)
    cerebellum[4:7, 3:5, 2:4] = True
    cropped = crop_to_cerebellum(case, cerebellum, margin_mm=2.0)  # a voxel more on every side
    assert cropped.chi.shape == (5, 4, 4)
    np.testing.assert_array_equal(cropped.chi.array, case.chi.array[3:8, 2:6, 1:5])
    np.testing.assert_array_equal(np.argwhere(cropped.labels), [[1, 1, 1], [3, 1, 1]])
    assert cropped.chi.affine[:3, 3].tolist() == [-3.0, -3.0, -3.0]  # -9 + 3 * 2, -7 + 2 * 2, -5 + 1 * 2


def test_raw_dataset_omits_the_test_set(tmp_path):
    parts = write_raw_dataset(tmp_path / "raw", [make_case(), make_case("test", "sub-02")], ("DN_L", "DN_R"))
    assert parts == {"train": ["sub-01"], "tune": [], "test": ["sub-02"]}
    assert [path.name for path in (tmp_path / "raw" / "imagesTr").iterdir()] == ["sub-01_0000.nii.gz"]
    labels = nib.nifti1.load(tmp_path / "raw" / "labelsTr" / "sub-01.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), make_case().labels)
    dataset = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "DN_L": 1, "DN_R": 2}
    assert (dataset["numTraining"], dataset["orientation"]) == (1, "RAS")
