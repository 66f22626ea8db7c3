"""The codebook of the vector-quantised latent (Wang et al., TMI 2025, section III-B; van den Oord et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddiff.kernels.vq_nearest import vq_nearest


@dataclass(frozen=True)
class LatentScale:
    """The linear map between encoder outputs and the denoiser's range, from the codebook's two extremes.

    The denoiser works on `z' = 2 (z - minimum) / (maximum - minimum) - 1`.
    """

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not self.maximum > self.minimum:
            raise ValueError(
                f"LatentScale: maximum {self.maximum} must exceed minimum {self.minimum}; is the codebook initialised?"
            )

    def scale(self, z: Tensor) -> Tensor:
        """Encoder outputs, any shape → the denoiser's range, about [-1, 1]."""
        return (z - self.minimum) * (2 / (self.maximum - self.minimum)) - 1

    def unscale(self, z: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return (z + 1) * ((self.maximum - self.minimum) / 2) + self.minimum


class Codebook(nn.Module):
    """K codes of C numbers with their moving averages. Stays float32 when the model around it changes its dtype,
    because rounded codes have other nearest neighbours.

    Args:
        n_codes: K, rows of the codebook.
        embedding_dim: C, channels of the latent.
    """

    def __init__(self, n_codes: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.randn(n_codes, embedding_dim))
        self.register_buffer("N", torch.zeros(n_codes))  # moving average of how often a code is used
        self.register_buffer("z_avg", self.embeddings.clone())  # moving average of the sum of what a code replaced

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def latent_scale(self) -> LatentScale:
        """The scale of the latents that belong to these codes."""
        low, high = self.embeddings.aminmax()
        return LatentScale(low.item(), high.item())

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices int64 [B, D, H, W] → code rows float32 [B, C, D, H, W] (channels-last)."""
        return F.embedding(indices, self.embeddings).permute(0, 4, 1, 2, 3)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, C, D, H, W] → (indices int64 [B, D, H, W], code rows float32 [B, C, D, H, W]).

        The nearest code by squared Euclidean distance in float32, the lowest index on a tie.
        """
        indices = vq_nearest(z, self.embeddings)
        return indices, self.lookup(indices)
