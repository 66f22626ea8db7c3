"""Nearest code: index[b, d, h, w] = argminₖ Σ_c (z[b, c, d, h, w] − codes[k, c])².

z [B, C, D, H, W] float32 with any strides, codes [K, C] float32, index [B, D, H, W] int64, contiguous.

The indices are those of the float64 distances, summed channel by channel, and the same on every processor and device:
a float32 pass over all pairs only rules out codes that its rounding error cannot have misjudged, and the rest are
compared in float64 (csrc/vq_nearest.h). Equal distances give the lowest index. A distance that is NaN never wins, so a
token with a NaN gets index 0. Beyond the result, memory is that of a few copies of the codebook per thread.

Not differentiable: the index carries no gradient (a straight-through estimator belongs to the codebook module).
Where the CUDA kernel is not built, CUDA tensors take the plain PyTorch code.
"""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def vq_nearest_ref(z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The index by its definition, in chunks of tokens; shapes and types as above, any device."""
    tokens = z.movedim(1, -1).flatten(0, -2)  # [tokens, C]
    index = torch.empty(tokens.shape[0], dtype=torch.int64, device=z.device)
    size = max(1, 2**24 // codes.shape[0])
    for start in range(0, tokens.shape[0], size):
        part = tokens[start : start + size].double()
        distance = part.new_zeros(part.shape[0], codes.shape[0])
        for channel in range(codes.shape[1]):
            distance += (part[:, channel, None] - codes[:, channel].double()).square_()
        index[start : start + size] = distance.nan_to_num_(nan=math.inf, posinf=math.inf).argmin(1)
    return index.view(z.shape[0], *z.shape[2:])


@torch.library.register_fake("meddiff::vq_nearest")
def _vq_nearest_fake(z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return z.new_empty((z.shape[0], *z.shape[2:]), dtype=torch.int64)


if not torch._C._dispatch_has_kernel_for_dispatch_key("meddiff::vq_nearest", "CUDA"):
    torch.library.impl("meddiff::vq_nearest", "CUDA", vq_nearest_ref)


def vq_nearest(z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the code nearest to each token by squared Euclidean distance; the lowest index on a tie.

    z: [B, C, D, H, W], float32, bfloat16 or float16 (compared as float32), any strides, C >= 1; may be empty.
    codes: [K, C] of the same types on the same device, K >= 1.
    Returns int64 [B, D, H, W], contiguous, without gradient; 0 for tokens with a NaN.
    Raises TypeError for other dtypes, ValueError for other shapes or different devices.
    """
    for name, tensor in (("z", z), ("codes", codes)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"vq_nearest: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if z.ndim != 5 or z.shape[1] < 1:
        raise ValueError(f"vq_nearest: z must be [B, C, D, H, W] with C >= 1, got {tuple(z.shape)}")
    if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] != z.shape[1]:
        raise ValueError(f"vq_nearest: codes must be [K, {z.shape[1]}] with K >= 1, got {tuple(codes.shape)}")
    if z.device != codes.device:
        raise ValueError(f"vq_nearest: z and codes must be on one device, got {z.device} and {codes.device}")
    return torch.ops.meddiff.vq_nearest(z.float(), codes.float())
