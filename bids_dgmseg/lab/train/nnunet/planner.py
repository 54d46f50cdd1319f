"""Plan and preprocess an nnU-Net dataset in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from bids_dgmseg.io.files import read_json
from bids_dgmseg.lab.train.nnunet.settings import Size
from bids_dgmseg.models.nnunet_folder import FULL_RESOLUTION

PLANS = "nnUNetPlans"

_INTENSITIES = 1_000_000
"""Number of voxels inside labels for the intensity statistics, over all scans; nnU-Net uses a hundred times more."""


class SizedPlanner(ExperimentPlanner):
    """nnU-Net's default planner for one 3D network of a given size."""

    def __init__(self, dataset: str, size: Size) -> None:
        super().__init__(
            dataset,
            gpu_memory_target_in_gb=size.memory_gb,
            plans_name=PLANS,
            overwrite_target_spacing=[size.spacing_mm] * 3,
        )
        self.size = size
        self.UNet_base_num_features = size.features
        self.lowres_creation_threshold = 0.0

    def get_plans_for_configuration(
        self, spacing: Any, median_shape: Any, data_identifier: str, approximate_n_voxels_dataset: float, _cache: Any
    ) -> dict[str, Any]:
        """Plan the 3D network with as many filters as its limit allows, and no 2D network."""
        if len(spacing) == 2:
            return {}
        plan: dict[str, Any] = {}
        for limit in (320, 256, 192, 128, 96, 64, 48, 32):
            self.UNet_max_features_3d = limit
            plan = super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, {}
            )
            counted = count_parameters(plan["architecture"], classes=len(self.dataset_json["labels"]))
            if counted <= self.size.parameters:
                break
        return plan

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Save the 3D configuration only."""
        plans["configurations"] = {FULL_RESOLUTION: plans["configurations"][FULL_RESOLUTION]}
        super().save_plans(plans)


def count_parameters(architecture: Mapping[str, Any], *, classes: int) -> int:
    """Count the parameters of a network described in plans.json."""
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        classes,
        allow_init=False,
        deep_supervision=True,
    )
    return sum(values.numel() for values in network.parameters())


def plan_and_preprocess(raw: Path, preprocessed: Path, size: Size, *, plans: Mapping[str, Any] | None = None) -> None:
    """Plan and preprocess as ``nnUNetv2_plan_and_preprocess`` does, without worker processes.

    nnU-Net's environment variables contain the parents of both folders. With `plans`, those of the network that the
    training starts from, nothing is planned.
    """
    names = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
    files = {
        name: ([str(raw / "imagesTr" / f"{name}_0000.nii.gz")], str(raw / "labelsTr" / f"{name}.nii.gz"))
        for name in names
    }
    preprocessed.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(list(files.values()))
    recursive_fix_for_json_export(fingerprint)
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
    dataset = read_json(raw / "dataset.json")
    if plans is None:
        plans = SizedPlanner(raw.name, size).plan_experiment()
    else:
        plans = {**plans, "dataset_name": raw.name, "plans_name": PLANS, "image_reader_writer": SimpleITKIO.__name__}
        for name, content in ((PLANS, plans), ("dataset", dataset)):
            (preprocessed / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    manager = PlansManager(plans)
    configuration = manager.get_configuration(FULL_RESOLUTION)
    folder = preprocessed / configuration.data_identifier
    folder.mkdir(exist_ok=True)
    preprocessor = DefaultPreprocessor(verbose=False)
    for name, (images, labels) in files.items():
        preprocessor.run_case_save(str(folder / name), images, labels, manager, configuration, dataset)


def _fingerprint(files: Sequence[tuple[list[str], str]]) -> dict[str, Any]:
    """Compute the fingerprint of a dataset as nnU-Net's extractor does."""
    found = [
        DatasetFingerprintExtractor.analyze_case(images, labels, SimpleITKIO, _INTENSITIES // len(files))
        for images, labels in files
    ]
    values = np.concatenate([case[2][0] for case in found])
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    intensities = {
        "mean": values.mean(),
        "median": median,
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "percentile_99_5": high,
        "percentile_00_5": low,
    }
    return {
        "spacings": [case[1] for case in found],
        "shapes_after_crop": [case[0] for case in found],
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "median_relative_size_after_cropping": np.median([case[4] for case in found]),
    }
