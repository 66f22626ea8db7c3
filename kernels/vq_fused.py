"""Nearest code with what stands before and behind it, in one pass over the tokens.

vq_encode   the encoder's patches f [n, C, q, q, q] → z = W f + b, stitched to latents [B, C, d, h, w] in the order of
            `patchify`; k = argminₖ |z − codeₖ|²; the code rows, with the gradient of z (van den Oord et al. 2017); and
            of each code the sum of its tokens and their number, for the moving averages of training
vq_decode   a latent in the denoiser's range → z = (latent + 1)(max − min)/2 + min; k as above; row k of a table, which
            is what a 1³ convolution makes of each code

f is float32, bfloat16 or float16; W [C, C], b [C], codes [K, C] and z float32; k int64; the table [K, M] any float.
Ties give the lowest index, tokens with a NaN index 0. There is no token × code matrix and no one-hot.

The CPU searches as `vq_nearest` does (csrc/vq_fused.cpp). The Triton kernel scores z·c − |c|²/2, both minus the mean
code, on tensor cores in three TF32 products, and keeps the two best of each token. Where rounding could have swapped
them, a second loop takes float64 distances to all codes that are close enough. So the index is that of the float64
distances, summed channel by channel, on any device. Statistics are summed in the order of the tokens, without atomics,
in a second pass over tokens sorted by code.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .patchify import stitch_ref
from .vq_nearest import vq_nearest_ref

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 64
_MAX_TOKENS = 2**31 - 64
_UNFUSED = {"enable_fp_fusion": False}  # float64 distances round as on the CPU


def code_statistics(latent: Tensor, index: Tensor, n_codes: int) -> Tensor:
    """Sum of the tokens of each code, then their number, float32 [K, C + 1]; deterministic on any device.

    latent: float32 [B, C, D, H, W]; index: int64 [B, D, H, W], each in [0, n_codes).
    """
    code, order = index.flatten().sort(stable=True)
    tokens = latent.movedim(1, -1).flatten(0, -2)[order]
    ends = torch.searchsorted(code, torch.arange(n_codes + 1, device=code.device))
    sums = torch.segment_reduce(tokens, "sum", offsets=ends, unsafe=True, initial=0)
    return torch.cat([sums, ends.diff()[:, None].to(sums)], dim=1)


def vq_encode_ref(
    features: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, d: int, h: int, w: int, rows: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, index, rows [B, d, h, w, C] and statistics by their definitions; what is not wanted is empty."""
    z = torch.einsum("oc,ncdhw->nodhw", weight, features.float()) + bias[:, None, None, None]
    batch = z.shape[0] * z.shape[2] ** 3 // (d * h * w)
    latent = stitch_ref(z, batch, d, h, w, 0, torch.float32).contiguous()
    _, index, found, sums = _vq_encode_fake(features, weight, bias, codes, d, h, w, rows, statistics)
    if len(codes) > 0:
        index = vq_nearest_ref(latent, codes)
        found = codes[index] if rows else found
        sums = code_statistics(latent, index, len(codes)) if statistics else sums
    return latent, index, found, sums


def vq_decode_ref(
    latent: Tensor, minimum: float | None, maximum: float | None, codes: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Index and table rows [B, D, H, W, M] by their definitions."""
    z = latent if minimum is None else (latent + 1) * ((maximum - minimum) / 2) + minimum
    index = vq_nearest_ref(z, codes)
    return index, table[index]


@triton.jit
def _place(token, D, H, W):
    """Batch index, d, h, w of tokens in B, D, H, W order; 64-bit."""
    b, d, h, w = token // W // H // D, token // W // H % D, token // W % H, token % W
    return b.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)


@triton.jit
def _search(
    z, codes, centred, bias, centre, radius, K,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Index of the code nearest to each row of z [BLOCK_T, BLOCK_C], whose columns from C on are 0.

    centred [K, C] = codes − centre, bias [K] = −|centred|²/2, radius [1] at least the largest |centred|.
    """
    c = tl.arange(0, BLOCK_C)
    x = tl.where((c < C)[None, :], z - tl.load(centre + c, c < C, other=0.0)[None, :], 0.0)
    j = tl.arange(0, BLOCK_K)
    # per token and place in a block of codes: best score, the block it is in, best of the others
    best = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    other = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    block = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + j
        y = tl.load(centred + k[None, :] * C + c[:, None], (k < K)[None, :] & (c < C)[:, None], other=0.0)
        score = tl.dot(x, y, input_precision="tf32x3")
        score += tl.load(bias + k, k < K, other=float("-inf"))[None, :]
        better = score > best
        other = tl.maximum(other, tl.minimum(score, best))
        block = tl.where(better, first, block)
        best = tl.maximum(score, best)
    top = tl.max(best, 1)
    code = block + j[None, :]
    index = tl.min(tl.where(best == top[:, None], code, 2147483647), 1)
    second = tl.max(tl.where(code == index[:, None], other, best), 1)

    # See vq_nearest_slack in csrc/vq_nearest.h, also for float64's own rounding. In units of u = 2⁻²⁴ a TF32 triple is
    # off by at most 64 of |xᵢyᵢ|, and a sum on a tensor core, which truncates, by 4 per term.
    a, r = tl.sqrt(tl.sum(x * x, 1)), tl.load(radius)
    slack = 2.2 * (96 + 4 * BLOCK_C) * 5.9604645e-8 * (a * r + 0.5 * r * r)
    slack += 1.3e-16 * (BLOCK_C + 4) * (a + r) * (a + r) + 1e-36 * BLOCK_C * (1 + a + r)
    close = ~(second < top - slack)  # also where anything is NaN
    if tl.max(close.to(tl.int32), 0) > 0:
        limit = tl.where(close, top - slack, float("inf"))
        nearest = tl.full([BLOCK_T], float("inf"), tl.float64)
        exact = tl.zeros([BLOCK_T], tl.int32)
        for first in range(0, K, BLOCK_K):
            k = first + j
            y = tl.load(centred + k[None, :] * C + c[:, None], (k < K)[None, :] & (c < C)[:, None], other=0.0)
            score = tl.dot(x, y, input_precision="tf32x3")
            score += tl.load(bias + k, k < K, other=float("-inf"))[None, :]
            wanted = ~(score < limit[:, None])
            if tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0:
                distance = tl.zeros([BLOCK_T, BLOCK_K], tl.float64)
                for i in range(C):
                    zi = tl.sum(tl.where((c == i)[None, :], z, 0.0), 1).to(tl.float64)
                    difference = zi[:, None] - tl.load(codes + k * C + i, k < K, other=0.0).to(tl.float64)[None, :]
                    distance += difference * difference
                distance = tl.where((k < K)[None, :] & (distance < float("inf")), distance, float("inf"))
                least = tl.min(distance, 1)
                number = tl.min(tl.where(distance == least[:, None], k[None, :], 2147483647), 1)
                exact = tl.where(least < nearest, number, exact)
                nearest = tl.minimum(nearest, least)
        index = tl.where(close, exact, index)
    return index


@triton.jit
def _encode_kernel(
    features, weight, vector, latent, index, rows, codes, centred, bias, centre, radius, K, tokens, D, H, W,
    stride_n, stride_c, stride_d, stride_h, stride_w,
    SEARCH: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    mask = (token < tokens)[:, None] & (c < C)[None, :]
    b, d, h, w = _place(token, D, H, W)
    patch = ((b * (D // Q) + d // Q) * (H // Q) + h // Q) * (W // Q) + w // Q
    source = patch * stride_n + d % Q * stride_d + h % Q * stride_h + w % Q * stride_w
    f = tl.load(features + source[:, None] + (c.to(tl.int64) * stride_c)[None, :], mask, other=0.0).to(tl.float32)
    square = (c < C)[:, None] & (c < C)[None, :]
    z = tl.dot(f, tl.load(weight + c[None, :] * C + c[:, None], square, other=0.0), input_precision="tf32x3")
    z += tl.load(vector + c, c < C, other=0.0)[None, :]
    target = (b[:, None] * C + c[None, :]) * D + d[:, None]
    tl.store(latent + (target * H + h[:, None]) * W + w[:, None], z, mask)
    if SEARCH:
        k = _search(z, codes, centred, bias, centre, radius, K, C, BLOCK_T, BLOCK_K, BLOCK_C).to(tl.int64)
        tl.store(index + token, k, token < tokens)
        if ROWS:
            row = tl.load(codes + k[:, None] * C + c[None, :], mask, other=0.0)
            tl.store(rows + token.to(tl.int64)[:, None] * C + c[None, :], row, mask)


@triton.jit
def _decode_kernel(
    latent, table, index, rows, half, low, codes, centred, bias, centre, radius, K, tokens, D, H, W, M,
    stride_b, stride_c, stride_d, stride_h, stride_w,
    UNSCALE: tl.constexpr, BLOCK_M: tl.constexpr,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    mask = (token < tokens)[:, None] & (c < C)[None, :]
    b, d, h, w = _place(token, D, H, W)
    source = b * stride_b + d * stride_d + h * stride_h + w * stride_w
    z = tl.load(latent + source[:, None] + (c.to(tl.int64) * stride_c)[None, :], mask, other=0.0)
    if UNSCALE:
        z = tl.where((c < C)[None, :], (z + 1.0) * half + low, 0.0)
    k = _search(z, codes, centred, bias, centre, radius, K, C, BLOCK_T, BLOCK_K, BLOCK_C).to(tl.int64)
    tl.store(index + token, k, token < tokens)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        kept = (token < tokens)[:, None] & (m < M)[None, :]
        tl.store(
            rows + token.to(tl.int64)[:, None] * M + m,
            tl.load(table + k[:, None] * M + m[None, :], kept, other=0.0),
            kept,
        )


def _configuration(channels: int) -> dict[str, int]:
    """Block sizes and warps, chosen by the registers that the compiler reports; no GPU has timed them."""
    width = max(16, triton.next_power_of_2(channels))
    blocks = {"BLOCK_T": 1024 // width, "BLOCK_C": width}
    return blocks | {"BLOCK_K": 32 if width < 64 else 64, "num_warps": 8 if width == 32 else 4}


def _prepare(codes: Tensor) -> tuple[Tensor, ...]:
    """What the search reads: codes, codes − centre, −|codes − centre|²/2, centre, and the radius, rounded up."""
    codes = codes.contiguous()
    centre = codes.double().mean(0).float()
    centred = codes - centre
    square = centred.double().square().sum(1)
    radius = square.amax().sqrt() * (1 + 2**-22) if len(codes) else square.sum()
    return codes, centred, (-0.5 * square).float(), centre, radius.float()


def _launch_encode(
    features: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, d: int, h: int, w: int, rows: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latent, index, found, sums = _vq_encode_fake(features, weight, bias, codes, d, h, w, rows, statistics)
    tokens, channels = latent.shape[0] * d * h * w, features.shape[1]
    if tokens > 0:
        blocks = _configuration(channels)
        flags = {"SEARCH": len(codes) > 0, "ROWS": rows, "Q": features.shape[2], "C": channels}
        _encode_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            features, weight.contiguous(), bias.contiguous(), latent, index, found, *_prepare(codes), len(codes),
            tokens, d, h, w, *features.stride(), **flags, **blocks, **_UNFUSED,
        )  # fmt: skip
    if statistics and len(codes) > 0:
        sums = code_statistics(latent, index, len(codes))
    return latent, index, found, sums


def _launch_decode(
    latent: Tensor, minimum: float | None, maximum: float | None, codes: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    index, rows = _vq_decode_fake(latent, minimum, maximum, codes, table)
    if index.numel() > 0:
        scaled = minimum is not None
        half, low = ((maximum - minimum) / 2, minimum) if scaled else (1.0, 0.0)
        blocks = _configuration(latent.shape[1])
        width = min(64, max(16, triton.next_power_of_2(table.shape[1])))
        _decode_kernel[(triton.cdiv(index.numel(), blocks["BLOCK_T"]),)](
            latent, table.contiguous(), index, rows, half, low, *_prepare(codes), len(codes), index.numel(),
            *latent.shape[2:], table.shape[1], *latent.stride(), UNSCALE=scaled, BLOCK_M=width, C=latent.shape[1],
            **blocks, **_UNFUSED,
        )  # fmt: skip
    return index, rows


def _vq_encode_fake(
    features: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, d: int, h: int, w: int, rows: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, q = features.shape[:3]
    batch = n * q**3 // (d * h * w)
    searched = batch if len(codes) else 0
    return (
        features.new_empty((batch, c, d, h, w), dtype=torch.float32),
        features.new_empty((searched, d, h, w), dtype=torch.int64),
        features.new_empty((searched if rows else 0, d, h, w, c), dtype=torch.float32),
        features.new_empty((len(codes) if statistics else 0, c + 1), dtype=torch.float32),
    )


def _vq_decode_fake(
    latent: Tensor, minimum: float | None, maximum: float | None, codes: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    size = (latent.shape[0], *latent.shape[2:])
    return latent.new_empty(size, dtype=torch.int64), table.new_empty((*size, table.shape[1]))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    features, weight = inputs[:2]
    ctx.rows = output[2].shape[0] > 0
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.save_for_backward(features, weight)


def _differentiate(ctx, grad: Tensor, _: Tensor, grad_rows: Tensor, __: Tensor) -> tuple:
    features, weight = ctx.saved_tensors
    if ctx.rows:
        grad = grad + grad_rows.movedim(4, 1)
    q = features.shape[2]
    grad = torch.ops.meddiff._patchify(grad, q, 0, features.shape[0], torch.float32, 0.0, 0.0, True)
    dz = grad.movedim(1, -1).flatten(0, -2)
    f = features.movedim(1, -1).flatten(0, -2).float()
    df = (dz @ weight).view(-1, q, q, q, weight.shape[1]).movedim(-1, 1).to(features.dtype)
    return df, dz.mT @ f, dz.sum(0), None, None, None, None, None, None


torch.library.register_fake("meddiff::_vq_encode", _vq_encode_fake)
torch.library.register_fake("meddiff::_vq_decode", _vq_decode_fake)
torch.library.impl("meddiff::_vq_encode", "CUDA", _launch_encode)
torch.library.impl("meddiff::_vq_decode", "CUDA", _launch_decode)
torch.library.register_autograd("meddiff::_vq_encode", _differentiate, setup_context=_save)


def _check_codes(op: str, codes: Tensor, channels: int) -> None:
    if codes.dtype not in _FLOATS:
        raise TypeError(f"{op}: codes must be float32, bfloat16 or float16, got {codes.dtype}")
    if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] != channels:
        raise ValueError(f"{op}: codes must be [K, {channels}] with K >= 1, got {tuple(codes.shape)}")


def vq_encode(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    codes: Tensor | None,
    size: tuple[int, int, int],
    rows: bool = False,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """1³ convolution, stitching and nearest code of the encoder's patches.

    features: [n, C, q, q, q] on any device, float32, bfloat16 or float16, any strides, C 1 to 64; n may be 0.
    weight, bias: of the convolution, [C, C] (or [C, C, 1, 1, 1]) and [C], any of these types, computed in float32.
    codes: [K, C]; None for the latent alone.
    size: d, h, w of a latent, multiples of q; n = B·(d/q)·(h/q)·(w/q).
    Returns the latent float32 [B, C, d, h, w], contiguous; the index int64 [B, d, h, w], or None without codes; if
    wanted, the code rows float32 [B, C, d, h, w] in channels-last memory format; if wanted, the statistics float32
    [K, C + 1]: sum of each code's tokens, then their number. The latent and the rows, whose gradient goes to the
    latent, are differentiable in features, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes.
    """
    for name, tensor in (("features", features), ("weight", weight), ("bias", bias)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"vq_encode: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if features.ndim != 5 or not 1 <= features.shape[1] <= _MAX_CHANNELS or len(set(features.shape[2:])) != 1:
        wanted = f"[n, C, q, q, q] with C from 1 to {_MAX_CHANNELS}"
        raise ValueError(f"vq_encode: features must be {wanted}, got {tuple(features.shape)}")
    n, channels, q = features.shape[:3]
    if weight.numel() != channels**2 or weight.shape[:2] != (channels, channels) or bias.shape != (channels,):
        wanted = f"[{channels}, {channels}] and [{channels}]"
        raise ValueError(f"vq_encode: weight and bias must be {wanted}, got {tuple(weight.shape)}, {tuple(bias.shape)}")
    if len(size) != 3 or min(size) < 1 or q < 1 or any(length % q for length in size):
        raise ValueError(f"vq_encode: size must be three positive multiples of {q}, got {tuple(size)}")
    if n * q**3 >= _MAX_TOKENS:
        raise ValueError(f"vq_encode: features must hold fewer than {_MAX_TOKENS} tokens, got {n * q**3}")
    if n * q**3 % math.prod(size):
        raise ValueError(f"vq_encode: {n} patches of {q}³ make no volumes of {tuple(size)}")
    if codes is None:
        codes = features.new_empty((0, channels), dtype=torch.float32)
    else:
        _check_codes("vq_encode", codes, channels)
    weight = weight.reshape(channels, channels).float()
    out = torch.ops.meddiff._vq_encode(features, weight, bias.float(), codes.float(), *size, rows, statistics)
    latent, index, found, sums = out
    searched = len(codes) > 0
    found = found.movedim(4, 1) if rows and searched else None
    return latent, index if searched else None, found, sums if statistics and searched else None


@torch.no_grad()
def vq_decode(
    latent: Tensor, codes: Tensor, table: Tensor, extremes: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest code of each token of a latent, and that row of a table; without gradient.

    latent: [B, C, D, H, W], float32, bfloat16 or float16 (computed in float32), any strides, C 1 to 64; may be empty.
    codes: [K, C] of these types, K >= 1.
    table: [K, M] of these types, M >= 1.
    extremes: minimum and maximum of the codes if the latent is scaled to the denoiser's range; None if it is not.
    Returns the index int64 [B, D, H, W] and the rows [B, M, D, H, W] of the table's dtype, channels-last.
    Raises TypeError for other dtypes, ValueError for other shapes.
    """
    for name, tensor in (("latent", latent), ("table", table)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"vq_decode: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if latent.ndim != 5 or not 1 <= latent.shape[1] <= _MAX_CHANNELS:
        wanted = f"[B, C, D, H, W] with C from 1 to {_MAX_CHANNELS}"
        raise ValueError(f"vq_decode: latent must be {wanted}, got {tuple(latent.shape)}")
    if latent[:, 0].numel() >= _MAX_TOKENS:
        raise ValueError(f"vq_decode: latent must hold fewer than {_MAX_TOKENS} tokens, got {latent[:, 0].numel()}")
    _check_codes("vq_decode", codes, latent.shape[1])
    if table.ndim != 2 or table.shape[0] != codes.shape[0] or table.shape[1] < 1:
        raise ValueError(f"vq_decode: table must be [{len(codes)}, M] with M >= 1, got {tuple(table.shape)}")
    minimum, maximum = (None, None) if extremes is None else extremes
    index, rows = torch.ops.meddiff._vq_decode(latent.float(), minimum, maximum, codes.float(), table)
    return index, rows.movedim(4, 1)
