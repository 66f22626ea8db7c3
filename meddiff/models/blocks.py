"""Layers that the autoencoder and the denoiser share. Tensors are [B, C, D, H, W] in channels-last memory format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddiff.kernels.direct_conv3d import direct_suits, direct_up_conv3d
from meddiff.kernels.group_norm_silu import group_norm_silu
from meddiff.kernels.linear import linear
from meddiff.kernels.norm_silu_conv3d import conv3d, strides_to_one_column, weight_outweighs
from meddiff.kernels.up_conv3d import up_conv3d_of_few
from meddiff.kernels.volume_attention import volume_attention, volume_attention_ref

_LEAST = 2**16  # numbers; PyTorch unfolds fewer in float32, which rounds less than oneDNN does


def _by_pytorch() -> bool:
    """Whether an operator is PyTorch's as it is, which autograd, autocast and the compiler can follow."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


class _ChannelsLast:
    """Hands on channels-last tensors. PyTorch falls back to contiguous ones for convolutions of few voxels; where it
    does not, this costs nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous(memory_format=torch.channels_last_3d)


class GroupNorm(nn.GroupNorm):
    """GroupNorm, then scale and shift where they are given ([B, C] each), then SiLU if `silu`, in one operator."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, silu: bool = True) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, self.silu)


class Conv3d(_ChannelsLast, nn.Conv3d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu":
            return super()._conv_forward(x, weight, bias)
        if strides_to_one_column(x, weight, self.stride[0], self.padding[0]):
            return self._conv_forward(F.pad(x, (0, self.stride[0])), weight, bias)[..., :1]
        planes, learning = x.shape[2], torch.is_grad_enabled()
        # oneDNN's bfloat16 reads memory that nobody wrote, where it pads a plane of one channel, and for the weight
        # gradient where it pads two planes (PyTorch 2.13)
        if self.padding == (1, 1, 1) and (planes == 1 and x.shape[1] == 1 or planes == 2 and learning):
            return F.conv3d(F.pad(x, (0, 0, 0, 0, 1, 1)), weight, bias, self.stride, (0, 1, 1))
        if x.shape[1] == 1:  # contiguous in both formats; the strides decide the output's
            x = x.reshape(len(x), *x.shape[2:], 1).movedim(-1, 1)
        if _by_pytorch():
            return super()._conv_forward(x, weight, bias)
        return conv3d(x, weight, bias, self.stride[0], self.padding[0], _LEAST)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _by_pytorch() else linear(x, self.weight, self.bias)


class ConvTranspose3d(_ChannelsLast, nn.ConvTranspose3d):
    def forward(self, x: Tensor) -> Tensor:
        if _by_pytorch():
            return super().forward(x)
        if weight_outweighs(x, self.weight):
            return up_conv3d_of_few(x, self.weight, self.bias)
        if direct_suits(x, self.weight, 4):
            return direct_up_conv3d(x, self.weight, self.bias)
        return super().forward(x)


def conv1(in_channels: int, out_channels: int) -> Conv3d:
    return Conv3d(in_channels, out_channels, kernel_size=1)


def conv3(in_channels: int, out_channels: int) -> Conv3d:
    return Conv3d(in_channels, out_channels, kernel_size=3, padding=1)


def down_conv(channels: int) -> Conv3d:
    """Halves every axis."""
    return Conv3d(channels, channels, kernel_size=4, stride=2, padding=1)


def up_conv(channels: int) -> ConvTranspose3d:
    """Doubles every axis."""
    return ConvTranspose3d(channels, channels, kernel_size=4, stride=2, padding=1)


def attend_over_volume(x: Tensor, to_qkv: nn.Linear, to_out: nn.Conv3d, heads: int) -> Tensor:
    """Multi-head self-attention with every voxel of `x` [B, C, D, H, W] as a token, in D, H, W order.

    `to_qkv` maps C → 3·heads·head_dim, its rows in the order q, k, v and each head-major; `to_out` is a 1³ convolution.
    """
    b, _, d, h, w = x.shape
    qkv = to_qkv(x.permute(0, 2, 3, 4, 1).reshape(b, d * h * w, -1))
    out = (volume_attention_ref if _by_pytorch() else volume_attention)(qkv, heads)
    return to_out(out.reshape(b, d, h, w, -1).permute(0, 4, 1, 2, 3))
