"""The fused nearest code against float64 brute force and against the operations it replaces: the CPU's kernel, and the
Triton kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meddiff.kernels import vq_fused as module
from meddiff.kernels.patchify import patchify, stitch
from meddiff.kernels.vq_fused import code_statistics, vq_decode, vq_encode
from meddiff.models.codebook import LatentScale

GPU = torch.cuda.is_available()
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# largest error of a component over the largest component. The convolution is float32 for any dtype of the patches, in
# which only their gradient is rounded
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def moved(tensors: tuple, device: str) -> list:
    return [x.to(device) if isinstance(x, Tensor) else x for x in tensors]


def on_gpu(launch: Callable) -> Callable:
    """The Triton kernels, for CPU tensors."""
    return lambda *inputs: tuple(moved(launch(*moved(inputs, "cuda" if GPU else "cpu")), "cpu"))


ENCODE = {"cpu": torch.ops.meddiff._vq_encode, "triton": on_gpu(module._launch_encode)}
DECODE = {"cpu": torch.ops.meddiff._vq_decode, "triton": on_gpu(module._launch_decode)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distances(z: Tensor, codes: Tensor) -> Tensor:
    """[tokens, K] in float64, summed channel by channel; infinite where NaN."""
    tokens = z.double().movedim(1, -1).flatten(0, -2)
    total = torch.zeros(len(tokens), len(codes), dtype=torch.float64)
    for token, code in zip(tokens.T, codes.double().T):
        total += (token[:, None] - code) ** 2
    return total.nan_to_num(nan=torch.inf, posinf=torch.inf)


def assert_nearest(index: Tensor, z: Tensor, codes: Tensor) -> None:
    """The lowest index of the least distance."""
    assert index.dtype == torch.int64 and index.is_contiguous() and index.shape == (z.shape[0], *z.shape[2:])
    assert torch.equal(index.flatten(), distances(z, codes).argmin(1))


def case(channels: int, n_codes: int, q: int = 2, grid: tuple[int, int, int] = (2, 1, 3), batch: int = 2) -> tuple:
    """Features, weight, bias, codes and size."""
    n = batch * grid[0] * grid[1] * grid[2]
    size = tuple(g * q for g in grid)
    weight = random(channels, channels, seed=1) / channels**0.5
    return random(n, channels, q, q, q), weight, random(channels, seed=2) / 10, random(n_codes, channels, seed=3), size


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x with other strides."""
    holes = torch.full([2 * n + 1 for n in x.shape], torch.nan, dtype=x.dtype)[1::2, 1::2, 1::2, 1::2, 1::2]
    holes.copy_(x)
    return {
        "channels last": x.movedim(1, 4).contiguous().movedim(4, 1),
        "sliced": holes,
        "permuted": x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
        "expanded": x[:, :, :1].expand(x.shape),
    }


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got.shape == wanted.shape and got.isfinite().all()
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], f"{error:.1e}"


def check_encode(name: str, features: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, size: tuple) -> None:
    latent, index, rows, statistics = ENCODE[name](features, weight, bias, codes, *size, True, True)
    convolved = torch.einsum("oc,ncdhw->nodhw", weight.double(), features.double()) + bias.double()[:, None, None, None]
    assert latent.dtype == torch.float32 and latent.is_contiguous()
    assert_near(latent, stitch(convolved.float(), size))
    assert_nearest(index, latent, codes)
    assert rows.is_contiguous() and torch.equal(rows, codes[index])
    counts = torch.bincount(index.flatten(), minlength=len(codes))
    assert torch.equal(statistics[:, -1], counts.float())
    sums = torch.zeros(len(codes), features.shape[1], dtype=torch.float64)
    sums.index_add_(0, index.flatten(), latent.double().movedim(1, -1).flatten(0, -2))
    assert_near(statistics[:, :-1], sums)


@pytest.mark.parametrize("name", ENCODE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels, n_codes, q", [(8, 200, 2), (4, 65, 3), (13, 64, 1), (64, 1, 2)])
def test_encode(channels: int, n_codes: int, q: int, dtype: torch.dtype, name: str):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    features, *others = case(channels, n_codes, q)
    check_encode(name, features.to(dtype), *others)


@pytest.mark.parametrize("name", ENCODE)
def test_encode_layouts(name: str):
    features, *others = case(8, 30)
    for turned in layouts(features).values():
        check_encode(name, turned, *others)


def test_encode_is_the_convolution_stitched_and_quantised():
    features, weight, bias, codes, size = case(8, 100, 3)
    conv = torch.nn.Conv3d(8, 8, 1)
    conv.weight.copy_(weight[..., None, None, None]), conv.bias.copy_(bias)
    wanted = stitch(conv(features), size)
    for part in (conv.weight, weight):
        latent, index, rows, statistics = vq_encode(features, part, bias, codes, size, rows=True, statistics=True)
        assert_near(latent, wanted)
        assert torch.equal(index, distances(latent, codes).argmin(1).view(index.shape))
        assert torch.equal(rows, codes[index].movedim(4, 1))
        assert rows.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(statistics, code_statistics(latent, index, len(codes)))
    alone = vq_encode(features, weight, bias, None, size)
    assert torch.equal(alone[0], latent) and alone[1:] == (None, None, None)
    some = vq_encode(features, weight, bias, codes, size)
    assert torch.equal(some[1], index) and some[2:] == (None, None)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels, n_codes, width", [(8, 200, 8), (3, 1, 70), (16, 65, 1)])
def test_decode(channels: int, n_codes: int, width: int, dtype: torch.dtype, name: str):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    codes, table = random(n_codes, channels), random(n_codes, width, seed=1).to(dtype)
    x = random(2, channels, 3, 5, 4, seed=2) / 3
    scale = LatentScale(-2.5, 3.0)
    for latent in (x, *layouts(x).values()):
        for extremes, z in (((scale.minimum, scale.maximum), scale.unscale(latent)), ((None, None), latent)):
            index, rows = DECODE[name](latent, *extremes, codes, table)
            assert_nearest(index, z, codes)
            assert rows.dtype == dtype and rows.is_contiguous() and torch.equal(rows, table[index])


def test_decode_in_public():
    codes, table, latent = random(90, 8), random(90, 5, seed=1).bfloat16(), random(1, 8, 2, 3, 4, seed=2)
    index, rows = vq_decode(latent.bfloat16(), codes, table, (-2.0, 2.5))
    assert_nearest(index, LatentScale(-2.0, 2.5).unscale(latent.bfloat16().float()), codes)
    assert torch.equal(rows, table[index].movedim(4, 1)) and rows.is_contiguous(memory_format=torch.channels_last_3d)


def search(name: str, z: Tensor, codes: Tensor) -> Tensor:
    return DECODE[name](z, None, None, codes, codes[:, :1])[0]


@pytest.mark.parametrize("name", DECODE)
def test_ties_give_the_lowest_index(name: str):
    codes = random(20, 8).repeat(8, 1)[torch.randperm(160, generator=torch.Generator().manual_seed(1))]
    assert_nearest(search(name, random(1, 8, 2, 3, 4, seed=2), codes), random(1, 8, 2, 3, 4, seed=2), codes)
    grid = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))  # the origin is as near to all of them
    assert search(name, torch.zeros(1, 8, 1, 1, 7), grid).eq(0).all()


@pytest.mark.parametrize("name", DECODE)
def test_differences_far_below_float32_rounding(name: str):
    codes = random(10, 8).repeat_interleave(20, 0)
    nudges = torch.randint(-2, 3, codes.shape, generator=torch.Generator().manual_seed(4))
    codes *= 1 + nudges * torch.finfo(torch.float32).eps
    z = random(1, 8, 3, 4, 5, seed=2)
    assert_nearest(search(name, z, codes), z, codes)
    # the case must be hard: a plain float32 search has to fail it
    plain = torch.cdist(z.flatten(2)[0].T, codes).argmin(1)
    assert not torch.equal(plain, distances(z, codes).argmin(1))


@pytest.mark.parametrize("name", DECODE)
def test_codes_far_from_the_origin(name: str):
    codes, z = 1000 + 0.01 * random(100, 8), 1000 + 0.01 * random(1, 8, 2, 3, 4, seed=1)
    assert_nearest(search(name, z, codes), z, codes)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("scale", [1e4, 1e18, 3e38, 1e-18, 1e-42])
def test_extreme_scales(scale: float, name: str):
    z, codes = random(1, 8, 1, 2, 3).clamp(-1, 1), random(70, 8, seed=1).clamp(-1, 1)
    for tokens, rows in ((scale * z, scale * codes), (z, scale * codes), (scale * z, codes)):
        assert_nearest(search(name, tokens, rows), tokens, rows)


@pytest.mark.parametrize("name", DECODE)
def test_nan_and_infinity(name: str):
    z, codes = random(1, 8, 2, 2, 3), random(70, 8, seed=1)
    z[0, 3, 0, 0, 0], z[0, :, 1, 1, 1], z[0, 5, 1, 0, 2], z[0, 0, 0, 1, 2] = torch.nan, torch.nan, torch.inf, -torch.inf
    index = search(name, z, codes)
    assert_nearest(index, z, codes)
    assert index[0, 0, 0, 0] == index[0, 1, 1, 1] == 0
    codes[7, 2], codes[0], codes[50, 1] = torch.nan, torch.nan, torch.inf
    assert_nearest(search(name, z, codes), z, codes)


@pytest.mark.parametrize("name", ENCODE)
def test_no_tokens(name: str):
    _, weight, bias, codes, size = case(8, 5)
    latent, index, rows, statistics = ENCODE[name](torch.zeros(0, 8, 2, 2, 2), weight, bias, codes, *size, True, True)
    assert latent.shape == (0, 8, *size) and index.shape == (0, *size) and rows.shape == (0, *size, 8)
    assert torch.equal(statistics, torch.zeros(5, 9))
    index, rows = DECODE[name](torch.zeros(1, 8, 2, 0, 3), -1.0, 1.0, codes, codes)
    assert index.shape == (1, 2, 0, 3) and rows.shape == (1, 2, 0, 3, 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_backward_is_that_of_the_straight_through_estimator(dtype: torch.dtype):
    features, weight, bias, codes, size = case(8, 60)
    features, grads = features.to(dtype), (random(2, 8, *size, seed=5), random(2, 8, *size, seed=6))
    with torch.enable_grad():
        ours = [x.clone().requires_grad_() for x in (features, weight, bias)]
        latent, _, rows, statistics = vq_encode(*ours, codes, size, rows=True, statistics=True)
        assert not statistics.requires_grad
        ((latent * grads[0]).sum() + (rows * grads[1]).sum()).backward()
        plain = [x.double().requires_grad_() for x in (features, weight, bias)]
        convolved = torch.einsum("oc,ncdhw->nodhw", plain[1], plain[0]) + plain[2][:, None, None, None]
        z = module.stitch_ref(convolved, 2, *size, 0, torch.float64)
        q = z + (rows.detach() - z).detach()
        ((z * grads[0]).sum() + (q * grads[1]).sum()).backward()
    for a, b in zip(ours, plain):
        assert_near(a.grad, b.grad, a.dtype)
    with torch.enable_grad():
        ours = [x.clone().requires_grad_() for x in (features, weight, bias)]
        vq_encode(*ours, None, size)[0].backward(grads[0])
    dz = patchify(grads[0], 2).double()
    assert_near(ours[0].grad, torch.einsum("oc,nodhw->ncdhw", weight.double(), dz), dtype)
    assert_near(ours[2].grad, dz.sum((0, 2, 3, 4)))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    """New tensors begin as NaN, or as the largest integer."""
    features, weight, bias, codes, size = case(8, 70)
    wanted = ENCODE["cpu"](features, weight, bias, codes, *size, True, True)
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *arguments, **options) -> Tensor:
        x = new_empty(self, *arguments, **options)
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    check_encode("triton", features, weight, bias, codes, size)
    index, rows = DECODE["triton"](wanted[0], -1.0, 1.5, codes, codes)
    assert torch.equal(rows, codes[index])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        again = ENCODE["cpu"](features, weight, bias, codes, *size, True, True)
        index, rows = DECODE["cpu"](wanted[0], None, None, codes, codes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted))
    assert torch.equal(index, wanted[1]) and torch.equal(rows, wanted[2])


def test_number_of_threads_does_not_matter():
    features, weight, bias, codes, size = case(8, 500, 4, (2, 2, 2))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(ENCODE["cpu"](features, weight, bias, codes, *size, True, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@pytest.mark.parametrize("axis", range(5))
def test_offsets_beyond_32_bits(axis: int):
    size = [2, 8, 2, 2, 2]
    far, near, strides = 2**31 // (size[axis] - 1) + 64, 1, [0] * 5
    for other in (a for a in reversed(range(5)) if a != axis):
        strides[other], near = near, near * size[other]
    strides[axis] = far
    memory = torch.empty(far * (size[axis] - 1) + near)  # 8 GiB of address space, of which a few pages are touched
    x = memory.as_strided(size, strides)
    x.copy_(random(*size))
    _, weight, bias, codes, _ = case(8, 20)
    for name in ENCODE if not GPU else ("cpu",):
        check_encode(name, x, weight, bias, codes, (2, 2, 4))
        assert_nearest(search(name, x, codes), x, codes)


def test_opcheck():
    features, weight, bias, codes, size = case(8, 33)
    ops = torch.ops.meddiff
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in (layouts(features)["channels last"], weight, bias)]
        torch.library.opcheck(ops._vq_encode.default, (*leaves, codes, *size, True, True))
        torch.library.opcheck(ops._vq_encode.default, (*leaves, codes[:0], *size, False, False))
    latent = random(2, 8, 3, 4, 5)
    torch.library.opcheck(ops._vq_decode.default, (latent, -1.0, 2.0, codes, codes.bfloat16()))
    torch.library.opcheck(ops._vq_decode.default, (latent, None, None, codes, codes))


def test_compile_fullgraph():
    def loss(features: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, size: tuple) -> Tensor:
        latent, _, rows, statistics = vq_encode(features, weight, bias, codes, size, rows=True, statistics=True)
        index, decoded = vq_decode(latent.detach(), codes, codes)
        return (latent**2).sum() + (rows * decoded).sum() + statistics.sum() + index.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grid in ((2, 1, 3), (1, 2, 2)):
        features, *others = case(8, 40, grid=grid)
        with torch.enable_grad():
            ours, plain = features.clone().requires_grad_(), features.clone().requires_grad_()
            a, b = compiled(ours, *others), loss(plain, *others)
            a.backward(), b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours.grad, plain.grad)


X, W, BIAS, CODES = torch.zeros(2, 8, 2, 2, 2), torch.zeros(8, 8), torch.zeros(8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], W, BIAS, CODES, (2, 2, 4)), ValueError, r"features must be \[n, C, q, q, q\].*got \(8, 2, 2, 2\)"),
        ((torch.zeros(1, 65, 2, 2, 2), W, BIAS, CODES, (2, 2, 2)), ValueError, "C from 1 to 64, got .*65"),
        ((X.double(), W, BIAS, CODES, (2, 2, 4)), TypeError, "features must be .* got torch.float64"),
        ((X, W[:4], BIAS, CODES, (2, 2, 4)), ValueError, r"\[8, 8\] and \[8\], got \(4, 8\)"),
        ((X, W, BIAS, CODES[:, :4], (2, 2, 4)), ValueError, r"codes must be \[K, 8\].*got \(5, 4\)"),
        ((X, W, BIAS, CODES.int(), (2, 2, 4)), TypeError, "codes must be .* got torch.int32"),
        ((X, W, BIAS, CODES, (2, 3, 4)), ValueError, r"positive multiples of 2, got \(2, 3, 4\)"),
        ((X, W, BIAS, CODES, (4, 2, 4)), ValueError, r"2 patches of 2³ make no volumes of \(4, 2, 4\)"),
    ],
)
def test_argument_errors_of_encode(arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"vq_encode: .*{message}"):
        vq_encode(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], CODES, CODES), ValueError, r"latent must be \[B, C, D, H, W\].*got \(8, 2, 2, 2\)"),
        ((X.int(), CODES, CODES), TypeError, "latent must be .* got torch.int32"),
        ((X, CODES[:0], CODES[:0]), ValueError, r"K >= 1, got \(0, 8\)"),
        ((X, CODES, CODES[:4]), ValueError, r"table must be \[5, M\].*got \(4, 8\)"),
    ],
)
def test_argument_errors_of_decode(arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"vq_decode: .*{message}"):
        vq_decode(*arguments)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("_vq_encode", (X[0], W, BIAS, CODES, 2, 2, 4, True, True)),
        ("_vq_encode", (X, W, BIAS, CODES, 2, 3, 4, True, True)),
        ("_vq_encode", (X, W.double(), BIAS, CODES, 2, 2, 4, True, True)),
        ("_vq_encode", (X.double(), W, BIAS, CODES, 2, 2, 4, True, True)),
        ("_vq_decode", (X.bfloat16(), None, None, CODES, CODES)),
        ("_vq_decode", (X, 1.0, None, CODES, CODES)),
        ("_vq_decode", (X, None, None, CODES, CODES[:2])),
    ],
)
def test_the_operators_themselves_check_too(op: str, arguments: tuple):
    with pytest.raises(RuntimeError, match=f"{op[1:]}: "):
        getattr(torch.ops.meddiff, op)(*arguments)


def test_cuda_tensors_have_kernels():
    for op in ("_vq_encode", "_vq_decode"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"meddiff::{op}", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels, n_codes", [(8, 8192), (4, 1000), (16, 65), (33, 500), (64, 65536)])
def test_cuda(channels: int, n_codes: int, dtype: torch.dtype):
    features, *others = case(channels, n_codes, 8, (1, 2, 1))
    others[2][n_codes // 2 :] = others[2][: n_codes - n_codes // 2].clone()
    for turned in (features, *layouts(features).values()):
        check_encode("triton", turned.to(dtype), *others)
    codes, latent = others[2], random(1, channels, 5, 7, 9, seed=9) / 3
    index, rows = DECODE["triton"](latent, -3.0, 3.0, codes, codes.to(dtype))
    assert_nearest(index, LatentScale(-3.0, 3.0).unscale(latent), codes)
    assert torch.equal(rows, codes.to(dtype)[index])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_backward(dtype: torch.dtype):
    features, weight, bias, codes, size = case(8, 300, 8)
    results = []
    for device in ("cpu", "cuda"):
        with torch.enable_grad():
            leaves = [x.to(device, copy=True).requires_grad_() for x in (features.to(dtype), weight, bias)]
            latent, _, rows, _ = vq_encode(*leaves, codes.to(device), size, rows=True)
            (latent.square().sum() + (rows * random(2, 8, *size, seed=5).to(device)).sum()).backward()
        results.append([leaf.grad.cpu() for leaf in leaves])
    for got, wanted in zip(*results[::-1]):
        assert_near(got, wanted, got.dtype)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_cuda_beyond_32_bits():
    """A latent of 2³¹ + 2²⁸ numbers, of which the last tokens are checked."""
    codes = random(64, 8).cuda()
    latent = torch.zeros(1, 8, 576, 512, 1024, device="cuda")
    latent[:, :, -1, -1, -64:] = random(1, 8, 64, seed=1).cuda()
    index, rows = torch.ops.meddiff._vq_decode(latent, None, None, codes, codes.bfloat16())
    last = latent[:, :, -1:, -1:, -64:].cpu()
    assert_nearest(index[:, -1:, -1:, -64:].cpu(), last, codes.cpu())
    assert torch.equal(rows[0, -1, -1, -64:], codes.bfloat16()[index[0, -1, -1, -64:]])
