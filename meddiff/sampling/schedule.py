"""The noise schedule (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meddiff.config import ScheduleConfig


class NoiseSchedule(nn.Module):
    """Cosine schedule with the tables of training, each float32 [timesteps].

    The cumulative signal is ᾱ(i) = cos²((i/T + s) / (1 + s) · π/2) over its first value, β = 1 - ᾱ(i+1)/ᾱ(i) clipped
    to 0.9999. Everything is computed in float64 from the clipped β and stored as float32. Tables follow
    `.to(device)`; they keep float32 and are no part of a checkpoint. `signal` gives ᾱ in float64.
    """

    betas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ScheduleConfig()
        steps = torch.arange(config.timesteps + 1, dtype=torch.float64) / config.timesteps
        signal = torch.cos((steps + config.s) / (1 + config.s) * (math.pi / 2)) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(0, 0.9999)
        cumprod = (1 - betas).cumprod(0)
        tables = {
            "betas": betas,
            "sqrt_alphas_cumprod": cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
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

    def draw_timesteps(self, count: int, bias: float = 0.0) -> Tensor:
        """Random timesteps, int64 [count] on the schedule's device, with a density that grows as t^bias."""
        u = torch.rand(count, device=self.betas.device)
        return (self.timesteps * u ** (1 / (1 + bias))).long().clamp(max=self.timesteps - 1)

    def snr_weights(self, t: Tensor, gamma: float | None) -> Tensor | None:
        """Weights [B] of an L1 distance to the noise, √(min(SNR, gamma)/SNR), for integer t [B]; None without gamma.

        So the distance is that of the clean latents, but for what is nothing but noise. Hang et al. 2023 ("min-SNR"),
        who square the distance.
        """
        if gamma is None:
            return None
        snr = (self.sqrt_alphas_cumprod[t] / self.sqrt_one_minus_alphas_cumprod[t]).square()
        return (gamma / snr).clamp(max=1).sqrt()

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw from q(x_t | x_0). x0 and noise [B, C, D, H, W], t integer [B]."""
        return _at(self.sqrt_alphas_cumprod, t) * x0 + _at(self.sqrt_one_minus_alphas_cumprod, t) * noise


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Entries of a table for the timesteps of a batch, [B, 1, 1, 1, 1]."""
    return table[t][:, None, None, None, None]
