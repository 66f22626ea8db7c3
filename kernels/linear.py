"""`F.linear` on the CPU in bfloat16: PyTorch copies the bias into the result before the product, in a pass of its own;
oneDNN adds it within the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 2**14  # numbers of x; for fewer the call is what takes the time


def _has_product_with_bias() -> bool:
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_is_mkldnn_bf16_supported")
        and ops._is_mkldnn_bf16_supported()
    )


_PRODUCT_WITH_BIAS = _has_product_with_bias()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias as F.linear gives it: x [..., C], weight [O, C], bias [O] or none; of any dtype and device.

    For inference: callers record no gradient, and there is no autocast.
    """
    worthwhile = bias is not None and x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() >= _LEAST
    if worthwhile and _PRODUCT_WITH_BIAS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
