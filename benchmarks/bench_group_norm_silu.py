"""GroupNorm, scale and shift, SiLU: forward, and forward with backward, against PyTorch's, eager and compiled.

python benchmarks/bench_group_norm_silu.py --channels 48 --size 128 --dtype bfloat16
python benchmarks/bench_group_norm_silu.py --channels 72 --size 64 --modulated --dtype bfloat16
python benchmarks/bench_group_norm_silu.py --batch 2 --channels 16 --groups 4 --size 64
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table
from torch import Tensor

from meddiff.kernels.group_norm_silu import group_norm_silu
from meddiff.resources import default_device

_EPS = 1e-5
# PyTorch's float32 statistics of 10⁸ numbers are off by some 1e-4, and bfloat16 is rounded between its operators
_AGREE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def _pytorch(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *modulation: Tensor) -> Tensor:
    h = F.group_norm(x, groups, weight, bias, eps)
    if modulation:
        scale, shift = (v[:, :, None, None, None] for v in modulation)
        h = torch.addcmul(shift, h, scale + 1)
    return F.silu(h, inplace=not h.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis")
    parser.add_argument("--modulated", action="store_true", help="with scale and shift")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device, dtype, channels = arguments.device, getattr(torch, arguments.dtype), arguments.channels

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    size = (arguments.batch, channels, *[arguments.size] * 3)
    x, dy = (draw(*size).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    parameters = [1 + 0.1 * draw(channels), 0.1 * draw(channels)]
    modulation = [0.3 * draw(*size[:2]) for _ in range(2 * arguments.modulated)]
    ways = {"meddiff": group_norm_silu, "eager": _pytorch, "compiled": torch.compile(_pytorch)}

    def forward(way) -> list[Tensor]:
        with torch.no_grad():
            return [way(x, arguments.groups, *parameters, _EPS, *modulation)]

    def forward_and_backward(way) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters, *modulation)]
        y = way(leaves[0], arguments.groups, *leaves[1:3], _EPS, *leaves[3:])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    rows = []
    for name, work, passes in (("forward", forward, 3), ("forward and backward", forward_and_backward, 8)):
        case = f"{name}, {arguments.batch}×{channels}×{arguments.size}³, {arguments.groups} groups"
        case += ", scale and shift" if arguments.modulated else ""
        line = {"benchmark": "group_norm_silu", "case": case, "dtype": arguments.dtype}
        wanted = work(group_norm_silu)
        for way, function in ways.items():
            figures = measure(lambda work=work, function=function: work(function), device, arguments.repeats)
            peak = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:.0f}"
            shown = difference = ""
            if way == "meddiff":
                line |= figures  # every pass reads or writes one tensor of x's size
                line["gb_per_second"] = passes * x.nbytes / figures["ms_p50"] / 1e6
                shown = f"{line['gb_per_second']:.1f} GB/s"
            else:
                worst = max(
                    ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
                    for a, b in zip(wanted, work(function))
                )
                ratio = figures["ms_p50"] / line["ms_p50"]
                if worst < _AGREE[dtype]:
                    line[f"x_{way}"] = ratio
                shown = f"{ratio:.2f}" if worst < _AGREE[dtype] else "not comparable"
                difference = f"{worst:.1e}"
            rows.append([f"{case}: {way}", f"{figures['ms_p50']:.2f}", peak, shown, difference])
        append_result(line, device)
    print_table([arguments.dtype, "ms p50", "peak MiB", "× meddiff", "difference"], rows)


if __name__ == "__main__":
    main()
