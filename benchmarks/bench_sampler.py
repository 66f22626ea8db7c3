"""Solvers and numbers of steps: seconds, and how far latent and decoded volume are from those of all 1000 steps.

Distances are root mean squares, to the result of DDIM and to that of DDPM in every step of the schedule.

    python benchmarks/bench_sampler.py --model DIR --steps 5 10 20 50

All begin with the same noise. DDIM and DPM-Solver++ follow the same path, whose best known end is DDIM's in all steps;
DDPM draws fresh noise, so that its distance says how far apart two samples of one class are. Latents are in the
denoiser's range, about [-1, 1], volumes in [-1, 1]. Distances are means over the seeds, seconds their median, of
sampling alone.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import append_result, print_table
from torch import Tensor

import meddiff
from meddiff.resources import Stage, StageMeter, default_device
from meddiff.sampling import SOLVERS


def rms(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder or Hugging Face repository")
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
    model = meddiff.from_pretrained(arguments.model, arguments.device, dtype)
    target = model.target(arguments.anatomy, arguments.size)
    size = model.latent_size(target.size)

    def run(solver: str, steps: int, **options: str) -> tuple[list[Tensor], list[Tensor], list[Stage]]:
        """Latents and volumes of the seeds, and what sampling them took."""
        latents, meter = [], StageMeter(arguments.device)
        for seed in range(arguments.seeds):
            with meter.stage("sample"):
                latents.append(model.sample(size, target.class_index, solver=solver, steps=steps, seed=seed, **options))
        return latents, [model.decode_latent(latent) for latent in latents], meter.stages

    model.sample(size, target.class_index, steps=2)  # warms up
    every = model.schedule.timesteps
    runs = {("ddim", every): run("ddim", every)}
    if not arguments.no_ddpm:
        runs["ddpm", every] = run("ddpm", every)
    for solver in arguments.solvers:
        for steps in arguments.steps:
            if (solver, steps) not in runs:
                runs[solver, steps] = run(solver, steps, timestep_spacing=arguments.timestep_spacing)

    case = f"{target.anatomy} {'×'.join(map(str, target.size))}, {arguments.seeds} seeds"
    names = [name for name in ("ddim", "ddpm") if (name, every) in runs]
    rows = []
    for (solver, steps), (latents, volumes, stages) in runs.items():
        seconds = statistics.median(stage.seconds for stage in stages)
        line = {
            "benchmark": "sampler",
            "case": f"{case}, {solver}, {steps} steps",
            "dtype": str(model.dtype).removeprefix("torch."),
            "timestep_spacing": arguments.timestep_spacing,
            "ms_p50": 1e3 * seconds,
            "peak_bytes": max((stage.peak_bytes or 0) for stage in stages) or None,
            "model": {"trained": model.trained, "sha256": model.fingerprint},
        }
        row = [f"{solver}, {steps}", f"{seconds:.2f}"]
        for name in names:
            for what, ours, theirs in zip(("latent", "volume"), (latents, volumes), runs[name, every]):
                distance = sum(map(rms, ours, theirs)) / len(ours)
                line[f"{what}_rms_to_{name}"] = distance
                row.append(f"{distance:.4f}")
        append_result(line, arguments.device)
        rows.append(row)
    print(case)
    distances = [f"{what} to {name}, {every}" for name in names for what in ("latent", "volume")]
    print_table(["solver, steps", "seconds", *distances], rows)


if __name__ == "__main__":
    main()
