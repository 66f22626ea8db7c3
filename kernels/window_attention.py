"""Multi-head self-attention inside the windows of a volume: out[i] = Σⱼ softmaxⱼ(qᵢ·kⱼ / √head_dim) vⱼ.

qkv [B, D, H, W, 3·C] with any strides, float32, bfloat16 or float16: q, k and v of each token, C = heads·head_dim
numbers each. D, H, W are cut into windows of window³ tokens, and i, j are tokens of one window. out [B, D, H, W, C] in
qkv's dtype, lse [B, heads, D, H, W] float32: log Σⱼ exp(qᵢ·kⱼ / √head_dim), which the backward pass needs. The kernels
read and write the volumes directly; nothing is rearranged into windows.

Softmax and sums are float32. Products are float32 for float32 input; otherwise a GPU multiplies numbers of the input's
dtype, to which it rounds the probabilities, and the CPU float32 (csrc/window_attention.h). The gradient recomputes the
probabilities from lse and has no gradient of its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_HEAD_DIM = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _to_windows(x: Tensor, heads: int, window: int) -> Tensor:
    """[B, D, H, W, heads·n] → [windows, heads, tokens, n]."""
    x = x.unflatten(4, (heads, x.shape[4] // heads))
    for axis in (1, 3, 5):
        x = x.unflatten(axis, (x.shape[axis] // window, window))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5, 7).flatten(0, 3)


def _from_windows(x: Tensor, size: torch.Size, window: int) -> Tensor:
    """The inverse; `size` begins with the volume's B, D, H, W."""
    heads, n = x.shape[1], x.shape[3]
    x = x.reshape(size[0], *(length // window for length in size[1:4]), heads, window, window, window, n)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(*size[:4], heads * n)


def window_attention_ref(qkv: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    """out and lse by their definition, computed in qkv's dtype; differentiable."""
    q, k, v = (_to_windows(part, heads, window) for part in qkv.chunk(3, dim=4))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    out = _from_windows(scores.softmax(-1) @ v, qkv.shape, window)
    return out, _from_windows(scores.logsumexp(-1, keepdim=True).float(), qkv.shape, window).movedim(4, 1)


@triton.jit
def _place(program, D, H, W, HEADS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Batch index, first token (d, h, w) of the window, and head of a program, all 64-bit, and its tokens [BLOCK]."""
    BLOCKS: tl.constexpr = (WINDOW * WINDOW * WINDOW + BLOCK - 1) // BLOCK
    t = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    i = (program // BLOCKS).to(tl.int64)
    head, i = i % HEADS, i // HEADS
    w, i = i % (W // WINDOW), i // (W // WINDOW)
    h, i = i % (H // WINDOW), i // (H // WINDOW)
    d, b = i % (D // WINDOW), i // (D // WINDOW)
    return b, d * WINDOW, h * WINDOW, w * WINDOW, head, t


@triton.jit
def _offsets(t, d, h, w, stride_d, stride_h, stride_w, WINDOW: tl.constexpr):
    """Where the tokens `t` of the window at (d, h, w) are."""
    line = (h + t // WINDOW % WINDOW) * stride_h + (w + t % WINDOW) * stride_w
    return (d + t // (WINDOW * WINDOW)) * stride_d + line


@triton.jit
def _rows(t, b, d, h, w, D, H, W, WINDOW: tl.constexpr):
    """The same for a contiguous [B, D, H, W]."""
    return ((b * D + d + t // (WINDOW * WINDOW)) * H + h + t // WINDOW % WINDOW) * W + w + t % WINDOW


@triton.jit
def _load(base, offsets, columns, mask):
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, offsets, columns, mask, x):
    tl.store(base + offsets[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


# The three kernels. One program takes BLOCK_M tokens of one window and head, and the window's other tokens in blocks of
# BLOCK_N. Every tensor but qkv is contiguous. Scores are in units of log 2: scale_log2 = log₂e / √head_dim.


@triton.jit
def _fwd_kernel(
    qkv, out, lse, D, H, W, stride_b, stride_d, stride_h, stride_w, stride_c, scale_log2,
    HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WINDOW * WINDOW * WINDOW
    C: tl.constexpr = HEADS * DIM
    b, d, h, w, head, i = _place(tl.program_id(0), D, H, W, HEADS, WINDOW, BLOCK_M)
    in_head = (tl.arange(0, BLOCK_D) < DIM)[None, :]
    c = head * DIM + tl.arange(0, BLOCK_D)
    queries = (i < TOKENS)[:, None] & in_head

    qkv += b * stride_b
    q = _load(qkv, _offsets(i, d, h, w, stride_d, stride_h, stride_w, WINDOW), c * stride_c, queries)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, TOKENS, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        keys = (j < TOKENS)[:, None] & in_head
        at = _offsets(j, d, h, w, stride_d, stride_h, stride_w, WINDOW)
        k = _load(qkv, at, (c + C) * stride_c, keys)
        v = _load(qkv, at, (c + 2 * C) * stride_c, keys)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        s = tl.where((j < TOKENS)[None, :], s, float("-inf"))
        largest = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - largest[:, None])
        rescale = tl.exp2(top - largest)
        total = total * rescale + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
        top = largest

    row = _rows(i, b, d, h, w, D, H, W, WINDOW)
    _store(out, row * C, c, queries, o / total[:, None])
    sample = (b * HEADS + head - b) * D * H * W  # lse is [B, heads, D, H, W]
    tl.store(lse + sample + row, (top + tl.log2(total)) * 0.6931471805599453, mask=i < TOKENS)


@triton.jit
def _bwd_dq_kernel(
    qkv, out, grad, lse, dqkv, D, H, W, stride_b, stride_d, stride_h, stride_w, stride_c, scale_log2,
    HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WINDOW * WINDOW * WINDOW
    C: tl.constexpr = HEADS * DIM
    b, d, h, w, head, i = _place(tl.program_id(0), D, H, W, HEADS, WINDOW, BLOCK_M)
    in_head = (tl.arange(0, BLOCK_D) < DIM)[None, :]
    c = head * DIM + tl.arange(0, BLOCK_D)
    queries = (i < TOKENS)[:, None] & in_head

    qkv += b * stride_b
    q = _load(qkv, _offsets(i, d, h, w, stride_d, stride_h, stride_w, WINDOW), c * stride_c, queries)
    row = _rows(i, b, d, h, w, D, H, W, WINDOW)
    do = _load(grad, row * C, c, queries)
    delta = tl.sum(do.to(tl.float32) * _load(out, row * C, c, queries).to(tl.float32), 1)
    sample = (b * HEADS + head - b) * D * H * W
    top = tl.load(lse + sample + row, mask=i < TOKENS, other=0.0) * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, TOKENS, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        keys = (j < TOKENS)[:, None] & in_head
        at = _offsets(j, d, h, w, stride_d, stride_h, stride_w, WINDOW)
        k = _load(qkv, at, (c + C) * stride_c, keys)
        v = _load(qkv, at, (c + 2 * C) * stride_c, keys)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.where((j < TOKENS)[None, :], tl.exp2(s - top[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(dqkv, row * (3 * C), c, queries, dq * (scale_log2 * 0.6931471805599453))


@triton.jit
def _bwd_dkdv_kernel(
    qkv, out, grad, lse, dqkv, D, H, W, stride_b, stride_d, stride_h, stride_w, stride_c, scale_log2,
    HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WINDOW * WINDOW * WINDOW
    C: tl.constexpr = HEADS * DIM
    b, d, h, w, head, j = _place(tl.program_id(0), D, H, W, HEADS, WINDOW, BLOCK_M)
    in_head = (tl.arange(0, BLOCK_D) < DIM)[None, :]
    c = head * DIM + tl.arange(0, BLOCK_D)
    keys = (j < TOKENS)[:, None] & in_head

    qkv += b * stride_b
    at = _offsets(j, d, h, w, stride_d, stride_h, stride_w, WINDOW)
    k = _load(qkv, at, (c + C) * stride_c, keys)
    v = _load(qkv, at, (c + 2 * C) * stride_c, keys)
    sample = (b * HEADS + head - b) * D * H * W
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, TOKENS, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        queries = (i < TOKENS)[:, None] & in_head
        q = _load(qkv, _offsets(i, d, h, w, stride_d, stride_h, stride_w, WINDOW), c * stride_c, queries)
        row = _rows(i, b, d, h, w, D, H, W, WINDOW)
        do = _load(grad, row * C, c, queries)
        delta = tl.sum(do.to(tl.float32) * _load(out, row * C, c, queries).to(tl.float32), 1)
        # no probability for queries past the end
        top = tl.load(lse + sample + row, mask=i < TOKENS, other=float("inf")) * 1.4426950408889634
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - top[None, :])  # [keys, queries]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    row = _rows(j, b, d, h, w, D, H, W, WINDOW)
    _store(dqkv, row * (3 * C), c + C, keys, dk * (scale_log2 * 0.6931471805599453))
    _store(dqkv, row * (3 * C), c + 2 * C, keys, dv)


def _configuration(head_dim: int, window: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Block sizes and warps with which nothing spills on sm_80, sm_90 and sm_100; no GPU has timed them."""
    half = dtype != torch.float32
    tokens, width = triton.next_power_of_2(window**3), max(16, triton.next_power_of_2(head_dim))
    rows = (64 if backward or width == 64 else 128) if half else 32
    return {
        "BLOCK_M": min(rows, max(16, tokens)),
        "BLOCK_N": min(64 if half and not backward else 32, max(16, tokens)),
        "BLOCK_D": width,
        "num_warps": 4 if half and width < 64 else 8,
    }


def _launch(kernel: triton.JITFunction, qkv: Tensor, others: list[Tensor], heads: int, window: int) -> None:
    b, d, h, w, channels = qkv.shape
    head_dim = channels // 3 // heads
    blocks = _configuration(head_dim, window, qkv.dtype, kernel is not _fwd_kernel)
    programs = qkv[..., 0].numel() // window**3 * heads * triton.cdiv(window**3, blocks["BLOCK_M"])
    if programs > 0:
        scale_log2 = math.log2(math.e) / math.sqrt(head_dim)
        sizes = {"HEADS": heads, "DIM": head_dim, "WINDOW": window}
        kernel[(programs,)](qkv, *others, d, h, w, *qkv.stride(), scale_log2, **sizes, **blocks)


def _launch_forward(qkv: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    out, lse = _window_attention_fake(qkv, heads, window)
    _launch(_fwd_kernel, qkv, [out, lse], heads, window)
    return out, lse


def _launch_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, window: int) -> Tensor:
    dqkv = _backward_fake(grad, qkv, out, lse, heads, window)
    tensors = [out, grad.contiguous(), lse, dqkv]
    _launch(_bwd_dq_kernel, qkv, tensors, heads, window)
    _launch(_bwd_dkdv_kernel, qkv, tensors, heads, window)
    return dqkv


def _window_attention_fake(qkv: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty((*qkv.shape[:4], qkv.shape[4] // 3))
    return out, qkv.new_empty((qkv.shape[0], heads, *qkv.shape[1:4]), dtype=torch.float32)


def _backward_fake(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, window: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _no_second_derivative(ctx, grad: Tensor) -> None:
    raise NotImplementedError("window_attention: only first derivatives, got a backward pass through a backward pass")


def _save(ctx, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.meddiff._window_attention_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.window), None, None


def _attend(qkv: Tensor, heads: int, window: int) -> Tensor:
    if qkv.dtype not in _DTYPES:
        raise TypeError(f"window_attention: qkv must be float32, bfloat16 or float16, got {qkv.dtype}")
    if heads < 1 or window < 1:
        raise ValueError(f"window_attention: heads and window must be positive, got {heads} and {window}")
    if qkv.ndim != 5 or any(n % window for n in qkv.shape[1:4]):
        raise ValueError(
            f"window_attention: qkv must be [B, D, H, W, 3·C] with D, H, W multiples of {window}, "
            f"got {tuple(qkv.shape)}"
        )
    if qkv.shape[4] % (3 * heads) or not 1 <= qkv.shape[4] // (3 * heads) <= _MAX_HEAD_DIM:
        raise ValueError(
            f"window_attention: qkv must have 3·{heads}·head_dim channels, head_dim 1 to {_MAX_HEAD_DIM}, "
            f"got {qkv.shape[4]}"
        )
    return torch.ops.meddiff._window_attention(qkv, heads, window)[0]


torch.library.register_fake("meddiff::_window_attention", _window_attention_fake)
torch.library.impl("meddiff::_window_attention", "CUDA", _launch_forward)
torch.library.register_autograd("meddiff::_window_attention", _differentiate, setup_context=_save)
torch.library.register_fake("meddiff::_window_attention_backward", _backward_fake)
torch.library.impl("meddiff::_window_attention_backward", "CUDA", _launch_backward)
torch.library.register_autograd("meddiff::_window_attention_backward", _no_second_derivative)
torch.library.impl("meddiff::window_attention", "CompositeImplicitAutograd", _attend)


def window_attention(qkv: Tensor, heads: int, window: int) -> Tensor:
    """Self-attention among the tokens of each window.

    qkv: [B, D, H, W, 3·C] on any device, float32, bfloat16 or float16, any strides; B or a length may be 0.
    heads: C = heads·head_dim, head_dim 1 to 64; each of q, k, v is head-major.
    window: tokens along each side of a window, of which D, H, W are multiples.
    Returns [B, D, H, W, C] in qkv's dtype, contiguous; once differentiable.
    Raises TypeError for other dtypes, ValueError for other shapes.
    """
    return torch.ops.meddiff.window_attention(qkv, heads, window)
