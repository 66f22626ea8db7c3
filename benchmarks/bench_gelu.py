"""GELU of a DiT block's hidden layer by its tanh approximation, in inference, against PyTorch's, eager and compiled.

On a GPU it is PyTorch's.

python benchmarks/bench_gelu.py --tokens 32 --channels 288
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table

from meddiff.kernels.gelu import gelu_
from meddiff.resources import default_device, default_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="along each axis")
    parser.add_argument("--channels", type=int, default=288)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)
    pytorch = partial(F.gelu, approximate="tanh")
    ways = {"meddiff": gelu_, "eager": pytorch, "compiled": torch.compile(pytorch)}
    shape = (1, *[arguments.tokens] * 3, arguments.channels)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    case, rows = f"tanh approximation, {arguments.tokens}³ tokens of {arguments.channels}", []
    line = {"benchmark": "gelu", "case": case, "dtype": str(dtype).removeprefix("torch.")}
    wanted = pytorch(x.double())
    for way, function in ways.items():
        same = ((function(x.clone()).double() - wanted).abs() <= 1e-6 + torch.finfo(dtype).eps * wanted.abs()).all()
        work = x.clone()  # of a result in place there is another one, still a number
        figures = measure(lambda function=function, work=work: function(work), device, arguments.repeats)
        if way == "meddiff":
            line |= figures | {"gb_per_second": 2 * x.nbytes / figures["ms_p50"] / 1e6}
        elif same:
            line[f"x_{way}"] = figures["ms_p50"] / line["ms_p50"]
        shown = f"{figures['ms_p50'] / line['ms_p50']:.2f}" if same else "another result"
        rows.append([f"{case}: {way}", f"{figures['ms_p50']:.2f}", shown])
    append_result(line, device)
    print_table([str(dtype), "ms p50", "× meddiff"], rows)


if __name__ == "__main__":
    main()
