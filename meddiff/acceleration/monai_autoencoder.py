"""MONAI's AutoencoderKL and AutoencoderKlMaisi (Guo et al. 2024, "MAISI"), for any size in a memory budget.

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
    running_dtype,
    without_backward,
)
from meddiff.decode import UnsupportedLayer, layers_of
from meddiff.kernels.group_norm_silu import group_norm_silu
from meddiff.kernels.norm_silu_conv3d import conv3d

_PLANES = 4  # new ones in a call of a strided convolution
_ENCODER = "level by level within the memory there is"
_ENCODER_NOTE = "in whole tensors, with fused norms, where a gradient may be wanted: use torch.no_grad()"


def find_kl_autoencoder(module: nn.Module, budget: int | None) -> Found | None:
    names = ("encoder", "decoder", "quant_conv_mu", "post_quant_conv")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    encoder, decoder = module.encoder, module.decoder
    if not all(isinstance(getattr(half, "blocks", None), nn.ModuleList) for half in (encoder, decoder)):
        return None
    try:
        weight = layers_of(decoder)[0].weight
    except UnsupportedLayer as error:
        raise Unsupported(str(error)) from error
    require_floating(weight, "its weights")
    _check_encoder(encoder)
    with torch.no_grad():
        probe = noise((1, _convolution(encoder.blocks[0]).in_channels, 12, 9, 16), weight)
        wanted = run_plain(_without_splits(encoder), "forward", probe)
        try:
            require_same(_encode(encoder, None, probe), wanted, "its encoder")
        except UnsupportedLayer as error:
            raise Unsupported(f"in a level of its encoder, {error}") from error
        require_same(_encode_whole(encoder, probe), wanted, "its encoder")
        if not decoder.training:
            probe = noise((1, weight.shape[1], 3, 2, 4), weight)
            wanted = run_plain(_without_splits(decoder), "forward", probe)
            require_same(_decode(decoder, None, probe), wanted, "its decoder")
    parts = [
        Part(encoder, "forward", partial(_encode, encoder, budget), _ENCODER, _ENCODER_NOTE),
        without_backward(decoder, "forward", partial(_decode, decoder, budget), JOINT_DECODE),
    ]
    return Found(parts)


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


def _encode(encoder: nn.Module, budget: int | None, x: Tensor) -> Tensor:
    """Each level is a chain of layers as a decoder is. Finished slabs go into the strided convolution behind it, so its
    last tensor is never whole."""
    if torch.is_grad_enabled():
        return _encode_whole(encoder, x)
    level: list[nn.Module] = []
    for block in encoder.blocks:
        if not hasattr(block, "pad"):
            level.append(block)
            continue
        conv = _convolution(block)
        halved = _Halved(conv, x)
        room = None if budget is None else max(budget - halved.out.nbytes, 1)
        decode_within(layers_of(nn.Sequential(*level)), x, room, halved)
        x, level = halved.out, []
    return decode_within(layers_of(nn.Sequential(*level)), x, budget)


class _Halved:
    """A strided convolution 3³ with a plane of zeros at the far end of each axis, which takes its input slab by slab.

    out: [B, O, D // 2, H // 2, W // 2] for inputs of x's size, channels-last.
    """

    def __init__(self, conv: nn.Conv3d, x: Tensor) -> None:
        self.depth, dtype = x.shape[2], running_dtype(conv.weight)
        self.weight = conv.weight.detach().to(dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        d, h, w = (n // 2 for n in x.shape[2:])
        memory = self.weight.new_empty(x.shape[0], d, h, w, conv.out_channels)
        self.out = memory.permute(0, 4, 1, 2, 3)
        self.rest: Tensor | None = None

    def __call__(self, slab: Tensor, sample: int, start: int) -> None:
        rest = self.rest
        try:
            for part in slab.split(_PLANES, dim=2):  # padding copies its input
                self._take(part, sample, start)
                start += part.shape[2]
        except BaseException:
            self.rest = rest  # the slab may come again
            raise

    def _take(self, slab: Tensor, sample: int, start: int) -> None:
        stop = start + slab.shape[2]
        if start > 0:
            slab = torch.cat([self.rest, slab], dim=2)
        first = (stop - slab.shape[2]) // 2
        last = self.depth // 2 if stop == self.depth else (stop - 1) // 2
        if first < last:
            padded = F.pad(slab, (0, 1, 0, 1, 0, int(stop == self.depth)))
            planes = padded[:, :, : 2 * (last - first) + 1]
            self.out[sample : sample + 1, :, first:last] = conv3d(planes, self.weight, self.bias, stride=2)
        self.rest = slab[:, :, 2 * (last - first) :].clone()


def _encode_whole(encoder: nn.Module, x: Tensor) -> Tensor:
    """With fused norms; differentiable."""
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
