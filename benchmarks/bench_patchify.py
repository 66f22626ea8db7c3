"""Volume to patches and back, against the same in PyTorch operations.

python benchmarks/bench_patchify.py --size 512 --dtype int16
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from common import append_result, measure, print_table
from torch import Tensor

from meddiff.kernels.patchify import patchify, stitch
from meddiff.resources import default_device

_WINDOW = (-1000.0, 1000.0)


def _normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = _WINDOW
    return x.float().sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1).to(dtype)


def _permuted(x: Tensor, p: int, dtype: torch.dtype) -> Tensor:
    cells = _normalised(x, dtype).unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, p))
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, x.shape[1], p, p, p)


def _sliced(x: Tensor, p: int, dtype: torch.dtype) -> Tensor:
    x = _normalised(x, dtype)
    corners = product(range(x.shape[0]), *(range(0, n, p) for n in x.shape[2:]))
    return torch.cat([x[b : b + 1, :, d : d + p, h : h + p, w : w + p] for b, d, h, w in corners])


def _put_back(patches: Tensor, n: int) -> Tensor:
    p = patches.shape[2]
    cells = patches.view(1, n // p, n // p, n // p, -1, p, p, p)
    return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(1, -1, n, n, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis, a multiple of the patch")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--dtype", choices=("int16", "uint8", "float32"), default="int16", help="of the volume")
    parser.add_argument(
        "--target", choices=("bfloat16", "float32", "float16"), default="bfloat16", help="of the patches"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device, n, p = arguments.device, arguments.size, arguments.patch
    source, target = getattr(torch, arguments.dtype), getattr(torch, arguments.target)

    values = torch.randint(0 if source == torch.uint8 else -1200, 250, (1, 1, n, n, n), dtype=torch.int16)
    x = values.to(device, source)
    patches = patchify(x, p, target, _WINDOW)
    jobs = {
        "patchify": {
            "meddiff": lambda: patchify(x, p, target, _WINDOW),
            "permute": lambda: _permuted(x, p, target),
            "slices": lambda: _sliced(x, p, target),
        },
        "stitch": {
            "meddiff": lambda: stitch(patches, (n, n, n), torch.float32),
            "permute": lambda: _put_back(patches, n).float(),
        },
    }
    traffic = {"patchify": n**3 * (source.itemsize + target.itemsize), "stitch": n**3 * (target.itemsize + 4)}
    rows = []
    for name, ways in jobs.items():
        wanted, case = ways["meddiff"](), f"{name}, {n}³ in patches of {p}³"
        figures = measure(ways["meddiff"], device, arguments.repeats)
        dtypes = (arguments.dtype, arguments.target) if name == "patchify" else (arguments.target, "float32")
        line = {"benchmark": "patchify", "case": case, "dtype": " to ".join(dtypes)} | figures
        line["bytes_per_second"] = 1e3 * traffic[name] / figures["ms_p50"]
        for way, work in ways.items():
            other = figures if way == "meddiff" else measure(work, device, arguments.repeats)
            same = torch.allclose(work().float(), wanted.float(), atol=1e-2 if target == torch.bfloat16 else 1e-3)
            ratio = other["ms_p50"] / figures["ms_p50"]
            if same and way != "meddiff":
                line[f"x_{way}"] = ratio
            peak = "unknown" if other["peak_bytes"] is None else f"{other['peak_bytes'] / 2**20:.0f}"
            speed = f"{traffic[name] / other['ms_p50'] / 1e6:.1f}"
            rows.append(
                [f"{case}: {way}", f"{other['ms_p50']:.2f}", speed, peak, f"{ratio:.1f}" if same else "differs"]
            )
        append_result(line, device)
    print_table(["", "ms p50", "GB/s", "peak MiB", "× meddiff"], rows)


if __name__ == "__main__":
    main()
