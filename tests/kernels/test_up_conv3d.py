"""Tiles of the transposed convolution against the whole volume in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels.up_conv3d import up_conv3d, up_conv3d_ref

ops = torch.ops.meddiff
GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# (B, C, O, (D, H, W)): released widths, odd ones, one voxel
CASES = [
    (1, 96, 96, (3, 4, 5)),
    (1, 96, 48, (2, 3, 3)),
    (2, 7, 5, (5, 3, 4)),
    (1, 1, 1, (1, 1, 1)),
    (1, 13, 16, (1, 2, 7)),
]


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def case(batch: int, channels: int, out: int, size: tuple) -> list[Tensor]:
    """x, weight, bias, float64."""
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        channels_last(draw(batch, channels, *size)),
        draw(channels, out, 4, 4, 4) / (8 * channels) ** 0.5,
        draw(out),
    ]


def at(x: Tensor, place) -> Tensor:
    return x[(slice(None), slice(None), *place)]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, edge: int) -> tuple[Tensor, list[tuple[tuple, Tensor]]]:
    """The whole volume in tiles of `edge` input voxels, with their statistics; what is not written stays NaN."""
    batch, size = x.shape[0], x.shape[2:]
    out = x.new_full((batch, *[2 * n for n in size], weight.shape[1]), torch.nan).permute(0, 4, 1, 2, 3)
    found = []
    for tile in product(*[[(a, min(a + edge, n)) for a in range(0, n, edge)] for n in size]):
        pads, place = [], []
        for (first, last), n in zip(tile, size):
            pads += [int(first == 0), int(last == n)]
            place.append(slice(max(first - 1, 0), min(last + 1, n)))
        here = tuple(slice(2 * a, 2 * b) for a, b in tile)
        statistics = torch.full((batch, 2, weight.shape[1]), torch.nan, device=x.device)
        up_conv3d(at(x, place), weight, bias, pads, at(out, here), statistics)
        found.append((here, statistics))
    return out, found


def check(dtype: torch.dtype, shape: tuple, edge: int, device: str = "cpu") -> None:
    tensors = [t.to(device, dtype) for t in case(*shape)]
    out, found = run(*tensors, edge)
    out = out.cpu()
    x, weight, bias = (t.cpu().double() for t in tensors)
    wanted = F.conv_transpose3d(x, weight, bias, stride=2, padding=1)
    assert (out - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
    for here, statistics in found:
        numbers = at(out, here).double().flatten(2)
        mean = numbers.mean(2)
        m2 = (numbers - mean[:, :, None]).square().sum(2)
        torch.testing.assert_close(statistics[:, 0].cpu().double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(statistics[:, 1].cpu().double(), m2, rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("edge", [1, 2, 8])
def test_tiles_equal_the_whole(dtype: torch.dtype, shape: tuple, edge: int):
    check(dtype, shape, edge)


def test_the_reference_is_the_definition():
    x, weight, bias = case(*CASES[2])
    out, _ = run(x, weight, bias, 2)  # float64
    torch.testing.assert_close(out, F.conv_transpose3d(x, weight, bias, stride=2, padding=1))


def test_any_memory_of_x_and_no_bias():
    x, weight, _ = (t.float() for t in case(*CASES[2]))
    assert torch.equal(run(x.contiguous(), weight, None, 2)[0], run(x, weight, None, 2)[0])


X = torch.zeros(1, 6, 3, 3, 3)
OUT = torch.zeros(1, 2, 2, 2, 4).permute(0, 4, 1, 2, 3)
WEIGHT = torch.zeros(6, 4, 4, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], WEIGHT, None, [0] * 6, OUT), ValueError, r"\[B, C, D, H, W\].*got \(6, 3, 3, 3\)"),
        ((X, WEIGHT[:5], None, [0] * 6, OUT), ValueError, r"weight must be \[6, 4, 4, 4, 4\]"),
        (
            (X, WEIGHT, None, [0] * 6, OUT[:, :, :1]),
            ValueError,
            r"out must be \[1, 4, 2, 2, 2\].*got \[1, 4, 1, 2, 2\]",
        ),
        ((X, WEIGHT, None, [1] * 6, OUT), ValueError, r"out must be \[1, 4, 6, 6, 6\]"),
        ((X, WEIGHT, None, [0, 3] * 3, OUT), ValueError, "each 0 or 1"),
        ((X, WEIGHT, torch.zeros(6), [0] * 6, OUT), ValueError, r"bias must be \[4\]"),
        ((X, WEIGHT.bfloat16(), None, [0] * 6, OUT), TypeError, "weight must be torch.float32, got torch.bfloat16"),
        ((X, WEIGHT, None, [0] * 6, OUT, torch.zeros(1, 2, 5)), ValueError, r"statistics must be \[1, 2, 4\]"),
        ((X, WEIGHT, None, [0] * 6, OUT.contiguous()), ValueError, "out must be channels-last"),
    ],
)
def test_argument_errors(arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"up_conv3d: .*{message}"):
        up_conv3d(*arguments)


def test_opcheck():
    torch.library.opcheck(ops.up_conv3d.default, (X, WEIGHT, torch.zeros(4), [0] * 6, OUT.clone(), None))
    torch.library.opcheck(ops.up_conv3d.default, (X, WEIGHT, None, [0] * 6, OUT.clone(), torch.zeros(1, 2, 4)))


def test_compile_fullgraph():
    def layer(x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor) -> Tensor:
        up_conv3d(x, weight, None, [0] * 6, out, statistics)
        return out * 2

    x, weight = torch.rand_like(X), torch.rand_like(WEIGHT)
    out, statistics = OUT.clone(), torch.zeros(1, 2, 4)
    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, weight, out, statistics)
    y, found = up_conv3d_ref(x, weight, None, [0] * 6)
    torch.testing.assert_close(got, 2 * y)
    torch.testing.assert_close(statistics, found)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*CASES, (1, 96, 96, (9, 33, 34))])
@pytest.mark.parametrize("edge", [1, 8, 32])
def test_cuda(shape: tuple, dtype: torch.dtype, edge: int):
    check(dtype, shape, edge, "cuda")
