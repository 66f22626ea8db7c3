"""LayerNorm over the channels of each voxel, forward and backward, against PyTorch's, eager and compiled.

python benchmarks/bench_channel_norm.py --channels 288 --size 16
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table
from torch import Tensor

from meddiff.kernels.channel_norm import channel_norm
from meddiff.resources import default_device, default_dtype

_EPS = 1e-5


def _pytorch(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    rows = F.layer_norm(x.permute(0, 2, 3, 4, 1), gain.shape, gain, None, eps)
    return rows.permute(0, 4, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=288)
    parser.add_argument("--size", type=int, default=16, help="voxels along each axis")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.channels, *[arguments.size] * 3)
    x, dy = (
        torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        for _ in range(2)
    )
    gain = torch.rand(arguments.channels, generator=generator).to(device, dtype)
    ways = {"meddiff": channel_norm, "eager": _pytorch, "compiled": torch.compile(_pytorch)}

    def forward(way) -> list[Tensor]:
        with torch.no_grad():
            return [way(x, gain, _EPS)]

    def forward_and_backward(way) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, gain)]
        y = way(*leaves, _EPS)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    rows = []
    for name, work, passes in (("forward", forward, 2), ("forward and backward", forward_and_backward, 5)):
        case = f"{name}, {arguments.batch}×{arguments.channels}×{arguments.size}³"
        line = {"benchmark": "channel_norm", "case": case, "dtype": str(dtype).removeprefix("torch.")}
        wanted = work(channel_norm)
        for way, function in ways.items():
            figures = measure(lambda work=work, function=function: work(function), device, arguments.repeats)
            if way == "meddiff":
                line |= figures
                line["gb_per_second"] = passes * x.nbytes / figures["ms_p50"] / 1e6
                shown = f"{line['gb_per_second']:.1f} GB/s"
            else:
                tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
                same = all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(wanted, work(function)))
                ratio = figures["ms_p50"] / line["ms_p50"]
                if same:
                    line[f"x_{way}"] = ratio
                shown = f"{ratio:.2f}" if same else "not comparable"
            rows.append([f"{case}: {way}", f"{figures['ms_p50']:.2f}", shown])
        append_result(line, device)
    print_table([str(dtype), "ms p50", "× meddiff"], rows)


if __name__ == "__main__":
    main()
