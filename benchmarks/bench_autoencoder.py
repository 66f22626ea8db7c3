"""Encode (patch by patch) and joint decode of a cubic volume at the released widths, random weights.

python benchmarks/bench_autoencoder.py --size 128 --dtype bfloat16
"""

from __future__ import annotations

import argparse

import torch
from common import append_result, measure, print_table

from meddiff.config import PRESETS
from meddiff.models import PatchVolumeAutoencoder
from meddiff.resources import default_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("8x", "4x"), default="8x")
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device, size = arguments.device, arguments.size

    torch.manual_seed(0)
    autoencoder = PatchVolumeAutoencoder(PRESETS[arguments.preset].autoencoder).eval()
    autoencoder.to(device, getattr(torch, arguments.dtype))
    n = size // autoencoder.config.downsample
    indices = torch.randint(autoencoder.config.n_codes, (1, n, n, n), device=device)
    volume = torch.rand(1, 1, size, size, size) * 2 - 1

    rows = []
    with torch.inference_mode():
        for stage, work in (
            ("encode", lambda: autoencoder.encode(volume)),
            ("joint decode", lambda: autoencoder.decode(indices)),
        ):
            figures = measure(work, device, arguments.repeats)
            line = {
                "benchmark": "autoencoder",
                "case": f"{stage}, {arguments.preset}, {size}³",
                "dtype": arguments.dtype,
            }
            append_result(line | figures | {"voxels_per_second": 1e3 * size**3 / figures["ms_p50"]}, device)
            spread = f"{figures['ms_p20']:.0f}–{figures['ms_p80']:.0f}"
            peak = "unknown" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:.0f}"
            rows.append([line["case"], arguments.dtype, f"{figures['ms_p50']:.0f}", spread, peak])
    print_table(["case", "dtype", "ms p50", "p20–p80", "peak MiB"], rows)


if __name__ == "__main__":
    main()
