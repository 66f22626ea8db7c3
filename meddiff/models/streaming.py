"""The joint decoder in slabs: the result of the untiled one in the memory that there is.

GroupNorm needs the statistics of a whole tensor before any voxel can be normalised. So every tensor of the decoder is
visited slab by slab along D: once for its statistics, and once more by whoever reads it. A tensor that fits into the
budget is kept after its first visit; another one is computed anew, slab by slab, from the ones that are kept. Halos are
planes of the real neighbours, zero only outside of the volume and after norm and SiLU, as in the untiled decoder.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from meddiff.models.autoencoder import Decoder, ResBlock

_SLAB_BYTES = 3 * 2**27  # of the widest tensor of a slab; thicker slabs recompute fewer halo planes
_LEAST_PLANES, _LEAST_SLABS = 4, 8
_STATISTICS_ROWS = 2**18  # voxels converted to float32 at a time


def _planes_per_slab(depth: int, plane_bytes: int) -> int:
    return max(_LEAST_PLANES, min(depth // _LEAST_SLABS, _SLAB_BYTES // plane_bytes))


def slab_bytes(depth: int, plane_bytes: int) -> int:
    """About what the slabs in flight take: input, norm, convolution outputs and scratch, with their halos."""
    return 5 * (_planes_per_slab(depth, plane_bytes) + 4) * plane_bytes


class Planes(Protocol):
    """A tensor [1, C, D, H, W] that is read by planes along D."""

    channels: int
    size: tuple[int, int, int]

    def planes(self, start: int, stop: int) -> Tensor: ...


class Moments:
    """Count, mean and sum of squared deviations per channel, merged by Chan's formula in the order of the slabs."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.m2 = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        rows = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1])
        for part in rows.split(_STATISTICS_ROWS):
            variance, mean = torch.var_mean(part.float(), dim=0, correction=0)
            count, delta = len(part), mean.double() - self.mean
            total = self.count + count
            self.m2 += variance.double() * count + delta.square() * (self.count * count / total)
            self.mean += delta * (count / total)
            self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel's group, float32 [C] each."""
        means = self.mean.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        variance = (self.m2.view(groups, -1) / self.count + (means - mean).square()).mean(1, keepdim=True)
        return tuple(v.expand_as(means).flatten().float() for v in (mean, variance))


class Kept:
    """A tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.channels, self.size = tensor.shape[1], tuple(tensor.shape[2:])

    def planes(self, start: int, stop: int) -> Tensor:
        return self.tensor[:, :, start:stop]


class Up:
    """Transposed convolution 4³ with stride 2: output plane o is fed by input planes (o - 2) / 2 to (o + 1) / 2."""

    def __init__(self, source: Planes, layer: nn.ConvTranspose3d) -> None:
        self.source, self.layer = source, layer
        self.channels, self.size = layer.out_channels, tuple(2 * n for n in source.size)

    def planes(self, start: int, stop: int) -> Tensor:
        first = max((start - 1) // 2, 0)
        last = min(stop // 2 + 1, self.source.size[0])
        x = self.source.planes(first, last)
        y = F.conv_transpose3d(x, self.layer.weight, self.layer.bias, stride=2, padding=(0, 1, 1))
        skip = start - (2 * first - 1)
        return y[:, :, skip : skip + stop - start]


class NormConv:
    """GroupNorm with known statistics, SiLU, convolution 3³."""

    def __init__(self, source: Planes, moments: Moments, norm: nn.GroupNorm, layer: nn.Conv3d) -> None:
        self.source, self.norm, self.layer = source, norm, layer
        self.mean, self.variance = moments.of_groups(norm.num_groups)
        self.channels, self.size = layer.out_channels, source.size

    def planes(self, start: int, stop: int) -> Tensor:
        first, last = max(start - 1, 0), min(stop + 1, self.size[0])
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        x = self.source.planes(first, last)
        x = F.batch_norm(x, self.mean, self.variance, weight, bias, training=False, eps=self.norm.eps)
        x = F.silu(x, inplace=True)
        x = F.pad(x, (0, 0, 0, 0, first - (start - 1), stop + 1 - last))
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return F.conv3d(x, self.layer.weight, self.layer.bias, padding=(0, 1, 1))


class Sum:
    """A residual block's output: its branch plus its shortcut."""

    def __init__(self, branch: Planes, source: Planes, shortcut: nn.Module) -> None:
        self.branch, self.source, self.shortcut = branch, source, shortcut
        self.channels, self.size = branch.channels, branch.size

    def planes(self, start: int, stop: int) -> Tensor:
        return self.branch.planes(start, stop).add_(self.shortcut(self.source.planes(start, stop)))


class SlabDecoder:
    """Decodes one sample after another, see the module's docstring.

    Args:
        decoder: the untiled module, whose weights are used.
        budget: bytes for the tensors that are kept; 0 computes everything anew that can be.
        planes: planes per slab at most; None chooses by memory.
        progress: wraps the slabs of each visit.
    """

    def __init__(
        self,
        decoder: Decoder,
        budget: int,
        planes: int | None = None,
        progress: Callable[[Sequence], Iterable] = iter,
    ) -> None:
        self.decoder, self.budget, self.most_planes, self.progress = decoder, budget, planes, progress
        self.kept_bytes = 0
        self.itemsize = decoder.conv_first.weight.itemsize

    def __call__(self, z: Tensor) -> Tensor:
        """[B, 8, d, h, w] in the decoder's dtype → [B, 1, f·d, f·h, f·w]."""
        return torch.cat([self._decode(sample) for sample in z.split(1)])

    def _decode(self, z: Tensor) -> Tensor:
        decoder = self.decoder
        x: Planes = Kept(decoder.mid_block(decoder.conv_first(z)))
        moments = self._visit(x)
        for level in decoder.conv_blocks:
            x, moments = self._residual(level.res1, x, moments)
            x, moments = self._residual(level.res2, x, moments)
            if hasattr(level, "up"):
                if not isinstance(x, Kept):  # what is upsampled is read most often, and is small
                    x, _ = self._keep(x)
                x = Up(x, level.up.conv_trans)
                moments = self._visit(x)
        norm, _, conv = decoder.final_block
        out = NormConv(x, moments, norm, conv)
        volume = z.new_empty(1, out.channels, *out.size)
        for start, stop in self._slabs(out):
            volume[:, :, start:stop] = out.planes(start, stop)
        return volume

    def _residual(self, block: ResBlock, x: Planes, moments: Moments) -> tuple[Planes, Moments]:
        hidden: Planes = NormConv(x, moments, block.norm1, block.conv1)
        # Keeping the output saves more work than keeping the hidden tensor, so the latter has to leave room for it.
        room = self.budget - self.kept_bytes
        hidden, of_hidden = self._keep(hidden) if 2 * self._bytes(hidden) <= room else (hidden, self._visit(hidden))
        y = Sum(NormConv(hidden, of_hidden, block.norm2, block.conv2), x, block.resConv)
        return self._keep(y) if self._bytes(y) <= self.budget - self.kept_bytes else (y, self._visit(y))

    def _bytes(self, x: Planes) -> int:
        return x.channels * math.prod(x.size) * self.itemsize

    def _slabs(self, x: Planes) -> Iterable[tuple[int, int]]:
        depth, height, width = x.size
        plane_bytes = 2 * self.decoder.final_block[2].in_channels * height * width * self.itemsize
        planes = self.most_planes or _planes_per_slab(depth, plane_bytes)
        return ((a, min(a + planes, depth)) for a in self.progress(range(0, depth, planes)))

    def _visit(self, x: Planes) -> Moments:
        """The statistics of a tensor that is not kept, or is already."""
        moments = Moments(x.channels, self.decoder.conv_first.weight.device)
        for start, stop in self._slabs(x):
            moments.add(x.planes(start, stop))
        return moments

    def _keep(self, x: Planes) -> tuple[Kept, Moments]:
        weight = self.decoder.conv_first.weight
        tensor = torch.empty(
            (1, x.channels, *x.size),
            dtype=weight.dtype,
            device=weight.device,
            memory_format=torch.channels_last_3d,
        )
        kept = Kept(tensor)
        size = self._bytes(x)
        self.kept_bytes += size
        weakref.finalize(kept, self._forget, size)
        moments = Moments(x.channels, weight.device)
        for start, stop in self._slabs(x):
            slab = x.planes(start, stop)
            tensor[:, :, start:stop] = slab
            moments.add(slab)
        return kept, moments

    def _forget(self, size: int) -> None:
        self.kept_bytes -= size
