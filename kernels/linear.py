"""`F.linear` on the CPU in bfloat16. Processors with AMX have kernels of their own (csrc/linear.cpp), for few rows or a
small weight. Elsewhere PyTorch copies the bias into the result before the product, in a pass of its own; oneDNN adds it
within the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 2**14  # numbers of x; for fewer the call is what takes the time
_FEW_ROWS, _SMALL_WEIGHT = 256, 2**16  # where csrc/linear.cpp is the faster one
_HERE = torch.ops.meddiff._has_linear()


def _has_product_with_bias() -> bool:
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_is_mkldnn_bf16_supported")
        and ops._is_mkldnn_bf16_supported()
    )


_PRODUCT_WITH_BIAS = _has_product_with_bias()


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (_HERE and x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.ndim >= 2):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    dense = all(t is None or (t.dtype == x.dtype and t.is_contiguous()) for t in (x, weight, bias))
    return dense and (rows <= _FEW_ROWS or weight.numel() <= _SMALL_WEIGHT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias as F.linear gives it: x [..., C], weight [O, C], bias [O] or none; of any dtype and device.

    For inference: callers record no gradient, and there is no autocast.
    """
    if _suits(x, weight, bias):
        out = x.new_empty((*x.shape[:-1], len(weight)))
        torch.ops.meddiff._linear(x.flatten(0, -2), weight, bias, out.flatten(0, -2))
        return out
    worthwhile = bias is not None and x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() >= _LEAST
    if worthwhile and _PRODUCT_WITH_BIAS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@torch.library.register_fake("meddiff::_linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None
