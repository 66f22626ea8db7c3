"""The codebook of the vector-quantised latent (Wang et al., TMI 2025, section III-B; van den Oord et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meddiff.kernels.vq_fused import vq_decode


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


_DECAY = 0.99  # of the moving averages
_LAPLACE = 1e-7  # keeps the weight of an unused code from vanishing
_SPREAD = 0.01  # standard deviation, over √C, of the noise on initial codes that repeat


class Codebook(nn.Module):
    """K codes of C numbers with their moving averages. Stays float32 when the model around it changes its dtype,
    because rounded codes have other nearest neighbours.

    Codes are learned without gradients, by `initialise` and `update`, which only a trainer calls: no forward pass and
    no train/eval mode alters them.

    Args:
        n_codes: K, rows of the codebook.
        embedding_dim: C, channels of the latent.
    """

    def __init__(self, n_codes: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", nn.init.normal_(torch.empty(n_codes, embedding_dim)))
        self.register_buffer("N", torch.zeros(n_codes))  # moving average of how often a code is used
        self.register_buffer("z_avg", self.embeddings.clone())  # moving average of the sum of what a code replaced

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def initialised(self) -> bool:
        """Whether the codes came from data. Stored with them: moving averages of use are zero only before that."""
        return bool(self.N.any())

    def latent_scale(self) -> LatentScale:
        """The scale of the latents that belong to these codes."""
        low, high = self.embeddings.aminmax()
        return LatentScale(low.item(), high.item())

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, C, D, H, W] → (indices int64 [B, D, H, W], code rows float32 [B, C, D, H, W]).

        The nearest code by squared Euclidean distance, the lowest index on a tie; without gradient.
        """
        return vq_decode(z, self.embeddings, self.embeddings)

    @torch.no_grad()
    def initialise(self, z: Tensor, least_use: float = 1.0) -> None:
        """Take randomly chosen latents as codes; where there are too few, they repeat with a little noise.

        With torch.distributed every process gets the codes of the first one, chosen from its own outputs.

        Args:
            z: [B, C, D, H, W], the encoder's outputs of the first training batch.
            least_use: as for `update`, which replaces at once the codes that are not used.
        """
        tokens = z.float().movedim(1, -1).flatten(0, -2)
        n_codes, channels = self.embeddings.shape
        repeats = -(-n_codes // tokens.shape[0])
        if repeats > 1:
            tokens = tokens.repeat(repeats, 1)
            tokens += torch.randn_like(tokens) * (_SPREAD / math.sqrt(channels))
        codes = _from_first_process(tokens[torch.randperm(tokens.shape[0], device=z.device)[:n_codes]])
        self.embeddings.copy_(codes)
        self.z_avg.copy_(codes * least_use)
        self.N.fill_(least_use)

    @torch.no_grad()
    def update(self, z: Tensor, statistics: Tensor, least_use: float = 1.0) -> Tensor:
        """One step of the moving averages, over all processes of torch.distributed.

        A code whose average use has fallen below `least_use` is replaced by a random latent of the batch.

        Args:
            z: latents [B, C, D, H, W], before quantisation.
            statistics: float32 [K, C + 1]: sum of the latents nearest to each code, then their number; see
                `meddiff.kernels.vq_fused.vq_encode`. Changed where there are several processes.
            least_use: uses per step.

        Returns:
            The perplexity of the batch's code usage, a scalar from 1 (one code) to K (all alike).
        """
        tokens = z.float().movedim(1, -1).flatten(0, -2)
        n_codes = len(self.embeddings)
        if dist.is_initialized():
            dist.all_reduce(statistics)
        counts = statistics[:, -1]

        self.N.mul_(_DECAY).add_(counts, alpha=1 - _DECAY)
        self.z_avg.mul_(_DECAY).add_(statistics[:, :-1], alpha=1 - _DECAY)
        total = self.N.sum()
        weights = (self.N + _LAPLACE) / (total + n_codes * _LAPLACE) * total
        picks = _from_first_process(tokens[torch.randint(len(tokens), (n_codes,), device=z.device)])
        codes = torch.where(self.N[:, None] < least_use, picks, self.z_avg / weights[:, None])
        self.embeddings.copy_(codes)

        share = counts / counts.sum()
        return torch.exp(-torch.special.xlogy(share, share).sum())


def _from_first_process(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor
