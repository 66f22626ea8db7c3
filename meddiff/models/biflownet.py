"""BiFlowNet, the noise estimator: an intra-patch flow (DiT in sub-volumes) feeds an inter-patch flow (3D U-Net)
(Wang et al., TMI 2025, section III-C)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from meddiff.config import DenoiserConfig
from meddiff.kernels.channel_norm import channel_norm
from meddiff.models.blocks import Conv3d, GroupNorm, Linear, attend_over_volume, conv1, conv3, down_conv, up_conv
from meddiff.models.dit import DiTBlock, FinalLayer, position_embedding

_HEADS, _HEAD_DIM = 8, 32
_CHANNEL_NORM_EPS = 1e-5
_FLOW_BLOCKS = 2  # intra-patch blocks before and after the middle ones


class TimestepSinusoid(nn.Module):
    """Timesteps [B] → float32 [B, dim]: sines, then cosines."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(steps * (-math.log(10000) / (half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Convolution, then GroupNorm with scale, shift and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.proj = conv3(in_channels, out_channels)
        self.norm = GroupNorm(groups, out_channels)

    def forward(self, x: Tensor, scale_shift: Sequence[Tensor] = ()) -> Tensor:
        return self.norm(self.proj(x), *scale_shift)


class ResnetBlock(nn.Module):
    """Two blocks around a residual; the condition modulates the first one."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, condition_dim: int | None = None) -> None:
        super().__init__()
        if condition_dim is not None:
            self.mlp = nn.Sequential(nn.SiLU(), Linear(condition_dim, 2 * out_channels))
        self.block1 = Block(in_channels, out_channels, groups)
        self.block2 = Block(out_channels, out_channels, groups)
        same_width = in_channels == out_channels
        self.res_conv = nn.Identity() if same_width else conv1(in_channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        scale_shift = () if condition is None else self.mlp(condition).chunk(2, dim=1)
        h = self.block2(self.block1(x, scale_shift))
        return h + self.res_conv(x)


class ChannelNorm(nn.Module):
    """Normalises over the channels of each voxel, with a gain and no offset."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma.flatten(), _CHANNEL_NORM_EPS)


class VolumeAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = Linear(channels, 3 * _HEADS * _HEAD_DIM, bias=False)
        self.to_out = conv1(_HEADS * _HEAD_DIM, channels)

    def forward(self, x: Tensor) -> Tensor:
        return attend_over_volume(x, self.to_qkv, self.to_out, _HEADS)


class PreNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.fn = VolumeAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class ResidualAttention(nn.Module):
    """`x + attention(norm(x))` over all voxels of a level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fn = PreNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class Residuals(NamedTuple):
    """What a control adds to a BiFlowNet; empty or None where it adds nothing."""

    features: tuple[Tensor, ...] = ()  # [B, dim, D, H, W] each: to those of the intra-patch input blocks
    tokens: Tensor | None = None  # [B, d, h, w, dim]: to what leaves the intra-patch middle
    skips: tuple[Tensor, ...] = ()  # to those of the down path, in its order
    middle: Tensor | None = None  # to what leaves the U-Net's middle


# (noisy latent in the network's dtype, condition [B, 8·dim]) → Residuals; `meddiff.models.Control` is one
ControlFunction = Callable[[Tensor, Tensor], Residuals]


class EncoderHalf(nn.Module):
    """The way through the layers before the output blocks and the up path: what a ControlNet copies.

    Subclasses make the layers.
    """

    config: DenoiserConfig

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.pos_embed.device

    def _embed(self, x: Tensor) -> Tensor:
        """Latent [B, 8, D, H, W] → tokens [B, d, h, w, dim] with their places."""
        window = self.config.sub_volume // self.config.token_patch
        tokens = self.x_embedder["proj"](x).permute(0, 2, 3, 4, 1)
        places = self.pos_embed.view(window, window, window, -1)
        return tokens + places.repeat(*(size // window for size in tokens.shape[1:4]), 1)

    def _to_volume(self, rows: Tensor) -> Tensor:
        """The rows of a final layer → [B, dim, D, H, W]."""
        p = self.config.token_patch
        volume = rearrange(rows, "b d h w (pd ph pw c) -> b (d pd) (h ph) (w pw) c", pd=p, ph=p, pw=p)
        return volume.permute(0, 4, 1, 2, 3)

    def _intra_patch_input(self, tokens: Tensor, condition: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens and features after each of the intra-patch input blocks."""
        skips, features = [], []
        for block, final in self.IntraPatchFlow_input:
            tokens = block(tokens, condition)
            skips.append(tokens)
            features.append(self._to_volume(final(tokens, condition)))
        return skips, features

    def _intra_patch_middle(self, tokens: Tensor, condition: Tensor) -> Tensor:
        for block in self.IntraPatchFlow_mid:
            tokens = block(tokens, condition)
        return tokens

    def _down_path(self, x: Tensor, condition: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What leaves the last level, and the skips, two for each level. The features enter the first levels."""
        skips = []
        for i, (res1, attn1, res2, attn2, down) in enumerate(self.downs):
            if i < len(features):
                x = x + features[i]
            x = attn1(res1(x, condition))
            skips.append(x)
            x = attn2(res2(x, condition))
            skips.append(x)
            x = down(x)
        return x, skips

    def _middle(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.mid_block2(self.mid_spatial_attn(self.mid_block1(x, condition)), condition)


class BiFlowNet(EncoderHalf):
    """Estimates the noise in a latent.

    `denoiser(x, t, y, resolution)` → noise, see `forward`.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        dim, groups = config.dim, config.num_groups
        condition_dim = 8 * dim  # time and class, then resolution: 4·dim each
        widths = [dim * m for m in config.dim_mults]
        levels = len(widths)
        window = config.sub_volume // config.token_patch  # tokens per axis of a sub-volume

        def attention(level: int, channels: int) -> nn.Module:
            return ResidualAttention(channels) if level >= levels - config.attention_levels else nn.Identity()

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, groups, condition_dim)

        def dit(skip: bool = False) -> DiTBlock:
            return DiTBlock(dim, condition_dim, config.num_heads, window, config.mlp_ratio, skip)

        def flow(skip: bool) -> nn.ModuleList:
            final = FinalLayer(dim, condition_dim, config.token_patch)
            return nn.ModuleList([dit(skip), final])

        self.time_mlp = nn.Sequential(TimestepSinusoid(dim), Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, 4 * dim))
        self.cond_emb = nn.Embedding(config.num_classes, 4 * dim)
        self.res_mlp = nn.Sequential(Linear(3, 4 * dim), nn.SiLU(), Linear(4 * dim, 4 * dim))

        self.x_embedder = nn.ModuleDict(
            {"proj": Conv3d(config.channels, dim, kernel_size=config.token_patch, stride=config.token_patch)}
        )
        self.register_buffer("pos_embed", position_embedding(window, dim))
        self.IntraPatchFlow_input = nn.ModuleList(flow(skip=False) for _ in range(_FLOW_BLOCKS))
        self.IntraPatchFlow_mid = nn.ModuleList(dit() for _ in range(config.mid_blocks))
        self.IntraPatchFlow_output = nn.ModuleList(flow(skip=True) for _ in range(_FLOW_BLOCKS))

        self.init_conv = conv3(config.channels, dim)
        self.downs = nn.ModuleList()
        for i, width in enumerate(widths):
            down = down_conv(width) if 1 <= i < levels - 1 else nn.Identity()
            layers = [
                resnet(widths[max(i - 1, 0)], width),
                attention(i, width),
                resnet(width, width),
                attention(i, width),
            ]
            self.downs.append(nn.ModuleList([*layers, down]))
        self.mid_block1 = resnet(widths[-1], widths[-1])
        self.mid_spatial_attn = ResidualAttention(widths[-1])
        self.mid_block2 = resnet(widths[-1], widths[-1])
        self.ups = nn.ModuleList()
        for i in reversed(range(levels)):
            width, below = widths[i], widths[max(i - 1, 0)]
            up = up_conv(below) if i >= 2 else nn.Identity()
            layers = [resnet(2 * width, width), attention(i, width), resnet(2 * width, below), attention(i, below)]
            self.ups.append(nn.ModuleList([*layers, up]))
        self.final_conv = nn.Sequential(ResnetBlock(2 * dim, dim, groups), conv1(dim, config.channels))
        self.to(memory_format=torch.channels_last_3d)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        resolution: Tensor,
        control: ControlFunction | Sequence[ControlFunction] = (),
    ) -> Tensor:
        """Estimate the noise.

        Args:
            x: noisy latent, floating [B, 8, D, H, W]; each of D, H, W a multiple of the sub-volume (8).
            t: timesteps, integer [B].
            y: classes, integer [B], each in [0, num_classes).
            resolution: [B, 3] or [3], the latent's D, H, W divided by 64.
            control: what steers the estimate, one or several, which add up; see `meddiff.models.Control`.

        Returns:
            The noise, of x's shape, in the model's dtype.

        Raises:
            ValueError: for a wrong shape.
        """
        c = self.config
        if x.ndim != 5 or x.shape[1] != c.channels or x.numel() == 0 or any(n % c.sub_volume for n in x.shape[2:]):
            raise ValueError(
                f"BiFlowNet: x must be [B, {c.channels}, D, H, W] with D, H, W positive multiples of {c.sub_volume}, "
                f"got {tuple(x.shape)}"
            )
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"BiFlowNet: {name} must be [{x.shape[0]}], got {tuple(value.shape)}")
        if resolution.shape not in ((3,), (x.shape[0], 3)):
            raise ValueError(f"BiFlowNet: resolution must be [{x.shape[0]}, 3], got {tuple(resolution.shape)}")

        x = x.to(self.dtype, memory_format=torch.channels_last_3d)
        condition = self._condition(t, y, resolution.expand(x.shape[0], 3))
        residuals = [steer(x, condition) for steer in ((control,) if callable(control) else control)]
        return self._inter_patch_flow(x, condition, self._intra_patch_flow(x, condition, residuals), residuals)

    def _condition(self, t: Tensor, y: Tensor, resolution: Tensor) -> Tensor:
        """[B, 8·dim]: time plus class, then resolution."""
        sinusoid = self.time_mlp[0](t).to(self.dtype)
        time_and_class = self.time_mlp[1:](sinusoid) + self.cond_emb(y)
        return torch.cat([time_and_class, self.res_mlp(resolution.to(self.dtype))], dim=1)

    def _intra_patch_flow(self, x: Tensor, condition: Tensor, residuals: Sequence[Residuals] = ()) -> list[Tensor]:
        """The features [B, dim, D, H, W] of the two input and the two output blocks."""
        skips, features = self._intra_patch_input(self._embed(x), condition)
        tokens = self._intra_patch_middle(skips[-1], condition)
        for added in residuals:
            features = _plus(features, added.features)
            tokens = tokens if added.tokens is None else tokens + added.tokens
        for block, final in self.IntraPatchFlow_output:
            tokens = block(tokens, condition, skips.pop())
            features.append(self._to_volume(final(tokens, condition)))
        return features

    def _inter_patch_flow(
        self, x: Tensor, condition: Tensor, features: list[Tensor], residuals: Sequence[Residuals] = ()
    ) -> Tensor:
        entering_up = dict(enumerate(features[_FLOW_BLOCKS:], start=len(self.ups) - _FLOW_BLOCKS))
        first = self.init_conv(x)
        x, skips = self._down_path(first, condition, features[:_FLOW_BLOCKS])
        x = self._middle(x, condition)
        for added in residuals:
            skips = _plus(skips, added.skips)
            x = x if added.middle is None else x + added.middle
        for j, (res1, attn1, res2, attn2, up) in enumerate(self.ups):
            if j in entering_up:
                x = x + entering_up[j]
            x = attn1(res1(torch.cat([x, skips.pop()], dim=1), condition))
            x = attn2(res2(torch.cat([x, skips.pop()], dim=1), condition))
            x = up(x)
        return self.final_conv(torch.cat([x, first], dim=1))


def _plus(tensors: list[Tensor], added: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(tensors, added)] if added else tensors
