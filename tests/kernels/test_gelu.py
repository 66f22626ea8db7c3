"""GELU against its definition in float64, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels.gelu import gelu_

ISAS = torch.ops.meddiff.cpu_isas()
# of a result, relative: rounding of it, of the sigmoid's argument, and its error
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8 + 2e-4}
LEAST = 1e-3  # smaller results may be off by this times the tolerance


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(count, generator=torch.Generator().manual_seed(count))).to(dtype)


def definition(x: Tensor) -> Tensor:
    x = x.double()
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def assert_near(got: Tensor, wanted: Tensor) -> None:
    error = (got.double() - wanted).abs() / wanted.abs().clamp(min=LEAST)
    assert error.max() <= TOLERANCE[got.dtype], f"{error.max():.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", ISAS)
def test_every_number_of_elements(isa: str, dtype: torch.dtype):
    for count in (*range(70), 100_003):
        x = numbers(count, dtype)
        padded = torch.cat([x, x.new_full((1,), 7.0)])
        torch.ops.meddiff._gelu_(padded[:count], isa)
        assert padded[count] == 7  # nothing is written past the end
        if count:
            assert_near(padded[:count], definition(x))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa: str, dtype: torch.dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, inf, -inf, nan, 1e-30, -12.0, 12.0], dtype=dtype)
    wanted = torch.tensor([0, 0, 1e30, 0, inf, 0, nan, 5e-31, 0, 12], dtype=dtype)
    torch.ops.meddiff._gelu_(x, isa)
    torch.testing.assert_close(x, wanted, rtol=2**-8, atol=1e-35, equal_nan=True)


def test_in_place_only_where_no_gradient_needs_x():
    x = numbers(1000, torch.float32)
    kept = x.clone()
    assert gelu_(kept) is kept
    assert_near(kept, definition(x))
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = gelu_(leaf)
        assert torch.equal(leaf, x)
        torch.testing.assert_close(y, F.gelu(x, approximate="tanh"))
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        wanted = leaf.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad(definition(wanted).sum(), wanted)
        torch.testing.assert_close(gradient, wanted.float())


def test_other_tensors_are_left_to_pytorch():
    for x in (numbers(64, torch.float64), numbers(64, torch.float32).half(), numbers(64, torch.float32)[::2]):
        kept = x.clone(memory_format=torch.preserve_format)
        y = gelu_(x)
        assert torch.equal(x, kept) and torch.equal(y, F.gelu(x, approximate="tanh"))


def test_the_operator_refuses_what_it_cannot_do():
    with pytest.raises(RuntimeError, match="_gelu_: x must be contiguous"):
        torch.ops.meddiff._gelu_(torch.zeros(8)[::2])
    with pytest.raises(RuntimeError, match="_gelu_: x must be float32 or bfloat16"):
        torch.ops.meddiff._gelu_(torch.zeros(8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="_gelu_: isa must be one of"):
        torch.ops.meddiff._gelu_(torch.zeros(8), "sse9")


def test_operator():
    torch.library.opcheck(torch.ops.meddiff._gelu_.default, (numbers(100, torch.float32),))
    compiled = torch.compile(lambda x: gelu_(x * 1), fullgraph=True)
    x = numbers(100, torch.float32)
    torch.testing.assert_close(compiled(x), gelu_(x.clone()))
