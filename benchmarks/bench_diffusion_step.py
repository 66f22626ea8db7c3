"""One solver step on a latent, against PyTorch's passes.

python benchmarks/bench_diffusion_step.py --size 64
"""

from __future__ import annotations

import argparse

import torch
from common import append_result, measure, print_table
from torch import Tensor

from meddiff.kernels.diffusion_step import diffusion_step, diffusion_step_ref
from meddiff.resources import default_device, default_dtype
from meddiff.sampling import SOLVERS, NoiseSchedule, solver_timesteps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="latent elements along each axis")
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device, dtype = arguments.device, default_dtype(arguments.device)

    generator = torch.Generator().manual_seed(0)
    shape = (1, arguments.channels, *[arguments.size] * 3)
    layout = {"device": device, "memory_format": torch.channels_last_3d}
    x, fresh, previous = (torch.randn(shape, generator=generator).to(**layout) for _ in range(3))
    estimate = torch.randn(shape, generator=generator).to(dtype=dtype, **layout)
    schedule = NoiseSchedule()
    rows = []
    for solver, kind in SOLVERS.items():
        timesteps = solver_timesteps(schedule, solver)
        row = kind.table(schedule, timesteps, 0.0)[len(timesteps) // 2].to(device, torch.float32)
        noise, history = fresh if solver == "ddpm" else None, previous if kind.order > 1 else None

        def passes(reference, x: Tensor, row=row, noise=noise, history=history) -> tuple[Tensor, Tensor]:
            return reference(x, estimate.float(), row, noise, history)

        state, state_x0 = x.clone(), None if history is None else history.clone()
        wanted, _ = passes(diffusion_step_ref, x)
        diffusion_step(state, estimate, row, noise, state_x0)
        same = (state - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        figures = measure(
            lambda row=row, noise=noise, state=state, state_x0=state_x0: diffusion_step(
                state, estimate, row, noise, state_x0
            ),
            device,
            arguments.repeats,
        )
        moved = 2 * x.nbytes + estimate.nbytes + (noise is not None) * x.nbytes + 2 * (history is not None) * x.nbytes
        case = f"{solver} step, latent {arguments.channels}×{arguments.size}³"
        line = {"benchmark": "diffusion_step", "case": case, "dtype": "float32"} | figures
        line["bytes_per_second"] = 1e3 * moved / figures["ms_p50"]
        ratios = []
        for name, reference in {"eager": diffusion_step_ref, "compiled": torch.compile(diffusion_step_ref)}.items():
            other = measure(lambda reference=reference, p=passes: p(reference, x), device, arguments.repeats)
            ratio = other["ms_p50"] / figures["ms_p50"]
            if same:
                line[f"x_{name}"] = ratio
            ratios.append(f"{ratio:.2f}" if same else "not comparable")
        append_result(line, device)
        peak = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:.0f}"
        rows.append([case, f"{figures['ms_p50']:.3f}", f"{line['bytes_per_second'] / 1e9:.1f}", peak, *ratios])
    print_table([f"estimate {dtype}", "ms p50", "GB/s", "peak MiB", "× eager", "× compiled"], rows)


if __name__ == "__main__":
    main()
