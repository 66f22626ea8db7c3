"""Convolution 3³ in float32 on the CPU by Winograd's minimal filtering F(2³, 3³) (Lavin & Gray, CVPR 2016): 64 products
for each 2³ outputs and pair of channels instead of 216. Rounding errs about as in the plain sum, which has 27 times as
many terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_CHANNELS, _LEAST_VOXELS = 32, 2**12  # for fewer, oneDNN's is as fast
_LANES = 16  # channels come in multiples of it, whatever the processor is
_MOST_BLOCKS = 48  # of which csrc/winograd.cpp holds the points at a time
_FAST = torch.ops.meddiff.cpu_isas()[0] != "portable"


def winograd_pays(x: Tensor, weight: Tensor, padding: int = 0) -> bool:
    """Whether it is the faster way to convolve x [B, C, D, H, W] with weight [O, C, k, k, k] in steps of one voxel."""
    d, h, w = (n + 2 * padding - 2 for n in x.shape[2:])
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and min(d, h, w) >= 2
        and d * h * w >= _LEAST_VOXELS
        and winograd_suits(*weight.shape[:3])
    )


def winograd_suits(outputs: int, channels: int, edge: int) -> bool:
    """Whether it is the faster way for this weight, of enough voxels in float32 on this processor."""
    fit = all(n >= _LEAST_CHANNELS and n % _LANES == 0 for n in (outputs, channels))
    return _FAST and edge == 3 and fit


def winograd_bytes(outputs: int, channels: int) -> int:
    """Scratch of a call, beside x and the result."""
    points = 64 * _MOST_BLOCKS * (channels + outputs) * torch.get_num_threads()
    return 4 * ((27 + 64) * channels * outputs + points)


def winograd_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """F.conv3d(x, weight, bias, padding=padding), computed like that. No gradient.

    x: float32 [B, C, D, H, W] on the CPU, best in channels-last memory.
    weight: [O, C, 3, 3, 3]; bias: [O] or none. C and O are multiples of 16.
    Returns [B, O, …] in channels-last memory.
    Raises RuntimeError for other shapes or dtypes.
    """
    x = F.pad(x, [padding] * 6) if padding else x  # which copies x
    rows = x.permute(0, 2, 3, 4, 1).contiguous()
    taps = weight.permute(2, 3, 4, 1, 0).flatten(0, 2).contiguous()
    y = rows.new_empty(len(rows), *(n - 2 for n in rows.shape[1:4]), len(weight))
    torch.ops.meddiff._winograd_conv3d(rows, taps, None if bias is None else bias.contiguous(), y)
    return y.permute(0, 4, 1, 2, 3)


@torch.library.register_fake("meddiff::_winograd_conv3d")
def _fake(x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor, isa: str | None = None) -> None:
    return None
