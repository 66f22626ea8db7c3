from __future__ import annotations

import torch
from torch import nn

from meddiff.models.blocks import attend_over_volume, conv1
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
