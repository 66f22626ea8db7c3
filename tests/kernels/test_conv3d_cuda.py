"""norm_silu_conv3d and up_conv3d on a CUDA device, against F.conv3d in float64; without one: tests/csrc."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("meddiff::norm_silu_conv3d", "CUDA"),
        reason="meddiff/_cuda.so is not built",
    ),
]

HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of rounding, relative
DTYPES = pytest.mark.parametrize("dtype", HALF_UNIT, ids=str)
# the kernel that norm_silu_conv3d takes, and the one for compute capability 9.0
OPERATORS = pytest.mark.parametrize("operator", ["norm_silu_conv3d", "_norm_silu_conv3d_wgmma"])


def operator_for(operator: str, dtype: torch.dtype, channels: int, outputs: int, kernel: int):
    """The operator; skips the test where it does not serve the call."""
    if operator == "_norm_silu_conv3d_wgmma":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("not a GPU of compute capability 9.0")
        if dtype == torch.float32 or kernel == 1 or channels % 8 or outputs % 8:
            pytest.skip("a call for norm_silu_conv3d")
    return getattr(torch.ops.meddiff, operator)


def channels_last(*shape: int, dtype: torch.dtype, cut: bool = False) -> Tensor:
    """Random; with `cut` the inside of a larger tensor that is full of NaN."""
    b, c, *size = shape
    grow = 2 if cut else 0
    whole = torch.full((b, *(n + grow for n in size), c), torch.nan, dtype=dtype, device="cuda")
    view = whole[(slice(None), *(slice(grow // 2, grow // 2 + n) for n in size))]
    view.copy_(torch.randn(view.shape, device="cuda"))
    return view.permute(0, 4, 1, 2, 3)


def zeros_of(pads: tuple[int, ...]) -> tuple[int, ...]:
    return (*pads[4:], *pads[2:4], *pads[:2])


def check(out: Tensor, wanted: Tensor, terms: int, flip: float = 0.0, statistics: Tensor | None = None) -> None:
    """The result is rounded once, and `flip` is what one activation that is rounded the other way can change.

    A float32 sum of `terms` products, one after the other, is off by a quarter of √terms half units on average, and by
    three in one of a hundred thousand (tests/csrc's emulation).
    """
    unit = HALF_UNIT[out.dtype]
    sums = max(0.1 * unit, 4 * terms**0.5 * HALF_UNIT[torch.float32])
    bound = 1.01 * unit * wanted.abs() + sums * wanted.square().mean().sqrt() + flip
    error = (out.double() - wanted).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} times the bound"
    if statistics is None:
        return
    variance, mean = torch.var_mean(out.double(), (2, 3, 4), correction=0)
    assert ((statistics[:, 0].double() - mean).abs() <= 1e-6 * (mean.abs() + variance.sqrt() + 1)).all()
    assert torch.allclose(statistics[:, 1].double(), variance * out[0, 0].numel(), rtol=1e-4)


@OPERATORS
@DTYPES
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "pads", "residual"),
    [
        (8, 192, (3, 5, 7), (1,) * 6, None),
        (48, 48, (20, 33, 50), (1, 0, 0, 1, 1, 0), "added"),
        (96, 48, (9, 18, 35), (1,) * 6, 96),
        (192, 192, (7, 16, 16), (0,) * 6, "added"),
        (72, 72, (8, 9, 20), (1,) * 6, 144),
        (64, 64, (8, 9, 20), (1,) * 6, None),
        (256, 128, (4, 8, 17), (1,) * 6, 256),
        (576, 576, (4, 4, 4), (1,) * 6, None),
        (12, 20, (4, 6, 5), (1,) * 6, 7),
        (48, 1, (9, 20, 33), (1, 0, 1, 1, 0, 1), None),
    ],
)
@pytest.mark.parametrize("kernel", [3, 1])
def test_norm_silu_conv3d(operator: str, dtype: torch.dtype, channels, outputs, size, pads, residual, kernel):
    run = operator_for(operator, dtype, channels, outputs, kernel)
    torch.manual_seed(0)
    pads = pads if kernel == 3 else (0,) * 6
    x = channels_last(2, channels, *size, dtype=dtype, cut=True)
    weight = (torch.randn(outputs, channels, *[kernel] * 3, device="cuda") / (channels * kernel**3) ** 0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda").to(dtype)
    scale, shift = 1 + 0.2 * torch.randn(2, channels, device="cuda"), torch.randn(2, channels, device="cuda")
    y = F.silu(x.double() * scale[:, :, None, None, None].double() + shift[:, :, None, None, None].double())
    flip = 0.0  # SiLU is approximate
    if dtype != torch.float32:
        y = y.to(dtype).double()
        flip = 2 * HALF_UNIT[dtype] * (y.abs().max() * weight.abs().max()).item()
    wanted = F.conv3d(F.pad(y, zeros_of(pads)), weight.double(), bias.double())
    terms = channels * kernel**3 + (residual if isinstance(residual, int) else 0)
    add = None
    extra: list[Tensor | None] = [None, None]
    if residual == "added":
        add = channels_last(*wanted.shape, dtype=dtype, cut=True)
        wanted = wanted + add.double()
    elif residual:
        add = channels_last(2, residual, *wanted.shape[2:], dtype=dtype)
        extra = [torch.randn(outputs, residual, 1, 1, 1, device="cuda").to(dtype), torch.randn_like(bias)]
        wanted = wanted + F.conv3d(add.double(), extra[0].double(), extra[1].double())
    results = []
    for _ in range(2):
        out = channels_last(*wanted.shape, dtype=dtype, cut=True).fill_(torch.nan)
        statistics = None if outputs == 1 else torch.full((2, 2, outputs), torch.nan, device="cuda")
        run(x, scale, shift, True, False, weight, bias, pads, add, *extra, out, statistics)
        results += [out, *([] if statistics is None else [statistics])]
    check(results[0], wanted, terms, flip, None if outputs == 1 else results[1])
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:])), "not the same bits twice"


@OPERATORS
@DTYPES
def test_upsample(operator: str, dtype: torch.dtype):
    run = operator_for(operator, dtype, 64, 64, 3)
    torch.manual_seed(1)
    pads = (1, 0, 0, 0, 0, 1)
    x = channels_last(1, 64, 5, 9, 12, dtype=dtype)
    weight = (torch.randn(64, 64, 3, 3, 3, device="cuda") / 40).to(dtype)
    doubled = F.interpolate(x.double(), scale_factor=2)[:, :, :-1, 1:-1, 1:]  # half of each halo plane
    wanted = F.conv3d(F.pad(doubled, zeros_of(pads)), weight.double())
    out = torch.empty(wanted.shape, dtype=dtype, device="cuda", memory_format=torch.channels_last_3d)
    run(x, None, None, False, True, weight, None, pads, None, None, None, out, None)
    check(out, wanted, 64 * 27)


@DTYPES
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "pads"),
    [
        (96, 48, (6, 18, 33), (1, 0, 1, 1, 0, 1)),
        (192, 192, (5, 8, 9), (1,) * 6),
        (64, 64, (4, 5, 6), (0,) * 6),
        (144, 16, (1, 1, 1), (1,) * 6),
        (5, 7, (3, 4, 5), (1,) * 6),
    ],
)
def test_up_conv3d(dtype: torch.dtype, channels, outputs, size, pads):
    torch.manual_seed(2)
    x = channels_last(2, channels, *size, dtype=dtype, cut=True)
    weight = (torch.randn(channels, outputs, 4, 4, 4, device="cuda") / (8 * channels) ** 0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda").to(dtype)
    wanted = F.conv_transpose3d(F.pad(x.double(), zeros_of(pads)), weight.double(), bias.double(), 2, 3)
    out = channels_last(*wanted.shape, dtype=dtype, cut=True).fill_(torch.nan)
    statistics = torch.full((2, 2, outputs), torch.nan, device="cuda")
    torch.ops.meddiff.up_conv3d(x, weight, bias, pads, out, statistics)
    check(out, wanted, 8 * channels, statistics=statistics)


def test_statistics_far_from_zero():
    """Mean 1000, standard deviation 0.1."""
    x = 0.1 * torch.randn(1, 8, 40, 50, 60, device="cuda").contiguous(memory_format=torch.channels_last_3d)
    weight = torch.eye(8, device="cuda")[:, :, None, None, None].contiguous()
    out, statistics = torch.empty_like(x), torch.empty(1, 2, 8, device="cuda")
    bias = torch.full((8,), 1000.0, device="cuda")
    torch.ops.meddiff.norm_silu_conv3d(
        x, None, None, False, False, weight, bias, [0] * 6, None, None, None, out, statistics
    )
    check(out, x.double() + 1000, 8, statistics=statistics)


@pytest.mark.large
@OPERATORS
def test_more_than_two_to_the_31_elements(operator: str):
    """The last planes of a kept tensor of 2^31.6 elements: their offsets do not fit into 32 bits."""
    run = operator_for(operator, torch.bfloat16, 48, 48, 3)
    x = torch.randn(1, 800, 800, 106, 48, device="cuda", dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    assert x.numel() > 2**31
    weight = (torch.randn(48, 48, 3, 3, 3, device="cuda") / 36).to(torch.bfloat16)
    out = torch.full((1, 800, 800, 106, 48), torch.nan, device="cuda", dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    statistics = torch.empty(1, 2, 48, device="cuda")
    run(x, None, None, False, False, weight, None, [1] * 6, None, None, None, out, statistics)
    for first in (0, 400, 797):  # planes first … first + 2 need those around them
        begin, end = max(first - 1, 0), min(first + 4, 800)
        part = F.pad(x[:, :, begin:end].double(), (1, 1, 1, 1, int(first == 0), int(end == 800)))
        planes = F.conv3d(part, weight.double())[:, :, :3]
        check(out[:, :, first : first + 3], planes, 48 * 27)
    assert torch.isfinite(out.sum()) and torch.isfinite(statistics).all()
