"""Decoders written in PyTorch against the plan that their layers make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meddiff
from meddiff.decode import (
    Blur,
    Conv,
    UnsupportedLayer,
    UpConv,
    decode_jointly,
    layers_of,
    make_plan,
    plan,
    tiled_decode,
)
from meddiff.decode.plan import KEPT, RECOMPUTED, Plan, _Planner

CPU = torch.device("cpu")


def conv(i: int, o: int, k: int = 3) -> nn.Conv3d:
    return nn.Conv3d(i, o, k, padding=k // 2)


def decoder(*doubling: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        conv(4, 8),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        conv(8, 8, 1),
        nn.Sequential(nn.Identity(), *doubling),
        nn.GroupNorm(2, 8, eps=1e-3),
        conv(8, 6),
        nn.SiLU(),
        nn.ConvTranspose3d(6, 8, 4, stride=2, padding=1, bias=False) if not doubling else conv(6, 8),
        nn.GroupNorm(8, 8),
        nn.SiLU(),
        conv(8, 2),
    )


DECODERS = {
    "nearest": lambda: decoder(nn.Upsample(scale_factor=2, mode="nearest"), conv(8, 8)),
    "trilinear": lambda: decoder(nn.Upsample(scale_factor=(2.0, 2.0, 2.0), mode="trilinear"), conv(8, 8)),
    "trilinear, then norm": lambda: decoder(nn.Upsample(scale_factor=2, mode="trilinear")),
    "norm of the latent": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), conv(4, 8), *decoder(nn.Identity())[1:]),
    "transposed": lambda: decoder(nn.ConvTranspose3d(8, 8, 4, stride=2, padding=1)),
}


def least(layers, z: torch.Tensor) -> int:
    planner = _Planner(layers, tuple(z.shape[2:]), len(z), z.shape[1], z.dtype, CPU, False)
    return max(planner._best(segment, 0)[0].peak for segment in planner.segments)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 7), (9, 20, 4)])
def test_any_size_in_the_least_memory(kind, size, relative_error):
    torch.manual_seed(0)
    module, z = DECODERS[kind](), torch.randn(2, 4, *size)
    layers = layers_of(module)
    wanted = module(z)
    for budget in (None, least(layers, z)):
        assert relative_error(decode_jointly(layers, z, budget), wanted) < 1e-5


@pytest.mark.parametrize("kind", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("cut", [(1, 8), (2, 40), (4, 2**16)])
@pytest.mark.parametrize("decoder", ["nearest", "trilinear", "trilinear, then norm"])
def test_doublings_in_every_kind_of_plan(decoder, cut, kind, relative_error):
    torch.manual_seed(0)
    module, z = DECODERS[decoder](), torch.randn(1, 4, 4, 3, 5)
    layers = layers_of(module)
    plan = _Planner(layers, tuple(z.shape[2:]), 1, z.shape[1], z.dtype, CPU, False)
    free = [t for t in plan.segments[-1] if t not in plan.doubled and t != plan.last]
    parts = [plan._candidate(segment, {}, cut) for segment in plan.segments[:-1]]
    parts.append(plan._candidate(plan.segments[-1], dict.fromkeys(free, kind), cut))
    plan._best = lambda segment, budget: (parts[plan.segments.index(segment)],) * 2
    assert relative_error(decode_jointly(layers, z, plan=plan.make(float("inf"))), module(z)) < 1e-5


def test_a_doubling_costs_the_products_of_a_transposed_convolution():
    convolution = conv(8, 8)
    for mode, blurs in (("nearest", 0), ("trilinear", 1)):
        module = nn.Sequential(conv(4, 8), nn.Upsample(scale_factor=2, mode=mode), convolution)
        assert [type(layer) for layer in layers_of(module)] == [Conv, UpConv] + [Blur] * blurs
        planned = plan(module, (1, 4, 64, 64, 64))
        up = 2 * 8 * 8 * 8 * 128**3
        assert planned.passes[1].flops == up and planned.flops < 1.7 * up  # instead of more than 27/8


def test_interpolated_tensors_are_recomputed_where_memory_is_short(relative_error):
    torch.manual_seed(0)
    module, z = DECODERS["trilinear"](), torch.randn(1, 4, 6, 40, 40)
    layers = layers_of(module)
    tight = make_plan(layers, tuple(z.shape), z.dtype, CPU, least(layers, z))
    (t,) = [t for t, name in enumerate(tight.names) if name == "4.1"]
    assert tight.storage[t] == RECOMPUTED
    assert relative_error(decode_jointly(layers, z, plan=tight), module(z)) < 1e-5


UNSUPPORTED = {
    r"1 \(ReLU\) is no layer": nn.Sequential(conv(4, 4), nn.ReLU()),
    r"1\.0 \(Conv3d\) must be 3³": nn.Sequential(conv(4, 4), nn.Sequential(nn.Conv3d(4, 4, 3, stride=2, padding=1))),
    r"0 \(Conv3d\) must be 3³": nn.Sequential(nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate")),
    r"2 \(GroupNorm\) must come after a convolution": nn.Sequential(conv(4, 4), nn.SiLU(), nn.GroupNorm(2, 4)),
    r"the module \(Sequential\) must come after": nn.Sequential(conv(4, 4), nn.SiLU()),
    r"0 \(GroupNorm\) must have weight": nn.Sequential(nn.GroupNorm(2, 4, affine=False)),
    r"1 \(Upsample\) must double": nn.Sequential(conv(4, 4), nn.Upsample(scale_factor=3)),
    r"1 \(Upsample\) must be nearest or": nn.Sequential(conv(4, 4), nn.Upsample(scale_factor=2, mode="nearest-exact")),
    r"1 \(ConvTranspose3d\) must be 4³": nn.Sequential(conv(4, 4), nn.ConvTranspose3d(4, 4, 3, stride=2)),
    r"0 \(Upsample\) must come after": nn.Sequential(nn.Upsample(scale_factor=2, mode="trilinear"), conv(4, 4)),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_what_is_not_supported_is_named_with_its_path(message):
    with pytest.raises(UnsupportedLayer, match=f"^decode: {message}"):
        layers_of(UNSUPPORTED[message])


def test_pricing_a_module():
    module = DECODERS["nearest"]()
    assert meddiff.decode.plan is plan and isinstance(plan(module.to("meta"), (1, 4, 8, 8, 8)), Plan)
    roomy = plan(module, (1, 4, 8, 64, 64))
    tight = plan(module, (1, 4, 8, 64, 64), memory_budget=int(0.8 * roomy.peak_bytes))
    assert tight.peak_bytes <= 0.8 * roomy.peak_bytes and tight.seconds >= roomy.seconds
    with pytest.raises(MemoryError, match="and the budget is 1e-06 MB"):
        plan(module, (1, 4, 8, 64, 64), memory_budget=1)
    with pytest.raises(UnsupportedLayer, match="no layers"):
        plan(nn.Identity(), (1, 4, 8, 8, 8))


def test_a_plan_is_for_its_shape():
    module = DECODERS["nearest"]()
    with pytest.raises(
        ValueError, match=r"z must be torch.float32 \(1, 4, 2, 2, 2\) as planned, got .* \(1, 4, 2, 2, 3\)"
    ):
        tiled_decode(plan(module, (1, 4, 2, 2, 2)), module, torch.zeros(1, 4, 2, 2, 3))
