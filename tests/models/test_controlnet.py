"""The steered BiFlowNet: nothing changes at the start, and then only where and by what it should."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from meddiff.config import PRESETS, ControlNetConfig
from meddiff.models import BiFlowNet, Control, ControlNet, SteeredDenoiser

TINY = PRESETS["tiny"].denoiser
LATENT = ControlNetConfig(denoiser=TINY)
VOXELS = ControlNetConfig(denoiser=TINY, encoder="convolutional", channels=4, widths=(4, 6, 8))
CONFIGS = {
    "latent": LATENT,
    "voxels": VOXELS,
    "noisy latent": dataclasses.replace(LATENT, enters=("latent",)),
    "all places": dataclasses.replace(VOXELS, enters=("latent", "init_conv", "tokens")),
    "intra-patch flow": dataclasses.replace(LATENT, copied=("intra_patch", "middle"), enters=("tokens",)),
    "inter-patch flow": dataclasses.replace(LATENT, copied=("down_path", "middle"), enters=("init_conv",)),
    "without middle": dataclasses.replace(LATENT, copied=("intra_patch", "down_path")),
    "token patch 2": dataclasses.replace(LATENT, denoiser=dataclasses.replace(TINY, token_patch=2)),
}


@pytest.fixture(scope="module")
def denoiser(reference_weights):
    return reference_weights(BiFlowNet(TINY))


def base_of(config, denoiser, reference_weights):
    return denoiser if config.denoiser == TINY else reference_weights(BiFlowNet(config.denoiser))


def inputs(batch=1, size=(8, 16, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 8, *size, generator=generator)
    return x, torch.arange(batch) * 100 + 7, torch.arange(batch), torch.tensor(size) / 64


def condition(config, batch=1, size=(8, 16, 8), seed=1):
    if config.encoder == "convolutional":
        size = tuple(n * config.downsample for n in size)
    return torch.randn(batch, config.channels, *size, generator=torch.Generator().manual_seed(seed))


def opened(network):
    """The network with zero convolutions that are none any more."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(2)
    for parameter in [*network.entries.parameters(), *network.exits.parameters()]:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return network


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_at_the_start_the_steered_estimate_is_the_bases_bit_for_bit(config, denoiser, reference_weights):
    base = base_of(config, denoiser, reference_weights)
    network = ControlNet.from_denoiser(base, config)
    x, t, y, resolution = inputs(2)
    wanted = base(x, t, y, resolution)
    got = base(x, t, y, resolution, Control(network, condition(config, 2)))
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_opened_convolution_matters(config, denoiser, reference_weights):
    """Each way out of the copy, and each place where the condition enters, changes the estimate by itself."""
    base = base_of(config, denoiser, reference_weights)
    network = ControlNet.from_denoiser(base, config)
    arguments, given = inputs(), condition(config)
    wanted = base(*arguments)
    exits = {name: parameter for name, parameter in network.exits.named_parameters() if name.endswith("weight")}
    features, skips, middle = 2, 2 * len(TINY.dim_mults), "middle" in config.copied
    flows = {"intra_patch": features + middle, "down_path": skips + middle, "middle": 0}
    assert len(exits) == sum(flows[part] for part in config.copied)
    generator = torch.Generator().manual_seed(3)

    def draw(parameter):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    for name, parameter in exits.items():
        draw(parameter)
        assert (base(*arguments, Control(network, given)) - wanted).abs().max() > 1e-4, name
        parameter.data.zero_()
    for parameter in exits.values():
        draw(parameter)
    without = base(*arguments, Control(network, given))
    for place, entry in network.entries.items():
        draw(entry.weight)
        assert (base(*arguments, Control(network, given)) - without).abs().max() > 1e-4, place
        entry.weight.data.zero_()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_reach_all_of_the_copy_and_of_the_encoder_and_nothing_else(config, denoiser, reference_weights):
    base = base_of(config, denoiser, reference_weights)
    network = opened(ControlNet.from_denoiser(base, config))
    given = condition(config)
    with torch.enable_grad():
        steer = lambda x, embedding: network(x, embedding, given)  # noqa: E731
        base(*inputs(), steer).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert [name for name, p in base.named_parameters() if p.grad is not None] == []


def test_at_the_start_the_ways_out_learn_first(denoiser):
    network = ControlNet.from_denoiser(denoiser, LATENT)
    given = condition(LATENT)
    with torch.enable_grad():
        denoiser(*inputs(), lambda x, e: network(x, e, given)).square().mean().backward()
    moving = {name.split(".")[0] for name, p in network.named_parameters() if p.grad.abs().sum() > 0}
    assert moving == {"exits"}


def test_the_copy_is_the_base(denoiser):
    network, weights = ControlNet.from_denoiser(denoiser, LATENT), denoiser.state_dict()
    copied = {key for key in network.state_dict() if key.split(".")[0] not in ("entries", "exits", "condition_encoder")}
    assert copied == {
        key
        for key in weights
        if key.split(".")[0] not in ("time_mlp", "cond_emb", "res_mlp", "IntraPatchFlow_output", "ups", "final_conv")
    }
    for key in copied:
        assert torch.equal(network.state_dict()[key], weights[key]), key
        assert network.state_dict()[key].data_ptr() != weights[key].data_ptr()
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_controls_add_up_and_strength_scales(denoiser):
    network = opened(ControlNet.from_denoiser(denoiser, LATENT))
    x, t, y, resolution = arguments = inputs()
    given, other = condition(LATENT), condition(LATENT, seed=5)
    embedding = denoiser._condition(t, y, resolution[None])
    one, half = (Control(network, given, s)(x, embedding) for s in (1.0, 0.5))
    for a, b in zip(
        (*one.features, *one.skips, one.tokens, one.middle), (*half.features, *half.skips, half.tokens, half.middle)
    ):
        torch.testing.assert_close(a / 2, b)
    base, once = denoiser(*arguments), denoiser(*arguments, Control(network, given))
    assert torch.equal(denoiser(*arguments, Control(network, given, 0.0)), base)
    twice = denoiser(*arguments, [Control(network, given, 0.5)] * 2)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)
    both = denoiser(*arguments, [Control(network, given), Control(network, other)])
    for alone in (given, other):
        assert (both - denoiser(*arguments, Control(network, alone))).abs().max() > 1e-3
    opposite = denoiser(*arguments, [Control(network, given), Control(network, given, -1.0)])
    torch.testing.assert_close(opposite, base, rtol=1e-4, atol=1e-5)


def test_one_condition_serves_a_batch(denoiser):
    network = opened(ControlNet.from_denoiser(denoiser, VOXELS))
    x, t, y, resolution = inputs(2)
    both = denoiser(x, t, y, resolution, Control(network, condition(VOXELS)))
    for b in range(2):
        alone = denoiser(x[b : b + 1], t[b : b + 1], y[b : b + 1], resolution, Control(network, condition(VOXELS)))
        torch.testing.assert_close(both[b : b + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_condition_acts_where_it_is(denoiser):
    """The intra-patch flow never leaves its sub-volume, nor does what the condition adds to it."""
    config = CONFIGS["intra-patch flow"]
    network = opened(ControlNet.from_denoiser(denoiser, config))
    x, t, y, resolution = inputs()
    embedding, given = denoiser._condition(t, y, resolution[None]), condition(config)
    before = network.residuals(x, embedding, network.encode(given))
    given[..., 8:, :] += 1
    after = network.residuals(x, embedding, network.encode(given))
    for a, b in zip(before.features, after.features):
        change = (a - b).abs().amax(dim=1)[0]
        assert change[:, 8:].min() > 0 and change[:, :8].max() == 0


def test_the_sampler_sees_a_denoiser(denoiser):
    network = opened(ControlNet.from_denoiser(denoiser, LATENT))
    control = Control(network, condition(LATENT))
    steered = SteeredDenoiser(denoiser, [control])
    assert (steered.config, steered.device, steered.dtype) == (denoiser.config, denoiser.device, denoiser.dtype)
    assert torch.equal(steered(*inputs()), denoiser(*inputs(), control))
    assert all(
        a is b for a, b in zip(steered.parameters(), [*denoiser.parameters(), *network.parameters()], strict=True)
    )


def test_bfloat16(denoiser, relative_error):
    network = opened(ControlNet.from_denoiser(denoiser, LATENT))
    wanted = denoiser(*inputs(), Control(network, condition(LATENT)))
    half = copy.deepcopy(denoiser).to(torch.bfloat16)
    got = half(*inputs(), Control(network.to(torch.bfloat16), condition(LATENT)))
    assert got.dtype == torch.bfloat16 and relative_error(got, wanted) < 0.1


def test_activations_stay_channels_last(denoiser):
    network = opened(ControlNet.from_denoiser(denoiser, VOXELS))
    strided = []

    def look(module, inputs, output):
        if not output.is_contiguous(memory_format=torch.channels_last_3d):
            strided.append(type(module).__name__)

    hooks = [m.register_forward_hook(look) for m in network.modules() if type(m).__name__ in ("Conv3d", "ResnetBlock")]
    residuals = network(inputs(2)[0], torch.randn(2, 8 * TINY.dim), condition(VOXELS, 2))
    assert len(hooks) > 20 and strided == []
    assert all(r.is_contiguous(memory_format=torch.channels_last_3d) for r in (*residuals.features, *residuals.skips))


@pytest.mark.parametrize(
    "config, shape, message",
    [
        (LATENT, (1, 4, 8, 16, 8), r"must be \[B, 8, D, H, W\]"),
        (LATENT, (1, 8, 8, 16), r"got \(1, 8, 8, 16\)"),
        (LATENT, (0, 8, 8, 16, 8), r"got \(0,"),
        (VOXELS, (1, 4, 64, 128, 60), "positive multiples of 8"),
        (LATENT, (1, 8, 8, 16, 16), r"batch and size 1, \(8, 16, 8\), got 1, \(8, 16, 16\)"),
        (LATENT, (3, 8, 8, 16, 8), r"got 3, \(8, 16, 8\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(denoiser, config, shape, message):
    network = ControlNet.from_denoiser(denoiser, config)
    with pytest.raises(ValueError, match=message):
        denoiser(*inputs(), Control(network, torch.zeros(shape)))


def test_a_base_of_another_kind_is_refused(denoiser):
    with pytest.raises(ValueError, match="must be the base's"):
        ControlNet.from_denoiser(denoiser, ControlNetConfig())
