"""The 3D PatchGAN that judges reconstructions in training (Isola et al. 2017; Wang et al., TMI 2025, section III-B)."""

from __future__ import annotations

from torch import Tensor, nn

_KERNEL, _PADDING, _SLOPE = 4, 2, 0.2


class PatchDiscriminator(nn.Module):
    """Volumes → logits, one for each overlapping region, and the features on the way.

    The first convolution and `layers` - 1 more halve every axis; the last hidden one and the one to logits keep it.
    State dicts are those of the released discriminators.

    Args:
        image_channels: of the input.
        base_channels: of the first layer; each further one is twice as wide, up to 512.
        layers: hidden layers with BatchNorm.
    """

    def __init__(self, image_channels: int = 1, base_channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [min(base_channels * 2**i, 512) for i in range(layers + 1)]
        self.layers = layers
        self.model0 = nn.Sequential(_conv(image_channels, widths[0], 2), nn.LeakyReLU(_SLOPE))
        for i in range(1, layers + 1):
            conv = _conv(widths[i - 1], widths[i], 2 if i < layers else 1)
            self.add_module(f"model{i}", nn.Sequential(conv, nn.BatchNorm3d(widths[i]), nn.LeakyReLU(_SLOPE)))
        self.add_module(f"model{layers + 1}", nn.Sequential(_conv(widths[-1], 1, 1)))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x float [B, 1, D, H, W] in [-1, 1] → logits [B, 1, d, h, w], outputs of all layers but the last."""
        features = []
        for i in range(self.layers + 1):
            x = self.get_submodule(f"model{i}")(x)
            features.append(x)
        return self.get_submodule(f"model{self.layers + 1}")(x), features


def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, _KERNEL, stride, _PADDING)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1, 0.02)
    if isinstance(module, (nn.Conv3d, nn.BatchNorm3d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
