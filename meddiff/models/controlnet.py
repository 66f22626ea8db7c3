"""ControlNet for BiFlowNet: a trainable copy of the encoder half steers the frozen network through zero convolutions
(Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"; Wang et al., TMI 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from meddiff.config import ControlNetConfig
from meddiff.models.biflownet import BiFlowNet, EncoderHalf, Residuals
from meddiff.models.blocks import Conv3d, conv3

# part that is copied → the modules of BiFlowNet that it is made of, by flow
_PARTS = {
    "intra_patch": ("x_embedder", "IntraPatchFlow_input"),
    "down_path": ("init_conv", "downs"),
}
_MIDDLES = {
    "intra_patch": ("IntraPatchFlow_mid",),
    "down_path": ("mid_block1", "mid_spatial_attn", "mid_block2"),
}


def zero_conv(in_channels: int, out_channels: int, size: int = 1) -> Conv3d:
    """A convolution with kernel = stride = `size` whose weights and bias start at zero."""
    layer = Conv3d(in_channels, out_channels, kernel_size=size, stride=size)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ConditionEncoder(nn.Sequential):
    """Voxels [B, K, D, H, W] → [B, widths[-1], d, h, w]: strided convolutions, each halving every axis."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for before, width in zip((channels, *widths), widths):
            layers += [Conv3d(before, width, kernel_size=4, stride=2, padding=1), nn.SiLU()]
        super().__init__(*layers, conv3(widths[-1], widths[-1]), nn.SiLU())


class ControlNet(EncoderHalf):
    """What steers a frozen BiFlowNet by a condition.

    A new one has random layers and adds nothing; `from_denoiser` copies those of a base. The layers keep the base's
    names. Time, class and resolution come embedded from the base, which embeds them anyway.

    The condition is, by `config.encoder`, a latent in the denoiser's range ("latent"), or `config.channels` numbers per
    voxel ("convolutional").
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.control_config = config
        self.config = base = config.denoiser
        layers = BiFlowNet(base)
        self.register_buffer("pos_embed", layers.pos_embed)
        flows = [flow for flow in _PARTS if flow in config.copied]
        self.has_middle = "middle" in config.copied
        for flow in flows:
            for name in _PARTS[flow] + (_MIDDLES[flow] if self.has_middle else ()):
                setattr(self, name, getattr(layers, name))

        convolutional = config.encoder == "convolutional"
        self.condition_encoder = ConditionEncoder(config.channels, config.widths) if convolutional else nn.Identity()
        width = config.widths[-1] if convolutional else config.channels
        targets = {
            "latent": (base.channels, 1),
            "init_conv": (base.dim, 1),
            "tokens": (base.dim, base.token_patch),
        }
        self.entries = nn.ModuleDict({place: zero_conv(width, *targets[place]) for place in config.enters})

        self.exits = nn.ModuleDict()
        if "intra_patch" in flows:
            self.exits["features"] = nn.ModuleList(zero_conv(base.dim, base.dim) for _ in self.IntraPatchFlow_input)
            if self.has_middle:
                self.exits["tokens"] = zero_conv(base.dim, base.dim)
        if "down_path" in flows:
            widths = [base.dim * m for m in base.dim_mults for _ in range(2)]
            self.exits["skips"] = nn.ModuleList(zero_conv(w, w) for w in widths)
            if self.has_middle:
                self.exits["middle"] = zero_conv(widths[-1], widths[-1])
        self.to(memory_format=torch.channels_last_3d)

    @classmethod
    def from_denoiser(cls, denoiser: BiFlowNet, config: ControlNetConfig) -> ControlNet:
        """A ControlNet with a copy of a base's weights, float32, trainable, on the base's device.

        Raises ValueError if `config.denoiser` is not the base's.
        """
        if config.denoiser != denoiser.config:
            raise ValueError(
                f"ControlNet.from_denoiser: config.denoiser must be the base's {denoiser.config}, got {config.denoiser}"
            )
        network = cls(config).to(denoiser.device)
        weights = denoiser.state_dict()
        network.load_state_dict({key: weights.get(key, value) for key, value in network.state_dict().items()})
        return network

    def encode(self, condition: Tensor) -> dict[str, Tensor]:
        """What the condition adds at each place where it enters; it does not depend on the noisy latent.

        Args:
            condition: floating [B, channels, D, H, W]: a latent, or voxels, each axis a multiple of
                `control_config.downsample`.

        Raises:
            ValueError: for a wrong shape.
        """
        c = self.control_config
        unit = c.downsample if c.encoder == "convolutional" else 1
        if (
            condition.ndim != 5
            or condition.shape[1] != c.channels
            or condition.numel() == 0
            or any(n % unit for n in condition.shape[2:])
        ):
            raise ValueError(
                f"ControlNet: the condition must be [B, {c.channels}, D, H, W] with D, H, W positive multiples of "
                f"{unit}, got {tuple(condition.shape)}"
            )
        hint = self.condition_encoder(condition.to(self.dtype, memory_format=torch.channels_last_3d))
        return {place: entry(hint) for place, entry in self.entries.items()}

    def residuals(self, x: Tensor, embedding: Tensor, hint: dict[str, Tensor]) -> Residuals:
        """What steers one estimate.

        Args:
            x: noisy latent [B, 8, D, H, W] in the network's dtype.
            embedding: of time, class and resolution, [B, 8·dim], by the base.
            hint: what `encode` gave, for one or for B conditions.

        Raises:
            ValueError: if the condition has not the latent's size.
        """
        for place, added in hint.items():
            size = tuple(n * (self.config.token_patch if place == "tokens" else 1) for n in added.shape[2:])
            if size != tuple(x.shape[2:]) or added.shape[0] not in (1, x.shape[0]):
                raise ValueError(
                    f"ControlNet: the condition must have the latent's batch and size {len(x)}, {tuple(x.shape[2:])}, "
                    f"got {len(added)}, {size}"
                )
        if "latent" in hint:
            x = x + hint["latent"]
        features, tokens = [], None
        if "features" in self.exits:
            embedded = self._embed(x)
            if "tokens" in hint:
                embedded = embedded + hint["tokens"].permute(0, 2, 3, 4, 1)
            after, features = self._intra_patch_input(embedded, embedding)
            if self.has_middle:
                tokens = self._intra_patch_middle(after[-1], embedding)
                tokens = self.exits["tokens"](tokens.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        skips, middle = [], None
        if "skips" in self.exits:
            first = self.init_conv(x)
            if "init_conv" in hint:
                first = first + hint["init_conv"]
            middle, skips = self._down_path(first, embedding, features)
            middle = self.exits["middle"](self._middle(middle, embedding)) if self.has_middle else None
        return Residuals(
            tuple(leave(feature) for leave, feature in zip(self.exits["features"], features)) if features else (),
            tokens,
            tuple(leave(skip) for leave, skip in zip(self.exits["skips"], skips)) if skips else (),
            middle,
        )

    def forward(self, x: Tensor, embedding: Tensor, condition: Tensor) -> Residuals:
        """`residuals` of a condition that is not encoded yet: what training calls."""
        return self.residuals(x, embedding, self.encode(condition))


class Control:
    """A ControlNet with its condition, which is encoded once: `denoiser(x, t, y, resolution, control=…)` takes one or
    several.

    Args:
        network: of the denoiser's device and dtype.
        condition: as `ControlNet.encode` takes it, for one sample or for every one of a batch.
        strength: factor of all that it adds; 0 is the base alone.
    """

    def __init__(self, network: ControlNet, condition: Tensor, strength: float = 1.0) -> None:
        self.network, self.strength = network, strength
        self.hint = network.encode(condition.to(network.device))

    def __call__(self, x: Tensor, embedding: Tensor) -> Residuals:
        added = self.network.residuals(x, embedding, self.hint)
        if self.strength == 1:
            return added
        s = self.strength
        return Residuals(
            tuple(s * feature for feature in added.features),
            None if added.tokens is None else s * added.tokens,
            tuple(s * skip for skip in added.skips),
            None if added.middle is None else s * added.middle,
        )


class SteeredDenoiser:
    """A denoiser with its controls, for whoever knows of a denoiser only: the sampler.

    It estimates the samples of a batch one by one, so that a control has one condition for all of them.
    """

    def __init__(self, denoiser: BiFlowNet, controls: Sequence[Control]) -> None:
        self.denoiser, self.controls = denoiser, tuple(controls)
        self.config, self.device, self.dtype = denoiser.config, denoiser.device, denoiser.dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the denoiser and of the controls."""
        return chain(self.denoiser.parameters(), *(control.network.parameters() for control in self.controls))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, resolution: Tensor) -> Tensor:
        return self.denoiser(x, t, y, resolution, self.controls)
