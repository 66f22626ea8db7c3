"""Every plan against the untiled decoder."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meddiff.config import PRESETS, AutoencoderConfig
from meddiff.decode import Attention, Conv, Norm, UpConv, decode_jointly, joint, make_plan
from meddiff.decode.plan import KEPT, PARKED, RECOMPUTED, _Planner
from meddiff.models import PatchVolumeAutoencoder

TINY = PRESETS["tiny"].autoencoder
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoders(reference_weights):
    models = {f: reference_weights(PatchVolumeAutoencoder(dataclasses.replace(TINY, downsample=f))) for f in (4, 8)}
    return {f: model.decoder for f, model in models.items()}


def latent(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def planner(layers, z):
    batch, channels, *size = z.shape
    return _Planner(layers, tuple(size), batch, channels, z.dtype, CPU, False)


def plan_with(layers, z, kinds, cut):
    """The plan that stores the finest tensors but the volume as in `kinds`, the others whole, in slabs of `cut`."""
    plan = planner(layers, z)
    parts = [plan._candidate(segment, {}, cut) for segment in plan.segments[:-1]]
    segment = plan.segments[-1]
    parts.append(plan._candidate(segment, dict(zip(segment, kinds)), cut))
    plan._best = lambda segment, budget: (parts[plan.segments.index(segment)],) * 2
    return plan.make(float("inf"))


# of the up-convolution's output and the four tensors after it
KINDS = {
    "whole": [KEPT] * 5,
    "wide one recomputed": [RECOMPUTED] + [KEPT] * 4,
    "hidden ones recomputed": [KEPT, RECOMPUTED, KEPT, RECOMPUTED, KEPT],
    "sums recomputed": [RECOMPUTED, KEPT, RECOMPUTED, KEPT, RECOMPUTED],
    "all recomputed": [RECOMPUTED] * 5,
    "parked": [PARKED, KEPT, PARKED, RECOMPUTED, PARKED],
}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("cut", [(1, 8), (3, 40), (4, 2**16)])
def test_every_kind_of_plan_equals_the_untiled_decoder(decoders, kinds, cut, relative_error):
    z = latent(2, 8, 3, 2, 4)
    layers = decoders[4].layers()
    plan = plan_with(layers, z, KINDS[kinds], cut)
    wanted = copy.deepcopy(decoders[4]).double()(z.double())
    assert relative_error(decode_jointly(layers, z, plan=plan), wanted) < 1e-5


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 5), (2, 1, 3)])
@pytest.mark.parametrize("downsample", [4, 8])
def test_odd_latents(decoders, size, downsample, relative_error):
    z, layers = latent(1, 8, *size), decoders[downsample].layers()
    wanted = decoders[downsample](z)
    least = planner(layers, z)
    least = max(least._best(segment, 0)[0].peak for segment in least.segments)
    for budget in (None, least):
        assert relative_error(decode_jointly(layers, z, budget), wanted) < 1e-5


def test_a_deep_latent_whose_attention_lends_its_memory(decoders, relative_error):
    z, layers = latent(1, 8, 20, 1, 1), decoders[8].layers()
    plan = make_plan(layers, tuple(z.shape), z.dtype, CPU)
    lent = {type(layers[t - 1]) for t in plan.over.values() if t}
    assert Attention in lent
    assert relative_error(decode_jointly(layers, z, plan=plan), decoders[8](z)) < 1e-5


@settings(max_examples=12, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 3)] * 3),
    batch=st.integers(1, 2),
    downsample=st.sampled_from([4, 8]),
    share=st.floats(0, 1),
)
def test_any_size_and_budget(decoders, relative_error, size, batch, downsample, share):
    z, layers = latent(batch, 8, *size), decoders[downsample].layers()
    most = make_plan(layers, tuple(z.shape), z.dtype, CPU).peak_bytes
    plans = planner(layers, z)
    least = max(plans._best(segment, 0)[0].peak for segment in plans.segments)
    budget = int(least + share * (most - least))
    plan = make_plan(layers, tuple(z.shape), z.dtype, CPU, budget)
    assert plan.peak_bytes <= budget
    assert relative_error(decode_jointly(layers, z, plan=plan), decoders[downsample](z)) < 1e-5


@pytest.mark.parametrize("kinds", ["whole", "wide one recomputed", "all recomputed"])
def test_bfloat16_is_no_worse_than_untiled(decoders, kinds, relative_error):
    exact, rounded = decoders[4], copy.deepcopy(decoders[4]).bfloat16()
    z = latent(1, 8, 4, 4, 4).bfloat16()
    wanted = exact(z.float())
    layers = rounded.layers()
    volume = decode_jointly(layers, z, plan=plan_with(layers, z, KINDS[kinds], (4, 2**10)))
    assert volume.dtype == torch.bfloat16
    assert relative_error(volume, wanted) < 1.1 * relative_error(rounded(z), wanted)


@pytest.mark.parametrize("width", [24, 48])
def test_released_widths(reference_weights, width, relative_error):
    config = AutoencoderConfig(n_hiddens=width, num_groups=24, n_codes=16)
    decoder = reference_weights(PatchVolumeAutoencoder(config)).decoder
    z, layers = latent(1, 8, 1, 2, 1), decoder.layers()
    wanted = copy.deepcopy(decoder).double()(z.double())
    volume = decode_jointly(layers, z, plan=plan_with(layers, z, KINDS["wide one recomputed"], (2, 64)))
    assert relative_error(volume, wanted) < 1e-5


def test_the_same_plan_gives_the_same_bits(decoders):
    z, layers = latent(1, 8, 3, 2, 2), decoders[8].layers()
    plan = plan_with(layers, z, KINDS["sums recomputed"], (2, 64))
    assert torch.equal(decode_jointly(layers, z, plan=plan), decode_jointly(layers, z, plan=plan))


def test_statistics_against_float64_with_a_large_offset():
    """Merged over tiles of different sizes: a 1³ convolution with weight 1, of x with mean 1000 and deviation 0.1."""
    x = 1000 + 0.1 * latent(1, 6, 9, 7, 11)
    one = torch.eye(6).view(6, 6, 1, 1, 1)
    layers = [Conv("same", 0, one), Conv("normed", 1, one, norm=Norm(3, torch.ones(6), torch.zeros(6), 0.0))]
    plan = make_plan(layers, tuple(x.shape), x.dtype, CPU)
    plan = dataclasses.replace(plan, passes=tuple(dataclasses.replace(p, planes=2, tile=(4, 6)) for p in plan.passes))
    decoder = joint._Decoder(plan, layers, x)
    for start in range(0, 9, 2):
        decoder.visit(plan.passes[0], start)
    decoder.leave(plan.passes[0])
    mean, variance = decoder.totals[1]
    exact = torch.var_mean(x.double().flatten(2)[0], dim=1, correction=0)
    torch.testing.assert_close(mean, exact[1], rtol=1e-7, atol=0)
    # a tile's mean of 1000 is rounded by up to 3e-5, and differs from the whole's by about 0.1 / √48
    torch.testing.assert_close(variance, exact[0], rtol=1e-4, atol=0)


def other_decoder():
    """A decoder of another kind: attention with biases, nearest doubling, shortcuts, norms without SiLU."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5

    def norm(channels):
        return Norm(4, 1 + 0.1 * draw(channels), 0.1 * draw(channels), 1e-6)

    return [
        Conv("in", 0, draw(16, 3, 1, 1, 1), draw(16)),
        Attention("attention", 1, norm(16), draw(96, 16), draw(96), draw(16, 32, 1, 1, 1), draw(16), 2),
        Conv("up 1", 2, draw(16, 16, 3, 3, 3), draw(16), upsample=True),
        Conv("hidden", 3, draw(8, 16, 3, 3, 3), draw(8), norm(16), silu=True),
        Conv("sum", 4, draw(8, 8, 3, 3, 3), draw(8), norm(8), silu=True, residual=3,
             residual_weight=draw(8, 16, 1, 1, 1)),
        Conv("up 2", 5, draw(8, 8, 3, 3, 3), None, norm(8), upsample=True),
        Conv("second", 6, draw(8, 8, 3, 3, 3), draw(8), norm(8), silu=True, residual=6),
        Conv("out", 7, draw(2, 8, 3, 3, 3), draw(2), norm(8), silu=True),
    ]  # fmt: skip


def untiled(layers, z):
    tensors = [z]
    for layer in layers:
        x = tensors[layer.source]
        if isinstance(layer, UpConv):
            tensors.append(F.conv_transpose3d(x, layer.weight, layer.bias, stride=2, padding=1))
            continue
        n = layer.norm
        h = x if n is None else F.group_norm(x, n.groups, n.weight, n.bias, n.eps)
        if isinstance(layer, Attention):
            qkv = F.linear(h.flatten(2).mT, layer.qkv_weight, layer.qkv_bias).unflatten(2, (3, layer.heads, -1))
            h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
            h = h.mT.unflatten(2, x.shape[2:])
            tensors.append(x + F.conv3d(h, layer.out_weight, layer.out_bias))
            continue
        h = F.silu(h) if layer.silu else h
        h = F.interpolate(h, scale_factor=2, mode="nearest") if layer.upsample else h
        h = F.conv3d(h, layer.weight, layer.bias, padding=layer.weight.shape[2] // 2)
        if layer.residual is not None:
            r = tensors[layer.residual]
            h = h + (r if layer.residual_weight is None else F.conv3d(r, layer.residual_weight, layer.residual_bias))
        tensors.append(h)
    return tensors[-1]


@pytest.mark.parametrize("cut", [(1, 8), (5, 64)])
@pytest.mark.parametrize("kinds", [[KEPT, KEPT], [RECOMPUTED, KEPT], [RECOMPUTED, RECOMPUTED]])
def test_decoders_of_other_projects(cut, kinds, relative_error):
    layers, z = other_decoder(), latent(1, 3, 3, 5, 2)
    assert relative_error(decode_jointly(layers, z, plan=plan_with(layers, z, kinds, cut)), untiled(layers, z)) < 1e-5


def test_layers_that_do_not_fit_together():
    layers = other_decoder()
    shape = (1, 3, 2, 2, 2)
    for i, changes, message in (
        (0, {"source": 1}, "in must read tensors that are written before it"),
        (3, {"source": 0, "norm": None}, "hidden reads 16 channels, and its source has 3"),
        (6, {"residual": 3}, "second adds 8 channels of its size"),
        (1, {"source": 0}, "attention reads 16 channels"),
    ):
        wrong = [dataclasses.replace(layer, **changes) if j == i else layer for j, layer in enumerate(layers)]
        with pytest.raises(ValueError, match=f"decode: {message}"):
            make_plan(wrong, shape, torch.float32, CPU)


def test_a_callback_that_raises_ends_the_decoding(decoders):
    seen = []

    def receive(slab, sample, start):
        seen.append(start)
        if len(seen) == 2:
            raise KeyboardInterrupt

    layers, z = decoders[4].layers(), latent(1, 8, 4, 2, 2)
    plan = plan_with(layers, z, KINDS["whole"], (4, 2**10))
    with pytest.raises(KeyboardInterrupt):
        decode_jointly(layers, z, on_slab=receive, plan=plan)
    assert seen == [0, 4]


def test_out_of_memory_plans_once_more(decoders, monkeypatch, caplog, relative_error):
    layers, z = decoders[4].layers(), latent(1, 8, 4, 3, 3)
    peaks, slabs, run = [], [], joint._run

    def scarce(plan, layers, z, on_slab, progress):
        peaks.append(plan.peak_bytes)
        if len(peaks) == 1:
            on_slab(torch.zeros(1, 1, 3, 12, 12), 0, 0)  # handed out before the memory was gone
            raise torch.OutOfMemoryError("no memory")
        return run(plan, layers, z, on_slab, progress)

    monkeypatch.setattr(joint, "_run", scarce)
    with caplog.at_level(logging.WARNING):
        decode_jointly(layers, z, on_slab=lambda slab, sample, start: slabs.append((start, slab)))
    assert peaks[1] <= 0.7 * peaks[0] and "planning again" in caplog.text
    starts = [start for start, _ in slabs]
    assert starts[:2] == [0, 3] and starts == sorted(starts)
    volume = torch.cat([slab for _, slab in slabs], 2)
    assert relative_error(volume[:, :, 3:], decoders[4](z)[:, :, 3:]) < 1e-5

    def hopeless(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(joint, "_run", hopeless)
    with pytest.raises(torch.OutOfMemoryError):
        decode_jointly(layers, z)
    monkeypatch.setattr(joint, "_run", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        decode_jointly(layers, z)


@pytest.mark.parametrize("name", ["conv_blocks.1.res2.conv1", "final_block"])
def test_numbers_that_are_not_finite_name_the_layer(decoders, name):
    decoder = copy.deepcopy(decoders[4])
    layers = decoder.layers()
    layer = next(layer for layer in layers if layer.name == name)
    layer.weight[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"the output of {name} is not finite"):
        decode_jointly(layers, latent(1, 8, 2, 2, 2))
