import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.nnunet.step import environment
from bids_dgmseg.segmentation.nnunet import quiet

HALF_PRECISION_BYTES = 2


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """What is planned for heads of 150 x 180 x 150 mm, and for boxes of 130 x 95 x 85 mm about cerebella."""
    with quiet():
        from bids_dgmseg.lab.train.nnunet.planner import SizedPlanner
        from bids_dgmseg.lab.train.nnunet.settings import SIZES

        plans: dict[tuple[str, str], dict[str, Any]] = {}
        for name, steps in SIZES.items():
            for step, size_mm, labels in (("cerebellum", (150, 180, 150), 2), ("dentate", (85, 95, 130), 3)):
                work = tmp_path_factory.mktemp(step)
                write_empty_dataset(work, [f"label {number}" for number in range(1, labels)])
                spacing = steps[step].spacing_mm
                shape = [size / spacing for size in size_mm]
                with environment(work, workers=1):
                    planner = SizedPlanner("Dataset001_Tiny", steps[step])
                    plans[name, step] = planner.get_plans_for_configuration([spacing] * 3, shape, "x", 1e9, {})
    return plans


def write_empty_dataset(work: Path, labels: list[str]) -> None:
    raw, preprocessed = (work / name / "Dataset001_Tiny" for name in ("raw", "preprocessed"))
    raw.mkdir(parents=True)
    preprocessed.mkdir(parents=True)
    numbers = {"background": 0, **{name: number for number, name in enumerate(labels, start=1)}}
    (raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "QSM"},
                "labels": numbers,
                "numTraining": 0,
                "file_ending": ".nii.gz",
                "dataset": {},
            }
        )
    )
    intensities = {"median_relative_size_after_cropping": 1.0}
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(intensities))


def test_small_networks_fit_into_ten_megabytes(planned):
    from bids_dgmseg.lab.train.nnunet.planner import count_parameters

    counts = {
        step: count_parameters(planned["small", step]["architecture"], classes=3) for step in ("cerebellum", "dentate")
    }
    assert counts["dentate"] > 1_000_000  # reduced, not crippled
    assert HALF_PRECISION_BYTES * sum(counts.values()) < 10_000_000


@pytest.mark.parametrize("step", ["cerebellum", "dentate"])
def test_default_plan_has_nnunet_filters(planned, step):
    plan = planned[NnunetTraining().plan, step]
    assert list(plan["spacing"]) == [0.86, 0.86, 0.86]
    assert plan["normalization_schemes"] == ["ZScoreNormalization"]
    filters = plan["architecture"]["arch_kwargs"]["features_per_stage"]
    assert (filters[:4], filters[-1]) == ((32, 64, 128, 256), 320)
    assert plan["batch_size"] >= 2


def test_patches_contain_both_dentates(planned):
    for name in ("paper", "small"):
        assert 0.86 * planned[name, "dentate"]["patch_size"][2] > 60  # the last axis is x
    assert 1.72 * min(planned["small", "cerebellum"]["patch_size"]) > 80


def test_augmentation_is_elastic_without_mirroring():
    with quiet():
        from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

        from bids_dgmseg.lab.train.nnunet.trainer import DentateTrainer

        transforms = DentateTrainer.get_training_transforms((16, 16, 16), (-0.5, 0.5), None, None, False).transforms
    spatial = [transform for transform in transforms if isinstance(transform, SpatialTransform)]
    assert [(one.p_elastic_deform, one.p_rotation, one.p_scaling) for one in spatial] == [(0.2, 0.2, 0.2)]
    assert not any(isinstance(transform, MirrorTransform) for transform in transforms)


def test_workers_draw_different_deformations():
    with quiet():
        from bids_dgmseg.lab.train.nnunet.trainer import DentateTrainer

        first, *_ = DentateTrainer.get_training_transforms((16, 16, 16), (-0.5, 0.5), None, None, False).transforms
    forked = multiprocessing.get_context("fork")
    queue = forked.Queue()

    def draw():
        np.random.seed()  # noqa: NPY002 - as nnU-Net in each worker
        first(image=torch.zeros(1, 1, 1, 1))
        queue.put(torch.rand(1).item())

    workers = [forked.Process(target=draw) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert queue.get(timeout=60) != queue.get(timeout=60)
    for worker in workers:
        worker.join()


def test_deformation_does_not_fold():
    with quiet():
        from bids_dgmseg.lab.train.nnunet.trainer import DentateTrainer

        size = (48, 40, 32)
        transforms = DentateTrainer.get_training_transforms(size, (-0.5, 0.5), None, None, False).transforms
    (bend,) = [one for one in transforms if hasattr(one, "p_elastic_deform")]
    bend.p_elastic_deform, bend.p_rotation, bend.p_scaling = 1.0, 0.0, 0.0
    np.random.seed(0)  # noqa: NPY002 - from the global generators the transform draws
    torch.manual_seed(0)
    largest, steepest = [], []
    for _ in range(20):
        moved = bend.get_parameters(image=torch.zeros(1, *size))["elastic_offsets"].numpy()
        largest.append(np.abs(moved).max())
        steepest.append(max(np.abs(np.gradient(moved[..., axis])).max() for axis in range(3)))
    assert np.median(largest) > 1  # voxel
    assert max(largest) <= 0.25 * 0.25 * 48
    assert max(steepest) < 1
