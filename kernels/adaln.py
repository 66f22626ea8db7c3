"""What surrounds the layers of a DiT block (Peebles & Xie 2023, "adaLN-Zero"): LayerNorm with modulation in front of a
layer, gate and residual behind it, and both at once between two layers.

    r = x + gate·h
    y = (x − μ)/σ · (1 + scale) + shift,  or the same of r;  σ² = variance + eps, biased

x, h, r, y [B, …, C] float32, bfloat16 or float16; gate, shift and scale [B, C], the same for all tokens of a sample,
usually parts of one [B, 6·C]: they are read where they are. Statistics are per token, over C, in two passes over
registers or cache; they and all arithmetic are float32. r and y have x's dtype; y is normalised from r as it is stored.

Each tensor is read once and written once. So in the backward pass, which sums the gradients of gate, shift and scale
over runs of tokens, and then those sums, always in one order. Gradients have no gradient of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 4096
_BLOCKS_PER_RUN = 8  # blocks of tokens whose gradients of gate, shift and scale one program sums


def layer_norm_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """y by its definition; differentiable."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + _per_sample(scale, x)) + _per_sample(shift, x)


def gate_residual_ref(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """r by its definition; differentiable."""
    return x + _per_sample(gate, x) * h


def _per_sample(v: Tensor, x: Tensor) -> Tensor:
    """[B, C] → [B, 1, …, C] of x's dimensions."""
    return v.view(v.shape[0], *[1] * (x.ndim - 2), v.shape[1])


# One program takes BLOCK_N tokens of one sample at a time, and all C of their channels. GATED: r = x + gate·h is the
# residual that is written and normalised, otherwise x is. NORM: y and the statistics are written. x, h and dr, dy are
# [B, N, C] with any strides, gate, shift and scale have unit stride along C, and what is written is contiguous.


@triton.jit
def _tokens(program, N, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr):
    """Sample and first token of a program, 64-bit; each program has BLOCKS blocks of tokens."""
    runs = tl.cdiv(N, BLOCK_N * BLOCKS)
    return program.to(tl.int64) // runs, program.to(tl.int64) % runs * (BLOCK_N * BLOCKS)


@triton.jit
def _load(base, n, c, stride_n, stride_c, mask):
    offsets = n[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_c
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, n, c, C: tl.constexpr, mask, value):
    tl.store(base + n[:, None] * C + c[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_kernel(
    x, gate, h, shift, scale, r, y, statistics, N, tokens,
    x_b, x_n, x_c, gate_b, h_b, h_n, h_c, shift_b, scale_b, eps,
    C: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, first = _tokens(tl.program_id(0), N, BLOCK_N, 1)
    n, c = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    mask = (n < N)[:, None] & (c < C)[None, :]
    row = b * N + n
    value = _load(x + b * x_b, n, c, x_n, x_c, mask)
    if GATED:
        gates = tl.load(gate + b * gate_b + c, mask=c < C, other=0.0).to(tl.float32)
        value += gates[None, :] * _load(h + b * h_b, n, c, h_n, h_c, mask)
        _store(r, row, c, C, mask, value)
        value = value.to(r.dtype.element_ty).to(tl.float32)
    if NORM:
        mean = tl.sum(value, 1) / C
        centred = tl.where((c < C)[None, :], value - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        scales = 1 + tl.load(scale + b * scale_b + c, mask=c < C, other=0.0).to(tl.float32)
        shifts = tl.load(shift + b * shift_b + c, mask=c < C, other=0.0).to(tl.float32)
        _store(y, row, c, C, mask, centred * rstd[:, None] * scales[None, :] + shifts[None, :])
        tl.store(statistics + row, mean, mask=n < N)
        tl.store(statistics + tokens + row, rstd, mask=n < N)


@triton.jit
def _bwd_kernel(
    dr, dy, x, gate, h, scale, statistics, dx, dh, sums, N, tokens,
    dr_b, dr_n, dr_c, dy_b, dy_n, dy_c, x_b, x_n, x_c, gate_b, h_b, h_n, h_c, scale_b,
    C: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    b, first = _tokens(tl.program_id(0), N, BLOCK_N, BLOCKS)
    c = tl.arange(0, BLOCK_C)
    dgate = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dscale = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if GATED:
        gates = tl.load(gate + b * gate_b + c, mask=c < C, other=0.0).to(tl.float32)
    if NORM:
        scales = 1 + tl.load(scale + b * scale_b + c, mask=c < C, other=0.0).to(tl.float32)
    for block in range(BLOCKS):
        n = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (c < C)[None, :]
        row = b * N + n
        total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        if GATED:
            total += _load(dr + b * dr_b, n, c, dr_n, dr_c, mask)
        if NORM:
            grad = _load(dy + b * dy_b, n, c, dy_n, dy_c, mask)
            mean = tl.load(statistics + row, mask=n < N, other=0.0)
            rstd = tl.load(statistics + tokens + row, mask=n < N, other=0.0)
            normed = (_load(x + b * x_b, n, c, x_n, x_c, mask) - mean[:, None]) * rstd[:, None]
            normed = tl.where(mask, normed, 0.0)
            dshift += grad
            dscale += grad * normed
            grad *= scales[None, :]
            along = tl.sum(grad * normed, 1) / C
            total += (grad - (tl.sum(grad, 1) / C)[:, None] - normed * along[:, None]) * rstd[:, None]
            _store(dx, row, c, C, mask, total)
        if GATED:
            dgate += total * _load(h + b * h_b, n, c, h_n, h_c, mask)
            _store(dh, row, c, C, mask, total * gates[None, :])
    sums += tl.program_id(0).to(tl.int64) * (3 * C) + c
    tl.store(sums, tl.sum(dgate, 0), mask=c < C)
    tl.store(sums + C, tl.sum(dshift, 0), mask=c < C)
    tl.store(sums + 2 * C, tl.sum(dscale, 0), mask=c < C)


def _configuration(channels: int, backward: bool) -> dict[str, int]:
    """Block sizes and warps, chosen by the registers that the compiler reports; no GPU has timed them."""
    width = triton.next_power_of_2(channels)
    elements = 1024 if backward else 2048  # of a program with 4 warps
    return {
        "BLOCK_N": max(1, elements // width),
        "BLOCK_C": width,
        "num_warps": min(16, 4 * max(1, width // elements)),
    }


def _unit_stride(v: Tensor | None) -> Tensor | None:
    return v if v is None or v.stride(1) == 1 else v.contiguous()


def _strides(*tensors: Tensor | None, axes: int) -> list[int]:
    return [n for tensor in tensors for n in ([0] * axes if tensor is None else tensor.stride()[:axes])]


def _launch_forward(
    x: Tensor, gate: Tensor | None, h: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    r, y, statistics = _forward_fake(x, gate, h, shift, scale, eps)
    gate, shift, scale = map(_unit_stride, (gate, shift, scale))
    batch, n, channels = x.shape
    blocks = _configuration(channels, backward=False)
    programs = batch * triton.cdiv(n, blocks["BLOCK_N"])
    if programs > 0:
        strides = _strides(x, axes=3) + _strides(gate, axes=1) + _strides(h, axes=3) + _strides(shift, scale, axes=1)
        _fwd_kernel[(programs,)](
            x, gate, h, shift, scale, r, y, statistics, n, batch * n, *strides, eps,
            C=channels, GATED=h is not None, NORM=scale is not None, **blocks,
        )  # fmt: skip
    return r, y, statistics


def _launch_backward(
    dr: Tensor | None, dy: Tensor | None, x: Tensor, gate: Tensor | None, h: Tensor | None, scale: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dh, *of_samples = _backward_fake(dr, dy, x, gate, h, scale, statistics)
    gate, scale = map(_unit_stride, (gate, scale))
    batch, n, channels = x.shape
    blocks = _configuration(channels, backward=True)
    runs = triton.cdiv(n, blocks["BLOCK_N"] * _BLOCKS_PER_RUN)
    sums = x.new_empty((batch, runs, 3, channels), dtype=torch.float32)
    if sums.numel() > 0:
        strides = _strides(dr, dy, x, axes=3) + _strides(gate, axes=1) + _strides(h, axes=3) + _strides(scale, axes=1)
        _bwd_kernel[(batch * runs,)](
            dr, dy, x, gate, h, scale, statistics, dx, dh, sums, n, batch * n, *strides,
            C=channels, GATED=dr is not None, NORM=dy is not None, BLOCKS=_BLOCKS_PER_RUN, **blocks,
        )  # fmt: skip
    for target, total in zip(of_samples, sums.sum(1).unbind(1)):
        if target.numel() > 0:
            target.copy_(total)
    return dx, dh, *of_samples


def _forward_fake(
    x: Tensor, gate: Tensor | None, h: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """r, y and statistics [2, B, N] float32: mean and 1/σ. What is not asked for is empty."""
    r = x.new_empty(x.shape if h is not None else (0,))
    y = x.new_empty(x.shape if scale is not None else (0,))
    return r, y, x.new_empty((2, *x.shape[:2]) if scale is not None else (0,), dtype=torch.float32)


@torch.library.custom_op("meddiff::_adaln_backward", mutates_args=(), device_types="cpu")
def _backward(
    dr: Tensor | None, dy: Tensor | None, x: Tensor, gate: Tensor | None, h: Tensor | None, scale: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, h, gate, shift and scale from those of r and y, computed in float32.

    x is what was normalised, r where there is one. Without dy that of x is empty: it is dr.
    """
    dx, dh, dgate, dshift, dscale = _backward_fake(dr, dy, x, gate, h, scale, statistics)
    total = 0 if dr is None else dr.float()
    if dy is not None:
        mean, rstd = statistics[..., None]
        normed, grad = (x.float() - mean) * rstd, dy.float()
        dshift.copy_(grad.sum(1))
        dscale.copy_((grad * normed).sum(1))
        grad = grad * (1 + scale.float()[:, None])
        along = (grad * normed).mean(2, keepdim=True)
        total = total + (grad - grad.mean(2, keepdim=True) - normed * along) * rstd
        dx.copy_(total)
    if dr is not None:
        dh.copy_(total * gate.float()[:, None])
        dgate.copy_((total * h.float()).sum(1))
    return dx, dh, dgate, dshift, dscale


def _backward_fake(
    dr: Tensor | None, dy: Tensor | None, x: Tensor, gate: Tensor | None, h: Tensor | None, scale: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def empty(like: Tensor | None, wanted: bool = True) -> Tensor:
        return x.new_empty((0,)) if like is None or not wanted else like.new_empty(like.shape)

    return empty(x, dy is not None), empty(h), empty(gate), empty(scale), empty(scale)


def _no_second_derivative(ctx, *_) -> None:
    raise NotImplementedError("adaln: only first derivatives, got a backward pass through a backward pass")


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gate, h, _, scale, _ = inputs
    r, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    normalised = x if h is None else r
    # without a norm the backward pass takes no more of it than its shape, which h has
    ctx.save_for_backward(normalised if scale is not None else h, gate, h, scale, statistics)


def _differentiate(ctx, dr: Tensor, dy: Tensor, _) -> tuple:
    x, gate, h, scale, statistics = ctx.saved_tensors
    gated, normed = h is not None, scale is not None
    gradients = torch.ops.meddiff._adaln_backward(
        dr if gated else None, dy if normed else None, x, gate, h, scale, statistics
    )
    dx, dh, dgate, dshift, dscale = gradients
    of_gate, of_norm = (dgate, dh) if gated else (None, None), (dshift, dscale) if normed else (None, None)
    return dx if normed else dr, *of_gate, *of_norm, None


torch.library.register_fake("meddiff::_adaln", _forward_fake)
torch.library.impl("meddiff::_adaln", "CUDA", _launch_forward)
torch.library.register_autograd("meddiff::_adaln", _differentiate, setup_context=_save)
_backward.register_fake(_backward_fake)
_backward.register_kernel("cuda", _launch_backward)
_backward.register_autograd(_no_second_derivative)


def _check(function: str, x: Tensor, h: Tensor | None = None, **of_samples: Tensor) -> None:
    for name, tensor in {"x": x, **({} if h is None else {"h": h}), **of_samples}.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{function}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{function}: {name} must be on x's device {x.device}, got {tensor.device}")
    if x.ndim < 3 or not 1 <= x.shape[-1] <= _MAX_CHANNELS:
        raise ValueError(f"{function}: x must be [B, …, C] with C from 1 to {_MAX_CHANNELS}, got {tuple(x.shape)}")
    if h is not None and h.shape != x.shape:
        raise ValueError(f"{function}: h must be {tuple(x.shape)} as x is, got {tuple(h.shape)}")
    for name, tensor in of_samples.items():
        if tensor.shape != (x.shape[0], x.shape[-1]):
            wanted = (x.shape[0], x.shape[-1])
            raise ValueError(f"{function}: {name} must be [B, C] = {wanted}, got {tuple(tensor.shape)}")


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, without affine, times 1 + scale, plus shift.

    x: [B, …, C] with at least one axis of tokens, which may be empty, on any device; float32, bfloat16 or float16, any
        strides. C is 1 to 4096.
    shift, scale: [B, C] of these dtypes, parts of a larger tensor for example.
    Returns x's shape and dtype, contiguous; once differentiable.
    Raises TypeError for other dtypes, ValueError for other shapes or devices.
    Source: Peebles & Xie 2023, section 3.2.
    """
    _check("layer_norm_modulate", x, shift=shift, scale=scale)
    return torch.ops.meddiff._adaln(x.flatten(1, -2), None, None, shift, scale, eps)[1].view(x.shape)


def gate_residual(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate·h, the gate being that of the sample.

    x, h: [B, …, C] and gate [B, C], as for `layer_norm_modulate`.
    Returns x's shape and dtype, contiguous; once differentiable. Raises as `layer_norm_modulate`.
    """
    _check("gate_residual", x, h, gate=gate)
    return torch.ops.meddiff._adaln(x.flatten(1, -2), gate, h.flatten(1, -2), None, None, 0.0)[0].view(x.shape)


def gate_residual_layer_norm_modulate(
    x: Tensor, gate: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """r = gate_residual(x, gate, h) and layer_norm_modulate(r, shift, scale, eps), in one pass.

    Arguments, results and errors are those of the two.
    """
    _check("gate_residual_layer_norm_modulate", x, h, gate=gate, shift=shift, scale=scale)
    tokens = (x.flatten(1, -2), gate, h.flatten(1, -2))
    r, y, _ = torch.ops.meddiff._adaln(*tokens, shift, scale, eps)
    return r.view(x.shape), y.view(x.shape)
