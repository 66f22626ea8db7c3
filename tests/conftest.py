"""What tests share: the reference outputs and the networks that belong to them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from meddiff.config import PRESETS, AutoencoderConfig

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any module with Triton kernels is imported

DATA = Path(__file__).parent / "data"


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"public:{name}".encode())))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def _reference_weights(network: nn.Module) -> nn.Module:
    """The weights of the reference outputs, drawn from each key's name."""
    for key, tensor in network.state_dict().items():
        if key in ("pos_embed", "codebook.N", "codebook.z_avg"):
            continue
        z = _draw(key, tuple(tensor.shape))
        if key.endswith("bias"):
            z = 0.1 * z
        elif key.endswith("gamma") or (key.endswith("weight") and z.ndim == 1):
            z = 1 + 0.1 * z
        elif key.endswith("weight"):
            z = z / np.sqrt(np.prod(z.shape[1:]))
        with torch.no_grad():
            tensor.copy_(z)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def reference_weights() -> Callable[[nn.Module], nn.Module]:
    return _reference_weights


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Norm of the difference over the norm of the second."""
    return lambda got, wanted: ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny_autoencoder_config() -> AutoencoderConfig:
    return PRESETS["tiny"].autoencoder
