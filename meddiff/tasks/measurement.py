"""What a scanner gives, or what is simulated in its place."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Measurement(NamedTuple):
    """Data of an image whose values are (x + 1) / 2, so that air is 0; x is in [-1, 1]."""

    data: Tensor  # k-space, complex64 [D, H, W], or sinograms, float32 [D, bins, views]
    sampling: Tensor  # which lines were measured, bool [W], or the views' angles in degrees, float64 [views]
    size: tuple[int, int, int]  # D, H, W of the image
