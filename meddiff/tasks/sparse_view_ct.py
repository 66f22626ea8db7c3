"""Sparse-view CT: few parallel projections of each axial slice (Kak & Slaney 1988, chapter 3), through scikit-image.

The attenuation of a voxel is (x + 1) / 2: 0 for air at -1000 HU, 0.5 for water where 1000 HU is the upper end. A slice
[H, W] lies in the middle of a square as wide as its diagonal, air around it; projections are in units of voxels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from meddiff.config import SparseViewCTConfig
from meddiff.progress import progress
from meddiff.tasks.measurement import Measurement


def _transform():
    try:
        from skimage import transform
    except ImportError as error:
        raise ImportError("sparse-view CT needs scikit-image: pip install 'meddiff[train]'") from error
    return transform


def _margins(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Voxels before and after each axis that make a slice the square, its centre in the square's centre."""
    side = math.ceil(math.hypot(height, width)) + 1
    before = [side // 2 - n // 2 for n in (height, width)]
    return tuple((b, side - n - b) for b, n in zip(before, (height, width)))


def _attenuation(x: Tensor) -> np.ndarray:
    """[D, H, W] in [-1, 1] → float32 [D, side, side]."""
    values = ((x.float() + 1) / 2).cpu().numpy()
    return np.pad(values, ((0, 0), *_margins(*x.shape[1:])))


def _image(attenuation: list[np.ndarray], measurement: Measurement, device: torch.device) -> Tensor:
    """Slices [side, side] → float32 [D, H, W] with air at -1."""
    _, height, width = measurement.size
    (top, _), (left, _) = _margins(height, width)
    slices = np.stack(attenuation)[:, top : top + height, left : left + width]
    return torch.from_numpy(2 * slices.astype(np.float32) - 1).to(device)


def measure(x: Tensor, config: SparseViewCTConfig, seed: int) -> Measurement:
    """Sinograms of all slices, with views evenly over 180°; nothing in it is random."""
    radon = _transform().radon
    angles = np.linspace(0, 180, config.views, endpoint=False)
    slices = progress("projecting")(_attenuation(x))
    sinograms = np.stack([radon(a, angles, circle=True) for a in slices]).astype(np.float32)
    return Measurement(torch.from_numpy(sinograms), torch.from_numpy(angles), tuple(x.shape))


def reconstruct(measurement: Measurement) -> Tensor:
    """Filtered back-projection with the ramp filter, in [-1, 1]."""
    iradon, angles = _transform().iradon, measurement.sampling.numpy()
    sinograms = progress("back-projecting")(measurement.data.numpy())
    slices = [iradon(s, angles, filter_name="ramp", circle=True) for s in sinograms]
    return _image(slices, measurement, torch.device("cpu")).clamp(-1, 1)


def impose(x: Tensor, measurement: Measurement) -> Tensor:
    """One sweep of SART over the views (Andersen & Kak 1984), from x: each view in turn corrects the image."""
    sart, angles = _transform().iradon_sart, measurement.sampling.numpy()
    pairs = list(zip(measurement.data.numpy(), _attenuation(x)))
    slices = [sart(s, angles, image=a) for s, a in progress("imposing views")(pairs)]
    return _image(slices, measurement, x.device)
