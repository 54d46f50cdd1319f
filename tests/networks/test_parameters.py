"""The numbers of parameters that docs/papers.md gives."""

import re
from pathlib import Path

import pytest

from bids_dgmseg.models import MODELS
from bids_dgmseg.networks.attention_unet import AttentionUNet25D, ResNet50AttentionUNet25D
from bids_dgmseg.networks.dcn_net import DCNNet
from bids_dgmseg.networks.deepqsmseg import DeepQSMSeg
from bids_dgmseg.segment.weights import segmenter_network

PAGE = (Path(__file__).parents[2] / "docs" / "papers.md").read_text("utf-8")
NETWORKS = {
    "DCN-Net": lambda: DCNNet(1, 3),
    "Attention U-Net, 16": lambda: AttentionUNet25D(1, 4),
    "Its comparison": lambda: ResNet50AttentionUNet25D(1, 4),
    "DeepQSMSeg, 16": lambda: DeepQSMSeg(1, 11),
    "DeepQSMSeg, 6": lambda: DeepQSMSeg(1, 11, **MODELS["deepqsmseg"].arch),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_documented_number_is_the_network_s(name):
    count = sum(parameter.numel() for parameter in NETWORKS[name]().parameters())
    assert re.findall(rf"^\| {re.escape(name)}.*? \| ([\d,]+) \|", PAGE, re.MULTILINE) == [f"{count:,}"]


def test_dcn_net_has_as_many_as_its_paper_says():
    assert round(sum(parameter.numel() for parameter in DCNNet(1, 3).parameters()) / 1000, -1) == 890


@pytest.mark.parametrize("name", ["dcnnet", "attunet25d", "deepqsmseg"])
def test_a_registered_network_fits_into_the_package(name):
    network = segmenter_network(MODELS[name])
    assert 2 * sum(parameter.numel() for parameter in network.parameters()) < 10e6  # float16, at most 10 MB
