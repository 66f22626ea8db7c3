"""Solvers and numbers of steps: seconds per volume, and how far latent and decoded volume are from DDIM's in all steps.

    python benchmarks/bench_sampler.py --model demo --steps 5 10 20 50
    python benchmarks/bench_sampler.py --preset tiny --size 64 64 64

All begin with the same noise. DDIM (eta 0) and DPM-Solver++ follow the same path, whose best known end is DDIM's in
every step of the schedule: the reference. DDPM draws fresh noise, so that its distance is that of two samples of one
class: what a solver's distance has to be compared with. Latents are in the denoiser's range, about [-1, 1], volumes in
[-1, 1]. Distances are root mean squares, means over the seeds; PSNR takes a range of 2; seconds are medians.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from common import append_result, print_table
from torch import Tensor

import meddiff
from meddiff.config import PRESETS
from meddiff.resources import Stage, StageMeter, default_device
from meddiff.sampling import SOLVERS


def rmse(a: list[Tensor], b: list[Tensor]) -> float:
    return statistics.fmean((x.double() - y.double()).square().mean().sqrt().item() for x, y in zip(a, b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="demo", help="model folder or Hugging Face repository")
    source.add_argument("--preset", choices=sorted(PRESETS), help="random weights instead")
    parser.add_argument("--anatomy", help="by default the model's first")
    parser.add_argument("--size", type=int, nargs=3, metavar=("X", "Y", "Z"), help="voxels; by default the anatomy's")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument(
        "--solvers", nargs="+", choices=sorted(set(SOLVERS) - {"ddpm"}), default=["ddim", "dpmsolver++"]
    )
    parser.add_argument("--timestep-spacing", choices=("linspace", "leading", "trailing"), default="linspace")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no-ddpm", action="store_true", help="without DDPM's sample in all steps")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    if arguments.preset:
        model = meddiff.untrained(arguments.preset, 0, arguments.device, dtype)
    else:
        model = meddiff.from_pretrained(arguments.model, arguments.device, dtype)
    target = model.target(arguments.anatomy, arguments.size)
    size = model.latent_size(target.size)

    def run(
        solver: str, steps: int, timestep_spacing: str = "linspace"
    ) -> tuple[list[Tensor], list[Tensor], list[Stage]]:
        """Latents and volumes of the seeds, and what sampling and decoding each of them took."""
        latents, volumes, meter = [], [], StageMeter(arguments.device)
        options = {"solver": solver, "steps": steps, "eta": 0.0, "timestep_spacing": timestep_spacing, "t_end": 0}
        for seed in range(arguments.seeds):
            with meter.stage("sample"):
                latents.append(model.sample(size, target.class_index, seed=seed, **options))
            with meter.stage("decode"):
                volumes.append(model.decode_latent(latents[-1]))
        return latents, volumes, meter.stages

    for solver in arguments.solvers:  # warms up
        warm = model.sample(size, target.class_index, solver=solver, steps=2, eta=0.0, timestep_spacing="linspace")
    model.decode_latent(warm)
    every = model.schedule.timesteps
    runs = {("ddim", every): run("ddim", every)}
    if not arguments.no_ddpm:
        runs["ddpm", every] = run("ddpm", every)
    for solver in arguments.solvers:
        for steps in arguments.steps:
            if (solver, steps) not in runs:
                runs[solver, steps] = run(solver, steps, timestep_spacing=arguments.timestep_spacing)

    name = arguments.preset or (arguments.model if arguments.model == "demo" else "trained model")
    case = f"{name}, {target.anatomy} {'×'.join(map(str, target.size))}, {arguments.seeds} seeds"
    spacing = "" if arguments.timestep_spacing == "linspace" else f", {arguments.timestep_spacing}"
    wanted_latents, wanted_volumes, _ = runs["ddim", every]
    rows = []
    for (solver, steps), (latents, volumes, stages) in runs.items():
        sampling, decoding = (
            statistics.median(stage.seconds for stage in stages if stage.name == what) for what in ("sample", "decode")
        )
        line = {
            "benchmark": "sampler",
            "case": f"{case}, {solver}, {steps} steps{spacing}",
            "dtype": str(model.dtype).removeprefix("torch."),
            "of": case + spacing,
            "solver": solver,
            "steps": steps,
            "ms_p50": 1e3 * (sampling + decoding),
            "sample_seconds": sampling,
            "peak_bytes": max((stage.peak_bytes or 0) for stage in stages) or None,
            "model": {"trained": model.trained, "sha256": model.fingerprint},
        }
        if (solver, steps) != ("ddim", every):
            error = rmse(volumes, wanted_volumes)
            line |= {"latent_rmse": rmse(latents, wanted_latents), "volume_rmse": error}
            line["volume_psnr"] = 20 * math.log10(2 / error) if error else None
        append_result(line, arguments.device)
        distances = [
            f"{line[key]:.4g}" if line.get(key) else "" for key in ("latent_rmse", "volume_rmse", "volume_psnr")
        ]
        rows.append([f"{solver}, {steps}", f"{sampling:.2f}", f"{sampling + decoding:.2f}", *distances])
    print(f"{case}{spacing}; distances to ddim, {every}")
    print_table(["solver, steps", "s sampling", "s per volume", "latent RMSE", "volume RMSE", "volume PSNR, dB"], rows)


if __name__ == "__main__":
    main()
