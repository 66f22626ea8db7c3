from __future__ import annotations

import pytest
import torch
from torch import nn

from meddiff.models.blocks import attend_over_volume, conv1, conv3
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
