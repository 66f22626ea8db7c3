"""Attention among all voxels of a volume, as in the autoencoder's middle, against PyTorch's.

Where meddiff has no kernel of its own, it is PyTorch's.

python benchmarks/bench_volume_attention.py --tokens 32
"""

from __future__ import annotations

import argparse

import torch
from common import append_result, measure, print_table

from meddiff.kernels.volume_attention import volume_attention, volume_attention_ref
from meddiff.resources import default_device, default_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24, help="along each axis")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=32, help="channels of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device, heads, dim, tokens = arguments.device, arguments.heads, arguments.dim, arguments.tokens**3
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)

    qkv = torch.randn(1, tokens, 3 * heads * dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    case = f"{arguments.tokens}³ tokens, {heads} heads of {dim}"
    line, rows = {"benchmark": "volume_attention", "case": case, "dtype": str(dtype).removeprefix("torch.")}, []
    with torch.inference_mode():
        wanted = volume_attention_ref(qkv, heads)
        for way, function in {"meddiff": volume_attention, "eager": volume_attention_ref}.items():
            error = ((function(qkv, heads).float() - wanted.float()).norm() / wanted.float().norm()).item()
            if error > 2 * torch.finfo(dtype).eps:
                raise SystemExit(f"{case}: {way} is off by {error:.1e}")
            figures = measure(lambda function=function: function(qkv, heads), device, arguments.repeats)
            if way == "meddiff":
                line |= figures | {"tflop_per_second": 4 * tokens**2 * heads * dim / figures["ms_p50"] / 1e9}
            else:
                line[f"x_{way}"] = figures["ms_p50"] / line["ms_p50"]
            rows.append([f"{case}: {way}", f"{figures['ms_p50']:.1f}", f"{figures['ms_p50'] / line['ms_p50']:.2f}"])
    append_result(line, device)
    print_table([str(dtype), "ms p50", "× meddiff"], rows)


if __name__ == "__main__":
    main()
