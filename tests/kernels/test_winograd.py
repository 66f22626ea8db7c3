"""Winograd's convolution against F.conv3d in float64, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels import winograd
from meddiff.kernels.norm_silu_conv3d import conv3d
from meddiff.kernels.winograd import winograd_conv3d, winograd_pays

ops = torch.ops.meddiff
# (B, C, O, (D, H, W) of the result): released widths, all remainders of blocks, rows and columns, one voxel
CASES = [
    (1, 48, 48, (4, 6, 9)),
    (1, 16, 112, (3, 2, 5)),
    (2, 96, 32, (2, 3, 4)),
    (3, 16, 16, (1, 1, 1)),
    (1, 80, 16, (1, 2, 37)),
    (1, 128, 96, (5, 4, 3)),
    (1, 192, 192, (2, 2, 30)),
]


def case(batch: int, channels: int, outputs: int, size: tuple) -> list[Tensor]:
    """x with its halo, channels-last; weight; bias."""
    generator = torch.Generator().manual_seed(channels + outputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = draw(batch, channels, *(n + 2 for n in size)).contiguous(memory_format=torch.channels_last_3d)
    return [x, draw(outputs, channels, 3, 3, 3) / (27 * channels) ** 0.5, draw(outputs)]


def assert_near(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> None:
    wanted = F.conv3d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    assert got.shape == wanted.shape
    error = (got - wanted).norm() / wanted.norm()
    assert error < 1e-6, f"{error:.1e}"


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("isa", ops.cpu_isas())
def test_every_instruction_set(isa: str, shape: tuple):
    x, weight, bias = case(*shape)
    taps = weight.permute(2, 3, 4, 1, 0).flatten(0, 2).contiguous()
    rows = x.permute(0, 2, 3, 4, 1).contiguous()
    y = torch.full((shape[0], *shape[3], shape[2]), torch.nan)
    ops._winograd_conv3d(rows, taps, bias, y, isa)
    assert_near(y.permute(0, 4, 1, 2, 3), x, weight, bias)


def test_rounding_is_about_that_of_the_plain_sum():
    x, weight, bias = case(1, 96, 96, (8, 8, 8))
    wanted = F.conv3d(x.double(), weight.double(), bias.double())
    plain, ours = ((y - wanted).norm() for y in (F.conv3d(x, weight, bias), winograd_conv3d(x, weight, bias)))
    assert ours < 1.5 * plain


@pytest.mark.parametrize("padding", [0, 1])
def test_weights_and_inputs_of_any_strides(padding: int):
    x, weight, bias = case(2, 32, 48, (4, 5, 6))
    for memory in (torch.contiguous_format, torch.channels_last_3d):
        given = x.contiguous(memory_format=memory), weight.contiguous(memory_format=memory)
        assert_near(winograd_conv3d(*given, None, padding), x, weight, None, padding)
    part, every_other = x[:, :, 1:, ::2], torch.stack([bias, bias], dim=1)[:, 0]
    assert_near(winograd_conv3d(part, weight, every_other, padding), part, weight, bias, padding)


def test_what_is_not_finite_is_not_hidden():
    x, weight, bias = case(1, 32, 32, (6, 6, 6))
    x[0, 5, 3, 3, 3] = torch.nan
    assert winograd_conv3d(x, weight, bias)[:, :, 1:4, 1:4, 1:4].isnan().all()


def test_conv3d_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch):
    x, weight, bias = case(1, 32, 32, (16, 16, 16))
    monkeypatch.setattr(winograd, "_FAST", True)
    assert winograd_pays(x, weight) and not winograd_pays(x, weight[:, :, :1, :1, :1])
    assert not winograd_pays(x[:, :, :3], weight) and winograd_pays(x[:, :, 1:-1, 1:-1, 1:-1], weight, 1)
    assert not winograd_pays(x.bfloat16(), weight.bfloat16()) and not winograd_pays(x[:, :24], weight[:, :24])
    assert torch.equal(conv3d(x, weight, bias), winograd_conv3d(x, weight, bias))
    assert torch.equal(conv3d(x, weight, bias, padding=1), winograd_conv3d(x, weight, bias, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 4, 4, 24)}, "channels differ"),
        ({"x": torch.zeros(1, 4, 4, 5, 32)}, "two planes more"),
        ({"y": torch.zeros(1, 2, 2, 2, 32, dtype=torch.float64)}, "float32"),
        ({"bias": torch.zeros(16)}, "bias must be"),
        ({"isa": "none"}, "isa must be"),
        ({"taps": torch.zeros(27, 32, 6), "y": torch.zeros(1, 2, 2, 2, 6), "bias": None}, "multiples of"),
    ],
)
def test_shapes_that_do_not_fit(change: dict, message: str):
    given = {"x": torch.zeros(1, 4, 4, 4, 32), "taps": torch.zeros(27, 32, 32), "bias": torch.zeros(32)}
    given |= {"y": torch.zeros(1, 2, 2, 2, 32), "isa": None} | change
    with pytest.raises(RuntimeError, match=message):
        ops._winograd_conv3d(given["x"], given["taps"], given["bias"], given["y"], given["isa"])
