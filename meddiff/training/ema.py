"""The moving average of a network's weights, with which one samples (Ho et al. 2020)."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class MovingAverage(nn.Module):
    """A copy of a network that follows its weights slowly, whole on every process, also where FSDP shards the network.

    Args:
        network: the one that is trained, before `accelerator.prepare`.
        decay: share of the old average in the new one.
        every: steps between updates.
        start: steps during which the average is a plain copy.
    """

    def __init__(self, network: nn.Module, decay: float = 0.995, every: int = 10, start: int = 2000) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.every, self.start = decay, every, start

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow `network` after optimiser step `step` (from 0), on all processes together."""
        if (step + 1) % self.every:
            return
        decay = self.decay if step >= self.start else 0.0
        for average, value in zip(self.network.state_dict().values(), network.state_dict().values()):
            if isinstance(value, DTensor):  # a shard of FSDP's
                value = value.full_tensor()
            if average.is_floating_point():
                average.lerp_(value.to(average), 1 - decay)
            else:
                average.copy_(value)
