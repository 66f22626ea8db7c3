"""The denoising loop: from noise to a latent in the denoiser's range."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meddiff.kernels.diffusion_step import COEFFICIENTS, diffusion_step
from meddiff.models.biflownet import BiFlowNet
from meddiff.progress import progress as bar
from meddiff.sampling.schedule import NoiseSchedule
from meddiff.sampling.solvers import SOLVERS

_B, _C_0, _C_EPS = (COEFFICIENTS.index(name) for name in ("b", "c_0", "c_eps"))
_RESOLUTION_UNIT = 64  # latent elements per unit of the resolution condition, for every downsampling factor


def solver_timesteps(schedule: NoiseSchedule, solver: str, steps: int | None = None) -> list[int]:
    """The timesteps that a solver visits, in order. `steps` None is 50 for ddim, 20 for dpmsolver++, all for ddpm.

    Raises ValueError for an unknown solver or a number of steps that it cannot take.
    """
    if solver not in SOLVERS:
        raise ValueError(f"sample: unknown solver {solver!r}; known are {sorted(SOLVERS)}")
    kind = SOLVERS[solver]
    return kind.timesteps(schedule.timesteps, kind.default_steps(schedule.timesteps) if steps is None else steps)


class NoiseSource:
    """Standard normal noise from one generator per sample.

    Drawn on the CPU, so that a seed gives the same sample whatever the device, the rest of the batch and other users of
    random numbers. Sample b of a batch has seed `seed + b`, unless a seed per sample is given.
    """

    def __init__(self, seed: int | Sequence[int], batch: int) -> None:
        seeds = [seed + b for b in range(batch)] if isinstance(seed, int) else list(seed)
        if len(seeds) != batch or any(not 0 <= s < 2**63 for s in seeds):
            raise ValueError(f"sample: seed must be one integer in [0, 2**63) or {batch} of them, got {seed!r}")
        self._generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]

    def draw(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Float32 [B, *shape]."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self._generators]).to(device)


@torch.inference_mode()
def sample_latent(
    denoiser: BiFlowNet,
    schedule: NoiseSchedule,
    noise: Tensor | Sequence[int],
    y: Tensor,
    *,
    solver: str = "ddim",
    steps: int | None = None,
    eta: float = 0.0,
    seed: int | Sequence[int] = 0,
    correct_x0: Callable[[Tensor, int], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample latents in the denoiser's range (scaled, about [-1, 1]).

    Args:
        denoiser: noise estimator; its device and dtype are used for the network, the latent itself stays float32.
        schedule: noise schedule.
        noise: the start, float [B, C, D, H, W], or the latent's size (D, H, W) to draw it from `seed`.
        y: classes, integer [B].
        solver: "ddim" (Song et al. 2021), "dpmsolver++" (2M, Lu et al. 2022) or "ddpm" (Ho et al. 2020).
        steps: denoising steps; None as in `solver_timesteps`.
        eta: DDIM's share of fresh noise, 0 (deterministic) to 1.
        seed: of the start and of the noise in between; sample b has `seed + b` unless one is given per sample.
        correct_x0: replaces each step's estimate of the clean latent, float32 [B, C, D, H, W] in [-1, 1], given with
            its timestep, by one of the same shape: data consistency. The step goes on with the noise that this implies.
        progress: show a progress bar.

    Returns:
        Float32 [B, C, D, H, W] on the denoiser's device.

    Raises:
        ValueError: for an unknown solver, or steps, eta, seed or shapes that do not fit.
        FloatingPointError: as soon as the estimate is not finite; the message names the step.
    """
    timesteps = solver_timesteps(schedule, solver, steps)
    if not 0 <= eta <= 1 or (eta and solver != "ddim"):
        raise ValueError(f"sample: eta must lie in [0, 1] and belongs to solver 'ddim', got eta={eta} with {solver!r}")
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(f"sample: y must be integer [B], got {y.dtype} {tuple(y.shape)}")
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < denoiser.config.num_classes:
        raise ValueError(f"sample: classes must lie in [0, {denoiser.config.num_classes}), got {y.tolist()}")

    batch, device = y.shape[0], denoiser.device
    source = NoiseSource(seed, batch)
    start = noise if isinstance(noise, Tensor) else source.draw((denoiser.config.channels, *noise), device)
    if start.ndim != 5 or start.shape[0] != batch:
        raise ValueError(
            f"sample: noise must be [{batch}, {denoiser.config.channels}, D, H, W], got {tuple(start.shape)}"
        )
    # a copy, in the layout of the network's estimates
    x = start.to(device, torch.float32, copy=True, memory_format=torch.channels_last_3d)
    y = y.to(device)
    resolution = torch.tensor(x.shape[2:], dtype=torch.float32, device=device) / _RESOLUTION_UNIT
    table = SOLVERS[solver].table(schedule, timesteps, eta).to(device, torch.float32)
    x0_prev = torch.zeros_like(x) if SOLVERS[solver].order > 1 or correct_x0 else None
    stochastic = solver == "ddpm" or eta > 0

    for i, step in enumerate(bar("sampling")(timesteps) if progress else timesteps):
        t = torch.full((batch,), step, device=device)
        estimate = denoiser(x, t, y, resolution)
        if not torch.isfinite(estimate).all():
            raise FloatingPointError(
                f"sample: the noise estimate is not finite at step {i + 1} of {len(timesteps)} (t = {step}); "
                "check the weights, or use dtype float32"
            )
        fresh = source.draw(x.shape[1:], device) if stochastic else None
        diffusion_step(x, estimate, table[i], fresh, x0_prev)
        if correct_x0:  # a step is linear in x0, which it leaves in x0_prev, and in the noise (x0 - a·x) / b
            corrected = correct_x0(x0_prev, step)
            x += (table[i, _C_0] + table[i, _C_EPS] / table[i, _B]) * (corrected - x0_prev)
            x0_prev.copy_(corrected)
    return x.contiguous()
