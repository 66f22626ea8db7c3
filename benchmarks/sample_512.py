"""Sample a volume from noise, decode it jointly and write it: seconds, voxels per second and peak memory of each stage.

    python benchmarks/sample_512.py                        # 512³ on a GPU; 128³ and few steps without one
    python benchmarks/sample_512.py --model DIR --size 256 --steps 50 --out chest.nii.gz

Appends one line to benchmarks/results/<device>.jsonl and writes the NIfTI with a PNG of its middle planes beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from common import append_result, device_name, print_table

import meddiff
from meddiff.config import PRESETS
from meddiff.report import save_mid_planes
from meddiff.resources import StageMeter, default_device
from meddiff.sampling import SOLVERS

_ANATOMY = "ct_chest_abdomen"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=sorted(PRESETS), default="8x", help="random weights of this preset")
    source.add_argument("--model", help="model folder or Hugging Face repository, instead of random weights")
    parser.add_argument("--size", type=int, help="voxels along each axis (512 on a GPU, else 128)")
    parser.add_argument("--steps", type=int, help="denoising steps (30 on a GPU, else 10)")
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="such as cuda or cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path("out/sample_512.nii"), help="NIfTI file to write")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    device = arguments.device or default_device()
    on_gpu = device.type == "cuda"
    size = arguments.size or (512 if on_gpu else 128)
    steps = arguments.steps or (None if arguments.solver == "ddpm" else 30 if on_gpu else 10)
    if not on_gpu and arguments.size is None:
        print("no GPU: sampling 128³ in few steps; --size 512 asks for the full size")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    start = time.perf_counter()
    if arguments.model:
        model = meddiff.from_pretrained(arguments.model, device, dtype)
    else:
        model = meddiff.untrained(arguments.preset, arguments.seed, device, dtype)
        print(f"random weights (preset {arguments.preset}): the volume is noise, its times and memory are real")
    loading = time.perf_counter() - start
    print(f"{device_name(device)}, {str(model.dtype).removeprefix('torch.')}, model loaded in {loading:.1f} s\n")

    volume = model.generate(_ANATOMY, (size,) * 3, solver=arguments.solver, steps=steps, seed=arguments.seed)
    meter = StageMeter(device)
    with meter.stage("write"):
        volume.save(arguments.out)
    picture = arguments.out.with_name(arguments.out.name.split(".")[0] + ".png")
    save_mid_planes(volume, picture)

    stages = volume.record["stages"] + meter.to_dicts()
    seconds = sum(stage["seconds"] for stage in stages)
    peaks = [stage["peak_bytes"] for stage in stages if stage["peak_bytes"] is not None]
    stages.append({"name": "total", "seconds": seconds, "peak_bytes": max(peaks, default=None)})
    rows = [
        [
            stage["name"],
            f"{stage['seconds']:.2f}",
            f"{size**3 / stage['seconds']:.3g}",
            "unknown" if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 2**20:,.0f}",
        ]
        for stage in stages
    ]
    print_table(["stage", "seconds", "voxels/s", "peak MiB"], rows)

    kept = {key: volume.record[key] for key in ("solver", "steps", "eta", "seed", "dtype", "model")}
    source = "trained model" if arguments.model else arguments.preset
    line = {
        "benchmark": "sample_512",
        "case": f"sample, decode and write, {source}, {size}³, {kept['solver']} {kept['steps']} steps",
        "ms_p50": 1e3 * seconds,
        "peak_bytes": stages[-1]["peak_bytes"],
        "stages": stages,
    }
    results = append_result(line | kept, device)
    print(f"\nwrote {arguments.out}, {picture} and a line of {os.path.relpath(results)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, MemoryError, FloatingPointError) as error:
        sys.exit(f"sample_512: {error}")
