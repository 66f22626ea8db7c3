"""One step of each solver. Latents and noise are float32 [B, C, D, H, W], timesteps integer [B]."""

from __future__ import annotations

from torch import Tensor

from meddiff.sampling.schedule import NoiseSchedule, _at


def ddpm_timesteps(timesteps: int, steps: int) -> list[int]:
    """Every timestep, last first (Ho et al. 2020); the posterior holds between neighbours only."""
    if steps != timesteps:
        raise ValueError(f"ddpm: takes all {timesteps} steps, got steps={steps}; choose solver 'ddim' for fewer")
    return list(range(timesteps - 1, -1, -1))


def ddim_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps spread evenly from timesteps - 1 down to 0."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"ddim: steps must lie in [1, {timesteps}], got {steps}")
    return [i * (timesteps - 1) // max(steps - 1, 1) for i in range(steps)][::-1]


def ddpm_step(schedule: NoiseSchedule, x: Tensor, noise_estimate: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_{t-1} from the posterior at the clipped x0 (Ho et al. 2020, equation 7); no noise at t = 0."""
    mean, log_variance = schedule.posterior(schedule.predict_x0(x, t, noise_estimate), x, t)
    keep = (t > 0).to(x.dtype)[:, None, None, None, None]
    return mean + keep * (0.5 * log_variance).exp() * noise


def ddim_step(
    schedule: NoiseSchedule,
    x: Tensor,
    noise_estimate: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From t to t_next ≤ t (Song et al. 2021, equation 12); beside the clipped x0 stands the network's own estimate.

    `noise` may be None where eta is 0.
    """
    alpha, alpha_next = _at(schedule.alphas_cumprod, t), _at(schedule.alphas_cumprod, t_next)
    x0 = schedule.predict_x0(x, t, noise_estimate)
    sigma = eta * ((1 - alpha_next) / (1 - alpha)).sqrt() * (1 - alpha / alpha_next).sqrt()
    # never negative but by rounding, where eta = 1 and almost no signal is left at t
    direction = (1 - alpha_next - sigma**2).clamp(min=0).sqrt()
    x = alpha_next.sqrt() * x0 + direction * noise_estimate
    return x if noise is None else x + sigma * noise
