"""Volume ↔ patches: patch i = ((b·Gd + gd)·Gh + gh)·Gw + gw holds x[b, :, gd·p : gd·p + p, gh·p : …, gw·p : …].

x [B, C, D, H, W] with any strides; patches [n, C, p, p, p] in channels-last memory format; Gd = ⌈D / p⌉ and so on.
Where a size is no multiple of p, the last patches repeat the edge values, and `stitch` drops them. On the way into a
patch, values may be mapped from a window (low, high) of original units to [−1, 1] and clipped,
(v − low)·2 / (high − low) − 1 in float32, and are cast. Source and result are read and written once; nothing is padded
or permuted in memory.

Each is the other's gradient; what was repeated sums onto the edge, and clipped values have none. The gradients can be
differentiated again. On the CPU a copy is as fast as memory, so PyTorch makes it.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_VALUES = (*_FLOATS, torch.float64, torch.int16, torch.uint8)
_BLOCK = 1024
_UNFUSED = {"enable_fp_fusion": False}  # the map rounds as on the CPU


def _grid(size: torch.Size | tuple[int, ...], patch: int) -> list[int]:
    """Patches along D, H, W of [..., D, H, W]."""
    return [-(-n // patch) for n in size[-3:]]


def patchify_ref(
    x: Tensor, patch: int, start: int, stop: int, dtype: torch.dtype, low: float, gain: float, edge: bool
) -> Tensor:
    """Patches start … stop − 1, mapped by (v − low)·gain − 1 unless gain is 0, past the edge its values or zeros."""
    patches = _patchify_fake(x, patch, start, stop, dtype, low, gain, edge)
    cells = product(range(x.shape[0]), *(range(0, g * patch, patch) for g in _grid(x.shape, patch)))
    for i, (b, d, h, w) in enumerate(cells):
        if not start <= i < stop:
            continue
        piece = x[b : b + 1, :, d : d + patch, h : h + patch, w : w + patch]
        missing = [patch - n for n in piece.shape[2:]]
        if gain:
            piece = piece.float().sub(low).mul_(gain).sub_(1).clamp_(-1, 1)
        if any(missing):
            pad = (0, missing[2], 0, missing[1], 0, missing[0])
            piece = F.pad(piece.float(), pad, mode="replicate") if edge else F.pad(piece, pad)
        patches[i - start] = piece[0]
    return patches


def stitch_ref(patches: Tensor, batch: int, d: int, h: int, w: int, start: int, dtype: torch.dtype) -> Tensor:
    """The volumes of which `patches` are those from `start` on; zeros where the others belong."""
    c, p = patches.shape[1:3]
    gd, gh, gw = _grid((d, h, w), p)
    if patches.shape[0] != batch * gd * gh * gw:
        whole = patches.new_zeros(batch * gd * gh * gw, *patches.shape[1:])
        whole[start : start + patches.shape[0]] = patches
        patches = whole
    volume = _stitch_fake(patches, batch, d, h, w, start, dtype)
    cells = patches.reshape(batch, gd, gh, gw, c, p, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return volume.copy_(cells.reshape(batch, c, gd * p, gh * p, gw * p)[:, :, :d, :h, :w])


@triton.jit
def _place(program, D, H, W, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """For BLOCK elements of a patch: patch, batch index, c, d, h, w in the volume (64-bit), place in the patch."""
    BLOCKS: tl.constexpr = (P * P * P * C + BLOCK - 1) // BLOCK
    element = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    c, voxel = element % C, element // C
    i = program // BLOCKS
    patch = i + tl.zeros([BLOCK], tl.int64)
    gd, gh, gw = (D + P - 1) // P, (H + P - 1) // P, (W + P - 1) // P
    w, i = i % gw * P + voxel % P, i // gw
    h, i = i % gh * P + voxel // P % P, i // gh
    d, b = i % gd * P + voxel // (P * P), i // gd
    return patch, b.to(tl.int64), c.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64), element


@triton.jit
def _patchify_kernel(
    x, patches, start, D, H, W, stride_b, stride_c, stride_d, stride_h, stride_w, low, gain,
    MAP: tl.constexpr, WHOLE: tl.constexpr, EDGE: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (P * P * P * C + BLOCK - 1) // BLOCK
    patch, b, c, d, h, w, element = _place(start * BLOCKS + tl.program_id(0), D, H, W, C, P, BLOCK)
    mask = element < P * P * P * C
    inside = mask
    if not WHOLE:
        if EDGE:
            d, h, w = tl.minimum(d, D - 1), tl.minimum(h, H - 1), tl.minimum(w, W - 1)
        else:
            inside = mask & (d < D) & (h < H) & (w < W)
    value = tl.load(x + b * stride_b + c * stride_c + d * stride_d + h * stride_h + w * stride_w, inside, other=0)
    if MAP:
        value = (value.to(tl.float32) - low) * gain - 1.0
        # comparisons with NaN are false: it stays
        value = tl.where(value < -1.0, -1.0, tl.where(value > 1.0, 1.0, value))
    target = patches + (patch - start) * (P * P * P * C) + element
    tl.store(target, value.to(patches.dtype.element_ty), mask)


@triton.jit
def _stitch_kernel(
    patches, volume, start, stop, D, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch, b, c, d, h, w, element = _place(tl.program_id(0), D, H, W, C, P, BLOCK)
    mask = (element < P * P * P * C) & (d < D) & (h < H) & (w < W)
    source = patches + (patch - start) * stride_n + c * stride_c
    source += d % P * stride_d + h % P * stride_h + w % P * stride_w
    value = tl.load(source, mask & (patch >= start) & (patch < stop), other=0)
    target = volume + (((b * D + d) * H + h) * W + w) * C + c
    tl.store(target, value.to(volume.dtype.element_ty), mask)


def _launch_patchify(
    x: Tensor, patch: int, start: int, stop: int, dtype: torch.dtype, low: float, gain: float, edge: bool
) -> Tensor:
    patches = _patchify_fake(x, patch, start, stop, dtype, low, gain, edge)
    c, d, h, w = x.shape[1:]
    programs = (stop - start) * triton.cdiv(c * patch**3, _BLOCK)
    if programs > 0 and c > 0:
        whole = d % patch == h % patch == w % patch == 0
        flags = {"MAP": gain != 0, "WHOLE": whole, "EDGE": edge, "C": c, "P": patch, "BLOCK": _BLOCK}
        _patchify_kernel[(programs,)](x, patches, start, d, h, w, *x.stride(), low, gain, **flags, **_UNFUSED)
    return patches


def _launch_stitch(patches: Tensor, batch: int, d: int, h: int, w: int, start: int, dtype: torch.dtype) -> Tensor:
    volume = _stitch_fake(patches, batch, d, h, w, start, dtype)
    n, c, p = patches.shape[:3]
    programs = batch * math.prod(_grid((d, h, w), p)) * triton.cdiv(c * p**3, _BLOCK)
    if programs > 0 and c > 0:
        sizes = {"C": c, "P": p, "BLOCK": _BLOCK}
        _stitch_kernel[(programs,)](patches, volume, start, start + n, d, h, w, *patches.stride(), **sizes)
    return volume


def _patchify_fake(
    x: Tensor, patch: int, start: int, stop: int, dtype: torch.dtype, low: float, gain: float, edge: bool
) -> Tensor:
    patches = x.new_empty((stop - start, patch, patch, patch, x.shape[1]), dtype=dtype)
    return patches.permute(0, 4, 1, 2, 3)


def _stitch_fake(patches: Tensor, batch: int, d: int, h: int, w: int, start: int, dtype: torch.dtype) -> Tensor:
    return patches.new_empty((batch, d, h, w, patches.shape[1]), dtype=dtype).permute(0, 4, 1, 2, 3)


def _save_patchify(ctx, inputs: tuple, output: Tensor) -> None:
    x, ctx.patch, ctx.start, _, _, ctx.low, ctx.gain, ctx.edge = inputs
    ctx.size, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(*((x,) if ctx.gain else ()))


def _differentiate_patchify(ctx, grad: Tensor) -> tuple:
    size = list(ctx.size[2:])
    if ctx.edge:
        size = [g * ctx.patch for g in _grid(ctx.size, ctx.patch)]
    dtype = ctx.dtype if size == list(ctx.size[2:]) and not ctx.gain else torch.float32
    dx = torch.ops.meddiff._stitch(grad, ctx.size[0], *size, ctx.start, dtype)
    for axis, n in enumerate(ctx.size[2:], 2):
        if dx.shape[axis] > n:
            edge = dx.narrow(axis, n - 1, dx.shape[axis] - n + 1).sum(axis, keepdim=True)
            dx = torch.cat([dx.narrow(axis, 0, n - 1), edge], dim=axis)
    if ctx.gain:
        (x,) = ctx.saved_tensors
        mapped = (x.detach().float() - ctx.low) * ctx.gain - 1
        dx = dx * (ctx.gain * ((mapped >= -1) & (mapped <= 1)))
    return dx.to(ctx.dtype), None, None, None, None, None, None, None


def _save_stitch(ctx, inputs: tuple, output: Tensor) -> None:
    patches, _, _, _, _, ctx.start, _ = inputs
    ctx.patch, ctx.stop, ctx.dtype = patches.shape[2], inputs[5] + patches.shape[0], patches.dtype


def _differentiate_stitch(ctx, grad: Tensor) -> tuple:
    patches = torch.ops.meddiff._patchify(grad, ctx.patch, ctx.start, ctx.stop, ctx.dtype, 0.0, 0.0, False)
    return patches, None, None, None, None, None, None


torch.library.define(
    "meddiff::_patchify",
    "(Tensor x, SymInt patch, SymInt start, SymInt stop, ScalarType dtype, float low, float gain, bool edge) -> Tensor",
)
torch.library.define(
    "meddiff::_stitch",
    "(Tensor patches, SymInt batch, SymInt d, SymInt h, SymInt w, SymInt start, ScalarType dtype) -> Tensor",
)
torch.library.register_fake("meddiff::_patchify", _patchify_fake)
torch.library.register_fake("meddiff::_stitch", _stitch_fake)
torch.library.impl("meddiff::_patchify", "CPU", patchify_ref)
torch.library.impl("meddiff::_stitch", "CPU", stitch_ref)
torch.library.impl("meddiff::_patchify", "CUDA", _launch_patchify)
torch.library.impl("meddiff::_stitch", "CUDA", _launch_stitch)
torch.library.register_autograd("meddiff::_patchify", _differentiate_patchify, setup_context=_save_patchify)
torch.library.register_autograd("meddiff::_stitch", _differentiate_stitch, setup_context=_save_stitch)


def patchify(
    x: Tensor,
    patch: int,
    dtype: torch.dtype | None = None,
    window: tuple[float, float] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """The patches of a volume, or those from `start` to before `stop`, as slices count.

    x: [B, C, D, H, W], float64, float32, bfloat16, float16, int16 or uint8, any strides; D, H, W at least 1.
    patch: p, at least 1; C·p³ below 2³¹.
    dtype: of the result, float32, bfloat16 or float16; None is x's if it is one of them, else float32.
    window: the values of x that become −1 and 1; the rest is clipped. None leaves values as they are.
    Returns [n, C, p, p, p] in channels-last memory format.
    Raises TypeError for other dtypes, ValueError for other shapes, an empty axis, a window without low < high.
    """
    dtype = dtype or (x.dtype if x.dtype in _FLOATS else torch.float32)
    if x.dtype not in _VALUES:
        raise TypeError(f"patchify: x must be float64, float32, bfloat16, float16, int16 or uint8, got {x.dtype}")
    if dtype not in _FLOATS:
        raise TypeError(f"patchify: dtype must be float32, bfloat16 or float16, got {dtype}")
    if x.ndim != 5 or 0 in x.shape[2:]:
        raise ValueError(f"patchify: x must be [B, C, D, H, W] with D, H, W >= 1, got {tuple(x.shape)}")
    if patch < 1 or x.shape[1] * patch**3 >= 2**31:
        raise ValueError(f"patchify: patch must be at least 1 and C·p³ below 2³¹, got {patch} for C = {x.shape[1]}")
    if window is not None and not window[0] < window[1]:
        raise ValueError(f"patchify: window must be (low, high) with low < high, got {window}")
    low, gain = (0.0, 0.0) if window is None else (float(window[0]), 2 / (window[1] - window[0]))
    count = x.shape[0] * math.prod(_grid(x.shape, patch))
    start, stop, _ = slice(start, stop).indices(count)
    return torch.ops.meddiff._patchify(x, patch, start, max(start, stop), dtype, low, gain, True)


def stitch(patches: Tensor, size: tuple[int, int, int], dtype: torch.dtype | None = None) -> Tensor:
    """The volumes that all of `patchify`'s patches make up.

    patches: [n, C, p, p, p], float32, bfloat16 or float16, any strides; n = B·⌈D / p⌉·⌈H / p⌉·⌈W / p⌉.
    size: D, H, W; what the patches have beyond is dropped.
    dtype: of the result, one of these; None is the patches'.
    Returns [B, C, D, H, W] in channels-last memory format.
    Raises TypeError for other dtypes, ValueError for other shapes and for patches that do not make up whole volumes.
    """
    for name, kind in (("patches", patches.dtype), ("dtype", dtype or patches.dtype)):
        if kind not in _FLOATS:
            raise TypeError(f"stitch: {name} must be float32, bfloat16 or float16, got {kind}")
    if patches.ndim != 5 or len(set(patches.shape[2:])) != 1 or not 0 < math.prod(patches.shape[2:]):
        raise ValueError(f"stitch: patches must be [n, C, p, p, p] with 1 <= p < 1024, got {tuple(patches.shape)}")
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"stitch: size must be three positive lengths, got {tuple(size)}")
    cells = math.prod(_grid(tuple(size), patches.shape[2]))
    if patches.shape[0] % cells:
        wanted = f"a multiple of {cells} for size {tuple(size)} and p = {patches.shape[2]}"
        raise ValueError(f"stitch: the number of patches must be {wanted}, got {patches.shape[0]}")
    batch = patches.shape[0] // cells
    return torch.ops.meddiff._stitch(patches, batch, *size, 0, dtype or patches.dtype)
