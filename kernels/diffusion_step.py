"""One step of a diffusion solver, in place: the clean latent that a noise estimate implies, its clip, and the update.

    x0 = clip(a·x + b·ε, −1, 1)
    x ← c_x·x + c_0·x0 + c_prev·x0_prev + c_ε·ε + c_n·n

x [B, …] float32; ε, the estimate, and n, fresh noise, of x's shape; x0_prev, the x0 of the step before, is replaced by
x0. Every step of DDPM, DDIM and DPM-Solver++ (2M) is of this form (meddiff/sampling/solvers.py has their numbers). The
seven numbers are one row of float32 in the tensor's device memory, in the order of `COEFFICIENTS`: a step reads nothing
from the host, so that one captured CUDA graph serves all steps, the row being copied into place before each.

Each element is read once and written once, and computed in float32. On the CPU, where the network takes a thousand
times as long, it is plain PyTorch. Not differentiable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COEFFICIENTS = ("a", "b", "c_x", "c_0", "c_prev", "c_eps", "c_n")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024


@torch.no_grad()
def diffusion_step_ref(
    x: Tensor, estimate: Tensor, coefficients: Tensor, noise: Tensor | None = None, x0_prev: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The new x and x0 by their definition; nothing is changed in place, and float64 stays float64."""
    a, b, c_x, c_0, c_prev, c_eps, c_n = coefficients.unbind()
    x0 = (a * x + b * estimate).clamp(-1, 1)
    out = c_x * x + c_0 * x0 + c_eps * estimate
    if x0_prev is not None:
        out = out + torch.where(c_prev == 0, 0, c_prev * x0_prev)  # in the first step there is no x0_prev
    if noise is not None:
        out = out + c_n * noise
    return out, x0


@triton.jit
def _step_kernel(
    x, estimate, coefficients, noise, x0_prev, size, NOISE: tl.constexpr, HISTORY: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x_t = tl.load(x + i, mask=inside, other=0.0)
    eps = tl.load(estimate + i, mask=inside, other=0.0).to(tl.float32)
    # a NaN stays one: PyTorch's clip passes it on too
    x0 = tl.load(coefficients) * x_t + tl.load(coefficients + 1) * eps
    x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    out = tl.load(coefficients + 2) * x_t + tl.load(coefficients + 3) * x0 + tl.load(coefficients + 5) * eps
    if HISTORY:
        c_prev = tl.load(coefficients + 4)
        out += tl.where(c_prev == 0, 0.0, c_prev * tl.load(x0_prev + i, mask=inside, other=0.0))
        tl.store(x0_prev + i, x0, mask=inside)
    if NOISE:
        out += tl.load(coefficients + 6) * tl.load(noise + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + i, out, mask=inside)


def _launch(x: Tensor, estimate: Tensor, coefficients: Tensor, noise: Tensor | None, x0_prev: Tensor | None) -> None:
    # elements in the order of x's memory; an estimate or noise in another layout is copied into this one
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    estimate = estimate.permute(order).contiguous()
    noise = None if noise is None else noise.permute(order).contiguous()
    if x.numel() > 0:
        flags = {"NOISE": noise is not None, "HISTORY": x0_prev is not None, "BLOCK": _BLOCK}
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        _step_kernel[grid](x, estimate, coefficients, noise, x0_prev, x.numel(), **flags, num_warps=4)


# not a custom_op: PyTorch imports its compiler when one first runs, for 1 s
@torch.library.impl("meddiff::_diffusion_step", "CPU")
def _step(x: Tensor, estimate: Tensor, coefficients: Tensor, noise: Tensor | None, x0_prev: Tensor | None) -> None:
    noise = None if noise is None else noise.float()
    out, x0 = diffusion_step_ref(x, estimate.float(), coefficients, noise, x0_prev)
    x.copy_(out)
    if x0_prev is not None:
        x0_prev.copy_(x0)


torch.library.impl("meddiff::_diffusion_step", "CUDA", _launch)


@torch.library.register_fake("meddiff::_diffusion_step")
def _step_fake(x: Tensor, estimate: Tensor, coefficients: Tensor, noise: Tensor | None, x0_prev: Tensor | None) -> None:
    return None


def diffusion_step(
    x: Tensor, estimate: Tensor, coefficients: Tensor, noise: Tensor | None = None, x0_prev: Tensor | None = None
) -> None:
    """Takes x one step further, in place.

    x: float32 [B, …] on any device, without gaps between its elements (contiguous, channels-last or another order of
        its axes); changed.
    estimate: noise in x, of x's shape, float32, bfloat16 or float16, any strides; fastest in those of x.
    coefficients: float32 [7] on x's device, contiguous, in the order of `COEFFICIENTS`.
    noise: fresh noise like `estimate`; None leaves out its term.
    x0_prev: float32 with the shape and strides of x; None leaves out its term and does not keep x0. Changed: it holds
        this step's x0 afterwards. What it held does not matter where c_prev is 0.
    Raises TypeError for other dtypes, ValueError for other shapes, strides or devices.
    Equations: Ho et al. 2020 (7), Song et al. 2021 (12), Lu et al. 2022 "DPM-Solver++" algorithm 2.
    """
    tensors = {"x": x, "estimate": estimate, "coefficients": coefficients, "noise": noise, "x0_prev": x0_prev}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        wanted = _DTYPES if name in ("estimate", "noise") else _DTYPES[:1]
        if tensor.dtype not in wanted:
            raise TypeError(f"diffusion_step: {name} must be {' or '.join(map(str, wanted))}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"diffusion_step: {name} must be on x's device {x.device}, got {tensor.device}")
        if name != "coefficients" and tensor.shape != x.shape:
            raise ValueError(f"diffusion_step: {name} must be {tuple(x.shape)} as x is, got {tuple(tensor.shape)}")
    if coefficients.shape != (len(COEFFICIENTS),) or not coefficients.is_contiguous():
        raise ValueError(
            f"diffusion_step: coefficients must be contiguous [{len(COEFFICIENTS)}], got {tuple(coefficients.shape)} "
            f"with strides {coefficients.stride()}"
        )
    if not x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).is_contiguous():
        raise ValueError(f"diffusion_step: x must have no gaps, got {tuple(x.shape)} with strides {x.stride()}")
    if x0_prev is not None and x0_prev.stride() != x.stride():
        raise ValueError(f"diffusion_step: x0_prev must have x's strides {x.stride()}, got {x0_prev.stride()}")
    torch.ops.meddiff._diffusion_step(x, estimate, coefficients, noise, x0_prev)
