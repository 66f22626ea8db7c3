"""One solver step against its definition in float64: the CPU operator, and the Triton kernel in Triton's interpreter or
on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meddiff.kernels import diffusion_step as module
from meddiff.kernels.diffusion_step import COEFFICIENTS, diffusion_step, diffusion_step_ref

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# error over the sum of the terms' sizes: float32 arithmetic. Estimates are exact in every dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
SHAPES = [(2, 3, 4, 5, 6), (1, 8, 7, 9, 5), (3, 1), (module._BLOCK + 1,), (1, 2, 1, 1, 1)]
# noise and x0_prev: of DDIM, DDPM and DDIM with eta, DPM-Solver++, and both
TERMS = [(False, False), (True, False), (False, True), (True, True)]


def triton_step(
    x: Tensor, estimate: Tensor, coefficients: Tensor, noise: Tensor | None, x0_prev: Tensor | None
) -> None:
    """The Triton kernel, for tensors of this machine's device; changes x and x0_prev."""
    moved = [None if t is None else t.to(DEVICE) for t in (x, estimate, coefficients, noise, x0_prev)]
    module._launch(*moved)
    for target, result in ((x, moved[0]), (x0_prev, moved[4])):
        if target is not None:
            target.copy_(result)


STEPS = {"operator": diffusion_step, "triton": triton_step}


def case(shape: tuple[int, ...], noise: bool, history: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """x, estimate, coefficients, noise, x0_prev; about half of x0 lies beyond the clip."""
    generator = torch.Generator().manual_seed(0)
    x, estimate, fresh, x0_prev = (torch.randn(shape, generator=generator) for _ in range(4))
    coefficients = torch.tensor([1.7, -1.3, 0.4, 0.9, -0.3, 0.6, 0.2])
    return [x, estimate.to(dtype), coefficients, fresh.to(dtype) if noise else None, x0_prev if history else None]


def check(step: Callable, x, estimate, coefficients, noise, x0_prev, dtype: torch.dtype = torch.float32) -> None:
    """Runs the step, which changes x and x0_prev."""
    exact = [None if t is None else t.double() for t in (x, estimate, coefficients, noise, x0_prev)]
    wanted, x0 = diffusion_step_ref(*exact)
    sizes = (
        sum(t.abs() for t in exact if t is not None and t.shape == x.shape).clamp(min=1e-30) * coefficients.abs().max()
    )
    before = [None if t is None else t.clone() for t in (estimate, coefficients, noise)]
    step(x, estimate, coefficients, noise, x0_prev)
    assert ((x - wanted).abs() <= TOLERANCE[dtype] * sizes).all()
    if x0_prev is not None:
        assert ((x0_prev - x0).abs() <= TOLERANCE[dtype] * sizes).all()
        assert x0_prev.abs().max() <= 1 if x.numel() else True
    for tensor, kept in zip((estimate, coefficients, noise), before):
        assert kept is None or torch.equal(tensor, kept)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, shape: tuple[int, ...], terms: tuple[bool, bool], dtype: torch.dtype):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    check(STEPS[name], *case(shape, *terms, dtype), dtype)


def test_the_definition_is_that_of_the_docstring():
    x, estimate, noise, previous = torch.tensor([[0.5, 2.0], [0.25, -1.0], [1.5, 0.5], [0.5, -0.5]]).double()
    row = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0, 0.25, 4.0]).double()
    out, x0 = diffusion_step_ref(x, estimate, row, noise, previous)
    assert x0.tolist() == [0.75, 1.0]  # of 0.75 and 5
    assert out.tolist() == [0.25 + 2.25 - 1 + 0.0625 + 6, 1 + 3 + 1 - 0.25 + 2]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("column", range(len(COEFFICIENTS)))
def test_each_coefficient_has_its_term(column: int, name: str):
    x, estimate, coefficients, noise, x0_prev = case((2, 3, 5), True, True)
    kept = {"c_x": x, "c_prev": x0_prev, "c_eps": estimate, "c_n": noise}
    only = torch.zeros(7)
    only[column] = 1.5
    if column < 2:
        only[COEFFICIENTS.index("c_0")] = 1
    wanted = {name: 1.5 * tensor for name, tensor in kept.items()} | {
        "a": (1.5 * x).clamp(-1, 1),
        "b": (1.5 * estimate).clamp(-1, 1),
        "c_0": torch.zeros_like(x),
    }
    wanted = wanted[COEFFICIENTS[column]]
    STEPS[name](x, estimate, only, noise, x0_prev)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("name", STEPS)
def test_layouts(name: str):
    """x in any order of its axes; estimate and noise in any other."""
    for order in ((0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (4, 2, 0, 1, 3)):
        back = [order.index(axis) for axis in range(5)]
        x, estimate, coefficients, noise, x0_prev = case((2, 3, 4, 5, 2), True, True)
        x, x0_prev = (t.permute(order).contiguous().permute(back) for t in (x, x0_prev))
        strides = x.stride()
        holes = torch.full((2, 3, 4, 5, 4), torch.nan)[..., ::2]
        check(STEPS[name], x, holes.copy_(estimate), coefficients, noise, x0_prev)
        check(STEPS[name], x, estimate, coefficients, noise.mT.contiguous().mT, x0_prev)
        check(STEPS[name], x, estimate[:, :1].expand(x.shape), coefficients, noise[:1].expand(x.shape), x0_prev)
        assert x.stride() == strides


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", [(0, 8, 2, 2, 2), (2, 8, 0, 2, 2)])
def test_nothing_to_do(shape: tuple[int, ...], name: str):
    for terms in TERMS:
        check(STEPS[name], *case(shape, *terms))


@pytest.mark.parametrize("name", STEPS)
def test_extremes(name: str):
    """The released schedule's a is 2·10⁴ at its end: x0 is a difference of large numbers, or beyond the clip."""
    for scale in (1e4, 1e-20, 1e-42):
        x, estimate, coefficients, noise, x0_prev = case((2, 3, 5), True, True)
        check(STEPS[name], x * scale, estimate * scale, coefficients, noise, x0_prev)
    x, estimate, coefficients, noise, x0_prev = case((2, 3, 5), True, True)
    coefficients[:2] = torch.tensor([2e4, -2e4])
    check(STEPS[name], x, estimate, coefficients, noise, x0_prev)


@pytest.mark.parametrize("name", STEPS)
def test_nan_is_not_clipped_away(name: str):
    x, estimate, coefficients, _, x0_prev = case((2, 3, 5), False, True)
    clean, clean_x0 = x.clone(), x0_prev.clone()
    STEPS[name](clean, estimate, coefficients, None, clean_x0)
    estimate[1, 2, 3] = torch.nan
    STEPS[name](x, estimate, coefficients, None, x0_prev)
    assert x[1, 2, 3].isnan() and x0_prev[1, 2, 3].isnan()
    x[1, 2, 3], x0_prev[1, 2, 3] = clean[1, 2, 3], clean_x0[1, 2, 3]
    assert torch.equal(x, clean) and torch.equal(x0_prev, clean_x0)


@pytest.mark.parametrize("name", STEPS)
def test_the_first_step_ignores_what_x0_prev_holds(name: str):
    x, estimate, coefficients, _, x0_prev = case((2, 3, 5), False, True)
    coefficients[COEFFICIENTS.index("c_prev")] = 0
    wanted, wanted_x0 = diffusion_step_ref(x, estimate, coefficients)
    x0_prev.fill_(torch.nan)
    STEPS[name](x, estimate, coefficients, None, x0_prev)
    torch.testing.assert_close(x, wanted)
    torch.testing.assert_close(x0_prev, wanted_x0)


def test_the_estimate_may_be_x_itself():
    x, _, coefficients, _, _ = case((2, 3, 5), False, False)
    wanted, _ = diffusion_step_ref(x, x, coefficients)
    diffusion_step(x, x, coefficients)
    torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).double()}, TypeError, "x must be torch.float32, got torch.float64"),
        ({"estimate": torch.zeros(2, 3).double()}, TypeError, "estimate must be .*bfloat16.* got torch.float64"),
        ({"estimate": torch.zeros(3, 2)}, ValueError, r"estimate must be \(2, 3\) as x is, got \(3, 2\)"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"noise must be \(2, 3\) as x is, got \(2, 4\)"),
        ({"x0_prev": torch.zeros(2, 3).half()}, TypeError, "x0_prev must be torch.float32, got torch.float16"),
        ({"x0_prev": torch.zeros(3, 2).T}, ValueError, r"x0_prev must have x's strides \(3, 1\), got \(1, 2\)"),
        ({"x": torch.zeros(2, 6)[:, ::2]}, ValueError, r"x must have no gaps, got \(2, 3\) with strides \(6, 2\)"),
        ({"x": torch.zeros(2, 1).expand(2, 3)}, ValueError, "x must have no gaps"),
        ({"coefficients": torch.zeros(6)}, ValueError, r"coefficients must be contiguous \[7\], got \(6,\)"),
        ({"coefficients": torch.zeros(14)[::2]}, ValueError, r"coefficients .* with strides \(2,\)"),
        ({"coefficients": torch.zeros(7).double()}, TypeError, "coefficients must be torch.float32"),
        (
            {"coefficients": torch.zeros(7, device="meta")},
            ValueError,
            "coefficients must be on x's device cpu, got meta",
        ),
    ],
)
def test_argument_errors(changes: dict, error: type[Exception], message: str):
    arguments = {"x": torch.zeros(2, 3), "estimate": torch.zeros(2, 3), "coefficients": torch.zeros(7)} | changes
    with pytest.raises(error, match=f"diffusion_step: {message}"):
        diffusion_step(**arguments)


@pytest.mark.parametrize("terms", TERMS)
def test_opcheck(terms: tuple[bool, bool]):
    torch.library.opcheck(torch.ops.meddiff._diffusion_step.default, tuple(case((2, 3, 4), *terms)))


def test_compile_fullgraph():
    def two_steps(x: Tensor, estimate: Tensor, table: Tensor, noise: Tensor | None, x0_prev: Tensor | None) -> Tensor:
        diffusion_step(x, estimate, table[0], noise, x0_prev)
        diffusion_step(x, 0.5 * x, table[1], noise, x0_prev)
        return 2 * x

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    for terms in TERMS:
        ours, plain = case((2, 3, 4), *terms), case((2, 3, 4), *terms)
        for arguments in (ours, plain):
            arguments[2] = torch.stack([arguments[2], arguments[2].flip(0)])
        assert torch.equal(compiled(*ours), two_steps(*plain))
        assert torch.equal(ours[0], plain[0]) and (ours[4] is None or torch.equal(ours[4], plain[4]))


def test_cuda_tensors_have_a_kernel():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("meddiff::_diffusion_step", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 64, 64, 64)])
def test_cuda(shape: tuple[int, ...], terms: tuple[bool, bool], dtype: torch.dtype):
    check(diffusion_step, *(None if t is None else t.cuda() for t in case(shape, *terms, dtype)), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_one_captured_graph_takes_every_step():
    x, estimate, row, noise, x0_prev = (t.cuda() for t in case((2, 8, 8, 8, 8), True, True))
    start, start_x0 = x.clone(), x0_prev.clone()
    table = torch.stack([row, row.flip(0), 0.5 * row])
    diffusion_step(x, estimate, row, noise, x0_prev)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        diffusion_step(x, estimate, row, noise, x0_prev)
    x.copy_(start), x0_prev.copy_(start_x0)
    for coefficients in table:
        row.copy_(coefficients)
        graph.replay()
        diffusion_step(start, estimate, coefficients, noise, start_x0)
    assert torch.equal(x, start) and torch.equal(x0_prev, start_x0)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_cuda_beyond_32_bits():
    shape = (2, 8, 512, 512, 520)  # 2³¹ + 2²⁵ elements
    x = torch.randn(shape, device="cuda")
    estimate = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x0_prev = torch.zeros_like(x)
    row = case((1,), False, False)[2].cuda()
    assert x.numel() > 2**31
    last = (slice(-1, None), slice(-1, None), slice(-8, None))
    part = [x[last].clone(), estimate[last].clone(), row, None, x0_prev[last].clone()]
    diffusion_step(x, estimate, row, None, x0_prev)
    diffusion_step(*part)
    assert torch.equal(x[last], part[0]) and torch.equal(x0_prev[last], part[4])
