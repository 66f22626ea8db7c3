"""LayerNorm over the channels, forward and backward, against its definition in float64: PyTorch's on the CPU, and the
Triton kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from meddiff.kernels import channel_norm as module
from meddiff.kernels.channel_norm import channel_norm, channel_norm_ref

# largest error of a component over the largest component: rounding of float32 sums, or of the result
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
GPU = torch.cuda.is_available()
EPS = 1e-5
SIZES = [(2, 72, (3, 5, 4)), (1, 576, (2, 3, 1)), (1, 2, (2, 2, 2)), (3, 7, (9, 8, 5)), (1, 1000, (1, 1, 1))]


def case(batch: int, channels: int, size: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, gain and the gradient of y."""
    generator = torch.Generator().manual_seed(channels)
    x, dy = (torch.randn(batch, channels, *size, generator=generator).to(dtype) for _ in range(2))
    return x + 0.5, 1 + 0.1 * torch.randn(channels, generator=generator), dy


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, least: float = 1e-30) -> None:
    assert got.shape == wanted.shape and got.isfinite().all()
    error = (got.double() - wanted.double()).abs().max() / max(wanted.abs().max().item(), least)
    assert error <= TOLERANCE[dtype], f"{error:.1e}"


def reference(x: Tensor, gain: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and the gain's gradient in float64."""
    with torch.enable_grad():
        x, gain = x.detach().double().requires_grad_(), gain.detach().double().requires_grad_()
        y = channel_norm_ref(x.movedim(1, 4), gain, EPS).movedim(4, 1)
        return y.detach(), *torch.autograd.grad(y, (x, gain), dy.double())


def by_operator(x: Tensor, gain: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        x, gain = x.detach().requires_grad_(), gain.detach().requires_grad_()
        y = channel_norm(x, gain, EPS)
        assert y.movedim(1, 4).is_contiguous()
        return y.detach(), *torch.autograd.grad(y, (x, gain), dy)


def by_triton(x: Tensor, gain: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernels, for tensors of this machine's device."""

    def rows(volume: Tensor) -> Tensor:
        flat = volume.movedim(1, 4).contiguous().view(volume[:, 0].numel(), volume.shape[1])
        return flat.cuda() if GPU else flat

    gain = gain.cuda() if GPU else gain
    y = module._launch_forward(rows(x), gain, EPS)
    dx, dgain = module._launch_backward(rows(dy), rows(x), gain, EPS)
    y, dx = (t.cpu().view(x.movedim(1, 4).shape).movedim(4, 1) for t in (y, dx))
    return y, dx, dgain.cpu()


def check(run, x: Tensor, gain: Tensor, dy: Tensor) -> None:
    for i, (got, wanted) in enumerate(zip(run(x, gain, dy), reference(x, gain, dy))):
        assert got.dtype == (gain.dtype if i == 2 else x.dtype)
        dtype = torch.float32 if got.dtype == torch.float32 else x.dtype
        assert_near(got, wanted, dtype, dy.abs().max().item() * (i > 0))


RUNS = {"operator": by_operator, "triton": by_triton}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size: tuple, name: str, dtype: torch.dtype):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    x, gain, dy = case(*size, dtype)
    check(RUNS[name], x, gain, dy)
    if dtype != torch.float32:
        check(RUNS[name], x, gain.to(dtype), dy)


@pytest.mark.parametrize("name", RUNS)
def test_layouts_and_scales(name: str):
    x, gain, dy = case(2, 7, (4, 3, 5))
    sliced = torch.full([2 * n + 1 for n in x.shape], torch.nan)[1::2, 1::2, 1::2, 1::2, 1::2]
    sliced.copy_(x)
    for layout in (sliced, x.contiguous(memory_format=torch.channels_last_3d), x[:, :, :1].expand(x.shape)):
        check(RUNS[name], layout, gain, dy.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2))
    for scale in (1e4, 1e15):
        check(RUNS[name], scale * x, gain, dy)
    y, _, _ = RUNS[name](1e-42 * x, gain, dy)
    assert_near(y, reference(1e-42 * x, gain, dy)[0], torch.float32, 1e-30)


def test_several_blocks_of_a_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    check(by_triton, *case(1, 100, (5, 7, 3)))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    check(by_triton, *case(3, 7, (9, 8, 5)))


@pytest.mark.parametrize("shape", [(0, 6, 2, 2, 2), (2, 6, 0, 3, 1)])
def test_no_voxels(shape: tuple[int, ...]):
    for run in RUNS.values():
        y, dx, dgain = run(torch.zeros(shape), torch.ones(6), torch.zeros(shape))
        assert y.shape == dx.shape == shape and torch.equal(dgain, torch.zeros(6))


@triton.jit
def _offsets_kernel(x, offsets, first, R, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    first = first.to(tl.int64)
    at, mask, _, _ = module._normalised(x - first * C, first, R, 1.0, C, BLOCK_R, BLOCK_C)
    to = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    tl.store(offsets + to, tl.where(mask, at, -1))


def test_offsets_beyond_32_bits():
    device = "cuda" if GPU else "cpu"
    offsets, first = torch.zeros(4, 8, dtype=torch.int64, device=device), 2**31 - 2
    _offsets_kernel[(1,)](torch.zeros(4, 7, device=device), offsets, first, 2**31 + 1, C=7, BLOCK_R=4, BLOCK_C=8)
    wanted = 7 * (first + torch.arange(4)[:, None]) + torch.arange(8)
    wanted[:, 7] = wanted[3] = -1
    assert torch.equal(offsets.cpu(), wanted)


def test_float64_is_the_reference():
    x, gain, dy = (t.double() for t in case(*SIZES[0]))
    for got, wanted in zip(by_operator(x, gain, dy), reference(x, gain, dy)):
        torch.testing.assert_close(got, wanted)


def test_no_second_derivative():
    x, gain, _ = case(*SIZES[3])
    with torch.enable_grad():
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(channel_norm(x, gain, EPS).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="channel_norm: only first derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("x", "gain", "error", "message"),
    [
        (torch.zeros(6, 2, 2, 2), torch.ones(6), ValueError, r"\[B, C, D, H, W\].*got \(6, 2, 2, 2\)"),
        (torch.zeros(1, 0, 2, 2, 2), torch.ones(0), ValueError, "C from 1 to 4096"),
        (torch.zeros(1, 6, 2, 2, 2), torch.ones(5), ValueError, r"gain must be \[6\], got \[5\]"),
        (torch.zeros(1, 6, 2, 2, 2).int(), torch.ones(6), TypeError, "got torch.int32 and torch.float32"),
        (torch.zeros(1, 6, 2, 2, 2), torch.ones(6).half(), TypeError, "got torch.float32 and torch.float16"),
    ],
)
def test_argument_errors(x: Tensor, gain: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=f"channel_norm: .*{message}"):
        channel_norm(x, gain, EPS)


def test_opcheck():
    x, gain, dy = case(*SIZES[0], torch.bfloat16)
    rows, grad = (t.movedim(1, 4).reshape(-1, 72) for t in (x, dy))
    torch.library.opcheck(torch.ops.meddiff._channel_norm_backward.default, (grad, rows, gain, EPS))
    with torch.enable_grad():
        leaves = (rows.clone().requires_grad_(), gain.clone().requires_grad_())
        torch.library.opcheck(torch.ops.meddiff._channel_norm.default, (*leaves, EPS))


def test_compile_fullgraph():
    def loss(x: Tensor, gain: Tensor) -> Tensor:
        return (channel_norm(x, gain, EPS) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, gain, _ = case(*SIZES[0])
    with torch.enable_grad():
        x, gain = x.requires_grad_(), gain.requires_grad_()
        for a, b in zip(*(torch.autograd.grad(function(x, gain), (x, gain)) for function in (compiled, loss))):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [*SIZES, (2, 576, (16, 16, 16))])
def test_cuda(size: tuple, dtype: torch.dtype):
    x, gain, dy = case(*size, dtype)
    check(lambda *t: tuple(r.cpu() for r in by_operator(*(a.cuda() for a in t))), x, gain, dy)
