"""Window attention, forward and backward, against its definition in float64: the CPU kernel on every instruction set
of this processor, and the Triton kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meddiff.kernels import window_attention as module
from meddiff.kernels.window_attention import window_attention, window_attention_ref

ISAS = torch.ops.meddiff.cpu_isas()
# largest error of a component over the largest component: rounding of float32 sums of up to 512 terms, or of the result
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GPU = torch.cuda.is_available()

# (B, windows along D, H, W, window, heads, head_dim): odd windows, heads and grids, the released sizes
CASES = [
    (2, (2, 1, 3), 2, 2, 9),
    (1, (1, 3, 2), 3, 3, 5),
    (1, (2, 1, 1), 4, 2, 9),
    (1, (1, 1, 1), 8, 1, 9),
    (3, (1, 1, 2), 1, 2, 4),
    (1, (1, 2, 1), 2, 1, 33),
    (1, (1, 1, 1), 5, 1, 64),
    (1, (1, 1, 2), 2, 4, 1),
]


def on_isa(isa: str) -> Callable:
    return lambda qkv, heads, window: torch.ops.meddiff._window_attention_isa(qkv, heads, window, isa)


def triton_forward(qkv: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    """The Triton kernel, for tensors of this machine's device."""
    out, lse = module._launch_forward(qkv.to("cuda") if GPU else qkv, heads, window)
    return out.cpu(), lse.cpu()


FORWARDS = {isa: on_isa(isa) for isa in ISAS} | {"triton": triton_forward}


def case(batch: int, grid: tuple[int, int, int], window: int, heads: int, head_dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *(n * window for n in grid), 3 * heads * head_dim, generator=generator)


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, least: float = 1e-30) -> None:
    """Relative to the largest component, or to `least` if that is more."""
    assert got.shape == wanted.shape and got.isfinite().all()
    error = (got.double() - wanted.double()).abs().max() / max(wanted.abs().max().item(), least)
    assert error <= TOLERANCE[dtype], f"{error:.1e}"


def check(forward: Callable, qkv: Tensor, heads: int, window: int) -> None:
    out, lse = forward(qkv, heads, window)
    wanted, wanted_lse = window_attention_ref(qkv.double(), heads, window)
    assert out.dtype == qkv.dtype and out.is_contiguous() and lse.dtype == torch.float32 and lse.is_contiguous()
    assert_near(out, wanted, qkv.dtype)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def reference_gradient(qkv: Tensor, grad: Tensor, heads: int, window: int) -> Tensor:
    with torch.enable_grad():
        leaf = qkv.double().requires_grad_()
        out, _ = window_attention_ref(leaf, heads, window)
        return torch.autograd.grad(out, leaf, grad.double())[0]


def check_backward(qkv: Tensor, grad: Tensor, heads: int, window: int) -> None:
    """Of the operator, of its CPU kernels on every instruction set, and of the Triton kernels."""
    wanted = reference_gradient(qkv, grad, heads, window)
    with torch.enable_grad():
        leaf = qkv.clone().requires_grad_()
        window_attention(leaf, heads, window).backward(grad)
    saved = (qkv, *torch.ops.meddiff._window_attention(qkv, heads, window))
    by_triton = module._launch_backward(*(x.cuda() if GPU else x for x in (grad, *saved)), heads, window)
    on_isas = [torch.ops.meddiff._window_attention_backward_isa(grad, *saved, heads, window, isa) for isa in ISAS]
    for got in (leaf.grad, by_triton.cpu(), *on_isas):
        assert got.dtype == qkv.dtype
        for i, part in enumerate(got.chunk(3, dim=4)):
            assert_near(part, wanted.chunk(3, dim=4)[i], qkv.dtype, 0.1 * wanted.abs().max().item())


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x with other strides."""
    holes = torch.full([2 * n + 1 for n in x.shape], torch.nan, dtype=x.dtype)[1::2, 1::2, 1::2, 1::2, 1::2]
    holes.copy_(x)
    return {
        "channels first": x.movedim(4, 1).contiguous().movedim(1, 4),
        "rows apart": torch.nn.functional.pad(x, (3, 7), value=torch.nan)[..., 3:-7],
        "sliced": holes,
        "permuted": x.permute(3, 4, 0, 2, 1).contiguous().permute(2, 4, 3, 0, 1),
        "expanded": x[:, :, :1].expand(x.shape),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("shape", CASES)
def test_forward(shape: tuple, name: str, dtype: torch.dtype):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    check(FORWARDS[name], case(*shape).to(dtype), *shape[3:1:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", CASES)
def test_backward(shape: tuple, dtype: torch.dtype):
    qkv = case(*shape).to(dtype)
    grad = case(*shape, seed=1).chunk(3, dim=4)[0].to(dtype)  # not contiguous
    check_backward(qkv, grad, *shape[3:1:-1])


@pytest.mark.parametrize("isa", ISAS)
def test_backward_on_the_cpu_in_bfloat16_and_at_the_released_size(isa: str):
    for shape in CASES:
        heads, window = shape[3:1:-1]
        qkv = case(*shape).bfloat16()
        grad = case(*shape, seed=1).chunk(3, dim=4)[0].bfloat16()
        saved = torch.ops.meddiff._window_attention(qkv, heads, window)
        got = torch.ops.meddiff._window_attention_backward_isa(grad, qkv, *saved, heads, window, isa)
        wanted = reference_gradient(qkv, grad, heads, window)
        assert_near(got, wanted, torch.bfloat16)


def test_backward_refuses_other_shapes():
    qkv = case(1, (1, 1, 1), 2, 2, 9)
    out, lse = torch.ops.meddiff._window_attention(qkv, 2, 2)
    backward = torch.ops.meddiff._window_attention_backward
    for grad, saved in ((out[..., :9], (out, lse)), (out.double(), (out, lse)), (out, (out, lse[:, :1]))):
        with pytest.raises(RuntimeError, match="_window_attention_backward: .* must be"):
            backward(grad, qkv, *saved, 2, 2)


@pytest.mark.parametrize("head_dim", range(1, 65))
def test_every_head_size_on_the_cpu(head_dim: int):
    for isa in ISAS:
        check(on_isa(isa), case(1, (1, 1, 1), 5, 1, head_dim), 1, 5)


@pytest.mark.parametrize("name", FORWARDS)
def test_layouts(name: str):
    for qkv in layouts(case(2, (1, 2, 3), 2, 2, 9)).values():
        check(FORWARDS[name], qkv, 2, 2)


def test_backward_of_layouts():
    x = case(2, (1, 2, 3), 2, 2, 9)
    grads = layouts(case(2, (1, 2, 3), 2, 2, 9, seed=1)[..., :18])
    for name, qkv in layouts(x).items():
        check_backward(qkv, grads[name], 2, 2)


@pytest.mark.parametrize("shape", [(0, 2, 2, 2, 54), (1, 0, 2, 2, 54), (1, 2, 2, 0, 54)])
def test_no_tokens(shape: tuple[int, ...]):
    qkv = torch.zeros(shape)
    for forward in (*FORWARDS.values(), window_attention_ref):
        out, lse = forward(qkv, 2, 2)
        assert out.shape == (*shape[:4], 18) and lse.shape == (shape[0], 2, *shape[1:4])
    with torch.enable_grad():
        window_attention(qkv.requires_grad_(), 2, 2).sum().backward()
    assert qkv.grad.shape == shape
    out, lse = window_attention_ref(qkv.detach(), 2, 2)
    assert module._launch_backward(out, qkv.detach(), out, lse, 2, 2).shape == shape


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("scale", [1e4, 1e2, 1e-20, 1e-42])
def test_extreme_scales(scale: float, name: str):
    qkv = case(1, (1, 2, 1), 3, 2, 9)
    qkv[..., 36:] *= scale
    check(FORWARDS[name], qkv, 2, 3)  # large and denormal values
    if scale < 1:
        qkv[..., :36] *= scale
        check(FORWARDS[name], qkv, 2, 3)
        return
    # Probabilities of 0 and 1 nearly everywhere: float32 scores are off by scale²·2⁻²², so near ties are excluded
    signs = torch.where(case(1, (1, 2, 1), 3, 2, 9, seed=2)[..., :18] > 0, scale, -scale)
    qkv[..., :18] = qkv[..., 18:36] = signs
    out, lse = FORWARDS[name](qkv, 2, 3)
    wanted, wanted_lse = window_attention_ref(qkv.double(), 2, 3)
    assert_near(out, wanted, torch.float32)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_scores_around_the_size_that_needs_a_maximum(name: str):
    """Up to 32 in units of log 2 the CPU kernel subtracts none; the tiles of queries here lie on both sides."""
    qkv = case(1, (1, 1, 2), 5, 1, 4)
    for largest in (20, 31.9, 32.1, 64, 500):
        q, k, v = (part.contiguous() for part in qkv.chunk(3, dim=4))
        q[..., :5, :] *= largest / math.log2(math.e) * 2 / (q.abs().sum(4).max() * k.abs().max())
        check(FORWARDS[name], torch.cat([q, k, v], dim=4), 1, 5)
        check(FORWARDS[name], torch.cat([q, k, v * 1e35], dim=4), 1, 5)


@pytest.mark.parametrize("name", FORWARDS)
def test_scores_that_rise_and_fall_along_the_window(name: str):
    """The running maximum changes in every block of keys, by more than float32's range of powers of 2."""
    for order in (1, -1):
        qkv = case(1, (1, 1, 1), 8, 1, 4)
        ramp = torch.linspace(-300, 300, 512).view(8, 8, 8, 1)[None] * order
        qkv[..., 0], qkv[..., 4:5] = 2, ramp
        out, lse = FORWARDS[name](qkv, 1, 8)
        wanted, wanted_lse = window_attention_ref(qkv.double(), 1, 8)
        # a score of 300, rounded twice, is off by 300·2⁻²³
        assert (out - wanted).abs().max() / wanted.abs().max() < 300 * 2**-23
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_equal_scores_give_the_mean(name: str):
    qkv = case(1, (1, 1, 2), 4, 1, 9)
    qkv[..., :9] = 0
    out, lse = FORWARDS[name](qkv, 1, 4)
    for first in (0, 4):
        mean = qkv[0, :, :, first : first + 4, 18:].double().mean((0, 1, 2))
        assert (out[0, :, :, first : first + 4] - mean).abs().max() < 1e-6
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_nan_stays_in_its_window_and_head(name: str):
    qkv = case(2, (2, 1, 2), 3, 2, 9)
    clean, _ = FORWARDS[name](qkv, 2, 3)
    qkv[1, 4, 1, 2, 18 + 9 + 3] = torch.nan  # in a key of head 1, in the second window along D and the first along W
    out, _ = FORWARDS[name](qkv, 2, 3)
    assert out[1, 3:, :, :3, 9:].isnan().all()
    out[1, 3:, :, :3, 9:] = clean[1, 3:, :, :3, 9:] = 0
    assert torch.equal(out, clean)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    """New tensors begin as NaN."""
    qkv = case(1, (2, 1, 2), 3, 2, 9)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    check(triton_forward, qkv, 2, 3)
    check_backward(qkv, case(1, (2, 1, 2), 3, 2, 9, seed=1)[..., :18], 2, 3)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for isa in ISAS:
            check(on_isa(isa), qkv, 2, 3)
    finally:
        torch.use_deterministic_algorithms(False)


def test_number_of_threads_does_not_matter():
    qkv = case(1, (2, 2, 2), 4, 8, 9)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(window_attention(qkv, 8, 4))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("axis", range(5))
def test_offsets_beyond_32_bits(axis: int):
    size = [2, 2, 4, 2, 3 * 8]
    strides = [0] * 5
    far = 2**31 // (size[axis] - 1) + 64
    near = 1
    for other in (a for a in reversed(range(5)) if a != axis):
        strides[other], near = near, near * size[other]
    strides[axis] = far
    memory = torch.empty(far * (size[axis] - 1) + near)  # 8 GiB of address space, of which a few pages are touched
    qkv = memory.as_strided(size, strides)
    qkv.copy_(case(2, (1, 2, 1), 2, 1, 8))
    for forward in FORWARDS.values():
        check(forward, qkv, 1, 2)
    if not GPU:
        check_backward(qkv, case(2, (1, 2, 1), 2, 1, 8, seed=1)[..., :8].contiguous(), 1, 2)


def test_one_window_knows_nothing_of_another():
    qkv = case(1, (2, 2, 2), 2, 2, 9)
    whole = window_attention(qkv, 2, 2)
    for d in (0, 2):
        for w in (0, 2):
            part = (slice(None), slice(d, d + 2), slice(2, 4), slice(w, w + 2))
            assert torch.equal(window_attention(qkv[part], 2, 2), whole[part])


def test_no_second_derivative():
    with torch.enable_grad():
        qkv = case(1, (1, 1, 1), 2, 1, 9).requires_grad_()
        (gradient,) = torch.autograd.grad(window_attention(qkv, 1, 2).square().sum(), qkv, create_graph=True)
        with pytest.raises(NotImplementedError, match="window_attention: only first derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("qkv", "heads", "window", "error", "message"),
    [
        (torch.zeros(2, 2, 2, 54), 2, 2, ValueError, r"\[B, D, H, W, 3·C\].*got \(2, 2, 2, 54\)"),
        (torch.zeros(1, 2, 3, 2, 54), 2, 2, ValueError, r"multiples of 2, got \(1, 2, 3, 2, 54\)"),
        (torch.zeros(1, 2, 2, 2, 56), 2, 2, ValueError, r"3·2·head_dim channels.*got 56"),
        (torch.zeros(1, 2, 2, 2, 0), 2, 2, ValueError, r"head_dim 1 to 64, got 0"),
        (torch.zeros(1, 2, 2, 2, 195), 1, 2, ValueError, r"head_dim 1 to 64, got 195"),
        (torch.zeros(1, 2, 2, 2, 54), 0, 2, ValueError, "heads and window must be positive, got 0 and 2"),
        (torch.zeros(1, 2, 2, 2, 54), 2, -1, ValueError, "heads and window must be positive, got 2 and -1"),
        (torch.zeros(1, 2, 2, 2, 54).double(), 2, 2, TypeError, "float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_argument_errors(qkv: Tensor, heads: int, window: int, error: type[Exception], message: str):
    with pytest.raises(error, match=f"window_attention: .*{message}"):
        window_attention(qkv, heads, window)
    with pytest.raises(RuntimeError, match="window_attention: "):  # the CPU kernel itself
        torch.ops.meddiff._window_attention(qkv, heads, window)


def test_instruction_sets():
    with pytest.raises(RuntimeError, match="_window_attention_isa: isa must be one of .* got sse9"):
        torch.ops.meddiff._window_attention_isa(torch.zeros(1, 1, 1, 1, 12), 1, 1, "sse9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype):
    ops = torch.ops.meddiff
    x = case(2, (1, 2, 3), 2, 2, 9).to(dtype)
    for qkv in (x, *layouts(x).values()):
        torch.library.opcheck(ops._window_attention.default, (qkv, 2, 2))
    with torch.enable_grad():
        torch.library.opcheck(ops._window_attention.default, (x.clone().requires_grad_(), 2, 2))
        torch.library.opcheck(ops.window_attention.default, (x.clone().requires_grad_(), 2, 2))
    out, lse = ops._window_attention(x, 2, 2)
    torch.library.opcheck(ops._window_attention_backward.default, (out, x, out, lse, 2, 2))


def test_compile_fullgraph():
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True)
    for shape in ((1, (1, 2, 1), 2, 2, 9), (2, (2, 1, 3), 2, 2, 9)):
        x = case(*shape)
        assert torch.equal(compiled(x, 2, 2), window_attention(x, 2, 2))


def test_compile_fullgraph_of_the_gradient():
    def loss(qkv: Tensor) -> Tensor:
        return (window_attention(2 * qkv, 2, 2) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = case(2, (2, 1, 3), 2, 2, 9)
    for layout in (x, x.movedim(4, 1).contiguous().movedim(1, 4)):
        with torch.enable_grad():
            ours, plain = layout.clone().requires_grad_(), layout.clone().requires_grad_()
            compiled(ours).backward()
            loss(plain).backward()
        torch.testing.assert_close(ours.grad, plain.grad)


def test_cuda_tensors_have_kernels():
    for op in ("_window_attention", "_window_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"meddiff::{op}", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*CASES, (2, (2, 3, 1), 8, 8, 9), (1, (4, 4, 4), 4, 8, 32)])
def test_cuda(shape: tuple, dtype: torch.dtype):
    heads, window = shape[3:1:-1]
    qkv = case(*shape).to(dtype)
    grad = case(*shape, seed=1).chunk(3, dim=4)[0].to(dtype)
    with torch.enable_grad():
        leaf = qkv.cuda().requires_grad_()
        out = window_attention(leaf, heads, window)
        out.backward(grad.cuda())
    assert_near(out.detach().cpu(), window_attention_ref(qkv.double(), heads, window)[0], dtype)
    assert_near(leaf.grad.cpu(), reference_gradient(qkv, grad, heads, window), dtype)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_cuda_beyond_32_bits():
    """2³¹ + 2²⁷ numbers in qkv, so many that the last windows begin past 2³¹."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 160, 256, 256, 216, device="cuda", dtype=torch.bfloat16)
    assert qkv[:, :152].numel() > 2**31
    with torch.enable_grad():
        leaf = qkv.requires_grad_()
        out = window_attention(leaf, 8, 8)
        out.backward(out.detach())
    for last in (slice(0, 8), slice(152, 160)):
        part = qkv.detach()[:, last, -8:, -8:].cpu()
        wanted, _ = window_attention_ref(part.double(), 8, 8)
        assert_near(out.detach()[:, last, -8:, -8:].cpu(), wanted, torch.bfloat16)
        gradient = reference_gradient(part, out.detach()[:, last, -8:, -8:].cpu(), 8, 8)
        assert_near(leaf.grad[:, last, -8:, -8:].cpu(), gradient, torch.bfloat16)
