"""Patch-Volume autoencoder: patches are encoded by themselves, the volume is decoded jointly
(Wang et al., TMI 2025, section III-B)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddiff.config import AutoencoderConfig
from meddiff.decode import Attention, Conv, Layer, Norm, OnSlab, UpConv, decode_jointly
from meddiff.kernels.patchify import patchify
from meddiff.kernels.vq_fused import vq_decode, vq_encode
from meddiff.models.blocks import GroupNorm, Linear, attend_over_volume, conv1, conv3, down_conv, up_conv
from meddiff.models.codebook import Codebook
from meddiff.progress import progress as bar
from meddiff.resources import available_bytes

_NORM_EPS = 1e-6
_HEADS, _HEAD_DIM = 4, 32
_MOST_PATCHES = 32  # in a batch
_SHARE_OF_FREE = 0.9  # of the free memory; others need some too


class ResBlock(nn.Module):
    """Pre-activation residual block: `shortcut(x) + conv(norm(conv(norm(x))))`, SiLU being a part of the norm."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, _NORM_EPS)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, _NORM_EPS)
        self.conv2 = conv3(out_channels, out_channels)
        same_width = in_channels == out_channels
        self.resConv = nn.Identity() if same_width else conv1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return h.add_(self.resConv(x))


class AttentionBlock(nn.Module):
    """Self-attention over all voxels, added to the un-normalised input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, _NORM_EPS, silu=False)
        self.to_qkv = Linear(channels, 3 * _HEADS * _HEAD_DIM, bias=False)
        self.to_out = conv1(_HEADS * _HEAD_DIM, channels)

    def forward(self, x: Tensor) -> Tensor:
        return attend_over_volume(self.norm(x), self.to_qkv, self.to_out, _HEADS).add_(x)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.res1 = ResBlock(channels, channels, groups)
        self.attn = AttentionBlock(channels, groups)
        self.res2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.attn(self.res1(x)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_trans = up_conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_trans(x)


class Level(nn.Module):
    """Two residual blocks at one resolution, then the change of resolution, named `down` or `up`, if there is one."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.res1 = ResBlock(in_channels, out_channels, groups)
        self.res2 = ResBlock(out_channels, out_channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Patches [B, 1, p, p, p] → [B, 8, p/f, p/f, p/f], f being the downsampling factor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.num_groups
        self.conv_first = conv3(config.image_channels, widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, groups)
            if i < config.levels:
                level.down = down_conv(width)
            self.conv_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups)
        self.final_block = nn.Sequential(
            GroupNorm(groups, widths[-1], _NORM_EPS), nn.Identity(), conv3(widths[-1], config.embedding_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_first(x)
        for level in self.conv_blocks:
            h = level(h)
        return self.final_block(self.mid_block(h))


class Decoder(nn.Module):
    """A whole latent [B, 8, d, h, w] → volume [B, 1, f·d, f·h, f·w]. Its norms and attention span all of the latent."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.num_groups
        self.conv_first = conv3(config.embedding_dim, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, groups)
            if i < config.levels:
                level.up = Upsample(width)
            self.conv_blocks.append(level)
        self.final_block = nn.Sequential(
            GroupNorm(groups, widths[-1], _NORM_EPS), nn.Identity(), conv3(widths[-1], config.image_channels)
        )

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_first(z))
        for level in self.conv_blocks:
            h = level(h)
        return self.final_block(h)

    def layers(self) -> list[Layer]:
        """The decoder in the vocabulary of `meddiff.decode`, for planning and for decoding in slabs."""
        chain: list[Layer] = [Conv("conv_first", 0, self.conv_first.weight, self.conv_first.bias)]

        def residual(name: str, block: ResBlock) -> None:
            x, shortcut = len(chain), block.resConv
            for i, (norm, conv) in enumerate(((block.norm1, block.conv1), (block.norm2, block.conv2)), 1):
                layer = Conv(f"{name}.conv{i}", len(chain), conv.weight, conv.bias, _norm(norm), silu=True)
                if i == 2:
                    layer = replace(layer, residual=x)
                if i == 2 and isinstance(shortcut, nn.Conv3d):
                    layer = replace(layer, residual_weight=shortcut.weight, residual_bias=shortcut.bias)
                chain.append(layer)

        residual("mid_block.res1", self.mid_block.res1)
        attn = self.mid_block.attn
        out = attn.to_out
        chain.append(
            Attention(
                "mid_block.attn", len(chain), _norm(attn.norm), attn.to_qkv.weight, None, out.weight, out.bias, _HEADS
            )
        )
        residual("mid_block.res2", self.mid_block.res2)
        for i, level in enumerate(self.conv_blocks):
            residual(f"conv_blocks.{i}.res1", level.res1)
            residual(f"conv_blocks.{i}.res2", level.res2)
            if hasattr(level, "up"):
                up = level.up.conv_trans
                chain.append(UpConv(f"conv_blocks.{i}.up", len(chain), up.weight, up.bias))
        norm, _, conv = self.final_block
        chain.append(Conv("final_block", len(chain), conv.weight, conv.bias, _norm(norm), silu=True))
        return chain


def _norm(layer: nn.GroupNorm) -> Norm:
    return Norm(layer.num_groups, layer.weight, layer.bias, layer.eps)


class PatchVolumeAutoencoder(nn.Module):
    """The Patch-Volume autoencoder, with its codebook.

    `encode` → `quantize` → `decode`; calling the module does all three. Volumes are [B, 1, D, H, W] in [-1, 1],
    latents float32 [B, 8, d, h, w]. Parameters and activations are kept in the channels-last memory format.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.pre_vq_conv = conv1(config.embedding_dim, config.embedding_dim)
        self.post_vq_conv = conv1(config.embedding_dim, config.embedding_dim)
        self.codebook = Codebook(config.n_codes, config.embedding_dim)
        self.to(memory_format=torch.channels_last_3d)

    @property
    def dtype(self) -> torch.dtype:
        return self.pre_vq_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.pre_vq_conv.weight.device

    def encode(
        self,
        x: Tensor,
        patch_batch: int | None = None,
        progress: bool = False,
        window: tuple[float, float] | None = None,
    ) -> Tensor:
        """Encode a volume patch by patch.

        Args:
            x: [B, 1, D, H, W] in [-1, 1], any floating dtype, strides and device; patches are moved one batch at a
                time. A size that is no multiple of the patch is padded with its edge values, at the far end of each
                axis.
            patch_batch: patches per batch; None chooses a number that fits the device's free memory.
            progress: show a progress bar.
            window: the values of x that become -1 and 1, where x is in original units and may be int16 or uint8.

        Returns:
            The latent before quantisation, float32 [B, 8, d, h, w] with d = ceil(D / p) · p / f.

        Raises:
            ValueError: if x is not [B, 1, D, H, W] or empty.
            TypeError: if x is not a floating tensor and has no window.
        """
        features, size = self._encode_patches(x, patch_batch, progress, window)
        return vq_encode(features, self.pre_vq_conv.weight, self.pre_vq_conv.bias, None, size)[0]

    def encode_to_codes(
        self,
        x: Tensor,
        patch_batch: int | None = None,
        progress: bool = False,
        window: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`encode` and `quantize` in one: latent, indices int64 [B, d, h, w], code rows float32 [B, 8, d, h, w]."""
        return self.quantize_patches(*self._encode_patches(x, patch_batch, progress, window))[:3]

    def quantize_patches(
        self, features: Tensor, size: Sequence[int], statistics: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The encoder's patches [n, 8, q, q, q], `pre_vq_conv`, and the codes of the latents [B, 8, *size] they make.

        Returns latent, indices and code rows, which have the latent's gradient, and if wanted the statistics that
        `Codebook.update` takes; see `meddiff.kernels.vq_fused.vq_encode`.
        """
        conv, codes = self.pre_vq_conv, self.codebook.embeddings
        return vq_encode(features, conv.weight, conv.bias, codes, tuple(size), rows=True, statistics=statistics)

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, 8, d, h, w] → (indices int64 [B, d, h, w], code rows float32 [B, 8, d, h, w])."""
        return self.codebook.quantize(latent)

    def decode(
        self,
        indices: Tensor,
        joint: bool = True,
        tile: int = 256,
        memory_budget: int | None = None,
        on_slab: OnSlab | None = None,
        progress: bool = False,
    ) -> Tensor | None:
        """Decode code indices to a volume. The joint decode has no gradient; train through `decoder`.

        Args:
            indices: int64 [B, d, h, w], each in [0, n_codes).
            joint: decode the whole latent at once, so that norms and attention see all of it. False reproduces the
                published disjoint tiles, for comparison: each has its own statistics, and seams show between them.
            tile: edge of a disjoint tile in voxels, a multiple of the downsampling factor; only for joint=False.
            memory_budget: bytes that the joint decode may take beside the weights; None is what is free. Where whole
                tensors do not fit, they are computed in slabs, some of them more than once: the same result in less
                memory and more time (`meddiff.decode`).
            on_slab: called as on_slab(slab, sample, start) with the finished planes [1, 1, n, H, W] from plane `start`
                on, in their order; the whole volume never exists then. What it raises ends the decoding.
            progress: show a progress bar.

        Returns:
            [B, 1, f·d, f·h, f·w] in the model's dtype; None with `on_slab`.

        Raises:
            ValueError: for a wrong shape, an index out of range, a tile that does not fit the latent grid, or `on_slab`
                with joint=False.
            MemoryError: if no plan fits into the budget or into what is free; the message says the least that works.
            FloatingPointError: if a layer's output is not finite; the message names it.
        """
        f = self.config.downsample
        if indices.ndim != 4 or indices.numel() == 0:
            raise ValueError(f"decode: indices must be a non-empty [B, d, h, w], got {tuple(indices.shape)}")
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= self.config.n_codes:
            raise ValueError(
                f"decode: indices must lie in [0, {self.config.n_codes}), got {low} to {high}; "
                "do they belong to this codebook?"
            )
        rows = F.embedding(indices.to(self.device), self._code_table()).permute(0, 4, 1, 2, 3)
        if joint:
            return self._decode_jointly(rows, memory_budget, on_slab, progress)

        if on_slab is not None:
            raise ValueError("decode: on_slab is for the joint decode, and joint is False")
        if tile < f or tile % f:
            raise ValueError(f"decode: tile must be a positive multiple of {f} voxels, got {tile}")
        warnings.warn(
            "decode(joint=False) gives every tile its own normalisation and attention: seams show between tiles",
            stacklevel=2,
        )
        t = tile // f
        volume = rows.new_empty(
            (rows.shape[0], self.config.image_channels, *(n * f for n in rows.shape[2:])), dtype=self.dtype
        )
        for i, j, k in product(*(range(0, n, t) for n in rows.shape[2:])):
            piece = self._decode_jointly(rows[:, :, i : i + t, j : j + t, k : k + t], memory_budget, None, False)
            d, h, w = piece.shape[2:]
            volume[:, :, i * f :, j * f :, k * f :][..., :d, :h, :w] = piece
        return volume

    def decode_latent(
        self,
        latent: Tensor,
        memory_budget: int | None = None,
        on_slab: OnSlab | None = None,
        progress: bool = False,
    ) -> Tensor | None:
        """Decode a latent in the denoiser's range, jointly: un-scaled, quantised and decoded.

        Args:
            latent: float [B, 8, d, h, w], as `LatentScale.scale` makes it.
            memory_budget, on_slab, progress: as for `decode`.

        Returns:
            [B, 1, f·d, f·h, f·w] in the model's dtype; None with `on_slab`.

        Raises:
            ValueError: for a wrong or empty shape.
            MemoryError, FloatingPointError: as `decode`.
        """
        channels = self.config.embedding_dim
        if latent.ndim != 5 or latent.shape[1] != channels or latent.numel() == 0:
            raise ValueError(
                f"decode_latent: latent must be a non-empty [B, {channels}, d, h, w], got {tuple(latent.shape)}"
            )
        scale = self.codebook.latent_scale()
        extremes = (scale.minimum, scale.maximum)
        _, rows = vq_decode(latent.to(self.device), self.codebook.embeddings, self._code_table(), extremes)
        return self._decode_jointly(rows, memory_budget, on_slab, progress)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x [B, 1, D, H, W]: encode, quantise, decode jointly, crop to x's size."""
        d, h, w = x.shape[-3:]
        return self.decode(self.encode_to_codes(x)[1])[..., :d, :h, :w]

    @torch.no_grad()
    def _decode_jointly(
        self, rows: Tensor, budget: int | None, on_slab: OnSlab | None, progress: bool
    ) -> Tensor | None:
        free = available_bytes(self.device)
        if free is not None:
            free = int(_SHARE_OF_FREE * free)
            budget = free if budget is None else min(budget, free)
        return decode_jointly(self.decoder.layers(), rows, budget, on_slab, progress)

    def _encode_patches(
        self, x: Tensor, patch_batch: int | None, progress: bool, window: tuple[float, float] | None
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """The encoder's output for all patches of x, and the size of the latents that they make up."""
        channels, p = self.config.image_channels, self.config.patch_size
        if x.ndim != 5 or x.shape[1] != channels or x.numel() == 0:
            raise ValueError(f"encode: x must be a non-empty [B, {channels}, D, H, W], got {tuple(x.shape)}")
        if not x.is_floating_point() and window is None:
            raise TypeError(f"encode: x must be a floating tensor scaled to [-1, 1], got {x.dtype}; or give its window")
        grid = [math.ceil(n / p) for n in x.shape[2:]]
        if patch_batch is None:
            patch_batch = self._patches_that_fit()
        starts = range(0, x.shape[0] * math.prod(grid), patch_batch)
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" and x.device.type == "cpu" else None
        features = []
        for start in bar("encoding")(starts) if progress else starts:
            patches = patchify(x, p, self.dtype, window, start, start + patch_batch)
            features.append(self.encoder(patches.to(self.device) if copies is None else self._copy(patches, copies)))
        d, h, w = (g * (p // self.config.downsample) for g in grid)
        return torch.cat(features), (d, h, w)

    def _copy(self, patches: Tensor, copies: torch.cuda.Stream) -> Tensor:
        """Patches on the GPU, copied by a stream of its own while the ones before are encoded, and the next are cut.

        No GPU has run this yet.
        """
        with torch.cuda.stream(copies):
            there = patches.pin_memory().to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(copies)
        there.record_stream(current)
        return there

    def _code_table(self) -> Tensor:
        """What `post_vq_conv` makes of every code: [n_codes, 8] in the model's dtype."""
        conv = self.post_vq_conv
        return F.linear(self.codebook.embeddings.to(self.dtype), conv.weight.flatten(1), conv.bias)

    def _patches_that_fit(self) -> int:
        """On a GPU as many patches as half of its free memory holds, and no more than keep it busy, so that copies
        overlap; on a CPU one, which stays in cache."""
        free = available_bytes(self.device) if self.device.type == "cuda" else None
        if free is None:
            return 1
        # The widest moment is a residual block of the finest level: input, norm, two convolution outputs.
        patch_bytes = 4 * self.config.n_hiddens * self.config.patch_size**3 * self.dtype.itemsize
        return max(1, min(_MOST_PATCHES, free // 2 // patch_bytes))
