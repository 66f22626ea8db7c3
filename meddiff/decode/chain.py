"""Decoders as other projects write them, in the vocabulary of `meddiff.decode.layers`: told by structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from meddiff.decode.joint import decode_jointly
from meddiff.decode.layers import Attention, Blur, Conv, Interpolate, Layer, Norm, UpConv
from meddiff.decode.plan import Plan, make_plan
from meddiff.kernels.up_conv3d import nearest_up_weight


class UnsupportedLayer(ValueError):
    """A layer that the vocabulary has no word for; the message has its path in the module."""


def layers_of(decoder: nn.Module) -> list[Layer]:
    """The layers of a decoder.

    Args:
        decoder: an `nn.Sequential`, or a module with a list `blocks` that it runs in their order. Known are GroupNorm,
            SiLU, doubling by `nn.Upsample` (nearest or trilinear), `nn.Conv3d` of 3³ with padding 1 and of 1³,
            `nn.ConvTranspose3d` of 4³ with stride 2 and padding 1; residual blocks (`norm1`, `conv1`, `norm2`, `conv2`,
            `nin_shortcut`, with SiLU after each norm), attention over all voxels (`norm`, `attn`) and upsampling
            (`conv`, `use_convtranspose`), as MONAI's autoencoders have them.

    Returns:
        Layers for `make_plan` and `decode_jointly`, with the decoder's own parameters in them. A doubling and the
        convolution 3³ behind it are a transposed convolution with a weight of its own.

    Raises:
        UnsupportedLayer: for anything else, and for an order that is none of norm, SiLU, doubling, convolution.
    """
    chain = _Chain()
    chain.add(decoder, "")
    chain.require_nothing_pending("", decoder)
    return chain.layers


def plan_decoder(decoder: nn.Module, input_shape: Sequence[int], memory_budget: int | None = None) -> Plan:
    """What decoding a latent takes: memory, operations, and an estimate of the time; `table()` shows it by tensor.

    Args:
        decoder: see `layers_of`; it may be on the meta device, and is planned as on the CPU then.
        input_shape: the latent's (B, C, d, h, w).
        memory_budget: bytes beside the weights; None is without a limit.

    Raises:
        UnsupportedLayer: for a layer that cannot be planned, with its path.
        ValueError: for a latent that does not fit the decoder.
        MemoryError: if no plan fits; the message says what the least is.
    """
    layers = layers_of(decoder)
    if not layers:
        raise UnsupportedLayer("plan: the decoder has no layers; give it a convolution at least")
    weight = layers[0].weight
    return make_plan(layers, tuple(input_shape), weight.dtype, weight.device, memory_budget)


def tiled_decode(plan: Plan, decoder: nn.Module, z: Tensor) -> Tensor:
    """Run a plan: the decoder's result, in the plan's memory. No gradient.

    plan: of `plan_decoder` for this decoder and z's shape.
    z: [B, C, d, h, w] in the dtype and on the device of the decoder's weights.
    Returns [B, O, D, H, W]. Raises as `decode_jointly`; ValueError for a z of another shape or dtype than the plan's.
    """
    planned = (plan.batch, plan.shapes[0].channels, *plan.size)
    if tuple(z.shape) != planned or z.dtype != plan.dtype:
        raise ValueError(
            f"tiled_decode: z must be {plan.dtype} {planned} as planned, got {z.dtype} {tuple(z.shape)}; plan again"
        )
    return decode_jointly(layers_of(decoder), z, plan=plan)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _refuse(path: str, module: nn.Module, reason: str) -> None:
    raise UnsupportedLayer(f"decode: {path or 'the module'} ({type(module).__name__}) {reason}")


class _Chain:
    """Layers, and what stands before the next convolution."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.norm: Norm | None = None
        self.silu = self.upsample = False

    def require_nothing_pending(self, path: str, module: nn.Module) -> None:
        if self.norm is not None or self.silu or self.upsample:
            _refuse(path, module, "must come after a convolution, and comes after a norm, an activation or a doubling")

    def add(self, module: nn.Module, path: str) -> None:
        if isinstance(module, nn.GroupNorm):
            self.require_nothing_pending(path, module)
            self.norm = _norm(module, path)
        elif isinstance(module, nn.SiLU):
            if self.silu or self.upsample:
                self.require_nothing_pending(path, module)
            self.silu = True
        elif isinstance(module, nn.Upsample):
            self._add_upsample(module, path)
        elif isinstance(module, nn.Conv3d):
            self._add_conv(module, path)
        elif isinstance(module, nn.ConvTranspose3d):
            self._add_transposed(module, path)
        elif _has(module, "norm1", "conv1", "norm2", "conv2"):
            self._add_residual_block(module, path)
        elif _has(module, "norm", "attn"):
            self._add_attention(module, path)
        elif _has(module, "conv") and hasattr(module, "use_convtranspose"):
            if not module.use_convtranspose:
                self._interpolate(module, path)
            self.add(module.conv, f"{path}.conv")
        elif _has(module, "conv") and hasattr(module, "num_splits"):  # split along an axis, which changes nothing
            self.add(module.conv, f"{path}.conv")
        elif _has(module, "blocks"):
            for i, block in enumerate(module.blocks):
                self.add(block, f"{path}.blocks.{i}".lstrip("."))
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for name, layer in module.named_children():
                self.add(layer, f"{path}.{name}".lstrip("."))
        elif not isinstance(module, nn.Identity):
            _refuse(path, module, "is no layer that can be planned")

    def _add_conv(self, conv: nn.Conv3d, path: str) -> None:
        plain = conv.stride == conv.dilation == (1, 1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
        if not plain or (conv.kernel_size, conv.padding) not in (((3, 3, 3), (1, 1, 1)), ((1, 1, 1), (0, 0, 0))):
            _refuse(path, conv, f"must be 3³ with zero padding 1, or 1³, and is {conv}")
        pure = conv.kernel_size == (3, 3, 3) and self.norm is None and not self.silu
        if pure and self.upsample:
            self.layers.append(UpConv(path, len(self.layers), _nearest(conv), conv.bias))
        elif pure and self.layers and isinstance(self.layers[-1], Interpolate):
            doubling = self.layers.pop()
            self.layers.append(UpConv(doubling.name, doubling.source, _nearest(conv), conv.bias, replicate=True))
            self.layers.append(Blur(path, len(self.layers), doubling.source, conv.weight, conv.bias))
        else:
            layer = Conv(path, len(self.layers), conv.weight, conv.bias, self.norm, self.silu, self.upsample)
            self.layers.append(layer)
        self.norm, self.silu, self.upsample = None, False, False

    def _add_transposed(self, conv: nn.ConvTranspose3d, path: str) -> None:
        self.require_nothing_pending(path, conv)
        size = (conv.kernel_size, conv.stride, conv.padding, conv.output_padding, conv.dilation)
        if size != ((4, 4, 4), (2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1)) or conv.groups != 1:
            _refuse(path, conv, f"must be 4³ with stride 2 and padding 1, and is {conv}")
        self.layers.append(UpConv(path, len(self.layers), conv.weight, conv.bias))

    def _add_upsample(self, module: nn.Upsample, path: str) -> None:
        factors = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,)
        if module.size is not None or any(factor != 2 for factor in factors) or module.align_corners:
            _refuse(path, module, f"must double every axis without align_corners, and is {module}")
        if module.mode == "nearest":
            if self.upsample:
                self.require_nothing_pending(path, module)
            self.upsample = True
        elif module.mode == "trilinear":
            self._interpolate(module, path)
        else:
            _refuse(path, module, "must be nearest or trilinear")

    def _interpolate(self, module: nn.Module, path: str) -> None:
        self.require_nothing_pending(path, module)
        if not self.layers:
            _refuse(path, module, "must come after a convolution")
        self.layers.append(Interpolate(path, len(self.layers), self.layers[-1].channels))

    def _add_residual_block(self, block: nn.Module, path: str) -> None:
        self.require_nothing_pending(path, block)
        source = len(self.layers)
        for i in (1, 2):
            self.add(getattr(block, f"norm{i}"), f"{path}.norm{i}")
            self.silu = True
            self.add(getattr(block, f"conv{i}"), f"{path}.conv{i}")
        shortcut = _Chain()
        shortcut.add(getattr(block, "nin_shortcut", nn.Identity()), f"{path}.nin_shortcut")
        weight = bias = None
        if shortcut.layers:
            weight, bias = shortcut.layers[0].weight, shortcut.layers[0].bias
            if len(shortcut.layers) > 1 or weight.shape[2:] != (1, 1, 1):
                _refuse(f"{path}.nin_shortcut", block, "must be one convolution of 1³")
        self.layers[-1] = replace(self.layers[-1], residual=source, residual_weight=weight, residual_bias=bias)

    def _add_attention(self, block: nn.Module, path: str) -> None:
        self.require_nothing_pending(path, block)
        attn, channels = block.attn, block.norm.num_channels
        parts = [attn.qkv] if isinstance(attn.qkv, nn.Linear) else [attn.to_q, attn.to_k, attn.to_v]
        weight = torch.cat([part.weight for part in parts])
        biases = [part.bias for part in parts]
        bias = None if any(b is None for b in biases) else torch.cat(biases)
        width = len(weight) // 3
        if attn.causal or attn.rel_positional_embedding is not None or attn.scale != (width // attn.num_heads) ** -0.5:
            _refuse(path, block, "must be plain attention over all voxels, scaled by the root of the head's channels")
        if isinstance(attn.out_proj, nn.Linear):
            out, out_bias = attn.out_proj.weight, attn.out_proj.bias
        else:
            out, out_bias = torch.eye(channels, width, dtype=weight.dtype, device=weight.device), None
        layer = Attention(
            path, len(self.layers), _norm(block.norm, path), weight, bias, out[..., None, None, None], out_bias,
            attn.num_heads,
        )  # fmt: skip
        self.layers.append(layer)


@torch.no_grad()
def _nearest(conv: nn.Conv3d) -> Tensor:
    return nearest_up_weight(conv.weight)


def _norm(norm: nn.GroupNorm, path: str) -> Norm:
    if not norm.affine or getattr(norm, "norm_float16", False):
        _refuse(path, norm, "must have weight and bias, and be computed in float32")
    return Norm(norm.num_groups, norm.weight, norm.bias, norm.eps)
