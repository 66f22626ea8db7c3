"""MONAI's AutoencoderKL and AutoencoderKlMaisi (Guo et al. 2024, "MAISI"): a decoder of any size in a memory budget,
and an encoder with fused norms.

Their `decode`, `encode` and all that calls these stay, and call the two. Norms and attention see the whole volume, as
without windows; convolutions are not split along an axis, which changes nothing but the numbers at sizes that the
splits do not divide.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddiff.acceleration.replacement import (
    JOINT_DECODE,
    Found,
    Part,
    Unsupported,
    decode_within,
    noise,
    require_floating,
    require_inference,
    require_same,
    run_plain,
    without_backward,
)
from meddiff.decode import layers_of
from meddiff.kernels.group_norm_silu import group_norm_silu

_ENCODER = "fused norms, channels-last, no splits"


def find_kl_autoencoder(module: nn.Module, budget: int | None) -> Found | None:
    names = ("encoder", "decoder", "quant_conv_mu", "post_quant_conv")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    encoder, decoder = module.encoder, module.decoder
    if not all(isinstance(getattr(half, "blocks", None), nn.ModuleList) for half in (encoder, decoder)):
        return None
    try:
        weight = layers_of(decoder)[0].weight
    except ValueError as error:
        raise Unsupported(str(error)) from error
    require_floating(weight, "its weights")
    _check_encoder(encoder)
    with torch.no_grad():
        probe = noise((1, _convolution(encoder.blocks[0]).in_channels, 12, 9, 16), weight)
        require_same(_encode(encoder, probe), run_plain(_without_splits(encoder), "forward", probe), "its encoder")
        if not decoder.training:
            probe = noise((1, weight.shape[1], 3, 2, 4), weight)
            wanted = run_plain(_without_splits(decoder), "forward", probe)
            require_same(_decode(decoder, None, probe), wanted, "its decoder")
    parts = [
        Part(encoder, "forward", partial(_encode, encoder), _ENCODER, "in whole tensors, whatever the budget"),
        without_backward(decoder, "forward", partial(_decode, decoder, budget), JOINT_DECODE),
    ]
    return Found("MONAI's KL autoencoder", parts)


def _without_splits(network: nn.Module) -> nn.Module:
    """The network, or a copy of it whose convolutions are not split along an axis; splits fail for small sizes."""
    if all(getattr(layer, "num_splits", 1) == 1 for layer in network.modules()):
        return network
    network = copy.deepcopy(network)
    for layer in network.modules():
        if hasattr(layer, "num_splits"):
            layer.num_splits = 1
    return network


def _decode(decoder: nn.Module, budget: int | None, z: Tensor) -> Tensor:
    require_inference(decoder, z)
    return decode_within(layers_of(decoder), z, budget)


def _is_residual_block(block: nn.Module) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Module) for name in ("norm1", "conv1", "norm2", "conv2"))


def _is_attention(block: nn.Module) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Module) for name in ("norm", "attn"))


def _convolution(layer: nn.Module) -> nn.Conv3d:
    """What MONAI's wrappers hold."""
    inner = layer
    while not isinstance(inner, nn.Conv3d):
        inner = getattr(inner, "conv", None)
        if inner is None:
            raise Unsupported(f"its encoder has a {type(layer).__name__}, which is no layer of MONAI's autoencoders")
    return inner


def _check_encoder(encoder: nn.Module) -> None:
    for layer in encoder.modules():
        if getattr(layer, "norm_float16", False):
            raise Unsupported("its norms are computed in float16; float32 can be run")
    for block in encoder.blocks:
        if _is_residual_block(block):
            _convolution(block.conv1), _convolution(block.conv2)
        elif not _is_attention(block) and not isinstance(block, nn.GroupNorm):
            _convolution(block)


def _normalise(norm: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def _encode(encoder: nn.Module, x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last_3d)
    for block in encoder.blocks:
        x = _run_block(block, x)
    return x.contiguous()


def _run_block(block: nn.Module, x: Tensor) -> Tensor:
    if _is_residual_block(block):
        h = _convolution(block.conv1)(_normalise(block.norm1, x, silu=True))
        h = _convolution(block.conv2)(_normalise(block.norm2, h, silu=True))
        shortcut = block.nin_shortcut
        return h.add_(x if isinstance(shortcut, nn.Identity) else _convolution(shortcut)(x))
    if isinstance(block, nn.GroupNorm):
        return _normalise(block, x, silu=False)
    if _is_attention(block):
        return block(x)
    pad = getattr(block, "pad", ())  # of a strided convolution: at the far ends
    return _convolution(block)(F.pad(x, getattr(pad, "pad", pad)) if pad else x)
