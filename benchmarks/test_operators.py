"""The operators at small sizes under pytest-benchmark, to notice a change that makes one slower on this machine:

    python -m pytest benchmarks/test_operators.py --benchmark-save=baseline
    python -m pytest benchmarks/test_operators.py --benchmark-compare --benchmark-compare-fail=median:20%

The first stores a baseline in benchmarks/results/<device>/, the second compares with the last one that is there. The
lines of the tables come from bench_*.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meddiff.kernels.adaln import layer_norm_modulate
from meddiff.kernels.group_norm_silu import group_norm_silu
from meddiff.kernels.patchify import patchify
from meddiff.kernels.vq_nearest import vq_nearest
from meddiff.kernels.window_attention import window_attention
from meddiff.resources import default_device

DEVICE = default_device()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.fixture
def timed(benchmark):
    """Times a call without gradients, until the device has done it."""

    def run(work) -> None:
        def wait() -> None:
            work()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        with torch.inference_mode():
            benchmark(wait)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_silu(timed, dtype):
    x = draw(1, 48, 64, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = draw(48), draw(48)
    timed(lambda: group_norm_silu(x, 24, weight, bias, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_modulate(timed, dtype):
    x, shift, scale = draw(1, 16, 16, 16, 72, dtype=dtype), draw(1, 72, dtype=dtype), draw(1, 72, dtype=dtype)
    timed(lambda: layer_norm_modulate(x, shift, scale, 1e-6))


@pytest.mark.parametrize("window", [8, 4])
def test_window_attention(timed, window):
    qkv = draw(1, 16, 16, 16, 3 * 72)
    timed(lambda: window_attention(qkv, 8, window))


def test_vq_nearest(timed):
    latent, codes = draw(1, 8, 16, 16, 16), draw(8192, 8)
    timed(lambda: vq_nearest(latent, codes))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_patchify(timed, dtype):
    x = (1000 * draw(1, 1, 128, 128, 128)).to(dtype)
    timed(lambda: patchify(x, 64, torch.bfloat16, (-1000.0, 1000.0)))
