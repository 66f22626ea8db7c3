"""The noise schedule and the closed forms that follow from it (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meddiff.config import ScheduleConfig


class NoiseSchedule(nn.Module):
    """Cosine schedule with its derived tables, each float32 [timesteps].

    The cumulative signal is ᾱ(i) = cos²((i/T + s) / (1 + s) · π/2) over its first value, its ratio to the noise
    ᾱ/(1 - ᾱ) times shift² (Hoogeboom et al. 2023), β = 1 - ᾱ(i+1)/ᾱ(i) clipped to 0.9999. Everything is computed in
    float64 from the clipped β and stored as float32. Tables follow `.to(device)`; they keep float32 and are no part of
    a checkpoint. `signal` gives ᾱ in float64.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ScheduleConfig()
        steps = torch.arange(config.timesteps + 1, dtype=torch.float64) / config.timesteps
        signal = torch.cos((steps + config.s) / (1 + config.s) * (math.pi / 2)) ** 2
        if config.shift != 1:
            ratio = signal / signal[0] * config.shift**2
            signal = ratio / (ratio + 1 - signal / signal[0])
        betas = (1 - signal[1:] / signal[:-1]).clamp(0, 0.9999)
        alphas = 1 - betas
        cumprod = alphas.cumprod(0)
        previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)
        tables = {
            "betas": betas,
            "alphas_cumprod": cumprod,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - cumprod).log(),
            "sqrt_recip_alphas_cumprod": (1 / cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - cumprod),
            "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - cumprod),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self._signal = torch.cat([cumprod.new_ones(1), cumprod])

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    def signal(self, t: Tensor) -> Tensor:
        """ᾱ of integer timesteps on the CPU, float64; 1 for -1, the clean latent."""
        return self._signal[t + 1]

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw from q(x_t | x_0). x0 and noise [B, C, D, H, W], t integer [B]."""
        return _at(self.sqrt_alphas_cumprod, t) * x0 + _at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def predict_x0(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean latent that x at time t and its noise imply, clipped to [-1, 1]."""
        x0 = _at(self.sqrt_recip_alphas_cumprod, t) * x - _at(self.sqrt_recipm1_alphas_cumprod, t) * noise
        return x0.clamp(-1, 1)

    def posterior(self, x0: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, D, H, W] and clipped log-variance [B, 1, 1, 1, 1] of q(x_{t-1} | x_t, x_0)."""
        mean = _at(self.posterior_mean_coef1, t) * x0 + _at(self.posterior_mean_coef2, t) * x
        return mean, _at(self.posterior_log_variance_clipped, t)


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Entries of a table for the timesteps of a batch, [B, 1, 1, 1, 1]."""
    return table[t][:, None, None, None, None]
