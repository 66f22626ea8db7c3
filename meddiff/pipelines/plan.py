"""What generating a volume will take, said before it begins: the memory of a denoising step, samples side by side, and
on a CPU the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from meddiff.kernels.volume_attention import volume_attention
from meddiff.models import BiFlowNet
from meddiff.resources import available_bytes

if TYPE_CHECKING:
    from meddiff.pipelines.model import MedDiffusion

# Tensors of the denoiser's base width at full resolution that live at once in the widest moment, the MLP of the
# intra-patch flow: four times the width before and after its GELU, two skips, four features of the U-Net, the tokens,
# and what is added to them.
_WIDEST = 16
_BUFFERS = 3  # float32, of the latent's size: the latent, the clean one of the step before, fresh noise
_SHARE_OF_FREE = 0.6  # of the free memory; convolutions want scratch space, and decoding follows
_MOST_SAMPLES = 8  # side by side: a GPU is busy with fewer
_PATIENCE = 3 * 3600  # seconds for one volume on a CPU
_QUICK = 32**3  # latent elements of a volume whose time need not be estimated
_TRIAL = 32  # voxels per axis of the volume that is decoded to estimate the time
_TRIAL_TOKENS = 2048


def step_bytes(denoiser: BiFlowNet, size: Sequence[int]) -> int:
    """About the memory that a denoising step of one latent of `size` (D, H, W) takes at its peak, beside the weights.

    With it goes the largest weight once more, which libraries may keep in another order while they use it.
    """
    voxels, config = math.prod(size), denoiser.config
    largest = max(weight.nbytes for weight in denoiser.parameters())
    return voxels * (_WIDEST * config.dim * denoiser.dtype.itemsize + 4 * _BUFFERS * config.channels) + largest


@dataclass(frozen=True)
class GenerationPlan:
    """What a volume takes.

    latent: its extents D, H, W
    step_bytes: memory of a denoising step of one sample, beside the weights
    free_bytes: memory that is free on the denoiser's device, or None where the platform does not say
    batch: samples that are denoised side by side
    seconds: rough estimate for one volume on a CPU; None for a GPU, and where it is a matter of minutes
    """

    latent: tuple[int, int, int]
    step_bytes: int
    free_bytes: int | None
    batch: int
    seconds: float | None

    def __str__(self) -> str:
        latent, free = "×".join(map(str, self.latent)), self.free_bytes
        parts = [
            f"plan: a denoising step at latent {latent} takes {_gib(self.step_bytes)}"
            + ("" if free is None else f", {_gib(free)} are free"),
            f"{self.batch} at a time",
        ]
        if self.seconds is not None:
            parts.append(f"about {_duration(self.seconds)} a volume")
        return "; ".join(parts)

    def require_possible(self) -> None:
        """MemoryError if a step does not fit into the free memory; the message says how much it needs."""
        if self.free_bytes is not None and self.step_bytes > self.free_bytes:
            latent = "×".join(map(str, self.latent))
            raise MemoryError(
                f"generate: a denoising step at latent {latent} needs about {_gib(self.step_bytes)}, and "
                f"{_gib(self.free_bytes)} are free; free some, choose a smaller size, or bfloat16 where float32 is set"
            )

    def require_patience(self) -> None:
        """ValueError, with the estimate, if one volume would take more than three hours on this CPU."""
        if self.seconds is not None and self.seconds > _PATIENCE:
            raise ValueError(
                f"generate: one volume would take about {_duration(self.seconds)} on this CPU; use a GPU, a smaller "
                "size or fewer steps, or --force to go on"
            )


def plan_generation(model: MedDiffusion, size: Sequence[int], steps: int, batch: int | None = None) -> GenerationPlan:
    """Plan volumes of `size` (voxels along X, Y, Z) in `steps` denoising steps, `batch` side by side if it is given.

    Otherwise as many as the free memory of a GPU allows; on a CPU, which one sample fills, one. For a large volume the
    time there is estimated from a small latent and a small volume, both timed: it takes a second or two.
    """
    latent, device = model.latent_size(size), model.device
    need, free = step_bytes(model.denoiser, latent), available_bytes(device)
    if batch is None:
        room = 0 if free is None or device.type == "cpu" else int(_SHARE_OF_FREE * free) // need
        batch = max(1, min(_MOST_SAMPLES, room))
    slow = device.type == model.autoencoder.device.type == "cpu" and math.prod(latent) > _QUICK
    return GenerationPlan(latent, need, free, batch, _estimate_seconds(model, latent, steps) if slow else None)


@torch.inference_mode()
def _estimate_seconds(model: MedDiffusion, latent: tuple[int, int, int], steps: int) -> float:
    """Convolutions take time in proportion to the voxels, attention over the latent to their square."""
    edge, autoencoder = 2 * model.config.denoiser.sub_volume, model.autoencoder
    start = torch.zeros(1, model.config.denoiser.channels, edge, edge, edge)
    zero = torch.zeros(1, dtype=torch.int64)
    step = _timed(lambda: model.denoiser(start, zero, zero, torch.zeros(3))) / edge**3

    edge = max(1, _TRIAL // model.config.autoencoder.downsample)
    decode = _timed(lambda: autoencoder.decode(zero.view(1, 1, 1, 1).expand(1, edge, edge, edge))) / edge**3

    qkv = torch.zeros(1, _TRIAL_TOKENS, 3 * 4 * 32, dtype=autoencoder.dtype)  # the heads of the decoder's attention
    attention = _timed(lambda: volume_attention(qkv, 4)) / _TRIAL_TOKENS**2

    tokens = math.prod(latent)
    return tokens * (steps * step + decode) + tokens**2 * attention


def _timed(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _gib(number: int) -> str:
    return f"{number / 2**20:.0f} MiB" if number < 2**30 else f"{number / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
