"""Losses of the autoencoder and the denoiser (Wang et al., TMI 2025, section III); float32, also under autocast."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COMMITMENT = 0.25
_SLICES = 0.2  # share of the slices that a 2D perceptual network sees


def noise_loss(estimate: Tensor, noise: Tensor, scales: int = 1, weight: Tensor | None = None) -> Tensor:
    """L1 distance of the noise [B, C, d, h, w] and its estimate; with `scales`, the sum of those at several scales.

    weight: of each sample, [B].

    From one scale to the next the difference is averaged over pairs along each axis, until there is one number per
    channel. So what is wrong on average over a region counts beside what is wrong at random. Hoogeboom et al. 2023
    ("simple diffusion", section 3.2) do so with squared differences, and weigh the scales.
    """
    error = estimate.float() - noise
    if weight is not None:
        error = error * weight[:, None, None, None, None]
    loss = error.abs().mean()
    for _ in range(scales - 1):
        kernel = [min(2, n) for n in error.shape[2:]]
        error = F.avg_pool3d(error, kernel, ceil_mode=True, count_include_pad=False)
        loss = loss + error.abs().mean()
    return loss


def commitment_loss(z: Tensor, rows: Tensor) -> Tensor:
    """0.25 · mse(z, sg[rows]) of latents and their codes, both [B, C, D, H, W] (van den Oord et al. 2017)."""
    return _COMMITMENT * F.mse_loss(z.float(), rows.detach().float())


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: mean of max(0, 1 - real) + mean of max(0, 1 + fake), of logits of any shape.

    Twice the usual half sum, the "hinge loss ×2" of the released recipe.
    """
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """The generator's loss, the mean of -D(x̂)."""
    return -fake.float().mean()


def feature_matching_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean over the discriminator's layers of the L1 distance of their outputs; the real ones are constants."""
    distances = [F.l1_loss(f.float(), r.detach().float()) for r, f in zip(real, fake)]
    return torch.stack(distances).mean()


def load_perceptual(kind: Literal["none", "lpips", "medicalnet"], weights: str | None = None) -> nn.Module | None:
    """A frozen perceptual distance of two volumes [B, 1, D, H, W] in [-1, 1], through monai.losses.PerceptualLoss.

    Args:
        kind: "lpips": AlexNet features of a fifth of the slices along each axis (Zhang et al. 2018); "medicalnet":
            features of a 3D network (Chen et al. 2019).
        weights: file of the feature network's weights, a plain state dict; by default they are downloaded.

    Returns:
        None for "none", and, with a warning, where the packages or weights cannot be had.

    Raises FileNotFoundError for a `weights` file that is missing.
    """
    if kind == "none":
        return None
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"load_perceptual: {weights}: no such file; give the weights of {kind} or leave it out")
    try:
        from monai.losses import PerceptualLoss

        if kind == "lpips":
            loss = PerceptualLoss(
                spatial_dims=3, network_type="alex", is_fake_3d=True, fake_3d_ratio=_SLICES, pretrained_path=weights
            )
        else:
            loss = PerceptualLoss(
                spatial_dims=3, network_type="medicalnet_resnet10_23datasets", is_fake_3d=False, pretrained_path=weights
            )
    except Exception as error:  # packages, hub and network each have their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"training goes on without the perceptual loss: {kind} cannot be had ({reason})", stacklevel=2)
        return None
    return loss.requires_grad_(False).eval()
