"""Walks a module, replaces what it recognises, and says what it did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from meddiff.acceleration import monai_autoencoder, published, quantizers
from meddiff.acceleration.replacement import Found, Part, Unsupported
from meddiff.models import BiFlowNet, PatchVolumeAutoencoder

_RECOGNISERS = (
    published.find_autoencoder,
    published.find_denoiser,
    monai_autoencoder.find_kl_autoencoder,
    quantizers.find_ema_quantizer,
    quantizers.find_vector_quantize,
)
_INSTALLED = "_meddiff_installed"  # in the __dict__ of a module: method → what took its place


@dataclass(frozen=True)
class Row:
    """One line of a report.

    path: in the module; empty for the module itself.
    kind: its class.
    method: what was replaced, or None.
    by: what took its place, or None where it was left.
    note: what to know about it; why it was left.
    """

    path: str
    kind: str
    method: str | None
    by: str | None
    note: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; `str` gives it as a table."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.by is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.by is None)

    def __str__(self) -> str:
        lines = [("module", "class", "method", "replaced by", "note")]
        for row in (*self.replaced, *self.left):
            method = "" if row.method is None else row.method
            lines.append((row.path or "(itself)", row.kind, method, row.by or "(left)", row.note))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in lines)


def accelerate(module: nn.Module, memory_budget: int | None = None) -> Report:
    """Replaces, in place, what meddiff runs faster or in less memory than the module does.

    What can be replaced is recognised by structure: names, shapes and settings of layers; then each replacement has to
    give the same numbers as the plain module on a small probe. Parameters, buffers and the state dict stay the module's
    own, so that it can be moved, converted, loaded, copied and saved as before. Only attributes of the instances
    change: other instances of the class, and everything global, are untouched. Recognised are

    - the published 3D MedDiffusion autoencoder and BiFlowNet (Wang et al., TMI 2025);
    - MONAI's AutoencoderKL and AutoencoderKlMaisi, whose decoder then runs in the memory there is;
    - the vector quantisers of MONAI (`EMAQuantizer`) and of vector-quantize-pytorch (`VectorQuantize`).

    Encoders and the denoiser can be trained afterwards. The rest has no backward: it is left as it is where the module
    is in training mode, and called in training mode later it raises RuntimeError. Load the weights first; accelerate
    before wrapping (DistributedDataParallel, torch.compile, accelerate), or give the wrapper: what is in it is found.
    Hooks of layers inside of a replaced network are not called.
    Accelerated modules may be called from several threads, and share nothing with each other.

    Args:
        module: any module; its dtype may be float32, bfloat16 or float16.
        memory_budget: bytes that a joint decode, or an encode of MONAI's, may take beside the weights; None is what is
            free.

    Returns:
        What was replaced, by what, and what was left and why. `restore` undoes it; so does a second call, first of all.

    Raises:
        TypeError: for anything but a module.
        ValueError: for a budget that is not positive.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate: module must be a torch.nn.Module, got {type(module).__name__}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"accelerate: memory_budget must be a positive number of bytes, got {memory_budget}")
    restore(module)
    return Report(tuple(_walk(module, "", memory_budget, set())))


def restore(module: nn.Module) -> None:
    """Undoes `accelerate` in all of a module. One that was not accelerated stays as it is.

    Raises:
        RuntimeError: if something else has replaced a method since; that has to be undone first.
    """
    accelerated = [(path, m, m.__dict__[_INSTALLED]) for path, m in module.named_modules() if _INSTALLED in m.__dict__]
    for path, m, methods in accelerated:
        for name, function in methods.items():
            if m.__dict__.get(name) is not function:
                raise RuntimeError(
                    f"restore: {name} of {path or 'the module'} ({type(m).__name__}) was replaced again after "
                    "accelerate; undo that first"
                )
    for _, m, methods in accelerated:
        for name in [*methods, _INSTALLED]:
            delattr(m, name)


def _walk(module: nn.Module, path: str, budget: int | None, seen: set[int]) -> list[Row]:
    """The rows of a module and all that is in it."""
    if id(module) in seen or next(module.parameters(), next(module.buffers(), None)) is None:
        return []
    seen.add(id(module))
    kind = type(module).__name__
    if isinstance(module, (PatchVolumeAutoencoder, BiFlowNet)):
        return [Row(path, kind, None, None, "it is meddiff's own")]
    for find in _RECOGNISERS:
        try:
            found = find(module, budget)
        except Unsupported as reason:
            return [Row(path, kind, None, None, str(reason))]
        if found is not None:
            return _replace(module, path, found, budget, seen)
    rows = [
        row
        for name, child in module.named_children()
        for row in _walk(child, f"{path}.{name}".lstrip("."), budget, seen)
    ]
    if all(row.by is None and row.note == _UNKNOWN for row in rows):
        return [Row(path, kind, None, None, _UNKNOWN)]
    return rows


_UNKNOWN = "no structure that meddiff knows"


def _replace(module: nn.Module, path: str, found: Found, budget: int | None, seen: set[int]) -> list[Row]:
    paths = {id(m): f"{path}.{name}".strip(".") for name, m in module.named_modules()}
    rows = [_install(part, paths[id(part.module)]) for part in found.parts]
    for child in found.rest:
        rows += _walk(child, paths[id(child)], budget, seen)
    return rows


def _install(part: Part, path: str) -> Row:
    module, kind = part.module, type(part.module).__name__
    if part.function is None:
        return Row(path, kind, part.method, None, part.note)
    if part.method in module.__dict__:
        return Row(path, kind, part.method, None, "it is wrapped already; accelerate before wrapping")
    setattr(module, part.method, part.function)
    module.__dict__.setdefault(_INSTALLED, {})[part.method] = part.function
    return Row(path, kind, part.method, part.by, part.note)
