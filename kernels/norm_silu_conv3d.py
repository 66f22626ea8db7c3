"""Convolution of a tile and what stands around it: out = conv(pad(silu(x·scale + shift))) + bias + residual.

x is a tile of a volume with its halo, scale and shift are a GroupNorm whose statistics are known, folded to one pair of
numbers per sample and channel: scale = weight / √(var + eps), shift = bias − mean·scale. Zeros are added AFTER norm and
SiLU, where the volume ends. The statistics of what is written are those that the next norm needs. On the CPU the
convolution is oneDNN's, or `winograd_conv3d` in float32, on a scratch tile, and C++ fills that tile and empties it; in
bfloat16 and with a kernel of 3³ all of it is csrc/direct_conv3d.cpp where the processor has AMX. On a GPU it is
csrc/conv3d_march.h; where that is not built, CUDA tensors take the plain PyTorch code. For compute capability 9.0 there
is csrc/conv3d_wgmma.h as well; until it has been timed, nothing but the private operator _norm_silu_conv3d_wgmma, which
has the same arguments, goes there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .direct_conv3d import _dense, _nothing, direct_conv3d, direct_suits, scratch_tile
from .linear import linear
from .winograd import winograd_conv3d, winograd_pays

_FUSED = (torch.float32, torch.bfloat16)  # on the CPU
_FEW_VOXELS, _LARGE_WEIGHT = 64, 2**20


def _statistics(y: Tensor) -> Tensor:
    """[B, C, D, H, W] → float32 [B, 2, C]: mean and sum of squared deviations."""
    numbers = y.double().flatten(2)
    mean = numbers.mean(2) if numbers.shape[2] else numbers.sum(2)
    return torch.stack([mean, (numbers - mean[:, :, None]).square().sum(2)], dim=1).float()


def _skip(weight: Tensor, pads: Sequence[int], upsample: bool) -> list[int]:
    """Voxels of the doubled x before the first one that is read, along each axis."""
    return [int(upsample and weight.shape[2] == 3 and not before) for before in pads[::2]]


def _zeros(pads: Sequence[int]) -> list[int]:
    """pads in the order of F.pad."""
    return [*pads[4:6], *pads[2:4], *pads[0:2]]


def norm_silu_conv3d_ref(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    upsample: bool,
    weight: Tensor,
    bias: Tensor | None,
    pads: Sequence[int],
    residual: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By its definition: out, computed in x's dtype but for the norm, and its statistics."""
    z = x
    if scale is not None:
        z = x.to(torch.promote_types(x.dtype, torch.float32)) * scale[:, :, None, None, None]
        z = z + shift[:, :, None, None, None]
    z = (F.silu(z) if silu else z).to(x.dtype)
    if upsample:
        for axis, first in enumerate(_skip(weight, pads, upsample), 2):
            last = int(weight.shape[2] == 3 and not pads[2 * axis - 3])  # the second copy of x's last plane
            z = z.repeat_interleave(2, axis)
            z = z.narrow(axis, first, z.shape[axis] - first - last)
    y = F.conv3d(F.pad(z, _zeros(pads)), weight, bias)
    if residual is not None:
        y = y + (residual if residual_weight is None else F.conv3d(residual, residual_weight, residual_bias))
    return y, _statistics(y)


def _rows(x: Tensor) -> Tensor:
    """x, or a copy where the voxels of a row are not one behind the other."""
    c, w = x.shape[1], x.shape[4]
    return x if (c == 1 or x.stride(1) == 1) and (w == 1 or x.stride(4) == c) else _dense(x)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, least: int = 0) -> Tensor:
    """F.conv3d, on the CPU by a faster way where there is one: Winograd's for 3³ kernels in float32, `direct_conv3d`'s
    in bfloat16, a product for 1³ kernels, and oneDNN where PyTorch would unfold float32 tensors, by their number of
    voxels and threads.

    For inference: callers record no gradient, and there is no autocast. With a larger kernel an x of fewer than `least`
    numbers is left to PyTorch.
    """
    if x.device.type == "cpu" and strides_to_one_column(x, weight, stride, padding):
        return conv3d(F.pad(x, (0, stride)), weight, bias, stride, padding, least)[..., :1]
    if weight.shape[2] == stride == 1 and padding == 0:
        return linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    if stride == 1 and padding <= 1 and winograd_pays(x, weight, padding):
        return winograd_conv3d(x, weight, bias, padding)
    if weight_outweighs(x, weight, stride):
        return _unfolded_conv3d(x, weight, bias, stride, padding)
    if stride == 1 and padding <= 1 and direct_suits(x, weight, 3):
        return direct_conv3d(x, weight, bias, padding)
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and x.numel() >= least
    ):
        return torch.mkldnn_convolution(x, weight, bias, (padding,) * 3, (stride,) * 3, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def weight_outweighs(x: Tensor, weight: Tensor, stride: int = 1) -> bool:
    """Whether a convolution on the CPU is bound by reading its weight, which oneDNN lays out anew for every call."""
    return x.device.type == "cpu" and weight.numel() >= _LARGE_WEIGHT and x[:, 0].numel() <= _FEW_VOXELS * stride**3


def strides_to_one_column(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether a convolution strides and gives a single column: there oneDNN is wrong in bfloat16 on processors with AMX
    (PyTorch 2.13). With two columns it is right."""
    return stride > 1 and 0 <= x.shape[4] + 2 * padding - weight.shape[4] < stride


def _unfolded_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """As one product, in the order in which the weight lies in memory."""
    batch, channels = x.shape[:2]
    windows = F.pad(x, [padding] * 6).permute(0, 2, 3, 4, 1)
    for axis in (1, 2, 3):
        windows = windows.unfold(axis, weight.shape[2], stride)  # [B, D, H, W, C, k, k, k] in the end
    size = windows.shape[1:4]
    rows = windows.movedim(4, 7).reshape(batch, *size, -1, channels)  # channel by channel this would take longer
    if weight.stride(1) == 1:
        weight = weight.permute(0, 2, 3, 4, 1)
    else:
        rows = rows.mT
    return linear(rows.reshape(batch, *size, -1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)


def _run_ref(x: Tensor, *arguments) -> None:
    *inputs, out, statistics = arguments
    if out.numel() == 0:
        if statistics is not None:
            statistics.zero_()
        return
    y, found = norm_silu_conv3d_ref(x, *inputs)
    out.copy_(y)
    if statistics is not None:
        statistics.copy_(found)


def _run_on_cpu(x: Tensor, *arguments) -> None:
    if x.dtype not in _FUSED or arguments[-2].numel() == 0:
        _run_ref(x, *arguments)
        return
    scale, shift, silu, upsample, weight, bias, pads, residual, residual_weight, residual_bias, out, statistics = (
        arguments
    )
    ops = torch.ops.meddiff
    fold = [None if t is None else t.contiguous() for t in (scale, shift)]
    if direct_suits(x, weight, 3) and not upsample:
        added = None if residual is None else _rows(residual)
        ops._direct_conv3d(
            _rows(x), *fold, silu, weight, bias, pads, added, residual_weight, residual_bias, out, statistics
        )
        return
    tile = scratch_tile(x, x.shape[1], [n + weight.shape[2] - 1 for n in out.shape[2:]])
    ops._conv_input(_rows(x), *fold, silu, upsample, _skip(weight, pads, upsample), pads, tile)
    y = _dense(conv3d(tile, weight, bias))
    del tile
    if residual_weight is not None:
        tile = scratch_tile(x, residual.shape[1], residual.shape[2:])
        ops._conv_input(_rows(residual), None, None, False, False, [0] * 3, [0] * 6, tile)
        residual = conv3d(tile, residual_weight, residual_bias)
        del tile
    ops._conv_output(y, None if residual is None else _rows(residual), out, statistics)


def _check_tile(name: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]], x: Tensor) -> None:
    for argument, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape) or tensor.device != x.device:
            raise ValueError(
                f"{name}: {argument} must be {list(shape)} on {x.device}, got {list(tensor.shape)} on {tensor.device}"
            )
        wanted = torch.float32 if argument in ("scale", "shift", "statistics") else x.dtype
        if tensor.dtype != wanted and not (x.dtype == torch.float64 and tensor.dtype == x.dtype):
            raise TypeError(f"{name}: {argument} must be {wanted}, got {tensor.dtype}")


def _check_out(name: str, out: Tensor) -> None:
    c, w = out.shape[1], out.shape[4]
    if (c > 1 and out.stride(1) != 1) or (w > 1 and out.stride(4) != c):
        raise ValueError(f"{name}: out must be channels-last, a view of whole rows or a part of them; copy it first")


def norm_silu_conv3d(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    upsample: bool,
    weight: Tensor,
    bias: Tensor | None,
    pads: Sequence[int],
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    out: Tensor,
    statistics: Tensor | None = None,
) -> None:
    """Write one tile of a convolution, see the module's docstring. No gradient.

    Along each axis let k be 3 or 1, n the tile's output planes, and zeros the two numbers of `pads` for it; then
    n + k − 1 − zeros planes are read. Without `upsample` these are all of x's. With it, they are planes of x doubled
    (each plane twice). Such a tile begins at an even output plane 2i and has an even n = 2m: it reads from x's planes
    i … i + m − 1, both copies, and for k = 3 of plane i − 1 the second copy and of plane i + m the first, where no zero
    plane stands there instead. x holds exactly those planes.

    x: [B, C, d, h, w], float32 or bfloat16 (float16 on GPUs; float64 is computed by `norm_silu_conv3d_ref`), best a
        view of channels-last memory; no view of `out`, unless the planes that are read are none of those written.
    scale, shift: float32 [B, C], both or neither: x·scale + shift is what is activated.
    silu: whether it is.
    upsample: nearest doubling of every axis, after the activation.
    weight: [O, C, 3, 3, 3] or [O, C, 1, 1, 1]; bias: [O] or none; in x's dtype, like everything but the statistics.
    pads: zero planes before D, after D, before H, after H, before W, after W, each 0 or 1, after the doubling.
    residual: [B, O, *out's size], added as it is, or [B, R, *out's size] with residual_weight [O, R, 1, 1, 1] and
        residual_bias [O] or none.
    out: [B, O, D, H, W], written; a view of channels-last memory.
    statistics: float32 [B, 2, O], written: mean and sum of squared deviations of the D·H·W numbers of each channel
        of `out`, as rounded to its dtype; zeros if there are none.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or memory of `out`.
    """
    name = "norm_silu_conv3d"
    if x.ndim != 5 or weight.ndim != 5 or out.ndim != 5:
        raise ValueError(
            f"{name}: x and out must be [B, C, D, H, W] and weight [O, C, k, k, k], got {tuple(x.shape)}, "
            f"{tuple(out.shape)} and {tuple(weight.shape)}"
        )
    b, c, o, k = x.shape[0], x.shape[1], weight.shape[0], weight.shape[2]
    if k not in (1, 3) or tuple(weight.shape) != (o, c, k, k, k):
        raise ValueError(f"{name}: weight must be [O, {c}, 3, 3, 3] or [O, {c}, 1, 1, 1], got {list(weight.shape)}")
    if len(pads) != 6 or any(pad not in (0, 1) for pad in pads):
        raise ValueError(f"{name}: pads must be 6 numbers, each 0 or 1, got {list(pads)}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{name}: scale and shift must both be given or neither, got one")
    if residual is None and residual_weight is not None:
        raise ValueError(f"{name}: residual_weight is given, and no residual; give both or neither")
    if residual_weight is None and residual_bias is not None:
        raise ValueError(f"{name}: residual_bias is given, and no residual_weight; give both or neither")
    size = []
    for n, first, before, after in zip(out.shape[2:], _skip(weight, pads, upsample), pads[::2], pads[1::2]):
        read = n + k - 1 - before - after
        if upsample and n % 2:
            raise ValueError(f"{name}: with upsample, out must have even lengths, got {list(out.shape[2:])}")
        size.append((first + read + 1) // 2 if upsample else read)
    extra = out.shape[1] if residual_weight is None or residual is None else residual.shape[1]
    tensors = {
        "x": (x, (b, c, *size)),
        "scale": (scale, (b, c)),
        "shift": (shift, (b, c)),
        "bias": (bias, (o,)),
        "weight": (weight, (o, c, k, k, k)),
        "out": (out, (b, o, *out.shape[2:])),
        "residual": (residual, (b, extra, *out.shape[2:])),
        "residual_weight": (residual_weight, (o, extra, 1, 1, 1)),
        "residual_bias": (residual_bias, (o,)),
        "statistics": (statistics, (b, 2, o)),
    }
    _check_tile(name, tensors, x)
    _check_out(name, out)
    torch.ops.meddiff.norm_silu_conv3d(
        x, scale, shift, silu, upsample, weight, bias, pads, residual, residual_weight, residual_bias, out, statistics
    )


def write_tile(y: Tensor, out: Tensor, statistics: Tensor | None) -> None:
    """Copy a tile y, contiguous in channels-last memory, to `out`, and take its `statistics` as above."""
    if y.device.type == "cpu" and y.dtype in _FUSED:
        torch.ops.meddiff._conv_output(_dense(y), None, out, statistics)
        return
    out.copy_(y)
    if statistics is not None:
        statistics.copy_(_statistics(y))


torch.library.impl("meddiff::norm_silu_conv3d", "CPU", _run_on_cpu)
if not torch._C._dispatch_has_kernel_for_dispatch_key("meddiff::norm_silu_conv3d", "CUDA"):
    torch.library.impl("meddiff::norm_silu_conv3d", "CUDA", _run_ref)
for _operator in ("norm_silu_conv3d", "_norm_silu_conv3d_wgmma", "_conv_input", "_conv_output"):
    torch.library.register_fake(f"meddiff::{_operator}", _nothing)
