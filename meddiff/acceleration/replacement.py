"""What recognising and replacing have in common: what is found, parameters that are shared, and proof on a probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from meddiff.decode import Layer, OnSlab, decode_jointly
from meddiff.resources import available_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Norm of the difference over the norm. A probe finds another structure, which is off by much more; what equal ones
# differ by is rounding.
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
JOINT_DECODE = "joint decode within the memory there is"
_SHARE_OF_FREE = 0.9  # of the free memory; others need some too
_SETTINGS = {
    nn.Conv3d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.ConvTranspose3d: ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode"),
    nn.GroupNorm: ("num_groups", "eps"),
    nn.Embedding: ("padding_idx", "max_norm"),
    nn.Linear: (),
}


class Unsupported(Exception):
    """A structure was recognised, and something about it cannot be run; the message says what."""


@dataclass(frozen=True)
class Part:
    """A method of a module, and the function that takes its place with the method's own arguments; or None, and the
    note says why."""

    module: nn.Module
    method: str
    function: Callable | None
    by: str
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What a recogniser found in a module.

    rest: children that do not belong to it, and are looked at by themselves.
    """

    parts: Sequence[Part]
    rest: Sequence[nn.Module] = ()


def without_backward(module: nn.Module, method: str, function: Callable, by: str, note: str = "") -> Part:
    """A part that is left as it is where the module is in training mode."""
    if module.training:
        return Part(module, method, None, by, "it is in training mode and the operator has no backward; call eval()")
    return Part(module, method, function, by, note)


def require_inference(module: nn.Module, *inputs: Tensor) -> None:
    """RuntimeError where a gradient, or an update of a codebook, would be lost."""
    name = type(module).__name__
    if module.training:
        raise RuntimeError(
            f"accelerate: {name} is in training mode, and what replaces it has no backward; call eval(), "
            "or meddiff.restore() and train the plain module"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise RuntimeError(
            f"accelerate: {name} got an input that requires a gradient, and what replaces it has no backward; "
            "use torch.no_grad(), or meddiff.restore()"
        )


def require_floating(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in DTYPES:
        raise Unsupported(f"{name} is {tensor.dtype}; float32, bfloat16 and float16 can be run")
    if tensor.device.type == "meta":
        raise Unsupported("it has no weights yet; load them first")


def adopt(ours: nn.Module, theirs: nn.Module) -> None:
    """Lets every layer of `ours`, built on the meta device, hold the parameters of the layer of that name in `theirs`.

    They share the dictionaries that hold them, so that what becomes of theirs (another device or dtype, other weights)
    becomes of ours, and copies of both share again. Raises Unsupported where keys, shapes or settings differ.
    """
    unknown = theirs.state_dict().keys() - ours.state_dict().keys()
    if unknown:
        raise Unsupported(f"it has {sorted(unknown)[0]}, which the published structure has not")
    for path, module in theirs.named_modules():
        if path and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
            raise Unsupported(f"{path} has hooks, which would not be called; accelerate before adding them")
    for path, layer in ours.named_modules():
        names = [*layer._parameters, *layer._buffers]
        if not names:
            continue
        try:
            other = theirs.get_submodule(path)
        except AttributeError:
            raise Unsupported(f"it has no {path}") from None
        for name in names:
            wanted, got = (_shape(module, name) for module in (layer, other))
            if wanted != got:
                raise Unsupported(f"{f'{path}.{name}'.lstrip('.')} should be {wanted}, and is {got}")
        for kind, settings in _SETTINGS.items():
            if not isinstance(layer, kind):
                continue
            if not isinstance(other, kind):
                raise Unsupported(f"{path} is a {type(other).__name__}, and should be a {kind.__name__}")
            for name in settings:
                wanted, got = getattr(layer, name), getattr(other, name)
                if wanted != got:
                    raise Unsupported(f"{path}.{name} should be {wanted}, and is {got}")
    for path, layer in ours.named_modules():
        if layer._parameters or layer._buffers:
            other = theirs.get_submodule(path)
            layer.__dict__.update(_parameters=other._parameters, _buffers=other._buffers)


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    tensor = module._parameters.get(name, module._buffers.get(name))
    return None if tensor is None else tuple(tensor.shape)


def noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same normally distributed numbers every time, and no other random state is touched."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tuple(shape), generator=generator, device="cpu").to(like.device, like.dtype)


def require_same(got: Tensor, wanted: Tensor, name: str = "it") -> None:
    """Raises Unsupported if two results on a probe are not the same but for rounding, or if they prove nothing."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        raise Unsupported(
            f"on a probe {name} gave {wanted.dtype} {tuple(wanted.shape)}, and what would replace it {got.dtype} "
            f"{tuple(got.shape)}"
        )
    size = wanted.double().norm().item()
    if size == 0:
        raise Unsupported(f"on a probe {name} gave zeros, which prove nothing; load the weights first")
    error = (got.double() - wanted.double()).norm().item() / size
    if not error <= _PROBE_TOLERANCE[wanted.dtype]:
        raise Unsupported(f"on a probe {name} and what would replace it differ by {error:.1e} of the norm")


def plain(module: nn.Module, method: str, *arguments: object, **options: object) -> object:
    """What the class of a module itself does."""
    return getattr(type(module), method)(module, *arguments, **options)


def run_plain(module: nn.Module, method: str, *arguments: object, **options: object) -> object:
    """`plain` on a probe; Unsupported if it fails."""
    try:
        with torch.no_grad():
            return plain(module, method, *arguments, **options)
    except Exception as error:  # another project's code may raise any
        reason = str(error).partition("\n")[0]
        raise Unsupported(f"on a probe its {method} failed: {type(error).__name__}: {reason}") from error


def decode_within(
    layers: Sequence[Layer], z: Tensor, budget: int | None, on_slab: OnSlab | None = None
) -> Tensor | None:
    """`meddiff.decode.decode_jointly` within a budget, and within what is free; in the dtype of autocast, if it is on.

    Returns a contiguous [B, O, D, H, W] without gradient, or None with `on_slab`.
    """
    # a plan has no graph
    run = torch.compiler.disable(_decode_within) if torch.compiler.is_compiling() else _decode_within
    return run(layers, z, budget, on_slab)


@torch.no_grad()
def _decode_within(layers: Sequence[Layer], z: Tensor, budget: int | None, on_slab: OnSlab | None) -> Tensor | None:
    dtype = running_dtype(layers[0].weight)
    free = available_bytes(z.device)
    if free is not None:
        budget = min(int(_SHARE_OF_FREE * free), free if budget is None else budget)
    layers = [_cast(layer, dtype) for layer in layers]
    with torch.autocast(z.device.type, enabled=False):
        volume = decode_jointly(layers, z.to(dtype), budget, on_slab)
    return None if volume is None else volume.contiguous()


def running_dtype(weight: Tensor) -> torch.dtype:
    """Autocast's, if it is on, else that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _cast(layer: Layer, dtype: torch.dtype) -> Layer:
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: v.detach().to(dtype) for name, v in values.items() if isinstance(v, Tensor)})
