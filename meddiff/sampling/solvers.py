"""Solvers: which timesteps each visits, and the coefficients of its steps in `meddiff.kernels.diffusion_step`.

A solver's table is [steps, 7], float64 on the CPU; the steps take it as float32. In all of them x0 is clipped to
[-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meddiff.kernels.diffusion_step import COEFFICIENTS
from meddiff.sampling.schedule import NoiseSchedule


def ddpm_timesteps(timesteps: int, steps: int, spacing: str) -> list[int]:
    """Every timestep, last first (Ho et al. 2020); the posterior holds between neighbours only. Of no use: spacing."""
    if steps != timesteps:
        raise ValueError(f"ddpm: takes all {timesteps} steps, got steps={steps}; choose solver 'ddim' for fewer")
    return list(range(timesteps - 1, -1, -1))


def ddim_timesteps(timesteps: int, steps: int, spacing: str) -> list[int]:
    """`steps` timesteps spread evenly from timesteps - 1 down to 0, as in the released model.

    "leading" goes down to 0 in whole strides and begins below the last timestep, "trailing" begins with the last one:
    these are the timesteps of diffusers' DDIMScheduler.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"ddim: steps must lie in [1, {timesteps}], got {steps}")
    if spacing == "leading":
        return [i * (timesteps // steps) for i in range(steps)][::-1]
    if spacing == "trailing":
        return _trailing(timesteps, steps)
    return [i * (timesteps - 1) // max(steps - 1, 1) for i in range(steps)][::-1]


def dpmsolver_timesteps(timesteps: int, steps: int, spacing: str) -> list[int]:
    """steps + 1 numbers spread evenly from timesteps - 1 down to 0 and rounded, without the 0.

    "leading" spreads them in whole strides from 0 on, "trailing" begins with the last one and ends a stride above 0.
    These are the timesteps of diffusers' DPMSolverMultistepScheduler.
    """
    if not 1 <= steps < timesteps:
        raise ValueError(f"dpmsolver++: steps must lie in [1, {timesteps - 1}], got {steps}")
    if spacing == "leading":
        return [i * (timesteps // (steps + 1)) for i in range(1, steps + 1)][::-1]
    if spacing == "trailing":
        return _trailing(timesteps, steps)
    return np.linspace(0, timesteps - 1, steps + 1).round().astype(int)[:0:-1].tolist()


def _trailing(timesteps: int, steps: int) -> list[int]:
    return (np.arange(timesteps, 0, -timesteps / steps).round().astype(int) - 1)[:steps].tolist()


def ddpm_table(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float, order: int = 2) -> Tensor:
    """x_{t-1} is drawn from the posterior at x0 (Ho et al. 2020, equation 7); no noise at t = 0.

    Of no use: eta and order.
    """
    t = torch.tensor(timesteps)
    signal, before = (schedule.signal(i) for i in (t, t - 1))
    beta = 1 - signal / before
    variance = (beta * (1 - before) / (1 - signal)).clamp(min=1e-20)
    return _table(
        signal,
        c_x=(1 - before) * (1 - beta).sqrt() / (1 - signal),
        c_0=beta * before.sqrt() / (1 - signal),
        c_n=torch.where(t > 0, variance.sqrt(), 0),
    )


def ddim_table(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float, order: int = 2) -> Tensor:
    """From each timestep to the next (Song et al. 2021, equation 12), as in the released model.

    That one deviates from the paper in its last step, which goes to timestep 0 and not to the clean latent (at t = 0 it
    therefore stays there); and beside the clipped x0 stands the network's own estimate, not the noise that the clipped
    x0 implies. diffusers' DDIMScheduler does the same with set_alpha_to_one=False and, as by default,
    use_clipped_model_output=False. Of no use: order.
    """
    signal, following = (schedule.signal(torch.tensor(t)) for t in (timesteps, [*timesteps[1:], 0]))
    sigma = eta * ((1 - following) / (1 - signal)).sqrt() * (1 - signal / following).sqrt()
    # never negative but by rounding, where eta = 1 and almost no signal is left at t
    direction = (1 - following - sigma**2).clamp(min=0).sqrt()
    return _table(signal, c_0=following.sqrt(), c_eps=direction, c_n=sigma)


def dpmsolver_table(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float, order: int = 2) -> Tensor:
    """DPM-Solver++ (2M) for x0 (Lu et al. 2022, algorithm 2), in λ = log(√ᾱ / √(1-ᾱ)); of no use: eta.

    The first step and the last, which ends at the clean latent, are of first order, and all of them with order 1. So
    does diffusers' DPMSolverMultistepScheduler by default (midpoint, final_sigmas_type="zero"), which does not clip x0.
    """
    signal = schedule.signal(torch.tensor(timesteps))
    following = torch.cat([signal[1:], signal.new_ones(1)])
    lambdas, targets = (0.5 * (s.log() - (1 - s).log()) for s in (signal, following))  # the last target is infinite
    h = targets - lambdas
    full = -following.sqrt() * torch.expm1(-h)
    extrapolated = torch.zeros_like(full)  # 1/(2r) of Lu et al.: the share of x0 - x0_prev
    if order > 1:
        extrapolated[1:-1] = h[1:-1] / (2 * h[:-2])
    return _table(
        signal,
        c_x=((1 - following) / (1 - signal)).sqrt(),
        c_0=full * (1 + extrapolated),
        c_prev=-full * extrapolated,
    )


def end_at_clean(table: Tensor) -> Tensor:
    """A solver's table whose last step goes to x0, the network's estimate of the clean latent, from wherever it is."""
    table = table.clone()
    table[-1, 2:] = 0
    table[-1, COEFFICIENTS.index("c_0")] = 1
    return table


def _table(signal: Tensor, **columns: Tensor) -> Tensor:
    """Columns that are not given are 0; a and b follow from ᾱ."""
    columns |= {"a": signal.rsqrt(), "b": -(1 / signal - 1).sqrt()}
    zero = torch.zeros_like(signal)
    return torch.stack([columns.get(name, zero) for name in COEFFICIENTS], dim=1)


class Solver(NamedTuple):
    timesteps: Callable[[int, int, str], list[int]]  # of the schedule's length, the number of steps and their spacing
    table: Callable[[NoiseSchedule, Sequence[int], float, int], Tensor]  # of the timesteps, eta and order
    default_steps: Callable[[int], int]  # of the schedule's length
    order: int = 1  # the highest; 2 needs the x0 of the step before


SOLVERS = {
    "ddim": Solver(ddim_timesteps, ddim_table, lambda longest: min(50, longest)),
    "ddpm": Solver(ddpm_timesteps, ddpm_table, lambda longest: longest),
    "dpmsolver++": Solver(dpmsolver_timesteps, dpmsolver_table, lambda longest: min(20, longest - 1), order=2),
}
