"""Fast MRI: Cartesian undersampling of each axial slice's k-space (Zbontar et al. 2018, "fastMRI").

k-space is the orthonormal two-dimensional Fourier transform of a slice [H, W], frequencies in the order of torch.fft;
a line has one frequency along W. Lines around the centre are always measured, others at random. Images are magnitudes,
so they are real: a line tells the opposite one, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meddiff.config import FastMRIConfig
from meddiff.tasks.measurement import Measurement


def line_mask(lines: int, config: FastMRIConfig, seed: int) -> Tensor:
    """Which of all lines are measured, bool [lines]: one in `acceleration`, the centre's share among them."""
    measured = max(1, round(lines / config.acceleration))
    centre = min(measured, max(1, round(lines * config.centre_fraction)))
    mask = torch.zeros(lines, dtype=torch.bool)
    start = (lines - centre + 1) // 2
    mask[start : start + centre] = True
    others = torch.nonzero(~mask).flatten()
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    mask[others[order[: measured - centre]]] = True
    return torch.fft.ifftshift(mask)


def k_space(x: Tensor) -> Tensor:
    """x [D, H, W] in [-1, 1] → complex64 [D, H, W], of (x + 1) / 2."""
    return torch.fft.fft2((x.float() + 1) / 2, norm="ortho")


def measure(x: Tensor, config: FastMRIConfig, seed: int) -> Measurement:
    """The measured lines of x's k-space, others 0."""
    mask = line_mask(x.shape[-1], config, seed).to(x.device)
    return Measurement(k_space(x) * mask, mask, tuple(x.shape))


def reconstruct(measurement: Measurement) -> Tensor:
    """The magnitude of the zero-filled inverse transform, in [-1, 1]."""
    return (2 * torch.fft.ifft2(measurement.data, norm="ortho").abs() - 1).clamp(-1, 1)


def impose(x: Tensor, measurement: Measurement) -> Tensor:
    """x with the measured lines, and those opposite of them, in place of its own."""
    data, mask = (part.to(x.device) for part in (measurement.data, measurement.sampling))
    opposite = data.flip(-2, -1).roll((1, 1), (-2, -1)).conj()  # frequency -f in the place of f
    k = torch.where(mask.flip(-1).roll(1), opposite, k_space(x))
    k = torch.where(mask, data, k)
    return 2 * torch.fft.ifft2(k, norm="ortho").real - 1
