"""Downstream tasks: how a condition is made of a volume or of what a scanner measured.

Masks are conditions as they are (`meddiff.tasks.masks`). Sparse-view CT and fast MRI have a measurement, of which a
first reconstruction is the condition; what was measured can be imposed on an image again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meddiff.config import FastMRIConfig, MasksConfig, SparseViewCTConfig, TaskConfig
from meddiff.models import PatchVolumeAutoencoder
from meddiff.tasks import fast_mri, sparse_view_ct
from meddiff.tasks.masks import one_hot, paint
from meddiff.tasks.measurement import Measurement

_MEASURING = {FastMRIConfig: fast_mri, SparseViewCTConfig: sparse_view_ct}


def is_measured(task: TaskConfig) -> bool:
    """Whether a task's condition comes from a measurement."""
    return type(task) in _MEASURING


def measure(x: Tensor, task: TaskConfig, seed: int = 0) -> Measurement:
    """Simulate the measurement of an image.

    Args:
        x: [D, H, W] in [-1, 1].
        task: one that `is_measured`.
        seed: of what is random in it.
    """
    return _MEASURING[type(task)].measure(x, task, seed)


def reconstruct(measurement: Measurement, task: TaskConfig) -> Tensor:
    """The first reconstruction, float32 [D, H, W] in [-1, 1]: the condition."""
    return _MEASURING[type(task)].reconstruct(measurement)


def impose(x: Tensor, measurement: Measurement, task: TaskConfig) -> Tensor:
    """x [D, H, W] in [-1, 1], changed so that it agrees with what was measured; float32, not clipped.

    Raises ValueError for another size than the measurement's.
    """
    if tuple(x.shape) != measurement.size:
        raise ValueError(f"impose: x must have the measurement's size {measurement.size}, got {tuple(x.shape)}")
    return _MEASURING[type(task)].impose(x, measurement)


def network_input(condition: Tensor, task: TaskConfig, encoder: str, autoencoder: PatchVolumeAutoencoder) -> Tensor:
    """What `ControlNet.encode` takes.

    Args:
        condition: integer labels, or an image in [-1, 1]: [D, H, W], multiples of the autoencoder's downsampling.
        encoder: "latent" or "convolutional", as the ControlNet's.

    Returns:
        Float32 [1, C, D, H, W]: a one-hot mask or the image at voxel size, or [1, 8, d, h, w]: the latent of the image,
        or of the mask as `paint` makes an image of it, scaled.

    Raises:
        ValueError: for labels that the task does not know.
    """
    masks, convolutional = isinstance(task, MasksConfig), encoder == "convolutional"
    if masks and convolutional:
        return one_hot(condition, task)[None]
    image = (paint(condition, task) if masks else condition.float())[None, None]
    if convolutional:
        return image
    with torch.inference_mode():
        latent = autoencoder.codebook.latent_scale().scale(autoencoder.encode(image))
    d, h, w = (n // autoencoder.config.downsample for n in condition.shape)
    return latent[..., :d, :h, :w].clone()  # without the padding to whole patches


__all__ = ["Measurement", "impose", "is_measured", "measure", "network_input", "one_hot", "paint", "reconstruct"]
