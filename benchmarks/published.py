"""The two networks of 3D MedDiffusion in plain PyTorch, with the structure, key names and methods of the published ones
(Wang et al., TMI 2025): what other projects have, and `meddiff.accelerate` is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from meddiff.config import AutoencoderConfig, DenoiserConfig


def _conv3(in_channels: int, out_channels: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = _conv3(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = _conv3(out_channels, out_channels)
        if in_channels != out_channels:
            self.resConv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.resConv(x) if hasattr(self, "resConv") else x)


def _attend(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, heads=heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_qkv = nn.Linear(channels, 3 * 4 * 32, bias=False)
        self.to_out = nn.Conv3d(4 * 32, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = _attend(self.to_qkv(self.norm(x).flatten(2).mT), heads=4)
        return x + self.to_out(h.mT.unflatten(2, x.shape[2:]))


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
        self.conv_trans = nn.ConvTranspose3d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_trans(x)


class Half(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config: AutoencoderConfig, decoder: bool) -> None:
        super().__init__()
        groups, widths = config.num_groups, config.widths[::-1] if decoder else config.widths
        channels = (config.embedding_dim, config.image_channels)
        reads, writes = channels if decoder else channels[::-1]
        self.decoder = decoder
        self.conv_first = _conv3(reads, widths[0])
        self.mid_block = MidBlock(widths[0] if decoder else widths[-1], groups)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Module()
            level.res1 = ResBlock(widths[max(i - 1, 0)], width, groups)
            level.res2 = ResBlock(width, width, groups)
            if i < config.levels and decoder:
                level.up = Upsample(width)
            elif i < config.levels:
                level.down = nn.Conv3d(width, width, 4, stride=2, padding=1)
            self.conv_blocks.append(level)
        self.final_block = nn.Sequential(
            nn.GroupNorm(groups, widths[-1], eps=1e-6), nn.SiLU(), _conv3(widths[-1], writes)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_first(x)
        h = self.mid_block(h) if self.decoder else h
        for level in self.conv_blocks:
            for layer in level.children():
                h = layer(h)
        h = h if self.decoder else self.mid_block(h)
        return self.final_block(h)


class Codebook(nn.Module):
    def __init__(self, n_codes: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.randn(n_codes, embedding_dim))
        self.register_buffer("N", torch.zeros(n_codes))
        self.register_buffer("z_avg", self.embeddings.clone())

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        flat = z.movedim(1, -1).flatten(0, -2)
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.embeddings.T
        distances = distances + self.embeddings.T.square().sum(0, keepdim=True)
        index = distances.argmin(1)
        one_hot = F.one_hot(index, len(self.embeddings)).type_as(flat)
        encodings = index.view(z.shape[0], *z.shape[2:])
        rows = F.embedding(encodings, self.embeddings).movedim(-1, 1)
        share = one_hot.mean(0)
        return {
            "embeddings": (rows - z).detach() + z,
            "encodings": encodings,
            "commitment_loss": 0.25 * F.mse_loss(z, rows.detach()),
            "perplexity": torch.exp(-(share * torch.log(share + 1e-10)).sum()),
        }


class Autoencoder(nn.Module):
    """Latents are [B, 8, d, h, w], volumes [B, 1, D, H, W]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Half(config, decoder=False), Half(config, decoder=True)
        self.pre_vq_conv = nn.Conv3d(config.embedding_dim, config.embedding_dim, 1)
        self.post_vq_conv = nn.Conv3d(config.embedding_dim, config.embedding_dim, 1)
        self.codebook = Codebook(config.n_codes, config.embedding_dim)

    def patch_encode(self, x: Tensor, quantize: bool = False, patch_size: int = 64) -> Tensor:
        """All patches in one batch; with `quantize` the codes' indices."""
        grid = dict(zip("dhw", (n // patch_size for n in x.shape[2:])))
        patches = rearrange(x, "b c (d i) (h j) (w k) -> (b d h w) c i j k", **grid)
        z = self.pre_vq_conv(self.encoder(patches))
        z = rearrange(z, "(b d h w) c i j k -> b c (d i) (h j) (w k)", **grid)
        return self.codebook(z)["encodings"] if quantize else z

    def patch_encode_sliding(self, x: Tensor, quantize: bool = False, patch_size: int = 64) -> Tensor:
        """One patch after another."""
        f = self.config.downsample
        z = x.new_empty(x.shape[0], self.config.embedding_dim, *(n // f for n in x.shape[2:]))
        for d, h, w in product(*(range(0, n, patch_size) for n in x.shape[2:])):
            part = self.patch_encode(
                x[:, :, d : d + patch_size, h : h + patch_size, w : w + patch_size], False, patch_size
            )
            z[:, :, d // f :, h // f :, w // f :][..., : part.shape[2], : part.shape[3], : part.shape[4]] = part
        return self.codebook(z)["encodings"] if quantize else z

    def decode(self, latent: Tensor, quantize: bool = False) -> Tensor:
        """A latent, which `quantize` replaces by its codes, or indices."""
        index = self.codebook(latent)["encodings"] if quantize else latent
        rows = F.embedding(index, self.codebook.embeddings).movedim(-1, 1)
        return self.decoder(self.post_vq_conv(rows.to(self.post_vq_conv.weight.dtype)))

    def decode_sliding(self, latent: Tensor, quantize: bool = False, tile: int = 32) -> Tensor:
        """Disjoint tiles of the latent, each with statistics of its own."""
        axes = range(latent.ndim - 3, latent.ndim)
        out = []
        for d in latent.split(tile, axes[0]):
            rows = [torch.cat([self.decode(w, quantize) for w in h.split(tile, axes[2])], 4)
                    for h in d.split(tile, axes[1])]  # fmt: skip
            out.append(torch.cat(rows, 3))
        return torch.cat(out, 2)


class Sinusoid(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000) / (half - 1)))
        angles = time[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.proj = _conv3(in_channels, out_channels)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = (v[:, :, None, None, None] for v in scale_shift)
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.mlp = condition_dim and nn.Sequential(nn.SiLU(), nn.Linear(condition_dim, 2 * out_channels))
        self.block1 = Block(in_channels, out_channels, groups)
        self.block2 = Block(out_channels, out_channels, groups)
        self.res_conv = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        scale_shift = None if condition is None else self.mlp(condition).chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift)) + self.res_conv(x)


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.gamma


class VolumeAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(channels, 3 * 8 * 32, bias=False)
        self.to_out = nn.Conv3d(8 * 32, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(_attend(self.to_qkv(x.flatten(2).mT), heads=8).mT.unflatten(2, x.shape[2:]))


class ResidualAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fn = nn.Module()
        self.fn.norm, self.fn.fn = ChannelNorm(channels), VolumeAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn.fn(self.fn.norm(x))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Tokens are [B·sub-volumes, tokens, C]; the condition is repeated for each sub-volume."""

    def __init__(self, config: DenoiserConfig, skip: bool = False) -> None:
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.heads = config.num_heads
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8 * dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, dim=1)
        h = _attend(self.attn.qkv(_modulate(x, shift, scale)), self.heads)
        x = x + gate[:, None] * self.attn.proj(h)
        h = F.gelu(self.mlp.fc1(_modulate(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate[:, None] * self.mlp.fc2(h)


class FinalLayer(nn.Module):
    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        dim = config.dim
        self.linear = nn.Linear(dim, config.token_patch**3 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8 * dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(_modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=1)))


class BiFlowNet(nn.Module):
    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        dim, groups, levels = config.dim, config.num_groups, len(config.dim_mults)
        widths = [dim * m for m in config.dim_mults]
        tokens = (config.sub_volume // config.token_patch) ** 3

        def attention(level: int, channels: int) -> nn.Module:
            return ResidualAttention(channels) if level >= levels - config.attention_levels else nn.Identity()

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, groups, 8 * dim)

        self.time_mlp = nn.Sequential(Sinusoid(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        self.cond_emb = nn.Embedding(config.num_classes, 4 * dim)
        self.res_mlp = nn.Sequential(nn.Linear(3, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv3d(config.channels, dim, config.token_patch, stride=config.token_patch)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, dim), requires_grad=False)
        self.IntraPatchFlow_input = nn.ModuleList(
            nn.ModuleList([DiTBlock(config), FinalLayer(config)]) for _ in range(2)
        )
        self.IntraPatchFlow_mid = nn.ModuleList(DiTBlock(config) for _ in range(config.mid_blocks))
        self.IntraPatchFlow_output = nn.ModuleList(
            nn.ModuleList([DiTBlock(config, skip=True), FinalLayer(config)]) for _ in range(2)
        )
        self.init_conv = _conv3(config.channels, dim)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            down = nn.Conv3d(width, width, 4, stride=2, padding=1) if 1 <= i < levels - 1 else nn.Identity()
            first, second = resnet(widths[max(i - 1, 0)], width), resnet(width, width)
            self.downs.append(nn.ModuleList([first, attention(i, width), second, attention(i, width), down]))
        self.mid_block1 = resnet(widths[-1], widths[-1])
        self.mid_spatial_attn = ResidualAttention(widths[-1])
        self.mid_block2 = resnet(widths[-1], widths[-1])
        for i in reversed(range(levels)):
            width, below = widths[i], widths[max(i - 1, 0)]
            up = nn.ConvTranspose3d(below, below, 4, stride=2, padding=1) if i >= 2 else nn.Identity()
            first, second = resnet(2 * width, width), resnet(2 * width, below)
            self.ups.append(nn.ModuleList([first, attention(i, width), second, attention(i, below), up]))
        self.final_conv = nn.Sequential(ResnetBlock(2 * dim, dim, groups), nn.Conv3d(dim, config.channels, 1))

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, res: Tensor | None = None) -> Tensor:
        condition = torch.cat([self.time_mlp(time) + self.cond_emb(y), self.res_mlp(res)], dim=1)
        features = self._intra_patch_flow(x, condition)
        x = first = self.init_conv(x)
        levels, skips = len(self.downs), []
        for i, (res1, attn1, res2, attn2, down) in enumerate(self.downs):
            x = x + features[i] if i < 2 else x
            x = attn1(res1(x, condition))
            skips.append(x)
            x = attn2(res2(x, condition))
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_spatial_attn(self.mid_block1(x, condition)), condition)
        for j, (res1, attn1, res2, attn2, up) in enumerate(self.ups):
            x = x + features[j - levels] if j >= levels - 2 else x
            x = attn1(res1(torch.cat([x, skips.pop()], dim=1), condition))
            x = attn2(res2(torch.cat([x, skips.pop()], dim=1), condition))
            x = up(x)
        return self.final_conv(torch.cat([x, first], dim=1))

    def _intra_patch_flow(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        p, n = self.config.token_patch, self.config.sub_volume // self.config.token_patch
        grid = dict(zip("dhw", (size // self.config.sub_volume for size in x.shape[2:])))
        x = self.x_embedder.proj(x)
        x = rearrange(x, "b c (d i) (h j) (w k) -> (b d h w) (i j k) c", i=n, j=n, k=n) + self.pos_embed
        condition = repeat(condition, "b c -> (b n) c", n=math.prod(grid.values()))
        features, skips = [], []

        def feature(layer: FinalLayer) -> None:
            places = "(b d h w) (i j k) (pd ph pw c) -> b c (d i pd) (h j ph) (w k pw)"
            features.append(rearrange(layer(x, condition), places, **grid, i=n, j=n, k=n, pd=p, ph=p, pw=p))

        for block, final in self.IntraPatchFlow_input:
            x = block(x, condition)
            skips.append(x)
            feature(final)
        for block in self.IntraPatchFlow_mid:
            x = block(x, condition)
        for block, final in self.IntraPatchFlow_output:
            x = block(x, condition, skips.pop())
            feature(final)
        return features


class ChunkedCodebook(nn.Module):
    """The nearest codes without a matrix of all tokens and codes: what a user of plain PyTorch would write."""

    def __init__(self, codebook: Codebook, chunk: int = 4096) -> None:
        super().__init__()
        self.register_buffer("embeddings", codebook.embeddings)
        self.chunk = chunk

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        flat, half = z.movedim(1, -1).flatten(0, -2), 0.5 * self.embeddings.square().sum(1)
        index = torch.cat([(rows @ self.embeddings.T - half).argmax(1) for rows in flat.split(self.chunk)])
        return {"encodings": index.view(z.shape[0], *z.shape[2:])}


def sample_ddim(
    denoiser: Callable[..., Tensor],
    schedule: nn.Module,
    noise: Tensor,
    y: Tensor,
    timesteps: list[int],
    dtype: torch.dtype,
    channels_last: bool = False,
) -> Tensor:
    """The published DDIM loop with eta 0: noise float32 [B, C, D, H, W] → latent in the denoiser's range."""
    x, resolution = noise, torch.tensor([[n / 64 for n in noise.shape[2:]]], dtype=dtype, device=noise.device)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    for t, following in zip(timesteps, [*timesteps[1:], 0]):
        time = torch.full((len(x),), t, device=x.device)
        estimate = denoiser(x.to(dtype, memory_format=layout), time, y=y, res=resolution).float()
        signal, after = schedule.signal(torch.tensor([t, following])).float().to(x.device)
        x0 = ((x - (1 - signal).sqrt() * estimate) / signal.sqrt()).clamp(-1, 1)
        x = after.sqrt() * x0 + (1 - after).sqrt() * estimate
    return x
