import pytest
import torch
from torch import nn
from torch.nn import functional

from bids_dgmseg.segmentation.inference import batch_to_device, forward_batch, mixed_precision

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["has bfloat16", "emulates bfloat16"])
def hardware(request, monkeypatch):
    """Processor that computes in bfloat16, or one that is ten times slower with it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    return torch.bfloat16 if request.param else torch.float32


def test_bfloat16_is_used_where_it_is_faster(hardware):
    with mixed_precision(CPU):
        assert nn.Conv3d(1, 1, 1)(torch.zeros(1, 1, 2, 2, 2)).dtype == hardware
    logits = forward_batch(nn.Conv3d(1, 2, 1), torch.zeros(1, 1, 2, 2, 2).numpy(), "cpu")
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
)
def test_batches_are_channels_last(shape, layout):
    batch = torch.randn(shape)
    laid = batch_to_device(batch, CPU)
    assert laid.is_contiguous(memory_format=layout)
    assert torch.equal(laid, batch)


@pytest.mark.parametrize(
    ("convolve", "sides", "kernel", "how"),
    [
        pytest.param(functional.conv3d, (3, 2, 2), (5, 5, 3), {"padding": (2, 2, 1)}, id="wide kernel"),
        pytest.param(functional.conv3d, (2, 2, 2), (5, 5, 3), {"padding": (2, 2, 1)}, id="kernel of twice the image"),
        pytest.param(functional.conv3d, (2, 8, 8), (3, 3, 3), {"padding": 1}, id="short along one axis"),
        pytest.param(functional.conv_transpose3d, (2, 1, 1), (3, 3, 3), {"padding": 1, "stride": 2}, id="transposed"),
        pytest.param(functional.conv3d, (8, 8, 4), (5, 5, 3), {"padding": (2, 2, 1)}, id="large image"),
    ],
)
def test_gradients_are_correct_for_any_image_size(convolve, sides, kernel, how):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 4, *sides), generator=generator).bfloat16()
    weight = torch.randn((4, 4, *kernel), generator=generator).bfloat16().float().requires_grad_()
    exact = convolve(image.double(), same := weight.detach().double().requires_grad_(), **how)
    along = torch.randn(exact.shape, generator=generator).bfloat16().float()
    expected = torch.autograd.grad(exact, same, along.double())[0]
    image = batch_to_device(image.float(), CPU)
    for _ in range(5):
        for size in (1_000, 100_000, 1_000_000):  # a fault shows in memory that contained NaN before
            torch.full((size,), torch.nan)
        with mixed_precision(CPU):
            answer = convolve(input=image, weight=weight, **how)
        found = torch.autograd.grad(answer.float(), weight, along)[0].double()
        assert torch.allclose(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("convolve", "sides"),
    [
        (nn.Conv3d(1, 2, (5, 5, 3), padding=(2, 2, 1)), (4, 8, 8)),
        (nn.Conv3d(1, 2, (5, 5, 3), padding=(2, 2, 1)), (8, 8, 2)),
        (nn.Conv3d(1, 2, 3, stride=2, padding="valid"), (3, 3, 2 + 1)),
        (nn.Conv2d(1, 2, 7, padding="same"), (9, 6)),
        (nn.ConvTranspose3d(1, 2, 3, stride=2), (2, 8, 8)),
    ],
)
def test_only_small_images_use_float32_gradients(hardware, convolve, sides):
    small = any(side < reach for side, reach in zip(sides, convolve.kernel_size, strict=True))
    image = torch.zeros(1, 1, *sides)
    with mixed_precision(CPU):
        assert convolve(image).dtype == (torch.float32 if small else hardware)
    with torch.no_grad(), mixed_precision(CPU):
        assert convolve(image).dtype == hardware
