"""LayerNorm with modulation and gate with residual for the tokens of a volume, against PyTorch's passes.

python benchmarks/bench_adaln.py --tokens 32 --channels 72
"""

from __future__ import annotations

import argparse

import torch
from common import append_result, measure, print_table
from torch import Tensor

from meddiff.kernels.adaln import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    gate_residual_ref,
    layer_norm_modulate,
    layer_norm_modulate_ref,
)
from meddiff.resources import default_device, default_dtype

_EPS = 1e-6


def _both_ref(x: Tensor, gate: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = gate_residual_ref(x, gate, h)
    return r, layer_norm_modulate_ref(r, shift, scale, eps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="tokens along each axis")
    parser.add_argument("--channels", type=int, default=72)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, *[arguments.tokens] * 3, arguments.channels)
    x, h = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    modulation = torch.randn(arguments.batch, 6 * arguments.channels, generator=generator).to(device, dtype)
    gate, shift, scale = modulation.chunk(6, dim=1)[2:5]
    norm, gated, both = (x, shift, scale, _EPS), (x, gate, h), (x, gate, h, shift, scale, _EPS)
    # ours, PyTorch's, their arguments, tensors of x's size that are read or written
    cases = {
        "norm and modulation": (layer_norm_modulate, layer_norm_modulate_ref, norm, 2),
        "gate and residual": (gate_residual, gate_residual_ref, gated, 3),
        "both": (gate_residual_layer_norm_modulate, _both_ref, both, 4),
    }
    rows = []
    for name, (ours, reference, inputs, tensors) in cases.items():
        peers = {"eager": reference, "compiled": torch.compile(reference)}
        figures = measure(lambda ours=ours, inputs=inputs: ours(*inputs), device, arguments.repeats)
        volume = f"{arguments.batch}×{arguments.tokens}³ tokens of {arguments.channels}"
        line = {"benchmark": "adaln", "case": f"{name}, {volume}", "dtype": str(dtype).removeprefix("torch.")} | figures
        line["bytes_per_second"] = 1e3 * tensors * x.numel() * x.element_size() / figures["ms_p50"]
        ratios = []
        for peer_name, peer in peers.items():
            wanted, got = (
                results if isinstance(results, tuple) else (results,) for results in (peer(*inputs), ours(*inputs))
            )
            # PyTorch rounds between its passes
            tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            same = all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(got, wanted))
            other = measure(lambda peer=peer, inputs=inputs: peer(*inputs), device, arguments.repeats)
            ratio = other["ms_p50"] / figures["ms_p50"]
            if same:
                line[f"x_{peer_name}"] = ratio
            ratios.append(f"{ratio:.2f}" if same else "not comparable")
        append_result(line, device)
        peak = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:.0f}"
        rows.append([line["case"], f"{figures['ms_p50']:.3f}", f"{line['bytes_per_second'] / 1e9:.1f}", peak, *ratios])
    print_table([str(dtype), "ms p50", "GB/s", "peak MiB", "× eager", "× compiled"], rows)


if __name__ == "__main__":
    main()
