import pytest
import torch
from torch import nn

from bids_dgmseg.segment.forward import forward_batch, lay_out, mixed_precision

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["has bfloat16", "emulates bfloat16"])
def hardware(request, monkeypatch):
    """A processor that computes in bfloat16, or one that would need ten times longer for it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    return torch.bfloat16 if request.param else torch.float32


def test_networks_compute_in_bfloat16_where_that_is_quicker(hardware):
    with mixed_precision(CPU):
        assert nn.Conv3d(1, 1, 1)(torch.zeros(1, 1, 2, 2, 2)).dtype == hardware


def test_logits_are_float32_whatever_computed_them(hardware):
    assert forward_batch(nn.Conv3d(1, 2, 1), torch.zeros(1, 1, 2, 2, 2).numpy(), "cpu").dtype == torch.float32


@pytest.mark.parametrize(("shape", "layout"), [
    pytest.param((2, 3, 4, 5), torch.channels_last, id="slices"),
    pytest.param((2, 3, 4, 5, 6), torch.channels_last_3d, id="blocks"),
])
def test_a_batch_is_laid_out_with_its_channels_last(shape, layout):
    batch = torch.randn(shape)
    laid = lay_out(batch, CPU)
    assert laid.is_contiguous(memory_format=layout)
    assert torch.equal(laid, batch)
