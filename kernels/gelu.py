"""GELU by its tanh approximation (Hendrycks & Gimpel 2016): x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), which is
x·sigmoid(√(8/π)·(x + 0.044715·x³)).

On the CPU PyTorch computes a tanh, in several passes over a vector; the kernel computes the sigmoid, in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.register_fake("meddiff::_gelu_")
def _gelu_fake(x: Tensor, isa: str | None = None) -> None:
    return None


def gelu_(x: Tensor) -> Tensor:
    """GELU of x, of any floating type, shape and device; x itself is changed and returned where that is possible and
    faster: contiguous, float32 or bfloat16, on the CPU, and of no gradient. Elsewhere this is PyTorch's F.gelu."""
    in_place = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()
    if not in_place or (torch.is_grad_enabled() and x.requires_grad):
        return F.gelu(x, approximate="tanh")
    torch.ops.meddiff._gelu_(x)
    return x
