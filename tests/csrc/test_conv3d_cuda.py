"""csrc/norm_silu_conv3d.cu, its wgmma variant and csrc/up_conv3d.cu without a GPU, on an emulated device."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of rounding, relative
LARGE = 227 << 10  # bytes of shared memory


def compile_emulation(folder: Path, *flags: str) -> Path:
    program = folder / "conv3d"
    command = [CXX, "-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", *flags, str(HERE / "conv3d_emulated.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@dataclass
class Case:
    """One call; tensors that are not contiguous are views of a larger storage."""

    x: Tensor
    weight: Tensor
    pads: tuple[int, ...] = (1,) * 6
    transposed: bool = False
    silu: bool = False
    upsample: bool = False
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None
    out: Tensor | None = field(default=None)
    statistics: bool = True

    def padded(self) -> Tensor:
        """The padded tile in float64, norm and SiLU rounded to x's dtype as the kernels round them."""
        y = self.x.double()
        if self.scale is not None:
            y = y * self.scale[:, :, None, None, None].double() + self.shift[:, :, None, None, None].double()
        if self.silu:
            y = F.silu(y)
        if self.scale is not None or self.silu:
            y = y.to(self.x.dtype).double() if self.x.dtype != torch.float32 else y
        if self.upsample:
            y = F.interpolate(y, scale_factor=2, mode="nearest")
            if self.weight.shape[2] == 3:  # of a doubled halo plane one half is the halo
                cut = [1 - pad for pad in self.pads]
                d, h, w = y.shape[2:]
                y = y[:, :, cut[0] : d - cut[1], cut[2] : h - cut[3], cut[4] : w - cut[5]]
        d0, d1, h0, h1, w0, w1 = self.pads
        return F.pad(y, (w0, w1, h0, h1, d0, d1))

    def reference(self) -> Tensor:
        y, bias = self.padded(), None if self.bias is None else self.bias.double()
        if self.transposed:
            return F.conv_transpose3d(y, self.weight.double(), bias, stride=2, padding=3)
        y = F.conv3d(y, self.weight.double(), bias)
        if self.residual_weight is not None:
            bias = None if self.residual_bias is None else self.residual_bias.double()
            return y + F.conv3d(self.residual.double(), self.residual_weight.double(), bias)
        return y if self.residual is None else y + self.residual.double()


def channels_last(*shape: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0, cut: bool = False) -> Tensor:
    """Random, channels-last; with `cut` it is the inside of a larger tensor full of NaN."""
    b, c, d, h, w = shape
    grow = 3 if cut else 0
    whole = torch.full((b, d + grow, h + grow, w + grow, c), torch.nan, dtype=dtype)
    begin = 1 if cut else 0
    view = whole[:, begin : begin + d, begin : begin + h, begin : begin + w]
    view.copy_(mean + std * torch.randn(view.shape))
    return view.permute(0, 4, 1, 2, 3)


def draw(
    channels: int, outputs: int, size: tuple[int, int, int], dtype: torch.dtype, *, kernel: int = 3, batch: int = 1,
    pads: tuple[int, ...] = (1,) * 6, prologue: bool = True, upsample: bool = False, residual: int = 0,
    residual_conv: bool = False, cut: bool = False, transposed: bool = False, mean: float = 0.0, std: float = 1.0,
    statistics: bool = True,
) -> Case:  # fmt: skip
    torch.manual_seed(channels + outputs)
    shape = (channels, outputs, 4, 4, 4) if transposed else (outputs, channels, kernel, kernel, kernel)
    weight = (torch.randn(shape) / (channels * kernel**3) ** 0.5).to(dtype)
    case = Case(
        channels_last(batch, channels, *size, dtype=dtype, cut=cut), weight, pads, transposed, prologue, upsample,
        bias=(mean + 0.1 * torch.randn(outputs)).to(dtype), statistics=statistics,
    )  # fmt: skip
    if prologue:
        case.scale, case.shift = 1 + 0.2 * torch.randn(batch, channels), 0.5 * torch.randn(batch, channels)
    wanted = case.reference().shape
    if residual_conv:
        case.residual = channels_last(batch, residual, *wanted[2:], dtype=dtype, cut=cut)
        case.residual_weight = (torch.randn(outputs, residual, 1, 1, 1) / residual**0.5).to(dtype)
        case.residual_bias = torch.randn(outputs).to(dtype)
    elif residual:
        case.residual = channels_last(*wanted, dtype=dtype, cut=cut)
    case.out = channels_last(*wanted, dtype=dtype, std=0, mean=float("nan"), cut=cut)
    case.weight *= std
    return case


def emulate(program: Path, case: Case, shared: int = LARGE, wgmma: bool = False) -> tuple[Tensor, Tensor | None, str]:
    """out, statistics and the plan that was used."""
    views = [case.x, case.weight, case.residual, case.residual_weight, case.out]
    numbers = [shared, TYPES.index(case.x.dtype), wgmma, case.transposed, case.silu, case.upsample, *case.pads]
    parts = []
    for view in views:
        if view is None:
            numbers += [0] * 12
            continue
        memory = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
        parts.append(memory.view(torch.uint8).numpy().tobytes())
        numbers += [len(parts[-1]), view.storage_offset() * view.element_size(), *view.shape, *view.stride()]
    outputs = case.out.shape[1]
    statistics = torch.full((case.out.shape[0], 2, outputs), torch.nan) if case.statistics else None
    for tensor in (case.bias, case.residual_bias, case.scale, case.shift, statistics):
        parts.append(b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes())
        numbers.append(len(parts[-1]))
    data = program.parent / "input"
    data.write_bytes(struct.pack(f"{len(numbers)}q", *map(int, numbers)) + b"".join(parts))
    done = subprocess.run([program, data], capture_output=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr.decode()[-4000:]}"
    nbytes = case.out.untyped_storage().nbytes()
    whole = torch.frombuffer(bytearray(done.stdout[:nbytes]), dtype=case.out.dtype)
    view = whole.as_strided(case.out.shape, case.out.stride(), case.out.storage_offset())
    out = view.clone()
    view.fill_(torch.nan)
    assert whole.isnan().all(), "something was written outside of out"
    if statistics is not None:
        statistics = torch.frombuffer(bytearray(done.stdout[nbytes:]), dtype=torch.float32).view(statistics.shape)
    return out, statistics, done.stderr.decode()


def check(program: Path, case: Case, plan: str, shared: int = LARGE, wgmma: bool = False) -> None:
    out, statistics, used = emulate(program, case, shared, wgmma)
    assert plan in used
    wanted = case.reference()
    unit = HALF_UNIT[case.x.dtype]
    # The result is rounded once. Sums are float32; an activation in a thousand rounds the other way, because SiLU is
    # approximate, and each that does moves a sum of 200 products by some 0.14 units of their spread.
    spread = (wanted - wanted.mean()).square().mean().sqrt()
    error = (out.double() - wanted).abs()
    bound = 1.01 * unit * wanted.abs() + 0.3 * max(unit, 2.0**-16) * spread
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} times the bound"
    if statistics is None:
        return
    variance, mean = torch.var_mean(out.double(), (2, 3, 4), correction=0)
    m2 = variance * out[0, 0].numel()
    assert torch.allclose(statistics[:, 0].double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(statistics[:, 1].double(), m2, rtol=1e-4, atol=1e-9)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CXX is None:
        pytest.skip("no C++ compiler")
    return compile_emulation(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "plan", "shared"),
    [
        ({"channels": 16, "outputs": 16, "size": (3, 3, 5)}, "slots=0", LARGE),
        ({"channels": 16, "outputs": 48, "size": (2, 3, 18), "batch": 2, "cut": True}, "tiles=1x2", LARGE),
        ({"channels": 40, "outputs": 96, "size": (3, 3, 4), "pads": (0, 1, 1, 0, 0, 1)}, "warps=1x2", LARGE),
        ({"channels": 16, "outputs": 80, "size": (5, 2, 3), "prologue": False}, "columns=3 segments=2", LARGE),
        ({"channels": 8, "outputs": 16, "size": (1, 2, 3), "residual": 16, "cut": True}, "march", LARGE),
        ({"channels": 16, "outputs": 24, "size": (2, 2, 5), "residual": 40, "residual_conv": True, "batch": 2}, "march",
         LARGE),
        ({"channels": 16, "outputs": 16, "size": (3, 3, 3), "pads": (0, 0, 0, 1, 1, 0), "upsample": True}, "march",
         LARGE),
        ({"channels": 24, "outputs": 16, "size": (5, 3, 4), "kernel": 1, "pads": (0,) * 6}, "segments=2", LARGE),
        ({"channels": 40, "outputs": 16, "size": (2, 2, 3), "residual": 24, "residual_conv": True}, "slots=3 chunk=3",
         LARGE // 4),
        ({"channels": 80, "outputs": 16, "size": (2, 2, 3)}, "slots=2 chunk=3", LARGE // 6),
    ],
)  # fmt: skip
def test_march(program: Path, case: dict, plan: str, shared: int, dtype: torch.dtype):
    check(program, draw(dtype=dtype, **case), plan, shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "plan", "shared"),
    [
        ({"channels": 16, "outputs": 16, "size": (3, 3, 5)}, "slots=0 chunk=3 warps=4x1", LARGE),
        ({"channels": 16, "outputs": 48, "size": (2, 3, 18), "batch": 2, "cut": True}, "tiles=1x2", LARGE),
        ({"channels": 40, "outputs": 96, "size": (3, 10, 4), "pads": (0, 1, 1, 0, 0, 1)}, "warps=8x1 columns=2", LARGE),
        ({"channels": 16, "outputs": 80, "size": (5, 2, 3), "prologue": False}, "columns=3 segments=2", LARGE),
        ({"channels": 8, "outputs": 16, "size": (1, 2, 3), "residual": 16, "cut": True}, "slots=0", LARGE),
        ({"channels": 64, "outputs": 24, "size": (2, 2, 5), "residual": 40, "residual_conv": True, "batch": 2},
         "slots=0 chunk=4", LARGE),
        ({"channels": 16, "outputs": 16, "size": (3, 3, 3), "pads": (0, 0, 0, 1, 1, 0), "upsample": True}, "slots=0",
         LARGE),
        ({"channels": 64, "outputs": 48, "size": (1, 2, 3)}, "slots=4 chunk=4", LARGE * 3 // 5),
        ({"channels": 40, "outputs": 16, "size": (2, 2, 3), "residual": 24, "residual_conv": True}, "slots=4 chunk=3",
         LARGE // 3),
        ({"channels": 80, "outputs": 16, "size": (2, 2, 3)}, "slots=3 chunk=3", LARGE * 2 // 7),
    ],
)  # fmt: skip
def test_wgmma(program: Path, case: dict, plan: str, shared: int, dtype: torch.dtype):
    check(program, draw(dtype=dtype, **case), f"wgmma {plan}" if "slots" in plan else plan, shared, wgmma=True)


@pytest.mark.parametrize("wgmma", [False, True], ids=["mma.sync", "wgmma"])
def test_rows_beyond_the_tile(program: Path, wgmma: bool):
    """Several tiles along H and W, their last ones incomplete."""
    case = draw(8, 16, (1, 18, 17), torch.bfloat16, pads=(1, 1, 0, 0, 0, 1))
    check(program, case, "tiles=1x1", wgmma=wgmma)


def test_wgmma_leaves_other_calls_alone(program: Path):
    for case in (
        draw(8, 16, (2, 2, 3), torch.bfloat16, kernel=1, pads=(0,) * 6),
        draw(12, 16, (2, 3, 3), torch.bfloat16),
        draw(8, 8, (2, 3, 3), torch.float32),
        draw(8, 16, (1, 2, 3), torch.bfloat16, transposed=True, kernel=4, prologue=False),
    ):
        with pytest.raises(AssertionError, match="exit code 7"):
            emulate(program, case, wgmma=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "plan"),
    [
        ({"channels": 16, "outputs": 16, "size": (1, 2, 3)}, "warps=1x1"),
        ({"channels": 24, "outputs": 48, "size": (3, 3, 4), "pads": (0, 1, 1, 0, 0, 0), "batch": 2, "cut": True},
         "warps=1x3"),
        ({"channels": 8, "outputs": 32, "size": (3, 5, 18)}, "segments=2 tiles=1x2"),
    ],
)  # fmt: skip
def test_transposed(program: Path, case: dict, plan: str, dtype: torch.dtype):
    check(program, draw(dtype=dtype, transposed=True, kernel=4, prologue=False, **case), plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_project(program: Path, dtype: torch.dtype):
    case = draw(72, 1, (5, 10, 19), dtype, pads=(1, 1, 0, 1, 1, 0), batch=1, cut=True, statistics=False)
    check(program, case, "project")


@pytest.mark.parametrize(
    "case",
    [
        {"channels": 3, "outputs": 5, "size": (3, 4, 5), "residual": 5, "cut": True, "batch": 2},
        {"channels": 5, "outputs": 17, "size": (3, 5, 4), "pads": (0, 0, 1, 0, 0, 1), "residual": 4,
         "residual_conv": True},
        {"channels": 4, "outputs": 1, "size": (2, 3, 5), "pads": (1, 0, 0, 0, 0, 1), "upsample": True},
        {"channels": 8, "outputs": 8, "size": (6, 7, 8), "kernel": 1, "pads": (0,) * 6, "mean": 1000, "std": 0.1},
        {"channels": 3, "outputs": 9, "size": (3, 4, 3), "pads": (1, 0, 0, 1, 0, 0), "transposed": True, "kernel": 4,
         "prologue": False},
    ],
)  # fmt: skip
def test_direct(program: Path, case: dict):
    check(program, draw(dtype=torch.float32, **case), "direct")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_tensor_cores_cannot_read_goes_the_direct_way(program: Path, dtype: torch.dtype):
    check(program, draw(12, 16, (2, 3, 3), dtype), "direct")
    case = draw(16, 16, (2, 3, 3), dtype)
    case.x = case.x.contiguous()  # channels first
    check(program, case, "direct")


# two warps at least; those without streamed weights, whose barriers stand for the one that a test omits, are RESIDENT
RACES = [
    (lambda: draw(16, 16, (2, 3, 3), torch.bfloat16), "march slots=0", LARGE, False),
    (lambda: draw(24, 16, (2, 3, 3), torch.float16, residual=8, residual_conv=True), "march slots=3", LARGE // 5,
     False),
    (lambda: draw(16, 16, (2, 3, 3), torch.bfloat16), "wgmma slots=0", LARGE, True),
    (lambda: draw(24, 16, (1, 3, 3), torch.float16, residual=8, residual_conv=True), "wgmma slots=4", LARGE // 3, True),
    (lambda: draw(8, 48, (1, 9, 3), torch.bfloat16), "wgmma slots=3 chunk=3 warps=8x1", LARGE // 2, True),
    (lambda: draw(8, 32, (1, 2, 3), torch.bfloat16, transposed=True, kernel=4, prologue=False), "warps=1x2", LARGE,
     False),
    (lambda: draw(8, 1, (2, 3, 3), torch.bfloat16, statistics=False), "project", LARGE, False),
    (lambda: draw(3, 9, (2, 3, 3), torch.float32), "direct", LARGE, False),
]  # fmt: skip
RESIDENT = {"mma.sync": RACES[0], "wgmma": RACES[2]}


def test_no_data_races(tmp_path: Path):
    """Streamed and resident weights, every kind of item and both kinds of statistics."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    try:
        program = compile_emulation(tmp_path, "-fsanitize=thread")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no thread sanitizer")
    for case, plan, shared, wgmma in RACES:
        check(program, case(), plan, shared, wgmma)


@pytest.mark.parametrize("kernel", RESIDENT)
def test_a_missing_barrier_is_seen(tmp_path: Path, kernel: str):
    if CXX is None:
        pytest.skip("no C++ compiler")
    try:
        program = compile_emulation(tmp_path, "-fsanitize=thread", "-DMEDDIFF_OMIT_BARRIER")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no thread sanitizer")
    case, _, shared, wgmma = RESIDENT[kernel]
    with pytest.raises(AssertionError, match="data race"):
        emulate(program, case(), shared, wgmma)


def test_a_missing_proxy_fence_is_seen(tmp_path: Path):
    """wgmma reads what it finds without it: NaNs."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    program = compile_emulation(tmp_path, "-DMEDDIFF_OMIT_PROXY_FENCE")
    case, _, shared, wgmma = RESIDENT["wgmma"]
    out, _, _ = emulate(program, case(), shared, wgmma)
    assert out.isnan().all()


def test_no_access_out_of_bounds(tmp_path: Path):
    if CXX is None:
        pytest.skip("no C++ compiler")
    try:
        program = compile_emulation(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no address sanitizer")
    for case, plan, shared, wgmma in RACES:
        check(program, case(), plan, shared, wgmma)
    check(program, draw(8, 16, (2, 3, 17), torch.float16, residual=24, residual_conv=True), "tiles=1x2")
