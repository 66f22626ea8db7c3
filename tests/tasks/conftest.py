"""A body in Hounsfield units."""

from __future__ import annotations

import numpy as np
import pytest

# centre and half-axes along X, Y, Z in units of half the field of view, Hounsfield units; later ones replace earlier
_ORGANS = [
    ((0, 0, 0), (0.85, 0.65, 0.95), 20),  # body
    ((-0.4, 0.05, 0.1), (0.27, 0.38, 0.6), -820),  # lungs
    ((0.4, 0.05, 0.1), (0.27, 0.38, 0.6), -840),
    ((0.08, 0.15, 0.2), (0.2, 0.22, 0.25), 55),  # heart
    ((-0.35, 0, -0.7), (0.35, 0.4, 0.3), 65),  # liver
    ((0, -0.45, 0), (0.12, 0.12, 0.9), 650),  # spine
    ((0, -0.45, 0), (0.05, 0.05, 0.9), 30),
    ((0.6, -0.05, -0.6), (0.08, 0.08, 0.2), 300),
]


@pytest.fixture(scope="session")
def phantom():
    """Size along X, Y, Z → int16 voxels of a body with organs, after Shepp & Logan."""

    def make(*size: int) -> np.ndarray:
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
        volume = np.full(size, -1000, np.int16)
        for centre, half, hounsfield in _ORGANS:
            inside = sum(((axis - c) / h) ** 2 for axis, c, h in zip(axes, centre, half)) < 1
            volume[inside] = hounsfield
        return volume

    return make
