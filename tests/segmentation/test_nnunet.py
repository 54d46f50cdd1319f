import json
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.nnunet_folder import mirror_axes, read_checkpoint, read_folder
from bids_dgmseg.segmentation.nnunet import Network
from tests.segmentation.nnunet_folders import plans, predict_with_stock, write_folder


def write_noise(path: Path, axes: str, *, shape=(18, 22, 20), size_mm=(1.5, 1.7, 2.1)) -> Path:
    """Write one and the same noise in the axes given."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[:2] = 0  # what nnU-Net crops off
    image = nib.Nifti1Image(values, np.diag([*size_mm, 1]))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(axes)))
    image.as_reoriented(turn).to_filename(path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "PIR"])
@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1]], ids=["as read", "axes exchanged"])
def test_labels_equal_those_of_stock_nnunet(tmp_path, axes, transpose):
    folder = write_folder(tmp_path / "model", transpose_forward=transpose)
    image = write_noise(tmp_path / "c_0000.nii.gz", axes)
    stock = predict_with_stock(folder, image, tmp_path)
    fractions = Network(read_folder(folder), device="cpu", sided=True)(Volume.read(image))
    assert set(np.unique(stock.array)) == {0, 1, 2}
    np.testing.assert_array_equal(fractions.argmax(axis=0), stock.array)
    np.testing.assert_allclose(fractions.sum(axis=0)[2:], 1, atol=1e-5)


def test_left_and_right_are_never_mirrored(tmp_path):
    folder = write_folder(tmp_path / "model", mirror_axes=(0, 1, 2))
    image = write_noise(tmp_path / "c_0000.nii.gz", "LAS")
    without = predict_with_stock(folder, image, tmp_path, mirrored=(0, 1))  # z and y; x, the last, is left and right
    chi = Volume.read(image)
    np.testing.assert_array_equal(Network(read_folder(folder), device="cpu", sided=True)(chi).argmax(0), without.array)
    unsided = predict_with_stock(folder, image, tmp_path, mirrored=(0, 1, 2))
    np.testing.assert_array_equal(Network(read_folder(folder), device="cpu", sided=False)(chi).argmax(0), unsided.array)
    assert (without.array != unsided.array).any()


def test_stated_orientation_makes_storage_irrelevant(tmp_path):
    network = Network(
        read_folder(write_folder(tmp_path / "model", dataset={"orientation": "RAS"})), device="cpu", sided=True
    )
    as_ras, as_lpi = (network(Volume.read(write_noise(tmp_path / f"{axes}.nii.gz", axes))) for axes in ("RAS", "LPI"))
    np.testing.assert_array_equal(as_ras, as_lpi)


@pytest.mark.parametrize(
    ("axes", "transpose", "patch", "kept"),
    [
        pytest.param("RAS", [0, 1, 2], (8, 8, 8), (0, 1), id="z y x: x is last"),
        pytest.param("PIR", [0, 1, 2], (8, 8, 8), (1, 2), id="R I P: left and right come first"),
        pytest.param("RAS", [2, 0, 1], (8, 8, 8), (1, 2), id="x z y: nnU-Net puts x first"),
        pytest.param("RAS", [0, 1, 2], (8, 8), (0,), id="slices (y, x): x is the second"),
        pytest.param("RAS", [2, 0, 1], (8, 8), (0, 1), id="sagittal slices hold no left and right"),
    ],
)
def test_mirror_axes_exclude_left_right(tmp_path, axes, transpose, patch, kept):
    allowed = tuple(range(len(patch)))
    trained = read_folder(
        write_folder(tmp_path / "model", mirror_axes=allowed, transpose_forward=transpose, patch_size=patch)
    )
    assert mirror_axes(trained, axes, sided=True) == kept
    assert mirror_axes(trained, axes, sided=False) == allowed


def test_folds_are_averaged(tmp_path):
    folder = write_folder(tmp_path / "model", seed=1)
    other = write_folder(tmp_path / "other", seed=2)
    (other / "fold_0").rename(folder / "fold_1")
    image = write_noise(tmp_path / "c_0000.nii.gz", "RAS")
    stock = predict_with_stock(folder, image, tmp_path)
    trained = read_folder(folder)
    assert len(trained.parameters) == 2
    found = Network(trained, device="cpu", sided=True)(Volume.read(image)).argmax(axis=0)
    np.testing.assert_array_equal(found, stock.array)


def test_regions_become_labels_as_in_stock_nnunet(tmp_path):
    labels = {"background": 0, "both": [1, 2], "DN_R": [2]}
    folder = write_folder(tmp_path / "model", labels=labels, dataset={"regions_class_order": [1, 2]})
    reheaded = torch.load(folder / "fold_0" / "checkpoint_final.pth")
    for name in [name for name in reheaded["network_weights"] if "seg_layers" in name]:
        reheaded["network_weights"][name] = reheaded["network_weights"][name][:2]  # a head a region
    torch.save(reheaded, folder / "fold_0" / "checkpoint_final.pth")
    image = write_noise(tmp_path / "c_0000.nii.gz", "RAS")
    stock = predict_with_stock(folder, image, tmp_path)
    found = Network(read_folder(folder), device="cpu", sided=True)(Volume.read(image)).argmax(axis=0)
    np.testing.assert_array_equal(found, stock.array)


def test_unknown_trainer_uses_the_plans_network(tmp_path):
    image = Volume.read(write_noise(tmp_path / "c.nii.gz", "RAS"))
    known, unknown = (
        Network(read_folder(write_folder(tmp_path / name, trainer=name)), device="cpu", sided=True)(image)
        for name in ("nnUNetTrainer", "TrainerOfMine")
    )
    np.testing.assert_array_equal(known, unknown)


class Mischief:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.putenv, ("MISCHIEF", "managed")


def test_checkpoint_with_code_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    torch.save({"network_weights": Mischief()}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError, match=r"^fold_0/checkpoint_final.pth: contains more than numbers and could run"):
        read_folder(folder)


def test_numpy_scalars_in_checkpoints_are_read(tmp_path):
    values = {"loss": [np.float64(0.5), np.float32(0.25)], "epoch": np.int64(3), "good": np.bool_(True)}
    torch.save(values, tmp_path / "c.pth", pickle_protocol=2)
    assert read_checkpoint(tmp_path / "c.pth") == values
    assert pickle.dumps(values)  # numbers, not stand-ins


def test_foreign_network_is_not_imported(tmp_path):
    folder = write_folder(tmp_path / "model")
    content = plans()
    content["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "antigravity.Net"
    (folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"^model/plans.json: antigravity.Net is not part of nnU-Net and is not run"):
        read_folder(folder)


def test_weights_of_another_plan_are_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    content = plans()
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 16]
    (folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"^model: the weights do not fit the network of plans.json"):
        Network(read_folder(folder), device="cpu", sided=True)


def spoil(folder: Path, how: str) -> None:
    if how == "no fold":
        (folder / "fold_0" / "checkpoint_final.pth").unlink()
    elif how == "cut short":
        path = folder / "fold_0" / "checkpoint_final.pth"
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "no plans":
        (folder / "plans.json").unlink()
    else:
        path = folder / "dataset.json"
        content = json.loads(path.read_text())
        content.update({"channel_names": {"0": "QSM", "1": "T1w"}} if how == "two channels" else {"orientation": "RAX"})
        path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "no fold",
            r"model: fold_N/checkpoint_final.pth or fold_N/checkpoint_best.pth not found; copy the whole",
        ),
        ("cut short", r"^fold_0/checkpoint_final.pth: damaged or truncated; copy it again"),
        ("no plans", r"^model/plans.json: missing or damaged; copy the whole nnU-Net model folder$"),
        ("no axes", r"^model/dataset.json: orientation 'RAX' is invalid; write one such as RAS$"),
        ("two channels", r"^model: its network needs 2 images per scan, but there is only the chi map"),
    ],
)
def test_unusable_folder_is_refused(tmp_path, how, message):
    folder = write_folder(tmp_path / "model")
    spoil(folder, how)
    with pytest.raises(InputError, match=message):
        read_folder(folder)


def test_one_checkpoint_per_fold_is_read(tmp_path):
    folder = write_folder(tmp_path / "model", seed=1)  # with a final checkpoint, the second fold with the best one only
    (write_folder(tmp_path / "other", seed=2) / "fold_0").rename(folder / "fold_1")
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_best.pth")
    (write_folder(tmp_path / "all", seed=3) / "fold_0").rename(folder / "fold_all")
    assert len(read_folder(folder).parameters) == 2


def test_environment_stays_unchanged(tmp_path, monkeypatch, capsys):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_compile", "true")
    before = dict(os.environ)
    network = Network(read_folder(write_folder(tmp_path / "model")), device="cpu", sided=True)
    network(Volume.read(write_noise(tmp_path / "c.nii.gz", "RAS")))
    assert dict(os.environ) == before
    assert capsys.readouterr().out == ""
