"""Tiny nnU-Net model folders with random weights, whose noise shows any wrong axis; what nnU-Net itself answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.segmentation.engines import quiet

NUMBERS = {"background": 0, "DN_L": 1, "DN_R": 2}


def plans(**changes: Any) -> dict[str, Any]:
    """What nnU-Net's planner writes, for two stages of four and eight filters."""
    dimensions = len(changes.get("patch_size", (16, 16, 16)))
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    arch = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * 2,
        "strides": [[1] * dimensions, [2] * dimensions],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "spacing": [2.0, 1.8, 1.5],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arch,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    transpose = changes.pop("transpose_forward", [0, 1, 2])
    return {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": {"3d_fullres": {**configuration, **changes}},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def write_folder(
    folder: Path,
    *,
    labels: Mapping[str, Any] = NUMBERS,
    seed: int = 1,
    mirror_axes: tuple[int, ...] | None = None,
    trainer: str = "nnUNetTrainer",
    dataset: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a model folder of fold 0."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    content = plans(**changes)
    architecture = content["configurations"]["3d_fullres"]["architecture"]
    torch.manual_seed(seed)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        len(labels),
        deep_supervision=False,
    )
    for values in network.parameters():
        torch.nn.init.normal_(values, std=0.5)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(content))
    described = {"channel_names": {"0": "QSM"}, "labels": dict(labels), "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**described, **(dataset or {})}))
    torch.save(
        {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": mirror_axes,
        },
        folder / "fold_0" / "checkpoint_final.pth",
    )
    return folder


def predict_with_stock(folder: Path, image: Path, out: Path, *, mirrored: tuple[int, ...] | None = None) -> Volume:
    """Label a file as ``nnUNetv2_predict`` does, in this process; `mirrored` are axes of z, y, x, not the folder's."""
    with quiet():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), None)
        if mirrored is not None:
            predictor.allowed_mirroring_axes = mirrored
        predictor.predict_from_files_sequential([[str(image)]], [str(out / "stock")])
    return Volume.read(out / "stock.nii.gz", np.uint8)
