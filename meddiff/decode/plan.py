"""Which tensors of a decoder are kept, and in what slabs and tiles it is computed, so that it fits into a budget.

GroupNorm needs the statistics of a whole tensor before any voxel of it can be normalised, so every tensor is visited in
a pass of its own, slab by slab along D, and gathers its statistics in it. In between a tensor is

    kept        whole, in memory of its own;
    rolling     whole, in the memory of a tensor that its pass reads for the last time, a slab behind the reader;
    recomputed  not whole: each pass that reads it computes it again, in a window of planes that moves with the slabs;
    parked      whole, in host memory (of a GPU's plan), and read through such a window.

A window hands on what it still holds, so a recomputed plane is computed once per pass, whatever the slabs are. What is
doubled is always whole; so every resolution is planned by itself, and the budget is met by each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch

from meddiff.decode.layers import Attention, Blur, Conv, Interpolate, Layer, Shape, UpConv, shapes
from meddiff.kernels.direct_conv3d import direct_bytes, direct_serves
from meddiff.kernels.winograd import winograd_bytes, winograd_suits

KEPT, ROLLING, RECOMPUTED, PARKED = "kept", "rolling", "recomputed", "parked"
# (planes of a slab, voxels of a tile), from the fastest to the smallest
_CUTS = ((16, 2**18), (8, 2**17), (4, 2**16), (2, 2**15), (1, 2**14))
_TILE_WIDTH = 128  # voxels along W
_TILE_BYTES = 3 * 2**23  # of the widest tensor: scratch beyond 32 MiB is new memory from the system in every call
_MOST_CHOICES = 8  # tensors of one resolution whose storage is searched; more of them are kept


@dataclass(frozen=True)
class Device:
    """What estimates of time are made of. Measured where a comment says so, else a part of the maker's figures."""

    flops: dict[torch.dtype, float]  # per second, of convolutions
    attention_flops: float  # per second
    bandwidth: float  # bytes per second
    link: float  # bytes per second to and from host memory
    call: float  # seconds until an operator of a tile has begun


# per core of two with AVX-512 and bfloat16: measured
_CORE = Device({torch.bfloat16: 425e9, torch.float32: 185e9}, 70e9, 18e9, 18e9, 1e-4)
_GPUS = {
    # dense products and copies of an H200 measured; convolutions are taken at half of the products
    "H200": Device({torch.bfloat16: 4e14, torch.float16: 4e14, torch.float32: 3e13}, 2e14, 4.3e12, 5e10, 1e-5),
    "H100": Device({torch.bfloat16: 4e14, torch.float16: 4e14, torch.float32: 3e13}, 2e14, 2.9e12, 5e10, 1e-5),
    "": Device({torch.bfloat16: 1.2e14, torch.float16: 1.2e14, torch.float32: 1e13}, 6e13, 1.3e12, 2e10, 1e-5),
}


def device_figures(device: torch.device) -> Device:
    """The line of the table for a device; a CPU is its threads times one core."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
        return next(figures for key, figures in _GPUS.items() if key in name)
    n = torch.get_num_threads()
    flops = {dtype: n * rate for dtype, rate in _CORE.flops.items()}
    return Device(flops, n * _CORE.attention_flops, n * _CORE.bandwidth, n * _CORE.link, _CORE.call)


@dataclass(frozen=True)
class Pass:
    """One visit of a tensor.

    target: the tensor.
    stored: whether it is whole after the pass; otherwise its statistics are all that remain.
    windows: tensors that are read through a window, recomputed or parked ones, in the order of their numbers.
    merged: tensors whose 1³ shortcut is made one transposed convolution with the up-convolution that it reads.
    planes, tile: of a slab along D, and of its tiles along H and W, in voxels of the target.
    """

    target: int
    stored: bool
    windows: tuple[int, ...]
    merged: frozenset[int]
    planes: int
    tile: tuple[int, int]
    peak_bytes: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `decode_jointly` runs, for one sample after another.

    size: the latent's (d, h, w).
    storage: of each tensor, the latent's first.
    over: rolling tensor → the tensor whose memory it takes.
    passes: in their order.
    peak_bytes: beside the weights, the volume included where it is not streamed.
    flops, seconds: of the whole batch; the seconds are an estimate.
    """

    names: tuple[str, ...]
    size: tuple[int, int, int]
    batch: int
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    storage: tuple[str, ...]
    over: dict[int, int]
    passes: tuple[Pass, ...]
    peak_bytes: int
    flops: float
    seconds: float

    def tensor_bytes(self, t: int) -> int:
        return self.shapes[t].channels * self.shapes[t].voxels(self.size) * self.dtype.itemsize

    @cached_property
    def headroom(self) -> dict[int, int]:
        """Planes in front of a whole tensor, for those that roll over it."""
        return _headroom(self.over, {p.target: p.planes for p in self.passes if p.stored})

    def table(self) -> str:
        """One line per tensor: its number, size and storage, and the pass that computes it."""
        rows = [("", "tensor", "size", "MB", "storage", "slab", "tile", "windows", "peak MB", "TFLOP", "estimate")]
        by_target = {p.target: p for p in self.passes}
        for t in range(1, len(self.shapes)):
            shape, p = self.shapes[t], by_target.get(t)
            size = "×".join(map(str, (shape.channels, *shape.size(self.size))))
            storage = self.storage[t] + (f" over {self.over[t]}" if t in self.over else "")
            cells = [str(t), self.names[t], size, f"{self.tensor_bytes(t) / 1e6:.1f}", storage]
            if p is None:
                rows.append((*cells, "", "", "", "", "", ""))
                continue
            windows = " ".join(map(str, p.windows)) + (" merged" if p.merged else "")
            cells += [str(p.planes), "×".join(map(str, p.tile)), windows]
            rows.append((*cells, f"{p.peak_bytes / 1e6:.1f}", f"{p.flops / 1e12:.3f}", _time(p.seconds)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        total = f"peak {in_words(self.peak_bytes)} beside the weights, {self.flops / 1e12:.3f} TFLOP, "
        return "\n".join([*lines, total + f"{_time(self.seconds)} (estimated)"])


def in_words(n: float) -> str:
    """Bytes, in GB or MB of three digits."""
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _headroom(over: dict[int, int], planes: dict[int, int]) -> dict[int, int]:
    room: dict[int, int] = {}
    for t in sorted(over, reverse=True):  # who rolls over t comes after it
        room[over[t]] = room.get(t, 0) + planes[t] + 2
    return room


def make_plan(
    layers: Sequence[Layer],
    latent: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    budget: int | None = None,
    streamed: bool = False,
) -> Plan:
    """The fastest plan, by the estimate, that fits.

    Args:
        layers: see `meddiff.decode.layers`; the last one writes the volume.
        latent: (B, C, d, h, w).
        dtype: of weights and activations.
        device: that it runs on; a table of devices gives the estimate of time.
        budget: bytes beside the weights; None is without a limit.
        streamed: finished slabs go to a callback, so that the volume is never whole.

    Raises:
        ValueError: for layers or a latent that do not fit together.
        MemoryError: if no plan fits; the message says what the least is.
    """
    batch, channels, *size = latent
    plan = _Planner(layers, tuple(size), batch, channels, dtype, device, streamed)
    return plan.make(math.inf if budget is None else budget)


class _Planner:
    def __init__(
        self,
        layers: Sequence[Layer],
        size: tuple[int, int, int],
        batch: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        streamed: bool,
    ) -> None:
        self.layers, self.size, self.batch, self.dtype, self.device = layers, size, batch, dtype, device
        self.shapes = shapes(layers, channels)
        self.last = len(layers)
        self.figures, self.itemsize = device_figures(device), dtype.itemsize
        volume = self.tensor_bytes(self.last)
        # there all the time
        self.base = batch * self.tensor_bytes(0) + (0 if streamed else batch * volume)
        self.normalised = {layer.source for layer in layers if isinstance(layer, Conv) and layer.norm is not None}
        self.doubled = {layer.source for layer in layers if layer.doubles}
        self.segments: list[list[int]] = []
        for t in range(1, self.last + 1):
            if t == 1 or self.shapes[t].doublings != self.shapes[t - 1].doublings:
                self.segments.append([])
            self.segments[-1].append(t)

    def layer(self, t: int) -> Layer:
        return self.layers[t - 1]

    def tensor_bytes(self, t: int) -> int:
        return self.plane_bytes(t) * self.shapes[t].size(self.size)[0]

    def plane_bytes(self, t: int) -> int:
        _, h, w = self.shapes[t].size(self.size)
        return self.shapes[t].channels * h * w * self.itemsize

    def make(self, budget: float) -> Plan:
        best = [self._best(segment, budget) for segment in self.segments]
        least = max(found[0].peak for found in best)
        if least > budget:
            d, h, w = self.shapes[-1].size(self.size)
            raise MemoryError(
                f"decode: {d}×{h}×{w} voxels in {str(self.dtype).removeprefix('torch.')} need at least "
                f"{in_words(least)} beside the weights, and the budget is {in_words(budget)}; free some memory, "
                "decode a smaller volume, or use bfloat16 where float32 is set"
            )
        chosen = [found[1] for found in best]
        storage = [KEPT] * (self.last + 1)
        over: dict[int, int] = {}
        for part in chosen:
            for t, kind in part.storage.items():
                storage[t] = kind
            over |= part.over
        passes = tuple(p for part in chosen for p in part.passes)
        return Plan(
            ("latent", *(layer.name for layer in self.layers)),
            self.size,
            self.batch,
            self.dtype,
            tuple(self.shapes),
            tuple(storage),
            over,
            passes,
            max(part.peak for part in chosen),
            self.batch * sum(p.flops for p in passes),
            self.batch * sum(p.seconds for p in passes),
        )

    def _best(self, segment: list[int], budget: float) -> tuple[_Candidate, _Candidate]:
        """Of one resolution: the candidate with the least peak, and the fastest one within the budget, if any."""
        candidates = self._candidates(segment)
        first = next(candidates)  # recomputes nothing, in the largest slabs
        if first.peak <= budget:
            return first, first
        least = min(candidates := [first, *candidates], key=lambda candidate: candidate.peak)
        fitting = [candidate for candidate in candidates if candidate.peak <= budget]
        return least, min(fitting, key=lambda candidate: (candidate.seconds, candidate.peak), default=least)

    def _candidates(self, segment: list[int]) -> Iterator[_Candidate]:
        free = [t for t in segment if t not in self.doubled and t != self.last]
        if any(isinstance(self.layer(t), Attention) for t in segment):
            free = []
        kept = free[:-_MOST_CHOICES]
        kinds = [KEPT, RECOMPUTED] + ([PARKED] if self.device.type == "cuda" else [])
        for cut in _CUTS:
            yield self._candidate(segment, dict.fromkeys(free, KEPT), cut)
        for choice in product(kinds, repeat=len(free) - len(kept)):
            storage = dict.fromkeys(kept, KEPT) | dict(zip(free[len(kept) :], choice))
            if any(kind != KEPT for kind in choice):
                for cut in _CUTS:
                    yield self._candidate(segment, storage, cut)

    def _candidate(self, segment: list[int], storage: dict[int, str], cut: tuple[int, int]) -> _Candidate:
        """Passes, memory and time of one resolution if its tensors are stored like that."""
        storage = dict.fromkeys(segment, KEPT) | storage
        visits = []  # (tensor, whole tensors that are read, windows, merged)
        for t in segment:
            if storage[t] != RECOMPUTED or t in self.normalised:
                visits.append((t, *self._reads(t, storage)))
        last_use = {t: i for i, (_, reads, _, _) in enumerate(visits) for t in reads}
        planes, tile = self._cut(segment[0], cut)
        over = self._rolling(segment, storage, visits, last_use, planes)
        for t in over:
            storage[t] = ROLLING
        room = _headroom(over, dict.fromkeys(segment, planes))

        live: dict[int, int] = {}  # whole tensor → bytes
        entry = self.layer(segment[0]).source
        if entry:
            live[entry] = self.tensor_bytes(entry)
        passes = []
        for i, (t, _, windows, merged) in enumerate(visits):
            stored = storage[t] != RECOMPUTED
            here = self._even(t, planes)
            if t in over:
                live[t] = live.pop(over[t])
            elif stored and storage[t] == KEPT and t != self.last:
                live[t] = self.tensor_bytes(t) + room.get(t, 0) * self.plane_bytes(t)
            memory = self.base + sum(live.values()) + self._window_bytes(windows, here)
            if storage[t] in (RECOMPUTED, PARKED) or t == self.last:
                memory += min(here, self.shapes[t].size(self.size)[0]) * self.plane_bytes(t)
            memory += max(self._scratch_bytes(c, here, tile, c in merged) for c in self._computed(t, windows, storage))
            flops, seconds = self._cost(t, windows, merged, storage, here, tile)
            passes.append(Pass(t, stored, windows, merged, here, tile, memory, flops, seconds))
            for s in list(live):
                if last_use.get(s, i) <= i and s != t and (s == entry or s not in self.doubled):
                    del live[s]
        return _Candidate(storage, over, tuple(passes))

    def _even(self, t: int, planes: int) -> int:
        return planes + planes % 2 if self.layer(t).doubles else planes

    def _computed(self, t: int, windows: Sequence[int], storage: dict[int, str]) -> list[int]:
        return [w for w in windows if storage[w] == RECOMPUTED] + [t]

    def _reads(self, t: int, storage: dict[int, str]) -> tuple[set[int], tuple[int, ...], frozenset[int]]:
        """What the pass of t reads: whole tensors, windows, and the layers whose shortcut is merged."""
        whole: set[int] = set()
        windows: set[int] = set()
        shortcuts: list[int] = []

        def read(s: int) -> None:
            kind = storage.get(s, KEPT)
            if kind in (KEPT, ROLLING):
                whole.add(s)
            elif s not in windows:
                windows.add(s)
                if kind == RECOMPUTED:
                    visit(s)

        def visit(s: int) -> None:
            layer = self.layer(s)
            read(layer.source)
            if isinstance(layer, Blur):
                read(layer.origin)
            if layer.residual_weight is not None:
                shortcuts.append(s)
            elif layer.residual is not None:
                read(layer.residual)

        visit(t)
        merged = set()
        while shortcuts:
            s = shortcuts.pop()
            wide = self.layer(s).residual
            if storage.get(wide) == RECOMPUTED and wide not in windows and isinstance(self.layer(wide), UpConv):
                merged.add(s)
                read(self.layer(wide).source)
            else:
                read(wide)
        return whole, tuple(sorted(windows)), frozenset(merged)

    def _rolling(self, segment, storage, visits, last_use, planes: int) -> dict[int, int]:
        """Tensors that take the memory of one that their pass reads for the last time."""
        over: dict[int, int] = {}
        for i, (t, reads, _, _) in enumerate(visits):
            depth = self.shapes[t].size(self.size)[0]
            whole_at_once = isinstance(self.layer(t), Attention)
            if storage[t] != KEPT or whole_at_once or t == self.last or t in self.doubled or planes + 2 >= depth:
                continue
            for s in sorted(reads & set(segment)):
                if last_use[s] == i and self.shapes[s] == self.shapes[t] and s not in self.doubled:
                    over[t] = s
                    break
        return over

    def _cut(self, t: int, cut: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Planes of a slab, and a tile of about that many voxels, of even lengths."""
        depth, height, width = self.shapes[t].size(self.size)
        channels = max(self.shapes[t].channels, self.shapes[self.layer(t).source].channels)
        planes, voxels = min(cut[0], depth), min(cut[1], _TILE_BYTES // (channels * self.itemsize))
        w = _share(width, _TILE_WIDTH)
        return planes, (_share(height, max(2, voxels // (planes * w))), w)

    def _window_bytes(self, windows: Sequence[int], planes: int) -> int:
        return sum(window_planes(self.layer(w), planes, self.shapes[w].size(self.size)[0]) * self.plane_bytes(w)
                   for w in windows)  # fmt: skip

    def _scratch_bytes(self, t: int, planes: int, tile: tuple[int, int], merged: bool) -> int:
        """Of one call: the padded tile, the convolution's output, and the shortcut's; or what a kernel needs that has
        neither."""
        layer, (depth, height, width) = self.layer(t), self.shapes[t].size(self.size)
        d, h, w = min(planes, depth), min(tile[0], height), min(tile[1], width)
        source = self.shapes[layer.source].channels
        direct = direct_serves(self.dtype, self.device.type)
        y = layer.channels * d * h * w
        if isinstance(layer, Attention):  # all of it: norm, q, k, v and the heads' output, and what is made of it
            tokens = self.shapes[t].voxels(self.size)
            return (2 * source + 5 * layer.out_weight.shape[1]) * tokens * self.itemsize
        if isinstance(layer, UpConv):
            return self._up_bytes(layer, layer.channels, (d, h, w))
        if isinstance(layer, Blur):  # and a plane of the border: of its doubled source, and of what that gives
            taken, plane = self.shapes[layer.origin].channels, max(h * w, d * max(h, w))
            of_border = direct_bytes(taken, layer.channels, 3, (d, h, w)) if direct else 0
            return (y + 4 * taken * plane + layer.channels * plane) * self.itemsize + of_border
        if isinstance(layer, Interpolate):
            return source * (d + 4) * (h + 4) * (w + 4) * self.itemsize
        halo, shortcut, extra, of_kernel = layer.weight.shape[2] - 1, 0, 0, 0
        if merged:
            extra = layer.channels * (d + 2) * h * w * self.itemsize
        elif layer.residual_weight is not None:
            shortcut = layer.residual_weight.shape[1]
        if direct and halo:
            of_kernel = direct_bytes(source, layer.channels, 3, (d, h, w), shortcut)
        elif self.device.type != "cuda" and self.dtype == torch.float32 and winograd_suits(*layer.weight.shape[:3]):
            of_kernel = winograd_bytes(*layer.weight.shape[:2])
        if direct and halo and not layer.upsample:
            up = self._up_bytes(self.layer(layer.residual), layer.channels, (d + 2, h, w)) if merged else 0
            return extra + max(of_kernel, up)
        taken = source * (d + halo) * (h + halo) * (w + halo)
        if shortcut:
            taken = max(taken, (shortcut + layer.channels) * d * h * w)
        return (y + taken) * self.itemsize + extra + of_kernel

    def _up_bytes(self, layer: UpConv, outputs: int, size: tuple[int, int, int]) -> int:
        """Scratch of a call for outputs of `size`."""
        source = self.shapes[layer.source].channels
        taken = source * math.prod(n // 2 + 2 for n in size)
        if direct_serves(self.dtype, self.device.type):
            return layer.replicate * taken * self.itemsize + direct_bytes(source, outputs, 4, size)
        return ((1 + layer.replicate) * taken + outputs * math.prod(size)) * self.itemsize

    def _cost(self, t, windows, merged, storage, planes: int, tile: tuple[int, int]) -> tuple[float, float]:
        rate = self.figures.flops.get(self.dtype, self.figures.flops[torch.float32])
        flops = seconds = 0.0
        for c in self._computed(t, windows, storage):
            layer, voxels = self.layer(c), self.shapes[c].voxels(self.size)
            of_layer = self._flops(layer, voxels, c in merged)
            d, h, w = self.shapes[c].size(self.size)
            calls = math.ceil(d / planes) * math.ceil(h / tile[0]) * math.ceil(w / tile[1])
            halo = math.prod((n + 2) / n for n in (min(planes, d), min(tile[0], h), min(tile[1], w)))
            traffic = halo * self.tensor_bytes(layer.source) + self.tensor_bytes(c)
            traffic += 0 if layer.residual is None else self.tensor_bytes(layer.residual)
            flops += of_layer
            seconds += of_layer / rate + traffic / self.figures.bandwidth + calls * self.figures.call
            if isinstance(layer, Attention):
                tokens = 4 * voxels**2 * layer.out_weight.shape[1]
                flops, seconds = flops + tokens, seconds + tokens / self.figures.attention_flops
        parked = [w for w in windows if storage[w] == PARKED] + [t] * (storage[t] == PARKED)
        return flops, seconds + sum(map(self.tensor_bytes, parked)) / self.figures.link

    def _flops(self, layer: Layer, voxels: int, merged: bool) -> float:
        if isinstance(layer, Attention):
            return 2.0 * voxels * (layer.qkv_weight.numel() + layer.out_weight.numel())
        if isinstance(layer, Interpolate):
            return 16.0 * voxels * layer.channels  # eight numbers, weighted
        if isinstance(layer, Blur):  # the weight's share of the voxels is the border
            size = self.shapes[self.layers.index(layer) + 1].size(self.size)
            border = voxels - math.prod(max(n - 2, 0) for n in size)
            return 2.0 * (border * layer.weight.numel() + voxels * 12 * layer.channels)
        per_voxel = layer.weight.numel() // 8 if isinstance(layer, UpConv) else layer.weight.numel()
        if merged:
            per_voxel += 8 * layer.channels * self.layer(layer.residual).weight.shape[0]
        elif layer.residual_weight is not None:
            per_voxel += layer.residual_weight.numel()
        return 2.0 * voxels * per_voxel


@dataclass(frozen=True)
class _Candidate:
    storage: dict[int, str]
    over: dict[int, int]
    passes: tuple[Pass, ...]

    @cached_property
    def peak(self) -> int:
        return max(p.peak_bytes for p in self.passes)

    @cached_property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.passes)


def _share(length: int, most: int) -> int:
    """The even length of equal parts of about `most`, of which as few as possible cover `length`."""
    share = math.ceil(length / math.ceil(length / max(most, 2)))
    return share + share % 2


def window_planes(layer: Layer, planes: int, depth: int) -> int:
    """Planes that a window holds for readers of a slab: its halo, and whole pairs of planes where it is doubled."""
    return min(depth, planes + planes % 2 + 4 if layer.doubles else planes + 2)
