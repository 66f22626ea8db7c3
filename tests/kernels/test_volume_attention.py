"""Attention over a volume in bfloat16 against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.kernels.volume_attention import volume_attention

ops = torch.ops.meddiff
FAST = pytest.mark.skipif(not ops._has_volume_attention(), reason="needs a processor with AMX")
# (B, N, heads, dim): one token, parts of tiles, several blocks of keys and of queries, the widest heads
CASES = [
    (1, 1, 1, 1),
    (2, 5, 2, 6),
    (1, 33, 1, 32),
    (1, 300, 2, 40),
    (1, 515, 1, 128),
    (2, 700, 4, 32),
    (1, 257, 3, 16),
]


def draw(batch: int, tokens: int, heads: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return (1.5 * torch.randn(batch, tokens, 3 * heads * dim, generator=generator)).bfloat16()


def definition(qkv: Tensor, heads: int) -> Tensor:
    """By PyTorch, in qkv's dtype."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@FAST
@pytest.mark.parametrize("shape", CASES)
def test_as_near_as_pytorch(shape: tuple):
    qkv, heads = draw(*shape), shape[2]
    out = torch.full((*shape[:2], heads * shape[3]), torch.nan, dtype=torch.bfloat16)
    ops._volume_attention(qkv, heads, out)
    wanted = definition(qkv.double(), heads)
    assert error(out, wanted) <= 1.05 * error(definition(qkv, heads), wanted) + 1e-6
    assert torch.equal(volume_attention(qkv, heads), out)


@FAST
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_scores_of_any_size(offset: float):
    qkv = 30 * draw(1, 300, 1, 32)
    qkv[..., :32] += offset
    wanted = definition(qkv.double(), 1)  # of one value each, with the offset
    assert error(volume_attention(qkv, 1), wanted) < 2**-8 / 2


@FAST
def test_the_number_of_threads_does_not_matter():
    qkv, threads, results = draw(1, 700, 2, 32), torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(volume_attention(qkv, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("place", [0, 40, 80])
def test_what_is_not_finite_is_not_hidden(place: int):
    qkv = draw(1, 300, 1, 32)
    qkv[0, 290, place] = torch.nan
    out = volume_attention(qkv, 1)
    assert out[0, 290].isnan().any()
    assert out[0, 0].isnan().any() == (place > 31)  # its key and its value are everyone's


@FAST
def test_wrong_arguments():
    qkv, out = draw(1, 5, 2, 6), torch.empty(1, 5, 12, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="must be contiguous bfloat16"):
        ops._volume_attention(qkv.float(), 2, out)
    with pytest.raises(RuntimeError, match="multiple of 5 heads"):
        ops._volume_attention(qkv, 5, out)
    with pytest.raises(RuntimeError, match="1 to 128 channels, got 130"):
        ops._volume_attention(draw(1, 5, 1, 130), 1, torch.empty(1, 5, 130, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 160])
def test_others_are_pytorchs(dtype: torch.dtype, dim: int):
    qkv = draw(2, 20, 2, dim).to(dtype)
    out = volume_attention(qkv, 2)
    assert out.dtype == dtype
    assert error(out, definition(qkv.double(), 2)) < (5e-3 if dtype == torch.bfloat16 else 1e-6)
    assert volume_attention(qkv[:, :0], 2).shape == (2, 0, 2 * dim)
