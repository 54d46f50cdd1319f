import pytest
import torch
from torch import nn
from torch.nn import functional

from bids_dgmseg.segmentation.inference import FastLayers, batch_to_device, forward_batch, mixed_precision

CPU = torch.device("cpu")


@pytest.fixture
def hardware(monkeypatch):
    """Function that pretends to run on a processor with these instructions, by Intel or not."""

    def pretend(*, avx512=False, amx=False, intel=False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr("bids_dgmseg.segmentation.inference._is_by_intel", lambda: intel)

    return pretend


@pytest.mark.parametrize(
    ("processor", "precision"),
    [
        ({}, torch.float32),  # emulated, ten times slower
        ({"avx512": True}, torch.bfloat16),
        ({"avx512": True, "intel": True}, torch.float32),  # 2.2 instead of 3.0 s for a small nnU-Net
        ({"avx512": True, "amx": True, "intel": True}, torch.bfloat16),
    ],
    ids=["none", "AVX-512", "AVX-512 by Intel", "AMX"],
)
def test_bfloat16_is_used_where_it_is_faster(hardware, processor, precision):
    hardware(**processor)
    with mixed_precision(CPU):
        assert nn.Conv3d(1, 1, 1)(torch.zeros(1, 1, 2, 2, 2)).dtype == precision
    logits = forward_batch(nn.Conv3d(1, 2, 1), torch.zeros(1, 1, 2, 2, 2).numpy(), "cpu")
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)]
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
        result = torch.autograd.grad(answer.float(), weight, along)[0].double()
        assert torch.allclose(result, expected, rtol=0, atol=0.01 * float(expected.abs().max()))  # bfloat16 has 8 bits


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.Conv3d(3, 4, 3, padding=1), id="convolution"),
        pytest.param(nn.Conv3d(3, 4, 3, padding="same"), id="padding by name"),
        pytest.param(nn.Conv3d(3, 4, (3, 1, 3), (2, 1, 2), (1, 0, 1), bias=False), id="stride"),
        pytest.param(nn.Conv3d(3, 6, 3, padding=2, dilation=2, groups=3), id="dilation and groups"),
        pytest.param(nn.Conv3d(3, 4, 1), id="one voxel"),
        pytest.param(nn.Conv3d(3, 4, 1, bias=False), id="one voxel without bias"),
        pytest.param(nn.Conv3d(3, 4, 1, stride=2, padding=1), id="one voxel with stride"),
        pytest.param(nn.Conv3d(3, 6, 1, groups=3), id="one voxel with groups"),
        pytest.param(nn.InstanceNorm3d(3), id="normalization"),
        pytest.param(nn.InstanceNorm3d(3, affine=True), id="normalization with weights"),
        pytest.param(nn.InstanceNorm3d(3, track_running_stats=True), id="normalization of a training"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"])
def test_fast_layers_compute_what_torch_does(layer, n_samples, precision, layout):
    image = torch.randn(n_samples, 3, 9, 8, 7).to(memory_format=layout)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        expected = layer.eval()(image)
        with FastLayers():
            result = layer(image)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    # bfloat16 has 8 bits
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 if precision == "float32" else 0.02)


def test_normalization_of_large_images_is_exact():
    image = 10 + torch.randn(1, 2, 80, 90, 100, generator=torch.Generator().manual_seed(0))
    exact = image.double() - image.double().mean((2, 3, 4), keepdim=True)
    exact /= (exact.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
    with torch.inference_mode(), FastLayers():
        result = nn.InstanceNorm3d(2)(batch_to_device(image, CPU))
    assert float((result - exact).abs().max()) < 2e-5


def test_fast_layers_leave_gradients_to_torch():
    layers = nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2))
    image = torch.randn(1, 1, 5, 6, 7)
    expected = layers(image)
    with FastLayers():
        result = layers(image)
    assert torch.equal(result, expected)
    assert result.grad_fn.name() == expected.grad_fn.name()
