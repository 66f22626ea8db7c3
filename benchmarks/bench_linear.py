"""Products with a weight in inference, against PyTorch's, eager and compiled: layers of a DiT block, and few rows, as
of a condition or of a convolution in a U-Net's middle.

Where meddiff has no kernel of its own, it is PyTorch's with the bias added by oneDNN, or PyTorch's.

python benchmarks/bench_linear.py --only 4096x72
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table

from meddiff.kernels.linear import linear
from meddiff.resources import default_device, default_dtype

# rows × inputs → outputs
CASES = [(4096, 72, 216), (4096, 72, 288), (4096, 288, 72), (13824, 24, 96), (13824, 96, 24), (1, 576, 1152),
         (1, 96, 144), (8, 15552, 576), (64, 7776, 288)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)
    generator, table = torch.Generator().manual_seed(0), []
    for rows, inputs, outputs in CASES:
        case = f"{rows}x{inputs} to {outputs}"
        if arguments.only not in case:
            continue
        x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
        operands = [t.to(device, dtype) for t in (x, weight / inputs**0.5, bias)]
        ways = {"meddiff": linear, "eager": F.linear, "compiled": torch.compile(F.linear)}
        wanted = F.linear(*(t.double() for t in operands))
        line = {"benchmark": "linear", "case": case, "dtype": str(dtype).removeprefix("torch.")}
        with torch.inference_mode():
            for way, function in ways.items():
                error = ((function(*operands) - wanted).norm() / wanted.norm()).item()
                if error > torch.finfo(dtype).eps:
                    raise SystemExit(f"{case}: {way} is off by {error:.1e}")
                figures = measure(lambda function=function, t=operands: function(*t), device, arguments.repeats)
                if way == "meddiff":
                    line |= figures | {"tflop_per_second": 2 * x.numel() * outputs / figures["ms_p50"] / 1e9}
                else:
                    line[f"x_{way}"] = figures["ms_p50"] / line["ms_p50"]
                shown = [f"{1e3 * figures['ms_p50']:.0f}", f"{figures['ms_p50'] / line['ms_p50']:.2f}"]
                table.append([f"{case}: {way}", *shown])
        append_result(line, device)
    print_table([str(dtype), "µs p50", "× meddiff"], table)


if __name__ == "__main__":
    main()
