"""Convolutions in bfloat16 with all that stands around them, against PyTorch in float64, on every instruction set."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels import direct_conv3d as direct
from meddiff.kernels import norm_silu_conv3d as tiles
from meddiff.kernels.direct_conv3d import direct_conv3d, direct_suits, direct_up_conv3d
from meddiff.kernels.up_conv3d import up_conv3d_ref

ops = torch.ops.meddiff
ISAS = ops._direct_conv3d_isas()
FAST = pytest.mark.skipif(ISAS[0] == "portable", reason="needs a processor with AMX")
TOLERANCE = 4e-3  # of the largest number: a rounding to bfloat16; sums are float32

# (B, C, O, (D, H, W), pads, residual: none, "same" or its channels). Groups of 1, 2 and 6 voxels; one, two and three
# tiles of columns; voxels with and without zeros behind their channels; several strips and parts; one voxel.
CASES = [
    (1, 16, 16, (5, 7, 33), [1] * 6, None),
    (2, 16, 16, (3, 4, 5), [0, 1, 1, 0, 1, 1], "same"),
    (1, 32, 16, (4, 9, 20), [1] * 6, 32),
    (1, 16, 1, (3, 5, 13), [1] * 6, None),
    (1, 24, 24, (6, 6, 6), [1] * 6, "same"),
    (1, 8, 64, (3, 3, 3), [1, 1, 1, 1, 0, 0], None),
    (2, 64, 64, (2, 20, 17), [1] * 6, 64),
    (1, 72, 40, (2, 3, 40), [1] * 6, 16),
    (1, 16, 40, (3, 4, 21), [1] * 6, 8),
    (1, 16, 16, (4, 4, 4), [0] * 6, 9),
    (1, 3, 5, (1, 1, 1), [1] * 6, None),
    (1, 160, 16, (4, 30, 30), [1] * 6, None),
]
UP_CASES = [
    (1, 32, 16, (3, 4, 5), [1] * 6),
    (2, 64, 32, (2, 3, 17), [1, 0, 1, 1, 0, 1]),
    (1, 16, 16, (6, 6, 6), [0] * 6),
    (1, 24, 40, (1, 1, 1), [1] * 6),
]


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def source(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def read(size: tuple, pads: list[int]) -> list[int]:
    return [n + 2 - before - after for n, before, after in zip(size, pads[::2], pads[1::2])]


def case(batch: int, channels: int, outputs: int, size: tuple, pads: list[int], residual) -> dict[str, Tensor | None]:
    draw, extra = source(channels + outputs), outputs if residual == "same" else residual
    tensors = {
        "x": channels_last(draw(batch, channels, *read(size, pads))).bfloat16(),
        "scale": 1 + 0.3 * draw(batch, channels),
        "shift": 0.3 * draw(batch, channels),
        "weight": (draw(outputs, channels, 3, 3, 3) / (27 * channels) ** 0.5).bfloat16(),
        "bias": draw(outputs).bfloat16(),
    }
    tensors |= dict.fromkeys(("residual", "residual_weight", "residual_bias"))
    if residual is not None:
        tensors["residual"] = channels_last(draw(batch, extra, *size)).bfloat16()
    if residual not in (None, "same"):
        tensors["residual_weight"] = (draw(outputs, extra, 1, 1, 1) / extra**0.5).bfloat16()
        tensors["residual_bias"] = draw(outputs).bfloat16()
    return tensors


def definition(t: dict[str, Tensor | None], pads: list[int], silu: bool) -> Tensor:
    """In float64, but with the activations rounded as the operator does."""
    z = t["x"].float()
    if t["scale"] is not None:
        z = z * t["scale"][:, :, None, None, None] + t["shift"][:, :, None, None, None]
    z = (F.silu(z) if silu else z).bfloat16()
    t = {name: None if tensor is None else tensor.double() for name, tensor in t.items()}
    y = F.conv3d(F.pad(z.double(), [*pads[4:], *pads[2:4], *pads[:2]]), t["weight"], t["bias"])
    if t["residual"] is None:
        return y
    if t["residual_weight"] is None:
        return y + t["residual"]
    return y + F.conv3d(t["residual"], t["residual_weight"], t["residual_bias"])


def run(t: dict[str, Tensor | None], pads: list[int], silu: bool, out: Tensor, statistics=None, isa=None) -> None:
    x, scale, shift, weight, bias, *residual = t.values()
    ops._direct_conv3d(x, scale, shift, silu, weight, bias, pads, *residual, out, statistics, isa)


def empty(batch: int, channels: int, size) -> Tensor:
    return torch.full((batch, *size, channels), torch.nan, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)


def assert_near(out: Tensor, wanted: Tensor, statistics: Tensor | None = None) -> None:
    assert (out.double() - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    if statistics is None:
        return
    numbers = out.double().flatten(2)
    mean = numbers.mean(2)
    m2 = (numbers - mean[:, :, None]).square().sum(2)
    torch.testing.assert_close(statistics[:, 0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics[:, 1].double(), m2, rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_it_is_the_definition(isa: str, shape: tuple, normed: bool):
    batch, _, outputs, size, pads, _ = shape
    t = case(*shape) | ({} if normed else {"scale": None, "shift": None})
    out, statistics = empty(batch, outputs, size), torch.full((batch, 2, outputs), torch.nan)
    run(t, pads, normed, out, statistics, isa)
    assert_near(out, definition(t, pads, normed), statistics)


@pytest.mark.parametrize("shape", UP_CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_transposed(isa: str, shape: tuple):
    batch, channels, outputs, size, pads = shape
    draw = source(channels)
    x = channels_last(draw(batch, channels, *read(size, pads))).bfloat16()
    weight = (draw(channels, outputs, 4, 4, 4) / (8 * channels) ** 0.5).bfloat16()
    bias = draw(outputs).bfloat16()
    out, statistics = empty(batch, outputs, [2 * n for n in size]), torch.full((batch, 2, outputs), torch.nan)
    ops._direct_up_conv3d(x, weight, bias, pads, out, statistics, isa)
    assert_near(out, up_conv3d_ref(x.double(), weight.double(), bias.double(), pads)[0], statistics)


@pytest.mark.parametrize("isa", ISAS)
def test_a_part_of_a_volume_and_any_memory_of_the_weights(isa: str):
    batch, _, outputs, size, pads, _ = CASES[6]
    t = case(*CASES[6])
    out = empty(batch, outputs, size)
    run(t, pads, True, out, isa=isa)
    whole = empty(batch, outputs, [n + 2 for n in size])
    part = whole[:, :, 1:-1, 1:-1, 1:-1]
    other = {name: channels_last(t[name]) for name in ("weight", "residual_weight")}
    other |= {name: torch.stack([t[name], t[name]], 1)[:, 1] for name in ("bias", "residual_bias")}
    run(t | other, pads, True, part, isa=isa)
    assert torch.equal(part, out)
    assert int(whole.isnan().sum()) == whole.numel() - part.numel()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 16, 16, (9, 40, 33), [1] * 6, None), (1, 96, 32, (7, 70, 40), [1] * 6, None)])
def test_the_number_of_threads_does_not_matter(isa: str, shape: tuple):
    batch, _, outputs, size, pads, _ = shape
    t, threads, results = case(*shape), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            out, statistics = empty(batch, outputs, size), torch.empty(batch, 2, outputs)
            run(t, pads, True, out, statistics, isa)
            results.append((out, statistics))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", CASES[3:5])
def test_a_tile_has_the_bits_of_the_whole(isa: str, shape: tuple):
    batch, _, outputs, (d, h, w), pads, _ = shape
    t = case(*shape)
    out, tile = empty(batch, outputs, (d, h, w)), empty(batch, outputs, (d, h, 2))
    run(t, pads, True, out, isa=isa)
    part = t | {"x": t["x"][..., 1:5], "residual": None if t["residual"] is None else t["residual"][..., 2:4]}
    part = {name: channels_last(x) if name in ("x", "residual") and x is not None else x for name, x in part.items()}
    run(part, [1] * 4 + [0] * 2, True, tile, isa=isa)
    assert torch.equal(tile, out[..., 2:4])


@pytest.mark.parametrize("isa", ISAS)
def test_statistics_with_a_large_offset(isa: str):
    t = case(*CASES[0]) | {"bias": torch.full((16,), 300.0).bfloat16()}
    out, statistics = empty(1, 16, CASES[0][3]), torch.empty(1, 2, 16)
    run(t, [1] * 6, True, out, statistics, isa)
    assert_near(out, definition(t, [1] * 6, True), statistics)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(isa: str, number: float):
    t = case(1, 24, 24, (6, 6, 6), [1] * 6, None) | {"scale": None, "shift": None}
    t["x"][0, 5, 3, 3, 3] = number
    out = empty(1, 24, (6, 6, 6))
    run(t, [1] * 6, False, out, isa=isa)
    assert not out[:, :, 2:5, 2:5, 2:5].isfinite().any()
    assert int(out.isfinite().sum()) == out.numel() - 24 * 27  # a voxel of whole blocks has no other neighbours


def test_no_voxels():
    x = torch.empty(1, 4, 2, 3, 16, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    assert direct_conv3d(x, torch.zeros(8, 16, 3, 3, 3, dtype=torch.bfloat16), None, 0).shape == (1, 8, 2, 0, 1)


def test_wrong_arguments():
    t = case(*CASES[0])
    out = empty(1, 16, CASES[0][3])
    with pytest.raises(RuntimeError, match="isa must be one of"):
        run(t, [1] * 6, True, out, isa="fast")
    with pytest.raises(RuntimeError, match="x must have 3 planes for 3 of out"):
        run(t, [1] * 6, True, out[:, :, :3])
    with pytest.raises(RuntimeError, match="pads must be 0 or 1, got 3"):
        run(t, [0, 0, 0, 0, -1, 3][::-1], True, out)
    with pytest.raises(RuntimeError, match="the weight must be bfloat16"):
        run(t | {"weight": t["weight"].float()}, [1] * 6, True, out)
    with pytest.raises(RuntimeError, match="the bias must be bfloat16"):
        run(t | {"bias": t["bias"][:3]}, [1] * 6, True, out)
    with pytest.raises(RuntimeError, match="scale and shift go together"):
        run(t | {"shift": None}, [1] * 6, True, out)
    with pytest.raises(RuntimeError, match="statistics must be float32"):
        run(t, [1] * 6, True, out, torch.empty(1, 2, 3))
    with pytest.raises(RuntimeError, match="residual must have"):
        run(t | {"residual": empty(1, 3, CASES[0][3])}, [1] * 6, True, out)


@FAST
@pytest.mark.parametrize("padding", [0, 1])
def test_like_pytorch(padding: int):
    t = case(2, 24, 40, (4, 5, 6), [0] * 6, None)
    x, weight, bias = t["x"], t["weight"], t["bias"]
    assert direct_suits(x, weight, 3) and not direct_suits(x.float(), weight, 3) and not direct_suits(x, weight, 4)
    assert_near(
        direct_conv3d(x, weight, bias, padding), F.conv3d(x.double(), weight.double(), bias.double(), 1, padding)
    )
    assert torch.equal(tiles.conv3d(x, weight, bias, 1, padding), direct_conv3d(x, weight, bias, padding))
    up = (source(1)(24, 8, 4, 4, 4) / 14).bfloat16()
    wanted = F.conv_transpose3d(x.double(), up.double(), bias[:8].double(), 2, 1)
    assert_near(direct_up_conv3d(x.contiguous(), up, bias[:8]), wanted)


@FAST
def test_other_kernels_keep_their_way():
    t = case(1, 8, 8, (5, 5, 5), [0] * 6, None)
    for edges, padding in (((4, 4, 4), 1), ((3, 1, 1), 0)):
        weight = source(1)(8, 8, *edges).bfloat16()
        wanted = F.conv3d(t["x"].double(), weight.double(), None, 1, padding)
        assert_near(tiles.conv3d(t["x"], weight, None, 1, padding), wanted)


@FAST
def test_a_tile_of_the_decoder_is_it(monkeypatch: pytest.MonkeyPatch):
    t = case(*CASES[2])
    arguments = [t[name] for name in ("x", "scale", "shift")], [t[name] for name in ("weight", "bias")]
    rest = [t[name] for name in ("residual", "residual_weight", "residual_bias")]
    call = partial(tiles.norm_silu_conv3d, *arguments[0], True, False, *arguments[1], [1] * 6, *rest)
    ours, library = empty(1, 16, CASES[2][3]), empty(1, 16, CASES[2][3])
    call(ours)
    wanted = empty(1, 16, CASES[2][3])
    run(t, [1] * 6, True, wanted)
    assert torch.equal(ours, wanted)
    monkeypatch.setattr(tiles, "direct_suits", lambda *_: False)
    call(library)
    assert (library.double() - definition(t, [1] * 6, True)).abs().max() <= 4 * TOLERANCE * library.abs().max()


def test_others_keep_their_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "_HERE", False)
    t = case(*CASES[4])
    assert not direct_suits(t["x"], t["weight"], 3)
    assert_near(
        tiles.conv3d(t["x"], t["weight"], t["bias"], 1, 1),
        definition(t | {"scale": None, "residual": None}, [1] * 6, False),
    )
