"""GroupNorm, scale and shift, SiLU: y = silu(z), z = ((x − mean) / √(var + eps) · weight + bias) · (1 + scale) + shift.

x [B, C, D, H, W], float32, bfloat16 or float16, mean and (biased) variance over the voxels and channels of a group;
weight, bias [C]; scale, shift [B, C] or none; y in x's dtype. In channels-last memory a volume is [B, voxels, C].

One pass over x for the statistics, float32 (on the CPU partly float64), by Chan's merge of (count, mean, sum of squared
deviations) in an order that depends on the shape alone; one to write y. The gradient takes two as well: dz is computed
for its sums, and again for dx. With n the normalised x and m = weight·(1 + scale), of which z = n·m + …:
    dx = (m·dz − mean(m·dz) − n·mean(m·dz·n)) / √(var + eps).
The kernels write Σ dz and Σ dz·n per sample and channel; dweight, dbias, dscale and dshift are made of those.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_silu_ref(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """By its definition, computed in x's dtype; differentiable."""
    per_channel = (1, -1, 1, 1, 1)
    numbers = x.reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(numbers, dim=2, correction=0, keepdim=True)
    z = ((numbers - mean) / (variance + eps).sqrt()).view(x.shape)
    z = z * weight.view(per_channel) + bias.view(per_channel)
    if scale is not None:
        z = z * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    return (F.silu(z) if silu else z).to(x.dtype, memory_format=torch.channels_last_3d)


# The volume is [B, N, C]. A program of the large kernels takes ROWS voxels of one sample, BLOCK_N at a time, and
# BLOCK_C channels; S programs cover the N voxels. The statistics are of d = x − pivot, the group's first number, so
# that a mean far from 0 costs no digits. stats [3, B, G]: mean, what float32 lost of it, 1 / √(var + eps).


@triton.jit
def _place(N, C, S, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, split, first voxel, all 64-bit, and the channels of a program."""
    parts = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    c = (program % parts).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // parts % S
    return program // parts // S, split, split * ROWS, c


@triton.jit
def _tile(b, first, c, N, C, BLOCK_N: tl.constexpr):
    """Offsets and mask of BLOCK_N voxels."""
    i = first + tl.arange(0, BLOCK_N)
    return (b * N + i)[:, None] * C + c[None, :], (i < N)[:, None] & (c < C)[None, :]


@triton.jit
def _load(base, offsets, mask):
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _multiplier(weight, scale, b, c, C, scale_b, scale_c, MODULATED: tl.constexpr):
    m = _load(weight, c, c < C)
    if MODULATED:
        m *= 1 + _load(scale, b * scale_b + c.to(tl.int64) * scale_c, c < C)
    return m


@triton.jit
def _fold(
    stats, weight, bias, scale, shift, b, c, B, C, G, scale_b, scale_c, shift_b, shift_c, MODULATED: tl.constexpr
):  # fmt: skip
    """centre, gain, offset of each channel: z = (x − centre)·gain + offset."""
    inside = c < C
    group = b * G + c // (C // G)
    m = _multiplier(weight, scale, b, c, C, scale_b, scale_c, MODULATED)
    offset = _load(bias, c, inside)
    if MODULATED:
        offset *= 1 + _load(scale, b * scale_b + c.to(tl.int64) * scale_c, inside)
        offset += _load(shift, b * shift_b + c.to(tl.int64) * shift_c, inside)
    gain = m * _load(stats + 2 * B * G, group, inside)
    return _load(stats, group, inside), gain, offset - gain * _load(stats + B * G, group, inside)


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _moments_kernel(
    x, partial, N, C, G, S, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """partial [B, S, 2, C]: mean and sum of squared deviations of d, per split and channel."""
    b, split, first, c = _place(N, C, S, ROWS, BLOCK_C)
    in_group = C // G
    pivot = _load(x, b * N * C + c // in_group * in_group, c < C)
    mean = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        at, mask = _tile(b, first + start, c, N, C, BLOCK_N)
        d = tl.where(mask, _load(x, at, mask) - pivot[None, :], mean)
        delta = d - mean
        mean += delta * (1.0 / (start // BLOCK_N + 1))
        m2 += delta * (d - mean)
    left = tl.minimum(N - first, ROWS) - tl.arange(0, BLOCK_N)
    count = (tl.maximum(left + (BLOCK_N - 1), 0) // BLOCK_N).to(tl.float32)[:, None]
    total = tl.sum(count * mean, 0) / tl.minimum(N - first, ROWS).to(tl.float32)
    m2 = tl.sum(m2 + count * (mean - total[None, :]) * (mean - total[None, :]), 0)
    to = (b * S + split) * 2 * C + c
    tl.store(partial + to, total, mask=c < C)
    tl.store(partial + to + C, m2, mask=c < C)


@triton.jit
def _merge_moments_kernel(
    x, partial, stats, B, N, C, G, S, eps, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """One program per sample and group, of at most BLOCK_G channels."""
    program = tl.program_id(0).to(tl.int64)
    b, g, in_group = program // G, program % G, C // G
    j = tl.arange(0, BLOCK_G)
    pivot = tl.load(x + b * N * C + g * in_group).to(tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    numbers = 1.0 * N * in_group
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (b * S + s)[:, None] * 2 * C + (g * in_group + j)[None, :]
        count = tl.minimum(N - s.to(tl.int64) * ROWS, ROWS).to(tl.float32)[:, None]
        total += count * _load(partial, at, (s < S)[:, None] & (j < in_group)[None, :])
    mean = tl.sum(tl.sum(total, 1), 0) / numbers
    m2 = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < S)[:, None] & (j < in_group)[None, :]
        at = (b * S + s)[:, None] * 2 * C + (g * in_group + j)[None, :]
        count = tl.minimum(N - s.to(tl.int64) * ROWS, ROWS).to(tl.float32)[:, None]
        delta = _load(partial, at, inside) - mean
        m2 += tl.where(inside, _load(partial, at + C, inside) + count * delta * delta, 0.0)
    variance = tl.sum(tl.sum(m2, 1), 0) / numbers
    centre = pivot + mean
    from_mean = centre - pivot
    tl.store(stats + program, centre)
    tl.store(stats + B * G + program, (pivot - (centre - from_mean)) + (mean - from_mean))
    tl.store(stats + 2 * B * G + program, 1 / tl.sqrt_rn(variance + eps))


@triton.jit
def _apply_kernel(
    x, y, stats, weight, bias, scale, shift, B, N, C, G, S, scale_b, scale_c, shift_b, shift_c,
    MODULATED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, _, first, c = _place(N, C, S, ROWS, BLOCK_C)
    centre, gain, offset = _fold(
        stats, weight, bias, scale, shift, b, c, B, C, G, scale_b, scale_c, shift_b, shift_c, MODULATED
    )
    for start in range(0, ROWS, BLOCK_N):
        at, mask = _tile(b, first + start, c, N, C, BLOCK_N)
        z = (_load(x, at, mask) - centre[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z *= _sigmoid(z)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dz(x, dy, at, mask, centre, gain, offset, SILU: tl.constexpr):
    """x − centre and dz."""
    d = _load(x, at, mask) - centre[None, :]
    dz = _load(dy, at, mask)
    if SILU:
        z = d * gain[None, :] + offset[None, :]
        s = _sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    return d, dz


@triton.jit
def _sums_kernel(
    x, dy, partial, stats, weight, bias, scale, shift, B, N, C, G, S, scale_b, scale_c, shift_b, shift_c,
    MODULATED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [B, S, 2, C]: Σ dz and Σ dz·(x − centre), per split and channel."""
    b, split, first, c = _place(N, C, S, ROWS, BLOCK_C)
    centre, gain, offset = _fold(
        stats, weight, bias, scale, shift, b, c, B, C, G, scale_b, scale_c, shift_b, shift_c, MODULATED
    )
    of_dz = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    of_dz_x = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        at, mask = _tile(b, first + start, c, N, C, BLOCK_N)
        d, dz = _dz(x, dy, at, mask, centre, gain, offset, SILU)
        of_dz += tl.where(mask, dz, 0.0)
        of_dz_x += tl.where(mask, dz * d, 0.0)
    to = (b * S + split) * 2 * C + c
    tl.store(partial + to, tl.sum(of_dz, 0), mask=c < C)
    tl.store(partial + to + C, tl.sum(of_dz_x, 0), mask=c < C)


@triton.jit
def _merge_sums_kernel(
    partial, stats, weight, scale, sums, line, B, N, C, G, S, scale_b, scale_c,
    MODULATED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """sums [2, B, C]: Σ dz and Σ dz·n. line [2, B, G]: slope and level, dx = dz·gain + (x − centre)·slope + level."""
    program = tl.program_id(0).to(tl.int64)
    b, g, in_group = program // G, program % G, C // G
    j = tl.arange(0, BLOCK_G)
    c = (g * in_group).to(tl.int32) + j
    of_dz = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    of_dz_x = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < S)[:, None] & (j < in_group)[None, :]
        at = (b * S + s)[:, None] * 2 * C + c[None, :]
        of_dz += _load(partial, at, inside)
        of_dz_x += _load(partial, at + C, inside)
    lost, rstd = tl.load(stats + B * G + program), tl.load(stats + 2 * B * G + program)
    dz = tl.sum(of_dz, 0)
    dz_n = rstd * (tl.sum(of_dz_x, 0) - lost * dz)
    tl.store(sums + b * C + c, dz, mask=j < in_group)
    tl.store(sums + (B + b) * C + c, dz_n, mask=j < in_group)
    m = tl.where(j < in_group, _multiplier(weight, scale, b, c, C, scale_b, scale_c, MODULATED), 0.0)
    numbers = 1.0 * N * in_group
    slope = -rstd * rstd * (tl.sum(m * dz_n, 0) / numbers)
    tl.store(line + program, slope)
    tl.store(line + B * G + program, -rstd * (tl.sum(m * dz, 0) / numbers) - slope * lost)


@triton.jit
def _dx_kernel(
    x, dy, dx, line, stats, weight, bias, scale, shift, B, N, C, G, S, scale_b, scale_c, shift_b, shift_c,
    MODULATED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, _, first, c = _place(N, C, S, ROWS, BLOCK_C)
    centre, gain, offset = _fold(
        stats, weight, bias, scale, shift, b, c, B, C, G, scale_b, scale_c, shift_b, shift_c, MODULATED
    )
    group = b * G + c // (C // G)
    slope, level = _load(line, group, c < C), _load(line + B * G, group, c < C)
    for start in range(0, ROWS, BLOCK_N):
        at, mask = _tile(b, first + start, c, N, C, BLOCK_N)
        d, dz = _dz(x, dy, at, mask, centre, gain, offset, SILU)
        result = dz * gain[None, :] + (d * slope[None, :] + level[None, :])
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)


def _configuration(channels: int, groups: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and warps of the large kernels and of those that merge; no GPU has timed them."""
    width = min((128, 64), key=lambda width: triton.cdiv(channels, width) * width)
    width = min(width, triton.next_power_of_2(channels))
    in_group = triton.next_power_of_2(channels // groups)
    merge = {"BLOCK_S": max(1, 1024 // in_group), "BLOCK_G": in_group, "num_warps": 4}
    return {"BLOCK_N": 2048 // width, "BLOCK_C": width, "num_warps": 4}, merge


class _Plan:
    """How an x [B, N, C] is cut: for the kernels that reduce it into some thousand programs, whatever the GPU is, as
    the order of the sums depends on it; for the others into many."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.batch, voxels, channels = x.shape
        self.sizes = (voxels, channels, groups)
        self.blocks, self.merge_blocks = _configuration(channels, groups)
        self.parts = triton.cdiv(channels, self.blocks["BLOCK_C"])
        share = self.batch * self.parts * voxels // 2048
        self.rows = max(self.blocks["BLOCK_N"], 1 << max(share.bit_length() - 1, 0))
        self.few_rows = 4 * self.blocks["BLOCK_N"]

    def splits(self, rows: int) -> int:
        return triton.cdiv(self.sizes[0], rows)

    def programs(self, rows: int) -> tuple[int]:
        return (self.batch * self.parts * self.splits(rows),)

    def partial(self, x: Tensor) -> Tensor:
        return x.new_empty((self.batch, self.splits(self.rows), 2, x.shape[2]), dtype=torch.float32)


def _modulation(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, bool]]:
    """Tensors, strides and flags of the parameters, as the kernels take them."""
    flags = {"MODULATED": scale is not None, "SILU": silu}
    if scale is None:
        return (weight.contiguous(), bias.contiguous(), weight, bias), (0, 0, 0, 0), flags
    return (weight.contiguous(), bias.contiguous(), scale, shift), (*scale.stride(), *shift.stride()), flags


def _launch_forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, stats = _forward_fake(x, groups, weight, bias, eps, scale, shift, silu)
    if x.numel() == 0:
        return y, stats
    plan = _Plan(x, groups)
    parameters, strides, flags = _modulation(weight, bias, scale, shift, silu)
    partial = plan.partial(x)
    _moments_kernel[plan.programs(plan.rows)](
        x, partial, *plan.sizes, plan.splits(plan.rows), ROWS=plan.rows, **plan.blocks
    )
    _merge_moments_kernel[(plan.batch * groups,)](
        x, partial, stats, plan.batch, *plan.sizes, plan.splits(plan.rows), eps, ROWS=plan.rows, **plan.merge_blocks
    )
    _apply_kernel[plan.programs(plan.few_rows)](
        x, y, stats, *parameters, plan.batch, *plan.sizes, plan.splits(plan.few_rows), *strides,
        ROWS=plan.few_rows, **flags, **plan.blocks,
    )  # fmt: skip
    return y, stats


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    x, dy = x.contiguous(), dy.contiguous()
    dx, sums = _backward_fake(dy, x, stats, groups, weight, bias, scale, shift, silu)
    if x.numel() == 0:
        return dx, sums.zero_()
    plan = _Plan(x, groups)
    parameters, strides, flags = _modulation(weight, bias, scale, shift, silu)
    partial, line = plan.partial(x), stats.new_empty((2, plan.batch, groups))
    _sums_kernel[plan.programs(plan.rows)](
        x, dy, partial, stats, *parameters, plan.batch, *plan.sizes, plan.splits(plan.rows), *strides,
        ROWS=plan.rows, **flags, **plan.blocks,
    )  # fmt: skip
    _merge_sums_kernel[(plan.batch * groups,)](
        partial, stats, parameters[0], parameters[2], sums, line, plan.batch, *plan.sizes, plan.splits(plan.rows),
        *strides[:2], MODULATED=flags["MODULATED"], **plan.merge_blocks,
    )  # fmt: skip
    _dx_kernel[plan.programs(plan.few_rows)](
        x, dy, dx, line, stats, *parameters, plan.batch, *plan.sizes, plan.splits(plan.few_rows), *strides,
        ROWS=plan.few_rows, **flags, **plan.blocks,
    )  # fmt: skip
    return dx, sums


def _forward_fake(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((3, x.shape[0], groups), dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[0], x.shape[2]), dtype=torch.float32)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, _, scale, shift, ctx.silu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, bias, scale, shift)


def _differentiate(ctx, dy: Tensor, _: Tensor) -> tuple:
    x, stats, weight, bias, scale, shift = ctx.saved_tensors
    dx, (dz, dz_n) = torch.ops.meddiff._group_norm_silu_backward(
        dy, x, stats, ctx.groups, weight, bias, scale, shift, ctx.silu
    )
    dscale = dshift = None
    if scale is not None:
        dscale = (weight.float() * dz_n + bias.float() * dz).to(scale.dtype)
        dshift = dz.to(shift.dtype)
        factor = 1 + scale.float()
        dz, dz_n = factor * dz, factor * dz_n
    dweight, dbias = dz_n.sum(0).to(weight.dtype), dz.sum(0).to(bias.dtype)
    return dx, None, dweight, dbias, None, dscale, dshift, None


def _no_second_derivative(ctx, *_: Tensor) -> None:
    raise NotImplementedError("group_norm_silu: only first derivatives, got a backward pass through a backward pass")


def _normalise(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    if x.dtype not in (*_DTYPES, torch.float64):
        raise TypeError(f"group_norm_silu: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != 5 or groups < 1 or x.shape[1] < 1 or x.shape[1] % groups:
        raise ValueError(
            f"group_norm_silu: x must be [B, C, D, H, W], C a positive multiple of {groups} groups, "
            f"got {tuple(x.shape)}"
        )
    if (scale is None) != (shift is None):
        raise ValueError("group_norm_silu: scale and shift must both be given or neither, got one")
    b, c, d, h, w = x.shape
    expected = {"weight": (weight, (c,)), "bias": (bias, (c,)), "scale": (scale, (b, c)), "shift": (shift, (b, c))}
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"group_norm_silu: {name} must be {list(shape)} on {x.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"group_norm_silu: {name} must be float32 or of x's {x.dtype}, got {tensor.dtype}")
    if x.dtype == torch.float64:
        return group_norm_silu_ref(x, groups, weight, bias, eps, scale, shift, silu)
    rows = x.permute(0, 2, 3, 4, 1).reshape(b, d * h * w, c)
    y, _ = torch.ops.meddiff._group_norm_silu(rows, groups, weight, bias, eps, scale, shift, silu)
    return y.view(b, d, h, w, c).permute(0, 4, 1, 2, 3)


torch.library.register_fake("meddiff::_group_norm_silu", _forward_fake)
torch.library.impl("meddiff::_group_norm_silu", "CUDA", _launch_forward)
torch.library.register_autograd("meddiff::_group_norm_silu", _differentiate, setup_context=_save)
torch.library.register_fake("meddiff::_group_norm_silu_backward", _backward_fake)
torch.library.impl("meddiff::_group_norm_silu_backward", "CUDA", _launch_backward)
torch.library.register_autograd("meddiff::_group_norm_silu_backward", _no_second_derivative)
torch.library.impl("meddiff::group_norm_silu", "CompositeImplicitAutograd", _normalise)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(GroupNorm(x) · (1 + scale) + shift), see the module's docstring.

    x: [B, C, D, H, W] on any device, float32, bfloat16 or float16, any strides (other memory than channels-last is
        copied); B or a length may be 0. float64 is computed by `group_norm_silu_ref`.
    groups: a divisor of C; the channels of a group are consecutive.
    weight, bias: [C]; scale, shift: [B, C], both or neither; each float32 or of x's dtype, any strides.
    eps: added to the variance.
    silu: False leaves the activation out.
    Returns [B, C, D, H, W] in x's dtype and channels-last memory; once differentiable.
    Raises TypeError for other dtypes, ValueError for other shapes or devices, or if scale comes without shift.
    """
    return torch.ops.meddiff.group_norm_silu(x, groups, weight, bias, eps, scale, shift, silu)
