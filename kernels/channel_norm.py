"""LayerNorm over the channels of each voxel, with a gain and no offset: y = (x − mean) / √(var + eps) · gain.

x [..., C], float32, bfloat16 or float16, mean and (biased) variance over the C numbers of a row, which are read once;
gain [C] in x's dtype or float32; y in x's dtype. Sums are float32. On the CPU this is PyTorch's layer_norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 4096  # a row is in the registers of one program
_PROGRAMS = 1024  # that sum the gain's gradient, whatever the GPU is: the order of the sums depends on it


def channel_norm_ref(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """By its definition, computed in x's dtype; differentiable."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return ((x - mean) / (variance + eps).sqrt() * gain).to(x.dtype)


@triton.jit
def _normalised(x, first, R, eps, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets, mask, the normalised rows and their 1 / √(var + eps) [BLOCK_R, 1]."""
    row, c = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    at, mask = row[:, None] * C + c[None, :], (row < R)[:, None] & (c < C)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.where((c < C)[None, :], value - (tl.sum(value, 1) / C)[:, None], 0.0)
    rstd = (1 / tl.sqrt(tl.sum(d * d, 1) / C + eps))[:, None]
    return at, mask, d * rstd, rstd


@triton.jit
def _fwd_kernel(x, gain, y, R, eps, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    at, mask, n, _ = _normalised(x, first, R, eps, C, BLOCK_R, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    g = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + at, (n * g[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(dy, x, gain, dx, partial, R, share, eps, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program takes `share` blocks of rows. partial [programs, C]: Σ dy·n of its rows."""
    c = tl.arange(0, BLOCK_C)
    g = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in range(share):
        first = (tl.program_id(0).to(tl.int64) * share + block) * BLOCK_R
        at, mask, n, rstd = _normalised(x, first, R, eps, C, BLOCK_R, BLOCK_C)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        dgain += grad * n
        dn = grad * g
        along = n * (tl.sum(dn * n, 1) / C)[:, None] + (tl.sum(dn, 1) / C)[:, None]
        tl.store(dx + at, ((dn - along) * rstd).to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * C + c, tl.sum(dgain, 0), mask=c < C)


def _configuration(channels: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    warps = 4 if width <= 2048 else 8
    return {"C": channels, "BLOCK_R": max(1, 2048 // width), "BLOCK_C": width, "num_warps": warps}


def _launch_forward(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    y = _forward_fake(x, gain, eps)
    blocks = _configuration(x.shape[1])
    if len(x) > 0:
        _fwd_kernel[(triton.cdiv(len(x), blocks["BLOCK_R"]),)](x, gain, y, len(x), eps, **blocks)
    return y


def _launch_backward(dy: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx, dgain = _backward_fake(dy, x, gain, eps)
    if len(x) == 0:
        return dx, dgain.zero_()
    blocks = _configuration(x.shape[1])
    total = triton.cdiv(len(x), blocks["BLOCK_R"])
    share = triton.cdiv(total, _PROGRAMS)
    partial = x.new_empty((triton.cdiv(total, share), x.shape[1]), dtype=torch.float32)
    _bwd_kernel[(len(partial),)](dy.contiguous(), x, gain, dx, partial, len(x), share, eps, **blocks)
    return dx, partial.sum(0).to(gain.dtype)


@torch.library.impl("meddiff::_channel_norm", "CPU")
def _forward(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [R, C], contiguous as everywhere below."""
    return F.layer_norm(x, x.shape[1:], gain, eps=eps).to(x.dtype)


@torch.library.custom_op("meddiff::_channel_norm_backward", mutates_args=(), device_types="cpu")
def _backward(dy: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # of bfloat16 and float16, PyTorch sums the gain's gradient in them
    wide = dy.contiguous().float(), x.float(), gain.float()
    _, mean, rstd = torch.native_layer_norm(wide[1], x.shape[1:], wide[2], None, eps)
    dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
        *wide[:2], x.shape[1:], mean, rstd, wide[2], None, [True, True, False]
    )
    return dx.to(x.dtype), dgain.to(gain.dtype)


def _forward_fake(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gain.new_empty(gain.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, gain, ctx.eps = inputs
    ctx.save_for_backward(x, gain)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dy, *ctx.saved_tensors, ctx.eps), None


def _no_second_derivative(ctx, *_: Tensor) -> None:
    raise NotImplementedError("channel_norm: only first derivatives, got a backward pass through a backward pass")


# not a custom_op: PyTorch imports its compiler when one first runs, for 1 s
torch.library.register_fake("meddiff::_channel_norm", _forward_fake)
torch.library.impl("meddiff::_channel_norm", "CUDA", _launch_forward)
torch.library.register_autograd("meddiff::_channel_norm", _differentiate, setup_context=_save)
_backward.register_fake(_backward_fake)
_backward.register_kernel("cuda", _launch_backward)
_backward.register_autograd(_no_second_derivative)


def channel_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """(x − mean) / √(var + eps) · gain over the channels of each voxel.

    x: [B, C, D, H, W] on any device, float32, bfloat16, float16 or float64 (that by `channel_norm_ref`), any strides
        (other memory than channels-last is copied); C from 1 to 4096; B or a length may be 0.
    gain: [C], float32 or of x's dtype.
    Returns [B, C, D, H, W] in x's dtype and channels-last memory; once differentiable.
    Raises TypeError for other dtypes, ValueError for other shapes.
    """
    if x.ndim != 5 or not 1 <= x.shape[1] <= _MAX_CHANNELS:
        raise ValueError(f"channel_norm: x must be [B, C, D, H, W], C from 1 to {_MAX_CHANNELS}, got {tuple(x.shape)}")
    if gain.shape != x.shape[1:2]:
        raise ValueError(f"channel_norm: gain must be [{x.shape[1]}], got {list(gain.shape)}")
    if x.dtype not in (*_DTYPES, torch.float64) or gain.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            "channel_norm: x must be float32, bfloat16, float16 or float64 and gain float32 or the same, "
            f"got {x.dtype} and {gain.dtype}"
        )
    volume = x.permute(0, 2, 3, 4, 1).contiguous()
    if x.dtype == torch.float64:
        return channel_norm_ref(volume, gain, eps).permute(0, 4, 1, 2, 3)
    rows = volume.view(volume[..., 0].numel(), x.shape[1])
    return torch.ops.meddiff._channel_norm(rows, gain.contiguous(), eps).view(volume.shape).permute(0, 4, 1, 2, 3)
