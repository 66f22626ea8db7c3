"""Transposed convolution 4³ with stride 2 and padding 1 of a tile, with the statistics of what is written.

Output plane 2i takes input planes i − 1 (kernel plane 3) and i (1), plane 2i + 1 takes i (2) and i + 1 (0): a tile
needs one input plane on each side, of zeros where the volume ends. On the CPU the convolution is oneDNN's, on a
scratch tile; in bfloat16 it is csrc/direct_conv3d.cpp where the processor has AMX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .direct_conv3d import direct_suits
from .norm_silu_conv3d import (
    _FUSED,
    _check_out,
    _check_tile,
    _nothing,
    _rows,
    _statistics,
    _zeros,
    scratch_tile,
    write_tile,
)


def up_conv3d_ref(x: Tensor, weight: Tensor, bias: Tensor | None, pads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """By its definition, in x's dtype: out and its statistics."""
    y = F.conv_transpose3d(F.pad(x, _zeros(pads)), weight, bias, stride=2, padding=3)
    return y, _statistics(y)


def _run_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, pads: Sequence[int], out: Tensor, statistics: Tensor | None
) -> None:
    if out.numel() == 0:
        if statistics is not None:
            statistics.zero_()
        return
    y, found = up_conv3d_ref(x, weight, bias, pads)
    out.copy_(y)
    if statistics is not None:
        statistics.copy_(found)


def _run_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, pads: Sequence[int], out: Tensor, statistics: Tensor | None
) -> None:
    if x.dtype not in _FUSED or out.numel() == 0:
        _run_ref(x, weight, bias, pads, out, statistics)
        return
    if direct_suits(x, weight, 4):
        torch.ops.meddiff._direct_up_conv3d(_rows(x), weight, bias, pads, out, statistics)
        return
    tile = scratch_tile(x, x.shape[1], [n // 2 + 2 for n in out.shape[2:]])
    torch.ops.meddiff._conv_input(_rows(x), None, None, False, False, [0] * 3, pads, tile)
    y = F.conv_transpose3d(tile, weight, bias, stride=2, padding=3)
    del tile
    write_tile(y, out, statistics)


def nearest_up_weight(weight: Tensor) -> Tensor:
    """Of a transposed convolution that is a nearest doubling and a convolution with zero padding 1 behind it.

    Of each three planes of the kernel two meet the same input plane. weight: [O, C, 3, 3, 3]; returns [C, O, 4, 4, 4],
    summed in float32 at least.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=kind, device=weight.device)
    return torch.einsum("ocxyz,ix,jy,kz->coijk", weight.to(kind), taps, taps, taps).to(weight.dtype)


def up_conv3d_of_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The whole of a volume of few voxels: one product with the weight as it lies in memory gives each input voxel's
    4³ outputs, which are added up, an axis at a time.

    For inference, with a weight so large that oneDNN's copy of it would take more time and memory than all else.
    Returns [B, O, 2D, 2H, 2W] in channels-last memory.
    """
    last = weight.stride(1) == 1
    planes = (weight.permute(0, 2, 3, 4, 1) if last else weight).flatten(1)
    rows = x.permute(0, 2, 3, 4, 1)
    y = (rows.reshape(-1, x.shape[1]) @ planes).view(*rows.shape[:4], *((4, 4, 4, -1) if last else (-1, 4, 4, 4)))
    if not last:
        y = y.movedim(4, 7).contiguous()
    for axis in (1, 2, 3):  # y [B, …, the axes' planes of the kernel that are left, O]
        n = y.shape[axis]
        near, far = (part.movedim(4, axis + 1).flatten(axis, axis + 1) for part in y.split(2, dim=4))
        shape = list(near.shape)
        shape[axis] += 2  # a plane before the volume, and one behind it
        total = near.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
        total.narrow(axis, 0, 2 * n).copy_(near)
        total.narrow(axis, 2, 2 * n).add_(far)
        y = total.narrow(axis, 1, 2 * n)
    return (y if bias is None else y + bias).to(x.dtype).contiguous().permute(0, 4, 1, 2, 3)


def up_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pads: Sequence[int],
    out: Tensor,
    statistics: Tensor | None = None,
) -> None:
    """Write one tile of a transposed convolution, see the module's docstring. No gradient.

    x: [B, C, d, h, w], float32 or bfloat16 (float16 on GPUs; float64 is computed by `up_conv3d_ref`), best a view of
        channels-last memory. Along each axis it holds the tile's n planes and one more on each side where the volume
        goes on.
    weight: [C, O, 4, 4, 4]; bias: [O] or none; in x's dtype, like `out`.
    pads: zero planes before D, after D, before H, after H, before W, after W, each 0 or 1, where the volume ends.
    out: [B, O, 2n of D, 2n of H, 2n of W], written; a view of channels-last memory that is no part of x's.
    statistics: float32 [B, 2, O], written: mean and sum of squared deviations of each channel of `out`, as rounded.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or memory of `out`.
    """
    name = "up_conv3d"
    if x.ndim != 5 or weight.ndim != 5 or out.ndim != 5:
        raise ValueError(
            f"{name}: x and out must be [B, C, D, H, W] and weight [C, O, 4, 4, 4], got {tuple(x.shape)}, "
            f"{tuple(out.shape)} and {tuple(weight.shape)}"
        )
    if len(pads) != 6 or any(pad not in (0, 1) for pad in pads):
        raise ValueError(f"{name}: pads must be 6 numbers, each 0 or 1, got {list(pads)}")
    b, c, o = x.shape[0], x.shape[1], weight.shape[1]
    size = [2 * (n - 2 + before + after) for n, before, after in zip(x.shape[2:], pads[::2], pads[1::2])]
    tensors = {
        "weight": (weight, (c, o, 4, 4, 4)),
        "bias": (bias, (o,)),
        "out": (out, (b, o, *size)),
        "statistics": (statistics, (b, 2, o)),
    }
    _check_tile(name, tensors, x)
    _check_out(name, out)
    torch.ops.meddiff.up_conv3d(x, weight, bias, pads, out, statistics)


torch.library.impl("meddiff::up_conv3d", "CPU", _run_on_cpu)
if not torch._C._dispatch_has_kernel_for_dispatch_key("meddiff::up_conv3d", "CUDA"):
    torch.library.impl("meddiff::up_conv3d", "CUDA", _run_ref)
torch.library.register_fake("meddiff::up_conv3d", _nothing)
