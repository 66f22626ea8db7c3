"""PEP 517 backend: setuptools, plus torch as a build requirement only where there is no torch to build against.

The compiled libraries need torch's headers. Naming torch in pyproject.toml would download it into pip's build
environment even where it is installed already, so the hooks below ask for it only if it is not.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the other hooks of the backend)

OLDEST_TORCH = (2, 11)  # the first stable ABI with everything that csrc needs
TORCH_REQUIREMENT = "torch>={}.{}".format(*OLDEST_TORCH)


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # the CUDA version it was built for


def find_torch() -> Torch | None:
    """The torch of this process, else that of the environment which pip installs into; never imports it."""
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if not origin:
        # pip hides the environment by PYTHONPATH, which -E ignores
        query = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
        command = [sys.executable, "-E", "-c", query]
        origin = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout.strip()
    return read_torch(Path(origin).parent) if origin else None


def read_torch(folder: Path) -> Torch | None:
    """What torch/version.py says, read as text; None if there is no such file."""
    try:
        text = (folder / "version.py").read_text()
    except FileNotFoundError:
        return None
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.M)
    cuda = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.M)
    if version is None:
        raise RuntimeError(f"meddiff: cannot read torch's version from {folder / 'version.py'}; reinstall torch")
    return Torch(folder, version[1], cuda[1] if cuda else None)


def cuda_wanted(request: str, torch: Torch | None, nvcc: str | None) -> bool:
    """Whether to build the CUDA library. `request` is the environment variable MEDDIFF_CUDA: "", "0" or "1"."""
    if request not in ("", "0", "1"):
        raise RuntimeError(f"meddiff: MEDDIFF_CUDA must be 0, 1 or unset, got {request!r}")
    cuda_torch = torch is not None and torch.cuda is not None
    if nvcc is None and request == "1":
        raise RuntimeError(
            "meddiff: MEDDIFF_CUDA=1 asks for the CUDA library, but nvcc was not found; "
            "install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME"
        )
    if nvcc is None and request == "" and cuda_torch:
        print(
            f"meddiff: torch {torch.version} is a CUDA build, but nvcc was not found: building the CPU library only. "
            "GPUs will use slower PyTorch code; to change that, install the CUDA toolkit and meddiff again.",
            file=sys.stderr,
        )
    return request == "1" or (request == "" and cuda_torch and nvcc is not None)


def torch_requirement() -> list[str]:
    """Build requirement on torch: none if one is there. One that is too old is an error: it is not ours to replace."""
    torch = find_torch()
    if torch is None:
        return [TORCH_REQUIREMENT]
    if tuple(map(int, torch.version.split(".")[:2])) < OLDEST_TORCH:
        raise RuntimeError(
            f"meddiff: {TORCH_REQUIREMENT} is needed and {torch.version} is installed in {torch.folder}; "
            "upgrade torch first, then install meddiff again"
        )
    return []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()
