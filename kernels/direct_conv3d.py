"""Convolution 3³ and transposed convolution 4³ of stride 2 in bfloat16 on processors with AMX (csrc/direct_conv3d.cpp).

Products of tiles of 16 × 32 by 32 × 16 numbers, straight from a few planes of the input that stay in cache. Where there
are few channels, several voxels along W share a row of the first tile and their outputs are columns of the second one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HERE = torch.ops.meddiff._direct_conv3d_isas()[0] != "portable"
_CACHE = 3 * 2**18  # bytes of inputs that a thread of csrc/direct_conv3d.cpp holds
_MOST_VOXELS = 6  # along W that share a row


def direct_suits(x: Tensor, weight: Tensor, edge: int) -> bool:
    """Whether this is the way to convolve x with a weight [·, ·, edge, edge, edge]; one of 4³ is transposed."""
    return direct_serves(x.dtype, x.device.type) and tuple(weight.shape[2:]) == (edge,) * 3


def direct_serves(dtype: torch.dtype, device: str) -> bool:
    return _HERE and dtype == torch.bfloat16 and device == "cpu"


def direct_bytes(channels: int, outputs: int, edge: int, size: Sequence[int], extra: int = 0) -> int:
    """About the most scratch of a call for outputs of `size`, beside its tensors; extra: the residual's channels, where
    it has a weight."""
    depth, height, width = (n // 2 for n in size) if edge == 4 else size
    channels, outputs, extra = (-(-n // 32) * 32 for n in (channels, outputs, extra))
    row, behind = 2 * (width + 8) * channels, 2 * 66 * _MOST_VOXELS * max(channels, extra)
    planes = max(_CACHE, 9 * row)
    of_thread = planes + planes * extra // channels + 4 * behind
    strips = 1 + height * 3 * row // _CACHE if 9 * row < _CACHE else height
    statistics = 20 * strips * depth * outputs * (8 if edge == 4 else 1)
    return 2 * (edge**3 * channels + extra) * outputs + torch.get_num_threads() * of_thread + statistics


def direct_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """F.conv3d(x, weight, bias, padding=padding), summed in float32. No gradient.

    x: bfloat16 [B, C, D, H, W] on the CPU, best in channels-last memory; weight: [O, C, 3, 3, 3]; bias: [O] or none;
        padding 0 or 1.
    Returns [B, O, …] in channels-last memory. Where a number of x is not finite, outputs within seven voxels along W,
    or at the end of a row before, may be not finite either.
    """
    out = scratch_tile(x, len(weight), [n + 2 * padding - 2 for n in x.shape[2:]])
    pads = [padding] * 6
    torch.ops.meddiff._direct_conv3d(_dense(x), None, None, False, weight, bias, pads, None, None, None, out, None)
    return out


def direct_up_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv_transpose3d(x, weight, bias, stride=2, padding=1), as above; weight: [C, O, 4, 4, 4]."""
    out = scratch_tile(x, weight.shape[1], [2 * n for n in x.shape[2:]])
    torch.ops.meddiff._direct_up_conv3d(_dense(x), weight, bias, [1] * 6, out, None)
    return out


def scratch_tile(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialised [B, channels, *size] like x, contiguous in channels-last memory."""
    return x.new_empty((x.shape[0], *size, channels)).permute(0, 4, 1, 2, 3)


def _dense(x: Tensor) -> Tensor:
    """A contiguous channels-last copy, or x itself; PyTorch's idea of it leaves the strides of 1-voxel axes open."""
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def _nothing(*_: object) -> None:
    """Operators that only write into their arguments have this as their fake."""


for _operator in ("_direct_conv3d", "_direct_up_conv3d"):
    torch.library.register_fake(f"meddiff::{_operator}", _nothing)
