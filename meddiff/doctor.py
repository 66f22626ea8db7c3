"""What is installed and active, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import meddiff
from meddiff.resources import available_bytes, default_device, default_dtype


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _library_lines() -> Iterator[tuple[str, str]]:
    try:
        import meddiff.kernels  # noqa: F401 (loads the libraries)
    except (ImportError, OSError) as error:
        yield "CPU library", f"missing: {error}"
        return
    active, *others = torch.ops.meddiff.cpu_isas()
    also = f" (also runs: {', '.join(others)})" if others else ""
    tiles = " and amx" if torch.ops.meddiff._has_linear() else ""
    yield "CPU library", f"loaded, uses {active}{tiles}{also}"

    built = (Path(meddiff.__file__).parent / "_cuda.so").exists()
    if torch.version.cuda is None:
        yield "CUDA library", "not used: this PyTorch has no CUDA; install a CUDA build of PyTorch to use a GPU"
    elif built:
        yield "CUDA library", "loaded"
    else:
        yield (
            "CUDA library",
            "not built, PyTorch does its work, slower: install the CUDA toolkit (nvcc), then `pip install -e .` again",
        )


def _cuda_lines() -> Iterator[tuple[str, str]]:
    if torch.version.cuda is None:
        return
    if not torch.cuda.is_available():
        yield "GPU", f"none is seen by PyTorch (CUDA {torch.version.cuda}); check the driver with nvidia-smi"
    for index in range(torch.cuda.device_count()):
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
        major, minor = torch.cuda.get_device_capability(index)
        yield (
            f"GPU {index}",
            f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {free:.1f} of {total:.1f} GiB free",
        )


def _lines() -> Iterator[tuple[str, str]]:
    yield "meddiff", meddiff.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "PyTorch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU build'}"
    yield from _library_lines()
    yield from _cuda_lines()
    triton = _installed("triton")
    yield "Triton", triton or "missing: `pip install triton` (Linux), needed for the GPU kernels"
    xformers = _installed("xformers")
    yield "xformers", xformers or 'not installed (optional): pip install "meddiff[xformers]"'
    ninja = _installed("ninja") if importlib.util.find_spec("ninja") else None
    yield "ninja", ninja or "not installed here (only needed to build; pip brings its own)"
    free = available_bytes(torch.device("cpu"))
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by PyTorch"
    yield "memory", "unknown" if free is None else f"{free / 2**30:.1f} GiB free"
    device = default_device()
    yield "default", f"{device}, {str(default_dtype(device)).removeprefix('torch.')}"


def examine() -> str:
    """A report, one line for each thing examined. It never fails because something is missing."""
    lines = list(_lines())
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {finding}" for name, finding in lines)
