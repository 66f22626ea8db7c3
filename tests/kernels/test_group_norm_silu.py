"""GroupNorm with scale, shift and SiLU, forward and backward, against its definition in float64: the CPU kernels on
every instruction set of this processor, and the Triton kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from meddiff.kernels import group_norm_silu as module
from meddiff.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref

ISAS = torch.ops.meddiff.cpu_isas()
# largest error of a component over the largest component: rounding of float32 sums, or of the result
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
GPU = torch.cuda.is_available()
EPS = 1e-5
NAMES = ("x", "weight", "bias", "scale", "shift")

# (B, C, groups, (D, H, W), scale and shift, SiLU): released widths, odd ones, one voxel
CASES = [
    (2, 72, 24, (3, 5, 4), True, True),
    (1, 16, 4, (6, 7, 9), False, True),
    (1, 576, 24, (2, 2, 3), True, False),
    (2, 48, 24, (7, 5, 6), False, True),
    (1, 6, 3, (1, 1, 1), True, True),
    (3, 15, 5, (5, 4, 9), True, True),
    (1, 577, 1, (3, 2, 2), True, True),
    (2, 1, 1, (1, 7, 5), False, False),
]


def case(
    batch: int, channels: int, groups: int, size: tuple, modulated: bool, silu: bool, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor | None], Tensor, dict]:
    """x, weight, bias, scale, shift; the gradient of y; the other arguments."""
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = 0.5 + draw(batch, channels, *size)
    parameters = [1 + 0.1 * draw(channels), 0.1 * draw(channels)]
    scale_shift = 0.3 * draw(batch, 2 * channels)
    parameters += scale_shift.chunk(2, dim=1) if modulated else [None, None]
    arguments = {"groups": groups, "eps": EPS, "silu": silu}
    dy = draw(batch, channels, *size)
    return [x.to(dtype), *parameters], dy.to(dtype), arguments


def rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).reshape(x.shape[0], x[0, 0].numel() if len(x) else 0, x.shape[1])


def volume(y: Tensor, like: Tensor) -> Tensor:
    return y.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(4, 1)


def forward_by(op: Callable, extra: tuple = ()) -> Callable:
    def run(x, weight, bias, scale, shift, groups, eps, silu):
        y, stats = op(rows(x), groups, weight, bias, eps, scale, shift, silu, *extra)
        return volume(y, x), stats

    return run


def backward_by(op: Callable, extra: tuple = ()) -> Callable:
    def run(dy, stats, x, weight, bias, scale, shift, groups, eps, silu):
        dx, sums = op(rows(dy), rows(x), stats, groups, weight, bias, scale, shift, silu, *extra)
        return volume(dx, x), sums

    return run


def on_gpu(launch: Callable) -> Callable:
    def run(*arguments):
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
        return tuple(result.cpu() for result in launch(*moved))

    return run if GPU else launch


ops = torch.ops.meddiff
FORWARDS = {isa: forward_by(ops._group_norm_silu_isa, (isa,)) for isa in ISAS}
FORWARDS["triton"] = forward_by(on_gpu(module._launch_forward))
BACKWARDS = {isa: backward_by(ops._group_norm_silu_backward_isa, (isa,)) for isa in ISAS}
BACKWARDS["triton"] = backward_by(on_gpu(module._launch_backward))


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, least: float = 1e-30) -> None:
    """Relative to the largest component, or to `least` if that is more."""
    assert got.shape == wanted.shape and got.isfinite().all()
    error = (got.double() - wanted.double()).abs().max() / max(wanted.abs().max().item(), least)
    assert error <= tolerance, f"{error:.1e}"


def wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def check_forward(forward: Callable, tensors: list, arguments: dict, tolerance: float | None = None) -> None:
    y, stats = forward(*tensors, **arguments)
    x = tensors[0]
    assert y.dtype == x.dtype and stats.dtype == torch.float32
    numbers = x.double().reshape(x.shape[0], arguments["groups"], -1)
    variance, mean = torch.var_mean(numbers, dim=2, correction=0)
    # the mean in two parts is nearer to it than one float32 could be
    spread = (variance + arguments["eps"]).sqrt()
    assert ((stats[0].double() + stats[1].double() - mean) / spread).abs().max() < (tolerance or 1e-6)
    assert ((stats[2] * spread - 1).abs().max()) < 1e-6
    assert_near(y, group_norm_silu_ref(*arrange(wide(tensors), arguments)), tolerance or TOLERANCE[x.dtype])


def arrange(tensors: list, arguments: dict) -> tuple:
    x, weight, bias, scale, shift = tensors
    return x, arguments["groups"], weight, bias, arguments["eps"], scale, shift, arguments["silu"]


def gradients(function: Callable, tensors: list, dy: Tensor, arguments: dict) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        function(*arrange(leaves, arguments)).backward(dy)
    return [None if leaf is None else leaf.grad for leaf in leaves]


def check_gradients(got: list, tensors: list, dy: Tensor, arguments: dict, device: str = "cpu") -> None:
    wanted = gradients(group_norm_silu_ref, wide(tensors), dy.double(), arguments)
    for name, tensor, gradient, exact in zip(NAMES, tensors, got, wanted):
        if tensor is None:
            assert gradient is None
            continue
        assert gradient.dtype == tensor.dtype, name
        # of two numbers, normalised, nothing is left to differentiate: a gradient of rounding
        least = dy.abs().max().item() * (0.05 if tensors[0][0].numel() > 2 * arguments["groups"] else 1)
        tolerance = TOLERANCE[dy.dtype] if name == "x" else max(TOLERANCE[torch.float32], TOLERANCE[tensor.dtype])
        assert_near(gradient.cpu(), exact, tolerance, least)


def check_backward(name: str, tensors: list, dy: Tensor, arguments: dict) -> None:
    """dx, Σ dz and Σ dz·n of one implementation."""
    _, stats = FORWARDS[name](*tensors, **arguments)
    dx, sums = BACKWARDS[name](dy, stats, *tensors, **arguments)
    with torch.enable_grad():
        x, weight, bias, scale, shift = wide(tensors)
        x.requires_grad_()
        one, zero = (torch.full(x.shape[:2], value, dtype=torch.float64) for value in (1.0, 0.0))
        factor = one if scale is None else 1 + scale
        multiplier = (weight * factor).requires_grad_()
        added = (bias * factor + (zero if shift is None else shift)).requires_grad_()
        ones = torch.ones(x.shape[1], dtype=torch.float64)
        y = group_norm_silu_ref(
            x, arguments["groups"], ones, 0 * ones, arguments["eps"], multiplier - 1, added, arguments["silu"]
        )
        wanted = torch.autograd.grad(y, (added, multiplier, x), dy.double())
    assert dx.dtype == dy.dtype and sums.dtype == torch.float32
    for result, exact in zip(sums, wanted):
        assert_near(result, exact, TOLERANCE[torch.float32], dy.abs().max().item())
    assert_near(dx, wanted[2], TOLERANCE[dy.dtype], dy.abs().max().item() * 0.05)


def unless_interpreted(name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("shape", CASES)
def test_forward_and_backward(shape: tuple, name: str, dtype: torch.dtype):
    unless_interpreted(name, dtype)
    tensors, dy, arguments = case(*shape, dtype=dtype)
    check_forward(FORWARDS[name], tensors, arguments)
    check_backward(name, tensors, dy, arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("shape", CASES[:4])
def test_every_gradient(shape: tuple, same: bool, dtype: torch.dtype):
    """Parameters in x's dtype or, as under autocast, in float32."""
    tensors, dy, arguments = case(*shape, dtype=dtype)
    tensors = [None if t is None else t.to(dtype if same else t.dtype) for t in tensors]
    y = group_norm_silu(*arrange(tensors, arguments))
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_near(y, group_norm_silu_ref(*arrange(wide(tensors), arguments)), TOLERANCE[dtype])
    check_gradients(gradients(group_norm_silu, tensors, dy, arguments), tensors, dy, arguments)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x with other strides."""
    holes = torch.full([2 * n + 1 for n in x.shape], torch.nan)[1::2, 1::2, 1::2, 1::2, 1::2]
    holes.copy_(x)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last_3d),
        "sliced": holes,
        "permuted": x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
        "expanded": x[:, :, :1].expand(x.shape),
    }


def test_layouts():
    tensors, dy, arguments = case(*CASES[0])
    grads = layouts(dy)
    for name, x in layouts(tensors[0]).items():
        given = [x, *tensors[1:]]
        y = group_norm_silu(*arrange(given, arguments))
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert_near(y, group_norm_silu_ref(*arrange(wide(given), arguments)), TOLERANCE[torch.float32])
        check_gradients(gradients(group_norm_silu, given, grads[name], arguments), given, grads[name], arguments)


@pytest.mark.parametrize("shape", [(0, 6, 2, 2, 2), (2, 6, 0, 3, 1), (1, 6, 1, 1, 0)])
def test_no_voxels(shape: tuple[int, ...]):
    tensors, _, arguments = case(shape[0], 6, 3, shape[2:], True, True)
    y = group_norm_silu(*arrange(tensors, arguments))
    assert y.shape == shape
    for gradient, tensor in zip(gradients(group_norm_silu, tensors, y, arguments), tensors):
        assert torch.equal(gradient, torch.zeros_like(tensor))
    y, stats = FORWARDS["triton"](*tensors, **arguments)
    dx, sums = BACKWARDS["triton"](y, stats, *tensors, **arguments)
    assert y.shape == dx.shape == shape and torch.equal(sums, torch.zeros(2, shape[0], 6))


@pytest.mark.parametrize("name", FORWARDS)
def test_a_mean_far_from_zero_costs_no_digits(name: str):
    for offset in (1000, -3e4):
        tensors, dy, arguments = case(2, 15, 5, (11, 7, 9), True, True)
        tensors[0] = offset + 0.1 * tensors[0]
        check_forward(FORWARDS[name], tensors, arguments)
        check_backward(name, tensors, dy, arguments)
    # bfloat16 and float16 cannot hold such numbers; PyTorch's float32 has to fail the case
    assert (F.group_norm(*arrange(tensors, arguments)[:2]) - F.group_norm(tensors[0].double(), 5)).abs().max() > 1e-3


@pytest.mark.parametrize("name", FORWARDS)
def test_a_first_voxel_unlike_the_others(name: str):
    """Triton takes it off every number, so that this many digits of the others are lost."""
    tensors, _, arguments = case(1, 6, 3, (12, 11, 10), False, True)
    tensors[0][:, ::2, 0, 0, 0] = 1e3
    check_forward(FORWARDS[name], tensors, arguments, 1e-5 if name == "triton" else 1e-6)


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("scale", [1e4, 1e15, 1e-20, 1e-42])
def test_extreme_scales(scale: float, name: str):
    tensors, dy, arguments = case(1, 12, 4, (3, 4, 5), True, True)
    tensors[0] = scale * tensors[0]
    check_forward(FORWARDS[name], tensors, arguments)
    check_backward(name, tensors, 1e-3 * dy / max(scale, 1), arguments)


@pytest.mark.parametrize("name", FORWARDS)
def test_silu_far_from_zero(name: str):
    """Each y to a few units in its last place, down to where the exponential has no normal number."""
    for gain in (25, 25e4):
        tensors, _, arguments = case(1, 4, 2, (11, 12, 13), False, True)
        tensors[1] *= gain
        z, _ = FORWARDS[name](*tensors, **arguments | {"silu": False})
        y, stats = FORWARDS[name](*tensors, **arguments)
        assert z.min() < -80 and z.max() > 80
        wanted = F.silu(z.double())
        assert ((y - wanted).abs() <= 5e-7 * wanted.abs() + 2e-38 * z.abs()).all()
        dx, sums = BACKWARDS[name](torch.ones_like(y), stats, *tensors, **arguments)
        assert dx.isfinite().all() and sums.isfinite().all()


@pytest.mark.parametrize("name", FORWARDS)
def test_equal_numbers_give_the_bias(name: str):
    tensors, _, arguments = case(1, 9, 3, (5, 6, 7), False, False)
    tensors[0].fill_(1234.567)
    y, _ = FORWARDS[name](*tensors, **arguments)
    assert torch.equal(y, tensors[2][:, None, None, None].expand_as(y[0])[None])


@pytest.mark.parametrize("name", FORWARDS)
def test_nan_and_infinity_stay_in_their_group(name: str):
    tensors, _, arguments = case(2, 12, 4, (3, 4, 5), True, True)
    clean, _ = FORWARDS[name](*tensors, **arguments)
    for value in (torch.nan, torch.inf):
        spoiled = tensors[0].clone()
        spoiled[1, 4, 2, 1, 3] = value  # group 1
        y, _ = FORWARDS[name](spoiled, *tensors[1:], **arguments)
        assert y[1, 3:6].isnan().all()
        y[1, 3:6] = clean[1, 3:6]
        assert torch.equal(y, clean)


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_nan():
    """y = x: the group's mean is 0 and its variance 1."""
    half = torch.linspace(-2, 2, 4001)
    half = half / half.square().mean().sqrt()
    x = torch.cat([half, -half]).view(1, 1, 2, 1, -1)
    one, zero = torch.ones(1), torch.zeros(1)
    for isa in ISAS:
        y, _ = ops._group_norm_silu_isa(rows(x).bfloat16(), 1, one, zero, 0.0, None, None, False, isa)
        exact = F.group_norm(x.bfloat16().double(), 1, eps=0.0)
        nearest = exact.float().bfloat16()
        # z is off by a few 2⁻²⁴, so that near the middle of two bfloat16 numbers either is right
        differing = volume(y, x) != nearest
        assert differing.float().mean() < 1e-3
        y, _ = ops._group_norm_silu_isa(rows(x).bfloat16() * torch.nan, 1, one, zero, 0.0, None, None, True, isa)
        assert y.isnan().all()


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    """New tensors begin as NaN."""
    tensors, dy, arguments = case(*CASES[5])
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))
    check_forward(FORWARDS["triton"], tensors, arguments)
    check_backward("triton", tensors, dy, arguments)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for isa in ISAS:
            check_forward(FORWARDS[isa], tensors, arguments)
            check_backward(isa, tensors, dy, arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("isa", ISAS)
def test_several_chunks_of_the_cpu(isa: str):
    for channels in (13, 24):
        tensors, dy, arguments = case(2, channels, 1, (20, 24, 19), True, True)
        check_forward(FORWARDS[isa], tensors, arguments)
        check_backward(isa, tensors, dy, arguments)


def test_number_of_threads_does_not_matter():
    tensors, dy, arguments = case(1, 24, 4, (20, 24, 19), True, True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            y = group_norm_silu(*arrange(tensors, arguments))
            results.append([y, *gradients(group_norm_silu, tensors, dy, arguments)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@triton.jit
def _offsets_kernel(offsets, masks, N, C, S, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    b, _, first, c = module._place(N, C, S, ROWS, BLOCK_C)
    at, mask = module._tile(b, first, c, N, C, BLOCK_N)
    to = tl.program_id(0) * BLOCK_N * BLOCK_C + tl.arange(0, BLOCK_N)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    tl.store(offsets + to, at)
    tl.store(masks + to, mask.to(tl.int8))


def test_offsets_beyond_32_bits():
    """Of the Triton kernels: 3 splits of 2³⁰ voxels, 3 channels in two parts, 2 samples."""
    n, c, splits = 3 * 2**30 - 1, 3, 3
    device = "cuda" if GPU else "cpu"
    offsets = torch.full((2, splits, 2, 4, 2), -1, dtype=torch.int64, device=device)
    masks = torch.full(offsets.shape, -1, dtype=torch.int8, device=device)
    _offsets_kernel[(12,)](offsets, masks, n, c, splits, ROWS=2**30, BLOCK_N=4, BLOCK_C=2)
    for b in range(2):
        for split in range(splits):
            for part in range(2):
                for i in range(4):
                    for j in range(2):
                        at = (b * n + split * 2**30 + i) * c + 2 * part + j
                        assert offsets[b, split, part, i, j] == at
                        assert masks[b, split, part, i, j] == (2 * part + j < c)


def test_autocast_trains():
    """As in training: float32 parameters, bfloat16 activations."""
    tensors, dy, arguments = case(2, 16, 4, (5, 6, 7), False, True)
    x, weight, bias, *_ = tensors
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(16, 16, 3, padding=1)
    exact = conv.double()(x.double())
    wanted = gradients(group_norm_silu_ref, [exact, *wide(tensors[1:])], dy.double(), arguments)
    conv.float()
    with torch.enable_grad():
        weight, bias = (t.clone().requires_grad_() for t in (weight, bias))
        with torch.autocast("cpu", torch.bfloat16):
            y = group_norm_silu(conv(x), 4, weight, bias, EPS)
        assert y.dtype == torch.bfloat16
        (y.float() * dy).sum().backward()
    assert weight.grad.dtype == conv.weight.grad.dtype == torch.float32
    assert_near(weight.grad, wanted[1], 2e-2)
    assert_near(bias.grad, wanted[2], 2e-2)
    dweight = torch.nn.grad.conv3d_weight(x.double(), conv.weight.shape, wanted[0], padding=1)
    assert_near(conv.weight.grad, dweight, 2e-2)


def test_float64_is_the_reference():
    tensors, dy, arguments = case(*CASES[0])
    y = group_norm_silu(*arrange(wide(tensors), arguments))
    assert torch.equal(y, group_norm_silu_ref(*arrange(wide(tensors), arguments)))
    x = tensors[0].double()
    wanted = F.group_norm(x, 24, *wide(tensors[1:3]), EPS)
    wanted = F.silu(wanted * (1 + tensors[3].double()[:, :, None, None, None]) + tensors[4][:, :, None, None, None])
    torch.testing.assert_close(y, wanted)


def test_no_second_derivative():
    tensors, _, arguments = case(*CASES[4])
    with torch.enable_grad():
        tensors[0].requires_grad_()
        y = group_norm_silu(*arrange(tensors, arguments))
        (gradient,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="group_norm_silu: only first derivatives"):
            gradient.sum().backward()


ONES = torch.ones(6)
X = torch.zeros(2, 6, 2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], 3, ONES, ONES, EPS), ValueError, r"\[B, C, D, H, W\].*got \(6, 2, 2, 2\)"),
        ((X, 4, ONES, ONES, EPS), ValueError, r"multiple of 4 groups, got \(2, 6, 2, 2, 2\)"),
        ((X, 0, ONES, ONES, EPS), ValueError, "multiple of 0 groups"),
        ((X[:, :0], 1, ONES[:0], ONES[:0], EPS), ValueError, r"positive multiple.*got \(2, 0, 2, 2, 2\)"),
        ((X.int(), 3, ONES, ONES, EPS), TypeError, "got torch.int32"),
        ((X, 3, ONES[:5], ONES, EPS), ValueError, r"weight must be \[6\] on cpu, got \[5\]"),
        ((X, 3, ONES, ONES.to("meta"), EPS), ValueError, r"bias must be \[6\] on cpu, got \[6\] on meta"),
        ((X, 3, ONES.half(), ONES, EPS), TypeError, "weight must be float32 or .*float32, got torch.float16"),
        ((X, 3, ONES, ONES, EPS, ONES), ValueError, "scale and shift must both be given"),
        ((X, 3, ONES, ONES, EPS, X[:, :, 0, 0, 0], ONES), ValueError, r"shift must be \[2, 6\]"),
    ],
)
def test_argument_errors(arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"group_norm_silu: .*{message}"):
        group_norm_silu(*arguments)


def test_the_cpu_kernels_check_too():
    x = rows(X)
    stats = torch.zeros(3, 2, 3)
    for bad in (
        (x[0], 3, ONES, ONES, EPS, None, None, True),
        (x, 4, ONES, ONES, EPS, None, None, True),
        (x.double(), 3, ONES, ONES, EPS, None, None, True),
        (x, 3, ONES[:5], ONES, EPS, None, None, True),
        (x, 3, ONES, ONES, EPS, ONES, ONES, True),
        (x, 3, ONES, ONES, EPS, x[:, 0], None, True),
    ):
        with pytest.raises(RuntimeError, match="group_norm_silu: "):
            ops._group_norm_silu(*bad)
    for dy, of in ((x[:, :1], stats), (x.bfloat16(), stats), (x, stats[:2])):
        with pytest.raises(RuntimeError, match="group_norm_silu: "):
            ops._group_norm_silu_backward(dy, x, of, 3, ONES, ONES, None, None, True)
    with pytest.raises(RuntimeError, match="_group_norm_silu_isa: isa must be one of .* got sse9"):
        ops._group_norm_silu_isa(x, 3, ONES, ONES, EPS, None, None, True, "sse9")


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, CASES[0]), (torch.bfloat16, CASES[3])])
def test_opcheck(dtype: torch.dtype, shape: tuple):
    (x, *parameters), dy, arguments = case(*shape, dtype=dtype)
    inner = arrange([rows(x), *parameters], arguments)
    with torch.enable_grad():
        leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in inner]
        torch.library.opcheck(ops._group_norm_silu.default, tuple(leaves))
    _, stats = ops._group_norm_silu(*inner)
    backward = (rows(dy), rows(x), stats, arguments["groups"], *parameters, arguments["silu"])
    torch.library.opcheck(ops._group_norm_silu_backward.default, backward)
    torch.library.opcheck(ops.group_norm_silu.default, arrange([x, *parameters], arguments))


def test_compile_fullgraph():
    def loss(*arguments) -> Tensor:
        return (group_norm_silu(*arguments) ** 2).sum(dim=(2, 3, 4))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors, _, arguments = case(*CASES[0])
    for x in (tensors[0], tensors[0].contiguous(memory_format=torch.channels_last_3d)):
        given = [x, *tensors[1:]]
        dy = torch.ones(x.shape[:2])
        ours, plain = (gradients(function, given, dy, arguments) for function in (compiled, loss))
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a, b)


def test_cuda_tensors_have_kernels():
    for op in ("_group_norm_silu", "_group_norm_silu_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"meddiff::{op}", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [*CASES, (2, 72, 24, (32, 32, 32), True, True), (1, 48, 24, (63, 65, 67), False, True)]
)
def test_cuda(shape: tuple, dtype: torch.dtype):
    tensors, dy, arguments = case(*shape, dtype=dtype)
    there = [None if t is None else t.cuda() for t in tensors]
    y = group_norm_silu(*arrange(there, arguments))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_near(y.cpu(), group_norm_silu_ref(*arrange(wide(tensors), arguments)), TOLERANCE[dtype])
    check_gradients(gradients(group_norm_silu, there, dy.cuda(), arguments), tensors, dy, arguments)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_cuda_beyond_32_bits():
    """2³¹ + 2²⁷ numbers; all but the first planes are 1, and 3 in the last channel."""
    x = torch.zeros(1, 8, 2**12, 2**12, 17, dtype=torch.bfloat16, device="cuda").movedim(4, 1)
    assert x.numel() > 2**31
    x[:, :, 4:] = 1
    x[:, 16] *= 3
    weight, bias = torch.ones(17, device="cuda"), torch.zeros(17, device="cuda")
    with torch.enable_grad():
        y = group_norm_silu(x.requires_grad_(), 17, weight, bias, 0.0, None, None, False)
        assert_near(y.detach()[0, :, ::4, 4095, 4095].cpu(), torch.tensor([[-1.0, 1]] * 17), TOLERANCE[torch.bfloat16])
        dy = torch.zeros_like(y)
        dy[0, 16, 7, 4095, 4095] = 1
        y.backward(dy)
    # σ is 3/2, and its mean over 2²⁷ numbers takes nothing off that gradient
    assert x.grad[0, 16, 7, 4095, 4095].item() == pytest.approx(2 / 3, rel=5e-3)
    assert x.grad[0, :16].abs().max() == 0
