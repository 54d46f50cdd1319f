import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import box_of_mask
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.nnunet_folder import mirror_axes, read_folder, read_labels
from bids_dgmseg.models.registry import MODELS, Weights, get_model
from bids_dgmseg.segmentation.engines import NnunetEngine, NnunetNetwork, choose_labels
from bids_dgmseg.segmentation.predict import InferenceOptions
from bids_dgmseg.segmentation.segment import check_ready
from tests.conftest import coarse_chi
from tests.segmentation.nnunet_folders import plans, predict_with_stock, write_folder


def write_noise(path: Path, axes: str, *, shape=(18, 22, 20), size_mm=(1.5, 1.7, 2.1)) -> Path:
    """Write the same noise in given axes."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[:2] = 0  # nnU-Net crops this
    image = nib.Nifti1Image(values, np.diag([*size_mm, 1]))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(axes)))
    image.as_reoriented(turn).to_filename(path)
    return path


def labels_of(folder: Path, image: Path, *, sided: bool = True) -> Any:
    return NnunetNetwork(read_folder(folder), device="cpu", sided=sided)(Volume.read(image)).argmax(axis=0)


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize(("axes", "transpose"), [("LAS", [0, 1, 2]), ("PIR", [2, 0, 1])])
def test_labels_equal_those_of_stock_nnunet(tmp_path, axes, transpose):
    folder = write_folder(tmp_path / "model", transpose_forward=transpose)
    image = write_noise(tmp_path / "c_0000.nii.gz", axes)
    stock = predict_with_stock(folder, image, tmp_path)
    fractions = NnunetNetwork(read_folder(folder), device="cpu", sided=True)(Volume.read(image))
    assert set(np.unique(stock.array)) == {0, 1, 2}
    np.testing.assert_array_equal(fractions.argmax(axis=0), stock.array)
    np.testing.assert_allclose(fractions.sum(axis=0)[2:], 1, atol=1e-5)


@pytest.mark.usefixtures("without_bfloat16")
def test_left_and_right_are_never_mirrored(tmp_path):
    folder = write_folder(tmp_path / "model", mirror_axes=(0, 1, 2))
    image = write_noise(tmp_path / "c_0000.nii.gz", "LAS")
    without = predict_with_stock(folder, image, tmp_path, mirrored=(0, 1)).array  # z and y; the last, x, is left-right
    unsided = predict_with_stock(folder, image, tmp_path, mirrored=(0, 1, 2)).array
    np.testing.assert_array_equal(labels_of(folder, image), without)
    np.testing.assert_array_equal(labels_of(folder, image, sided=False), unsided)
    assert (without != unsided).any()


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
    folder = write_folder(tmp_path / "model", mirror_axes=allowed, transpose_forward=transpose, patch_size=patch)
    trained = read_folder(folder)
    assert mirror_axes(trained, axes, sided=True) == kept
    assert mirror_axes(trained, axes, sided=False) == allowed


@pytest.mark.usefixtures("without_bfloat16")
def test_folds_are_averaged(tmp_path):
    folder, image = write_folder(tmp_path / "model", seed=1), write_noise(tmp_path / "c_0000.nii.gz", "RAS")
    (write_folder(tmp_path / "other", seed=2) / "fold_0").rename(folder / "fold_1")
    stock = predict_with_stock(folder, image, tmp_path)
    np.testing.assert_array_equal(labels_of(folder, image), stock.array)
    # The second fold with its best checkpoint only; `fold_all` is used if there is no other.
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_best.pth")
    (write_folder(tmp_path / "all", seed=3) / "fold_0").rename(folder / "fold_all")
    np.testing.assert_array_equal(labels_of(folder, image), stock.array)


@pytest.mark.usefixtures("without_bfloat16")
def test_regions_become_labels_as_in_stock_nnunet(tmp_path):
    labels = {"background": 0, "both": [1, 2], "DN_R": [2]}
    folder = write_folder(tmp_path / "model", labels=labels, dataset={"regions_class_order": [1, 2]})
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth")
    for name in [name for name in checkpoint["network_weights"] if "seg_layers" in name]:
        checkpoint["network_weights"][name] = checkpoint["network_weights"][name][:2]  # one head per region
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    image = write_noise(tmp_path / "c_0000.nii.gz", "RAS")
    np.testing.assert_array_equal(labels_of(folder, image), predict_with_stock(folder, image, tmp_path).array)


class Malicious:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.putenv, ("MALICIOUS", "1")


def test_checkpoint_with_code_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    torch.save({"network_weights": Malicious()}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError, match=r"^fold_0/checkpoint_final.pth: contains more than numbers and could run"):
        read_folder(folder)


HOSTILE = "torch.nn.parallel.distributed.os.system"  # begins like the name of a layer

BY_NAME = {
    "network_class_name": [],
    "arch_kwargs.nonlin": ["nonlin"],
    "arch_kwargs.conv_op": [],  # nnUNetTrainerBN imports it, required or not
    "arch_kwargs.n_stages": ["n_stages"],
    "preprocessor_name": [],
    **{f"resampling_fn_{what}": [] for what in ("data", "seg", "probabilities")},
    "normalization_schemes": [],
    "label_manager": [],
}
"""Place of a name in the plans, and the arguments of the network that nnU-Net shall import."""


def spoil(content: dict[str, Any], key: str) -> None:
    """Write a hostile name at a place."""
    settings = content["configurations"]["3d_fullres"]
    arch, (first, _, name) = settings["architecture"], key.partition(".")
    arch["_kw_requires_import"] = BY_NAME[key]
    place = next(part for part in (arch, settings, content) if first in part)
    if name:
        place[first][name] = HOSTILE
    else:
        place[first] = [HOSTILE] if isinstance(place[first], list) else HOSTILE


@pytest.fixture
def called(monkeypatch):
    """Commands that anything passes to ``os.system``."""
    commands: list[Any] = []
    monkeypatch.setattr(os, "system", lambda *command, **named: commands.append((command, named)))
    return commands


@pytest.mark.parametrize(("key", "inherited"), [*((key, False) for key in BY_NAME), ("preprocessor_name", True)])
def test_names_outside_nnunet_are_not_looked_up(tmp_path, called, key, inherited):
    folder, content = write_folder(tmp_path / "model", trainer="nnUNetTrainerBN"), plans()
    settings = content["configurations"]["3d_fullres"]
    spoil(content, key)
    if inherited:
        content["configurations"] = {"base": settings, "3d_fullres": {"inherits_from": "base"}}
    (folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"^model/plans.json: {key} is '{HOSTILE}', which is not part of nnU-Net and"):
        NnunetNetwork(read_folder(folder), device="cpu", sided=True)
    assert not called


def old_plans(**changes: Any) -> dict[str, Any]:
    """Rewrite `plans` as nnU-Net 2.0 wrote them, without the block ``architecture``."""
    content = plans()
    settings = content["configurations"]["3d_fullres"]
    arch = settings.pop("architecture")["arch_kwargs"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": arch["features_per_stage"][0],
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arch["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arch["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": arch["strides"],
        "conv_kernel_sizes": arch["kernel_sizes"],
        **changes,
    }
    return content


def test_plans_of_the_old_layout_are_read_as_the_new_one(tmp_path, called):
    image = write_noise(tmp_path / "c_0000.nii.gz", "RAS")
    expected = labels_of(write_folder(tmp_path / "new"), image)
    folder = write_folder(tmp_path / "model")
    (folder / "plans.json").write_text(json.dumps(old_plans()))
    np.testing.assert_array_equal(labels_of(folder, image), expected)
    for key in ("UNet_class_name", "preprocessor_name"):
        (folder / "plans.json").write_text(json.dumps(old_plans(**{key: HOSTILE})))
        with pytest.raises(InputError, match=rf"^model/plans.json: {key} is '{HOSTILE}', which is not part of nnU-Net"):
            read_folder(folder)
    assert not called


def test_names_that_are_not_needed_are_not_looked_up(tmp_path, called):
    image, unused = write_noise(tmp_path / "c_0000.nii.gz", "RAS"), {"overwrite_image_reader_writer": HOSTILE}
    expected = labels_of(write_folder(tmp_path / "plain"), image)
    folder, content = write_folder(tmp_path / "model", trainer=HOSTILE, dataset=unused), plans()
    content |= {"image_reader_writer": HOSTILE, "experiment_planner_used": HOSTILE}
    (folder / "plans.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(labels_of(folder, image), expected)
    np.testing.assert_array_equal(labels_of(write_folder(tmp_path / "short", trainer="os"), image), expected)
    assert not called


@pytest.mark.usefixtures("without_bfloat16")
def test_trainer_with_batch_normalization_builds_its_network(tmp_path):
    pytest.importorskip("timm", reason="stock nnU-Net imports all trainers to find one by its name")
    batch = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}
    arch = plans()["configurations"]["3d_fullres"]["architecture"]
    changed = {**arch, "arch_kwargs": {**arch["arch_kwargs"], **batch}}
    folder = write_folder(tmp_path / "model", trainer="nnUNetTrainerBN", architecture=changed)
    (folder / "plans.json").write_text(json.dumps(plans()))
    image = write_noise(tmp_path / "c_0000.nii.gz", "RAS")
    stock = predict_with_stock(folder, image, tmp_path)
    np.testing.assert_array_equal(labels_of(folder, image), stock.array)


def merge(**content: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | content))


CIRCULAR = {"3d_fullres": {"inherits_from": "3d_fullres"}}
DAMAGED = r"^model/plans.json: missing or damaged; copy the whole nnU-Net model folder$"
PLANS, CHECKPOINT = "plans.json", "fold_0/checkpoint_final.pth"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (PLANS, lambda path: path.write_text(""), DAMAGED),
        (PLANS, lambda path: path.write_text("[" * 100_000), DAMAGED),
        (PLANS, merge(configurations=CIRCULAR), r"do not match \('3d_fullres inherits from itself'\); copy"),
        (PLANS, merge(configurations={"3d_fullres": {}}), r"^model: plans, labels and checkpoint do not match \('pr"),
        (CHECKPOINT, lambda path: path.write_bytes(path.read_bytes()[:1000]), rf"^{CHECKPOINT}: damaged or truncated;"),
        (CHECKPOINT, Path.unlink, r"model: fold_N/checkpoint_final.pth or fold_N/checkpoint_best.pth not found; copy"),
        (
            "dataset.json",
            merge(orientation="RAX"),
            r"^model/dataset.json: orientation 'RAX' is invalid; write one",
        ),
        ("dataset.json", merge(channel_names={"0": "QSM", "1": "T1w"}), r"^model: its network needs 2 images per scan"),
    ],
    ids=["empty", "nested", "circular", "no settings", "truncated", "missing", "orientation", "channels"],
)
def test_unusable_folder_is_refused(tmp_path, name, damage, message):
    damage(write_folder(tmp_path / "model") / name)
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path / "model")


def test_weights_of_another_plan_are_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    content = plans()
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 16]
    (folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"^model: the weights do not fit the network of plans.json"):
        NnunetNetwork(read_folder(folder), device="cpu", sided=True)


def test_folds_without_a_checkpoint_are_reported(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "fold_1").mkdir()
    (folder / "fold_1" / "checkpoint_latest.pth").write_bytes(b"of an interrupted training")
    model, _ = choose_labels(MODELS["nnunet2step"], folder)
    assert NnunetEngine(model, InferenceOptions(weights=folder)).check() == [
        "model: no checkpoint_final.pth or checkpoint_best.pth in fold_1; the other folds are averaged"
    ]


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    content["network_weights"]["decoder.seg_layers.0.bias"][1] = torch.nan
    torch.save(content, path)
    with pytest.raises(InputError, match=r"^model: its weights decoder.seg_layers.0.bias are not finite numbers; get "):
        read_folder(folder)


def test_environment_stays_unchanged(tmp_path, monkeypatch, capsys):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_compile", "true")
    before = dict(os.environ)
    network = NnunetNetwork(read_folder(write_folder(tmp_path / "model")), device="cpu", sided=True)
    network(Volume.read(write_noise(tmp_path / "c.nii.gz", "RAS")))
    assert dict(os.environ) == before
    assert capsys.readouterr().out == ""


def test_first_step_that_labels_more_than_a_cerebellum_is_replaced(monkeypatch):
    chi = coarse_chi()
    everything = np.stack([np.zeros(chi.shape), np.ones(chi.shape)]).astype(np.float32)
    cerebellum = np.zeros(chi.shape, bool)
    cerebellum[10:20, 12:22, 4:14] = True
    monkeypatch.setattr("bids_dgmseg.segmentation.engines.NnunetNetwork", lambda trained, **_: lambda chi: everything)
    monkeypatch.setattr("bids_dgmseg.segmentation.localize.find_cerebellum", lambda chi, device: cerebellum)
    model, _ = choose_labels(MODELS["nnunet2step"])
    location = NnunetEngine(model, InferenceOptions()).localize(chi)
    assert location.labels is not None
    np.testing.assert_array_equal(location.labels.array > 0, cerebellum)
    expected = box_of_mask(chi.with_array(cerebellum)).expanded(model.localizer.margin_mm)
    np.testing.assert_allclose([location.box.low_mm, location.box.high_mm], [expected.low_mm, expected.high_mm])


MODEL = get_model("nnunet2step")


def write_labels(folder: Path, labels: dict[str, Any], **more: object) -> Path:
    """Write what is read of a single model folder to match its labels."""
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text("{}")
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))
    return folder


def test_labels_match_by_abbreviation_or_name(tmp_path):
    folder = write_labels(tmp_path / "m", {"background": 0, "Right_Red-Nucleus": 1, "dn_l": 2, "ignore": 3})
    model, notes = choose_labels(MODEL, folder)
    assert model.labels == ("DN_L", "RN_R")
    assert model.label_numbers == {"DN_L": (2,), "RN_R": (1,)}
    assert notes == []


def test_labels_without_a_match_become_background(tmp_path):
    labels = {"background": 0, "Left_Dentate-Nucleus": 1, "DN_R": 2, "lesion": 5}
    model, notes = choose_labels(MODEL, write_labels(tmp_path / "m", labels))
    assert model.label_numbers == {"DN_L": (1,), "DN_R": (2,)}
    assert notes == ["m: label 5 (lesion) matches no nucleus; treated as background"]


def test_cerebellum_is_found_by_name(tmp_path):
    write_labels(tmp_path / "w" / "dentate", {"background": 0, "DN_L": 1, "DN_R": 2})
    write_labels(tmp_path / "w" / "cerebellum", {"background": 0, "cerebrum": 1, "Cerebellum": 2})
    assert choose_labels(MODEL, tmp_path / "w")[0].label_numbers["cerebellum"] == (2,)


def test_only_labels_of_two_steps_are_postprocessed(tmp_path):
    step = write_labels(tmp_path / "w" / "dentate", {"background": 0, "DN_L": 1, "DN_R": 2})
    largest, unchanged = (choose_labels(MODEL, folder)[0] for folder in (tmp_path / "w", step))
    assert (largest.postprocessing.min_component_fraction, unchanged.postprocessing.min_component_fraction) == (1, 0)
    assert (largest.postprocessing.own_side_only, unchanged.postprocessing.own_side_only) == (True, False)
    assert "cerebellum" not in largest.label_numbers  # there is no such folder


def test_regions_are_numbered_in_their_order(tmp_path):
    folder = write_labels(tmp_path / "m", {"background": 0, "both": [1, 2], "DN_R": [2]}, regions_class_order=[1, 2])
    assert read_labels(folder) == {"both": 1, "DN_R": 2}


@pytest.mark.parametrize(
    ("dentate", "cerebellum", "message"),
    [
        (
            {"background": 0, "left": 1, "right": 2},
            {"cerebellum": 1},
            r"^w: none of its labels \(1 \(left\), 2 \(right\)\) is a known nucleus; name one DN_L in dataset",
        ),
        (
            {"background": 0, "DN_L": 1},
            {"background": 0, "a": 1, "b": 2},
            r"^w/cerebellum: none of its labels \(a, b\) is the cerebellum; name it so in dataset",
        ),
    ],
)
def test_unmatched_labels_are_refused(tmp_path, dentate, cerebellum, message):
    write_labels(tmp_path / "w" / "dentate", dentate)
    write_labels(tmp_path / "w" / "cerebellum", cerebellum)
    with pytest.raises(InputError, match=message):
        choose_labels(MODEL, tmp_path / "w")


def test_folder_and_model_must_be_of_nnunet(tmp_path):
    with pytest.raises(InputError, match=r"dentate: not an nnU-Net model folder \(no dataset.json\); pass the folder"):
        choose_labels(MODEL, tmp_path)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("w", r"^dentate/plans.json: its checksum differs from the registry's; reinstall the package$"),
        ("none", r"^nnunet2step: no weights in the package; train it \(dgmseg train "),
    ],
)
def test_changed_or_missing_weights_are_refused(tmp_path, monkeypatch, folder, message):
    write_labels(tmp_path / "w" / "dentate", {"background": 0, "DN_L": 1, "DN_R": 2})
    monkeypatch.setattr("bids_dgmseg.segmentation.engines.weights_folder", lambda model: tmp_path / folder)
    model = replace(MODEL, weights=Weights({"dentate/plans.json": "00ff"}, licence="CC-BY-4.0", trained_on="nothing"))
    with pytest.raises(InputError, match=message):
        check_ready(model, weights=None, device="cpu")
