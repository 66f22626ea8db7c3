"""Tiles of a convolution with its norm, activation, bias, residual and statistics, against the whole volume in float64,
and what stands before and behind the convolution on every instruction set of this processor."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels.norm_silu_conv3d import norm_silu_conv3d, norm_silu_conv3d_ref

ops = torch.ops.meddiff
ISAS = ops.cpu_isas()
GPU = torch.cuda.is_available()
# largest error over the largest number: rounding of float32 sums; of the activation, the sum and the result
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

# (B, C, O, (D, H, W), norm, SiLU, upsample, kernel, residual: none, "same" or its channels)
CASES = [
    (1, 48, 48, (5, 6, 7), True, True, False, 3, "same"),
    (2, 12, 20, (3, 4, 9), True, True, False, 3, 7),
    (1, 8, 16, (4, 3, 5), False, False, False, 3, None),
    (1, 24, 1, (6, 5, 4), True, True, False, 3, None),
    (1, 1, 3, (1, 1, 1), True, False, False, 3, None),
    (1, 13, 6, (4, 5, 6), True, True, False, 1, 5),
    (1, 16, 8, (4, 3, 5), False, False, True, 3, None),
    (2, 10, 10, (3, 2, 5), True, True, True, 3, "same"),
    (1, 6, 4, (3, 4, 2), False, True, True, 1, None),
    (1, 192, 192, (2, 3, 2), True, True, False, 3, "same"),
]
NAMES = ("x", "scale", "shift", "weight", "bias", "residual", "residual_weight", "residual_bias")


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def case(
    batch: int, channels: int, out: int, size: tuple, norm: bool, silu: bool, upsample: bool, kernel: int, residual
) -> tuple[dict[str, Tensor | None], dict]:
    """float64 tensors of a whole volume, and the flags."""
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    whole = [2 * n if upsample else n for n in size]
    tensors = dict.fromkeys(NAMES)
    tensors["x"] = channels_last(0.5 + draw(batch, channels, *size))
    if norm:
        tensors |= {"scale": 1 + 0.3 * draw(batch, channels), "shift": 0.3 * draw(batch, channels)}
    tensors["weight"] = draw(out, channels, *[kernel] * 3) / (channels * kernel**3) ** 0.5
    tensors["bias"] = draw(out)
    if residual is not None:
        extra = out if residual == "same" else residual
        tensors["residual"] = channels_last(draw(batch, extra, *whole))
        if residual != "same":
            tensors |= {"residual_weight": draw(out, extra, 1, 1, 1) / extra**0.5, "residual_bias": draw(out)}
    return tensors, {"silu": silu, "upsample": upsample, "whole": whole, "kernel": kernel}


def convert(tensors: dict[str, Tensor | None], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    of = {name: torch.float32 if name in ("scale", "shift") else dtype for name in tensors}
    return {name: None if t is None else t.to(device, of[name]) for name, t in tensors.items()}


def definition(tensors: dict[str, Tensor | None], flags: dict) -> Tensor:
    """Of the whole volume, by PyTorch, in float64 but with the activations rounded as the operator does."""
    t = {name: None if v is None else v.double() for name, v in tensors.items()}
    z = t["x"]
    if t["scale"] is not None:
        z = z * t["scale"][:, :, None, None, None] + t["shift"][:, :, None, None, None]
    z = (F.silu(z) if flags["silu"] else z).to(tensors["x"].dtype).double()
    if flags["upsample"]:
        z = F.interpolate(z, scale_factor=2, mode="nearest")
    y = F.conv3d(z, t["weight"], t["bias"], padding=flags["kernel"] // 2)
    if t["residual"] is None:
        return y
    if t["residual_weight"] is None:
        return y + t["residual"]
    return y + F.conv3d(t["residual"], t["residual_weight"], t["residual_bias"])


def at(x: Tensor, place) -> Tensor:
    return x[(slice(None), slice(None), *place)]


def tiles(whole: list[int], edge: int):
    return product(*[[(a, min(a + edge, n)) for a in range(0, n, edge)] for n in whole])


def run_tile(t: dict, flags: dict, tile: tuple, out: Tensor, statistics: Tensor | None) -> None:
    halo = flags["kernel"] // 2
    pads, place = [], []
    for (first, last), n in zip(tile, flags["whole"]):
        pads += [int(first < halo), int(last + halo > n)]
        first, last = max(first - halo, 0), min(last + halo, n)
        place.append(slice(first // 2, (last + 1) // 2) if flags["upsample"] else slice(first, last))
    here = tuple(slice(*ends) for ends in tile)
    residual = None if t["residual"] is None else at(t["residual"], here)
    norm_silu_conv3d(
        at(t["x"], place), t["scale"], t["shift"], flags["silu"], flags["upsample"], t["weight"], t["bias"],
        pads if halo else [0] * 6, residual, t["residual_weight"], t["residual_bias"], at(out, here), statistics,
    )  # fmt: skip


def run(t: dict, flags: dict, edge: int) -> tuple[Tensor, list[tuple[tuple, Tensor]]]:
    """The whole volume in tiles, with the statistics of each; whatever is not written stays NaN."""
    batch, channels = t["x"].shape[0], t["weight"].shape[0]
    memory = t["x"].new_full((batch, *flags["whole"], channels), torch.nan)
    out, found = memory.permute(0, 4, 1, 2, 3), []
    for tile in tiles(flags["whole"], edge):
        statistics = torch.full((batch, 2, channels), torch.nan, device=out.device)
        run_tile(t, flags, tile, out, statistics)
        found.append((tile, statistics))
    return out, found


def check(dtype: torch.dtype, shape: tuple, edge: int, device: str = "cpu") -> None:
    tensors, flags = case(*shape)
    t = convert(tensors, dtype, device)
    out, found = run(t, flags, edge)
    wanted = definition(convert(t, dtype), flags)
    out = out.cpu()
    assert (out - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
    for tile, statistics in found:
        numbers = at(out, [slice(*ends) for ends in tile]).double().flatten(2)
        mean = numbers.mean(2)
        m2 = (numbers - mean[:, :, None]).square().sum(2)
        torch.testing.assert_close(statistics[:, 0].cpu().double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(statistics[:, 1].cpu().double(), m2, rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("edge", [2, 4, 16])
def test_tiles_equal_the_whole(dtype: torch.dtype, shape: tuple, edge: int):
    check(dtype, shape, edge)


def test_one_voxel_tiles():
    check(torch.float32, (1, 4, 6, (3, 2, 3), True, True, False, 3, "same"), 1)


@pytest.mark.parametrize("shape", CASES[1:3] + CASES[6:8])
def test_the_reference_is_the_definition(shape: tuple):
    tensors, flags = case(*shape)
    out, _ = run(tensors, flags, 2)  # float64
    torch.testing.assert_close(out, definition(tensors, flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_of_the_inputs(dtype: torch.dtype):
    tensors, flags = case(*CASES[1])
    t = convert(tensors, dtype)
    plain, _ = run(t, flags, 4)
    other = t | {name: t[name].contiguous() for name in ("x", "residual")}
    other |= {name: torch.stack([t[name], t[name]], 1)[:, 1] for name in ("scale", "shift")}
    assert torch.equal(run(other, flags, 4)[0], plain)


def test_the_number_of_threads_does_not_matter():
    tensors, flags = case(1, 48, 48, (9, 40, 33), True, True, False, 3, "same")
    t, threads, results = convert(tensors, torch.bfloat16), torch.get_num_threads(), []
    statistics = torch.empty(1, 2, 48)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = torch.empty_like(t["residual"])
            ops._conv_output(t["residual"].clone(), t["residual"], out, statistics)
            results.append((out, statistics.clone()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


def test_the_same_tile_gives_the_same_bits():
    tensors, flags = case(*CASES[0])
    t = convert(tensors, torch.bfloat16)
    (first, of_first), (second, of_second) = run(t, flags, 4), run(t, flags, 4)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(of_first, of_second))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [1, 13, 48])
def test_statistics_with_a_large_offset(isa: str, channels: int):
    generator = torch.Generator().manual_seed(0)
    y = channels_last(1000 + 0.1 * torch.randn(2, channels, 17, 31, 45, generator=generator))
    exact = y.double().flatten(2)
    variance, mean = torch.var_mean(exact, dim=2, correction=0)
    statistics, out = torch.empty(2, 2, channels), torch.empty_like(y)
    ops._conv_output(y, None, out, statistics, isa)
    assert torch.equal(out, y)
    torch.testing.assert_close(statistics[:, 0].double(), mean, rtol=6e-8, atol=0)
    torch.testing.assert_close(statistics[:, 1].double() / exact.shape[2], variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [CASES[1], CASES[4], CASES[7], (1, 48, 48, (2, 3, 5), True, True, False, 3, None)])
def test_before_and_behind_on_every_instruction_set(isa: str, dtype: torch.dtype, shape: tuple):
    tensors, flags = case(*shape)
    t = convert(tensors, dtype)
    x, zoom = t["x"], 2 if flags["upsample"] else 1
    pads, skip = [1, 0, 0, 1, 1, 1], [0, zoom - 1, 0]
    read = [zoom * n - s for n, s in zip(x.shape[2:], skip)]
    size = [n + a + b for n, a, b in zip(read, pads[::2], pads[1::2])]
    tile = torch.full((x.shape[0], *size, x.shape[1]), torch.nan, dtype=dtype).permute(0, 4, 1, 2, 3)
    ops._conv_input(x, t["scale"], t["shift"], flags["silu"], flags["upsample"], skip, pads, tile, isa)
    z = x.double() * t["scale"].double()[:, :, None, None, None] + t["shift"].double()[:, :, None, None, None]
    z = F.silu(z) if flags["silu"] else z
    if flags["upsample"]:
        z = F.interpolate(z, scale_factor=2, mode="nearest")
    z = F.pad(z[:, :, skip[0] :, skip[1] :, skip[2] :], [*pads[4:], *pads[2:4], *pads[:2]])
    near = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(tile.double(), z, rtol=near, atol=1e-6)

    y, residual = tile.clone(), channels_last(tile.flip(2))
    wanted = (y.float() + residual.float()).to(dtype)
    memory = torch.full((tile.shape[0], size[0], size[1] + 1, size[2] + 2, tile.shape[1]), torch.nan, dtype=dtype)
    out = memory.permute(0, 4, 1, 2, 3)[:, :, :, 1:, 2:]
    ops._conv_output(y, residual, out, None, isa)
    assert torch.equal(out, wanted)
    assert memory[:, :, 0].isnan().all() and memory[:, :, :, :2].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_and_nan_of_the_sum(isa: str):
    y = torch.tensor([1.0, 256.0, 1.0, torch.nan, torch.inf, -3.0]).bfloat16().view(1, 1, 1, 1, 6)
    residual = torch.tensor([0.00390625, 1.0, 0.01171875, 1.0, 1.0, 3.0]).bfloat16().view(1, 1, 1, 1, 6)
    wanted, out = (y.float() + residual.float()).bfloat16(), torch.empty_like(y)
    ops._conv_output(y.clone(), residual, out, None, isa)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


def test_empty_tiles():
    weight = torch.ones(5, 6, 3, 3, 3)
    for size in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0)):
        out, statistics = torch.empty(*size, 5).permute(0, 4, 1, 2, 3), torch.full((size[0], 2, 5), torch.nan)
        x = torch.zeros(size[0], 6, *[n + 2 for n in size[1:]])
        norm_silu_conv3d(x, None, None, True, False, weight, None, [0] * 6, None, None, None, out, statistics)
        assert (statistics == 0).all()


def arguments(**changes) -> dict:
    t = {
        "x": torch.zeros(1, 6, 4, 4, 4),
        "scale": None,
        "shift": None,
        "silu": True,
        "upsample": False,
        "weight": torch.zeros(3, 6, 3, 3, 3),
        "bias": torch.zeros(3),
        "pads": [1] * 6,
        "residual": None,
        "residual_weight": None,
        "residual_bias": None,
        "out": torch.zeros(1, 4, 4, 4, 3).permute(0, 4, 1, 2, 3),
        "statistics": torch.zeros(1, 2, 3),
    }
    return t | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(6, 4, 4, 4)}, ValueError, r"\[B, C, D, H, W\].*got \(6, 4, 4, 4\)"),
        ({"weight": torch.zeros(3, 6, 5, 5, 5)}, ValueError, r"weight must be \[O, 6, 3, 3, 3\]"),
        ({"weight": torch.zeros(3, 5, 3, 3, 3)}, ValueError, r"got \[3, 5, 3, 3, 3\]"),
        ({"pads": [1] * 5}, ValueError, r"pads must be 6 numbers, each 0 or 1, got \[1, 1, 1, 1, 1\]"),
        ({"pads": [2] * 6}, ValueError, "each 0 or 1"),
        ({"pads": [0] * 6}, ValueError, r"x must be \[1, 6, 6, 6, 6\].*got \[1, 6, 4, 4, 4\]"),
        ({"scale": torch.ones(1, 6)}, ValueError, "both be given or neither"),
        ({"scale": torch.ones(1, 5), "shift": torch.ones(1, 6)}, ValueError, r"scale must be \[1, 6\]"),
        ({"scale": torch.ones(1, 6).half(), "shift": torch.ones(1, 6)}, TypeError, "scale must be torch.float32"),
        ({"bias": torch.zeros(3).bfloat16()}, TypeError, "bias must be torch.float32, got torch.bfloat16"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, r"bias must be \[3\] on cpu, got \[3\] on meta"),
        ({"residual_weight": torch.zeros(3, 2, 1, 1, 1)}, ValueError, "residual_weight is given, and no residual"),
        ({"residual_bias": torch.zeros(3)}, ValueError, "residual_bias is given, and no residual_weight"),
        ({"residual": torch.zeros(1, 2, 4, 4, 4)}, ValueError, r"residual must be \[1, 3, 4, 4, 4\]"),
        ({"statistics": torch.zeros(1, 3, 2)}, ValueError, r"statistics must be \[1, 2, 3\]"),
        ({"out": torch.zeros(1, 3, 4, 4, 4)}, ValueError, "out must be channels-last"),
        ({"upsample": True, "out": torch.zeros(1, 7, 8, 8, 3).permute(0, 4, 1, 2, 3)}, ValueError, "even lengths"),
    ],
)
def test_argument_errors(changes: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=f"norm_silu_conv3d: .*{message}"):
        norm_silu_conv3d(**arguments(**changes))


def test_the_cpu_kernels_check_too():
    x, out = channels_last(torch.zeros(1, 6, 4, 4, 4)), channels_last(torch.zeros(1, 6, 6, 6, 6))
    plain = (None, None, True, False)
    for bad in (
        (x.contiguous(), *plain, [0] * 3, [1] * 6, out),
        (x, *plain, [0] * 3, [0] * 6, out),
        (x, *plain, [1] * 3, [1] * 6, out),
        (x, *plain, [0] * 3, [1] * 5, out),
        (x.double(), *plain, [0] * 3, [1] * 6, out.double()),
        (x.bfloat16(), *plain, [0] * 3, [1] * 6, out),
        (x, torch.ones(1, 6), None, True, False, [0] * 3, [1] * 6, out),
        (x, torch.ones(1, 5), torch.ones(1, 6), True, False, [0] * 3, [1] * 6, out),
        (x, *plain, [0] * 3, [1] * 6, out, "sse9"),
    ):
        with pytest.raises(RuntimeError, match="norm_silu_conv3d: "):
            ops._conv_input(*bad)
    for bad in (
        (x, out, x, None),
        (x, None, out, None),
        (x.contiguous(), None, x, None),
        (out[:, :, :4, :4, :4], None, x, None),
        (x, None, x, torch.zeros(1, 6, 2)),
    ):
        with pytest.raises(RuntimeError, match="norm_silu_conv3d: "):
            ops._conv_output(*bad)


def test_opcheck():
    full = arguments(
        scale=torch.ones(1, 6),
        shift=torch.zeros(1, 6),
        residual=torch.zeros(1, 2, 4, 4, 4),
        residual_weight=torch.zeros(3, 2, 1, 1, 1),
        residual_bias=torch.zeros(3),
    )
    for given in (arguments(statistics=None), full):
        torch.library.opcheck(ops.norm_silu_conv3d.default, tuple(given.values()))
    x, out = channels_last(torch.rand(1, 6, 4, 4, 4)), channels_last(torch.zeros(1, 6, 6, 6, 6))
    torch.library.opcheck(ops._conv_input.default, (x, None, None, True, False, [0] * 3, [1] * 6, out))
    torch.library.opcheck(ops._conv_output.default, (x, None, x.clone(), torch.zeros(1, 2, 6)))


def test_compile_fullgraph():
    def layer(x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor) -> Tensor:
        norm_silu_conv3d(x, None, None, True, False, weight, None, [1] * 6, None, None, None, out, statistics)
        return out * 2

    given = arguments(x=torch.rand(1, 6, 4, 4, 4), weight=torch.rand(3, 6, 3, 3, 3))
    tensors = [given[name] for name in ("x", "weight", "out", "statistics")]
    wanted = layer(*(t.clone() for t in tensors))
    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(2 * tensors[2], wanted)
    y, statistics = norm_silu_conv3d_ref(tensors[0], None, None, True, False, tensors[1], None, [1] * 6)
    torch.testing.assert_close(got, 2 * y)
    torch.testing.assert_close(tensors[3], statistics)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*CASES, (1, 48, 48, (19, 65, 70), True, True, False, 3, "same")])
@pytest.mark.parametrize("edge", [2, 16, 64])
def test_cuda(shape: tuple, dtype: torch.dtype, edge: int):
    check(dtype, shape, edge, "cuda")
