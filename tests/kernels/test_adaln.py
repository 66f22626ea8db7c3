"""Modulated LayerNorm and gated residual, forward and backward, against their definition in float64: the CPU kernel on
every instruction set of this processor, and the Triton kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meddiff.kernels import adaln as module
from meddiff.kernels.adaln import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    gate_residual_ref,
    layer_norm_modulate,
    layer_norm_modulate_ref,
)

EPS = 1e-6
ISAS = torch.ops.meddiff.cpu_isas()
# largest error of a component over the largest component: float32 arithmetic, or rounding of the result
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GPU = torch.cuda.is_available()
BWD_BLOCK = module._configuration(72, backward=True)["BLOCK_N"]

# (B, tokens along some axes …, C): odd counts, several runs of tokens per sample, the released width, one channel
SHAPES = [
    (2, 3, 2, 5, 72),
    (1, 7, 33),
    (3, 1, 1),
    (2, 2, 3, 24),
    (1, BWD_BLOCK * module._BLOCKS_PER_RUN + 3, 72),
    (2, 3, 300),
]


def isa_forward(isa: str) -> Callable:
    return lambda x, gate, h, shift, scale: torch.ops.meddiff._adaln_isa(x, gate, h, shift, scale, EPS, isa)


def triton_forward(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    """The Triton kernel, for tensors of this machine's device."""
    results = module._launch_forward(*(a.cuda() if GPU and a is not None else a for a in arguments), EPS)
    return tuple(result.cpu() for result in results)


FORWARDS = {isa: isa_forward(isa) for isa in ISAS} | {"triton": triton_forward}


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """x, h and the three parts of one [B, 6·C]: gate, shift, scale."""
    generator = torch.Generator().manual_seed(seed)
    x, h = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    modulation = (0.5 * torch.randn(shape[0], 6 * shape[-1], generator=generator)).to(dtype)
    gate, shift, scale = modulation.chunk(6, dim=1)[2:5]
    return {"x": x + 0.5, "gate": gate, "h": h, "shift": shift, "scale": scale}


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, factor: float = 1, least: float = 1e-30) -> None:
    """Relative to the largest number, or to `least` if that is more."""
    assert got.shape == wanted.shape and got.isfinite().all()
    if wanted.numel():
        error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=least)
        assert error <= factor * TOLERANCE[dtype], f"{error:.1e}"


def check_forward(forward: Callable, x: Tensor, gate: Tensor, h: Tensor, shift: Tensor, scale: Tensor) -> None:
    """Gate alone, norm alone, and both; y of both is that of the stored r."""
    tokens, added = x.flatten(1, -2), h.flatten(1, -2)
    r, y, statistics = forward(tokens, gate, added, shift, scale)
    alone, no_y, no_statistics = forward(tokens, gate, added, None, None)
    no_r, y_of_x, statistics_of_x = forward(tokens, None, None, shift, scale)
    assert torch.equal(r, alone) and no_y.numel() == no_statistics.numel() == no_r.numel() == 0
    assert r.dtype == y.dtype == x.dtype and r.is_contiguous() and y.is_contiguous()
    assert_near(r, gate_residual_ref(tokens.double(), gate.double(), added.double()), x.dtype)
    for source, modulated, (mean, rstd) in ((r, y, statistics), (tokens, y_of_x, statistics_of_x)):
        source = source.double()
        assert_near(modulated, layer_norm_modulate_ref(source, shift.double(), scale.double(), EPS), x.dtype)
        assert mean.dtype == torch.float32
        assert ((mean - source.mean(2)).abs() <= 1e-6 * source.abs().amax(2).clamp(min=1e-30)).all()
        wanted = (source.var(2, correction=0) + EPS).rsqrt()
        torch.testing.assert_close(rstd.double(), wanted, rtol=1e-5, atol=0)


def gradients(function: Callable, inputs: dict[str, Tensor], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        results = function(**leaves)
        torch.autograd.backward(results if isinstance(results, tuple) else (results,), grads)
    return {name: leaf.grad for name, leaf in leaves.items()}


def both_ref(x: Tensor, gate: Tensor, h: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r = gate_residual_ref(x, gate, h)
    return r, layer_norm_modulate_ref(r, shift, scale, EPS)


# function of the module and its definition, on named tensors
FUNCTIONS = {
    "norm": (lambda **t: layer_norm_modulate(**t, eps=EPS), lambda **t: layer_norm_modulate_ref(**t, eps=EPS)),
    "gate": (gate_residual, gate_residual_ref),
    "both": (lambda **t: gate_residual_layer_norm_modulate(**t, eps=EPS), both_ref),
}
NAMES = {"norm": ("x", "shift", "scale"), "gate": ("x", "gate", "h"), "both": ("x", "gate", "h", "shift", "scale")}


def check_backward(kind: str, tensors: dict[str, Tensor], grads: tuple[Tensor, ...]) -> None:
    inputs = {name: tensors[name] for name in NAMES[kind]}
    ours, reference = FUNCTIONS[kind]
    exact = gradients(reference, {n: t.double() for n, t in inputs.items()}, tuple(g.double() for g in grads))
    for name, got in gradients(ours, inputs, grads).items():
        assert got.dtype == inputs[name].dtype
        assert_near(got, exact[name], got.dtype, factor=4)


def triton_backward(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    results = module._launch_backward(*(a.cuda() if GPU and a is not None else a for a in arguments))
    return tuple(result.cpu() for result in results)


def check_triton_backward(tensors: dict[str, Tensor], dr: Tensor, dy: Tensor) -> None:
    """Against the CPU operator, which `check_backward` compares with autograd."""
    x, gate, h, shift, scale = tensors.values()
    tokens, added, dr, dy = (t.flatten(1, -2) for t in (x, h, dr, dy))
    r, _, statistics = torch.ops.meddiff._adaln(tokens, gate, added, shift, scale, EPS)
    _, _, of_x = torch.ops.meddiff._adaln(tokens, None, None, shift, scale, EPS)
    for arguments in (
        (dr, dy, r, gate, added, scale, statistics),
        (dr, None, r, gate, added, None, statistics.new_empty(0)),
        (None, dy, tokens, None, None, scale, of_x),
    ):
        wanted = torch.ops.meddiff._adaln_backward(*arguments)
        for got, exact in zip(triton_backward(*arguments), wanted, strict=True):
            assert got.dtype == exact.dtype
            assert_near(got, exact, got.dtype, factor=2)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x [B, D, H, W, C] with other strides."""
    holes = torch.full([2 * n + 1 for n in x.shape], torch.nan, dtype=x.dtype)[1::2, 1::2, 1::2, 1::2, 1::2]
    holes.copy_(x)
    return {
        "channels first": x.movedim(4, 1).contiguous().movedim(1, 4),
        "rows apart": torch.nn.functional.pad(x, (3, 7), value=torch.nan)[..., 3:-7],
        "sliced": holes,
        "permuted": x.permute(3, 4, 0, 2, 1).contiguous().permute(2, 4, 3, 0, 1),
        "expanded": x[:, :, :1].expand(x.shape),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple, name: str, dtype: torch.dtype):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    check_forward(FORWARDS[name], **case(shape, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple, dtype: torch.dtype):
    tensors, others = case(shape, dtype), case(shape, dtype, seed=1)
    check_backward("norm", tensors, (others["x"],))
    check_backward("gate", tensors, (others["h"],))
    if dtype == torch.float32:  # in others the stored r is not that of the definition in float64
        check_backward("both", tensors, (others["h"], others["x"]))
    if dtype != torch.bfloat16 or GPU:
        check_triton_backward(tensors, others["h"], others["x"])


@pytest.mark.parametrize("channels", [*range(1, 40), 64, 72, 127])
def test_every_width_on_the_cpu(channels: int):
    for isa in ISAS:
        for dtype in (torch.float32, torch.bfloat16):
            check_forward(FORWARDS[isa], **case((2, 3, channels), dtype))


def test_layouts():
    tensors, others = case((2, 2, 3, 4, 9)), case((2, 2, 3, 4, 9), seed=1)
    for name, x in layouts(tensors["x"]).items():
        h, grad = layouts(others["h"])[name], layouts(others["x"])[name]
        strided = tensors | {"x": x, "h": h}
        strided["scale"] = torch.stack([tensors["scale"], tensors["scale"]], 2)[:, :, 0]  # no unit stride
        for forward in FORWARDS.values():
            check_forward(forward, **strided)
        check_backward("both", strided, (grad, grad))
        check_triton_backward(strided, grad, h)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8)])
def test_no_tokens(shape: tuple[int, ...]):
    tensors = case(shape)
    for forward in FORWARDS.values():
        check_forward(forward, **tensors)
    for kind in FUNCTIONS:
        grads = (tensors["h"],) * (2 if kind == "both" else 1)
        check_backward(kind, tensors, grads)
    check_triton_backward(tensors, tensors["h"], tensors["x"])


@pytest.mark.parametrize("name", FORWARDS)
def test_extremes(name: str):
    tensors = case((2, 5, 72))
    for scale in (1e4, 1e-20, 1e-42):
        check_forward(FORWARDS[name], **tensors | {"x": tensors["x"] * scale, "h": tensors["h"] * scale})
    # a mean that is large against the spread: the variance must not be a difference of squares
    far = tensors["x"] + 1e4
    _, y, _ = FORWARDS[name](far, None, None, tensors["shift"], tensors["scale"])
    wanted = layer_norm_modulate_ref(far.double(), tensors["shift"].double(), tensors["scale"].double(), EPS)
    assert (y - wanted).abs().max() < 1e-2  # float32 knows numbers near 10⁴ to 10⁻³
    # constant tokens have no spread: the shift is what remains
    flat = torch.full((2, 5, 72), 3.0)
    _, y, (mean, rstd) = FORWARDS[name](flat, None, None, tensors["shift"], tensors["scale"])
    assert torch.equal(y, tensors["shift"][:, None].expand(2, 5, 72)) and torch.equal(mean, flat[:, :, 0])
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORWARDS)
def test_nan_and_infinity_stay_in_their_token(name: str, dtype: torch.dtype):
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    tensors = case((2, 4, 9), dtype)
    clean = FORWARDS[name](*tensors.values())
    tensors["x"][1, 2, 3], tensors["x"][0, 1, 0] = torch.nan, torch.inf
    r, y, _ = FORWARDS[name](*tensors.values())
    assert r[1, 2, 3].isnan() and r[0, 1, 0] == torch.inf and y[1, 2].isnan().all() and y[0, 1].isnan().all()
    kept = torch.tensor([[True, False, True, True], [True, True, False, True]])
    assert torch.equal(r[kept], clean[0][kept]) and torch.equal(y[kept], clean[1][kept])


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    """New tensors begin as NaN."""
    tensors, others = case((2, 3, 5, 9)), case((2, 3, 5, 9), seed=1)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    check_forward(triton_forward, **tensors)
    check_backward("both", tensors, (others["h"], others["x"]))
    check_triton_backward(tensors, others["h"], others["x"])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for isa in ISAS:
            check_forward(FORWARDS[isa], **tensors)
    finally:
        torch.use_deterministic_algorithms(False)


def test_number_of_threads_does_not_matter():
    tensors = case((2, 1001, 72))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(gate_residual_layer_norm_modulate(*tensors.values(), EPS))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("axis", range(3))
def test_offsets_beyond_32_bits(axis: int):
    size = (3, 5, 9)
    strides, near = [0] * 3, 1
    for other in (a for a in reversed(range(3)) if a != axis):
        strides[other], near = near, near * size[other]
    strides[axis] = 2**31 // (size[axis] - 1) + 64
    # 8 GiB of address space, of which a few pages are touched
    memory = torch.empty(strides[axis] * (size[axis] - 1) + near)
    far = memory.as_strided(size, strides)
    tensors = case(size)
    for name in ("x", "h"):
        far.copy_(tensors[name])
        for forward in FORWARDS.values():
            check_forward(forward, **tensors | {name: far})
    if not GPU:
        check_triton_backward(tensors | {"h": far}, case(size, seed=1)["h"], case(size, seed=2)["h"])
        far.copy_(case(size, seed=1)["h"])
        check_triton_backward(tensors, far, far)


def test_dtypes_may_differ_as_under_autocast():
    """x float32, the layer's output and the modulation bfloat16 or float16."""
    tensors, others = case((2, 3, 4, 72)), case((2, 3, 4, 72), seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        mixed = {name: t if name == "x" else t.to(dtype) for name, t in tensors.items()}
        r, y = gate_residual_layer_norm_modulate(**mixed, eps=EPS)
        wanted = both_ref(**{name: t.double() for name, t in mixed.items()})
        assert r.dtype == y.dtype == torch.float32
        assert_near(r, wanted[0], torch.float32)
        assert_near(y, wanted[1], torch.float32)
        check_backward("both", mixed, (others["h"], others["x"]))
    half = {name: t if name == "x" else t.half() for name, t in tensors.items()}
    check_triton_backward(half, others["h"], others["x"])


def test_a_result_that_is_not_used_has_no_gradient():
    tensors, others = case((2, 3, 9)), case((2, 3, 9), seed=1)
    for use in (0, 1):
        inputs = {name: tensors[name] for name in NAMES["both"]}
        got = gradients(lambda use=use, **t: FUNCTIONS["both"][0](**t)[use], inputs, (others["h"],))
        wanted = gradients(lambda use=use, **t: both_ref(**t)[use].double(), inputs, (others["h"].double(),))
        for name, gradient in got.items():
            exact = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)


def test_no_second_derivative():
    with torch.enable_grad():
        x = case((2, 3, 9))["x"].requires_grad_()
        shift = torch.zeros(2, 9)
        (gradient,) = torch.autograd.grad(
            layer_norm_modulate(x, shift, shift, EPS).square().sum(), x, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="adaln: only first derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 9)}, ValueError, r"x must be \[B, …, C\].*got \(2, 9\)"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, r"x must .*C from 1 to 4096, got \(2, 3, 0\)"),
        ({"x": torch.zeros(2, 3, 4097)}, ValueError, r"x must .*C from 1 to 4096, got \(2, 3, 4097\)"),
        ({"x": torch.zeros(2, 3, 9).double()}, TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
        ({"h": torch.zeros(2, 4, 9)}, ValueError, r"h must be \(2, 3, 9\) as x is, got \(2, 4, 9\)"),
        ({"h": torch.zeros(2, 3, 9).long()}, TypeError, "h must be float32.* got torch.int64"),
        ({"gate": torch.zeros(1, 9)}, ValueError, r"gate must be \[B, C\] = \(2, 9\), got \(1, 9\)"),
        ({"shift": torch.zeros(2, 8)}, ValueError, r"shift must be \[B, C\] = \(2, 9\), got \(2, 8\)"),
        ({"scale": torch.zeros(18)}, ValueError, r"scale must be \[B, C\] = \(2, 9\), got \(18,\)"),
        ({"scale": torch.zeros(2, 9, device="meta")}, ValueError, "scale must be on x's device cpu, got meta"),
    ],
)
def test_argument_errors(changes: dict, error: type[Exception], message: str):
    tensors = case((2, 3, 9)) | changes
    for kind, names in NAMES.items():
        if names != ("x",) and changes.keys() <= set(names):
            with pytest.raises(error, match=f"_.*: {message}"):
                FUNCTIONS[kind][0](**{name: tensors[name] for name in names})


def test_errors_of_the_cpu_kernel():
    x, v = torch.zeros(2, 3, 9), torch.zeros(2, 9)
    for arguments, message in (
        ((x[0], None, None, v, v, EPS), r"x must be \[B, N, C\]"),
        ((x, v, None, None, None, EPS), "gate and h go together"),
        ((x, None, None, v, None, EPS), "gate and h go together, and shift and scale"),
        ((x, v, x[:, :2], None, None, EPS), "h must be"),
        ((x, None, None, v, v[:1], EPS), r"scale must be \[B, C\] = \[2, 9\]"),
        ((x.double(), None, None, v, v, EPS), "x must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=f"_adaln: {message}"):
            torch.ops.meddiff._adaln(*arguments)
    with pytest.raises(RuntimeError, match="_adaln_isa: isa must be one of .* got sse9"):
        torch.ops.meddiff._adaln_isa(x, None, None, v, v, EPS, "sse9")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck(dtype: torch.dtype):
    x, gate, h, shift, scale = case((2, 3, 9), dtype).values()
    ops = torch.ops.meddiff
    for arguments in (
        (x, gate, h, shift, scale, EPS),
        (x, gate, h, None, None, 0.0),
        (x, None, None, shift, scale, EPS),
    ):
        torch.library.opcheck(ops._adaln.default, arguments)
        with torch.enable_grad():
            leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
            torch.library.opcheck(ops._adaln.default, tuple(leaves))
    r, y, statistics = ops._adaln(x, gate, h, shift, scale, EPS)
    torch.library.opcheck(ops._adaln_backward.default, (r, y, r, gate, h, scale, statistics))
    torch.library.opcheck(ops._adaln_backward.default, (r, None, r, gate, h, None, statistics.new_empty(0)))


def test_compile_fullgraph():
    compiled = torch.compile(gate_residual_layer_norm_modulate, fullgraph=True, dynamic=True)
    for shape in ((1, 2, 3, 24), (2, 5, 4, 24)):
        tensors = case(shape)
        for got, wanted in zip(compiled(**tensors, eps=EPS), gate_residual_layer_norm_modulate(**tensors, eps=EPS)):
            assert torch.equal(got, wanted)


def test_compile_fullgraph_of_the_gradient():
    def loss(**tensors: Tensor) -> Tensor:
        r, y = gate_residual_layer_norm_modulate(**tensors, eps=EPS)
        return gate_residual(
            r, tensors["gate"], layer_norm_modulate(2 * y, tensors["shift"], tensors["scale"], EPS)
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = case((2, 3, 4, 9))
    grads = (torch.tensor(1.0),)
    wanted = gradients(loss, tensors, grads)
    for name, gradient in gradients(compiled, tensors, grads).items():
        torch.testing.assert_close(gradient, wanted[name])


def test_cuda_tensors_have_kernels():
    for op in ("_adaln", "_adaln_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"meddiff::{op}", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 24, 32, 72), (1, 2, 4096)])
def test_cuda(shape: tuple, dtype: torch.dtype):
    tensors, others = case(shape, dtype), case(shape, dtype, seed=1)
    for kind, (ours, _) in FUNCTIONS.items():
        grads = {"norm": ("x",), "gate": ("h",), "both": ("h", "x")}[kind]
        grads = tuple(others[name] for name in grads)
        inputs = {name: tensors[name] for name in NAMES[kind]}
        on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
        results, wanted = ours(**on_gpu), ours(**inputs)  # the CPU's agree with the definition
        for got, exact in zip(*(r if kind == "both" else (r,) for r in (results, wanted))):
            assert_near(got.cpu(), exact, dtype)
        exact = gradients(ours, inputs, grads)
        # one channel is normalised to 0 whatever it is: its gradient is what fused operations leave of dy/√eps
        least = EPS**-0.5 if shape[-1] == 1 and "scale" in inputs else 1e-30
        for name, gradient in gradients(ours, on_gpu, tuple(g.cuda() for g in grads)).items():
            assert_near(gradient.cpu(), exact[name], dtype, factor=2, least=least if name in ("x", "h") else 1e-30)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_cuda_beyond_32_bits():
    """2³¹ + 2²⁴ · 8 numbers per tensor, so many that the last tokens begin past 2³¹."""
    shape = (1, 30_000_000, 72)
    assert 29_900_000 * 72 > 2**31
    tensors = case((1, 4096, 72), torch.bfloat16)
    _, gate, _, shift, scale = (t.cuda() for t in tensors.values())
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    h = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with torch.enable_grad():
        leaf = x.requires_grad_()
        r, y = gate_residual_layer_norm_modulate(leaf, gate, h, shift, scale, EPS)
        torch.autograd.backward((r, y), (h, h))
    last = slice(-4096, None)
    inputs = {"x": x.detach()[:, last].cpu(), "gate": gate.cpu(), "h": h[:, last].cpu()}
    inputs |= {"shift": shift.cpu(), "scale": scale.cpu()}
    wanted = gate_residual_layer_norm_modulate(**inputs, eps=EPS)
    for got, exact in zip((r, y), wanted):
        assert_near(got.detach()[:, last].cpu(), exact, torch.bfloat16)
    grads = gradients(FUNCTIONS["both"][0], inputs, (inputs["h"], inputs["h"]))
    assert_near(leaf.grad[:, last].cpu(), grads["x"], torch.bfloat16, factor=2)
