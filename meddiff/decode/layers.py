"""The vocabulary of primitive layers that a decoder is written in, so that planning and running know no class of it.

A chain is a sequence of layers. Tensor 0 is the latent, layer i writes tensor i + 1, and reads tensors that were
written before. Tensors are [B, C, D, H, W]; weights may lie on the meta device where only a plan is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """GroupNorm over the whole tensor; weight and bias [C]."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Conv:
    """`conv(up(silu(norm(source)))) + shortcut(residual)`: norm, SiLU, nearest doubling and residual as they are given.

    weight: [O, C, 3, 3, 3] with zero padding 1, or [O, C, 1, 1, 1].
    residual: the tensor that is added, of O channels as it is, or of R through the 1³ convolution residual_weight
        [O, R, 1, 1, 1].
    """

    name: str
    source: int
    weight: Tensor
    bias: Tensor | None = None
    norm: Norm | None = None
    silu: bool = False
    upsample: bool = False
    residual: int | None = None
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    @property
    def doubles(self) -> bool:
        return self.upsample


@dataclass(frozen=True, eq=False)
class UpConv:
    """Transposed convolution 4³ with stride 2 and padding 1; weight [C, O, 4, 4, 4].

    replicate: beyond the border the source goes on with its outermost voxels, instead of zeros.
    """

    name: str
    source: int
    weight: Tensor
    bias: Tensor | None = None
    replicate: bool = False

    norm = residual = residual_weight = None
    doubles = True

    @property
    def channels(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True, eq=False)
class Attention:
    """`source + out(attention(norm(source)))` with every voxel as a token; only at the latent's size.

    qkv_weight: [3·heads·head_dim, C], its rows in the order q, k, v and each head-major; qkv_bias the same or none.
    out_weight: [C, heads·head_dim, 1, 1, 1]; out_bias [C] or none.
    """

    name: str
    source: int
    norm: Norm
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    heads: int

    residual = residual_weight = None
    doubles = False

    @property
    def channels(self) -> int:
        return self.out_weight.shape[0]


@dataclass(frozen=True, eq=False)
class Interpolate:
    """Trilinear doubling, as of `F.interpolate(source, scale_factor=2, mode="trilinear")`."""

    name: str
    source: int
    channels: int

    norm = residual = residual_weight = None
    doubles = True


@dataclass(frozen=True, eq=False)
class Blur:
    """A convolution of a trilinear doubling, made of the same convolution of the nearest doubling: see
    `meddiff.kernels.blur3d`.

    source: an `UpConv` with `nearest_up_weight`, that replicates.
    origin: the tensor that is doubled, of which the outermost voxels are made.
    weight: [O, C, 3, 3, 3]; bias [O] or none: of the convolution, which is with zero padding 1.
    """

    name: str
    source: int
    origin: int
    weight: Tensor
    bias: Tensor | None = None

    norm = residual = residual_weight = None
    doubles = False

    @property
    def channels(self) -> int:
        return self.weight.shape[0]


Layer = Conv | UpConv | Interpolate | Blur | Attention


@dataclass(frozen=True)
class Shape:
    """Of a tensor: its channels and how often the latent's lengths were doubled."""

    channels: int
    doublings: int

    def size(self, latent: Sequence[int]) -> tuple[int, int, int]:
        d, h, w = (n << self.doublings for n in latent)
        return d, h, w

    def voxels(self, latent: Sequence[int]) -> int:
        return math.prod(self.size(latent))


def shapes(layers: Sequence[Layer], channels: int) -> list[Shape]:
    """Of all tensors, the latent's first. ValueError, naming the layer, for a chain that does not fit together."""
    found = [Shape(channels, 0)]
    for i, layer in enumerate(layers, 1):
        if not 0 <= layer.source < i or (layer.residual is not None and not 0 <= layer.residual < i):
            raise ValueError(f"decode: {layer.name} must read tensors that are written before it")
        source = found[layer.source]
        if isinstance(layer, Interpolate):
            wanted = layer.channels
        elif isinstance(layer, UpConv):
            wanted = layer.weight.shape[0]
        elif isinstance(layer, Blur):
            wanted = layer.channels
        else:
            wanted = (layer.qkv_weight if isinstance(layer, Attention) else layer.weight).shape[1]
        if wanted != source.channels:
            raise ValueError(f"decode: {layer.name} reads {wanted} channels, and its source has {source.channels}")
        shape = Shape(layer.channels, source.doublings + layer.doubles)
        if isinstance(layer, Attention) and shape.doublings:
            raise ValueError(f"decode: {layer.name} must come before the first doubling; attention is global")
        if layer.residual is not None:
            extra = found[layer.residual]
            through = layer.channels if layer.residual_weight is None else layer.residual_weight.shape[1]
            if extra.doublings != shape.doublings or extra.channels != through:
                raise ValueError(f"decode: {layer.name} adds {through} channels of its size, and gets {extra}")
        found.append(shape)
    return found
