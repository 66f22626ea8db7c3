"""Products with a bias against float64, with and without oneDNN's own addition of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels import linear as module
from meddiff.kernels.linear import linear

TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-6}  # of the largest result


def case(shape: tuple, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (outputs, shape[-1]), (outputs,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "outputs"), [((1, 9, 8, 16, 24), 72), ((700, 24), 5), ((3, 24), 96)])
def test_against_float64(shape, outputs, dtype, by_onednn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PRODUCT_WITH_BIAS", by_onednn and module._PRODUCT_WITH_BIAS)
    x, weight, bias = case(shape, outputs, dtype)
    for b in (bias, None):
        got, wanted = linear(x, weight, b), F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert got.dtype == dtype and got.shape == wanted.shape
        assert (got - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_strides(dtype: torch.dtype):
    x, weight, bias = case((24, 30, 30), 48, dtype)
    x, weight = x.permute(1, 2, 0), torch.cat([weight, weight], dim=1)[:, :24]
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert (linear(x, weight, bias) - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
