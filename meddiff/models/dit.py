"""The intra-patch flow of BiFlowNet: a small DiT whose attention never leaves its sub-volume
(Wang et al., TMI 2025, section III-C; Peebles & Xie 2023).

Tokens are a volume [B, D, H, W, C], cut into sub-volumes of window³ tokens. The condition is [B, 8C], one per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meddiff.kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from meddiff.kernels.gelu import gelu_
from meddiff.kernels.window_attention import window_attention
from meddiff.models.blocks import Linear

_NORM_EPS = 1e-6


def position_embedding(tokens_per_axis: int, dim: int) -> Tensor:
    """Sine-cosine embedding of a token's place in its sub-volume: float32 [1, tokens_per_axis³, dim], in D, H, W order.

    dim/3 numbers for each of D, H, W, in that order: sines, then cosines, of index · 10000^(-k / (dim/6)).
    """
    # on the meta device arange would import torch._dynamo
    counts = {"dtype": torch.float64, "device": "cpu"}
    frequencies = 10000.0 ** (-torch.arange(dim // 6, **counts) / (dim // 6))
    angles = torch.arange(tokens_per_axis, **counts)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    n = tokens_per_axis
    places = [
        axis[:, None, None].expand(n, n, n, -1),
        axis[None, :, None].expand(n, n, n, -1),
        axis[None, None, :].expand(n, n, n, -1),
    ]
    return torch.cat(places, dim=-1).reshape(1, n**3, -1).float().to(torch.get_default_device())


class SubVolumeAttention(nn.Module):
    """Multi-head self-attention among the tokens of each sub-volume."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window  # tokens per axis of a sub-volume
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(window_attention(self.qkv(x), self.heads, self.window))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_(self.fc1(x)))


class DiTBlock(nn.Module):
    """DiT block with adaLN modulation; `skip` adds the linear merge of a skip connection in front."""

    def __init__(
        self, dim: int, condition_dim: int, heads: int, window: int, mlp_ratio: int, skip: bool = False
    ) -> None:
        super().__init__()
        if skip:
            self.skip_linear = Linear(2 * dim, dim)
        self.attn = SubVolumeAttention(dim, heads, window)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(condition_dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, 1)
        h = self.attn(layer_norm_modulate(x, attn_shift, attn_scale, _NORM_EPS))
        x, h = gate_residual_layer_norm_modulate(x, attn_gate, h, mlp_shift, mlp_scale, _NORM_EPS)
        return gate_residual(x, mlp_gate, self.mlp(h))


class FinalLayer(nn.Module):
    """Tokens [B, D, H, W, C] → token_patch³ · C numbers per token, ordered (pd, ph, pw, channel)."""

    def __init__(self, dim: int, condition_dim: int, token_patch: int) -> None:
        super().__init__()
        self.linear = Linear(dim, token_patch**3 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(condition_dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(layer_norm_modulate(x, shift, scale, _NORM_EPS))
