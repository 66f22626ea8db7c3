"""What the commands share: types and checks of their arguments, and the model that they name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from meddiff.pipelines import MedDiffusion

Dtype = Literal["float32", "bfloat16", "float16"]
Modality = Literal["CT", "MR"]


class UsageError(Exception):
    """Arguments that do not go together."""


def load_model(
    model: str | None, untrained: str | None, device: str | None, dtype: str | None, budget: str | None = None
) -> MedDiffusion:
    """The model of --model, of --untrained, or the small demo that ships; UsageError for both."""
    import torch

    from meddiff.pipelines import MedDiffusion
    from meddiff.resources import bytes_of

    if model is not None and untrained is not None:
        raise UsageError("give either --model DIR or --untrained PRESET (random weights)")
    precision = getattr(torch, dtype) if dtype else None
    try:
        limit = bytes_of(budget) if budget else None
    except ValueError as error:
        raise UsageError(f"--budget: {error}") from None
    if untrained is None:
        loaded = MedDiffusion.from_pretrained(model or "demo", device, precision)
    else:
        warnings.warn(f"--untrained {untrained}: random weights, so the result is noise", stacklevel=2)
        loaded = MedDiffusion.untrained(untrained, device=device, dtype=precision)
    loaded.memory_budget = limit
    return loaded


def check_target(path: str | None, suffixes: tuple[str, ...]) -> None:
    """Refuse a target that cannot be written with UsageError, before the work."""
    if path is None:
        return
    if not path.endswith(suffixes):
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not Path(path).parent.is_dir():
        raise UsageError(f"{path}: there is no folder {Path(path).parent}; make it first")


def parse_triple(text: float | str | None, number: type[int] | type[float]) -> tuple | None:
    """One number for all three axes, or three with an x between them; UsageError for anything else."""
    from meddiff.pipelines.jobs import triple

    try:
        return None if text is None else triple(text, number)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_window(low: float | None, high: float | None) -> tuple[float, float] | None:
    """The intensities of --low and --high, or None; UsageError for one alone."""
    if (low is None) != (high is None):
        raise UsageError("give both --low and --high, or neither")
    return None if low is None else (low, high)


def describe_extent(shape: Sequence[int], spacing: Sequence[float]) -> str:
    """Size and spacing along the file's axes, for people."""
    size, mm = ("×".join(f"{n:g}" for n in values) for values in (shape, spacing))
    return f"{size} voxels of {mm} mm"
