from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from meddiff.kernels.norm_silu_conv3d import conv3d
from meddiff.models.blocks import Conv3d, attend_over_volume, conv1, conv3, down_conv, up_conv
from meddiff.resources import StageMeter


def test_attention_over_a_volume_holds_no_score_matrix():
    heads, head_dim, channels, size = 4, 32, 16, (16, 16, 16)
    to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False).bfloat16()
    to_out = conv1(heads * head_dim, channels).bfloat16()
    x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0)).bfloat16()
    attend_over_volume(x[:, :, :2], to_qkv, to_out, heads)
    meter = StageMeter(torch.device("cpu"))
    with meter.stage("before"):
        pass
    with meter.stage("attention"):
        attend_over_volume(x, to_qkv, to_out, heads)
    before, attention = (stage.peak_bytes for stage in meter.stages)
    scores = 2 * heads * (16**3) ** 2  # bytes in bfloat16: 128 MiB
    assert attention - before < scores // 4


def made(build, dtype: torch.dtype) -> Conv3d:
    torch.manual_seed(0)
    return build().to(dtype, memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build, size",
    [
        (partial(conv3, 1, 48), (64, 32, 32)),
        (partial(conv3, 1, 48), (2, 128, 256)),
        (partial(conv3, 24, 24), (15, 14, 14)),
        (partial(conv1, 16, 24), (3, 2, 4)),
        (partial(down_conv, 24), (12, 10, 14)),
        (partial(Conv3d, 8, 24, kernel_size=4, stride=4), (16, 16, 16)),
        (partial(conv3, 256, 160), (4, 3, 5)),
        (partial(down_conv, 192), (4, 6, 2)),
    ],
)
def test_inference_is_channels_last_and_not_unfolded(build, size, dtype):
    """PyTorch alone unfolds float32 tensors of few voxels, and what has a single channel it takes as contiguous."""
    conv = made(build, dtype)
    x = torch.randn(1, conv.in_channels, *size).to(dtype, memory_format=torch.channels_last_3d)
    wanted = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        got = conv._conv_forward(x, conv.weight, conv.bias)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=bound)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert got.stride(1) == 1
        assert not [event.key for event in profiler.key_averages() if "slow_conv" in event.key]
    with torch.enable_grad():
        torch.testing.assert_close(conv(x), got, rtol=bound, atol=bound)


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("size", [(1, 3, 2), (1, 1, 8), (2, 1, 3), (3, 2, 4)])
def test_few_planes_of_few_channels_in_bfloat16(channels, size):
    """PyTorch's own holds what memory held before, where a single channel and plane are channels-last."""
    conv = made(partial(conv3, channels, 16), torch.bfloat16)
    x = torch.randn(1, *size, channels).bfloat16().permute(0, 4, 1, 2, 3)
    wanted = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    for _ in range(4):
        poison = [torch.full((n,), float("nan")) for n in (100, 1000, 10_000, 100_000)]
        del poison
        torch.testing.assert_close(conv(x).double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("channels", [24, 192])
@pytest.mark.parametrize("size", [(4, 6, 2), (8, 8, 2), (2, 2, 2), (2, 6, 2), (6, 2, 6), (2, 6, 6)])
def test_strides_over_few_planes_in_bfloat16(channels, size, learning):
    """PyTorch's own holds what memory held before, where it strides to one column on processors with AMX."""
    conv = made(partial(down_conv, channels), torch.bfloat16)
    x = torch.randn(1, channels, *size).to(torch.bfloat16, memory_format=torch.channels_last_3d)
    wanted = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), 2, 1)
    with torch.set_grad_enabled(learning):
        torch.testing.assert_close(conv(x).double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("size", [(6, 8, 4), (9, 9, 5), (4, 9, 4)])
def test_strides_over_what_is_padded_already(kernel, size):
    """As MONAI's layers do."""
    conv = made(partial(Conv3d, 64, 64, kernel_size=kernel, stride=2), torch.bfloat16)
    x = torch.randn(1, 64, *size).to(torch.bfloat16, memory_format=torch.channels_last_3d)
    wanted = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), 2)
    got = conv3d(x, conv.weight, conv.bias, 2, 0)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 4, 4), (2, 3, 1), (1, 1, 1)])
def test_a_transposed_convolution_of_few_voxels_copies_no_weight(size, dtype):
    conv = made(partial(up_conv, 288), dtype)
    x = torch.randn(1, 288, *size).to(dtype, memory_format=torch.channels_last_3d)
    wanted = nn.functional.conv_transpose3d(x.double(), conv.weight.double(), conv.bias.double(), 2, 1)
    meter = StageMeter(torch.device("cpu"))
    with torch.no_grad():
        conv(x)
        with meter.stage("before"):
            pass
        with meter.stage("convolution"):
            got = conv(x)
    before, peak = (stage.peak_bytes for stage in meter.stages)
    assert peak - before < conv.weight.nbytes / 2
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=bound)
    with torch.enable_grad():
        torch.testing.assert_close(conv(x), got, rtol=bound, atol=bound)


@torch.no_grad()
@pytest.mark.parametrize(
    "build, size",
    [(partial(conv3, 24, 24), (12, 9, 14)), (partial(conv3, 1, 8), (32, 32, 32)), (partial(conv1, 8, 8), (3, 4, 2))],
)
def test_inference_under_autocast_and_compiled(build, size):
    conv = made(build, torch.float32)
    x = torch.randn(1, conv.in_channels, *size)
    wanted = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = conv(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 3, 2), (2, 2, 2), (2, 8, 8), (3, 2, 4)])
@torch.enable_grad()
def test_gradients_of_a_convolution_of_two_planes(dtype, size):
    """PyTorch's own in bfloat16 holds what memory held before."""
    torch.manual_seed(0)
    conv, wanted = conv3(24, 24), torch.nn.Conv3d(24, 24, 3, padding=1).double()
    wanted.load_state_dict(conv.to(dtype).state_dict())
    x = torch.randn(2, 24, *size).to(dtype, memory_format=torch.channels_last_3d)
    gradient = torch.randn(2, 24, *size).to(dtype)
    wanted(x.double()).backward(gradient.double())
    for _ in range(6):
        poison = [torch.full((n,), float("nan")) for n in (1000, 10_000, 100_000, 500_000)]
        del poison
        conv.zero_grad()
        y = conv(x)
        y.backward(gradient)
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for got, right in ((conv.weight.grad, wanted.weight.grad), (conv.bias.grad, wanted.bias.grad)):
            assert (got.double() - right).norm() < bound * right.norm()
        torch.testing.assert_close(y.double(), wanted(x.double()), rtol=bound, atol=bound)
