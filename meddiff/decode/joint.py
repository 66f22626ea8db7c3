"""Runs a plan: the result of the untiled decoder, slab by slab, in the memory that the plan says.

Halos are planes of the real neighbours, zeros only outside of the volume and after norm and SiLU. The statistics of a
tensor are merged from those of its tiles by Chan's formula in float64, in the order of the tiles, so that the same plan
gives the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.decode.layers import Attention, Blur, Conv, Interpolate, Layer, Norm, UpConv
from meddiff.decode.plan import PARKED, RECOMPUTED, Pass, Plan, make_plan, window_planes
from meddiff.kernels.blur3d import blur3d
from meddiff.kernels.group_norm_silu import group_norm_silu
from meddiff.kernels.linear import linear
from meddiff.kernels.norm_silu_conv3d import conv3d, norm_silu_conv3d, scratch_tile, write_tile
from meddiff.kernels.up_conv3d import up_conv3d
from meddiff.kernels.volume_attention import volume_attention
from meddiff.progress import counted
from meddiff.resources import give_back_freed_memory

_log = logging.getLogger(__name__)
_REPLANNED_SHARE = 0.7  # of what did not fit

OnSlab = Callable[[Tensor, int, int], None]


def decode_jointly(
    layers: Sequence[Layer],
    z: Tensor,
    budget: int | None = None,
    on_slab: OnSlab | None = None,
    progress: bool = False,
    plan: Plan | None = None,
) -> Tensor | None:
    """Run a decoder over a whole latent within a budget of memory. No gradient.

    Args:
        layers: see `meddiff.decode.layers`, their weights on z's device and in its dtype.
        z: the latent [B, C, d, h, w].
        budget: bytes beside the weights; None is without a limit.
        on_slab: called as on_slab(slab, sample, start) with the finished planes [1, O, n, H, W] from plane `start` on,
            sample by sample and in the order of the planes; the slab is its own. Then no volume is returned. What it
            raises ends the decoding.
        progress: show a progress bar.
        plan: what `make_plan` gave for the same layers and latent; None makes one.

    Returns:
        The volume [B, O, D, H, W], or None with `on_slab`.

    Raises:
        MemoryError: if no plan fits into the budget.
        FloatingPointError: if a layer's output is not finite; the message names the first one.

    An out-of-memory error of the device makes a second plan, with a smaller budget, and is logged; a second one is
    raised. Slabs that were handed out before it are not handed out again.
    """
    make = partial(make_plan, layers, tuple(z.shape), z.dtype, z.device, streamed=on_slab is not None)
    plan = plan or make(budget=budget)
    delivery = on_slab and _Delivery(on_slab)
    try:
        return _run(plan, layers, z, delivery, progress)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        smaller = int(_REPLANNED_SHARE * plan.peak_bytes)
        message = "decode: out of memory at a planned peak of %.2f GB; planning again with %.2f GB"
        _log.warning(message, plan.peak_bytes / 1e9, smaller / 1e9)
    if z.device.type == "cuda":
        torch.cuda.empty_cache()
    return _run(make(budget=smaller), layers, z, delivery, progress)


class _Delivery:
    """Hands slabs on, each plane once."""

    def __init__(self, on_slab: OnSlab) -> None:
        self.on_slab, self.done = on_slab, (0, 0)

    def __call__(self, slab: Tensor, sample: int, start: int) -> None:
        if sample < self.done[0]:
            return
        stop = start + slab.shape[2]
        first = max(start, self.done[1]) if sample == self.done[0] else start
        if first < stop:
            self.on_slab(slab[:, :, first - start :], sample, first)
            self.done = (sample, stop)


def _run(plan: Plan, layers: Sequence[Layer], z: Tensor, on_slab: OnSlab | None, progress: bool) -> Tensor | None:
    out, size = plan.shapes[-1], plan.shapes[-1].size(plan.size)
    volume = None if on_slab else scratch_tile(z, out.channels, size)
    with counted(plan.flops, "decoding") if progress else nullcontext(lambda _: None) as advance:
        for b, sample in enumerate(z.split(1)):
            decoder = _Decoder(plan, layers, sample)
            for p in plan.passes:
                steps = range(0, plan.shapes[p.target].size(plan.size)[0], p.planes)
                for start in steps:
                    if p.target < len(layers):
                        decoder.visit(p, start)
                    elif volume is None:
                        on_slab(decoder.finish(p, start), b, start)
                    else:
                        decoder.finish(p, start, volume[b : b + 1])
                    advance(p.flops / len(steps))
                decoder.leave(p)
    return volume


class _Whole:
    """A tensor in memory, from plane `first` of a buffer on."""

    def __init__(self, buffer: Tensor, first: int) -> None:
        self.buffer, self.first = buffer, first

    def planes(self, start: int, stop: int) -> Tensor:
        return self.buffer[:, :, self.first + start : self.first + stop]


class _Window:
    """A tensor of which the planes that were asked for last are in memory; `fill(start, stop, out)` writes new ones."""

    def __init__(self, buffer: Tensor, depth: int, pairs: bool, fill: Callable[[int, int, Tensor], None]) -> None:
        self.buffer, self.depth, self.pairs, self.fill = buffer, depth, pairs, fill
        self.start = self.stop = 0

    def planes(self, start: int, stop: int) -> Tensor:
        if start < self.start or stop > self.stop:
            first, last = start, stop
            if self.pairs:
                first, last = start - start % 2, stop + stop % 2
            held = max(self.stop - first, 0) if first >= self.start else 0
            self._move(first - self.start, held, last - first)
            self.fill(first + held, last, self.buffer[:, :, held : last - first])
            self.start, self.stop = first, last
        return self.buffer[:, :, start - self.start : stop - self.start]

    def _move(self, by: int, held: int, capacity: int) -> None:
        """Bring `held` planes to the front, in a larger buffer where the present one is too small."""
        old = self.buffer[:, :, by : by + held] if held else None
        if self.buffer.shape[2] < capacity:
            self.buffer = scratch_tile(self.buffer, self.buffer.shape[1], (capacity, *self.buffer.shape[3:]))
        elif held > by:  # they overlap with where they go
            old = old.clone()
        if held:
            self.buffer[:, :, :held] = old


@dataclass
class _Moments:
    """What the tiles of a pass wrote: their numbers per channel, and mean and sum of squared deviations [2, C]."""

    counts: list[int]
    parts: list[Tensor]

    def total(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel, float64 [C]."""
        parts = torch.stack(self.parts).double()
        counts = torch.tensor(self.counts, dtype=torch.float64, device=parts.device)[:, None]
        count = counts.sum()
        mean = (counts * parts[:, 0]).sum(0) / count
        m2 = (parts[:, 1] + counts * (parts[:, 0] - mean).square()).sum(0)
        return mean, m2 / count


def _moments_of(z: Tensor) -> _Moments:
    """Of a tensor [1, C, D, H, W] that is there already, plane by plane."""
    moments = _Moments([], [])
    for plane in z.unbind(2):
        count = plane[0, 0].numel()
        variance, mean = torch.var_mean(plane.double(), dim=(0, 2, 3), correction=0)
        moments.counts.append(count)
        moments.parts.append(torch.stack([mean, variance * count]).float())
    return moments


class _Decoder:
    """One sample's tensors while a plan runs."""

    def __init__(self, plan: Plan, layers: Sequence[Layer], z: Tensor) -> None:
        self.plan, self.layers, self.z = plan, layers, z
        whole = z.contiguous(memory_format=torch.channels_last_3d)
        self.whole: dict[int, _Whole] = {0: _Whole(whole, 0)}
        self.windows: dict[int, _Window] = {}
        self.moments: dict[int, _Moments] = {}
        self.totals: dict[int, tuple[Tensor, Tensor]] = {}
        self.merged: dict[int, tuple[Tensor, Tensor]] = {}
        self.folds: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self.normalised = {layer.source for layer in layers if isinstance(layer, Conv) and layer.norm is not None}
        self.last_use = {t: i for i, p in enumerate(plan.passes) for t in self._reads(p)}
        self.done = 0  # passes
        if 0 in self.normalised:
            self.totals[0] = _moments_of(whole).total()

    def visit(self, p: Pass, start: int) -> None:
        """Compute the slab of a pass from plane `start` on, and gather its statistics."""
        if start == 0:
            self._enter(p)
        t, layer = p.target, self.layers[p.target - 1]
        stop = min(start + p.planes, self.plan.shapes[t].size(self.plan.size)[0])
        moments = self.moments.get(t)
        if isinstance(layer, Attention):
            if start == 0:
                self._attend(p, layer, self.whole[t].planes(0, self.plan.shapes[t].size(self.plan.size)[0]), moments)
            return
        resident = p.stored and self.plan.storage[t] != PARKED
        out = self.whole[t].planes(start, stop) if resident else self._new(t, stop - start)
        self._compute(p, t, start, stop, out, moments)
        if p.stored and not resident:
            self.whole[t].planes(start, stop).copy_(out)

    def finish(self, p: Pass, start: int, volume: Tensor | None = None) -> Tensor:
        """Compute the slab of the last tensor from plane `start` on, in the volume [1, O, D, H, W] if there is one."""
        if start == 0:
            self._enter(p)
        stop = min(start + p.planes, self.plan.shapes[p.target].size(self.plan.size)[0])
        out = self._new(p.target, stop - start) if volume is None else volume[:, :, start:stop]
        self._compute(p, p.target, start, stop, out, None)
        if not out.isfinite().all():
            self._not_finite(p.target)
        return out

    def leave(self, p: Pass) -> None:
        """End a pass: check and merge its statistics, and forget what nobody reads any more."""
        self.windows.clear()
        if moments := self.moments.pop(p.target, None):
            mean, variance = self.totals[p.target] = moments.total()
            if not (mean.isfinite().all() and variance.isfinite().all()):
                self._not_finite(p.target)
        for t in [t for t in self.whole if t != p.target and self.last_use.get(t, -1) <= self.done]:
            del self.whole[t]
        if self.z.device.type == "cpu":
            give_back_freed_memory()  # holes between tiles, or the next tensor would come on top of them
        self.done += 1

    def _not_finite(self, t: int) -> None:
        raise FloatingPointError(
            f"decode: the output of {self.plan.names[t]} is not finite in {str(self.z.dtype).removeprefix('torch.')}; "
            "check the weights and the latent, or decode in float32"
        )

    def _reads(self, p: Pass) -> Iterator[int]:
        computed = [w for w in p.windows if self.plan.storage[w] == RECOMPUTED]
        for t in (p.target, *computed):
            layer = self.layers[t - 1]
            yield layer.source
            if isinstance(layer, Blur):
                yield layer.origin
            if t in p.merged:
                yield self.layers[layer.residual - 1].source
            elif layer.residual is not None:
                yield layer.residual

    def _new(self, t: int, planes: int, device: torch.device | None = None) -> Tensor:
        _, h, w = self.plan.shapes[t].size(self.plan.size)
        shape = (1, planes, h, w, self.plan.shapes[t].channels)
        pinned = device is not None and self.z.device.type == "cuda"
        memory = torch.empty(shape, dtype=self.z.dtype, device=device or self.z.device, pin_memory=pinned)
        return memory.permute(0, 4, 1, 2, 3)

    def _enter(self, p: Pass) -> None:
        t = p.target
        if t in self.normalised:
            self.moments[t] = _Moments([], [])
        if p.stored and t < len(self.layers):
            self._store(t)
        for w in p.windows:
            depth, pairs = self.plan.shapes[w].size(self.plan.size)[0], self.layers[w - 1].doubles
            buffer = self._new(w, window_planes(self.layers[w - 1], p.planes, depth))
            fill = self._fetch if self.plan.storage[w] == PARKED else self._recompute
            self.windows[w] = _Window(buffer, depth, pairs, partial(fill, p, w))
        for c in p.merged:
            if c not in self.merged:
                self.merged[c] = self._merge(c)

    def _store(self, t: int) -> None:
        depth = self.plan.shapes[t].size(self.plan.size)[0]
        first = self.plan.headroom.get(t, 0)
        if t in self.plan.over:
            self.whole[t] = _Whole(self.whole[self.plan.over[t]].buffer, first)
        elif self.plan.storage[t] == PARKED:
            self.whole[t] = _Whole(self._new(t, depth, torch.device("cpu")), 0)
        else:
            self.whole[t] = _Whole(self._new(t, first + depth), first)

    def _recompute(self, p: Pass, t: int, start: int, stop: int, out: Tensor) -> None:
        self._compute(p, t, start, stop, out, None)

    def _fetch(self, p: Pass, t: int, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.whole[t].planes(start, stop), non_blocking=True)

    def _planes(self, t: int, start: int, stop: int) -> Tensor:
        return (self.windows[t] if t in self.windows else self.whole[t]).planes(start, stop)

    def _fold(self, norm: Norm | None, source: int) -> tuple[Tensor | None, Tensor | None]:
        """GroupNorm with known statistics as scale and shift, float32 [1, C]."""
        if norm is None:
            return None, None
        mean, variance = self.totals[source]
        means = mean.view(norm.groups, -1)
        of_group = means.mean(1, keepdim=True)
        of_variance = (variance.view_as(means) + (means - of_group).square()).mean(1, keepdim=True)
        scale = norm.weight.double().view_as(means) / (of_variance + norm.eps).sqrt()
        shift = norm.bias.double().view_as(means) - of_group * scale
        return scale.view(1, -1).float(), shift.view(1, -1).float()

    def _merge(self, t: int) -> tuple[Tensor, Tensor]:
        """Weight [C, O, 4, 4, 4] and bias of a transposed convolution followed by the 1³ shortcut of layer t."""
        layer = self.layers[t - 1]
        up, shortcut = self.layers[layer.residual - 1], layer.residual_weight.flatten(1).double()
        weight = torch.einsum("cmxyz,om->coxyz", up.weight.double(), shortcut)
        bias = weight.new_zeros(len(shortcut)) if up.bias is None else shortcut @ up.bias.double()
        if layer.residual_bias is not None:
            bias = bias + layer.residual_bias.double()
        return weight.to(self.z.dtype), bias.to(self.z.dtype)

    def _compute(self, p: Pass, t: int, start: int, stop: int, out: Tensor, moments: _Moments | None) -> None:
        """Planes start … stop of tensor t, into out [1, O, n, H, W], tile by tile."""
        layer, (_, height, width) = self.layers[t - 1], self.plan.shapes[t].size(self.plan.size)
        if isinstance(layer, UpConv):
            write = partial(self._write_up, layer.source, layer.weight, layer.bias, layer.replicate, (start, stop))
        elif isinstance(layer, Interpolate):
            write = partial(self._interpolate, layer.source, (start, stop))
        elif isinstance(layer, Blur):
            write = partial(self._blur, layer, t, (start, stop))
        else:
            write = self._conv_writer(p, t, start, stop)
        for h, w in product(_parts(height, p.tile[0]), _parts(width, p.tile[1])):
            part, statistics = out[:, :, :, slice(*h), slice(*w)], None
            if moments is not None:
                statistics = torch.empty(1, 2, layer.channels, dtype=torch.float32, device=out.device)
                moments.counts.append(part[0, 0].numel())
                moments.parts.append(statistics[0])
            write(h, w, part, statistics)

    def _write_up(
        self,
        source: int,
        weight: Tensor,
        bias: Tensor | None,
        replicate: bool,
        d: tuple[int, int],
        h: tuple[int, int],
        w: tuple[int, int],
        out: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """One tile of a transposed convolution; it begins and ends at even planes."""
        around = [(first // 2 - 1, last // 2 + 1) for first, last in (d, h, w)]
        if replicate:
            x, pads = self._repeated(source, around, 1), [0] * 6
        else:
            x, pads = self._padded(source, around)
        up_conv3d(x, weight, bias, pads, out, statistics)

    def _interpolate(
        self,
        source: int,
        d: tuple[int, int],
        h: tuple[int, int],
        w: tuple[int, int],
        out: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """One tile of a trilinear doubling."""
        write_tile(self._interpolated(source, (d, h, w)), out, statistics)

    def _interpolated(self, source: int, box: Sequence[tuple[int, int]]) -> Tensor:
        """A part of a trilinear doubling, which is a blurred nearest doubling."""
        nearest = self._repeated(source, [(first - 1, last + 1) for first, last in box], 2)
        out = scratch_tile(nearest, nearest.shape[1], [last - first for first, last in box])
        blur3d(nearest, [0] * 6, out)
        return out

    def _repeated(self, source: int, box: Sequence[tuple[int, int]], zoom: int) -> Tensor:
        """A part of a tensor, each plane `zoom` times, that goes on beyond the border with the outermost planes."""
        size = self.plan.shapes[source].size(self.plan.size)
        chosen = [[min(max(i // zoom, 0), n - 1) for i in range(*planes)] for planes, n in zip(box, size)]
        places = [(planes[0], planes[-1] + 1) for planes in chosen]
        x = self._planes(source, *places[0])[:, :, :, slice(*places[1]), slice(*places[2])].permute(0, 2, 3, 4, 1)
        for axis, planes in enumerate(chosen, 1):
            if len(planes) != x.shape[axis]:
                x = x.index_select(axis, torch.tensor(planes, device=x.device) - planes[0])
        return x.permute(0, 4, 1, 2, 3)

    def _padded(self, source: int, box: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        """What there is of a part of a tensor, and the planes that it lacks: before D, after D, before H, …"""
        size = self.plan.shapes[source].size(self.plan.size)
        places = [(max(first, 0), min(last, n)) for (first, last), n in zip(box, size)]
        pads = [n for (first, last), place in zip(box, places) for n in (place[0] - first, last - place[1])]
        return self._planes(source, *places[0])[:, :, :, slice(*places[1]), slice(*places[2])], pads

    def _blur(
        self,
        layer: Blur,
        t: int,
        d: tuple[int, int],
        h: tuple[int, int],
        w: tuple[int, int],
        out: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """One tile of a convolution of a trilinear doubling: the volume's outermost voxels, then what is inside."""
        box, size = (d, h, w), self.plan.shapes[t].size(self.plan.size)
        y = scratch_tile(out, layer.channels, out.shape[2:])
        for axis, ((first, last), n) in enumerate(zip(box, size)):
            for plane in {0, n - 1} & {first, last - 1}:
                part = y.narrow(2 + axis, plane - first, 1)
                part.copy_(self._border(layer, size, (*box[:axis], (plane, plane + 1), *box[axis + 1 :])))
        blur3d(*self._padded(layer.source, [(first - 1, last + 1) for first, last in box]), y)
        write_tile(y, out, statistics)

    def _border(self, layer: Blur, size: Sequence[int], box: Sequence[tuple[int, int]]) -> Tensor:
        """A part of a convolution of a trilinear doubling, as it is defined."""
        around, pads = [], []
        for (first, last), n in zip(box, size):
            around.append((max(first - 1, 0), min(last + 1, n)))
            pads = [int(first == 0), int(last == n), *pads]
        return conv3d(F.pad(self._interpolated(layer.origin, around), pads), layer.weight, layer.bias)

    def _conv_writer(self, p: Pass, t: int, start: int, stop: int) -> Callable:
        """What writes a tile of these planes: write(its place along H, along W, out, statistics)."""
        layer = self.layers[t - 1]
        halo, zoom, size = layer.weight.shape[2] // 2, 1 + layer.upsample, self.plan.shapes[t].size(self.plan.size)
        if t not in self.folds:
            self.folds[t] = self._fold(layer.norm, layer.source)
        scale, shift = self.folds[t]

        def read(first: int, last: int, n: int) -> tuple[int, int, list[int]]:
            pads = [int(first < halo), int(last + halo > n)]
            return max(first - halo, 0) // zoom, (min(last + halo, n) + zoom - 1) // zoom, pads

        first, last, pads = read(start, stop, size[0])
        x = self._planes(layer.source, first, last)
        shortcut, shortcut_bias, added = layer.residual_weight, layer.residual_bias, None
        if t in p.merged:
            shortcut = shortcut_bias = None
        elif layer.residual is not None:
            added = self._planes(layer.residual, start, stop)

        def write(h: tuple[int, int], w: tuple[int, int], out: Tensor, statistics: Tensor | None) -> None:
            top, bottom, pads_h = read(*h, size[1])
            left, right, pads_w = read(*w, size[2])
            residual = None if added is None else added[:, :, :, slice(*h), slice(*w)]
            if t in p.merged:
                residual = self._merged_shortcut(t, (start, stop), h, w)
            norm_silu_conv3d(
                x[:, :, :, top:bottom, left:right], scale, shift, layer.silu, layer.upsample, layer.weight, layer.bias,
                [*pads, *pads_h, *pads_w], residual, shortcut, shortcut_bias, out, statistics,
            )  # fmt: skip

        return write

    def _merged_shortcut(self, t: int, d: tuple[int, int], h: tuple[int, int], w: tuple[int, int]) -> Tensor:
        up = self.layers[self.layers[t - 1].residual - 1]
        first, last = d[0] - d[0] % 2, d[1] + d[1] % 2
        size = (last - first, h[1] - h[0], w[1] - w[0])
        out = scratch_tile(self.z, self.layers[t - 1].channels, size)
        self._write_up(up.source, *self.merged[t], up.replicate, (first, last), h, w, out, None)
        return out[:, :, d[0] - first : d[1] - first]

    def _attend(self, p: Pass, layer: Attention, out: Tensor, moments: _Moments | None) -> None:
        x = self.whole[layer.source].planes(0, out.shape[2])
        norm, tokens = layer.norm, out[0, 0].numel()
        rows = group_norm_silu(x, norm.groups, norm.weight, norm.bias, norm.eps, silu=False)
        rows = rows.permute(0, 2, 3, 4, 1).reshape(1, tokens, -1)
        heads = volume_attention(linear(rows, layer.qkv_weight, layer.qkv_bias), layer.heads)
        heads = heads.view(1, *out.shape[2:], -1).permute(0, 4, 1, 2, 3)
        statistics = None
        if moments is not None:
            statistics = torch.empty(1, 2, layer.channels, dtype=torch.float32, device=out.device)
            moments.counts.append(tokens)
            moments.parts.append(statistics[0])
        norm_silu_conv3d(heads, None, None, False, False, layer.out_weight, layer.out_bias, [0] * 6, x, None, None, out,
                         statistics)  # fmt: skip


def _parts(length: int, share: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + share, length)) for a in range(0, length, share))
