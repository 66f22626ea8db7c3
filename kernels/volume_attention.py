"""Self-attention with every voxel of a volume as a token; in bfloat16 on processors with AMX by
csrc/volume_attention.cpp, in memory that grows with the tokens of one head, else by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HERE = torch.ops.meddiff._has_volume_attention()
_MOST_CHANNELS = 128  # of a head


def volume_attention_ref(qkv: Tensor, heads: int) -> Tensor:
    """The same by PyTorch, which autograd can follow."""
    batch, tokens, channels = *qkv.shape[:2], qkv.shape[2] // 3
    q, k, v = qkv.view(batch, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, channels)


def volume_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q·kᵀ / √dim)·v for each head. No gradient.

    qkv: [B, N, 3·heads·dim], on any device and of any dtype that PyTorch's attention takes, the last axis in the order
        q, k, v, each head-major.
    Returns [B, N, heads·dim].
    """
    batch, tokens, channels = *qkv.shape[:2], qkv.shape[2] // 3
    if _HERE and qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu" and channels // heads <= _MOST_CHANNELS:
        out = qkv.new_empty((batch, tokens, channels))
        torch.ops.meddiff._volume_attention(qkv.contiguous(), heads, out)
        return out
    return volume_attention_ref(qkv, heads)


@torch.library.register_fake("meddiff::_volume_attention")
def _fake(qkv: Tensor, heads: int, out: Tensor) -> None:
    return None
