"""Vector quantisers of other projects, in evaluation mode, on the fused search for the nearest code."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddiff.acceleration.replacement import (
    Found,
    Unsupported,
    noise,
    plain,
    require_floating,
    require_inference,
    require_same,
    run_plain,
    without_backward,
)
from meddiff.kernels.vq_nearest import vq_nearest

_SEARCH = "nearest code without a distance matrix"
# arguments of VectorQuantize.forward that change nothing in evaluation mode
_OF_TRAINING = {"sample_codebook_temp", "freeze_codebook", "ema_update_weight", "accum_ema_update", "ema_update"}


def nearest_code(tokens: Tensor, codes: Tensor, cosine: bool = False) -> Tensor:
    """Index of the code with the least Euclidean distance, or, with `cosine`, the largest product; int64 [B, *].

    tokens: [B, C, *], one to three axes behind the channels; codes: [K, C]. The lowest index on a tie.
    """
    shape = (*tokens.shape[:1], *tokens.shape[2:])
    tokens = tokens.detach()[(slice(None), slice(None), *[None] * (5 - tokens.ndim))]
    codes = codes.detach().float()
    if cosine:
        # z·c is largest where |(z, 0) − (c, √(M² − |c|²))| is least, M being the norm of the longest code.
        square = codes.double().square().sum(1, keepdim=True)
        codes = torch.cat([codes, (square.max() - square).sqrt().float()], dim=1)
        tokens = F.pad(tokens.float(), (0, 0, 0, 0, 0, 0, 0, 1))
    return vq_nearest(tokens, codes).view(shape)


def find_ema_quantizer(module: nn.Module, _: int | None) -> Found | None:
    """MONAI's `EMAQuantizer` (monai.networks.layers.vector_quantizer), alone or in a VQ-VAE (van den Oord et al. 2017).

    Inputs are [B, C, H, W] or [B, C, D, H, W]; the result is (quantised, commitment loss, indices), straight-through.
    """
    names = ("ema_cluster_size", "ema_w", "commitment_cost", "spatial_dims", "embed", "quantize")
    table = getattr(module, "embedding", None)
    if not isinstance(table, nn.Embedding) or not all(hasattr(module, name) for name in names):
        return None
    require_floating(table.weight, "its codebook")
    function = partial(_ema_quantize, module)
    if not module.training:
        probe = noise((2, table.embedding_dim, *[3] * module.spatial_dims), table.weight)
        wanted = run_plain(module, "forward", probe)
        for got, expected, name in zip(function(probe), wanted, ("its output", "its loss", "its index")):
            require_same(got.float(), expected.float(), name)
    part = without_backward(module, "forward", function, _SEARCH, "training statistics stay with `quantize`")
    return Found([part])


def _ema_quantize(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    require_inference(module)
    index = nearest_code(inputs, module.embedding.weight)
    quantized = module.embed(index)
    loss = module.commitment_cost * F.mse_loss(quantized.detach(), inputs)
    return inputs + (quantized - inputs).detach(), loss, index


def find_vector_quantize(module: nn.Module, _: int | None) -> Found | None:
    """`vector_quantize_pytorch.VectorQuantize` with a Euclidean or a cosine codebook, and any of its layouts and heads.

    A call with mask, lens, topk, given indices, a transformed codebook or the breakdown of the loss runs as before.
    """
    codebook = getattr(module, "_codebook", None)
    names = ("use_cosine_sim", "project_in", "project_out", "heads", "separate_codebook_per_head", "channel_last")
    if not isinstance(getattr(codebook, "embed", None), Tensor) or not all(hasattr(module, name) for name in names):
        return None
    require_floating(codebook.embed, "its codebook")
    for name in ("affine_param", "vq_bridge"):
        value = getattr(codebook, name, None)
        if value is not None and value is not False:
            raise Unsupported(f"its codebook has {name}, which changes the codes with every call")
    if not codebook.initted:
        raise Unsupported("its codebook is not initialised yet; give it data, or load the weights first")
    function = partial(_vector_quantize, module)
    if not module.training:
        probe = noise(_probe_shape(module), codebook.embed)
        quantized, index, _ = run_plain(module, "forward", probe)
        for got, wanted, name in zip(function(probe), (quantized, index), ("its output", "its index")):
            require_same(got.float(), wanted.float(), name)
    note = "calls with mask, lens, topk, indices or return_loss_breakdown run as before"
    return Found([without_backward(module, "forward", function, _SEARCH, note)])


def _channels_first(module: nn.Module, x: Tensor) -> bool:
    feature_map = module.accept_image_fmap or module.accept_3d_fmap
    return feature_map or (not module.channel_last and x.ndim > 2)


def _probe_shape(module: nn.Module) -> tuple[int, ...]:
    if module.accept_image_fmap or module.accept_3d_fmap:
        return (2, module.dim, *[3] * (3 if module.accept_3d_fmap else 2))
    return (2, 9, module.dim) if module.channel_last else (2, module.dim, 9)


def _vector_quantize(module: nn.Module, x: Tensor, *others: object, **options: object) -> tuple:
    """As the plain forward in evaluation mode: quantised x, indices, and a loss of 0."""
    given = {name for name, value in options.items() if value is not None and value is not False}
    if others or given - _OF_TRAINING:
        return plain(module, "forward", x, *others, **options)
    require_inference(module)
    first, codebook = _channels_first(module, x), module._codebook
    tokens = x.movedim(1, -1) if first else x
    h = module.project_in(tokens).unflatten(-1, (module.heads, -1))
    h = codebook.transform_input(h).float()
    found = []
    for head, rows in enumerate(h.unbind(-2)):  # [*, C]
        codes = codebook.embed[head if module.separate_codebook_per_head else 0]
        index = nearest_code(rows.flatten(0, -2).mT[None], codes, module.use_cosine_sim).view(rows.shape[:-1])
        found.append((F.embedding(index, codes.float()), index))
    quantized = module.project_out(torch.cat([rows for rows, _ in found], dim=-1).type(x.dtype))
    index = found[0][1] if module.heads == 1 else torch.stack([index for _, index in found], dim=-1)
    return quantized.movedim(-1, 1) if first else quantized, index, module.zero
