"""meddiff's operators, for other projects: their Python faces, which check their arguments. Described in ops.md.

Importing this registers `torch.ops.meddiff.*`; a tensor's device chooses the kernel.
"""

from meddiff.decode.chain import plan_decoder, tiled_decode
from meddiff.kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from meddiff.kernels.channel_norm import channel_norm
from meddiff.kernels.diffusion_step import diffusion_step
from meddiff.kernels.group_norm_silu import group_norm_silu
from meddiff.kernels.patchify import patchify, stitch
from meddiff.kernels.vq_fused import vq_decode, vq_encode
from meddiff.kernels.vq_nearest import vq_nearest
from meddiff.kernels.window_attention import window_attention

__all__ = [
    "channel_norm",
    "diffusion_step",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "group_norm_silu",
    "layer_norm_modulate",
    "patchify",
    "plan_decoder",
    "stitch",
    "tiled_decode",
    "vq_decode",
    "vq_encode",
    "vq_nearest",
    "window_attention",
]
