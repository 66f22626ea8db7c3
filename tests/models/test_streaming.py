"""The decoder in slabs against the untiled one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meddiff.config import PRESETS
from meddiff.models import PatchVolumeAutoencoder
from meddiff.models.streaming import Kept, Moments, NormConv, SlabDecoder, Up

TINY = PRESETS["tiny"].autoencoder
GENEROUS = 2**40


@pytest.fixture(scope="module")
def decoders(reference_weights):
    models = {f: reference_weights(PatchVolumeAutoencoder(dataclasses.replace(TINY, downsample=f))) for f in (4, 8)}
    return {f: model.decoder for f, model in models.items()}


def latent(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("downsample", [4, 8])
@pytest.mark.parametrize("planes", [1, 3, 16, None])
@pytest.mark.parametrize("budget", [0, 100_000, GENEROUS])
def test_slabs_equal_the_whole(decoders, downsample, planes, budget, relative_error):
    z = latent(1, 8, 3, 2, 5)
    slabs = SlabDecoder(decoders[downsample], budget, planes)
    assert relative_error(slabs(z), decoders[downsample](z)) < 1e-5
    assert slabs.kept_bytes == 0


def test_the_budget_decides_what_is_kept(decoders, monkeypatch):
    peaks = {}
    for budget in (0, 100_000, 400_000, GENEROUS):
        decoder = SlabDecoder(decoders[8], budget, 4)
        seen = []
        original = decoder._keep
        monkeypatch.setattr(
            decoder, "_keep", lambda x, o=original, s=seen, d=decoder: (o(x), s.append(d.kept_bytes))[0]
        )
        decoder(latent(1, 8, 4, 2, 2))
        peaks[budget] = max(seen)
    upsampled = 16 * 16 * 8 * 8 * 4  # the input of the last up-convolution is kept whatever the budget
    assert peaks[0] <= 3 * upsampled
    assert peaks[100_000] <= 100_000 + 3 * upsampled and peaks[400_000] <= 400_000
    assert peaks[0] < peaks[400_000] < peaks[GENEROUS]


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 4)] * 3),
    batch=st.integers(1, 2),
    planes=st.integers(1, 40),
    budget=st.integers(0, 600_000),
)
def test_any_size_and_budget(decoders, relative_error, size, batch, planes, budget):
    z = latent(batch, 8, *size)
    with torch.no_grad():
        assert relative_error(SlabDecoder(decoders[4], budget, planes)(z), decoders[4](z)) < 1e-5


def test_the_same_plan_gives_the_same_bits(decoders):
    z = latent(1, 8, 3, 2, 2)
    first, second = (SlabDecoder(decoders[8], 100_000, 5)(z) for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_is_no_worse_than_untiled(reference_weights, relative_error):
    exact = reference_weights(PatchVolumeAutoencoder(TINY)).decoder
    rounded = reference_weights(PatchVolumeAutoencoder(TINY)).to(torch.bfloat16).decoder
    z = latent(1, 8, 4, 4, 4).bfloat16()
    wanted = exact(z.float())
    untiled = relative_error(rounded(z), wanted)
    for budget in (0, GENEROUS):
        assert relative_error(SlabDecoder(rounded, budget, 6)(z), wanted) < 1.1 * untiled


def test_statistics_against_float64_with_a_large_offset():
    x = 1000 + 0.1 * torch.randn(1, 8, 20, 33, 47, generator=torch.Generator().manual_seed(0))
    moments = Moments(8, x.device)
    for slab in x.split(3, dim=2):
        moments.add(slab)
    mean, variance = moments.of_groups(4)
    groups = x.double().view(4, -1)
    torch.testing.assert_close(mean.view(4, 2)[:, 1], groups.mean(1).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance.view(4, 2)[:, 0], groups.var(1, correction=0).float(), rtol=1e-4, atol=0)


def test_every_range_of_planes(decoders):
    up, block = decoders[8].conv_blocks[1].up.conv_trans, decoders[8].conv_blocks[1].res2
    x = latent(1, up.in_channels, 5, 3, 4)
    moments = Moments(up.in_channels, x.device)
    moments.add(x)
    wholes = {
        Up(Kept(x), up): up(x),
        NormConv(Kept(x), moments, block.norm1, block.conv1): block.conv1(block.norm1(x)),
    }
    for planes, whole in wholes.items():
        depth = planes.size[0]
        assert tuple(whole.shape[2:]) == planes.size
        for start in range(depth):
            for stop in range(start + 1, depth + 1):
                torch.testing.assert_close(planes.planes(start, stop), whole[:, :, start:stop], rtol=1e-4, atol=1e-4)
