"""Patches and back against their definition by single voxels: the CPU's copies, and the Triton kernels in Triton's
interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from meddiff.kernels import patchify as module
from meddiff.kernels.patchify import patchify, stitch
from meddiff.volume import IntensityScale

GPU = torch.cuda.is_available()
# copies and the map to [-1, 1] are exact, sums onto the edge and the rounding of gradients are not
TOLERANCE = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8]

# (B, C, D, H, W), patch: whole, odd and partial patches, one voxel, more channels, several blocks of elements
CASES = [
    ((2, 1, 4, 6, 2), 2),
    ((1, 3, 5, 4, 7), 3),
    ((2, 2, 1, 2, 9), 4),
    ((1, 1, 3, 2, 4), 1),
    ((1, 2, 12, 5, 11), 11),
]


def volume(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (100 * x).clamp(0, 255).to(dtype) if dtype == torch.uint8 else (100 * x).to(dtype)


def definition(x: Tensor, patch: int) -> Tensor:
    """In numpy, voxel by voxel of a patch, in float64."""
    size = x.shape[2:]
    grid = [-(-n // patch) for n in size]
    padded = np.pad(
        x.double().numpy(), [(0, 0), (0, 0), *((0, g * patch - n) for g, n in zip(grid, size))], mode="edge"
    )
    cells = product(range(x.shape[0]), *map(range, grid))
    span = range(patch)
    patches = [
        padded[b][:, [i * patch + s for s in span]][:, :, [j * patch + s for s in span]][
            ..., [k * patch + s for s in span]
        ]
        for b, i, j, k in cells
    ]
    return torch.from_numpy(np.stack(patches))


def triton_patchify(*arguments) -> Tensor:
    x, *others = arguments
    return module._launch_patchify(x.cuda() if GPU else x, *others).cpu()


def triton_stitch(*arguments) -> Tensor:
    patches, *others = arguments
    return module._launch_stitch(patches.cuda() if GPU else patches, *others).cpu()


PATCHIFY = {"cpu": torch.ops.meddiff._patchify, "triton": triton_patchify}
STITCH = {"cpu": torch.ops.meddiff._stitch, "triton": triton_stitch}


def skip_bfloat16(name: str, *dtypes: torch.dtype) -> None:
    if name == "triton" and torch.bfloat16 in dtypes and not GPU:
        pytest.skip("the interpreter has no bfloat16")


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x with other strides."""
    holes = torch.full([2 * n + 1 for n in x.shape], 77, dtype=x.dtype)[1::2, 1::2, 1::2, 1::2, 1::2]
    holes.copy_(x)
    return {
        "channels last": x.movedim(1, 4).contiguous().movedim(4, 1),
        "sliced": holes,
        "W slowest": x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "expanded": x[:, :, :, :1].expand(x.shape),
    }


@pytest.mark.parametrize("name", PATCHIFY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_are_exact(dtype: torch.dtype, name: str):
    skip_bfloat16(name, dtype)
    for shape, patch in CASES:
        x = volume(shape, dtype)
        wanted = definition(x, patch)
        got = PATCHIFY[name](x, patch, 0, len(wanted), torch.float32, 0.0, 0.0, True)
        assert got.dtype == torch.float32 and torch.equal(got.double(), wanted)
        assert got.movedim(1, 4).is_contiguous()


@pytest.mark.parametrize("name", PATCHIFY)
def test_layouts(name: str):
    for dtype in (torch.float32, torch.int16):
        for x in layouts(volume((2, 2, 5, 4, 3), dtype)).values():
            got = PATCHIFY[name](x, 3, 0, 8, torch.float32, 0.0, 0.0, True)
            assert torch.equal(got.double(), definition(x, 3))
            patches = got.to(torch.float32)
            for turned in layouts(patches).values():
                back = STITCH[name](turned, 2, 5, 4, 3, 0, torch.float32)
                assert torch.equal(back, module.stitch_ref(turned, 2, 5, 4, 3, 0, torch.float32))


@pytest.mark.parametrize("name", PATCHIFY)
@pytest.mark.parametrize("target", TOLERANCE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_window_is_that_of_the_intensity_scale(dtype: torch.dtype, target: torch.dtype, name: str):
    skip_bfloat16(name, dtype, target)
    low, high = -80.0, 150.0
    x = volume((1, 2, 5, 3, 4), dtype)
    wanted = definition(IntensityScale(low, high).normalize(x), 3)
    got = PATCHIFY[name](x, 3, 0, 4, target, low, 2 / (high - low), True)
    assert got.dtype == target and torch.equal(got, wanted.to(target))
    assert got.abs().max() == 1


@pytest.mark.parametrize("name", PATCHIFY)
def test_extremes_and_nan(name: str):
    x = torch.tensor([1e4, -1e4, 3e38, 1e-42, torch.inf, -torch.inf, torch.nan, 0.0]).view(1, 1, 2, 2, 2)
    plain = PATCHIFY[name](x, 2, 0, 1, torch.float32, 0.0, 0.0, True)
    assert torch.equal(plain.nan_to_num(nan=5.0), x.nan_to_num(nan=5.0))
    mapped = PATCHIFY[name](x, 2, 0, 1, torch.float32, -1.0, 1.0, True).flatten()
    assert mapped[:6].tolist() == [1, -1, 1, 0, 1, -1] and mapped[6].isnan() and mapped[7] == 0


@pytest.mark.parametrize("name", PATCHIFY)
def test_a_range_of_patches(name: str):
    x = volume((2, 1, 5, 3, 7))
    wanted = definition(x, 3)
    for start, stop in ((0, 1), (3, 9), (11, 12), (5, 5)):
        got = PATCHIFY[name](x, 3, start, stop, torch.float32, 0.0, 0.0, True)
        assert torch.equal(got.double(), wanted[start:stop])
        back = STITCH[name](got, 2, 5, 3, 7, start, torch.float32)
        others = wanted.float().clone()
        others[:start], others[stop:] = 0, 0
        assert torch.equal(back, module.stitch_ref(others, 2, 5, 3, 7, 0, torch.float32))
    assert torch.equal(patchify(x, 3, start=-2), wanted[-2:].float())
    assert patchify(x, 3, start=8, stop=4).shape == (0, 1, 3, 3, 3)
    assert torch.equal(patchify(x, 3, stop=10**6), wanted.float())


@pytest.mark.parametrize("name", STITCH)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_stitch_is_the_inverse(dtype: torch.dtype, name: str):
    skip_bfloat16(name, dtype)
    for shape, patch in CASES:
        x = volume(shape).to(dtype)
        back = STITCH[name](definition(x, patch).to(dtype), shape[0], *shape[2:], 0, torch.float32)
        assert torch.equal(back, x.float()) and back.movedim(1, 4).is_contiguous()
        assert torch.equal(stitch(patchify(x, patch), shape[2:]), x)


def numeric(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a linear map in float64, element by element."""
    unit = torch.zeros_like(x, dtype=torch.float64)
    result = unit.clone()
    for i in range(x.numel()):
        unit.view(-1)[i] = 1
        result.view(-1)[i] = (forward(unit) * grad).sum()
        unit.view(-1)[i] = 0
    return result


@pytest.mark.parametrize("size", [(2, 1, 4, 2, 2), (1, 2, 3, 4, 1)])
def test_backward_sums_what_was_repeated_onto_the_edge(size: tuple[int, ...]):
    x, count = volume(size) / 100, len(definition(torch.zeros(size), 2))
    for start, stop in ((0, count), (1, count - 1)):
        grad = volume((stop - start, size[1], 2, 2, 2), seed=1)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            patchify(leaf, 2, start=start, stop=stop).backward(grad)
        wanted = numeric(lambda v: definition(v, 2)[start:stop], x, grad.double())  # noqa: B023
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_of_the_window(dtype: torch.dtype):
    low, high = -40.0, 90.0
    x = volume((1, 1, 3, 4, 2)).to(dtype)
    grad = volume((4, 1, 2, 2, 2), seed=1).to(dtype)
    with torch.enable_grad():
        leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        patchify(leaf, 2, window=(low, high)).backward(grad)
        scaled = torch.cat([plain, plain[:, :, -1:]], 2).float().sub(low).mul(2 / (high - low)).sub(1).clamp(-1, 1)
        module.patchify_ref(scaled, 2, 0, 4, torch.float32, 0.0, 0.0, True).backward(grad.float())
    assert leaf.grad.dtype == dtype and 0 < (leaf.grad == 0).sum() < leaf.numel()
    largest = plain.grad.abs().max()
    assert ((leaf.grad - plain.grad) / largest).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("size", [(4, 2, 3), (3, 1, 4)])
def test_backward_of_stitch_has_zeros_where_it_cropped(size: tuple[int, ...]):
    patches, grad = volume((2 * 2 * 1 * 2, 2, 2, 2, 2)), volume((2, 2, *size), seed=1)
    with torch.enable_grad():
        leaf = patches.clone().requires_grad_()
        stitch(leaf, size).backward(grad)
    wanted = numeric(lambda p: module.stitch_ref(p, 2, *size, 0, torch.float64), patches, grad.double())
    assert torch.equal(leaf.grad.double(), wanted)
    by_triton = triton_patchify(grad, 2, 0, 8, torch.float32, 0.0, 0.0, False)
    assert torch.equal(by_triton, leaf.grad)


def test_second_derivatives():
    with torch.enable_grad():
        x = (volume((1, 1, 3, 2, 2)) / 100).double().float().requires_grad_()
        (first,) = torch.autograd.grad((patchify(x, 2) ** 3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    repeats = torch.tensor([1.0, 1.0, 2.0]).view(1, 1, 3, 1, 1)
    torch.testing.assert_close(second, 6 * x.detach() * repeats)


@pytest.mark.parametrize("name", PATCHIFY)
def test_nothing_to_do(name: str):
    none = PATCHIFY[name](torch.zeros(0, 1, 4, 4, 4), 2, 0, 0, torch.float32, 0.0, 0.0, True)
    assert none.shape == (0, 1, 2, 2, 2)
    assert PATCHIFY[name](torch.zeros(1, 0, 4, 2, 2), 2, 0, 2, torch.float32, 0.0, 0.0, True).shape == (2, 0, 2, 2, 2)
    assert STITCH[name](torch.zeros(0, 3, 2, 2, 2), 0, 4, 4, 4, 0, torch.float32).shape == (0, 3, 4, 4, 4)
    assert patchify(torch.zeros(0, 1, 4, 4, 4), 2).shape == (0, 1, 2, 2, 2)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    """New tensors begin as NaN."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    for shape, patch in CASES:
        x = volume(shape)
        wanted = definition(x, patch)
        for name in PATCHIFY:
            got = PATCHIFY[name](x, patch, 0, len(wanted), torch.float32, 0.0, 0.0, True)
            assert torch.equal(got.double(), wanted)
            assert torch.equal(STITCH[name](got, shape[0], *shape[2:], 0, torch.float32), x)


@pytest.mark.parametrize("axis", range(5))
def test_offsets_beyond_32_bits(axis: int):
    size = [2, 2, 3, 2, 4]
    far, near, strides = 2**31 // (size[axis] - 1) + 64, 1, [0] * 5
    for other in (a for a in reversed(range(5)) if a != axis):
        strides[other], near = near, near * size[other]
    strides[axis] = far
    memory = torch.empty(far * (size[axis] - 1) + near, dtype=torch.uint8)  # address space: few pages are touched
    x = memory.as_strided(size, strides)
    x.copy_(volume(tuple(size), torch.uint8))
    for name in PATCHIFY if not GPU else ("cpu",):
        got = PATCHIFY[name](x, 2, 0, 8, torch.float32, 0.0, 0.0, True)
        assert torch.equal(got.double(), definition(x, 2))
    cells = memory[: far * (size[axis] - 1) + near].as_strided(size, strides)[:, :, :2, :, :2]
    for name in STITCH if not GPU else ("cpu",):
        wanted = module.stitch_ref(cells.contiguous(), 1, 4, 2, 2, 0, torch.float32)
        assert torch.equal(STITCH[name](cells, 1, 4, 2, 2, 0, torch.float32), wanted)


def test_opcheck():
    x, ops = volume((2, 3, 5, 4, 3)), torch.ops.meddiff
    for layout in (x, layouts(x)["sliced"]):
        with torch.enable_grad():
            leaf = layout.clone().requires_grad_()
            torch.library.opcheck(ops._patchify.default, (leaf, 3, 1, 7, torch.float32, -50.0, 0.02, True))
            torch.library.opcheck(ops._patchify.default, (leaf, 2, 0, 24, torch.float16, 0.0, 0.0, False))
            patches = patchify(layout, 3).requires_grad_()
            torch.library.opcheck(ops._stitch.default, (patches, 2, 5, 4, 3, 0, torch.float32))


def test_compile_fullgraph():
    def loss(x: Tensor) -> Tensor:
        patches = patchify(x, 2, window=(-100, 100))
        return (stitch(patches**2, x.shape[2:]) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((1, 1, 3, 4, 5), (2, 1, 5, 3, 4)):
        with torch.enable_grad():
            ours, plain = volume(shape).requires_grad_(), volume(shape).requires_grad_()
            a, b = compiled(ours), loss(plain)
            a.backward(), b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        (torch.zeros(2, 2, 2, 2), {}, ValueError, r"x must be \[B, C, D, H, W\].*got \(2, 2, 2, 2\)"),
        (torch.zeros(1, 1, 2, 0, 2), {}, ValueError, r"D, H, W >= 1, got \(1, 1, 2, 0, 2\)"),
        (torch.zeros(1, 1, 2, 2, 2).int(), {}, TypeError, "x must be .* got torch.int32"),
        (torch.zeros(1, 1, 2, 2, 2), {"dtype": torch.int16}, TypeError, "dtype must be .* got torch.int16"),
        (torch.zeros(1, 1, 2, 2, 2), {"patch": 0}, ValueError, "patch must be at least 1 .* got 0"),
        (torch.zeros(1, 1, 2, 2, 2), {"window": (1, 1)}, ValueError, r"low < high, got \(1, 1\)"),
    ],
)
def test_argument_errors(x: Tensor, arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=f"patchify: .*{message}"):
        patchify(x, **{"patch": 2} | arguments)


@pytest.mark.parametrize(
    ("patches", "size", "error", "message"),
    [
        (torch.zeros(8, 1, 2, 2, 3), (4, 4, 4), ValueError, r"patches must be \[n, C, p, p, p\].*\(8, 1, 2, 2, 3\)"),
        (torch.zeros(8, 1, 2, 2, 2), (4, 4), ValueError, r"size must be three positive lengths, got \(4, 4\)"),
        (torch.zeros(9, 1, 2, 2, 2), (4, 4, 3), ValueError, "multiple of 8 .* got 9"),
        (torch.zeros(8, 1, 2, 2, 2).double(), (4, 4, 4), TypeError, "patches must be .* got torch.float64"),
    ],
)
def test_argument_errors_of_stitch(patches: Tensor, size: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"stitch: .*{message}"):
        stitch(patches, size)


def test_cuda_tensors_have_kernels():
    for op in ("_patchify", "_stitch"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"meddiff::{op}", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("target", TOLERANCE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, patch", [*CASES, ((2, 1, 70, 130, 65), 64), ((1, 8, 16, 16, 24), 8)])
def test_cuda(shape: tuple[int, ...], patch: int, dtype: torch.dtype, target: torch.dtype):
    for x in (volume(shape, dtype), *layouts(volume(shape, dtype)).values()):
        got = patchify(x.cuda(), patch, target, window=(-80, 150))
        assert torch.equal(got.cpu(), patchify(x, patch, target, (-80, 150)))
        plain = patchify(x.cuda(), patch, torch.float32)
        assert torch.equal(stitch(plain, shape[2:]).cpu(), x.float())


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_cuda_beyond_32_bits():
    """2³¹ + 2²⁷ voxels: the last patch begins past 2³¹."""
    x = torch.zeros(1, 1, 18 * 64, 1408, 1408, device="cuda", dtype=torch.uint8)
    assert (17 * 64 * 1408 + 21 * 64) * 1408 + 21 * 64 > 2**31
    x[..., -64:, -64:, -64:] = torch.randint(256, (64, 64, 64), device="cuda", dtype=torch.uint8)
    last = patchify(x, 64, torch.bfloat16, start=-1)
    assert torch.equal(last[0, 0], x[0, 0, -64:, -64:, -64:].bfloat16())
    patches = patchify(x, 64, torch.bfloat16)
    assert torch.equal(stitch(patches, x.shape[2:])[..., -64:, -64:, -64:], x[..., -64:, -64:, -64:].bfloat16())
