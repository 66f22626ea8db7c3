"""Compiled and Triton kernels, installed as `meddiff.kernels`.

Importing it loads the compiled libraries, which register the operators `torch.ops.meddiff`, and starts no GPU work.
"""

from __future__ import annotations

import sys


def _hand_over() -> None:
    """Puts the installed package `kernels` into sys.modules, or raises ImportError if there is none.

    Python finds this folder as the top-level module `kernels` when the repository root is on sys.path. A package of
    that name on PyPI is imported by transformers, and must be what they get.
    """
    import importlib.util
    from importlib.machinery import PathFinder
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'kernels'", name="kernels")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)


def _load_libraries() -> None:
    from pathlib import Path

    import torch

    folder = Path(sys.modules["meddiff"].__path__[0])
    libraries = [folder / "_cpu.so"]
    if torch.version.cuda is not None and (folder / "_cuda.so").exists():
        libraries.append(folder / "_cuda.so")
    for library in libraries:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            reason = (error.__cause__ or error) if library.exists() else "no such file"
            raise ImportError(
                f"meddiff.kernels: cannot load the compiled library {library} ({reason}); "
                "build it with `pip install -e .` in the repository, or install meddiff again"
            ) from error


if __name__ == "kernels":
    _hand_over()
else:
    _load_libraries()
    from . import vq_nearest

    __all__ = ["vq_nearest"]
