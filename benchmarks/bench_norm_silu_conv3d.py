"""Convolutions of the joint decoder, one tile each: norm, SiLU, convolution, residual and statistics in one operator,
against the library's convolution with kernels of their own for what stands before and behind it.

On a GPU of compute capability 9.0 there are two kernels: the one that norm_silu_conv3d takes, on mma.sync, and the one
on wgmma, where that can serve the shape. A second table names the fastest way of each shape.

python benchmarks/bench_norm_silu_conv3d.py
python benchmarks/bench_norm_silu_conv3d.py --only 48-48 --size 64 --dtype float16

The peer is eager PyTorch and the same under torch.compile, both in channels-last memory with cuDNN's autotuning. No
GPU has run this yet: until one has, nothing says which of the ways is the faster one, and mma.sync stays the default.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table
from torch import Tensor

import meddiff  # noqa: F401  loads the operators
from meddiff.resources import default_device

# C, O, channels of the residual's 1³ convolution (0: added as it is, None: no residual), relative size, kernel
CASES = {
    "48-48": (48, 48, 0, 1, 3),
    "96-48": (96, 48, None, 1, 3),
    "48-48 with 1³ of 96": (48, 48, 96, 1, 3),
    "96-96": (96, 96, 0, 2, 3),
    "192-192": (192, 192, 0, 4, 3),
    "64-64": (64, 64, 0, 1, 3),
    "128-128": (128, 128, 0, 2, 3),
    "256-256": (256, 256, 0, 4, 3),
    "48-1": (48, 1, None, 1, 3),
    "up 96-48": (96, 48, None, 2, 4),
    "up 96-96": (96, 96, None, 2, 4),
    "up 192-192": (192, 192, None, 4, 4),
}
_AGREE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _peer(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None,
    residual_weight: Tensor | None, kernel: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    if kernel == 4:
        y = F.conv_transpose3d(x, weight, bias, stride=2, padding=1)
    else:
        y = F.silu(x * scale.to(x.dtype)[:, :, None, None, None] + shift.to(x.dtype)[:, :, None, None, None])
        y = F.conv3d(y, weight, bias, padding=1)
    if residual is not None:
        y = y + (residual if residual_weight is None else F.conv3d(residual, residual_weight))
    return y, *torch.var_mean(y.float(), (2, 3, 4), correction=0)


def _has_wgmma(c: int, o: int, kernel: int, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return kernel == 3 and dtype != torch.float32 and c % 8 == 0 and o % 8 == 0


def _run(
    name: str, size: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[list[list[str]], list[str]]:
    """The lines of a case, and that of its fastest way; its figures are appended to the results."""
    c, o, r, reduction, kernel = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        return tensor.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor

    n = size // reduction
    m = 2 * n if kernel == 4 else n
    x, bias = draw(1, c, n, n, n), draw(o)
    weight = draw(*((c, o) if kernel == 4 else (o, c)), *[kernel] * 3) / (c * 27) ** 0.5
    scale, shift = 1 + 0.2 * draw(1, c, dtype=torch.float32), draw(1, c, dtype=torch.float32)
    residual = None if r is None else draw(1, r or o, m, m, m)
    residual_weight = draw(o, r, 1, 1, 1) / r**0.5 if r else None
    out = draw(1, o, m, m, m)
    statistics = None if o == 1 else torch.empty(1, 2, o, device=device)
    operands = (x, scale, shift, weight, bias, residual, residual_weight, kernel)

    def ours(*_) -> tuple[Tensor]:
        if kernel == 4:
            torch.ops.meddiff.up_conv3d(x, weight, bias, [1] * 6, out, statistics)
        else:
            torch.ops.meddiff.norm_silu_conv3d(
                x, scale, shift, True, False, weight, bias, [1] * 6, residual, residual_weight, None, out, statistics
            )
        return (out,)

    def wgmma(*_) -> tuple[Tensor]:
        torch.ops.meddiff._norm_silu_conv3d_wgmma(
            x, scale, shift, True, False, weight, bias, [1] * 6, residual, residual_weight, None, out, statistics
        )
        return (out,)

    case = f"{name}, {m}³"
    line = {"benchmark": "norm_silu_conv3d", "case": case, "dtype": str(dtype).removeprefix("torch.")}
    flops = 2 * m**3 * o * (c * (8 if kernel == 4 else kernel**3) + (r or 0))
    wanted = ours()[0].float()
    ways = {"meddiff": ours, "eager": _peer, "compiled": torch.compile(_peer)}
    if _has_wgmma(c, o, kernel, dtype, device):
        ways["wgmma"] = wgmma
    rows, times = [], {}
    for way, function in ways.items():
        figures = measure(lambda function=function: function(*operands), device, repeats)
        shown = difference = ""
        if way == "meddiff":
            line |= figures
            line["tflop_per_second"] = flops / figures["ms_p50"] / 1e9
            times[way] = figures["ms_p50"]
            shown = f"{line['tflop_per_second']:.2f} TFLOP/s"
        else:
            worst = ((function(*operands)[0].float() - wanted).abs().max() / wanted.abs().max()).item()
            ratio = figures["ms_p50"] / line["ms_p50"]
            if worst < _AGREE[dtype]:
                line |= {"wgmma_ms_p50": figures["ms_p50"]} if way == "wgmma" else {f"x_{way}": ratio}
                times[way] = figures["ms_p50"]
            shown = f"{ratio:.2f}" if worst < _AGREE[dtype] else "not comparable"
            difference = f"{worst:.1e}"
        rows.append([f"{case}: {way}", f"{figures['ms_p50']:.3f}", shown, difference])
    line["fastest"] = min(times, key=times.get)
    append_result(line, device)
    return rows, [case, line["fastest"], f"{min(times.values()):.3f}", f"{times['meddiff']:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis at full resolution")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    rows, fastest = [], []
    for name in CASES:
        if arguments.only in name:
            dtype = getattr(torch, arguments.dtype)
            of_ways, of_case = _run(name, arguments.size, dtype, arguments.device, arguments.repeats)
            rows += of_ways
            fastest.append(of_case)
    print_table([arguments.dtype, "ms p50", "× meddiff", "difference"], rows)
    print_table([arguments.dtype, "fastest", "ms p50", "meddiff"], fastest)


if __name__ == "__main__":
    main()
