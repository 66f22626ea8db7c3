"""The published 3D MedDiffusion networks (Wang et al., TMI 2025), recognised by the names and shapes of their weights.

Their own methods stay: what `patch_encode` and `decode` call is replaced, so that arguments and results are as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddiff.acceleration.replacement import (
    JOINT_DECODE,
    Found,
    Part,
    Unsupported,
    adopt,
    decode_within,
    noise,
    plain,
    require_floating,
    require_inference,
    require_same,
    run_plain,
    without_backward,
)
from meddiff.checkpoint import infer_autoencoder_config, infer_denoiser_config
from meddiff.config import AutoencoderConfig, DenoiserConfig
from meddiff.kernels.vq_nearest import vq_nearest
from meddiff.models.autoencoder import Decoder, Encoder
from meddiff.models.biflownet import BiFlowNet

_CODEBOOK_KEYS = {"embeddings", "encodings", "commitment_loss", "perplexity"}
_COMMITMENT = 0.25  # weight of the commitment loss
_DENOISER_ARGUMENTS = ("x", "time", "y", "res")
_Network = TypeVar("_Network", bound=nn.Module)


def find_autoencoder(module: nn.Module, budget: int | None) -> Found | None:
    """Section III-B: `encoder`, `decoder`, `pre_vq_conv`, `post_vq_conv` and `codebook.embeddings`."""
    names = ("encoder", "decoder", "codebook", "pre_vq_conv", "post_vq_conv")
    parts = [getattr(module, name, None) for name in names]
    encoder, decoder, codebook = parts[:3]
    if not all(isinstance(part, nn.Module) for part in parts) or not isinstance(
        getattr(codebook, "embeddings", None), Tensor
    ):
        return None
    require_floating(codebook.embeddings, "its codebook")
    config = _infer(infer_autoencoder_config, module, encoder)
    encode = partial(_encode, _on_their_weights(Encoder, config, encoder))
    network = _on_their_weights(Decoder, config, decoder)
    weight = encoder.conv_first.weight
    require_floating(weight, "its weights")
    with torch.no_grad():
        probe = noise((2, config.image_channels, *[2 * config.downsample] * 3), weight)
        require_same(encode(probe), run_plain(encoder, "forward", probe), "its encoder")
        if not decoder.training:
            probe = noise((1, config.embedding_dim, 2, 3, 2), weight)
            require_same(_decode(decoder, network, None, probe), run_plain(decoder, "forward", probe), "its decoder")
    found = [
        Part(encoder, "forward", encode, "meddiff's encoder, patch by patch"),
        without_backward(decoder, "forward", partial(_decode, decoder, network, budget), JOINT_DECODE),
    ]
    found.append(_find_codebook(codebook))
    if hasattr(module, "decode_sliding") and hasattr(module, "decode"):
        found.append(_find_decode_sliding(module))
    return Found(found, [child for child in module.children() if child not in parts])


def _infer(infer: Callable, module: nn.Module, network: nn.Module) -> AutoencoderConfig | DenoiserConfig:
    """The configuration that shapes imply; what leaves no trace in them is read from the layers of `network`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    groups = next((m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)), None)
    if groups is None:
        raise Unsupported("it has no GroupNorm")
    heads = {m.num_heads for m in network.modules() if isinstance(getattr(m, "num_heads", None), int)}
    options = {"num_heads": heads.pop()} if infer is infer_denoiser_config and len(heads) == 1 else {}
    try:
        return infer(shapes, num_groups=groups, **options)
    except (LookupError, ValueError, TypeError) as error:
        raise Unsupported(f"no configuration follows from its shapes: {error!r}") from error


def _on_their_weights(kind: type[_Network], config: AutoencoderConfig | DenoiserConfig, theirs: nn.Module) -> _Network:
    with torch.device("meta"):
        network = kind(config)
    adopt(network, theirs)
    return network


def _encode(network: Encoder, x: Tensor) -> Tensor:
    """One patch after another: no patch sees another one, and one stays in cache."""
    return torch.cat([network(patch) for patch in x.split(1)]).contiguous()


def _decode(module: nn.Module, network: Decoder, budget: int | None, z: Tensor) -> Tensor:
    require_inference(module, z)
    return decode_within(network.layers(), z, budget)


def _find_codebook(codebook: nn.Module) -> Part:
    function = partial(_quantize, codebook)
    if not codebook.training:
        probe = noise((1, codebook.embeddings.shape[1], 2, 2, 2), codebook.embeddings)
        got, wanted = function(probe), run_plain(codebook, "forward", probe)
        if not isinstance(wanted, dict) or wanted.keys() != _CODEBOOK_KEYS:
            raise Unsupported(f"its codebook should return a dictionary with {', '.join(sorted(_CODEBOOK_KEYS))}")
        for key in sorted(_CODEBOOK_KEYS):
            if got[key].dtype != wanted[key].dtype:
                raise Unsupported(f"its codebook returns {key} as {wanted[key].dtype}")
            require_same(got[key].float(), wanted[key].float(), f"{key} of its codebook")
    return without_backward(codebook, "forward", function, "nearest code without a distance matrix or a one-hot")


def _quantize(codebook: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """Section III-B: nearest codes, straight-through, with the commitment loss and the perplexity of their usage."""
    require_inference(codebook)
    codes = codebook.embeddings.detach()
    index = vq_nearest(z.detach(), codes)
    rows = F.embedding(index, codes).movedim(-1, 1)
    share = index.flatten().bincount(minlength=len(codes)).to(z.dtype) / index.numel()
    return {
        "embeddings": (rows - z).detach() + z,
        "encodings": index,
        "commitment_loss": _COMMITMENT * F.mse_loss(z, rows),
        "perplexity": torch.exp(-torch.special.xlogy(share, share).sum()),
    }


def _find_decode_sliding(module: nn.Module) -> Part:
    names = list(inspect.signature(type(module).decode_sliding).parameters)[1:3]
    decode_names = list(inspect.signature(type(module).decode).parameters)[1:3]
    if names != ["latent", "quantize"] or decode_names != names:
        note = "it does not take (latent, quantize, …) as decode does"
        return Part(module, "decode_sliding", None, "", note)
    default = inspect.signature(type(module).decode_sliding).parameters["quantize"].default
    options = {} if default is inspect.Parameter.empty else {"quantize": default}
    function = partial(_decode_jointly, module, options)
    note = "decoded as a whole: the seams between its tiles are gone"
    return without_backward(module, "decode_sliding", function, "decode", note)


def _decode_jointly(module: nn.Module, defaults: dict, *arguments: object, **options: object) -> Tensor:
    """`decode`, whatever tiles were asked for."""
    given = defaults | dict(zip(("latent", "quantize"), arguments)) | options
    return module.decode(given["latent"], quantize=given["quantize"])


def find_denoiser(module: nn.Module, _: int | None) -> Found | None:
    """Section III-C: BiFlowNet, called as model(x, time, y=…, res=…)."""
    names = ("IntraPatchFlow_input", "IntraPatchFlow_output", "x_embedder", "init_conv", "downs", "ups", "res_mlp")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    order = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if not set(_DENOISER_ARGUMENTS) <= set(order):
        raise Unsupported(f"its forward should take {', '.join(_DENOISER_ARGUMENTS)}, and takes {', '.join(order)}")
    config = _infer(infer_denoiser_config, module, module)
    function = partial(_estimate, module, _on_their_weights(BiFlowNet, config, module), order)
    weight = module.init_conv.weight
    require_floating(weight, "its weights")
    x = noise((1, config.channels, *[config.sub_volume] * 3), weight)
    time, y = torch.tensor([[500], [config.num_classes - 1]], device=x.device)
    res = torch.tensor([[0.25, 0.5, 0.125]], device=x.device, dtype=x.dtype)
    with torch.no_grad():
        wanted = run_plain(module, "forward", x, time, y=y, res=res)
        require_same(function(x, time, y=y, res=res), wanted)
    note = "calls with more than x, time, y and res run as before"
    return Found([Part(module, "forward", function, "meddiff's BiFlowNet", note)])


def _estimate(
    module: nn.Module, network: BiFlowNet, order: Sequence[str], *arguments: object, **options: object
) -> Tensor:
    given = dict(zip(order, arguments)) | options
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() != set(_DENOISER_ARGUMENTS):
        return plain(module, "forward", *arguments, **options)
    x, time, y, res = (given[name] for name in _DENOISER_ARGUMENTS)
    return network(x, time, y, res).contiguous()
