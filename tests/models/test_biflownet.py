from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from meddiff.config import PRESETS
from meddiff.models import BiFlowNet
from meddiff.models.biflownet import ChannelNorm
from meddiff.models.dit import DiTBlock, position_embedding

TINY = PRESETS["tiny"].denoiser
MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "state_dict_manifest.json").read_text())


@pytest.fixture(scope="module")
def denoiser(reference_weights):
    return reference_weights(BiFlowNet(TINY))


def inputs(batch, *size, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=generator)
    return x, torch.arange(batch) * 100, torch.arange(batch), torch.tensor(size) / 64


@pytest.mark.parametrize("preset", ["8x", "4x"])
def test_keys_and_shapes_are_the_released_ones(preset):
    with torch.device("meta"):
        model = BiFlowNet(PRESETS[preset].denoiser)
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == MANIFEST[f"biflownet_{preset}"]


@pytest.mark.parametrize(
    "name, token_patch",
    [("biflownet_tiny_patch1", 1), ("biflownet_tiny_patch2", 2), ("biflownet_tiny_patch2_grid", 2)],
)
def test_reference_outputs(name, token_patch, reference, reference_weights, relative_error):
    model = reference_weights(BiFlowNet(dataclasses.replace(TINY, token_patch=token_patch)))
    wanted = reference(name)
    noise = model(wanted["x"], wanted["t"], wanted["y"], wanted["resolution"])
    assert relative_error(noise, wanted["eps"]) < 1e-5


def test_a_batch_is_runs_of_one(denoiser):
    x, t, y, resolution = inputs(2, 16, 8, 24)
    both = denoiser(x, t, y, resolution)
    for b in range(2):
        alone = denoiser(x[b : b + 1], t[b : b + 1], y[b : b + 1], resolution[None])
        torch.testing.assert_close(both[b : b + 1], alone, rtol=1e-4, atol=1e-4)


def test_every_condition_matters(denoiser):
    x, t, y, resolution = inputs(1, 8, 8, 8)
    base = denoiser(x, t, y, resolution)
    for changed in [(t + 1, y, resolution), (t, y + 1, resolution), (t, y, resolution * torch.tensor([1, 1, 2]))]:
        assert (denoiser(x, *changed) - base).abs().max() > 1e-4


def test_attention_never_leaves_its_sub_volume(denoiser):
    x, t, y, resolution = inputs(1, 16, 16, 8)
    condition = denoiser._condition(t, y, resolution[None])
    before = denoiser._intra_patch_flow(x, condition)
    x[:, :, 8:, :8] += 1
    for old, new in zip(before, denoiser._intra_patch_flow(x, condition), strict=True):
        change = (old - new).abs().amax(dim=1)[0]
        assert change[8:, :8].min() > 0
        change[8:, :8] = 0
        assert change.max() == 0


def test_position_embedding_by_its_definition():
    embedding = position_embedding(8, 24)
    assert embedding.shape == (1, 512, 24)
    for d, h, w, k in [(0, 0, 0, 0), (3, 0, 7, 2), (7, 5, 1, 3)]:
        row = embedding[0, d * 64 + h * 8 + w]
        for axis, place in enumerate((d, h, w)):
            angle = place * 10000 ** (-k / 4)
            assert row[8 * axis + k].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[8 * axis + 4 + k].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_layer_norm_of_the_dit_has_eps_1e_6():
    block = DiTBlock(24, 24, heads=8, window=1, mlp_ratio=4)
    torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
    bias = torch.zeros(6, 24)
    bias[5] = 1  # the gate of the MLP; attention stays closed
    block.adaLN_modulation[1].bias.copy_(bias.flatten())
    x = torch.randn(1, 1, 1, 5, 24) * 1e-3  # a variance of 1e-6, where eps shows
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    hidden = F.gelu(F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias), approximate="tanh")
    wanted = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x, torch.zeros(1, 24)), wanted, rtol=1e-4, atol=1e-5)


def test_channel_norm_has_eps_1e_5_and_biased_variance():
    norm = ChannelNorm(6)
    norm.gamma.copy_(torch.arange(1.0, 7).view(1, 6, 1, 1, 1))
    x = torch.randn(2, 6, 3, 4, 5) * 3e-3
    wanted = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.gamma
    torch.testing.assert_close(norm(x), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16(reference, reference_weights, relative_error):
    model = reference_weights(BiFlowNet(TINY)).to(torch.bfloat16)
    wanted = reference("biflownet_tiny_patch1")
    noise = model(wanted["x"], wanted["t"], wanted["y"], wanted["resolution"])
    assert noise.dtype == torch.bfloat16 and relative_error(noise, wanted["eps"]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_stay_channels_last(dtype):
    model = BiFlowNet(TINY).to(dtype).eval()
    strided = []

    def look(module, inputs, output):
        if output.ndim == 5 and not output.is_contiguous(memory_format=torch.channels_last_3d):
            strided.append(type(module).__name__)

    names = ("Block", "ResnetBlock", "ResidualAttention", "ChannelNorm", "Conv3d", "ConvTranspose3d")
    hooks = [m.register_forward_hook(look) for m in model.modules() if type(m).__name__ in names]
    model(*inputs(2, 16, 8, 8))
    assert len(hooks) > 50 and strided == []


def test_every_parameter_gets_a_gradient():
    model = BiFlowNet(TINY)
    with torch.enable_grad():
        model(*inputs(2, 16, 8, 8)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(1, 8, 8, 8, 12)}, "multiples of 8"),
        ({"x": torch.zeros(1, 4, 8, 8, 8)}, r"\[B, 8, D, H, W\]"),
        ({"x": torch.zeros(0, 8, 8, 8, 8)}, r"got \(0, 8, 8, 8, 8\)"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, r"t must be \[1\]"),
        ({"y": torch.zeros((), dtype=torch.int64)}, r"y must be \[1\]"),
        ({"resolution": torch.zeros(2)}, r"resolution must be \[1, 3\]"),
    ],
)
def test_errors_say_what_was_wanted(denoiser, change, message):
    arguments = dict(zip(("x", "t", "y", "resolution"), inputs(1, 8, 8, 8), strict=True))
    with pytest.raises(ValueError, match=message):
        denoiser(**arguments | change)
