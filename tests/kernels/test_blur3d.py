"""The binomial blur against a depthwise convolution in float64, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels.blur3d import blur3d
from meddiff.kernels.up_conv3d import nearest_up_weight

ops = torch.ops.meddiff
GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # of the largest result
# (B, C, (D, H, W)): widths of vectors, odd ones, one voxel
CASES = [(1, 128, (2, 3, 5)), (2, 7, (4, 2, 3)), (1, 1, (1, 1, 1)), (1, 1, (3, 3, 40)), (2, 48, (1, 3, 1))]


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return channels_last(x.to(dtype))


def definition(x: Tensor) -> Tensor:
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    weight = torch.einsum("i,j,k->ijk", taps, taps, taps).expand(x.shape[1], 1, 3, 3, 3)
    return F.conv3d(x.double(), weight, groups=x.shape[1])


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert (got.double() - wanted).abs().max() <= TOLERANCE[got.dtype] * wanted.abs().max()


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", ops.cpu_isas())
def test_every_instruction_set(isa: str, dtype: torch.dtype, shape: tuple):
    batch, channels, size = shape
    x = numbers(batch, channels, *(n + 2 for n in size), dtype=dtype)
    out = channels_last(torch.full((batch, channels, *size), torch.nan, dtype=dtype))
    ops._blur3d(x, [0] * 6, out, isa)
    assert_near(out, definition(x))


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("pads", [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [1] * 6])
def test_a_part_of_a_volume_whose_border_is_left_alone(dtype: torch.dtype, pads: list[int]):
    size, channels = (4, 5, 6), 5
    x = numbers(1, channels, *(n + 2 - pads[2 * i] - pads[2 * i + 1] for i, n in enumerate(size)), dtype=dtype)
    whole = channels_last(torch.full((1, channels, *(n + 2 for n in size)), 7.0, dtype=dtype))
    blur3d(x, pads, whole[:, :, 1:-1, 1:-1, 1:-1])
    wanted = torch.full_like(whole, 7.0, dtype=torch.float64)
    inside = [slice(1 + pads[2 * i], 1 + n - pads[2 * i + 1]) for i, n in enumerate(size)]
    wanted[(..., *inside)] = definition(x)
    torch.testing.assert_close(whole.double(), wanted, rtol=0, atol=2 * TOLERANCE.get(dtype, 1e-15))


def test_not_finite_numbers_stay_so():
    x = numbers(1, 16, 3, 3, 5)
    x[0, 3, 1, 1, 1], x[0, 5, 0, 0, 4] = torch.nan, torch.inf
    out = channels_last(torch.zeros(1, 16, 1, 1, 3))
    blur3d(x, [0] * 6, out)
    assert out[0, 3, 0, 0, :2].isnan().all() and out[0, 5, 0, 0, 2].isinf() and out.isfinite().sum() == 16 * 3 - 3


@pytest.mark.parametrize(("size", "pads"), [((3, 3, 4), [0] * 6), ((3, 3, 3), [0, 0, 0, 0, 0, 2]), ((3, 3, 3), [0])])
def test_sizes_that_do_not_fit(size: tuple, pads: list[int]):
    with pytest.raises(RuntimeError, match="blur3d: "):
        blur3d(numbers(1, 4, *size), pads, channels_last(torch.zeros(1, 4, 1, 1, 1)))


def test_a_doubling_and_a_convolution_are_a_transposed_convolution():
    x, weight, bias = numbers(2, 3, 4, 1, 5).double(), torch.randn(4, 3, 3, 3, 3).double(), torch.randn(4).double()
    got = F.conv_transpose3d(x, nearest_up_weight(weight), bias, stride=2, padding=1)
    torch.testing.assert_close(got, F.conv3d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1))


def test_weights_are_summed_in_float32():
    weight = torch.randn(5, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(nearest_up_weight(weight), nearest_up_weight(weight.double()).bfloat16())
    assert nearest_up_weight(weight.to("meta")).shape == (4, 5, 4, 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_on_a_gpu():
    x = numbers(1, 48, 6, 7, 8)
    out = channels_last(torch.zeros(1, 48, 4, 5, 7, device="cuda"))
    blur3d(x.cuda(), [0, 0, 0, 0, 0, 1], out)
    assert_near(out[..., :6].cpu(), definition(x))
    assert (out[..., 6] == 0).all()
