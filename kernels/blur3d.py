"""A binomial blur: weights (1, 2, 1)/4 along each axis.

A trilinear doubling is a nearest doubling that is blurred so, beyond the border with its outermost voxels repeated. A
blur of each channel changes places with a convolution; hence conv(trilinear(x)) = blur(conv(nearest(x))), where the
inner part is a transposed convolution of 8 products for each number instead of 27 (`up_conv3d`). It does not hold in
the outermost voxels of a volume, where the convolution sees zeros; these are computed as they are defined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .norm_silu_conv3d import _FUSED, _nothing, _rows


def blur3d_ref(x: Tensor) -> Tensor:
    """Of all voxels of x [B, C, D, H, W] but the outermost ones, computed in float32 or x's wider dtype."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for axis in (2, 3, 4):
        n = y.shape[axis] - 2
        y = (y.narrow(axis, 0, n) + y.narrow(axis, 2, n)) / 4 + y.narrow(axis, 1, n) / 2
    return y.to(x.dtype)


def blur3d(x: Tensor, pads: Sequence[int], out: Tensor) -> None:
    """Write a tile. No gradient.

    x: [B, C, d, h, w], floating, best a view of channels-last memory: along each axis out's planes and one more on
        each side, or none where `pads` has a 1.
    pads: before D, after D, before H, after H, before W, after W: 1 where the outermost plane of `out` is left alone.
    out: [B, C, D, H, W], a view of channels-last memory that is no part of x's.
    Raises RuntimeError for sizes, dtypes or memory that do not fit together.
    """
    if x.device.type == "cpu" and x.dtype in _FUSED:
        torch.ops.meddiff._blur3d(_rows(x), pads, out)
        return
    blurred = blur3d_ref(x)
    inside = [slice(before, n - after) for n, before, after in zip(out.shape[2:], pads[::2], pads[1::2])]
    if blurred.numel():
        out[(..., *inside)] = blurred


torch.library.register_fake("meddiff::_blur3d", _nothing)
