"""The numbers of parameters that docs/papers.md gives."""

import json
import re
from pathlib import Path

import pytest

from bids_dgmseg.models.registry import MODELS, weights_folder
from bids_dgmseg.networks.attention_unet import AttentionUNet25D, ResNet50AttentionUNet25D
from bids_dgmseg.networks.dcn_net import DCNNet
from bids_dgmseg.networks.deepqsmseg import DeepQSMSeg

PAGE = (Path(__file__).parents[2] / "docs" / "papers.md").read_text("utf-8")


def shipped_nnunet(step):
    """Build what the package's plans.json describes, by nnU-Net's own builder."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    folder = weights_folder(MODELS["nnunet2step"]) / step
    plans, dataset = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("plans", "dataset"))
    built = plans["configurations"]["3d_fullres"]["architecture"]
    return get_network_from_plans(
        built["network_class_name"],
        built["arch_kwargs"],
        built["_kw_requires_import"],
        len(dataset["channel_names"]),
        len(dataset["labels"]),
        deep_supervision=False,
    )


NETWORKS = {
    "DCN-Net": lambda: DCNNet(1, 3),
    "Attention U-Net, 16": lambda: AttentionUNet25D(1, 4),
    "Attention U-Net with ResNet-50": lambda: ResNet50AttentionUNet25D(1, 4),
    "DeepQSMSeg, 16": lambda: DeepQSMSeg(1, 11),
    "DeepQSMSeg, 6": lambda: DeepQSMSeg(1, 11, **MODELS["deepqsmseg"].arch),
    "DentateSeg, cerebellum": lambda: shipped_nnunet("cerebellum"),
    "DentateSeg, dentate nuclei": lambda: shipped_nnunet("dentate"),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_documented_number_of_parameters_is_correct(name):
    count = sum(parameter.numel() for parameter in NETWORKS[name]().parameters())
    assert re.findall(rf"^\| {re.escape(name)}.*? \| ([\d,]+) \|", PAGE, re.MULTILINE) == [f"{count:,}"]
