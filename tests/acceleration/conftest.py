"""The published networks in plain PyTorch, at a small size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from meddiff.config import PRESETS


@pytest.fixture(scope="session")
def published() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "published.py"
    spec = importlib.util.spec_from_file_location("published", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def autoencoder(published) -> nn.Module:
    torch.manual_seed(0)
    return published.Autoencoder(PRESETS["tiny"].autoencoder).eval()


@pytest.fixture
def denoiser(published) -> nn.Module:
    torch.manual_seed(1)
    return published.BiFlowNet(PRESETS["tiny"].denoiser).eval()
