"""Products with a weight against float64: on AMX, by oneDNN with the bias within the product, and by PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels import linear as module
from meddiff.kernels.linear import linear

FAST = pytest.mark.skipif(not torch.ops.meddiff._has_linear(), reason="needs a processor with AMX")
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-6}  # of the largest result


def case(shape: tuple, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (outputs, shape[-1]), (outputs,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("way", ["amx", "onednn", "pytorch"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "outputs"), [((1, 9, 8, 16, 24), 72), ((700, 24), 5), ((3, 24), 96)])
def test_against_float64(shape, outputs, dtype, way, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_HERE", way == "amx" and module._HERE)
    monkeypatch.setattr(module, "_PRODUCT_WITH_BIAS", way == "onednn" and module._PRODUCT_WITH_BIAS)
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


# few rows, and many; whole blocks of inputs and parts; one, two and three tiles of columns; parts of groups
SHAPES = [(1, 1, 64), (3, 33, 65), (16, 72, 130), (17, 144, 64), (64, 96, 64), (33, 7776, 96), (256, 20, 90),
          (64, 40, 7), (257, 24, 20), (300, 100, 33),
          (1000, 24, 72), (1, 96, 48), (63, 33, 63), (2, 8, 1)]  # fmt: skip


@FAST
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_products_of_tiles(rows: int, inputs: int, outputs: int):
    x, weight, bias = case((rows, inputs), outputs, torch.bfloat16)
    for b in (bias, None):
        out = torch.full((rows + 2, outputs), torch.nan, dtype=x.dtype)
        torch.ops.meddiff._linear(x, weight, b, out[1:-1])
        wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert (out[1:-1] - wanted).norm() <= 2**-8 * wanted.norm()  # a rounding of each number
        assert out[0].isnan().all() and out[-1].isnan().all()


@FAST
@pytest.mark.parametrize(("rows", "outputs"), [(5, 100), (300, 20)])
def test_what_is_not_finite_is_not_hidden(rows: int, outputs: int):
    x, weight, bias = case((rows, 40), outputs, torch.bfloat16)
    x[3, 35], weight[7, 2] = torch.nan, torch.inf
    out = linear(x, weight, bias)
    assert out[3].isnan().all() and not out[:, 7].isfinite().any()
    assert int(out.isfinite().sum()) == (rows - 1) * (outputs - 1)


@FAST
def test_the_number_of_threads_does_not_matter():
    x, weight, bias = case((3000, 72), 216, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@FAST
def test_wrong_arguments():
    x, weight, bias = case((70, 8), 70, torch.bfloat16)
    out = torch.empty(70, 70, dtype=x.dtype)
    op = torch.ops.meddiff._linear
    with pytest.raises(RuntimeError, match="contiguous bfloat16 matrices"):
        op(x.float(), weight, bias, out)
    with pytest.raises(RuntimeError, match=r"the weight must be \[70, 8\]"):
        op(x, weight[:, :7].contiguous(), bias, out)
    with pytest.raises(RuntimeError, match="bias must be contiguous bfloat16"):
        op(x, weight, bias[:3], out)
